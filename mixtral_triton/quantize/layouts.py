"""How a quantized linear is stored: which tensors it has on disk, and its rows as codes, scales and zeros.

N rows, K columns (the depth of the sum), G groups of columns that share a scale, C = K or G. An int32 element holds
eight values of 4 bits or four of 8, the first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.quantized import BITS, GROUPS
from . import QuantSpec

Read = Callable[..., Tensor]  # read(part, *index) returns a part of the linear, or a slice of it
# The dtypes (safetensors' names) and the shapes that a tensor of a linear may have, and whether it is required.
Part = tuple[tuple[str, ...], tuple[tuple[int, ...], ...], bool]
Rows = tuple[Tensor, Tensor, Tensor | None]  # codes uint8 [n,K], scales [n,G], zeros uint8 [n,G]

FLOATS, INTEGERS, I32 = ("F32", "BF16", "F16"), ("I32", "I64"), ("I32",)
ANEW = 'or quantize it anew with weights="int8"'
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # field of an int32 that holds each of eight neighbouring columns


@dataclass(frozen=True)
class Plane:
    """A tensor that stores a matrix [N,C] of codes, scales or zeros.

    rows, columns  size of the block of values in one element: packed in an int32, or equal to a float
    transposed     the tensor is [C,N]
    ordered        the values in an int32 are in AWQ's order
    any_shape      a scale per row [N,1] or [N], or one scale for all rows, [] or [1]
    """

    name: str
    dtypes: tuple[str, ...]
    rows: int = 1
    columns: int = 1
    transposed: bool = False
    ordered: bool = False
    any_shape: bool = False

    def part(self, N: int, C: int) -> Part:
        shape = -(-N // self.rows), -(-C // self.columns)
        alternatives = ((), (1,), (N,)) if self.any_shape else ()
        return self.dtypes, (shape[::-1] if self.transposed else shape, *alternatives), True

    def read(self, read: Read, rows: slice, columns: slice) -> Tensor:
        """Return these rows and columns of the matrix."""
        if self.any_shape:
            x = read(self.name).reshape(-1, 1)
            return x[rows] if len(x) > 1 else x.expand(rows.stop - rows.start, 1)
        index = divided(rows, self.rows), divided(columns, self.columns)
        x = read(self.name, *(index[::-1] if self.transposed else index))
        x = x.t() if self.transposed else x
        if x.dtype != torch.int32:
            x = x.repeat_interleave(self.rows, 0) if self.rows > 1 else x
        elif self.rows > 1:
            x = unpacked(x.t(), 32 // self.rows, self.ordered).t()
        else:
            x = unpacked(x, 32 // self.columns, self.ordered)
        row, column = rows.start % self.rows, columns.start % self.columns
        return x[row : row + rows.stop - rows.start, column : column + columns.stop - columns.start]


def divided(run: slice, size: int) -> slice:
    """Return the blocks of `size` that hold the run."""
    return slice(run.start // size, -(-run.stop // size))


def unpacked(x: Tensor, bits: int, ordered: bool = False) -> Tensor:
    """Unpack int32 [..., n] -> uint8 [..., n * 32 / bits]."""
    data = x.clone(memory_format=torch.contiguous_format).view(torch.uint8)  # a stride of 1, also of a single element
    if bits == 4:
        data = torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)
    return data.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2) if ordered else data


@dataclass(frozen=True)
class HubLayout:
    """How each quantized linear [N,K] is stored.

    format       the QuantizedWeight's; "uint8": none, but `values` reads it
    group        columns that share a scale; None or -1: a scale per row
    zeros        None: not stored, the format's
    bits         of a code that has a zero
    symmetric    every zero is 2 ** (bits - 1)
    zero_offset  what is subtracted from a zero before it is stored: 1 in GPTQ's first version
    reordered    the config says that the groups are scattered over the columns
    extras       names of other parts
    """

    format: str
    codes: Plane
    scales: Plane
    zeros: Plane | None = None
    group: int | None = None
    symmetric: bool = True
    zero_offset: int = 0
    reordered: bool = False
    extras: tuple[str, ...] = ()
    bits: int = 4

    def group_columns(self, K: int) -> int:
        """Return the columns of a group, K where a row has one scale."""
        size = K if self.group is None or self.group == -1 else self.group
        if K % size:
            raise ValueError(f"groups of {size} do not divide {K} columns")
        return size

    def parts(self, N: int, K: int) -> dict[str, Part]:
        """Return the tensors of a linear by the last part of their names."""
        G = K // self.group_columns(K)
        planes = (self.codes, K), (self.scales, G), (self.zeros, G)
        parts = {plane.name: plane.part(N, C) for plane, C in planes if plane is not None}
        extras: dict[str, Part] = dict.fromkeys(("g_idx", "weight_g_idx"), (INTEGERS, ((K,),), self.reordered))
        extras |= {"weight_shape": (INTEGERS, ((2,),), True), "bias": (FLOATS, ((N,),), False)}
        return parts | {name: extras[name] for name in self.extras}

    def spec(self, K: int, scales: torch.dtype) -> QuantSpec:
        """Return the QuantizedWeight's spec; ValueError where none has these bits or groups."""
        group = self.group_columns(K)
        if self.format not in BITS:
            raise ValueError(f"bits is {self.bits}, needs 4; {ANEW}")
        if group != K and group not in GROUPS:
            raise ValueError(f"the group size is {group}, needs 32, 64, 128 or a scale per row; {ANEW}")
        return QuantSpec(self.format, group, scales, not self.symmetric)

    def check(self, read: Read, N: int, K: int, parts: Collection[str], exact: bool = True) -> Tensor:
        """Return the group of each column. ValueError where one of the `extras` among the linear's parts changes its
        values, or, if `exact`, the groups of its columns.
        """
        extras = {name: read(name) for name in self.extras if name in parts}
        if "weight_shape" in extras and (shape := extras["weight_shape"].tolist()) != [N, K]:
            raise ValueError(f"weight_shape is {shape}, needs the config's {[N, K]}")
        if "bias" in extras and extras["bias"].any():
            raise ValueError("the bias is not 0, and Mixtral has none")
        indices = extras.get("g_idx", extras.get("weight_g_idx"))
        groups = torch.arange(K) // self.group_columns(K)
        if indices is None or torch.equal(indices := indices.long().cpu(), groups):
            return groups
        if exact:
            raise ValueError(f"the weight is in act-order (g_idx scatters the groups), needs desc_act false; {ANEW}")
        if indices.min() < 0 or indices.max() > groups[-1]:
            raise ValueError(f"g_idx is from {indices.min()} to {indices.max()}, needs groups in 0..{groups[-1]}")
        return indices

    def rows(self, read: Read, rows: slice, columns: slice, K: int) -> Rows:
        """Return rows of these columns, which no group exceeds."""
        groups = divided(columns, self.group_columns(K))
        codes, scales = self.codes.read(read, rows, columns).view(torch.uint8), self.scales.read(read, rows, groups)
        if self.format == "int8" and self.codes.columns > 1:  # int32 elements hold code + 128
            codes = codes ^ 128
        if self.zeros is None:
            return codes, scales, None
        zeros = self.zeros.read(read, rows, groups)
        if self.zero_offset and (zeros == (most := (1 << self.bits) - 1)).any():
            readers = f"some readers of gptq take it as {most + 1}, others as 0"
            raise ValueError(f"a stored zero is {most}: {readers}; needs gptq_v2")
        zeros = zeros + self.zero_offset
        if not self.symmetric:
            return codes, scales, zeros
        if (zeros != (zero := 1 << (self.bits - 1))).any():
            raise ValueError(f"a zero is not {zero}, but the config says that the weight is symmetric")
        return codes, scales, None

    def values(self, rows: Rows, groups: Tensor) -> Tensor:
        """Return `rows` of all K columns as values, fp32 [n,K], given the group of each column."""
        codes, scales, zeros = rows
        groups = groups.to(codes.device)
        if self.format in ("int8", "fp8"):
            values = codes.view(torch.int8 if self.format == "int8" else torch.float8_e4m3fn).float()
        else:
            values = codes.float() - (1 << (self.bits - 1) if zeros is None else zeros.float()[:, groups])
        return values * scales.float()[:, groups]
