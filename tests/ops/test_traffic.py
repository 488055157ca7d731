"""Bounds on bytes moved / compulsory and FLOP issued / useful, counted in the interpreter.

Sizes are small, but the tiles are those of Mixtral 8x7B on sm_90, so the ratios are the GPU's.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mixtral_triton.kernels import reference
from mixtral_triton.kernels.launching.kernel_args import Rows
from mixtral_triton.kernels.launching.launch import LaunchConfig, launch, override_configs
from mixtral_triton.kernels.ops import linear
from mixtral_triton.kernels.ops.experts import op as experts
from mixtral_triton.kernels.ops.experts.tiles import DECODE, SPLIT_K
from mixtral_triton.kernels.ops.experts.tiles import configs as expert_configs
from mixtral_triton.kernels.ops.sort import gather_by_expert, gather_config, sample_ids
from mixtral_triton.kernels.registry import OPS
from tests.support.calls import Sizes, inputs, selected_configs, with_offload
from tests.support.faults import module_with_fault
from tests.support.traffic import Traffic, count_traffic

pytestmark = pytest.mark.interpreted

BF16 = torch.bfloat16
WEIGHTS = {"up": "gate_up", "down": "down"}
E, K = 8, 2
DEPTH = max(tile.BLOCK_K for tile in DECODE["sm_90"])  # of a tile, which a split of a small expert holds, too
SMALL = {"H": 2 * DEPTH, "I": SPLIT_K * DEPTH, "E": E, "K": K}
SMALL_PREFILL = {**SMALL, "I": 256}
TINY = {**SMALL, "H": 64, "I": 64}  # the row tiles stay, the others are smaller
MIXTRAL = {"H": 4096, "I": 14336, "E": E, "K": K}


@triton.jit
def spread_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr):
    """y[program, i] = x[i // 2]"""
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs // 2, mask=offs < N, other=0.0)
    tl.store(y_ptr + tl.program_id(0) * BLOCK + offs, x, mask=offs < N)


def spread(x: Tensor, y: Tensor, n: int) -> Traffic:
    with count_traffic() as traffic:
        launch(spread_kernel, (2,), LaunchConfig({"BLOCK": 8}, num_warps=1), x_ptr=x, y_ptr=y, N=n)
    return traffic


def test_unmasked_lanes_and_distinct_addresses_are_counted() -> None:
    """Interleaved views separately: q, k and v are such parts of one projection's output."""
    y = torch.zeros(2, 8)
    traffic = spread(torch.arange(4.0), y, 5)
    x_bytes, y_bytes = (traffic["spread_kernel"].arguments[name] for name in "xy")
    assert (x_bytes.loaded, x_bytes.stored, x_bytes.distinct) == (2 * 3 * 4, 0, 3 * 4)
    assert (y_bytes.loaded, y_bytes.stored, y_bytes.distinct) == (0, 2 * 5 * 4, 2 * 5 * 4)
    assert traffic.moved("x") == 24 and traffic.moved() == 64 and traffic.flops == 0
    assert y.tolist() == [[0, 0, 1, 1, 2, 0, 0, 0]] * 2
    x, y = torch.arange(96.0).view(6, 16).split((4, 12), dim=1)
    traffic = spread(x[0], y, 4)
    assert traffic.moved("x") == 2 * 2 * 4 and traffic.moved("y") == 2 * 4 * 4
    assert y[0].tolist() == [0, 0, 1, 1, 8, 9, 10, 11, 0, 0, 1, 1]
    with pytest.raises(triton.runtime.errors.InterpreterError, match="spread_kernel: a load or store reaches outside"):
        spread(torch.ones(2), torch.zeros(16), 8)


def count(name: str, sizes: Sizes, **changes: Any) -> Traffic:
    with count_traffic() as traffic:
        OPS[name].run(**inputs(name, sizes, dtype=BF16) | changes)
    return traffic


@pytest.fixture
def within(covers: Any) -> Any:
    """within(quantity, ratio, bound): check the bound, and add a line to the summary."""

    def check(quantity: str, ratio: float, bound: float) -> None:
        assert ratio <= bound, f"{quantity}: {ratio:.3f} of what is compulsory, at most {bound}"
        covers("traffic", f"{quantity}: {ratio:.2f} of what is compulsory (bound {bound})")

    return check


def routing(kind: str, T: int) -> Tensor:
    if kind == "balanced":
        return (torch.arange(T * K, dtype=torch.int32) % E).view(T, K)
    if kind == "two experts":
        return torch.tensor([[5, 3]], dtype=torch.int32).repeat(T, 1)
    return torch.rand(T, E, generator=torch.Generator().manual_seed(T)).argsort(-1)[:, :K].int()


@pytest.mark.parametrize(("T", "sizes"), [(1, SMALL), (4, SMALL), (64, SMALL), (1024, SMALL_PREFILL)])
def test_small_experts_use_the_tiles_of_mixtral(T: int, sizes: Sizes) -> None:
    small, real = (selected_configs("expert_swiglu", {**each, "T": T}, BF16) for each in (sizes, MIXTRAL))
    for kernel in set(real) - {"experts_combine_kernel", "gather_by_expert_kernel"}:  # as wide as a row
        assert small[kernel] == real[kernel]


@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", ["balanced", "two experts", "random"])
@pytest.mark.parametrize("T", [1, 4, 64])
def test_decode_reads_only_selected_experts_once(T: int, kind: str, within: Any) -> None:
    check_weights_read_once({**SMALL, "T": T}, routing(kind, T), within, f"T {T}, {kind}")


def check_weights_read_once(sizes: Sizes, ids: Tensor, within: Any, case: str) -> None:
    traffic = count("expert_swiglu", sizes, ids=ids)
    selected = ids.unique().tolist()
    bytes_with, without = (OPS["expert_swiglu"].cost({**sizes, "distinct": n}, BF16).bytes for n in (len(selected), 0))
    ratio = traffic.moved("gate_up", "down") / (bytes_with - without)
    within(f"expert weights, {case}", ratio, 1.05 if sizes["T"] == 1 else 1.10)
    for kernel, weight in WEIGHTS.items():
        touched = traffic[f"experts_{kernel}_decode_kernel"].arguments[weight].touched.reshape(sizes["E"], -1)
        assert touched.any(1).nonzero()[0].tolist() == selected and touched[selected].all()


def issued(traffic: Traffic, name: str, sizes: Sizes) -> float:
    """Matrix FLOP issued / those that the tokens need."""
    return traffic.flops / OPS[name].cost(sizes, BF16).flops


# Below 1024 tokens the bytes of the weights limit the layer, and a tile may be up to half empty.
EXPERT_FLOPS = [(128, "balanced", 2.0), (1024, "balanced", 1.15)]
EXPERT_FLOPS += [(T, kind, None) for T, kind in ((96, "random"), (1024, "random"), (1024, "two experts"))]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("T", "kind", "bound"), EXPERT_FLOPS)
def test_flops_of_experts_in_prefill(T: int, kind: str, bound: float | None, within: Any) -> None:
    """Without a bound, each group may waste less than one row tile."""
    sizes, ids = {**(SMALL_PREFILL if bound == 1.15 else TINY), "T": T}, routing(kind, T)
    traffic = count("expert_swiglu", sizes, ids=ids)
    tile = selected_configs("expert_swiglu", {**MIXTRAL, "T": T}, BF16)["experts_up_kernel"].constexprs
    rows = tile["BLOCK_M"]
    bound = bound or round(1 + len(ids.unique()) * (rows - 1) / (T * K), 2)
    within(f"expert FLOP, T {T}, {kind}", issued(traffic, "expert_swiglu", sizes), bound)
    for kernel, weight in WEIGHTS.items() if kind == "balanced" else ():
        assert traffic[f"experts_{kernel}_kernel"].arguments[weight].touched.all()


