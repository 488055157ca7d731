"""verify runs what generate runs: each launch configuration, batches of unequal length, and generate itself."""

import dataclasses
import math
import re
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral, MixtralConfig, ops, verify
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.operation import plan
from mixtral_triton.kernels.ops import linear
from mixtral_triton.kernels.ops.experts import op
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import dispatched
from mixtral_triton.kernels.weights import offload
from mixtral_triton.model import generate
from mixtral_triton.model.layer import Layer
from mixtral_triton.verification import generation
from mixtral_triton.verification.judge import every_expert
from mixtral_triton.verification.probe import TextReference
from mixtral_triton.verification.report import FP64, Row
from mixtral_triton.verification.sizes import SizedForwards, configurations, count_rows, record_forward
from mixtral_triton.verification.tolerance import Fp64Reference, Tolerance, worst
from tests.support.faults import Inject, in_router, replace_by, small_model
from tests.support.models import random_model

IDS = torch.randint(1, 48, (2, 20), generator=torch.Generator().manual_seed(0))
NAN, INF = math.nan, math.inf
once = pytest.mark.skipif(INTERPRETED, reason="about the comparison: run once, without the interpreter")


def keys(launches: Any) -> set[Any]:
    """The launch configurations, and the shapes of dense weights, of Triton's launches."""
    found = (each for each in launches if each.grid is not None)
    shape = lambda each: getattr(getattr(each.args.get("weight"), "ptr", None), "shape", None)  # noqa: E731
    return {(each.kernel, each.num_warps, str(sorted(each.constexprs.items())), shape(each)) for each in found}


DRAW = torch.Generator().manual_seed(0)
SIZES = [(B, 1, 4096) for B in range(1, 65)] + [(1, 1, C) for C in (1, 300, 5000, 9000, 20000, 32768)]
SIZES += [(1, int(T), 4096) for T in torch.randint(2, 2049, (60,), generator=DRAW)]
SIZES += [(int(B), int(T), 4096) for B, T in torch.randint(2, 65, (20, 2), generator=DRAW)] + [(64, 2048, 4096)]
EVERY_LENGTH = pytest.param([(1, T, 4096) for T in range(1, 2049)], False, marks=pytest.mark.slow, id="every length")


def left_out(
    arch: str = "sm_90", sizes: Any = SIZES, limit: int = 8192, deterministic: bool = False
) -> tuple[set[Any], list[str], set[Any]]:
    """What forwards of 8x7B launch and the calls of verify do not, what the report says of it, and what they launch."""
    config = MixtralConfig(num_hidden_layers=1, rope_theta=1e6)
    model = Mixtral(config, device="meta", deterministic=deterministic)
    sized, run, needed = SizedForwards(model, limit, (arch, None)), set[Any](), set[Any]()
    for size, positions in sized.select():
        forward = record_forward(model, size, (arch, None), None)
        run |= keys(record for position in positions for record in forward[position][2])
    for B, T, C in sizes:
        cache = KVCache(config, B, C, "meta", torch.bfloat16)
        with record_launches(arch) as records:
            model.head(model.hidden(torch.zeros(B, T, dtype=torch.int64, device="meta"), cache)[:, 0])
        needed |= keys(records)
    return needed - run, sized.not_run, run


@pytest.mark.slow
@once
@pytest.mark.parametrize(("sizes", "deterministic"), [(SIZES, False), (SIZES, True), EVERY_LENGTH])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_launch_of_generate_is_run(arch: str, sizes: Any, deterministic: bool) -> None:
    missing, not_run, run = left_out(arch, sizes, deterministic=deterministic)
    assert not missing and not not_run
    constants = "".join(each[2] for each in run if each[0] == "attention_decode_kernel")
    for n in (16, 32, 64) if arch == "sm_90" else ():
        assert deterministic or f"('SPLITS', {n})" in constants


