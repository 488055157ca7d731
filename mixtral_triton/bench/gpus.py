"""The table of GPUs: memory, rates by data sheet and links; and the floor of a launch on one. It needs no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..kernels.operation.cases import Cost

MIB = 2**20
# Bytes/s from host memory to a GPU, by the specifications of PCI Express 4 and 5 (16 lanes of 16 and 32 GT/s, 128 of
# 130 bits) and by GH200's data sheet.
LINKS = {"pcie4x16": 256e9 / 8 * 128 / 130, "pcie5x16": 512e9 / 8 * 128 / 130, "nvlink-c2c": 450e9}
_PCIE4, _PCIE5, _C2C = LINKS
# Names beside that of the data sheet: the driver's, and others for the same memory and rates.
_A100_40 = "A100-SXM4-40GB", "A100-PCIE-40GB"
_H100 = "H100-80", "H100 80GB HBM3", "H100 SXM"
_PRO = "RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000 Blackwell Server Edition"


@dataclass(frozen=True)
class GPU:
    """A GPU by the driver's name and those that people write."""

    key: str
    name: str
    mib: int = 0  # MiB of memory that the driver's tool prints as the total, which is less than the label says
    arch: str = ""
    bandwidth: float = 0.0  # bytes/s of device memory; 0: unknown
    matmul: float = 0.0  # FLOP/s of dense bf16 matrix products
    aliases: tuple[str, ...] = ()
    link: str = _PCIE4  # to host memory, by its data sheet: one of LINKS
    source: str = "data sheet"  # of bandwidth and matmul; or "measured"
    free: int = 0  # bytes that are free on the GPU at hand; 0: unknown

    @property
    def names(self) -> set[str]:
        return {_normalize(name) for name in (self.key, self.name, *self.aliases)}

    @property
    def bytes(self) -> int:
        return self.mib * MIB


# Memory: the totals of nvidia-smi since driver 510 (earlier ones leave out what the driver keeps), with ECC as shipped;
# MI300X by rocm-smi, "VRAM Total Memory (B): 206141652992".
# Bandwidth and dense bf16 products with fp32 sums: NVIDIA's data sheets of A10, A10G, A30, A40,
# A100, L4, L40S, RTX A6000, RTX 6000 Ada, H100 (SXM, NVL), GH200 (96 GB), H200, HGX B200 and B300 (an eighth), half
# of what is printed with sparsity; its white papers of GA102, Ada, RTX Blackwell and RTX PRO Blackwell; AMD's sheet
# of MI300X.
_TABLE = (
    GPU("rtx4080", "RTX 4080", 16376, "sm_89", 0.717e12, 97.5e12, (), _PCIE4),
    GPU("a10", "A10", 23028, "sm_86", 0.6e12, 125e12, (), _PCIE4),
    GPU("a10g", "A10G", 23028, "sm_86", 0.6e12, 70e12, (), _PCIE4),
    GPU("l4", "L4", 23034, "sm_89", 0.3e12, 121e12, (), _PCIE4),
    GPU("rtx4090", "RTX 4090", 24564, "sm_89", 1.008e12, 165e12, (), _PCIE4),
    GPU("a30", "A30", 24576, "sm_80", 0.933e12, 165e12, (), _PCIE4),
    GPU("rtx3090", "RTX 3090", 24576, "sm_86", 0.936e12, 71e12, (), _PCIE4),
    GPU("rtx5090", "RTX 5090", 32607, "sm_120", 1.792e12, 209.5e12, (), _PCIE5),
    GPU("a100-40", "A100 40GB", 40960, "sm_80", 1.555e12, 312e12, _A100_40, _PCIE4),
    GPU("a40", "A40", 46068, "sm_86", 0.696e12, 149.7e12, (), _PCIE4),
    GPU("l40s", "L40S", 46068, "sm_89", 0.864e12, 362.05e12, (), _PCIE4),
    GPU("a6000", "A6000", 49140, "sm_86", 0.768e12, 154.8e12, (), _PCIE4),
    GPU("rtx6000ada", "RTX 6000 Ada", 49140, "sm_89", 0.96e12, 364.2e12, ("RTX 6000 Ada Generation",), _PCIE4),
    GPU("h100", "H100 80GB", 81559, "sm_90", 3.35e12, 989e12, _H100, _PCIE5),
    GPU("a100", "A100 80GB", 81920, "sm_80", 2.039e12, 312e12, ("A100-SXM4-80GB",), _PCIE4),
    GPU("h100nvl", "H100 NVL", 95830, "sm_90", 3.9e12, 835.5e12, (), _PCIE5),
    GPU("gh200", "GH200", 97871, "sm_90", 4.0e12, 990e12, ("GH200 480GB",), _C2C),
    GPU("rtxpro6000", "RTX PRO 6000", 97887, "sm_120", 1.792e12, 503.8e12, _PRO, _PCIE5),
    GPU("h200", "H200", 143771, "sm_90", 4.8e12, 989e12, (), _PCIE5),
    GPU("b200", "B200", 183359, "sm_100", 8.0e12, 2250e12, (), _PCIE5),
    GPU("mi300x", "MI300X", 196592, "gfx942", 5.3e12, 1307e12, (), _PCIE5),
    GPU("b300", "B300", 275040, "sm_103", 8.0e12, 2250e12, ("B300 SXM6 AC",), _PCIE5),
)
GPUS = {gpu.key: gpu for gpu in _TABLE}


def floor(costs: Iterable[Cost], gpu: GPU) -> tuple[float, str]:
    """Return the least seconds on `gpu` of launches one after the other, each at full rates, and what sets most of
    them: "memory", "matmul" or "link" (to host)."""
    by_limit = {"memory": 0.0, "matmul": 0.0, "link": 0.0}
    for cost in costs:
        limits = {
            "memory": cost.bytes / gpu.bandwidth,
            "matmul": (cost.flops - cost.fp8_flops / 2) / gpu.matmul,
            "link": cost.host_bytes / LINKS[gpu.link],
        }
        limit = max(limits, key=limits.__getitem__)
        by_limit[limit] += limits[limit]
    return sum(by_limit.values()), max(by_limit, key=by_limit.__getitem__)


def find_gpu(name: str) -> GPU | None:
    """Return the GPU of this name, in any case and spacing; None where no entry has its memory and rates."""
    return next((gpu for gpu in GPUS.values() if _normalize(name) in gpu.names), None)


def parse_gpu(name: str) -> GPU:
    """Return the GPU of `--gpu`; ValueError that lists all of them for another name."""
    if (gpu := find_gpu(name)) is None:
        raise ValueError(f"--gpu is {name!r}, needs one of {', '.join(gpu.name for gpu in _TABLE)}, of sm_80 or later")
    return gpu


def _normalize(name: str) -> str:
    """Return `name` in lower case without spaces, hyphens and the makers' words."""
    return re.sub(r"^(nvidia)?(geforce)?(amd)?(instinct)?(rtx)?", "", re.sub(r"[\W_]", "", name.lower()))
