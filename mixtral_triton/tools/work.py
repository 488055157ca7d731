"""Count the work of one launch from its tiles: bytes and FLOP, padding included, for every kernel of the registry.

T tokens, K experts a token, N = T * K slots, E experts, H hidden, I intermediate; attention's letters as there

`Op.cost` is the compulsory work of a whole call. A prediction needs the work of each launch, with padding, partial sums
and repeated loads from L2. A test compares the sum over a call's launches with `Op.cost`. Tensors on the meta device
hold no values: routing is assumed to be uniform, caches full and sequences of one length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.distributions import Binomial

from ..kernels.dispatch import expected_distinct_experts
from ..kernels.experts.kernels import main_rows
from ..kernels.launch import Launch
from ..kernels.offload import find_weight

# fp32 FLOP for a score of attention beside its products, two an instruction: 366 of the 501 instructions that the loop
# of a 128 x 128 tile has on sm_90, by 256 threads; and exp2, of which an SM computes 16 a clock beside 128 instructions
# (CUDA programming guide, "Arithmetic Instructions").
SOFTMAX = 12 + 2 * 128 // 16
CODES = 20  # more for a score over keys in 8 bits, whose codes become numbers: as compiled for sm_90
LIBRARY = (256, 256, 64)  # a library's tile, that of two SMs which share what they load: an estimate
Operands = Mapping[str, Tensor]  # by name; a variable of this type is t


@dataclass(frozen=True)
class Work:
    """memory  bytes that cross device memory
    tiles   programs with work, in the order in which they start: how many, the bytes that each loads from L2, those of
            padding rows included, and the FLOP of its matrix products as issued
    vector  fp32 FLOP beside each of these, for which the products wait
    shared  bytes of shared memory of a program
    values  of 32 bits that stay in its registers: sums, scores; `stored` of them at the end
    single  products of fp32, without tensor cores
    host    of the experts in host memory: expected bytes that cross the link to it
    apart   the share of the launch that does not wait for these: the probability that no token chooses one of them;
            1 in prefill, which copies them to the device before the launch
    early   bytes of a weight that a program prefetches before it waits for the launch in front
    """

    memory: float
    tiles: tuple[tuple[float, float, float], ...]
    vector: float = 0.0
    shared: int = 0
    values: float = 0.0
    stored: float = 0.0
    fp32: bool = False
    host: float = 0.0
    apart: float = 0.0
    early: int = 0

    @property
    def programs(self) -> float:
        return sum(count for count, _, _ in self.tiles)

    @property
    def loaded(self) -> float:
        """Bytes from L2 of all programs."""
        return sum(count * loaded for count, loaded, _ in self.tiles)

    @property
    def flops(self) -> float:
        """FLOP of the matrix products of all programs."""
        return sum(count * flops for count, _, flops in self.tiles)


def count_work(launch: Launch) -> Work:
    """Return the work of a recorded launch. A Triton kernel without a formula streams each of its tensors once.

    ValueError for another library's kernel without a formula.
    """
    if launch.fn is None and launch.kernel not in WORK:
        known = ", ".join(sorted(WORK))
        raise ValueError(f"count_work: kernel is {launch.kernel!r}, needs one with a formula: {known}")
    return WORK.get(launch.kernel, _stream)(launch)


def _operands(launch: Launch) -> Operands:
    """Return tensors by name without _ptr; a descriptor's tensor is that of a pointer, too."""
    return {name.removesuffix("_ptr"): x for name, x in launch.args.items() if isinstance(x, Tensor)}


def _nbytes(t: Operands, *names: str) -> int:
    """Return the bytes of the tensors `names`; without names those of all tensors."""
    return sum(one.nbytes for name, one in t.items() if name in names or not names)


def _vector_bytes(t: Operands, name: str) -> float:
    """Return the bytes of a key or value of the tensor `name`, those of its scale in 8 bits included."""
    return t[name].shape[-1] * t[name].element_size() + 4 * (f"{name}_scales" in t)


def _vectors(x: Tensor) -> int:
    return x.numel() // max(1, x.shape[-1])


# Bytes across memory of kernels that do not move each tensor once; n programs.
MEMORY: dict[str, Callable[[Operands, int], float]] = {
    "embed_rms_norm_kernel": lambda t, n: _nbytes(t) - t["table"].nbytes + t["x"].nbytes,  # the rows that become x
    "append_kernel": lambda t, n: _nbytes(t, "k", "v") + _vectors(t["k"]) * 2 * _vector_bytes(t, "k_cache"),
    # q and k in and out; cos and sin of each token.
    "rope_kernel": lambda t, n: 2 * _nbytes(t, "q", "k") + 2 * n * t["cos"][0].nbytes,
}