def test_groups_padded_to_128_rows_are_caught(monkeypatch: pytest.MonkeyPatch, within: Any) -> None:
    def padded(sizes: Sizes, dtype: torch.dtype, arch: str) -> Any:
        configs = expert_configs(sizes, dtype, arch)
        for kernel in ("experts_up_kernel", "experts_down_kernel"):
            tiles = {**configs[kernel].constexprs, "BLOCK_M": 128}
            configs[kernel] = replace(configs[kernel], constexprs=tiles)
        return configs

    monkeypatch.setattr(experts, "configs", padded)
    sizes = {**TINY, "T": 128}
    with pytest.raises(AssertionError, match=r"padded: 4\.000 .* at most 2"):
        traffic = count("expert_swiglu", sizes, ids=routing("balanced", 128))
        within("padded", issued(traffic, "expert_swiglu", sizes), 2.0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("more", [{}, {"deterministic": True}, {"on_host": (0, 3)}], ids=str)
@pytest.mark.parametrize("T", [130, 300])
@pytest.mark.parametrize("weight", ["int4:128", "int8", "fp8"])
def test_prefill_loads_a_quantized_weight_once_a_row_tile(weight: str, T: int, more: Any, within: Any) -> None:
    """Its fields multiply from registers: a tile that was loaded for each of them would cross L2 4 or 2 times."""
    flags, ids = {name: value for name, value in more.items() if name == "deterministic"}, routing("balanced", T)
    sizes = {"T": T, "H": 256, "I": 256, "E": E, "K": K, "gate_up": weight, "down": weight, **flags}
    args = inputs("expert_swiglu", sizes, dtype=BF16) | {"ids": ids}
    args = with_offload(args, more["on_host"]) if "on_host" in more else args
    with count_traffic() as traffic:
        OPS["expert_swiglu"].run(**args)
    tiles = selected_configs("expert_swiglu", sizes, BF16)
    for kernel, operand in WEIGHTS.items():
        arguments, rows = traffic[f"experts_{kernel}_kernel"].arguments, tiles[f"experts_{kernel}_kernel"].constexprs
        names = [f"{operand} {memory}" for memory in ("resident", "host")] if "on_host" in more else [operand]
        loaded = sum(arguments[name].loaded for name in names if name in arguments)
        elements = (2 if kernel == "up" else 1) * 256 * 256 * (1 if weight != "int4:128" else 0.5)
        row_tiles = sum(-(-int(count) // rows["BLOCK_M"]) for count in ids.flatten().bincount())
        within(f"{operand} in prefill, {weight}, T {T}, {more}", loaded / (row_tiles * elements), 1.0)
    if "on_host" not in more:
        sizes = {"T": T, "H": 256, "N": 128, "weight": weight, **flags}
        arguments = count("linear", sizes)["linear_kernel"].arguments
        rows = selected_configs("linear", sizes, BF16)["linear_kernel"].constexprs
        stored = arguments["weight"].buffer.numel() * arguments["weight"].buffer.element_size()
        ratio = arguments["weight"].loaded / (-(-T // rows["BLOCK_M"]) * stored)
        within(f"linear's weight in prefill, {weight}, T {T}, {more}", ratio, 1.0)


HEADS = {"Hq": 8, "Hkv": 2, "D": 128}


RING = {"B": 2, "T": 1, "C": 512}
IN_8_BITS = RING | {"window": 0, "past": 400, "cache": "int8"}
DECODE = [  # operation, sizes, keys read or written by each key/value head, bound
    pytest.param("attention", {"B": 1, "T": 1, "S": 700, "window": 0}, 700, 1.05, id="split"),
    pytest.param("attention", {"B": 3, "T": 1, "S": 700, "window": 0, "ragged": True}, 3 * 700 - 9, 1.05, id="ragged"),
    pytest.param("attention", {"B": 1, "T": 1, "S": 700, "window": 300}, 300, 1.05, id="window"),
    pytest.param("attention", {"B": 1, "T": 3, "S": 700, "window": 300}, 302, 1.05, id="three queries"),
    pytest.param("rope_append_attention", RING | {"window": 512, "past": 1000}, 512 + 511, 1.05, id="wrapped ring"),
    pytest.param("rope_append_attention", RING | {"window": 0, "past": 40}, 41 + 43, 1.05, id="short cache"),
    pytest.param("rope_append_attention", IN_8_BITS, 400 + 403 + 1, 0.52, id="8 bits"),
]


@pytest.mark.parametrize(("name", "sizes", "keys", "bound"), DECODE)
def test_decode_reads_keys_once_a_group(
    name: str, sizes: Any, keys: int, bound: Any, within: Any, request: Any
) -> None:
    """In the wrapped ring sequence 1 has no new token, so its window holds one key less."""
    traffic = count(name, HEADS | sizes)
    assert traffic["attention_decode_kernel"].grid[1] == HEADS["Hkv"]
    moved = traffic.moved("keys.k", "keys.v", "keys.k_scales", "keys.v_scales")
    ratio = moved / (2 * keys * HEADS["Hkv"] * HEADS["D"] * BF16.itemsize)
    within(f"{name} K and V, {request.node.callspec.id}", ratio, bound)


ONE_HEAD = {"B": 1, "Hq": 1, "Hkv": 1, "D": 128}


CHUNK = {"T": 512, "C": 512, "window": 512, "past": 2000}
PREFILL = [
    pytest.param("attention", {"T": 1024, "S": 1024, "window": 0}, 1.15, id="causal"),
    pytest.param("attention", {"T": 1536, "S": 1536, "window": 512}, 1.15, id="window"),
    pytest.param("attention", {"T": 512, "S": 512, "window": 256, "causal": False}, 1.15, id="symmetric window"),
    pytest.param("cached_attention", CHUNK, 1.3, id="a chunk behind a full ring"),
]


@pytest.mark.parametrize(("name", "sizes", "bound"), PREFILL)
def test_flops_of_attention_in_prefill(name: str, sizes: Any, bound: float, within: Any, request: Any) -> None:
    sizes = ONE_HEAD | sizes
    within(f"{name} FLOP, {request.node.callspec.id}", issued(count(name, sizes), name, sizes), bound)


# By the number of rows, the most bytes from L2 for each byte of a weight.
L2_BYTES_MAX = {1: 1.3, 4: 1.3, 9: 1.3, 16: 1.3, 32: 1.5, 64: 1.5}


def from_l2(traffic: Traffic, weight: str, x: str, kernel: str) -> float:
    """Bytes from L2 to the SMs / those of the weight: padding that repeats a row crosses again."""
    arguments = traffic[kernel].arguments
    return 1 + arguments[x].crossed / arguments[weight].loaded


@pytest.mark.exhaustive
@pytest.mark.parametrize("T", L2_BYTES_MAX)
def test_bytes_from_l2_of_few_rows(T: int, within: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "use_skinny_kernel", lambda *sizes: True)
    traffic = count("linear", {"T": T, "H": 512, "N": 256})
    if T <= 16:
        within(f"linear's weight, T {T}", traffic.moved("weight") / (512 * 256 * BF16.itemsize), 1.05)
    ratio = from_l2(traffic, "weight", "x", "linear_decode_kernel")
    within(f"linear's bytes from L2 a weight byte, T {T}", ratio, L2_BYTES_MAX[T])
    traffic = count("expert_swiglu", {**SMALL, "T": T}, ids=routing("balanced", T))
    for x, (kernel, weight) in zip(("x", "h"), WEIGHTS.items(), strict=True):
        ratio = from_l2(traffic, weight, x, f"experts_{kernel}_decode_kernel")
        within(f"experts' {kernel}, bytes from L2 a weight byte, T {T}", ratio, L2_BYTES_MAX[T])


CLAMPED = (
    ("x.ptr + offs_t.to(tl.int64)[None, :]", "x.ptr + tl.minimum(offs_t, T - 1).to(tl.int64)[None, :]"),
    ("(offs_t < T)[None, :], 0, H", "(offs_t >= 0)[None, :], 0, H"),
)


def test_clamped_row_is_caught(tmp_path: Path, within: Any) -> None:
    """Padding that repeats a row gives right results, and crosses L2 again."""
    args = inputs("linear", {"T": 1, "H": 512, "N": 256}, dtype=BF16)
    with count_traffic() as traffic:
        got = module_with_fault(linear, tmp_path, *CLAMPED).linear.op.run(**args)
    assert torch.equal(got, linear.linear.op.run(**args))
    with pytest.raises(AssertionError, match=r"clamped: 2\.000 .* at most 1\.3"):
        within("clamped", from_l2(traffic, "weight", "x", "linear_decode_kernel"), L2_BYTES_MAX[1])


# All programs read these, from the L2 cache, or they are a few bytes for each program.
SHARED = {"weight", "norm.weight", "gate", "past", "new"}
ONCE = [
    ("rms_norm", {"T": 17, "H": 4096}),
    ("rms_norm", {"T": 70, "H": 80}),
    ("add_rms_norm", {"T": 17, "H": 4096}),
    ("rope", {"B": 2, "T": 5, "Hq": 32, "Hkv": 8, "D": 128, "P": 4096}),
    ("append", {"B": 1, "T": 15, "Hkv": 8, "D": 128, "C": 16, "past": 13}),
    ("route", {"T": 130, "E": 8, "K": 2}),
    ("gate_route", {"T": 33, "H": 4096, "E": 8, "K": 2}),
    ("rms_norm_gate_route", {"T": 33, "H": 4096, "E": 8, "K": 2}),
]


@pytest.mark.parametrize(("name", "sizes"), ONCE)
def test_each_byte_moves_once(name: str, sizes: Any, within: Any) -> None:
    (kernel,) = count(name, sizes).kernels
    for argument, moved in kernel.arguments.items():
        if argument not in SHARED:
            assert moved.loaded + moved.stored == moved.distinct, f"{argument} moves more than once"
    distinct = sum(argument.distinct for argument in kernel.arguments.values())
    compulsory = OPS[name].cost(sizes, BF16).bytes
    assert distinct >= compulsory
    within(f"{name}, {', '.join(f'{name} {size}' for name, size in sizes.items())}", distinct / compulsory, 1.01)


QWEN3_GATE = {"H": 2048, "E": 128, "K": 8}
GATE = 128 * 2048 * BF16.itemsize
# By tokens, the most bytes of Qwen3's gate that programs read together, and that one reads: whole gates, and KB.
GATE_BYTES = {1: (1, 4), 8: (8, 32), 64: (64, 256), 128: (8, 128), 1024: (64, 512), 4096: (128, 512)}


def gate_bytes(tokens: int) -> tuple[float, float]:
    """Bytes of the gate that programs read together, and that one reads."""
    traffic = count("rms_norm_gate_route", QWEN3_GATE | {"T": tokens})
    kernel = next(kernel for kernel in traffic.kernels if "gate" in kernel.arguments)
    loaded = kernel.arguments["gate"].loaded
    return loaded, loaded / (kernel.grid[0] * kernel.grid[1])


@pytest.mark.parametrize("T", [1, 8, 128])
def test_bytes_of_the_gate(T: int, within: Any) -> None:
    together, of_one = gate_bytes(T)
    within(f"gate, T {T}, read by all programs", together / GATE, GATE_BYTES[T][0])
    within(f"gate, T {T}, KB of a program", of_one / 1024, GATE_BYTES[T][1])


@pytest.mark.slow
@pytest.mark.parametrize("T", [64, 1024, 4096])
def test_bytes_of_the_gate_of_more_tokens(T: int, within: Any) -> None:
    test_bytes_of_the_gate(T, within)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("experts", "tokens"), [(8, 64), (128, 256), (256, 256)])
def test_gather_is_linear_in_tokens(experts: int, tokens: int, within: Any) -> None:
    """Four times the slots: programs read, and compare, four times the ids, and each slot is stored once."""
    work, x = [], Rows.of(torch.randn(1024, 48).bfloat16())  # a row is no whole block
    for T in (tokens, 4 * tokens):
        ids = sample_ids(T, experts, 8, "cpu", torch.Generator().manual_seed(0))
        with count_traffic() as traffic:
            rows, order, _ = gather_by_expert(x, ids, experts, gather_config(48))
        assert torch.equal(rows, x.ptr[order.long() // 8])
        moved = traffic["gather_by_expert_kernel"].arguments
        assert torch.equal(order, reference.sort_by_expert(ids, experts)[0]) and moved["order"].stored == 4 * 8 * T
        work.append(moved["ids"].loaded + moved["order"].stored)
    within(f"gather of 4 times the slots, E {experts}", work[1] / work[0] / 4, 1.125)


GROUPS = (0, 1, 64, 65, 128, 129, 192, 193, 257, 330, 384)  # rows of an expert: short, upper part, whole, and more


@pytest.mark.slow
@pytest.mark.parametrize("block_m", [128, 192])
def test_last_tiles_of_every_height(block_m: int) -> None:
    """A group's last tile rounds up to 64 rows, or to 128 where they fit a tile's upper part; results are right."""
    ids = torch.repeat_interleave(torch.arange(len(GROUPS)), torch.tensor(GROUPS)).int()
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]
    fixed = {"BLOCK_M": block_m, "SHORT_M": 64, "BLOCK_K": 64, "GROUP_M": 8}
    columns = {"experts_up_kernel": 16, "experts_down_kernel": 32}
    overrides = {kernel: LaunchConfig({**fixed, "BLOCK_N": block}, 8, 4) for kernel, block in columns.items()}
    args = inputs("expert_swiglu", {"T": len(ids), "H": 64, "I": 48, "E": len(GROUPS), "K": 1}, "cpu", BF16)
    args |= {"ids": ids}
    with override_configs(overrides), count_traffic() as traffic:
        got = OPS["expert_swiglu"].run(**args)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in args.items()}
    exact, plain = reference.expert_swiglu(**wide), reference.expert_swiglu(**args)
    error, allowed = ((x.double() - exact).abs().max() for x in (got, plain))
    assert error <= 2 * allowed
    rows = sum(-(-group // 64) * 64 for group in GROUPS)  # for tiles of 128 and 192 alike
    assert traffic.flops == rows * 2 * (64 * 96 + 64 * 64)  # H x 2I, and I in a depth of 64 x H
