"""Values out of range where the host does not look, as on a GPU: NaN for that sequence alone, no access outside a
tensor, and no look. On a CPU each is a ValueError (tests/test_model.py, tests/test_operators.py).

The meta device stands in for a GPU where only the host's part counts: whoever looks at a value there gets an error.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, cache, ops
from mixtral_triton import generate as generate_module
from mixtral_triton import model as model_module
from mixtral_triton.generate import sample
from mixtral_triton.inputs import check_vocabulary
from mixtral_triton.kernels import checks, launch
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from tests.support.models import random_model

V, P, W = 23, 70, 6
UNGUARDED = launch.interpret
blind = pytest.mark.skipif(not INTERPRETED, reason="what kernels do: needs TRITON_INTERPRET=1 or a GPU")


@pytest.fixture
def gpu_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host may look at no tensor."""
    looks = checks.readable
    for module in list(sys.modules.values()):
        if vars(module).get("readable") is looks:
            monkeypatch.setattr(module, "readable", lambda x: False)


# every operation


SIZES: dict[str, dict[str, int]] = {
    "embed_rms_norm": {"B": 3, "T": 2, "V": 11, "H": 8, "past": 4},
    "sort_by_expert": {"T": 5, "E": 4, "K": 2},
    "expert_swiglu": {"T": 5, "H": 16, "I": 12, "E": 4, "K": 2},
    "experts_add_rms_norm": {"T": 5, "H": 16, "I": 12, "E": 4, "K": 2},
    "rope": {"B": 2, "T": 2, "Hq": 2, "Hkv": 1, "D": 8, "P": 9},
    "append": {"B": 3, "T": 3, "Hkv": 1, "D": 8, "C": 5, "past": 4},
    "rope_append_attention": Shape(B=3, T=1, Hq=2, Hkv=1, D=16, C=5, past=4, window=5),
    "attention": Shape(B=3, T=2, S=9, Hq=2, Hkv=1, D=16, window=0, ragged=True),
    "cached_attention": Shape(B=3, T=3, Hq=2, Hkv=1, D=16, C=5, past=4, window=5, fresh=True),
}
MORE = [  # the other ways of these operations
    ("expert_swiglu", {"T": 66, "H": 16, "I": 12, "E": 3, "K": 2}),
    ("expert_swiglu", {"T": 1, "H": 16, "I": 12, "E": 4, "K": 2}),
    ("attention", Shape(B=3, T=20, S=25, Hq=2, Hkv=1, D=16, window=7, ragged=True)),
    ("cached_attention", Shape(B=3, T=1, Hq=2, Hkv=1, D=16, C=5, past=4, window=5, fresh=False)),
]
SPOILT = ("input_ids", "positions", "past", "new")  # what makes its sequence NaN
FAR = {torch.int32: (-(2**31), 2**31 - 1), torch.int64: (-(2**62), 2**32)}


def ranges(name: str, args: dict[str, Any]) -> dict[str, tuple[int, int]]:
    op = OPS[name]
    return {argument: (low, high) for argument, low, high in op.bounds(op.bind_by_name(**args))}


def inputs(name: str, sizes: dict[str, int], device: Any = "cpu") -> dict[str, Any]:
    return OPS[name].inputs(sizes, OPS[name].dtypes[0], device, torch.Generator().manual_seed(0))


BOUNDED = [
    (name, sizes, argument)
    for name, sizes in (*SIZES.items(), *MORE)
    for argument in ranges(name, inputs(name, sizes, "meta"))
]


def results(name: str, args: dict[str, Any]) -> list[Tensor]:
    """Of a call on copies: what it gives, and what became of the caches."""
    own = {key: value.clone() if isinstance(value, Tensor) else value for key, value in args.items()}
    out = getattr(ops, name)(**own)
    return [*(out if isinstance(out, tuple) else () if out is None else (out,)), *(own[k] for k in OPS[name].mutates)]


def test_every_operation_with_a_range_is_listed_here() -> None:
    sizes = {name: min(op.test_shapes, key=lambda sizes: sizes["T"]) for name, op in OPS.items()}
    bounded = {name for name, op in OPS.items() if ranges(name, inputs(name, sizes[name], "meta"))}
    assert set(SIZES) == bounded