def _stream(launch: Launch) -> Work:
    """Count each tensor once. Operations of torch have programs of 16 KiB, an arbitrary number."""
    t, programs = _operands(launch), math.prod(launch.grid or ())
    memory = MEMORY[launch.kernel](t, programs) if launch.kernel in MEMORY else _nbytes(t)
    programs = programs if launch.grid else max(1, math.ceil(memory / 16384))
    host = t["x"].nbytes if getattr(t.get("table"), "on_host", False) else 0  # the embedding's rows
    return Work(memory - host, ((programs, memory / programs, 0.0),), host=host)


@lru_cache(maxsize=1024)
def row_tiles(slots: int, share: float, experts: int, rows: int, heights: tuple[int, ...] = ()) -> dict[int, float]:
    """Return the expected number of row tiles of each height that the groups of all experts fill.

    share    probability that a slot belongs to an expert
    heights  rows that the last tile of a group may have instead of `rows`
    """
    n = torch.arange(slots + 1, dtype=torch.float64)
    likely = Binomial(slots, torch.tensor(share, dtype=torch.float64)).log_prob(n).exp()
    last = torch.full_like(n, rows)
    for height in sorted(heights, reverse=True):
        last[n % rows <= height] = height
    last[n % rows == 0] = 0
    counts = {height: (last == height).double() for height in (rows, *heights)}
    counts[rows] += n // rows
    # Rounded: a whole wave of programs stays one.
    return {height: round(experts * float((likely * count).sum()), 6) for height, count in counts.items()}


# By the start of a kernel's name: input, weight, the parts of the weight's rows that one program takes, depth.
PRODUCTS = {
    "linear": ("x", "weight", 1, "H"),
    "experts_up": ("x", "gate_up", 2, "H"),
    "experts_down": ("h", "down", 1, "I"),
}


def _product(launch: Launch) -> Work:
    """Count a product with one weight, or with those of E experts, in tiles for few rows (BLOCK_T) or many (BLOCK_M).

    Programs for few rows multiply masked padding and do not load it, and load a quantized row and its scales once. A
    tile for many rows loads an element of a quantized weight again for each of its codes, as many bytes as if there was
    one element a column. Its programs without a group end at once. Rows of x are tokens, or slots where TMA reads them;
    `down` has slots alone, as if each of them took an expert by itself.
    """
    t, c, args = dict(_operands(launch)), launch.constexprs, launch.args
    x, weight, halves, letter = next(item for name, item in PRODUCTS.items() if launch.kernel.startswith(name))
    offloaded = find_weight(t[weight])
    if offloaded is not None:
        t[weight] = torch.empty((len(offloaded), *offloaded.host.shape[1:]), dtype=offloaded.dtype, device="meta")
    if "ids" in t:
        tokens, K = t["ids"].shape
    else:
        K = args.get("TOP_K", 1)
        tokens = len(t[x]) // (1 if args.get("x_desc") is None else K)
    E, splits, size = args.get("E", 1), c.get("SPLIT_K", 1), t[x].element_size()
    distinct, in_place = expected_distinct_experts(tokens, K / E, E), "BLOCK_T" in c
    columns, depth = halves * c["BLOCK_N"], c[letter] / splits
    parts = [t[name] for name in (weight, "scales", "zeros") if name in t]
    stages = launch.num_stages or 1
    if in_place:
        rows = mean = c["BLOCK_T"]
        bytes_of_weight = columns * sum(part.shape[-1] * part.element_size() for part in parts) / splits
        loaded = min(rows, tokens * K / distinct) * depth * size + bytes_of_weight
        tiles = [((launch.grid or (0,))[0] * distinct * splits, loaded, 2 * rows * columns * depth)]
        # As compiled: a first tile that a warpgroup multiplies before the loop has a buffer of its own.
        stages += int(E == 1 and c["PDL"] and columns > 32)
    else:
        rows, short = c["BLOCK_M"], c.get("SHORT_M", 0)
        heights = row_tiles(tokens, K / E, E, rows, (short, main_rows(rows, short)) if short else ())
        mean = sum(height * count for height, count in heights.items()) / sum(heights.values())
        across, bytes_of_weight = math.ceil(t[weight].shape[-2] / columns), columns * depth * t[weight].element_size()
        tiles = [
            (count * across / E, height * depth * size + bytes_of_weight, 2 * height * columns * depth)
            for height, count in heights.items()
        ] * E
    memory, host, apart = _nbytes(t) - (1 - distinct / E) * sum(part.nbytes for part in parts), 0.0, 0.0
    if offloaded is not None:
        n = len(offloaded.on_host)
        host = n / E * t[weight].nbytes * (distinct / E if in_place else 1.0)
        memory -= host if in_place else -host
        apart = (math.comb(E - n, K) / math.comb(E, K)) ** tokens if in_place else 1.0
    shared = stages * c["BLOCK_K"] * (rows * size + columns * t[weight].element_size())
    sums = mean * columns
    early = c.get("PREFETCH", 0) * c["BLOCK_N"]
    ends = {"values": sums, "stored": sums, "host": host, "apart": apart, "early": early}
    return Work(memory, tuple(tiles), shared=shared, fp32=size == 4, **ends)


