"""What `verify` and `generate` compile on all cores beforehand is what their model launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_triton.tools.offline import compile_ahead
from tests.support.models import random_model

pytestmark = pytest.mark.compiled


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "on_host"), [(None, ()), ("int4", ()), (None, ((), (1,), ()))])
def test_a_text_compiles_nothing_that_was_not_compiled_ahead(
    weights: str | None, on_host: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from triton.backends.nvidia.compiler import CUDABackend

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 64}
    model = random_model(dtype=torch.bfloat16, weights=weights, device="cuda", on_host=on_host, **sizes)
    finished: list[tuple[int, int]] = []
    compile_ahead(model, [(1, 1, 12), (1, 5, 12)], [model.dtype], lambda *done: finished.append(done))
    assert finished[-1][0] == finished[-1][1] >= 8

    def anew(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled anew")

    monkeypatch.setattr(CUDABackend, "make_cubin", anew)
    model.generate(torch.arange(5, device=model.device)[None], max_new_tokens=7)
    with pytest.raises(AssertionError, match="compiled anew"):
        model.generate(torch.arange(40, device=model.device)[None], max_new_tokens=2)
