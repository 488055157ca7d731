"""The one place that knows GPU architectures: whose launch choices each runs on, and what it has."""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    """family        the architecture whose launch choices this one runs on: the same instructions, and they fit
    shared_bytes  of a block at most: the compiler does not check them
    sms           multiprocessors (AMD: compute units) of its largest GPU, where no GPU is at hand to ask
    """

    family: str
    shared_bytes: int
    sms: int


ARCHS = {
    "sm_80": Arch("sm_80", 166912, 108),
    "sm_86": Arch("sm_80", 101376, 84),
    "sm_89": Arch("sm_80", 101376, 142),
    "sm_90": Arch("sm_90", 232448, 132),
    "sm_100": Arch("sm_100", 232448, 148),
    "sm_103": Arch("sm_100", 232448, 148),
    "sm_120": Arch("sm_80", 101376, 188),
    "gfx90a": Arch("gfx942", 65536, 110),
    "gfx942": Arch("gfx942", 65536, 304),
    "gfx950": Arch("gfx942", 163840, 256),
}


@functools.cache
def _stranger(arch: str) -> str:
    """The family of an architecture that is not listed, which is said once a process."""
    used = "gfx942" if arch.startswith("gfx") else "sm_80"  # what fits all listed GPUs of that maker
    warnings.warn(f"{arch} is not among the known GPUs ({', '.join(ARCHS)}): launch choices are {used}'s", stacklevel=3)
    return used


def family(arch: str) -> str:
    """The architecture whose launch choices `arch` runs on; of one that is not listed, with a warning."""
    known = ARCHS.get(arch)
    return known.family if known else _stranger(arch)


def amd(arch: str) -> bool:
    return family(arch).startswith("gfx")


def tma(arch: str) -> bool:
    """Whether descriptors are of use: on sm_80 they turn into pointers in the compiler, and those mostly spill."""
    return family(arch) in ("sm_90", "sm_100")


def dependent_launch(arch: str) -> bool:
    """Whether a kernel may begin before the one in front of it has ended: see pdl.py."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def multiprocessors(arch: str) -> int:
    """How many there are to fill where no GPU is at hand to ask."""
    return ARCHS[arch if arch in ARCHS else family(arch)].sms
