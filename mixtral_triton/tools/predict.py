"""Floors and predicted times of calls on a GPU that is not at hand.

A floor is a call's compulsory work (`Op.cost`) at full rates. A predicted time comes from the recorded launches, not
from a measurement, and is a range: OPTIMISTIC to CAUTIOUS. A launch takes as long as its bytes across device memory or
its programs, whichever is slower. Each program starts on the SM that is free first, and takes as long as the bytes of
its tiles from L2 or its products, whichever is slower. A gap follows each launch, a shorter one before a programmatic
dependent launch. Such a launch may prefetch weights while the kernels in front of it leave device memory idle.
"""

from __future__ import annotations

import heapq
import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.arch import ARCHS, amd, family, multiprocessors
from ..kernels.launch import Launch
from ..kernels.op import Cost
from .gpus import GPU, LINKS, Chip
from .work import Work, count_work

WARPS, THREADS = 64, 32  # the most warps of an SM, and the threads of each
REGISTERS, OTHER_REGISTERS = 65536, 64  # of an SM (AMD: more), and of a thread beside its part of the tiles

Timer = Callable[[Callable[[], Any]], float]


@dataclass(frozen=True)
class Efficiency:
    """Estimates of what a busy GPU reaches.

    memory, matmul, l2  of a data sheet's bandwidth and tensor-core peak, and of `Chip.l2`
    link                of the rate of the link to host memory
    tile                seconds of the first loads and last stores of a tile of TILE sums, which another program on the
                        SM hides; a third of them are those of any tile
    kernel              seconds that no kernel goes below, however little it does
    ramp                seconds until a kernel's loads keep device memory busy, and from the last of them to its end
    """

    memory: float
    matmul: float
    l2: float
    tile: float
    kernel: float
    link: float
    ramp: float


TILE = 192 * 256
# link: copies reach 56.3 of 63 GB/s (tinygrad/open-gpu-kernel-modules, issue 29), and NCCL assumes 24 of 31.5
# (NVIDIA/nccl-tests, issue 307). No figure is of kernels that read.
# memory: long copies, as published of an H100. matmul: libraries at the clocks of a busy GPU.
OPTIMISTIC = Efficiency(memory=0.92, matmul=0.75, l2=1.0, tile=3e-6, kernel=2e-6, link=0.85, ramp=1.2e-6)
CAUTIOUS = Efficiency(memory=0.86, matmul=0.63, l2=0.82, tile=4e-6, kernel=3e-6, link=0.76, ramp=1.8e-6)


def floor(cost: Cost, gpu: GPU) -> tuple[float, str]:
    """Return the least seconds on `gpu` at full rates, and what sets them: "memory", "matmul" or "link" (to host)."""
    link = cost.host_bytes / LINKS[gpu.link]
    limits = {"memory": cost.bytes / gpu.bandwidth, "matmul": cost.flops / gpu.matmul, "link": link}
    return max((seconds, name) for name, seconds in limits.items())