def _attention(launch: Launch) -> Work:
    """Count programs of BLOCK_M queries, each with its keys in whole tiles.

    Decode divides the keys among SPLITS programs. A tile of prefill sees keys from the window's edge to the diagonal.
    """
    t, c, args = _operands(launch), launch.constexprs, launch.args
    size, rows, width, stages = t["q"].element_size(), c["BLOCK_M"], c["BLOCK_D"], launch.num_stages or 1
    T, slots, window = args["T"], args["S"], args["window"] if c["WINDOWED"] else 0
    spans = []
    if launch.kernel == "attention_decode_kernel":
        keys = min(slots, window) if window else slots
        share = keys / max(1, slots)
        spans.append(math.ceil(keys / (launch.grid or (1,))[0]))
    else:
        # Without a window a cache holds the chunk, too.
        past = slots - T if not c["CACHED"] else args["C"] if window else max(0, args["C"] - T)
        end, causal = past + T, c["CAUSAL"]
        share = min(1.0, (window + T) / end) if window and causal else 1.0
        before, after = (window, 0) if causal else (window // 2 + 1, window // 2)
        for first in range(past, end, rows):
            last = min(first + rows, end) - 1
            high = min(end, last + after + 1) if causal or window else end
            spans.append(high - (max(0, first - before + 1) if window else 0))
    spans = [max(0, math.ceil(span / c["BLOCK_N"])) * c["BLOCK_N"] for span in spans]
    heads = math.prod(launch.grid or ()) / len(spans)
    key, codes = width * size if "k_scales" not in t else width + 4, "k_scales" in t
    tiles = ((heads, rows * width * size + 2 * span * key, 4 * rows * span * width) for span in reversed(spans))
    keys = [f"{name}{scales}" for name in ("k", "v", "k_cache", "v_cache") for scales in ("", "_scales")]
    memory = _nbytes(t) - (1 - share) * _nbytes(t, *keys)
    if "cos" in t:  # a row of each table a sequence, and the newest key into the cache
        memory += 2 * len(t["q"]) * t["cos"][0].nbytes - _nbytes(t, "cos", "sin")
        memory += 2 * _vectors(t["new_k"]) * _vector_bytes(t, "k")
    vector = (SOFTMAX + CODES * (codes and launch.kernel == "attention_prefill_kernel")) / (4 * width)
    shared = rows * width * size + 2 * stages * c["BLOCK_N"] * key
    values = rows * (width + c["BLOCK_N"] * (1 + size / 4))
    return Work(memory, tuple(tiles), vector, shared, values, stored=rows * width, fp32=size == 4)


def _mm(launch: Launch) -> Work:
    """Count torch.mm in LIBRARY's tiles, its depth split as if there were too few tiles for the GPU."""
    t = _operands(launch)
    (T, depth), N, size = t["in_0"].shape, t["in_1"].shape[1], t["in_0"].element_size()
    rows, columns, step = min(LIBRARY[0], max(16, T)), LIBRARY[1], LIBRARY[2]
    programs = math.ceil(T / rows) * math.ceil(N / columns) * math.ceil(depth / step)
    tile = programs, (rows + columns) * step * size, 2 * rows * columns * step
    return Work(_nbytes(t), (tile,), fp32=size == 4)


# Operations of torch that stream; "arange" and "clamp_" compute positions.
STREAMED = "add add_ mul copy_ clone _to_copy fill_ full zeros zero_ arange clamp_"
WORK: dict[str, Callable[[Launch], Work]] = {
    **{f"{name}{path}_kernel": _product for name in PRODUCTS for path in ("", "_decode")},
    **{f"attention_{name}_kernel": _attention for name in ("prefill", "decode")},
    **{f"aten::{name}": _stream for name in STREAMED.split()},
    "aten::mm": _mm,
}
