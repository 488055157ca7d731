"""Host-side tensor descriptors: TMA reads weights and keys on Hopper and later."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch import tma


def tma_can_read(x: Tensor, arch: str) -> bool:
    """Return whether TMA of `arch` can read x: 16-bit, not empty, the last dimension contiguous, the base and the other
    strides multiples of 16 bytes, no stride 0."""
    if not tma(arch) or x.dtype.itemsize != 2 or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    return all(stride > 0 and stride * x.dtype.itemsize % 16 == 0 for stride in x.stride()[:-1])


def describe(x: Tensor, block: Sequence[int], arch: str) -> TensorDescriptor | None:
    """Return a descriptor that loads tiles of shape `block`, zero outside x; None where pointers must read."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)) if tma_can_read(x, arch) else None
