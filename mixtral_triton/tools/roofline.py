"""What a GPU can do, and the floor of an operation on it: no kernel can be faster than its compulsory work."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.arch import family
from ..kernels.op import Cost


@dataclass(frozen=True)
class Chip:
    """What a prediction needs of a GPU besides its rates (predict.py).

    l2      bytes/s from L2 to all SMs together, as programs reach it
    shared  bytes of shared memory of an SM (AMD: of a compute unit)
    vector  FLOP/s of fp32 without tensor cores
    gap     seconds between two launches of a graph
    begun   the same, where the second begins before the first has ended and waits within; None: it cannot
    """

    l2: float
    shared: int
    vector: float
    gap: float
    begun: float | None = None


# l2: estimates. A100 and H100 have 5,120 bytes a clock (NVIDIA's white papers), at 1.41 and 1.755 GHz 7.2 and 9.0 TB/s,
# of which tiled products reach about 78 %; B200 as much an SM as H100 at 1.85 GHz; MI300X is bound by its Infinity
# Cache (CDNA 3 white paper), since 4 MB of L2 a die hold little of a weight.
# shared: CUDA's programming guide, table of compute capabilities; CDNA 3 white paper.
# vector: data sheets (B200: an eighth of HGX B200's). gap: estimates. begun: an estimate, half a gap; published is what
# it came to in all: 332 to 376 tokens/s of a 20 B mixture of experts (ggml-org/llama.cpp, pull request 22522), 0.35 ms
# of some hundreds of launches.
_SM_80 = Chip(5.6e12, 167936, 19.5e12, 1.2e-6)
_SM_90 = Chip(7.0e12, 233472, 67e12, 1.2e-6, 0.6e-6)
_SM_100 = Chip(8.3e12, 233472, 75e12, 1.2e-6, 0.6e-6)
_GFX942 = Chip(17.2e12, 65536, 163.4e12, 3e-6)


@dataclass(frozen=True)
class GPU:
    """`bandwidth` in bytes/s of device memory, `matmul` in FLOP/s of dense bf16 matrix products.

    device  matches the name that the driver gives to exactly this GPU; other models of the family have other memory
    source  where the two rates are from: "data sheet", or "measured"
    chip    what a prediction needs, too; None: not known
    """

    name: str
    arch: str
    bandwidth: float
    matmul: float
    device: str = ""
    source: str = "data sheet"
    chip: Chip | None = None


GPUS = {
    "a100": GPU("A100 SXM 80 GB", "sm_80", 2.039e12, 312e12, r"A100-SXM4?-80GB", chip=_SM_80),
    "h100": GPU("H100 SXM", "sm_90", 3.35e12, 989e12, r"H100 80GB HBM3", chip=_SM_90),
    "h200": GPU("H200 SXM", "sm_90", 4.8e12, 989e12, r"H200$", chip=_SM_90),
    "b200": GPU("B200", "sm_100", 8.0e12, 2250e12, r"\bB200$", chip=_SM_100),
    "b300": GPU("B300", "sm_103", 8.0e12, 2250e12, r"\bB300 SXM"),
    "a10": GPU("A10", "sm_86", 0.6e12, 125e12, r"\bA10$"),
    "l40s": GPU("L40S", "sm_89", 0.864e12, 362.05e12, r"\bL40S$"),
    "rtx5090": GPU("RTX 5090", "sm_120", 1.792e12, 209.5e12, r"RTX 5090$"),
    "mi300x": GPU("MI300X", "gfx942", 5.3e12, 1307e12, r"MI300X", chip=_GFX942),
}


def data_sheet(device_name: str) -> GPU | None:
    """The tabled GPU that calls itself `device_name`, if there is one."""
    return next((gpu for gpu in GPUS.values() if re.search(gpu.device, device_name)), None)


def floor(cost: Cost, gpu: GPU) -> float:
    """Seconds below which no kernel can be on `GPU`: its bytes at full bandwidth, or its FLOPs at the matmul rate."""
    return max(cost.bytes / gpu.bandwidth, cost.flops / gpu.matmul)


def bound(cost: Cost, gpu: GPU) -> str:
    """What sets the floor: "memory" or "matmul"."""
    return "matmul" if cost.flops / gpu.matmul > cost.bytes / gpu.bandwidth else "memory"


Timer = Callable[[Callable[[], Any]], float]


def measure_gpu(name: str, arch: str, device: Any, timer: Timer, memory: int = 1 << 30, n: int = 8192) -> GPU:
    """The rates of the current GPU, by torch's own kernels: the better of a copy and a read of `memory` bytes, and a
    bf16 matrix product of n x n."""
    bandwidth = _bandwidth(device, timer, memory)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    return GPU(name, arch, bandwidth, 2 * n**3 / timer(lambda: torch.mm(a, b, out=out)), source="measured")


def _bandwidth(device: Any, timer: Timer, memory: int) -> float:
    source = torch.ones(memory // 4, device=device)
    copy = torch.empty_like(source)
    return max(2 * memory / timer(lambda: copy.copy_(source)), memory / timer(source.amax))


def table_note(arch: str) -> str | None:
    """A sentence where `arch` has no table of launch choices of its own; None where it has."""
    used = family(arch)
    if used == arch:
        return None
    return f"{arch} has no table of launch choices of its own: the analytic rule takes those of {used}"
