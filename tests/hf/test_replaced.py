"""What a user passes or replaces after `apply`: honoured as transformers does, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mixtral_triton import apply

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.compiled
T = 9
IDS = torch.randint(1, 48, (3, T), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.tensor([[T], [1], [4]])
RIGHT = (torch.arange(T) < LENGTHS).long()
BOTH = RIGHT * (torch.arange(T) > torch.tensor([[2], [-1], [1]]))


@pytest.mark.parametrize("mask", [RIGHT, BOTH], ids=["right", "both sides"])
@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("cache", [None, "static"])
def test_padding_on_the_right_sees_the_text_alone(
    cache: str | None, window: int | None, mask: torch.Tensor, make_hf: Any
) -> None:
    """Equal to transformers on every row, padding included, unless it sees no key at all, where nothing is defined."""
    model = make_hf(attn_implementation="sdpa", sliding_window=window)
    t = torch.arange(T)
    visible = (mask[:, None] > 0) & (t <= t[:, None]) & (t > t[:, None] - (window or T))
    defined = visible.any(-1)
    kwargs: dict[str, Any] = {"attention_mask": mask}
    if cache:
        kwargs["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=16)
    want = model(IDS, **kwargs).logits
    if cache:
        kwargs["past_key_values"] = transformers.StaticCache(config=model.config, max_cache_len=16)
    got = apply(model)(IDS, **kwargs).logits
    assert (got - want)[defined].abs().max() <= 1e-4 * want.abs().max() and not bool(mask[defined].all())


@pytest.mark.parametrize("lookup", [{}, {"prompt_lookup_num_tokens": 2}])
@pytest.mark.parametrize(("window", "row"), [(None, 1), (6, 2)])
def test_generate_of_a_right_padded_prompt(window: int | None, row: int, lookup: dict[str, int], make_hf: Any) -> None:
    model, ids = make_hf(sliding_window=window), IDS[row, None]
    kwargs = {"attention_mask": RIGHT[row, None], "max_new_tokens": 8, "do_sample": False} | lookup
    want = model.generate(ids, **kwargs)
    assert torch.equal(apply(model).generate(ids, **kwargs), want)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_integer_masks_of_four_dimensions_are_refused(tokens: int, dtype: torch.dtype, make_hf: Any) -> None:
    """Whatever their size: one of two keys has the size of an interval, one that begins with 0 that of a sequence."""
    model, mask = apply(make_hf()), torch.ones(1, 1, tokens, 2, dtype=dtype)
    mask[..., 0] = 0
    with pytest.raises(ValueError, match=f"attention_mask is {dtype} of shape"):
        model(IDS[:1, :tokens], attention_mask=mask)


REPLACED = {"act_fn of the experts is GELU": nn.GELU(), "act_fn of the experts is Mine": type("Mine", (nn.SiLU,), {})()}


@pytest.mark.parametrize("message", [*REPLACED, "forward", "is_causal of self_attn is False"])
def test_what_fused_operations_never_read_is_refused_at_the_call(message: str, make_hf: Any) -> None:
    model = apply(make_hf(sliding_window=None))
    layer = model.model.layers[-1]
    if "is_causal" in message:
        layer.self_attn.is_causal = False
    elif message == "forward":
        layer.mlp.experts.act_fn.forward = torch.tanh
    else:
        layer.mlp.experts.act_fn = REPLACED[message]
    with pytest.raises(ValueError, match=message if "is" in message else "act_fn of the experts is"):
        model(IDS)
    if "is_causal" in message:
        layer.self_attn.is_causal = True
        assert model(IDS).logits.isfinite().all()


def test_a_hook_that_replaces_the_angles_is_honoured(make_hf: Any) -> None:
    """It makes the rotary embedding's result anew, of the class that it got."""
    found = []
    for fused in (False, True):
        model = apply(make_hf()) if fused else make_hf()
        model.model.rotary_emb.register_forward_hook(lambda module, args, out: type(out)(x * 0.5 for x in out))
        found.append(model(IDS).logits)
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()
