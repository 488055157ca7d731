"""The torch backend's short cuts: how many operations of torch a layer takes, and that results stay the same."""

from __future__ import annotations

from collections import Counter
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mixtral_triton.kernels import call, reference
from mixtral_triton.kernels.registry import OPS
from tests.support.calls import copies, inputs, outputs
from tests.support.models import WIDER_SIZES, cache_of, random_model

pytestmark = pytest.mark.compiled

OPERATIONS_MAX = 95  # of torch, in a decode layer; transformers' eager layer has 153
MASKS = {"masked_fill", "masked_fill_", "where", "bitwise_and", "bitwise_not", "logical_and"}


class OperationCounter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func._opname] += 1
        return func(*args, **(kwargs or {}))


def count_layer(T: int, past: int) -> Counter[str]:
    """torch's operations in a layer of T tokens behind `past` tokens: those of three layers minus those of two."""
    counts = []
    for layers in (2, 3):
        model = random_model(num_hidden_layers=layers, **WIDER_SIZES)
        cache = cache_of(model, 1, 512)
        if past:
            model(torch.zeros(1, past, dtype=torch.int64), cache=cache)
        # The model runs as it does where nothing watches torch's operations.
        with mock.patch.object(call, "untraced", lambda: True), OperationCounter() as counter:
            model(torch.zeros(1, T, dtype=torch.int64), cache=cache)
        counts.append(counter.counts)
    return counts[1] - counts[0]


def without_short_cuts() -> Any:
    return mock.patch.object(reference, "_common_value", lambda values: None)


def test_operations_of_a_decode_layer(covers: Any) -> None:
    """One token takes no sort but the route's, no mask and no positions. The first chunk of several has no mask."""
    assert not MASKS - {"where"} & set(count_layer(70, past=0))  # the sort by expert places ids out of range
    found = count_layer(1, past=30)
    covers("host", f"a decode layer on the torch backend: {found.total()} operations of torch")
    assert found.total() <= OPERATIONS_MAX, found
    assert found["sort"] == 1 and not found["arange"] and not MASKS & set(found), found


def test_missing_short_cut_is_caught() -> None:
    with without_short_cuts():
        found = count_layer(1, past=30)
    assert found.total() > OPERATIONS_MAX and MASKS & set(found)


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("past", [0, 5, 15, 16, 40])
@pytest.mark.parametrize(("T", "fresh"), [(1, 0), (1, 1), (7, 1), (20, 1), (1, None)])
def test_sequences_of_equal_length(T: int, fresh: int | None, past: int, B: int) -> None:
    name = "rope_append_attention" if fresh is None else "cached_attention"
    op = OPS[name]
    sizes = dict(op.test_shapes[0]) | {"B": B, "T": T, "C": 16, "past": past, "window": 16, "fresh": fresh != 0}
    args = copies(op.bind_by_name(**inputs(name, sizes, dtype=torch.float32)))
    args["past"], args["new"] = torch.full((B,), past, dtype=torch.int32), torch.full((B,), T, dtype=torch.int32)
    if "cos" in args:
        args["cos"], args["sin"] = args["cos"][: past + T], args["sin"][: past + T]
    got = outputs(name, op.call_reference, args)
    with without_short_cuts():
        want = outputs(name, op.call_reference, args)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("ids", [[1, 3], [3, 1], [1, -1], [4, 2], [-1, 7]])
def test_one_token_equals_the_same_token_of_a_batch(ids: list[int]) -> None:
    args = inputs("expert_swiglu", {"T": 2, "H": 16, "I": 24, "E": 4, "K": 2}, dtype=torch.float32)
    args["ids"] = torch.tensor([ids, [0, 1]])
    batch = reference.expert_swiglu(**args)
    alone = reference.expert_swiglu(**args | {name: args[name][:1] for name in ("x", "ids", "weights")})
    assert torch.allclose(alone, batch[:1], atol=1e-6)
