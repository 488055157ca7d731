"""What one launch asks of a GPU, by its tiles: bytes and FLOP with their padding, of every kernel of the registry.

T tokens, K experts a token, N = T * K slots, E experts, H hidden, I intermediate; attention's letters as there

`Op.cost` is the compulsory work of a whole call. A prediction needs that of each launch, with its padding, partial sums
and what its programs load again from L2: this file counts those. A test holds the sum over a call's launches against
`Op.cost`. Tensors on the meta device hold no values: routing is uniform, caches are full, no sequence is ragged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from ..kernels.dispatch import expected_distinct_experts
from ..kernels.experts.prefill import main_rows
from ..kernels.launch import tensors
from ..kernels.op import Launch

# fp32 FLOP for a score of attention beside its products, two an instruction: 366 of the 501 instructions that the loop
# of a 128 x 128 tile has on sm_90, by 256 threads.
SOFTMAX = 12
LIBRARY = (256, 256, 64)  # a library's tile, that of two SMs which share what they load: an estimate
Operands = Mapping[str, Tensor]  # by name; a variable of this type is t


@dataclass(frozen=True)
class Work:
    """memory   bytes that cross device memory
    programs with work, each of them on average:
    loaded   bytes from L2, those of padding rows included
    flops    of matrix products, as issued; `single`: fp32's, without tensor cores
    vector   fp32 FLOP beside the products that these wait for
    shared   bytes of shared memory
    values   of 32 bits that stay in registers: sums, scores
    longest  the longest program by the average
    """

    memory: float
    programs: float
    loaded: float
    flops: float = 0.0
    vector: float = 0.0
    shared: int = 0
    values: float = 0.0
    single: bool = False
    longest: float = 1.0


def count_work(launch: Launch) -> Work:
    """The work of a recorded launch. A Triton kernel without a formula streams its tensors, each once.

    ValueError for another library's kernel without a formula.
    """
    formula = WORK.get(launch.kernel, None if launch.fn is None else _stream)
    if formula is None:
        known = ", ".join(sorted(WORK))
        raise ValueError(f"count_work: kernel is {launch.kernel!r}, needs one with a formula: {known}")
    return formula(launch)


def _operands(launch: Launch) -> Operands:
    """Tensors by name without _ptr; a descriptor's tensor is that of a pointer, too."""
    found = tensors(dict(launch.args))
    return {name.removesuffix("_ptr"): one for name, one in found.items() if not name.endswith("_desc")}


def _programs(launch: Launch) -> int:
    return math.prod(launch.grid or ())


def _nbytes(t: Operands, *without: str) -> int:
    """Of all tensors but `without`, each once."""
    return sum(one.nbytes for name, one in t.items() if name not in without)


# Bytes across memory of kernels that do not move each tensor once; n programs.
MEMORY: dict[str, Callable[[Operands, int], float]] = {
    "embed_rms_norm_kernel": lambda t, n: _nbytes(t, "table") + t["x"].nbytes,  # the rows that become x
    "append_kernel": lambda t, n: 2 * (t["k"].nbytes + t["v"].nbytes),  # the caches are longer
    # q and k in and out; cos and sin of each token.
    "rope_kernel": lambda t, n: 2 * (t["q"].nbytes + t["k"].nbytes) + 2 * n * t["cos"][0].nbytes,
}
# Bytes that a program loads, where that is no equal part of the former.
LOADED: dict[str, Callable[[Operands, int], float]] = {
    "sort_by_expert_kernel": lambda t, n: 2 * t["ids"].nbytes,  # an expert's program reads all ids twice
    "gather_by_expert_kernel": lambda t, n: t["ids"].nbytes + t["sorted"].nbytes / n,  # all ids, and its rows
    "gate_route_kernel": lambda t, n: (  # a token's program reads all of the gate
        sum(t[name].nbytes for name in ("gate", "norm") if name in t)
        + sum(t[name][0].nbytes for name in ("x", "residual") if name in t)
    ),
}


def _stream(launch: Launch) -> Work:
    t, programs = _operands(launch), _programs(launch)
    memory = MEMORY[launch.kernel](t, programs) if launch.kernel in MEMORY else _nbytes(t)
    loaded = LOADED[launch.kernel](t, programs) if launch.kernel in LOADED else memory / programs
    return Work(memory, programs, loaded, vector=2.0 * t["gate"].numel() if "gate" in t else 0.0)


