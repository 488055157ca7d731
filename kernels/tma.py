"""Host-side tensor descriptors: how weights and keys travel on Hopper and later, by TMA instead of by pointers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch import tma


def tma_can_read(x: Tensor, arch: str) -> bool:
    """Whether `arch` has TMA of use, and x is as it wants it: 16-bit, not empty, its last dimension contiguous, its
    base and its other strides multiples of 16 bytes, and none of them 0."""
    if not tma(arch) or x.dtype.itemsize != 2 or x.numel() == 0 or x.stride(-1) != 1 or x.data_ptr() % 16:
        return False
    return all(stride > 0 and stride * x.dtype.itemsize % 16 == 0 for stride in x.stride()[:-1])


def describe(x: Tensor, block: Sequence[int], arch: str) -> TensorDescriptor | None:
    """A descriptor of `x` that loads tiles of shape `block`, what lies outside of x read as zero; None: by pointers."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block)) if tma_can_read(x, arch) else None
