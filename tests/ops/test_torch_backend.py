"""The plain way's quick forms: what torch is asked for in a layer, and that they are the long forms."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_triton import KVCache, Mixtral, MixtralConfig
from mixtral_triton.kernels import call, reference
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the plain way: a process without TRITON_INTERPRET")

OPERATIONS_MOST = 95  # of torch, in a decode layer; transformers' eager layer has 153
MASKS = {"masked_fill", "masked_fill_", "where", "bitwise_and", "bitwise_not", "logical_and"}


class Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[func._opname] += 1
        return func(*args, **(kwargs or {}))


def a_layer(T: int, past: int) -> Counter[str]:
    """torch's operations in a layer of T tokens behind `past` others: those of three layers less those of two."""
    counts = []
    for layers in (2, 3):
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        config = MixtralConfig(**sizes, **heads, rope_theta=1e6, max_position_embeddings=512)
        model = Mixtral(config, device="cpu", dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        cache = KVCache(config, 1, 512, device="cpu", dtype=torch.float32)
        if past:
            model(torch.zeros(1, past, dtype=torch.int64), cache=cache)
        # As a step goes that nobody watches, though this one is.
        with mock.patch.object(call, "untraced", lambda: True), Counting() as counting:
            model(torch.zeros(1, T, dtype=torch.int64), cache=cache)
        counts.append(counting.found)
    return counts[1] - counts[0]


def test_a_decode_layer_asks_torch_for_little(covers: Any) -> None:
    """One token: no sort of its experts but the route's, no mask, no positions made anew."""
    found = a_layer(1, past=30)
    covers("host", f"a decode layer on the plain way: {found.total()} operations of torch")
    assert found.total() <= OPERATIONS_MOST, found
    assert found["sort"] == 1 and not found["arange"] and not MASKS & set(found), found


def test_a_whole_prompt_has_no_mask() -> None:
    assert not MASKS - {"where"} & set(a_layer(70, past=0))  # an id out of range has its place in the sort


def test_the_long_way_is_caught() -> None:
    with mock.patch.object(reference, "_alike", lambda numbers: None):
        found = a_layer(1, past=30)
    assert found.total() > OPERATIONS_MOST and MASKS & set(found)


def both_ways(name: str, args: dict[str, Any]) -> tuple[Any, Any]:
    """The results of an operation, and what it wrote into caches: by its quick form, and without one."""
    found = []
    for alike in (reference._alike, lambda numbers: None):
        own = {key: x.clone() if isinstance(x, torch.Tensor) else x for key, x in args.items()}
        with mock.patch.object(reference, "_alike", alike):
            out = OPS[name].call_reference(**own)
        found.append((out, *(own[key] for key in ("k_cache", "v_cache") if key in own)))
    return found[0], found[1]


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("past", [0, 5, 15, 16, 40])
@pytest.mark.parametrize(
    ("name", "T", "fresh"),
    [
        *(
            (name, T, fresh)
            for name in ("append", "cached_attention")
            for T, fresh in ((1, 0), (1, 1), (7, 1), (20, 1))
        ),
        ("rope_append_attention", 1, 0),
    ],
)
def test_sequences_that_stand_alike(name: str, T: int, fresh: int, past: int, B: int) -> None:
    op = OPS[name]
    sizes = {**op.test_shapes[0], "B": B, "T": T, "C": 16, "past": past, "window": 16, "fresh": fresh}
    args = op.bind_by_name(
        **op.inputs(type(op.test_shapes[0])(sizes), torch.float32, "cpu", torch.Generator().manual_seed(0))
    )
    args["past"], args["new"] = torch.full((B,), past, dtype=torch.int32), torch.full((B,), T, dtype=torch.int32)
    if "cos" in args:
        args["cos"], args["sin"] = args["cos"][: past + T], args["sin"][: past + T]
    quick, long = both_ways(name, args)
    for a, b in zip(quick, long, strict=True):
        assert a is b is None or torch.allclose(a, b, atol=1e-6), (a - b).abs().max()


@pytest.mark.parametrize("ids", [[1, 3], [3, 1], [1, -1], [4, 2], [-1, 7]])
def test_one_token_is_as_among_others(ids: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    args = OPS["expert_swiglu"].inputs({"T": 2, "H": 16, "I": 24, "E": 4, "K": 2}, torch.float32, "cpu", generator)
    args["ids"] = torch.tensor([ids, [0, 1]])
    both = reference.expert_swiglu(**args)
    alone = reference.expert_swiglu(**args | {name: args[name][:1] for name in ("x", "ids", "weights")})
    assert torch.allclose(alone, both[:1], atol=1e-6)