def _product(
    launch: Launch,
    memory: float,
    programs: float,
    x: Tensor,
    weight: Tensor,
    shape: tuple[float, int, float],
    live: float | None = None,
    stored: float | None = None,
) -> Work:
    """Programs that multiply `shape` = (rows of x, rows of the weight, depth).

    live    rows of x that are loaded; None: all. Masked padding is multiplied and not loaded
    stored  bytes of a weight's row along the depth; None: one element a column. A tile for many rows loads a quantized
            weight's element again for each of its codes, which comes to as many bytes
    """
    rows, weight_rows, depth = shape
    size, block_k = x.element_size(), launch.constexprs["BLOCK_K"]
    stored = depth * weight.element_size() if stored is None else stored
    stage = block_k * (rows * size + weight_rows * weight.element_size())
    return Work(
        memory,
        programs,
        (rows if live is None else min(live, rows)) * depth * size + weight_rows * stored,
        flops=2 * rows * weight_rows * depth,
        shared=int((launch.num_stages or 1) * stage),
        values=rows * weight_rows,
        single=size == 4,
    )


def _row_bytes(t: Operands, name: str) -> int:
    """Bytes of a weight's row and of its scales, which a tile for few rows loads once."""
    parts = (t[each] for each in (name, "scales", "zeros") if each in t)
    return sum(one.shape[-1] * one.element_size() for one in parts)


def _linear(launch: Launch) -> Work:
    t, c = _operands(launch), launch.constexprs
    skinny, x, weight, memory = "BLOCK_T" in c, t["x"], t["weight"], _nbytes(t)
    shape = c["BLOCK_T" if skinny else "BLOCK_M"], c["BLOCK_N"], c["H"]
    if not skinny:
        return _product(launch, memory, _programs(launch), x, weight, shape)
    work = _product(launch, memory, _programs(launch), x, weight, shape, len(x), _row_bytes(t, "weight"))
    # As compiled: a first tile that a warpgroup multiplies before the loop has a buffer of its own.
    extra = work.shared // (launch.num_stages or 1) if c["PDL"] and c["BLOCK_N"] > 32 else 0
    return replace(work, shared=work.shared + extra)


@lru_cache(maxsize=1024)
def row_tiles(slots: int, share: float, experts: int, rows: int, heights: tuple[int, ...] = ()) -> tuple[float, float]:
    """Row tiles of `rows` that the groups of all experts fill, and the rows of all tiles: the expected numbers.

    heights  that the last tile of a group may have instead
    """
    n = torch.arange(slots + 1, dtype=torch.float64)
    if share >= 1:
        likely = (n == slots).double()
    else:
        log_count = torch.lgamma(n[-1] + 1) - torch.lgamma(n + 1) - torch.lgamma(n[-1] - n + 1)
        likely = torch.exp(log_count + n * math.log(share) + (n[-1] - n) * math.log1p(-share))
    last = torch.full_like(n, rows)
    for height in sorted(heights, reverse=True):
        last[n % rows <= height] = height
    last[n % rows == 0] = 0
    issued = n // rows * rows + last
    return experts * float((likely * torch.ceil(n / rows)).sum()), experts * float((likely * issued).sum())


def _expert_operands(launch: Launch) -> tuple[str, str, int, str]:
    """Names of the input and the weight, halves of the weight, and the letter of the depth."""
    return ("x", "gate_up", 2, "H") if "_up_" in launch.kernel else ("h", "down", 1, "I")


def _expert_bytes(t: Operands, weight: str, experts: float) -> float:
    """All tensors once, of the weight and its scales those of so many experts."""
    weights = {weight, "scales", "zeros"}
    return _nbytes(t, *weights) + experts * sum(t[name].nbytes / len(t[name]) for name in weights if name in t)


def _experts(launch: Launch) -> Work:
    """Prefill. Programs without a group leave at once. Rows of x are tokens, or slots where TMA reads them; `down` sees
    slots alone, as if each of them took an expert by itself."""
    t, c, E = _operands(launch), launch.constexprs, launch.args["E"]
    x, weight, halves, depth = _expert_operands(launch)
    slots, share = len(t[x]), 1 / E
    if halves == 2:
        K = launch.args["TOP_K"]
        slots, share = slots if launch.args["x_desc"] is None else slots // K, K / E
    rows = c["BLOCK_M"]
    heights = (c["SHORT_M"], main_rows(rows, c["SHORT_M"])) if c["SHORT_M"] else ()
    tiles, issued = row_tiles(slots, share, E, rows, heights)
    memory = _expert_bytes(t, weight, expected_distinct_experts(slots, share, E))
    programs = tiles * math.ceil(c["I" if halves == 2 else "H"] / c["BLOCK_N"])
    full, mean = (
        _product(launch, memory, programs, t[x], t[weight], (high, halves * c["BLOCK_N"], c[depth]))
        for high in (rows, issued / tiles)
    )
    return replace(mean, shared=full.shared, longest=rows * tiles / issued)


def _experts_decode(launch: Launch) -> Work:
    t, c, E = _operands(launch), launch.constexprs, launch.args["E"]
    x, weight, halves, depth = _expert_operands(launch)
    splits = 1 if halves == 2 else c["SPLIT_K"]
    T, K = t["ids"].shape
    experts = expected_distinct_experts(T, K / E, E)
    programs = (launch.grid or (0,))[0] * experts * splits
    shape = c["BLOCK_T"], halves * c["BLOCK_N"], c[depth] / splits
    memory, stored = _expert_bytes(t, weight, experts), _row_bytes(t, weight) / splits
    return _product(launch, memory, programs, t[x], t[weight], shape, T * K / experts, stored)


