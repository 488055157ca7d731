"""Values out of range that the host does not read, as on a GPU: the result of that sequence alone is NaN, no access is
outside a tensor, and the host reads no value. On a CPU each is a ValueError (test_model.py, test_operators.py).

The meta device represents a GPU where only the host's part counts: reading a value there raises an error.
"""

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import Mixtral, ops
from mixtral_triton.kernels.operation import checks
from mixtral_triton.kernels.operation.cases import as_dict
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.model.generate import sample
from tests.ops.test_strides import QUANTIZED, representative_sizes
from tests.support.calls import Sizes, dense, inputs, outputs
from tests.support.models import cache_of, random_model, tokens

V, P, W = 23, 70, 6


@pytest.fixture
def gpu_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host must not read a tensor."""
    readable = checks.readable
    for module in list(sys.modules.values()):
        if vars(module).get("readable") is readable:
            monkeypatch.setattr(module, "readable", lambda x: False)


TO_NAN = ("input_ids", "positions", "past", "new")  # a value out of range makes its sequence NaN
FAR = {torch.int32: (-(2**31), 2**31 - 1), torch.int64: (-(2**62), 2**32)}


def ranges(name: str, args: dict[str, Any]) -> dict[str, tuple[int, int]]:
    op = OPS[name]
    return {argument: (low, high) for argument, low, high in op.bounds(op.bind_by_name(**args))}


BOUNDED = [
    (name, sizes, argument)
    for name, op in OPS.items()
    for sizes in (replace(shape, B=3) if hasattr(shape, "B") else shape for shape in representative_sizes(op))
    if QUANTIZED.isdisjoint(as_dict(sizes))  # as dense ones here, and slower
    for argument in ranges(name, inputs(name, sizes, "meta"))
]


def call(name: str, args: dict[str, Any]) -> list[Tensor]:
    return outputs(name, getattr(ops, name), args)


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize(("name", "sizes", "argument"), BOUNDED, ids=str)
def test_value_out_of_range(name: str, sizes: Sizes, argument: str, dtype: Any, gpu_rules: Any) -> None:
    """No other row or sequence changes by a bit, an expert contributes nothing. The guard checks the addresses."""
    args = inputs(name, sizes)
    args[argument] = args[argument].to(dtype)
    low, high = ranges(name, args)[argument]
    right, row, mutates = call(name, args), len(args[argument]) // 2, OPS[name].mutates
    rest = [i for i in range(len(args[argument])) if i != row]
    if name != "sort_by_expert" and argument == "ids":
        weights = args["weights"].clone()
        weights[row, -1] = 0.0
        right = call(name, args | {"weights": weights})
        rest.append(row)
        if name == "expert_swiglu_backward":  # a routing weight of zero has a gradient, an expert out of range none
            right[1][row, -1] = 0.0
    for bad in (low - 1, high + 1, *FAR[dtype]) if dtype == torch.int32 else FAR[dtype]:
        wrong = args[argument].clone()
        wrong.view(len(wrong), -1)[row, -1] = bad
        found = call(name, args | {argument: wrong})
        if name == "sort_by_expert":
            order, offsets = found
            flat = wrong.flatten().tolist()
            valid = [slot for slot in range(len(flat)) if flat[slot] != bad]
            assert order[: int(offsets[-1])].tolist() == sorted(valid, key=lambda slot: flat[slot])
            continue
        for place, (got, want) in enumerate(zip(found, right, strict=True)):
            assert torch.equal(got[rest], want[rest])
            if place >= len(found) - len(mutates):
                assert torch.equal(got[row], dense(args[mutates[place - len(found)]])[row])  # nothing was appended
            elif argument == "positions":
                assert got[row, -1].isnan().all() and torch.equal(got[row, :-1], want[row, :-1])
            elif argument in TO_NAN:
                assert got[row].isnan().all()
            else:
                assert got[row].isfinite().all()


def test_new_token_beyond_the_tables_is_nan_and_padding_is_not() -> None:
    """On the torch backend, too, where the sequences differ in length and where they do not."""
    args = inputs("rope_append_attention", vars(OPS["rope_append_attention"].test_shapes[0]) | {"B": 3})
    args |= {"cos": args["cos"][:9], "sin": args["sin"][:9], "new": torch.tensor([1, 1, 0])}
    for past, is_nan in (((3, 9, 9), [False, True, False]), ((9, 9, 9), [True, True, False])):
        out, *_ = call("rope_append_attention", args | {"past": torch.tensor(past)})
        assert out.isnan().flatten(1).all(1).tolist() == out.isnan().flatten(1).any(1).tolist() == is_nan


@pytest.fixture
def unread(gpu_rules: None, unguarded: None) -> None:
    """For comparisons bit for bit: sums in one order, and no guard, under which the operations have run above."""


def build(window: int | None, device: Any = "cpu", deterministic: bool = False) -> Mixtral:
    sizes = {"vocab_size": V, "max_position_embeddings": P, "sliding_window": window}
    return random_model(device, deterministic=deterministic, **sizes)


def check_nan(got: Tensor, want: Tensor, row: int) -> None:
    """The logits of this row are NaN, and those of the other rows equal `want` bit for bit."""
    rest = [b for b in range(len(got)) if b != row]
    assert got[row].isnan().all() and want.isfinite().all() and torch.equal(got[rest], want[rest])


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize(("deterministic", "place", "bad"), [(False, 0, -1), (False, 3, V), (True, 1, 2**62)])
def test_token_out_of_range(deterministic: bool, place: int, bad: int, unread: None) -> None:
    """Without a cache, with one, and for later tokens."""
    model, ids = build(W, deterministic=deterministic), tokens(3, 4)
    wrong = ids.clone()
    wrong[1, place] = bad
    check_nan(model(wrong), model(ids), 1)
    caches = [cache_of(model, 3), cache_of(model, 3)]
    for chunk in ((wrong, ids), (ids[:, :1], ids[:, :1]), (ids[:, :2], ids[:, :2])):
        check_nan(*(model(x, cache=c) for x, c in zip(chunk, caches, strict=True)), 1)


@pytest.mark.interpreted
@pytest.mark.parametrize("bad", [-1, 5, 2**31 - 1, -(2**31), 2**32 + 1])
def test_lengths_out_of_range(bad: int, unread: None) -> None:
    model, ids, lengths = build(None), tokens(3, 4), torch.tensor([4, 4, 4])
    want = model(ids, cache=cache_of(model, 3), lengths=lengths)
    lengths[1] = bad
    held = cache_of(model, 3)
    check_nan(model(ids, cache=held, lengths=lengths), want, 1)
    assert held.lengths[[0, 2]].tolist() == [4, 4]


@pytest.mark.interpreted
@pytest.mark.parametrize("window", (None, W))
def test_ragged_chunks_beyond_the_last_slot(window: int | None, unread: None) -> None:
    """The host cannot count these: the device finds the sequence that is beyond, and no other is lost."""
    model, limit = build(window), P if window else 12
    held, ids = cache_of(model, 2), tokens(2, 4)
    model(ids, cache=held, lengths=torch.tensor([3, 4]))
    held.lengths.copy_(torch.tensor([limit - 2, 4]))
    for fits in (True, False, False):
        logits = model(ids[:, :1] if fits else ids[:, :2], cache=held)
        assert bool(logits[0].isfinite().all()) == fits and logits[1].isfinite().all()
        assert bool(logits[0].isnan().all()) != fits


def test_uniform_chunks_beyond_the_last_slot_raise_value_error(gpu_rules: None) -> None:
    """The host counts these, and raises the error before anything runs, as on a CPU."""
    model, ids = build(None, "meta"), torch.empty((2, 5), dtype=torch.int64, device="meta")
    held = cache_of(model, 2)
    for n in (5, 5, 1):
        model(ids[:, :n], cache=held)
    with pytest.raises(ValueError, match="13 tokens, beyond the cache's slots, 12"):
        model(ids[:, :2], cache=held)
    model(ids[:, :1], cache=held)
    with pytest.raises(ValueError, match="13 tokens"):
        model(ids[:, :1], cache=held)
    held.lengths.zero_()  # by the user: the count of the host no longer holds
    model(ids, cache=held)


def test_host_does_not_count_ragged_or_captured_chunks(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture runs nothing, and the host does not see a replay."""
    gpu.driver.executes = False
    model, ids = build(None, "cuda"), torch.zeros(2, 5, dtype=torch.int64, device="cuda")
    held = cache_of(model, 2)
    for _ in range(4):
        model(ids, cache=held, lengths=torch.ones(2, dtype=torch.int32, device="cuda"))
    model(ids, cache=held)  # the 4 tokens of each, of chunks of 20, leave room for 5 more
    held = cache_of(model, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        model(ids, cache=held)
    for _ in range(4):
        model(ids, cache=held)


def test_negative_cache_lengths_raise_value_error_on_a_cpu() -> None:
    model = build(None)
    held = cache_of(model, 2)
    held.lengths[1] = -1
    with pytest.raises(ValueError, match="KVCache: argument 'lengths' is from -1 to 0, needs"):
        model(tokens(2, 1), cache=held)


def test_sample_of_nan_is_a_token() -> None:
    logits = torch.stack((torch.full((V,), float("nan")), torch.zeros(V)))
    for temperature, top_p in ((0.0, 1.0), (0.7, 1.0), (0.7, 0.5)):
        drawn = sample(logits, temperature, top_p)
        assert ((drawn >= 0) & (drawn < V)).all()


SYNCS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "_unique2"}


CALLS = [(False, 1, False), (False, 33, False), *((True, T, ragged) for T in (1, 5, 33) for ragged in (False, True))]


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize(("cached", "T", "ragged"), CALLS)
def test_forward_reads_no_value(cached: bool, T: int, ragged: bool, deterministic: bool) -> None:
    model = build(W, "meta", deterministic)
    ids = torch.empty((2, T), dtype=torch.int64, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta") if ragged else None
    held = cache_of(model, 2) if cached else None
    with record_launches() as launches:  # runs the host code of the operations too
        for temperature in (0.0, 0.7):
            sample(model(ids, held, lengths)[:, -1], temperature, 0.9)
    assert not {f"aten::{name}" for name in SYNCS} & {launch.kernel for launch in launches}


def test_read_value_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixtral, "head", lambda self, h: h.nonzero())
    with pytest.raises((AssertionError, NotImplementedError)):
        test_forward_reads_no_value(True, 5, True, False)
