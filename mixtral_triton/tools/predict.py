"""The cost model: the work of launches, floors, and predicted times of calls on a GPU that is not at hand.

A floor is a call's compulsory work (`Op.cost`) at full rates. A predicted time comes from the recorded launches and is
a range, OPTIMISTIC to CAUTIOUS; docs/bench.md says what the model assumes: routing is uniform, caches are full.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Binomial

from ..kernels.arch import ARCHS, amd, family, max_multiprocessors
from ..kernels.experts.kernels import main_rows
from ..kernels.facts import Operands, Product, facts_of
from ..kernels.heads import stored_bytes
from ..kernels.kernel_args import flatten, operand_name
from ..kernels.launch import Launch
from ..kernels.offload import find_weight
from ..kernels.op import Cost
from ..kernels.quantized import BITS, W8A8
from ..kernels.sort import expected_distinct_experts
from .gpus import GPU, LINKS

# fp32 FLOP for a score of attention beside its products, two an instruction: 366 of the 501 instructions in the loop of
# a 128 x 128 tile on sm_90; and exp2, 16 a clock beside 128 instructions (CUDA programming guide).
SOFTMAX = 12 + 2 * 128 // 16
# As much for an element of a quantized weight in a tile of many rows: about four instructions, its scale among them,
# as compiled for sm_90 with 128 rows of int4 and 256 of fp8.
DEQUANTIZED = 8
CODES = 20  # more for a score over keys in 8 bits, whose codes become numbers: as compiled for sm_90
LIBRARY = (256, 256, 64)  # a library's tile, that of two SMs which share what they load: an estimate


@dataclass(frozen=True)
class Work:
    """The work of a launch. `tiles` are programs with work, in the order in which they start: how many, the
    bytes that each loads from L2, those of padding rows included, and the FLOP of its matrix products as issued."""

    memory: float  # bytes that cross device memory
    tiles: tuple[tuple[float, float, float], ...]
    vector: float = 0.0  # fp32 FLOP beside each of the tiles', for which the products wait
    shared: int = 0  # bytes of shared memory of a program
    values: float = 0.0  # of 32 bits in its registers, `stored` of them at the end
    stored: float = 0.0
    fp32: bool = False  # products without tensor cores
    fp8: bool = False  # products of codes, for which tensor cores have twice bf16's rate
    host: float = 0.0  # of the experts in host memory, expected bytes that cross the link
    apart: float = 0.0  # the share that does not wait for the link: the probability that no token needs it
    overlaps: bool = False  # `vector` of one warpgroup and the products of another
    early: int = 0  # bytes of a weight that a program prefetches before it waits for the launch in front

    @property
    def programs(self) -> float:
        return sum(count for count, _, _ in self.tiles)

    @property
    def loaded(self) -> float:
        return sum(count * loaded for count, loaded, _ in self.tiles)

    @property
    def flops(self) -> float:
        return sum(count * flops for count, _, flops in self.tiles)


def count_work(launch: Launch) -> Work:
    """Return the work of a launch. A Triton kernel without a formula streams; another one is a ValueError."""
    if launch.fn is None and launch.kernel not in TORCH_WORK:
        known = ", ".join(sorted(TORCH_WORK))
        raise ValueError(f"count_work: kernel is {launch.kernel!r}, needs one with a formula: {known}")
    tensors = {operand_name(path): x for path, x in flatten(launch.args) if isinstance(x, Tensor)}
    if launch.fn is None:
        return TORCH_WORK[launch.kernel](launch, tensors)
    work = facts_of(launch.kernel).work
    if isinstance(work, Product):
        return _product(launch, tensors, work)
    return (_attention if work == "attention" else _stream)(launch, tensors)


def _nbytes(t: Operands, *names: str) -> int:
    """Return the bytes of the tensors `names`; without names those of all tensors."""
    return sum(one.nbytes for name, one in t.items() if name in names or not names)


def _stream(launch: Launch, t: Operands) -> Work:
    """Count what the kernel says that it moves, or each tensor once. Operations of torch have programs of 16 KiB, an
    arbitrary number."""
    moved, programs = facts_of(launch.kernel).work, math.prod(launch.grid or ())
    memory = float(moved(t, programs) if callable(moved) else _nbytes(t))
    programs = programs if launch.grid else max(1, math.ceil(memory / 16384))
    host = t["x"].nbytes if getattr(t.get("table"), "on_host", False) else 0  # the embedding's rows
    return Work(memory - host, ((programs, memory / programs, 0.0),), host=host)


@lru_cache(maxsize=1024)
def row_tiles(slots: int, share: float, experts: int, rows: int, heights: tuple[int, ...] = ()) -> dict[int, float]:
    """Return the expected number of row tiles of each height that the groups of all experts fill. share: probability
    that a slot belongs to an expert; heights: rows that the last tile of a group may have instead of `rows`."""
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


def _product(launch: Launch, operands: Operands, product: Product) -> Work:
    """Count a product with one weight, or with those of E experts, in tiles for few rows (BLOCK_T) or many (BLOCK_M).
    Programs for few rows multiply masked padding and do not load it. Rows of x are tokens, or slots where TMA reads
    them; `down` has slots alone."""
    t, c, args = dict(operands), launch.constexprs, launch.args
    x, weight, halves, letter = product
    offloaded = find_weight(t[weight])
    if offloaded is not None:
        t[weight] = torch.empty((len(offloaded), *offloaded.host.shape[1:]), dtype=offloaded.dtype, device="meta")
    K = t["ids"].shape[1] if "ids" in t else args.get("TOP_K", 1)
    tokens = len(t["ids"]) if "ids" in t else len(t[x]) // (1 if args.get("x_desc") is None else K)
    E = args["groups"].E if "groups" in args else args.get("E", 1)
    splits, size = c.get("SPLIT_K", 1), t[x].element_size()
    distinct, in_place = expected_distinct_experts(tokens, K / E, E), "BLOCK_T" in c
    columns, depth = halves * c["BLOCK_N"], c[letter] / splits
    parts = [t[name] for name in (weight, f"{weight}.scales", f"{weight}.zeros") if name in t]
    bytes_of_weight = columns * sum(part.shape[-1] * part.element_size() for part in parts) / splits
    stages, fields, vector = launch.num_stages or 1, 1, 0.0
    if in_place:
        rows = mean = c["BLOCK_T"]
        loaded = min(rows, tokens * K / distinct) * depth * size + bytes_of_weight
        tiles = [((launch.grid or (0,))[0] * distinct * splits, loaded, 2 * rows * columns * depth)]
        # As compiled: a first tile that a warpgroup multiplies before the loop has a buffer of its own.
        stages += int(E == 1 and c["PDL"] and columns > 32)
    else:
        rows, short = c["BLOCK_M"], c.get("SHORT_M", 0)
        heights = row_tiles(tokens, K / E, E, rows, (short, main_rows(rows, short)) if short else ())
        mean = sum(height * count for height, count in heights.items()) / sum(heights.values())
        across = math.ceil(t[weight].shape[-2] / columns)
        if c["LAYOUT"].format not in ("dense", W8A8):
            fields, vector = 16 // BITS[c["LAYOUT"].format], DEQUANTIZED / (2 * rows)
        elif c["LAYOUT"].promoted:
            vector = 1 / c["BLOCK_K"]
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
    shared = stages * c["BLOCK_K"] * (rows * size * fields + columns * t[weight].element_size())
    sums, early = mean * columns, c.get("PREFETCH", 0) * c["BLOCK_N"]
    # A tile's sums of codes lie beside the total: those of one part, where a tile has two.
    values = sums + min(sums, 128 * columns) * c["LAYOUT"].promoted
    kinds = {"fp32": size == 4, "fp8": size == 1}
    return Work(
        memory, tuple(tiles), vector, shared, values, sums, **kinds, host=host, apart=apart, overlaps=True, early=early
    )


def _attention(launch: Launch, t: Operands) -> Work:
    """Count programs of BLOCK_M queries with their keys in whole tiles, from the window's edge to the diagonal."""
    c, args = launch.constexprs, launch.args
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
            high = min(end, first + rows + after) if causal or window else end
            spans.append(high - (max(0, first - before + 1) if window else 0))
    spans = [max(0, math.ceil(span / c["BLOCK_N"])) * c["BLOCK_N"] for span in spans]
    heads = math.prod(launch.grid or ()) / len(spans)
    codes = "keys.k_scales" in t
    key = width + 4 if codes else width * size
    tiles = ((heads, rows * width * size + 2 * span * key, 4 * rows * span * width) for span in reversed(spans))
    memory = _nbytes(t) - (1 - share) * _nbytes(t, *(name for name in t if name.startswith(("keys.", "cache."))))
    if "newest.k" in t:  # a row of each table a sequence, and the newest key into the cache
        tables = "newest.tables.cos", "newest.tables.sin"
        memory += 2 * len(t["q"]) * t[tables[0]][0].nbytes - _nbytes(t, *tables)
        memory += stored_bytes(t, "newest.k", "keys.k")
    vector = (SOFTMAX + CODES * (codes and launch.kernel == "attention_prefill_kernel")) / (4 * width)
    shared = rows * width * size + 2 * stages * c["BLOCK_N"] * key
    values = rows * (width + c["BLOCK_N"] * (1 + size / 4))
    return Work(memory, tuple(tiles), vector, shared, values, stored=rows * width, fp32=size == 4)