@blind
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize(("name", "sizes", "argument"), BOUNDED, ids=[f"{n}-{a}-{s['T']}" for n, s, a in BOUNDED])
def test_one_value_out_of_range(
    name: str, sizes: dict[str, int], argument: str, dtype: torch.dtype, gpu_rules: None, ordered: Any
) -> None:
    """Nothing but its own row or sequence changes, by a bit. (The guard sees to the accesses.)"""
    args = inputs(name, sizes)
    args[argument] = args[argument].to(dtype)
    low, high = ranges(name, args)[argument]
    good, row = results(name, args), len(args[argument]) // 2
    others = [i for i in range(len(args[argument])) if i != row]
    for bad in (low - 1, high + 1, *FAR[dtype]) if dtype == torch.int32 else FAR[dtype]:
        wrong = args[argument].clone()
        wrong.view(len(wrong), -1)[row, -1] = bad
        found = results(name, args | {argument: wrong})
        if name == "sort_by_expert":
            check_left_out(wrong, bad, *found)
            continue
        for place, (got, want) in enumerate(zip(found, good, strict=True)):
            assert torch.equal(got[others], want[others])
            cache = place >= len(found) - len(OPS[name].mutates)
            if cache:
                assert torch.equal(got[row], args[OPS[name].mutates[place - len(found)]][row])  # nothing entered
            elif argument == "positions":
                assert got[row, -1].isnan().all() and torch.equal(got[row, :-1], want[row, :-1])
            elif argument in SPOILT:
                assert got[row].isnan().all()
            else:
                assert got[row].isfinite().all()


def check_left_out(ids: Tensor, bad: int, order: Tensor, offsets: Tensor) -> None:
    flat = ids.flatten().tolist()
    there = [slot for slot in range(len(flat)) if flat[slot] != bad]
    assert order[: int(offsets[-1])].tolist() == sorted(there, key=lambda slot: flat[slot])


@blind
@pytest.mark.parametrize("T", (1, 5))
def test_an_expert_out_of_range_contributes_nothing(T: int, gpu_rules: None, ordered: Any) -> None:
    args = inputs("expert_swiglu", {**SIZES["expert_swiglu"], "T": T})
    without = args["weights"].clone()
    without[-1, -1] = 0.0
    (want,) = results("expert_swiglu", args | {"weights": without})
    for bad in (-1, 4, *FAR[torch.int64]):
        ids = args["ids"].long()
        ids[-1, -1] = bad
        (got,) = results("expert_swiglu", args | {"ids": ids})
        assert torch.equal(got, want)


@blind
@pytest.mark.parametrize(("past", "new", "limit"), [(3, 2, 4), (5, 0, 4), (4, 0, 4), (2, 2, 4), (0, 1, 4)])
def test_a_sequence_beyond_the_limit(past: int, new: int, limit: int, gpu_rules: None) -> None:
    args = inputs("embed_rms_norm", SIZES["embed_rms_norm"])
    args |= {"past": torch.tensor([0, past, 1]), "new": torch.tensor([2, new, 1]), "limit": limit}
    beyond = past + new > limit
    for x in results("embed_rms_norm", args):
        assert bool(x[1].isnan().any()) == bool(x[1].isnan().all()) == beyond
        assert x[[0, 2]].isfinite().all()


@pytest.mark.parametrize("name", ("new", "past"))
def test_a_sequence_beyond_the_limit_on_a_cpu(name: str) -> None:
    args = inputs("embed_rms_norm", SIZES["embed_rms_norm"])
    with pytest.raises(ValueError, match=f"embed_rms_norm: argument '{name}'"):
        ops.embed_rms_norm(**args | {name: args[name] + (1 if name == "new" else 100)})


@pytest.mark.parametrize("missing", ("past", "new", "limit"))
def test_bounds_come_together(missing: str) -> None:
    args = inputs("embed_rms_norm", SIZES["embed_rms_norm"])
    with pytest.raises(ValueError, match=r"embed_rms_norm: argument '(new|limit)' is .* where past is"):
        ops.embed_rms_norm(**args | {missing: None})


# a model