@pytest.mark.slow
@once
def test_a_launch_that_is_not_reached_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a limit of tokens, which the report names; a call that is new in a layer is run without a line for it."""
    not_run = left_out(limit=256, sizes=[])[1]
    assert any(line.startswith("experts_add_rms_norm (") and "experts_up_kernel" in line for line in not_run), not_run
    assert all("needs a GPU or --tokens" in line for line in not_run)
    assert any(re.match(r"257 to 2048 rows of append_kernel, .*--tokens 2048$", line) for line in not_run)
    attention = Layer.attention

    def with_another_call(layer: Layer, *args: Any) -> Any:
        ops.route.unchecked(args[0][0], 2)
        return attention(layer, *args)

    monkeypatch.setattr(Layer, "attention", with_another_call)
    missing, not_run, run = left_out(sizes=[(1, 9, 4096)])
    assert not missing and not not_run and "route_kernel" in {name for name, *_ in run}


@pytest.mark.slow
@once
@pytest.mark.parametrize("rows", [37, 1001])
def test_a_tile_of_one_size(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Up to 64 rows it is run, whatever they are; a chunk's that no call reaches is seen here."""
    place, kernel = (linear, "linear_decode_kernel") if rows < 65 else (op, "experts_up_kernel")
    configs = place.configs

    def with_a_tile(sizes: Any, dtype: Any, arch: str) -> Any:
        found = configs(sizes, dtype, arch)
        if rows == sizes.T:
            found[kernel] = dataclasses.replace(found[kernel], num_warps=2)
        return found

    monkeypatch.setattr(place, "configs", with_a_tile)
    missing = left_out(sizes=[*SIZES, (1, 1001, 4096)])[0]
    assert {name for name, *_ in missing} == ({kernel} if rows > 64 else set())


@pytest.mark.slow
@once
def test_a_lost_row_of_any_size_is_run() -> None:
    """Of up to 16 rows: the last one, row 7 or row 15, and the last one of a full part of 8."""
    model = Mixtral(MixtralConfig(num_hidden_layers=1, rope_theta=1e6), device="meta")
    sized = SizedForwards(model, 8192, ("sm_90", None))
    assert [*sized.select()] and not sized.not_run
    sizes: dict[Any, list[int]] = {}
    for T in range(1, 17):
        for size in ((1, T, 4096), (T, 1, 4096)):
            for _, args, records in record_forward(model, size, sized.gpu, None):
                for launch in configurations(args, records):
                    sizes.setdefault(launch, []).append(count_rows(args))
    for loses in (lambda T: True, lambda T: T > 7, lambda T: T > 15, lambda T: T % 8 == 0):
        for launch, rows in sizes.items():
            assert any(map(loses, sized.rows[launch])) or not any(map(loses, rows)), (launch, rows)


@pytest.mark.skipif(not INTERPRETED, reason="about a kernel's grid: with the interpreter")
def test_a_grid_one_tile_short_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the last tile are memory that nobody wrote."""
    layer, draw = small_model(torch.bfloat16).layers[0], partial(torch.randn, dtype=torch.bfloat16)
    routes = {"ids": torch.tensor([[0, 1]] * 20).int(), "weights": torch.rand(20, 2)}
    proj = {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}
    experts = {"x": draw(20, 32), **proj, **routes}
    args = experts | dict(every_expert(experts, slow=True))["prefill"]

    def ok() -> bool:
        return Row(0, "", "", *Tolerance("expert_swiglu", args).measure(dispatched("expert_swiglu", args))).ok

    assert ok()
    short = lambda N, E, columns, config: (grid(N, E, columns, config)[0] - grid(1, 1, columns, config)[0],)  # noqa: E731
    grid = op.prefill_grid
    monkeypatch.setattr(op, "prefill_grid", short)
    assert not ok()


def first_row_for_all(argument: int, patch: pytest.MonkeyPatch) -> None:
    """The first sequence's `past` (0) or `new` (1), its positions or lengths, are taken for all."""

    def faulty(at: int, function: Any) -> Any:
        def first_for_all(*args: Any, **kwargs: Any) -> Any:
            return function(*args[:at], args[at][:1].expand_as(args[at]).contiguous(), *args[at + 1 :], **kwargs)

        return first_for_all

    for name, place in {"rope_append_attention": 7, "cached_attention": 5, "append": 4}.items():
        replace_by(getattr(ops, name), "unchecked", partial(faulty, place + argument))(patch)


