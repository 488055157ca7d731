"""The table of GPUs: memory, rates by data sheet, links, and the estimates of the cost model. It needs no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class Chip:
    """What a predicted time needs beside a GPU's rates (predict.py).

    l2          bytes/s from L2 to all SMs together, as programs reach it
    vector      FLOP/s of fp32 without tensor cores
    launch_gap  seconds between two launches of a graph; pdl_gap: the second is a programmatic dependent one
    sms         multiprocessors; 0: those of the largest GPU of its architecture
    """

    l2: float
    vector: float
    launch_gap: float
    pdl_gap: float
    sms: int = 0


# l2: estimates. A100 and H100 have 5,120 bytes a clock (NVIDIA's white papers), at 1.41 and 1.755 GHz 7.2 and 9.0 TB/s,
# of which tiled products reach about 78 %; B200 as much an SM as H100 at 1.85 GHz; MI300X is bound by its Infinity
# Cache (CDNA 3 white paper), since 4 MB of L2 a die hold little of a weight; RTX: 16 bytes a clock for each SM.
# vector: data sheets (B200: an eighth of HGX B200's). launch_gap: estimates. pdl_gap: an estimate, half a gap;
# published is what it saved in all: 332 to 376 tokens/s of a 20 B mixture of experts (ggml-org/llama.cpp, pull request
# 22522), 0.35 ms of some hundreds of launches.
_SM_80 = Chip(5.6e12, 19.5e12, 1.2e-6, 1.2e-6)
_SM_90 = Chip(7.0e12, 67e12, 1.2e-6, 0.6e-6)
_SM_100 = Chip(8.3e12, 75e12, 1.2e-6, 0.6e-6)
_GFX942 = Chip(17.2e12, 163.4e12, 3e-6, 3e-6)
_RTX3090 = Chip(2.2e12, 35.6e12, 1.2e-6, 1.2e-6, sms=82)
_RTX4080 = Chip(3.0e12, 48.7e12, 1.2e-6, 1.2e-6, sms=76)
_RTX4090 = Chip(5.2e12, 82.6e12, 1.2e-6, 1.2e-6, sms=128)
_RTX5090 = Chip(6.5e12, 104.8e12, 1.2e-6, 0.6e-6, sms=170)
# Bytes/s from host memory to a GPU, by the specifications of PCI Express 3, 4 and 5 (8, 16 and 32 GT/s a lane, 128 of
# 130 bits) and by GH200's data sheet.
LINKS = {f"pcie{n}x{lanes}": lanes * 2**n * 1e9 / 8 * 128 / 130 for n in (3, 4, 5) for lanes in (4, 8, 16)}
LINKS["nvlink-c2c"] = 450e9
_H100_NAMES = ("H100-80", "H100 80GB HBM3", "H100 SXM", "H100 PCIe")
_PCIE5 = "pcie5x16"
_A100_NAMES = ("A100-80", "A100-SXM4-80GB", "A100 80GB PCIe")


@dataclass(frozen=True)
class GPU:
    """One GPU.

    key        what `--gpu` calls it
    mib        MiB of memory that the driver's tool prints as the total, which is less than the label says
    bandwidth  bytes/s of device memory; 0: not in this table
    matmul     FLOP/s of dense bf16 matrix products
    driver     matches the driver's name of the GPU that has exactly these rates
    aliases    other names that people write; the rates are those of the SXM model
    chip       what a prediction needs; None: unknown
    link       to host memory, by its data sheet: one of LINKS
    source     where the two rates are from: "data sheet", or "measured"
    """

    key: str
    name: str
    mib: int = 0
    arch: str = ""
    bandwidth: float = 0.0
    matmul: float = 0.0
    driver: str = ""
    aliases: tuple[str, ...] = ()
    chip: Chip | None = None
    link: str = "pcie4x16"
    source: str = "data sheet"

    @property
    def bytes(self) -> int:
        return self.mib * MIB

    @property
    def names(self) -> set[str]:
        return {_normalize(name) for name in (self.key, self.name, *self.aliases)}


# Memory: the totals of nvidia-smi since driver 510 (earlier ones leave out what the driver keeps), with ECC as shipped;
# MI300X by rocm-smi, "VRAM Total Memory (B): 206141652992". RTX 30 and 40: bf16 with fp32 sums (NVIDIA's white papers).
_TABLE = (
    GPU("rtx4080", "RTX 4080", 16376, "sm_89", 0.717e12, 97.5e12, r"RTX 4080$", ("4080",), _RTX4080),
    GPU("a10", "A10", 23028, "sm_86", 0.6e12, 125e12, r"\bA10$"),
    GPU("a10g", "A10G", 23028, "sm_86"),
    GPU("l4", "L4", 23034, "sm_89"),
    GPU("rtx4090", "RTX 4090", 24564, "sm_89", 1.008e12, 165e12, r"RTX 4090$", ("4090",), _RTX4090),
    GPU("a30", "A30", 24576, "sm_80"),
    GPU("rtx3090", "RTX 3090", 24576, "sm_86", 0.936e12, 71e12, r"RTX 3090$", ("3090",), _RTX3090),
    GPU("rtx5090", "RTX 5090", 32607, "sm_120", 1.792e12, 209.5e12, r"RTX 5090$", ("5090",), _RTX5090, _PCIE5),
    GPU("a100-40", "A100 40GB", 40960, "sm_80", aliases=("A100-SXM4-40GB", "A100-PCIE-40GB")),
    GPU("a40", "A40", 46068, "sm_86"),
    GPU("l40s", "L40S", 46068, "sm_89", 0.864e12, 362.05e12, r"\bL40S$"),
    GPU("a6000", "A6000", 49140, "sm_86", aliases=("RTX A6000",)),
    GPU("rtx6000ada", "RTX 6000 Ada", 49140, "sm_89", aliases=("6000 Ada", "RTX 6000 Ada Generation")),
    GPU("h100", "H100 80GB", 81559, "sm_90", 3.35e12, 989e12, r"H100 80GB HBM3", _H100_NAMES, _SM_90, _PCIE5),
    GPU("a100", "A100 80GB", 81920, "sm_80", 2.039e12, 312e12, r"A100-SXM4?-80GB", _A100_NAMES, _SM_80),
    GPU("h100nvl", "H100 NVL", 95830, "sm_90", link=_PCIE5),
    GPU("gh200", "GH200", 97871, "sm_90", aliases=("GH200 480GB",), link="nvlink-c2c"),
    GPU("rtxpro6000", "RTX PRO 6000", 97887, "sm_120", aliases=("PRO 6000", "RTX PRO 6000 Blackwell"), link=_PCIE5),
    GPU("h200", "H200", 143771, "sm_90", 4.8e12, 989e12, r"H200$", ("H200 NVL",), _SM_90, _PCIE5),
    GPU("b200", "B200", 183359, "sm_100", 8.0e12, 2250e12, r"\bB200$", (), _SM_100, _PCIE5),
    GPU("mi300x", "MI300X", 196592, "gfx942", 5.3e12, 1307e12, r"MI300X", (), _GFX942, _PCIE5),
    GPU("b300", "B300", 275040, "sm_103", 8.0e12, 2250e12, r"\bB300 SXM", ("B300 SXM6 AC",), None, _PCIE5),
)
GPUS = {gpu.key: gpu for gpu in _TABLE}
RATED = {key: gpu for key, gpu in GPUS.items() if gpu.bandwidth}  # those of which a floor is known


def find_gpu(name: str) -> GPU:
    """Return the GPU of this name, in any case and spacing; ValueError that lists all of them for another name."""
    for gpu in GPUS.values():
        if _normalize(name) in gpu.names:
            return gpu
    names = ", ".join(gpu.name for gpu in GPUS.values())
    raise ValueError(f"--gpu is {name!r}, needs one of sm_80 or later: {names}")


def data_sheet(device_name: str) -> GPU | None:
    """Return the GPU of RATED that the driver calls `device_name`; None where memory or clocks differ."""
    return next((gpu for gpu in RATED.values() if re.search(gpu.driver, device_name)), None)


def _normalize(name: str) -> str:
    """Return `name` in lower case without spaces, hyphens and the makers' words."""
    return re.sub(r"^(nvidia)?(geforce)?(amd)?(instinct)?", "", re.sub(r"[\W_]", "", name.lower()))
