"""What one launch asks of a GPU, by its tiles: bytes and FLOP with their padding, of every kernel of the registry.

T tokens, K experts a token, N = T * K slots, E experts, H hidden, I intermediate; attention's letters as there

Tensors on the meta device hold no values: routing is uniform, caches are full, no sequence is ragged.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
POINTWISE = ("add", "add_", "mul", "copy_", "clone", "_to_copy", "fill_", "full", "zeros", "zero_")  # torch's own
MADE = ("arange", "clamp_")  # positions


@dataclass(frozen=True)
class Work:
    """memory   bytes that cross device memory
    programs that do anything, each of them on average:
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
    """Of a launch as `record_launches` notes it. One of Triton's without a formula streams its tensors, each once.

    ValueError for another library's that has none.
    """
    formula = WORK.get(launch.kernel, None if launch.fn is None else _stream)
    if formula is None:
        known = ", ".join(sorted(WORK))
        raise ValueError(f"count_work: kernel is {launch.kernel!r}, needs one with a formula: {known}")
    return formula(launch)


def _operands(launch: Launch) -> dict[str, Tensor]:
    """By name without _ptr: a descriptor's tensor is that of a pointer, too."""
    found = tensors(dict(launch.args))
    return {name.removesuffix("_ptr"): one for name, one in found.items() if not name.endswith("_desc")}


def _programs(launch: Launch) -> int:
    return math.prod(launch.grid or ())


def _nbytes(launch: Launch, *besides: str) -> int:
    """Of all tensors but `besides`, each once."""
    return sum(one.nbytes for name, one in _operands(launch).items() if name not in besides)


def _shared_out(launch: Launch, moved: float) -> Work:
    """Bytes that each program has an equal part of."""
    return Work(moved, _programs(launch), moved / _programs(launch))


def _stream(launch: Launch) -> Work:
    return _shared_out(launch, _nbytes(launch))


def _embed(launch: Launch) -> Work:
    """Of the table the rows that become x."""
    return _shared_out(launch, _nbytes(launch, "table") + _operands(launch)["x"].nbytes)


def _append(launch: Launch) -> Work:
    """k and v in and out; the caches are longer."""
    own = _operands(launch)
    return _shared_out(launch, 2 * (own["k"].nbytes + own["v"].nbytes))


def _rope(launch: Launch) -> Work:
    """q and k in and out; cos and sin of each token."""
    own = _operands(launch)
    heads = own["q"].nbytes + own["k"].nbytes
    return _shared_out(launch, 2 * heads + 2 * _programs(launch) * own["cos"][0].nbytes)


def _gather(launch: Launch) -> Work:
    """Each program reads all ids, and its rows."""
    own = _operands(launch)
    programs = _programs(launch)
    return Work(_nbytes(launch), programs, own["ids"].nbytes + own["sorted"].nbytes / programs)


def _sort(launch: Launch) -> Work:
    """Each expert's program reads all ids twice."""
    return Work(_nbytes(launch), _programs(launch), 2 * _operands(launch)["ids"].nbytes)


@dataclass(frozen=True)
class _Tile:
    """Rows of x and of a weight that a program multiplies along `depth`.

    live    rows of x that are loaded, where padding is masked: fewer than are multiplied
    stored  bytes of a weight's row along the depth
    """

    rows: float
    live: float
    x: Tensor
    weight_rows: int
    weight: Tensor
    depth: float
    stored: float

    def work(self, launch: Launch, memory: float, programs: float, block_k: int) -> Work:
        stages, size = launch.num_stages or 1, self.x.element_size()
        return Work(
            memory,
            programs,
            self.live * self.depth * size + self.weight_rows * self.stored,
            flops=2 * self.rows * self.weight_rows * self.depth,
            shared=int(stages * block_k * (self.rows * size + self.weight_rows * self.weight.element_size())),
            values=self.rows * self.weight_rows,
            single=size == 4,
        )


def _many(rows: float, x: Tensor, weight_rows: int, weight: Tensor, depth: int) -> _Tile:
    """A quantized weight's elements come again for each of their codes: as many bytes as one element a column."""
    return _Tile(rows, rows, x, weight_rows, weight, depth, depth * weight.element_size())


def _few(launch: Launch, live: float, x: str, weight: str, weight_rows: int, depth: int, splits: int = 1) -> _Tile:
    """A weight's bytes, and its scales, come once. `live`: rows that are no padding, which is masked."""
    own, rows = _operands(launch), launch.constexprs["BLOCK_T"]
    return _Tile(rows, min(live, rows), own[x], weight_rows, own[weight], depth / splits, _stored(own, weight) / splits)


def _stored(own: dict[str, Tensor], name: str) -> int:
    """Bytes of a weight's row and of its scales."""
    weight = own[name]
    row = weight.shape[-1] * weight.element_size()
    row += sum(own[each].shape[-1] * own[each].element_size() for each in ("scales", "zeros") if each in own)
    return row