def scale_attention(factor: float) -> Inject:
    return replace_by(Layer, "attention", lambda attention: lambda layer, *args: attention(layer, *args) * factor)


def scale_experts(factor: float) -> Inject:
    def faulty(experts: Any) -> Any:
        return lambda layer, h, x, weights, *args: experts(layer, h, x, weights * factor, *args)

    return replace_by(Layer, "experts", faulty)


def one_expert_more(route: Any) -> Any:
    def faulty(layer: Layer, *args: Any) -> Any:
        h, x, weights, ids = route(layer, *args)
        return h, x, torch.cat((weights, weights[:, :1]), 1), torch.cat((ids, ids[:, :1]), 1)

    return faulty


def last_of_the_longest(prefill: Any) -> Any:
    return lambda model, cache, ids, lengths: prefill(model, cache, ids, torch.full_like(lengths, ids.shape[1]))


def second_best(sample: Any) -> Any:
    return lambda x, *args: sample(x.masked_fill(x == x.amax(-1, True), -INF), *args)


def without_lengths(forward: Any) -> Any:
    return lambda model, ids, cache=None, lengths=None: forward(model, ids, cache)


def longer_than_a_chunk(prefill: Any) -> Any:
    """The hidden states of prompts that are longer than a chunk are those of each other's."""
    return lambda model, cache, ids, lengths: prefill(model, cache, ids, lengths).flip(int(ids.shape[1] <= 3))


def one_behind(stream: Any) -> Any:
    def faulty(*args: Any) -> Any:
        tokens = list(stream(*args))
        yield from [tokens[0], *tokens[:-1]]

    return faulty


# Written down before any was tried: the operation and the case of the first wrong row, and what is injected.
FAULTS: dict[tuple[str, str], dict[str, Inject]] = {
    ("layer", "attention, in chunks"): {
        "first sequence's positions": partial(first_row_for_all, 0),
        "first sequence's lengths": partial(first_row_for_all, 1),
        "forward drops the lengths": replace_by(Mixtral, "forward", without_lengths),
    },
    ("layer", "attention, whole text"): {
        "attention 10 % too large": scale_attention(1.1),
        "a token less": replace_by(Layer, "attention", lambda f: lambda layer, *args: f(layer, *args)[:, 1:]),
    },
    ("layer", "attention, token by token"): {
        "a step is not counted": replace_by(KVCache, "advance", lambda f: lambda kv, n, m: f(kv, n * (m != 1), m)),
    },
    ("layer", "attention, whole text, fp64"): {"attention 1 % too large": scale_attention(1.01)},
    ("layer", "experts, whole text, fp64"): {
        "experts 10 % too large": scale_experts(1.1),
        "experts 1 % too large": scale_experts(1.01),
    },
    ("layer", "routes, whole text, fp64"): {"eps x 100": in_router(rms_norm_eps=1e-3)},
    ("layer", "routes, whole text"): {"top_k + 1": replace_by(Layer, "route", one_expert_more)},
    ("logits", "whole text"): {
        "logits are halved": replace_by(Mixtral, "forward", lambda f: lambda *args, **kwargs: f(*args, **kwargs) / 2),
    },
    ("layer", "in chunks"): {
        "full too early": replace_by(KVCache, "reserve", lambda f: lambda cache, new: f(cache, new + cache.max_len)),
    },
    ("generate", "greedy"): {
        "a token behind": replace_by(generate, "_stream", one_behind),
        "rows of a long prompt": replace_by(generate, "prefill", longer_than_a_chunk),
        "last token of the longest prompt": replace_by(generate, "prefill", last_of_the_longest),
        "greedy takes the second": replace_by(generate, "sample", second_best),
    },
}


