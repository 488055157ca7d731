"""A forward that failed: its cache goes on only where a retry gives what the forward would have given."""

from __future__ import annotations

import pytest
import torch

from tests.support.models import cache_of, random_model, tokens


@pytest.mark.exhaustive
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize(
    ("window", "past", "new"), [(6, 5, 4), (6, 8, 2), (6, 8, 1), (6, 2, 4), (6, 0, 9), (None, 5, 4)]
)
@pytest.mark.parametrize("inference", [False, True])
def test_cache_after_a_failed_forward(window: int | None, past: int, new: int, inference: bool) -> None:
    """Layer 0 had written its keys. Where these took the slots of keys that the chunk sees, the cache is refused."""
    model = random_model(num_hidden_layers=2, sliding_window=window)
    before, chunk = tokens(2, 8), tokens(2, new, seed=1)
    with torch.inference_mode(inference):
        caches = cache_of(model, 2, 24), cache_of(model, 2, 24)
        for cache in caches if past else ():
            model(before[:, :past], cache=cache)
        handle = model.layers[1].register_forward_pre_hook(lambda *args: {}[0])
        with pytest.raises(KeyError):
            model(chunk, cache=caches[0])
        handle.remove()
        if window and past and new > 1 and past + new > window:
            with pytest.raises(ValueError, match=r"forward failed after it had overwritten keys .*needs a new cache"):
                model(chunk, cache=caches[0])
            with pytest.raises(ValueError, match="forward failed"):  # not only once
                model(chunk[:, :1], cache=caches[0])
            caches[0].lengths.zero_()
            caches[1].lengths.zero_()
        for _ in range(2):
            assert torch.equal(model(chunk, cache=caches[0]), model(chunk, cache=caches[1]))