def _gate(launch: Launch) -> Work:
    """A token's program reads the gate whole."""
    own = _operands(launch)
    weights = sum(own[name].nbytes for name in ("gate", "norm") if name in own)
    read = weights + sum(own[name][0].nbytes for name in ("x", "residual") if name in own)
    return Work(_nbytes(launch), _programs(launch), read, vector=2.0 * own["gate"].numel())


def _linear(launch: Launch) -> Work:
    own, c = _operands(launch), launch.constexprs
    tile = _many(c["BLOCK_M"], own["x"], c["BLOCK_N"], own["weight"], c["H"])
    return tile.work(launch, _nbytes(launch), _programs(launch), c["BLOCK_K"])


def _linear_decode(launch: Launch) -> Work:
    own, c = _operands(launch), launch.constexprs
    tile = _few(launch, len(own["x"]), "x", "weight", c["BLOCK_N"], c["H"])
    asked = tile.work(launch, _nbytes(launch), _programs(launch), c["BLOCK_K"])
    # As compiled: a first tile that a warpgroup multiplies before the loop has a buffer of its own.
    return replace(
        asked, shared=asked.shared + asked.shared // (launch.num_stages or 1) * (c["PDL"] and c["BLOCK_N"] > 32)
    )


@lru_cache(maxsize=1024)
def row_tiles(
    choices: int, share: float, experts: int, rows: int, heights: tuple[int, ...] = ()
) -> tuple[float, float]:
    """Row tiles of `rows` that the groups of all experts fill, and the rows of all tiles: the expected numbers.

    heights  that the last tile of a group may have instead
    """
    n = torch.arange(choices + 1, dtype=torch.float64)
    if share >= 1:
        likely = (n == choices).double()
    else:
        ways = torch.lgamma(n[-1] + 1) - torch.lgamma(n + 1) - torch.lgamma(n[-1] - n + 1)
        likely = torch.exp(ways + n * math.log(share) + (n[-1] - n) * math.log1p(-share))
    last = torch.full_like(n, rows)
    for height in sorted(heights, reverse=True):
        last[n % rows <= height] = height
    last[n % rows == 0] = 0
    issued = n // rows * rows + last
    return experts * float((likely * torch.ceil(n / rows)).sum()), experts * float((likely * issued).sum())


def _expert_bytes(launch: Launch, weight: str, chosen: float) -> float:
    """All tensors once, of the weight and its scales the chosen experts'."""
    weights = {weight, "scales", "zeros"}
    by_expert = sum(one.nbytes / len(one) for name, one in _operands(launch).items() if name in weights)
    return _nbytes(launch, *weights) + chosen * by_expert


def _experts(launch: Launch, x: str, weight: str, choices: int, share: float, halves: int, depth: str) -> Work:
    """Prefill. Programs without a group leave at once."""
    own, c, experts = _operands(launch), launch.constexprs, launch.args["E"]
    width = c["I"] if halves == 2 else c["H"]
    rows = c["BLOCK_M"]
    heights = (c["SHORT_M"], main_rows(rows, c["SHORT_M"])) if c["SHORT_M"] else ()
    tiles, issued = row_tiles(choices, share, experts, rows, heights)
    whole, mean = (_many(high, own[x], halves * c["BLOCK_N"], own[weight], c[depth]) for high in (rows, issued / tiles))
    memory = _expert_bytes(launch, weight, expected_distinct_experts(choices, share, experts))
    programs = tiles * math.ceil(width / c["BLOCK_N"])
    held = whole.work(launch, memory, programs, c["BLOCK_K"]).shared
    found = mean.work(launch, memory, programs, c["BLOCK_K"])
    return replace(found, shared=held, longest=rows * tiles / issued)


def _experts_up(launch: Launch) -> Work:
    """Rows of x are tokens, or where TMA reads them slots."""
    K, rows = launch.args["TOP_K"], len(_operands(launch)["x"])
    tokens = rows if launch.args["x_desc"] is None else rows // K
    return _experts(launch, "x", "gate_up", tokens, K / launch.args["E"], 2, "H")


def _experts_down(launch: Launch) -> Work:
    """It knows the slots and not the tokens: as if each slot chose by itself."""
    return _experts(launch, "h", "down", len(_operands(launch)["h"]), 1 / launch.args["E"], 1, "I")


def _experts_decode(launch: Launch, x: str, weight: str, halves: int, depth: str, splits: int) -> Work:
    own, c = _operands(launch), launch.constexprs
    T, K = own["ids"].shape
    chosen = expected_distinct_experts(T, K / launch.args["E"], launch.args["E"])
    tile = _few(launch, T * K / chosen, x, weight, halves * c["BLOCK_N"], c[depth], splits)
    programs = (launch.grid or (0,))[0] * chosen * splits
    return tile.work(launch, _expert_bytes(launch, weight, chosen), programs, c["BLOCK_K"])


def _experts_up_decode(launch: Launch) -> Work:
    return _experts_decode(launch, "x", "gate_up", 2, "H", 1)


