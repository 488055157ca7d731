"""GPU architectures: the family whose launch configurations each uses, its limits, and what TMA reads."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class Arch:
    """family        the architecture whose launch configurations this one uses: same instructions, within its limits
    shared_bytes  shared memory of a block at most: the compiler does not check it
    sms           multiprocessors (AMD: compute units) of its largest GPU
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
def _fallback_family(arch: str) -> str:
    """Return the family of an architecture that is not listed; warn once a process."""
    used = "gfx942" if arch.startswith("gfx") else "sm_80"  # what fits all listed GPUs of that maker
    warnings.warn(
        f"{arch} is not among the known GPUs ({', '.join(ARCHS)}): launch configurations are {used}'s", stacklevel=3
    )
    return used


def family(arch: str) -> str:
    """Return the architecture whose launch configurations `arch` uses."""
    known = ARCHS.get(arch)
    return known.family if known else _fallback_family(arch)


def amd(arch: str) -> bool:
    return family(arch).startswith("gfx")


def tma(arch: str) -> bool:
    """Return whether to use tensor descriptors: on sm_80 the compiler turns them into pointers that mostly spill."""
    return family(arch) in ("sm_90", "sm_100")


def supports_pdl(arch: str) -> bool:
    """Return whether programmatic dependent launch exists (pdl.py)."""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90


def multiprocessors(arch: str) -> int:
    """Return the multiprocessors of the largest GPU of `arch`."""
    return ARCHS[arch if arch in ARCHS else family(arch)].sms


def _strides(x: Tensor) -> list[int]:
    """Return the strides of x; that of a dimension of one element, which can be anything, becomes its neighbour's."""
    strides, sizes = list(x.stride()), x.shape[:-1]
    known = next((stride for size, stride in zip(sizes, strides, strict=False) if size > 1), strides[0])
    for axis, size in enumerate(sizes):
        strides[axis] = known = strides[axis] if size > 1 else known
    return strides


def tma_can_read(x: Tensor, arch: str) -> bool:
    """Return whether TMA of `arch` can read x: 16-bit, not empty, the last dimension contiguous, the base and the other
    strides multiples of 16 bytes, each a multiple of the next, no stride 0."""
    if not tma(arch) or x.dtype.itemsize != 2 or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    outer = _strides(x)[:-1]
    fits = all(stride > 0 and stride * x.dtype.itemsize % 16 == 0 for stride in outer)
    return fits and all(stride % following == 0 for stride, following in pairwise(outer))


def describe(x: Tensor, block: Sequence[int], arch: str) -> TensorDescriptor | None:
    """Return a descriptor that loads tiles of shape `block`, zero outside x; None where pointers must read."""
    if not tma_can_read(x, arch):
        return None
    # The command line reads ARCHS before it turns the interpreter on, which Triton's own functions read on import.
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, list(x.shape), _strides(x), list(block))