def measure_gpu(name: str, arch: str, device: Any, timer: Timer, memory: int = 1 << 30, n: int = 8192) -> GPU:
    """Measure the rates of the current GPU by torch's kernels: the better of a copy and a read of `memory` bytes, and a
    bf16 matrix product of n x n."""
    source = torch.ones(memory // 4, device=device)
    copy = torch.empty_like(source)
    bandwidth = max(2 * memory / timer(lambda: copy.copy_(source)), memory / timer(source.amax))
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    matmul = 2 * n**3 / timer(lambda: torch.mm(a, b, out=out))
    return GPU("", name, arch=arch, bandwidth=bandwidth, matmul=matmul, source="measured")


def family_note(arch: str) -> str:
    """Return a line where `arch` uses the launch configurations of another architecture; else nothing."""
    used = family(arch)
    line = f"{arch} has no table of launch configurations: the analytic rule takes those of {used}\n"
    return "" if used == arch else line


@dataclass(frozen=True)
class Prediction:
    """seconds, cautious: the range. `limit`: what takes most of the seconds: "memory", "link" (to host memory), "L2",
    "tensor cores", or "launches" (the gaps, and kernels that do little). parts: seconds and limit of each launch."""

    seconds: float
    cautious: float
    limit: str
    parts: tuple[tuple[float, str], ...]
    floor_s: float

    @property
    def share(self) -> float:
        """The floor by the predicted time: 1.0 is on the floor."""
        return self.floor_s / self.seconds if self.seconds else 1.0

    def as_dict(self) -> dict[str, Any]:
        times = {"time_us": self.seconds * 1e6, "cautious_us": self.cautious * 1e6}
        return {**times, "limit": self.limit, "of_floor": self.share}


def predict(launches: Iterable[Launch], gpu: GPU, cost: Cost) -> Prediction:
    """Predict the time of a call with these launches and the compulsory work `cost`; never below its floor.

    ValueError for a GPU of which no more than its rates are known, and for a kernel without a formula.
    """
    chip = gpu.chip
    if chip is None:
        raise ValueError(f"predict: GPU is {gpu.name}, needs one whose L2 bandwidth is known")
    launches, (least, _) = tuple(launches), floor(cost, gpu)
    gaps = sum(chip.pdl_gap if launch.dependent else chip.launch_gap for launch in launches)
    works = tuple(map(count_work, launches))
    parts, cautious = (_parts(launches, works, gpu, chip, efficiency) for efficiency in (OPTIMISTIC, CAUTIOUS))
    by_limit = defaultdict(float, launches=gaps)
    for seconds, limit in parts:
        by_limit[limit] += seconds
    seconds, most = (max(gaps + sum(seconds for seconds, _ in each), least) for each in (parts, cautious))
    return Prediction(seconds, most, max(by_limit, key=by_limit.__getitem__), parts, least)


def _parts(
    launches: Iterable[Launch], works: Iterable[Work], gpu: GPU, chip: Chip, efficiency: Efficiency
) -> tuple[tuple[float, str], ...]:
    """Return seconds and limit of each launch, less what it prefetches while the launches in front leave memory idle.

    Each dependent launch lets the next one start before it waits itself, so such launches that do little add up.
    """
    parts, idle, bandwidth = [], 0.0, gpu.bandwidth * efficiency.memory
    sms = chip.sms or multiprocessors(gpu.arch)
    for launch, work in zip(launches, works, strict=True):
        resident = _resident_programs(work, launch.num_warps or 4, sms, gpu.arch)
        seconds, limit = _part(work, resident, sms, gpu, chip, efficiency)
        idle = idle + chip.pdl_gap if launch.dependent else 0.0
        early = min(work.programs, sms * resident) * work.early / bandwidth
        if early:
            seconds = max(efficiency.kernel, seconds - min(idle, early + efficiency.ramp))
        idle = 0.0 if limit in ("memory", "link") else idle + seconds - work.memory / bandwidth
        parts.append((seconds, limit))
    return tuple(parts)


def _part(work: Work, resident: int, sms: int, gpu: GPU, chip: Chip, efficiency: Efficiency) -> tuple[float, str]:
    loading = sms / (chip.l2 * efficiency.l2)  # seconds a byte, and of products seconds a FLOP
    multiplying = sms / (chip.vector if work.fp32 else gpu.matmul * efficiency.matmul)
    vector = work.vector * sms / (chip.vector * efficiency.matmul / OPTIMISTIC.matmul)
    # One program computes while another multiplies.
    multiplying = max(multiplying, vector) if resident > 1 else multiplying + vector
    ends = efficiency.tile * (1 + 2 * work.stored / TILE) / 3 if resident == 1 and work.flops else 0.0
    runs = [(count, max(loading * loaded, multiplying * flops) + ends) for count, loaded, flops in work.tiles]
    seconds = {
        "launches": efficiency.kernel,
        "memory": work.memory / (gpu.bandwidth * efficiency.memory) + efficiency.ramp,
        "L2" if loading * work.loaded >= multiplying * work.flops else "tensor cores": list_schedule(runs, sms),
    }
    limit = max(seconds, key=seconds.__getitem__)
    most, link = seconds[limit], work.host / (LINKS[gpu.link] * efficiency.link)
    expected = work.apart * most + max(link, (1 - work.apart) * most)
    return expected, "link" if link > most else limit


def list_schedule(runs: Iterable[tuple[float, float]], places: int) -> float:
    """Return the makespan of a greedy list schedule of programs on `places` processors, in seconds.

    runs: in order, numbers of programs and the seconds that each takes; a fraction of a program adds to the next run.
    """
    free, remaining = [0.0] * places, 0.0
    runs = [run for run in runs if run[0] > 0]
    for index, (count, seconds) in enumerate(runs):
        remaining += count
        programs = math.ceil(remaining - 1e-6) if index == len(runs) - 1 else int(remaining)
        remaining -= programs
        if free[0] == max(free):  # whole waves of equal programs
            waves = programs // places
            free, programs = [free[0] + waves * seconds] * places, programs - waves * places
        for _ in range(programs):
            heapq.heapreplace(free, free[0] + seconds)
    return max(free)


def _resident_programs(work: Work, warps: int, sms: int, arch: str) -> int:
    """Return how many programs an SM holds at once; the busiest SM runs whole waves of them.

    An SM shares its bandwidth and its tensor cores among its programs: more of them are no quicker together.
    """
    most = min(WARPS // warps, int(REGISTERS // (work.values + OTHER_REGISTERS * THREADS * warps)))
    if work.shared:
        reserved = 0 if amd(arch) else 1024  # by CUDA for each block: an SM has that much more than a block's most
        most = min(most, (ARCHS[arch].shared_bytes + reserved) // (work.shared + reserved))
    return max(1, min(most, math.ceil(work.programs / sms)))