def _mm(launch: Launch, t: Operands) -> Work:
    """Count torch.mm in LIBRARY's tiles, its depth split as if there were too few tiles for the GPU."""
    (T, depth), N, size = t["in_0"].shape, t["in_1"].shape[1], t["in_0"].element_size()
    rows, columns, step = min(LIBRARY[0], max(16, T)), LIBRARY[1], LIBRARY[2]
    programs = math.ceil(T / rows) * math.ceil(N / columns) * math.ceil(depth / step)
    tile = programs, (rows + columns) * step * size, 2 * rows * columns * step
    return Work(_nbytes(t), (tile,), fp32=size == 4)


STREAMED = "add add_ mul copy_ clone _to_copy fill_ full zeros zero_ arange clamp_"  # operations of torch
TORCH_WORK: dict[str, Callable[[Launch, Operands], Work]] = {
    **{f"aten::{name}": _stream for name in STREAMED.split()},
    "aten::mm": _mm,
}

WARPS, THREADS = 64, 32  # the most warps of an SM, and the threads of each
REGISTERS, OTHER_REGISTERS = 65536, 64  # of an SM (AMD: more), and of a thread beside its part of the tiles

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Efficiency:
    """Estimates of what a busy GPU reaches. `tile`: seconds of the first loads and last stores of a tile of TILE sums,
    which another program on the SM hides; a third of them are those of any tile."""

    memory: float  # of a data sheet's bandwidth
    matmul: float  # of its tensor-core peak
    l2: float  # of `GPU.l2`
    tile: float
    kernel: float  # seconds that no kernel goes below, however little it does
    link: float  # of the link's rate
    ramp: float  # seconds until a kernel's loads keep device memory busy, and from the last of them to its end


