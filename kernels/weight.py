"""What a kernel needs of a weight, and the device function that gives its next tile.

E experts (or none), N rows, K columns: the depth of the sum
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .op import dense_rows
from .tma import describe, takes


@dataclass(frozen=True)
class Weight:
    """A weight [E, N, K] or [N, K] as launches take it.

    data  its rows contiguous
    """

    data: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Weight:
        return cls(dense_rows(weight))

    @property
    def strides(self) -> dict[str, int]:
        """A kernel's arguments: from row to row, and with experts from one to the next."""
        return dict(zip(("stride_wn", "stride_we"), self.data.stride()[-2::-1], strict=False))

    def takes_tma(self, arch: str) -> bool:
        return takes(self.data, arch)

    def descriptor(self, parts: int, block_n: int, block_k: int, arch: str) -> TensorDescriptor | None:
        """Of [E, N, K], or with 2 parts of [E, 2, N / 2, K]: loads the same block_n rows of each; None: by pointers."""
        if parts == 1:
            return describe(self.data, (1, block_n, block_k), arch)
        return describe(self.data.unflatten(1, (parts, -1)), (1, parts, block_n, block_k), arch)


@triton.jit
def weight_tile(ptrs, k, depth, EVEN: tl.constexpr, desc=None, place=None):
    """Columns k.. of a weight as a tile [rows, columns]. `ptrs` are its pointers at column 0, `depth` columns follow;
    what lies beyond is 0, and EVEN says that no tile reaches there.

    With a descriptor that reads instead, from `place` on: its coordinates but the last.
    """
    if desc is None:
        offs_k = tl.arange(0, ptrs.shape[1])
        return tl.load(ptrs + k) if EVEN else tl.load(ptrs + k, mask=offs_k[None, :] < depth - k, other=0.0)
    else:
        return desc.load(place + (k,)).reshape(ptrs.shape)  # noqa: RUF005  # the JIT knows no starred element