@pytest.fixture
def unseen(gpu_rules: None, ordered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits are compared: sums in one order. Without the guard, under which each operation alone has run above."""
    monkeypatch.setattr(launch, "interpret", UNGUARDED)


def build(window: int | None, device: Any = "cpu", deterministic: bool = False) -> Mixtral:
    sizes = {"vocab_size": V, "max_position_embeddings": P, "sliding_window": window}
    return random_model(device, deterministic=deterministic, **sizes)


def cache_of(model: Mixtral, batch: int, max_len: int = 12) -> KVCache:
    return KVCache(model.config, batch, max_len, model.device, model.dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(0))


def check_spoilt(got: Tensor, want: Tensor, row: int) -> None:
    """All logits of this row are NaN, and the others what they are without it, to the bit."""
    rest = [b for b in range(len(got)) if b != row]
    assert got[row].isnan().all() and want.isfinite().all() and torch.equal(got[rest], want[rest])


@blind
@pytest.mark.parametrize(("deterministic", "place", "bad"), [(False, 0, -1), (False, 3, V), (True, 1, 2**62)])
def test_a_token_out_of_range(deterministic: bool, place: int, bad: int, unseen: None) -> None:
    """In one shot, behind a cache, and for the tokens that come after it."""
    model, ids = build(W, deterministic=deterministic), tokens(3, 4)
    wrong = ids.clone()
    wrong[1, place] = bad
    check_spoilt(model(wrong), model(ids), 1)
    held = [cache_of(model, 3), cache_of(model, 3)]
    for chunk in ((wrong, ids), (ids[:, :1], ids[:, :1]), (ids[:, :2], ids[:, :2])):
        check_spoilt(*(model(x, cache=c) for x, c in zip(chunk, held, strict=True)), 1)


LENGTHS = [-1, 5, 2**31 - 1, -(2**31), 2**32 + 1]


@blind
@pytest.mark.parametrize("bad", LENGTHS)
def test_lengths_out_of_range(bad: int, unseen: None) -> None:
    model, ids, lengths = build(None), tokens(3, 4), torch.tensor([4, 4, 4])
    want = model(ids, cache=cache_of(model, 3), lengths=lengths)
    lengths[1] = bad
    held = cache_of(model, 3)
    check_spoilt(model(ids, cache=held, lengths=lengths), want, 1)
    assert held.lengths[[0, 2]].tolist() == [4, 4]


# 12 slots
STANDS = [(-1, 1), (-1, 2), (-(2**31), 1), (2**31 - 1, 1), (12, 1), (11, 2), (10**6, 2)]


@blind
@pytest.mark.parametrize(("past", "T"), STANDS)
def test_a_sequence_that_stands_nowhere(past: int, T: int, unseen: None) -> None:
    model, ids, held = build(None), tokens(3, T), []
    for second in (3, past):
        held.append(cache_of(model, 3))
        model(tokens(3, 3), cache=held[-1])
        held[-1].lengths[1] = second
    want, got = (model(ids, cache=own) for own in held)
    check_spoilt(got, want, 1)
    if past > 0:
        check_spoilt(model(ids, cache=held[1]), model(ids, cache=held[0]), 1)


@blind
@pytest.mark.parametrize("window", (None, W))
def test_ragged_chunks_beyond_the_end(window: int | None, unseen: None) -> None:
    """What the host cannot count: then the device sees it, and only the sequence that is beyond is lost."""
    model, limit = build(window), P if window else 12
    held, ids = cache_of(model, 2), tokens(2, 4)
    model(ids, cache=held, lengths=torch.tensor([3, 4]))
    held.lengths.copy_(torch.tensor([limit - 2, 4]))
    for want in (True, False, False):
        logits = model(ids[:, :1] if want else ids[:, :2], cache=held)
        assert bool(logits[0].isfinite().all()) == want and logits[1].isfinite().all()
        assert bool(logits[0].isnan().all()) != want


def test_uniform_chunks_beyond_the_end_are_refused_unseen(gpu_rules: None) -> None:
    """The host counts them itself: a ValueError, as on a CPU, before anything runs."""
    model = build(None, "meta")
    held = cache_of(model, 2)
    ids = torch.empty((2, 5), dtype=torch.int64, device="meta")
    for _ in range(2):
        model(ids, cache=held)
    model(ids[:, :1], cache=held)
    with pytest.raises(ValueError, match="13 tokens, beyond the cache's slots, 12"):
        model(ids[:, :2], cache=held)
    model(ids[:, :1], cache=held)
    with pytest.raises(ValueError, match="13 tokens"):
        model(ids[:, :1], cache=held)
    held.lengths.zero_()  # by hand: whatever the host counted no longer holds
    model(ids, cache=held)


def test_ragged_chunks_are_never_refused_unseen() -> None:
    model = build(None, "meta")
    held = cache_of(model, 2)
    ids = torch.empty((2, 5), dtype=torch.int64, device="meta")
    for _ in range(4):
        model(ids, cache=held, lengths=torch.empty(2, dtype=torch.int32, device="meta"))


def test_what_a_graph_captured_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capture runs nothing, and a replay says nothing to the host."""
    model = build(None, "meta")
    held = cache_of(model, 2)
    ids = torch.empty((2, 5), dtype=torch.int64, device="meta")
    monkeypatch.setattr(cache, "_capturing", lambda x: True)
    model(ids, cache=held)
    monkeypatch.setattr(cache, "_capturing", lambda x: False)
    for _ in range(4):
        model(ids, cache=held)


@pytest.mark.parametrize("low", (-1, -(2**31)))
def test_lengths_below_zero_are_refused_on_a_cpu(low: int) -> None:
    model = build(None)
    held = cache_of(model, 2)
    held.lengths[1] = low
    with pytest.raises(ValueError, match=f"KVCache: lengths holds {low}"):
        model(tokens(2, 1), cache=held)


@pytest.mark.parametrize(("temperature", "top_p"), [(0.0, 1.0), (0.7, 1.0), (0.7, 0.5)])
def test_a_token_drawn_from_nan_is_a_token(temperature: float, top_p: float) -> None:
    logits = torch.full((2, V), float("nan"))
    logits[1] = 0.0
    chosen = sample(logits, temperature, top_p)
    assert ((chosen >= 0) & (chosen < V)).all()


@blind
def test_the_text_beside_a_spoilt_one_goes_on(unseen: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """generate looks at a prompt, so a loop that does not: its NaN rows choose tokens, which are in the vocabulary."""
    monkeypatch.setattr(generate_module, "check_vocabulary", lambda *args: None)
    model, prompts = build(W), [tokens(5), tokens(3), tokens(4)]
    want = model.generate(prompts, max_new_tokens=4)
    spoilt = [prompts[0], torch.full((3,), V), prompts[2]]
    got = model.generate(spoilt, max_new_tokens=4)
    assert got[0].equal(want[0]) and got[2].equal(want[2])
    assert ((got[1][3:] >= 0) & (got[1][3:] < V)).all()


# no look


def forward(deterministic: bool, cached: bool, T: int, ragged: bool) -> None:
    model = build(W, "meta", deterministic)
    ids = torch.empty((2, T), dtype=torch.int64, device="meta")
    lengths = torch.empty(2, dtype=torch.int64, device="meta") if ragged else None
    held = cache_of(model, 2) if cached else None
    with record_launches():  # the operations' own host code runs, too
        for _ in range(2):
            model(ids, held, lengths)


CALLS = [(False, 1, False), (False, 33, False), *((True, T, ragged) for T in (1, 5, 33) for ragged in (False, True))]


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize(("cached", "T", "ragged"), CALLS)
def test_forward_looks_at_nothing(cached: bool, T: int, ragged: bool, deterministic: bool) -> None:
    forward(deterministic, cached, T, ragged)


LOOKS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "ids": (model_module, "check_ids", lambda ids, *args: check_vocabulary(ids, V)),
    "lengths": (model_module, "check_lengths", lambda lengths, *args: int(lengths.max())),
    "room": (KVCache, "reserve", lambda self, new: int(self.lengths.max())),
    "new": (KVCache, "advance", lambda self, new, alike: new.tolist()),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_look_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(*LOOKS[name])
    with pytest.raises((RuntimeError, NotImplementedError)):
        forward(False, True, 5, True)


@pytest.mark.parametrize("prompts", (1, 3))
def test_generate_looks_once_at_the_prompts(prompts: int, monkeypatch: pytest.MonkeyPatch, gpu_rules: None) -> None:
    looks: list[Tensor] = []
    monkeypatch.setattr(generate_module, "check_vocabulary", lambda ids, size: looks.append(ids))
    build(W).generate([tokens(3 + n) for n in range(prompts)], max_new_tokens=2)
    assert len(looks) == 1 and looks[0].shape == (prompts, 2 + prompts)


def test_generate_refuses_a_prompt_out_of_range(gpu_rules: None) -> None:
    with pytest.raises(ValueError, match=f"token {V}"):
        build(W).generate([tokens(3), tokens(2) * 0 + V], max_new_tokens=2)


@pytest.mark.gpu
def test_a_token_out_of_range_on_a_gpu() -> None:
    model, ids = build(W, "cuda"), tokens(3, 4).cuda()
    want = model(ids)
    ids[1, 2] = V
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = model(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_spoilt(got, want, 1)