TILE = 192 * 256
# link: copies reach 56.3 of 63 GB/s (tinygrad/open-gpu-kernel-modules, issue 29), and NCCL assumes 24 of 31.5
# (NVIDIA/nccl-tests, issue 307). No figure is of kernels that read.
# memory: long copies, as published of an H100. matmul: libraries at the clocks of a busy GPU.
OPTIMISTIC = Efficiency(memory=0.92, matmul=0.75, l2=1.0, tile=3e-6, kernel=2e-6, link=0.85, ramp=1.2e-6)
CAUTIOUS = Efficiency(memory=0.86, matmul=0.63, l2=0.82, tile=4e-6, kernel=3e-6, link=0.76, ramp=1.8e-6)


def floor(cost: Cost, gpu: GPU) -> tuple[float, str]:
    """Return the least seconds on `gpu` at full rates, and what sets them: "memory", "matmul" or "link" (to host)."""
    link = cost.host_bytes / LINKS[gpu.link]
    matmul = (cost.flops - cost.fp8_flops / 2) / gpu.matmul
    limits = {"memory": cost.bytes / gpu.bandwidth, "matmul": matmul, "link": link}
    return max((seconds, name) for name, seconds in limits.items())


def measure_gpu(name: str, arch: str, device: Any, timer: Timer, memory: int = 1 << 30, n: int = 8192) -> GPU:
    """Measure the current GPU by torch: a copy and a read of `memory` bytes, and a bf16 product of n x n."""
    source, copy = (torch.ones(memory // 4, device=device) for _ in range(2))
    bandwidth = max(2 * memory / timer(lambda: copy.copy_(source)), memory / timer(source.amax))
    a, b, out = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(3))
    matmul = 2 * n**3 / timer(lambda: torch.mm(a, b, out=out))
    return GPU("", name, arch=arch, bandwidth=bandwidth, matmul=matmul, source="measured")


def family_note(arch: str) -> str:
    """Return a line where `arch` uses the launch configurations of another architecture; else nothing."""
    line = f"{arch} has no table of launch configurations: the analytic rule takes those of {family(arch)}\n"
    return "" if family(arch) == arch else line


@dataclass(frozen=True)
class Prediction:
    """A range of seconds. `limit` is "memory", "link" (to host memory), "L2", "tensor cores", or "launches" (the gaps,
    and kernels that do little)."""

    seconds: float
    cautious: float
    limit: str  # what takes most of the seconds
    parts: tuple[tuple[float, str], ...]  # seconds and limit of each launch
    floor_s: float

    @property
    def share(self) -> float:
        """The floor by the predicted time: 1.0 is on the floor."""
        return self.floor_s / self.seconds if self.seconds else 1.0

    def as_dict(self) -> dict[str, Any]:
        times = {"time_us": self.seconds * 1e6, "cautious_us": self.cautious * 1e6}
        return {**times, "limit": self.limit, "of_floor": self.share}


def predict(launches: Iterable[Launch], gpu: GPU, cost: Cost) -> Prediction:
    """Predict the time of a call with these launches and the compulsory work `cost`; never below its floor. ValueError
    for a GPU of which no more than its rates are known, and for a kernel without a formula."""
    if not gpu.l2:
        raise ValueError(f"predict: GPU is {gpu.name}, needs one whose L2 bandwidth is known")
    works, (least, _) = [(launch, count_work(launch)) for launch in launches], floor(cost, gpu)
    gaps = sum(gpu.gap(launch.dependent) for launch, _ in works)
    parts, cautious = (_parts(works, gpu, efficiency) for efficiency in (OPTIMISTIC, CAUTIOUS))
    by_limit = defaultdict(float, launches=gaps)
    for seconds, limit in parts:
        by_limit[limit] += seconds
    seconds, most = (max(gaps + sum(seconds for seconds, _ in each), least) for each in (parts, cautious))
    return Prediction(seconds, most, max(by_limit, key=by_limit.__getitem__), parts, least)


def _parts(works: Iterable[tuple[Launch, Work]], gpu: GPU, efficiency: Efficiency) -> tuple[tuple[float, str], ...]:
    """Return seconds and limit of each launch, less what it prefetches while the launches in front leave memory idle:
    each dependent launch lets the next one start before it waits itself, so such launches that do little add up."""
    parts, idle, bandwidth, sms = [], 0.0, gpu.bandwidth * efficiency.memory, gpu.sms or max_multiprocessors(gpu.arch)
    loading = sms / (gpu.l2 * efficiency.l2)  # seconds a byte, and of products seconds a FLOP
    for launch, work in works:
        resident = _resident_programs(work, launch.num_warps or 4, sms, gpu.arch)
        multiplying = sms / (gpu.vector if work.fp32 else gpu.matmul * (1 + work.fp8) * efficiency.matmul)
        vector = work.vector * sms / (gpu.vector * efficiency.matmul / OPTIMISTIC.matmul)
        # One program, or in a product one warpgroup, computes while another multiplies.
        overlaps = resident > 1 or work.overlaps
        multiplying = max(multiplying, vector) if overlaps else multiplying + vector
        ends = efficiency.tile * (1 + 2 * work.stored / TILE) / 3 if resident == 1 and work.flops else 0.0
        runs = [(count, max(loading * loaded, multiplying * flops) + ends) for count, loaded, flops in work.tiles]
        slower = "L2" if loading * work.loaded >= multiplying * work.flops else "tensor cores"
        # A program that is alone on its SM loads nothing while it starts and ends; several hide it from each other.
        waves = math.ceil(work.programs / sms) if resident == 1 else 1
        limits = {"launches": efficiency.kernel, "memory": work.memory / bandwidth + waves * efficiency.ramp}
        limits[slower] = list_schedule(runs, sms)
        limit = max(limits, key=limits.__getitem__)
        most, link = limits[limit], work.host / (LINKS[gpu.link] * efficiency.link)
        seconds, limit = work.apart * most + max(link, (1 - work.apart) * most), "link" if link > most else limit
        idle = idle + gpu.gap(True) if launch.dependent else 0.0
        if early := min(work.programs, sms * resident) * work.early / bandwidth:
            seconds = max(efficiency.kernel, seconds - min(idle, early + efficiency.ramp))
        idle = 0.0 if limit in ("memory", "link") else idle + seconds - work.memory / bandwidth
        parts.append((seconds, limit))
    return tuple(parts)


def list_schedule(runs: Iterable[tuple[float, float]], processors: int) -> float:
    """Return the makespan of a greedy list schedule on `processors`, in seconds. runs: in order, numbers of programs
    and the seconds that each takes; a fraction of a program adds to the next run."""
    free, remaining = [0.0] * processors, 0.0
    runs = [run for run in runs if run[0] > 0]
    for index, (count, seconds) in enumerate(runs):
        remaining += count
        programs = math.ceil(remaining - 1e-6) if index == len(runs) - 1 else int(remaining)
        remaining -= programs
        if free[0] == max(free):  # whole waves of equal programs
            waves = programs // processors
            free, programs = [free[0] + waves * seconds] * processors, programs - waves * processors
        for _ in range(programs):
            heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def programs_per_sm(arch: str, warps: int, registers: float, shared: int) -> int:
    """Return how many programs an SM holds at once. registers: of a thread."""
    most = min(WARPS // warps, int(REGISTERS // (registers * THREADS * warps)))
    if shared:
        reserved = 0 if amd(arch) else 1024  # by CUDA for each block: an SM has that much more than a block's most
        most = min(most, (ARCHS[arch].shared_bytes + reserved) // (shared + reserved))
    return max(1, most)


def _resident_programs(work: Work, warps: int, sms: int, arch: str) -> int:
    """Return how many programs an SM holds, of those that there are; they share its bandwidth and its tensor cores."""
    registers = work.values / (THREADS * warps) + OTHER_REGISTERS
    return max(1, min(programs_per_sm(arch, warps, registers, work.shared), math.ceil(work.programs / sms)))