def _experts_down_decode(launch: Launch) -> Work:
    return _experts_decode(launch, "h", "down", 1, "I", launch.constexprs["SPLIT_K"])


def _attended(launch: Launch, rows: int, keys: float, memory: float, programs: int) -> Work:
    """Programs of `rows` queries and, on average, `keys` keys."""
    c, size = launch.constexprs, _operands(launch)["q"].element_size()
    stages, width = launch.num_stages or 1, c["BLOCK_D"]
    return Work(
        memory,
        programs,
        (rows + 2 * keys) * width * size,
        flops=4 * rows * keys * width,
        vector=SOFTMAX * rows * keys,
        shared=(rows + 2 * stages * c["BLOCK_N"]) * width * size,
        values=rows * (width + c["BLOCK_N"] * (1 + size / 4)),
        single=size == 4,
    )


def _attention_prefill(launch: Launch) -> Work:
    """Tiles of queries see keys from the window's edge to the diagonal, in whole tiles of keys."""
    own, c, args = _operands(launch), launch.constexprs, launch.args
    T, held = args["T"], args["C"] if c["CACHED"] else args["S"] - args["T"]
    end, window, rows = held + T, args["window"] if c["WINDOWED"] else 0, c["BLOCK_M"]
    before, after = (window, 0) if c["CAUSAL"] else (window // 2 + 1, window // 2)
    seen = []
    for first in range(held, end, rows):
        last = min(first + rows, end) - 1
        low = max(0, first - before + 1) if window else 0
        high = min(end, last + after + 1) if c["CAUSAL"] or window else end
        seen.append(max(0, math.ceil((high - low) / c["BLOCK_N"])) * c["BLOCK_N"])
    mean = sum(seen) / len(seen)
    share = min(1.0, (window + T) / end) if window and c["CAUSAL"] else 1.0
    keys = sum(own[name].nbytes for name in ("k", "v", "k_cache", "v_cache") if name in own)
    found = _attended(launch, rows, mean, 2 * own["q"].nbytes + share * keys, _programs(launch))
    return replace(found, longest=max(seen) / mean if mean else 1.0)


def _attention_decode(launch: Launch) -> Work:
    own, c = _operands(launch), launch.constexprs
    slots, window, splits = launch.args["S"], launch.args["window"], (launch.grid or (1,))[0]
    keys = min(slots, window) if c["WINDOWED"] else slots
    span = math.ceil(math.ceil(keys / splits) / c["BLOCK_N"]) * c["BLOCK_N"]
    memory = _nbytes(launch, "k", "v", "cos", "sin") + (own["k"].nbytes + own["v"].nbytes) * keys / max(1, slots)
    if "cos" in own:  # a row of each table a sequence, and the newest key into the cache
        memory += 2 * len(own["q"]) * own["cos"][0].nbytes + 2 * own["new_k"].nbytes
    return _attended(launch, c["BLOCK_M"], span, memory, _programs(launch))


def _library_product(launch: Launch) -> Work:
    """torch.mm: its depth is split wherever there are too few tiles for the GPU."""
    x, weight = launch.args["in_0"], launch.args["in_1"]
    (T, depth), N, size = x.shape, weight.shape[1], x.element_size()
    rows, columns, step = min(LIBRARY[0], max(16, T)), LIBRARY[1], LIBRARY[2]
    programs = math.ceil(T / rows) * math.ceil(N / columns) * math.ceil(depth / step)
    moved = _nbytes(launch)
    return Work(moved, programs, (rows + columns) * step * size, 2 * rows * columns * step, single=size == 4)


def _library_stream(launch: Launch) -> Work:
    """torch's pointwise operations and copies: 16 KiB a program, as good as any number."""
    out = launch.args["out"].nbytes
    moved = out + sum(min(one.nbytes, out) for name, one in launch.args.items() if name != "out")
    programs = max(1, math.ceil(moved / 16384))
    return Work(moved, programs, moved / programs)


WORK: dict[str, Callable[[Launch], Work]] = {
    "rms_norm_kernel": _stream,
    "embed_rms_norm_kernel": _embed,
    "linear_kernel": _linear,
    "linear_decode_kernel": _linear_decode,
    "route_kernel": _stream,
    "gate_route_kernel": _gate,
    "sort_by_expert_kernel": _sort,
    "gather_by_expert_kernel": _gather,
    "experts_up_kernel": _experts_up,
    "experts_down_kernel": _experts_down,
    "experts_up_decode_kernel": _experts_up_decode,
    "experts_down_decode_kernel": _experts_down_decode,
    "experts_combine_kernel": _stream,
    "rope_kernel": _rope,
    "append_kernel": _append,
    "attention_prefill_kernel": _attention_prefill,
    "attention_decode_kernel": _attention_decode,
    "attention_combine_kernel": _stream,
    "aten::mm": _library_product,
    **{f"aten::{name}": _library_stream for name in (*POINTWISE, *MADE)},
}