def _attention(launch: Launch, rows: int, keys: float, memory: float) -> Work:
    """Programs of `rows` queries and, on average, `keys` keys."""
    c, size = launch.constexprs, _operands(launch)["q"].element_size()
    stages, width = launch.num_stages or 1, c["BLOCK_D"]
    return Work(
        memory,
        _programs(launch),
        (rows + 2 * keys) * width * size,
        flops=4 * rows * keys * width,
        vector=SOFTMAX * rows * keys,
        shared=(rows + 2 * stages * c["BLOCK_N"]) * width * size,
        values=rows * (width + c["BLOCK_N"] * (1 + size / 4)),
        single=size == 4,
    )


def _attention_prefill(launch: Launch) -> Work:
    """Tiles of queries see keys from the window's edge to the diagonal, in whole tiles of keys."""
    t, c, args = _operands(launch), launch.constexprs, launch.args
    T, past = args["T"], args["C"] if c["CACHED"] else args["S"] - args["T"]
    end, window, rows = past + T, args["window"] if c["WINDOWED"] else 0, c["BLOCK_M"]
    before, after = (window, 0) if c["CAUSAL"] else (window // 2 + 1, window // 2)
    keys = []
    for first in range(past, end, rows):
        last = min(first + rows, end) - 1
        low = max(0, first - before + 1) if window else 0
        high = min(end, last + after + 1) if c["CAUSAL"] or window else end
        keys.append(max(0, math.ceil((high - low) / c["BLOCK_N"])) * c["BLOCK_N"])
    mean = sum(keys) / len(keys)
    share = min(1.0, (window + T) / end) if window and c["CAUSAL"] else 1.0
    key_bytes = sum(t[name].nbytes for name in ("k", "v", "k_cache", "v_cache") if name in t)
    work = _attention(launch, rows, mean, 2 * t["q"].nbytes + share * key_bytes)
    return replace(work, longest=max(keys) / mean if mean else 1.0)


def _attention_decode(launch: Launch) -> Work:
    t, c = _operands(launch), launch.constexprs
    slots, window, splits = launch.args["S"], launch.args["window"], (launch.grid or (1,))[0]
    keys = min(slots, window) if c["WINDOWED"] else slots
    span = math.ceil(math.ceil(keys / splits) / c["BLOCK_N"]) * c["BLOCK_N"]
    memory = _nbytes(t, "k", "v", "cos", "sin") + (t["k"].nbytes + t["v"].nbytes) * keys / max(1, slots)
    if "cos" in t:  # a row of each table a sequence, and the newest key into the cache
        memory += 2 * len(t["q"]) * t["cos"][0].nbytes + 2 * t["new_k"].nbytes
    return _attention(launch, c["BLOCK_M"], span, memory)


def _library_product(launch: Launch) -> Work:
    """torch.mm: its depth is split wherever there are too few tiles for the GPU."""
    x, weight = launch.args["in_0"], launch.args["in_1"]
    (T, depth), N, size = x.shape, weight.shape[1], x.element_size()
    rows, columns, step = min(LIBRARY[0], max(16, T)), LIBRARY[1], LIBRARY[2]
    programs = math.ceil(T / rows) * math.ceil(N / columns) * math.ceil(depth / step)
    loaded, flops = (rows + columns) * step * size, 2 * rows * columns * step
    return Work(_nbytes(_operands(launch)), programs, loaded, flops, single=size == 4)


def _library_stream(launch: Launch) -> Work:
    """torch's pointwise operations and copies: 16 KiB a program, an arbitrary number."""
    out = launch.args["out"].nbytes
    moved = out + sum(min(one.nbytes, out) for name, one in launch.args.items() if name != "out")
    programs = max(1, math.ceil(moved / 16384))
    return Work(moved, programs, moved / programs)


# torch's own; "arange" and "clamp_" compute positions.
POINTWISE = ("add", "add_", "mul", "copy_", "clone", "_to_copy", "fill_", "full", "zeros", "zero_", "arange", "clamp_")
WORK: dict[str, Callable[[Launch], Work]] = {
    **dict.fromkeys(("linear_kernel", "linear_decode_kernel"), _linear),
    **dict.fromkeys(("experts_up_kernel", "experts_down_kernel"), _experts),
    **dict.fromkeys(("experts_up_decode_kernel", "experts_down_decode_kernel"), _experts_decode),
    "attention_prefill_kernel": _attention_prefill,
    "attention_decode_kernel": _attention_decode,
    "aten::mm": _library_product,
    **{f"aten::{name}": _library_stream for name in POINTWISE},
}
