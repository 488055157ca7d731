"""Host-side tensor descriptors: TMA reads weights and keys on Hopper and later."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .arch import tma


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
    return TensorDescriptor(x, list(x.shape), _strides(x), list(block)) if tma_can_read(x, arch) else None
