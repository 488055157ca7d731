"""Floors and predicted times of calls on a GPU that is not at hand.

A floor is a call's compulsory work (`Op.cost`) at full rates. A predicted time comes from the recorded launches, not
from a measurement. A launch takes as long as the slowest of three: its bytes across device memory, the bytes of its
tiles from L2 to the SMs, and its products. The last two are counted in whole waves of programs. A gap follows each
launch, a shorter one before a programmatic dependent launch. Latency is not counted, so short kernels take longer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.arch import ARCHS, amd, family, multiprocessors
from ..kernels.op import Cost, Launch
from .gpus import GPU, Chip
from .work import Work, count_work

MEMORY_REACHED = 0.92  # of a data sheet's bandwidth, by long copies: an estimate from published ones on an H100
MATMUL_REACHED = 0.75  # of a data sheet's tensor-core peak, by libraries at the clocks of a busy GPU: an estimate
WARPS, THREADS = 64, 32  # the most warps of an SM, and the threads of each
REGISTERS, OTHER_REGISTERS = 65536, 64  # of an SM (AMD: more), and of a thread beside its part of the tiles

Timer = Callable[[Callable[[], Any]], float]


def floor(cost: Cost, gpu: GPU) -> float:
    """Return the least seconds on `gpu`: the bytes at full bandwidth, or the FLOP at the matmul rate."""
    return max(cost.bytes / gpu.bandwidth, cost.flops / gpu.matmul)


def bound(cost: Cost, gpu: GPU) -> str:
    """Return what sets the floor: "memory" or "matmul"."""
    return "matmul" if cost.flops / gpu.matmul > cost.bytes / gpu.bandwidth else "memory"


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


def family_note(arch: str) -> str | None:
    """Return a sentence where `arch` uses the launch configurations of another architecture; else None."""
    used = family(arch)
    text = f"{arch} has no table of launch configurations: the analytic rule takes those of {used}"
    return None if used == arch else text


@dataclass(frozen=True)
class Part:
    """One launch: its seconds without the gap, and what takes them: "memory", "L2" or "tensor cores"."""

    kernel: str
    seconds: float
    limit: str


@dataclass(frozen=True)
class Prediction:
    """`limit`: what takes most of the seconds: "memory", "L2", "tensor cores", or "launches" (the gaps)."""

    seconds: float
    limit: str
    parts: tuple[Part, ...]
    floor_s: float

    @property
    def share(self) -> float:
        """The floor by the predicted time: 1.0 is on the floor."""
        return self.floor_s / self.seconds if self.seconds else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"time_us": self.seconds * 1e6, "limit": self.limit, "of_floor": self.share}


def predict(launches: Iterable[Launch], gpu: GPU, cost: Cost) -> Prediction:
    """Predict the time of a call with these launches and the compulsory work `cost`; never below its floor.

    ValueError for a GPU of which no more than its rates are known, and for a kernel without a formula.
    """
    chip = gpu.chip
    if chip is None:
        raise ValueError(f"predict: GPU is {gpu.name}, needs one whose L2 bandwidth is known")
    launches = tuple(launches)
    parts = tuple(_part(launch, gpu, chip) for launch in launches)
    gaps = (chip.pdl_gap if launch.dependent else chip.launch_gap for launch in launches)
    by_limit = {"launches": sum(gaps)}
    for part in parts:
        by_limit[part.limit] = by_limit.get(part.limit, 0.0) + part.seconds
    least = floor(cost, gpu)
    return Prediction(max(sum(by_limit.values()), least), max(by_limit, key=by_limit.__getitem__), parts, least)


def _part(launch: Launch, gpu: GPU, chip: Chip) -> Part:
    work, sms = count_work(launch), multiprocessors(gpu.arch)
    resident = _resident_programs(work, launch.num_warps or 4, sms, gpu.arch)
    rounds = max(math.ceil(work.programs / (sms * resident)) * resident, work.longest)
    products = work.flops / (chip.vector if work.single else gpu.matmul * MATMUL_REACHED)
    vector = work.vector / chip.vector
    seconds = {
        "memory": work.memory / (gpu.bandwidth * MEMORY_REACHED),
        "L2": rounds * work.loaded * sms / chip.l2,
        # One program computes while another multiplies.
        "tensor cores": rounds * (max(products, vector) if resident > 1 else products + vector) * sms,
    }
    limit = max(seconds, key=seconds.__getitem__)
    return Part(launch.kernel, seconds[limit], limit)


def sm_shared_bytes(arch: str) -> int:
    """Return the shared memory of an SM: a block's most and, on NVIDIA, the 1 KiB that CUDA reserves for each block."""
    return ARCHS[arch].shared_bytes + (0 if amd(arch) else 1024)


def _resident_programs(work: Work, warps: int, sms: int, arch: str) -> int:
    """Return how many programs an SM holds at once; the busiest SM runs whole waves of them.

    An SM shares its bandwidth and its tensor cores among its programs: more of them are no quicker together.
    """
    most = min(WARPS // warps, int(REGISTERS // (work.values + OTHER_REGISTERS * THREADS * warps)))
    most = min(most, sm_shared_bytes(arch) // work.shared) if work.shared else most
    return max(1, min(most, math.ceil(work.programs / sms)))
