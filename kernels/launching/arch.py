"""GPU architectures: the family whose launch configurations each uses, and its limits; no import of torch or Triton."""

import functools
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """family        the architecture whose launch configurations this one uses: same instructions, within its limits
    shared_bytes  shared memory of a block at most: the compiler does not check it
    sms           multiprocessors (AMD: compute units) of its largest GPU
    l2_bytes      L2 cache of its smallest GPU, half of which prefetches may fill; 0: no prefetches
    """

    family: str
    shared_bytes: int
    sms: int
    l2_bytes: int = 0


ARCHS = {
    "sm_80": Arch("sm_80", 166912, 108),
    "sm_86": Arch("sm_80", 101376, 84),
    "sm_89": Arch("sm_80", 101376, 142),
    "sm_90": Arch("sm_90", 232448, 132, 50 << 20),
    "sm_100": Arch("sm_100", 232448, 148, 126 << 20),
    "sm_103": Arch("sm_100", 232448, 148, 126 << 20),
    "sm_120": Arch("sm_80", 101376, 188, 24 << 20),
    "gfx90a": Arch("gfx942", 65536, 110),
    "gfx942": Arch("gfx942", 65536, 304),
    "gfx950": Arch("gfx942", 163840, 256),
}


def check_arch(arch: str) -> str:
    """Return `arch`; ValueError for one before sm_80, whose tensor cores multiply no bf16."""
    if arch.startswith("sm_") and int(arch.removeprefix("sm_")) < 80:
        raise ValueError(f"mixtral_triton: the GPU is {arch}, needs one of {', '.join(ARCHS)}")
    return arch


@functools.cache
def family(arch: str) -> str:
    """Return the architecture whose launch configurations `arch` uses; warn once a process where it is not listed."""
    if arch in ARCHS:
        return ARCHS[arch].family
    used = "gfx942" if arch.startswith("gfx") else "sm_80"  # what fits all listed GPUs of that maker
    text = f"{arch} is not among the known GPUs ({', '.join(ARCHS)}): launch configurations are {used}'s"
    warnings.warn(text, stacklevel=2)
    return used


@functools.cache
def has_less_shared_memory(arch: str) -> bool:
    """Return whether a block has less shared memory than on the architecture whose launch configurations `arch` uses;
    one that is not listed has that of the smallest of its family."""
    used = family(arch)
    least = min(known.shared_bytes for known in ARCHS.values() if known.family == used)
    return (ARCHS[arch].shared_bytes if arch in ARCHS else least) < ARCHS[used].shared_bytes


def amd(arch: str) -> bool:
    return family(arch).startswith("gfx")


def tma(arch: str) -> bool:
    """Return whether to use tensor descriptors: on sm_80 the compiler turns them into pointers that mostly spill."""
    return family(arch) in ("sm_90", "sm_100")


def multiplies_fp8(arch: str) -> bool:
    """Return whether tensor cores multiply e4m3 of the OCP format. gfx942's is another one."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 89


def check_multiplies_fp8(arch: str, what: str) -> None:
    """Raise ValueError unless `multiplies_fp8(arch)`. what: the argument and what it is."""
    if not multiplies_fp8(arch):
        raise ValueError(f"{what}, and the GPU is {arch}: needs sm_89, sm_90, sm_100, sm_103 or sm_120")


def sums_fp8_exactly(arch: str) -> bool:
    """Return whether tensor cores keep fp32 sums of e4m3 products. Those before sm_100, and sm_120, whose instruction
    is sm_89's, are taken to keep about 14 bits (DeepSeek-V3 report, section 3.3.2; SageAttention2)."""
    return multiplies_fp8(arch) and family(arch) == "sm_100"


def supports_pdl(arch: str) -> bool:
    """Return whether programmatic dependent launch exists (pdl.py)."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def max_multiprocessors(arch: str) -> int:
    """Return the multiprocessors of the largest GPU of `arch`."""
    return ARCHS[arch if arch in ARCHS else family(arch)].sms