@pytest.mark.exhaustive
@once
@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.slow) for dtype in (torch.float32, torch.float16))],
)
@pytest.mark.parametrize(("place", "name"), [(place, name) for place in FAULTS for name in FAULTS[place]])
def test_injected_fault(place: tuple[str, str], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 16 bits hide is found in fp64, and fp16 hides less than bf16."""
    (op, case), model = place, small_model(dtype)
    FAULTS[place][name](monkeypatch)
    first = verify(model, IDS).wrong[0]
    assert first.op == op and first.case.removesuffix(FP64) == case.removesuffix(FP64)
    assert dtype != torch.bfloat16 or first.case == case


@once
@pytest.mark.parametrize("value", [NAN, INF])
def test_not_finite_is_wrong(value: float) -> None:
    x = torch.randn(2, 4, 8)
    args = {"x": x, "weight": torch.ones(8), "eps": 1e-5}
    error, limit = Tolerance("rms_norm", args).measure(lambda **kwargs: torch.full_like(x, value))
    assert not Row(0, "rms_norm", "", error, limit).ok
    assert not Row(0, "layer", "", *Fp64Reference(x.double(), 1.0).measure(torch.full_like(x, value))).ok
    assert not Row(0, "", "", *worst([(0.0, 1.0), (value, value), (0.5, 1.0)])).ok
    assert not any(Row(0, "", "", *pair).ok for pair in [worst([(value, INF), (0.5, 1.0)]), (0.0, NAN), (value, NAN)])
    assert Row(0, "", "", value, 1.0).share == INF
    model = small_model(torch.float32)
    layer = TextReference(model, model.config, IDS).layers[0]
    weights = layer.weights.clone()
    weights[0, 0, 0] = value
    assert not Row(0, "layer", "", *layer.route_error(layer.ids, ..., weights)).ok
    with torch.no_grad():
        model.embed_tokens[49, 3] = value
    report = verify(model, IDS)
    assert [(row.op, row.case) for row in report.wrong] == [("weights", "finite")]


@once
def test_overflow_of_fp16_is_named() -> None:
    model = small_model(torch.float16)
    with torch.no_grad():
        model.layers[0].down_proj *= 3e4
    report = verify(model, IDS)
    assert not report.ok and not report.wrong
    assert report.verdict.startswith("OVERFLOW: plain torch overflows in float16")


def stale_buffer(begin: Any) -> Any:
    """From the third time on, a weight gets a buffer that may hold another's."""
    times = Counter[int]()

    def faulty(self: Any, weight: Any, stream: Any) -> Any:
        times[id(weight)] += 1
        return self.buffers[stream.cuda_stream] if times[id(weight)] > 2 else begin(self, weight, stream)

    return faulty


def key_without_shapes(call_key: Any) -> Any:
    return lambda *args: tuple(each for each in call_key(*args) if not isinstance(each, tuple))


def stale_base(describe: Any) -> Any:
    first: dict[Any, Any] = {}
    return lambda fields, base: describe(fields, first.setdefault((base.shape, base.dtype), base))


STALE = {"buffer": replace_by(offload._Staging, "begin", stale_buffer)}
STALE |= {"key": replace_by(plan, "call_key", key_without_shapes)}
STALE |= {"descriptor": replace_by(plan, "_descriptor", stale_base)}


@pytest.mark.gpu
@pytest.mark.parametrize("fault", ["none", *STALE])
def test_repeated_calls(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 40}
    on_host = () if fault == "descriptor" else (1, 3)  # TMA reads resident experts
    model = random_model(device, torch.bfloat16, on_host=on_host, **sizes)
    if fault in STALE:
        STALE[fault](monkeypatch)
    ids, rows = torch.arange(40, device=device)[None], []
    with suppress(RuntimeError):  # another call's shape
        rows = generation.repeated_rows(model, ids)
    assert [row.ok for row in rows] == [True] if fault == "none" else not any(row.ok for row in rows)
