"""How much memory a GPU has by its driver, which is less than its label says; roofline.py has the rates of some."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 2**20


@dataclass(frozen=True)
class GPU:
    """`mib`: what the driver's tool prints as the total, in MiB; `also`: other names of the same GPU."""

    name: str
    mib: int
    also: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        return self.mib * MIB

    @property
    def names(self) -> set[str]:
        return {_plain(name) for name in (self.name, *self.also)}


# Totals as nvidia-smi prints them since driver 510 (before, it left out what it keeps for itself), with ECC as the GPU
# is shipped; the quoted name is the one beside it there.
GPUS = (
    GPU("A10", 23028),  # "NVIDIA A10"
    GPU("A10G", 23028),  # "NVIDIA A10G"
    GPU("L4", 23034),  # "NVIDIA L4"
    GPU("RTX 4090", 24564, ("4090",)),  # "NVIDIA GeForce RTX 4090"
    GPU("A30", 24576),  # "NVIDIA A30"
    GPU("RTX 3090", 24576, ("3090",)),  # "NVIDIA GeForce RTX 3090"
    GPU("RTX 5090", 32607, ("5090",)),  # "NVIDIA GeForce RTX 5090"
    GPU("A100 40GB", 40960, ("A100-40", "A100-SXM4-40GB", "A100-PCIE-40GB")),  # "NVIDIA A100-SXM4-40GB"
    GPU("A40", 46068),  # "NVIDIA A40"
    GPU("L40S", 46068),  # "NVIDIA L40S"
    GPU("A6000", 49140, ("RTX A6000",)),  # "NVIDIA RTX A6000"
    GPU("RTX 6000 Ada", 49140, ("6000 Ada", "RTX 6000 Ada Generation")),  # "NVIDIA RTX 6000 Ada Generation"
    GPU("H100 80GB", 81559, ("H100", "H100-80", "H100 80GB HBM3", "H100 SXM", "H100 PCIe")),  # "NVIDIA H100 80GB HBM3"
    GPU("A100 80GB", 81920, ("A100", "A100-80", "A100-SXM4-80GB", "A100 80GB PCIe")),  # "NVIDIA A100-SXM4-80GB"
    GPU("H100 NVL", 95830),  # "NVIDIA H100 NVL"
    GPU("GH200", 97871, ("GH200 480GB",)),  # "NVIDIA GH200 480GB"
    GPU("RTX PRO 6000", 97887, ("PRO 6000", "RTX PRO 6000 Blackwell")),  # "NVIDIA RTX PRO 6000 Blackwell ..."
    GPU("H200", 143771, ("H200 NVL",)),  # "NVIDIA H200"
    GPU("B200", 183359),  # "NVIDIA B200"
    GPU("MI300X", 196592),  # rocm-smi: "VRAM Total Memory (B): 206141652992"
    GPU("B300", 275040),  # "NVIDIA B300 SXM6 AC"
)
# Known, and of no use here: Triton compiles for sm_80 and later.
TOO_OLD = {"V100": "sm_70", "V100 16GB": "sm_70", "V100 32GB": "sm_70", "T4": "sm_75", "RTX 2080 Ti": "sm_75"}


def named(name: str) -> GPU:
    """The GPU of this name, whatever its case and spaces; ValueError listing all for another one."""
    wanted = _plain(name)
    for gpu in GPUS:
        if wanted in gpu.names:
            return gpu
    for old, arch in TOO_OLD.items():
        if wanted == _plain(old):
            raise ValueError(f"--gpu is {name!r}, which is {arch}: these kernels need sm_80 or later")
    raise ValueError(f"--gpu is {name!r}, needs one of {', '.join(gpu.name for gpu in GPUS)}")


def _plain(name: str) -> str:
    """`name` without what people write in different ways: case, spaces, hyphens, the makers' words."""
    letters = "".join(character for character in name.lower() if character.isalnum())
    for word in ("nvidia", "geforce", "amd", "instinct"):
        letters = letters.removeprefix(word)
    return letters
