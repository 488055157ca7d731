"""A weight, dense or quantized, as kernels see it, and the device functions that load its next tile.

E experts (or none), N rows, K columns: the depth of the sum; G groups of columns that share a scale

A launch passes WeightArgs and LAYOUT. BLOCK_K columns go into one product. An element of a quantized weight holds
FIELDS codes, so a tile of BLOCK_K elements holds the next FIELDS * BLOCK_K columns: a unit (quantized.py). A dense
weight has one field, and so has one of "fp8_w8a8": its values are codes, as those of x are (fp8.py), and its K is K'.
"""

from __future__ import annotations

from collections import namedtuple
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch
from .arch import ARCHS, sums_fp8_exactly
from .kernel_args import Pointer, dense_rows
from .launch import LaunchConfig, describe, tma_can_read, unpacks_by_ptx
from .offload import ALIGNMENT, OffloadedWeight
from .pdl import pdl_wait
from .quantized import BITS, W8A8, QuantizedWeight, row_elements
from .unpack import fields_of, scaled, unpacked

# How a weight is stored: its format ("dense" or quantized), columns that share a scale (of
# "fp8_w8a8" K', its padded columns), whether PTX unpacks it, whether its pointer is a table of the experts' addresses,
# whether sums of its codes' products are added to fp32 tile by tile.
Layout = namedtuple("Layout", "format group ptx table promoted")
# Pointers of a kernel's weight tile [rows, BLOCK_K], of the scales and of the zeros.
WeightPtrs = namedtuple("WeightPtrs", "tile scales zeros")
# The weight rows of a tile: WeightPtrs of column 0, the indices of the rows among all (for scales and zeros), and a
# descriptor that reads at `coords`, or None.
WeightRows = namedtuple("WeightRows", "ptrs rows desc coords")


class WeightArgs(NamedTuple):
    """A weight as an argument of kernels."""

    ptr: Pointer  # [(E,) N, K] values, e4m3 or int16 elements; or int64 [E], addresses of the experts' rows
    scales: Pointer  # [(E,) N, G], or None
    zeros: Pointer  # the same, or None
    stride_n: int  # between rows
    stride_e: int | None  # between experts, if there are any


@dataclass(frozen=True)
class Weight:
    """A weight [E, N, K] or [N, K] as launches take it.

    data    values, e4m3 codes or int16 elements, rows contiguous
    scales  [(E,) N, G] and zeros the same or None, contiguous; a dense weight has neither
    name    `QuantizedWeight.name`, which `configs` reads; None: dense
    memory  where the rows of experts lie whose addresses are `data`; None: `data` has the rows
    """

    data: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    name: str | None = None
    format: str = "dense"
    group: int = 0
    memory: OffloadedWeight | None = None

    @classmethod
    def of(cls, weight: Tensor | QuantizedWeight) -> Weight:
        if isinstance(weight, Tensor):
            return cls(dense_rows(weight))
        memory = weight if isinstance(weight, OffloadedWeight) else None
        data: Any
        data, *parts = weight.tensors
        scales, zeros = (None if part is None else part.contiguous() for part in parts)
        group = 2 * row_elements(W8A8, *weight.shape[-1:] * 2) if weight.format == W8A8 else weight.group
        return cls(dense_rows(data), scales, zeros, weight.name, weight.format, group, memory)

    @property
    def args(self) -> WeightArgs:
        rows = self.data if self.memory is None else self.memory.host
        if self.memory is not None and self.format == W8A8:
            rows = rows.view(torch.float8_e4m3fn)
        between_experts = rows.stride(0) if rows.dim() == 3 else None
        return WeightArgs(self.data, self.scales, self.zeros, rows.stride(-2), between_experts)

    def staged(self) -> WeightArgs:
        """Return `args`, a table of addresses replaced by one whose addresses all lie on the device."""
        return self.args if self.memory is None else self.args._replace(ptr=self.memory.staged())

    def layout(self, arch: str) -> Layout:
        ptx = self.format not in ("dense", W8A8) and unpacks_by_ptx(arch)
        promoted = self.format == W8A8 and not sums_fp8_exactly(arch)
        return Layout(self.format, self.group, ptx, self.memory is not None, promoted)

    def prefetch_bytes(self, columns: int, config: LaunchConfig, grid: tuple[int, ...], arch: str) -> int:
        """Return how many bytes of each row the programs of a decode kernel prefetch: a power of two; 0: none.

        columns  of a row that one program reads, of BLOCK_N rows

        What resident programs prefetch together stays below half of L2. Shared memory bounds their number: it holds
        num_stages - 1 tiles of the weight and of x, or one, at the least. Experts in host memory are not prefetched.
        """
        known, tile = ARCHS.get(arch), config.constexprs
        dense_fp32 = self.name is None and self.data.dtype == torch.float32  # whose decode kernels load nothing early
        if not launch.PREFETCH or known is None or not known.l2_bytes or self.memory is not None or dense_fp32:
            return 0
        depth, rows = tile["BLOCK_K"], tile["BLOCK_N"]
        buffers = max(1, config.num_stages - 1)
        nbytes = 2 * buffers * depth * (rows + tile["BLOCK_T"] * 16 // BITS.get(self.format, 16))
        resident = max(1, min(prod(grid), known.sms * max(1, known.shared_bytes // nbytes)))
        row = columns * BITS.get(self.format, 16) // 8
        most = min(row, known.l2_bytes // 2 // (resident * rows))
        return 1 << most.bit_length() - 1 if most >= 128 else 0

    @property
    def multiplied_as_stored(self) -> bool:
        """Whether products take its values, or codes, as they lie in memory: TMA can then bring their tiles."""
        return fields_of(self.format) == 1

    def takes_tma(self, arch: str) -> bool:
        return self.multiplied_as_stored and self.memory is None and tma_can_read(self.data, arch)

    def descriptor(self, parts: int, config: LaunchConfig, arch: str) -> TensorDescriptor | None:
        """Describe [(E,) N, K], or with 2 parts [E, 2, N / 2, K]: loads have BLOCK_N rows a part. None: pointers."""
        if not self.multiplied_as_stored or self.memory is not None:
            return None
        block = config.constexprs["BLOCK_N"], config.constexprs["BLOCK_K"]
        if parts == 1:
            return describe(self.data, (1, *block)[-self.data.dim() :], arch)
        return describe(self.data.unflatten(1, (parts, -1)), (1, parts, *block), arch)


_ALIGNMENT = tl.constexpr(ALIGNMENT)


@triton.jit
def expert_rows(weight, expert, dtype: tl.constexpr, LAYOUT: tl.constexpr, exists=True):
    """Return the pointer to an expert's rows: an offset into a stacked weight, or an entry of a table of addresses.

    Where `exists` is false, the table's first entry is read instead, and the caller masks the rows.
    """
    if LAYOUT.table:
        stored: tl.constexpr = tl.float8e4nv if LAYOUT.format == "fp8_w8a8" else tl.int16
        element: tl.constexpr = dtype if LAYOUT.format == "dense" else stored
        return tl.multiple_of(
            tl.load(weight.ptr + tl.where(exists, expert, 0)).to(tl.pointer_type(element)), _ALIGNMENT
        )
    else:
        return weight.ptr + expert * weight.stride_e


@triton.jit
def depth_tile(ptrs, inside, EVEN: tl.constexpr):
    """Load a tile of x, masked only where tiles do not divide the depth."""
    return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def program_tile(pid, row_tiles, column_tiles, GROUP_M: tl.constexpr):
    """Program -> (row tile, column tile). GROUP_M row tiles sweep the columns together, so weights stay in L2."""
    group = pid // (GROUP_M * column_tiles)
    height = tl.maximum(1, tl.minimum(row_tiles - group * GROUP_M, GROUP_M))  # 1 for a surplus program
    within = pid % (GROUP_M * column_tiles)
    return group * GROUP_M + within % height, within // height


@triton.jit
def _stored_tile(ptrs, k, depth, EVEN: tl.constexpr, FIELDS: tl.constexpr):
    """Load the tile at column k, given pointers of column 0: the values there, or the elements of k's unit."""
    BLOCK_K: tl.constexpr = ptrs.shape[1]
    if FIELDS > 1:
        ptrs += k // (FIELDS * BLOCK_K) * BLOCK_K
        return tl.load(ptrs) if EVEN else tl.load(ptrs, mask=tl.full([1, 1], k, tl.int32) < depth, other=0)
    else:
        offs_k = tl.arange(0, BLOCK_K)
        return tl.load(ptrs + k) if EVEN else tl.load(ptrs + k, mask=offs_k[None, :] < depth - k, other=0.0)


@triton.jit
def _load_group(ptr, rows, group, inside, K: tl.constexpr, GROUP: tl.constexpr):
    """Load a group's scales or zeros, [rows, 1]."""
    ptrs = ptr + rows[:, None] * (K // GROUP) + (0 if GROUP == K else group)
    return tl.load(ptrs) if inside is None else tl.load(ptrs, mask=inside, other=0.0)


@triton.jit
def weight_tile(w, k, K: tl.constexpr, BLOCK_K: tl.constexpr, LAYOUT: tl.constexpr):
    """Load the tile of WeightRows w at column k: values there, zero beyond K, or the elements of a unit."""
    FIELDS: tl.constexpr = fields_of(LAYOUT.format)
    if w.desc is not None:
        return w.desc.load(w.coords + (k,)).reshape(w.ptrs.tile.shape)  # noqa: RUF005  # the JIT knows no starred element
    else:
        return _stored_tile(w.ptrs.tile, k, K, FIELDS > 1 or K // BLOCK_K * BLOCK_K == K, FIELDS)


@triton.jit
def add_product(acc, x, values, LAYOUT: tl.constexpr):
    """acc + x @ values.T, summed in fp32.

    Where few bits of a running sum are kept (`sums_fp8_exactly`), each tile, of at most 128 columns, has a sum of its
    own. With `max_num_imprecise_acc` ptxas would wait after each instruction of a tile, not once. A plain addition the
    compiler would make the tile's first sum.
    """
    if LAYOUT.promoted:
        part = tl.dot(x, values.T)
        return tl.fma(part, tl.full(part.shape, 1.0, tl.float32), acc)
    else:
        return tl.dot(x, values.T, acc, input_precision="ieee")


@triton.jit
def row_products(
    x_ptrs,  # [ROWS, BLOCK_K] of column 0; unused where a descriptor reads
    x_desc,  # x in tiles [ROWS, BLOCK_K], read at `row`, or None
    row,
    w,  # WeightRows
    ROWS: tl.constexpr, BLOCK_K: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows of x with the rows of a weight -> [ROWS, w.rows] fp32.

    Each element of a weight is loaded once: the fields of a unit multiply from registers, in the order of the columns.
    Its scales multiply before the products, except those of whole rows (`times_row_scales`).
    """
    FORMAT: tl.constexpr = LAYOUT.format
    GROUP: tl.constexpr = LAYOUT.group
    PTX: tl.constexpr = LAYOUT.ptx
    FIELDS: tl.constexpr = fields_of(FORMAT)
    UNIT: tl.constexpr = FIELDS * BLOCK_K
    EVEN: tl.constexpr = K // UNIT * UNIT == K
    offs_k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((ROWS, w.rows.shape[0]), tl.float32)
    for k in range(0, K, UNIT):
        if FIELDS > 1:
            tile = weight_tile(w, k, K, BLOCK_K, LAYOUT)
        for field in tl.static_range(FIELDS):
            column = k + field * BLOCK_K
            if x_desc is None:
                x = depth_tile(x_ptrs + field * BLOCK_K, offs_k[None, :] < K - column, EVEN)
            else:
                x = x_desc.load([row, column])
            if FIELDS > 1:
                if field == 0 or field * BLOCK_K % GROUP == 0:  # a unit starts with a group, or the group is the row
                    group = k // GROUP + field * BLOCK_K // GROUP
                    inside = None if EVEN or GROUP == K else tl.full([1, 1], column, tl.int32) < K
                    zeros = None if w.ptrs.zeros is None else _load_group(w.ptrs.zeros, w.rows, group, inside, K, GROUP)
                    scales = None if GROUP == K else _load_group(w.ptrs.scales, w.rows, group, inside, K, GROUP)
                values = unpacked(tile, field, zeros, FORMAT, x.dtype, PTX)
                values = values if GROUP == K else scaled(values, scales, PTX)
            else:  # loaded after x: on sm_80 the loop then has fewer instructions
                values = weight_tile(w, k, K, BLOCK_K, LAYOUT)
            acc = add_product(acc, x, values, LAYOUT)
        if x_desc is None:
            x_ptrs += UNIT  # stepped, not computed from k: fewer instructions in the loop
    return acc


@triton.jit
def add_products(
    acc,  # [rows, T]
    w,  # WeightPtrs of column `begin`
    rows,  # row indices of the scales and zeros
    x_ptrs,  # [BLOCK_K, T] of column `begin`
    live,  # [1, T] columns of x that exist; a padding copy of a row would cross the L2 cache again
    begin,
    SPAN: tl.constexpr,
    EVEN: tl.constexpr,  # no column lies beyond K; otherwise those read as 0
    K: tl.constexpr, LAYOUT: tl.constexpr,
    PDL: tl.constexpr = False,  # an earlier launch writes x
):  # fmt: skip
    """acc + SPAN columns of a weight, from `begin` on, times those of x.

    Each byte of the weight is read once. A group's scale multiplies after the products, so it is never rounded. With
    PDL the weight's first tile is loaded before the wait; not in fp32, whose tiles fill the registers: it would spill.
    """
    UNIT: tl.constexpr = x_ptrs.shape[0] * fields_of(LAYOUT.format)
    AHEAD: tl.constexpr = PDL and x_ptrs.dtype.element_ty.primitive_bitwidth == 16
    if PDL and not AHEAD:
        pdl_wait(PDL)
    if AHEAD:
        tile = _stored_tile(w.tile, 0, K - begin, EVEN, fields_of(LAYOUT.format))
        pdl_wait(PDL)
        acc = _add_tile(acc, tile, w, rows, x_ptrs, live, begin, 0, EVEN, K, LAYOUT)
    for k in range(UNIT if AHEAD else 0, SPAN, UNIT):
        tile = _stored_tile(w.tile, k, K - begin, EVEN, fields_of(LAYOUT.format))
        acc = _add_tile(acc, tile, w, rows, x_ptrs, live, begin, k, EVEN, K, LAYOUT)
    return acc


@triton.jit
def _add_tile(acc, tile, w, rows, x_ptrs, live, begin, k, EVEN: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr):
    """`add_products` of the FIELDS * BLOCK_K columns from begin + k on, whose values or elements are `tile`."""
    BLOCK_K: tl.constexpr = x_ptrs.shape[0]
    FORMAT: tl.constexpr = LAYOUT.format
    GROUP: tl.constexpr = LAYOUT.group
    PTX: tl.constexpr = LAYOUT.ptx
    FIELDS: tl.constexpr = fields_of(FORMAT)
    BY_ROW: tl.constexpr = GROUP == K or FIELDS == 1
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    part = acc if BY_ROW else tl.zeros_like(acc)
    for field in tl.static_range(FIELDS):
        column = k + field * BLOCK_K
        x = tl.load(x_ptrs + column, mask=live if EVEN else live & (offs_k[:, None] < K - begin - column), other=0.0)
        if FIELDS > 1:
            if field == 0 or field * BLOCK_K % GROUP == 0:
                has_group = None if EVEN or BY_ROW else tl.full([1, 1], begin + column, tl.int32) < K
                # A unit starts with a group, or the group is the whole row.
                group = begin // GROUP + k // GROUP + field * BLOCK_K // GROUP
                zeros = None if w.zeros is None else _load_group(w.zeros, rows, group, has_group, K, GROUP)
                scales = None if BY_ROW else _load_group(w.scales, rows, group, has_group, K, GROUP)
            part = tl.dot(unpacked(tile, field, zeros, FORMAT, dtype, PTX), x, part, input_precision="ieee")
            if not BY_ROW and (field + 1) * BLOCK_K % GROUP == 0:
                acc += part * scales.to(tl.float32)  # type: ignore[union-attr]
                part = tl.zeros_like(acc)
        else:
            part = tl.dot(tile, x, part, input_precision="ieee")
    return part if BY_ROW else acc


@triton.jit
def times_row_scales(acc, w, rows, K: tl.constexpr, LAYOUT: tl.constexpr, AXIS: tl.constexpr):
    """Multiply acc's rows, or with AXIS 1 its columns, by the scales of a weight with one scale a row."""
    if LAYOUT.format != "dense" and LAYOUT.group == K:
        acc *= tl.expand_dims(tl.load(w.scales + rows).to(tl.float32), 1 - AXIS)
    return acc


@triton.jit
def times_x_scales(acc, x_scales, rows):
    """Multiply acc [rows, columns] by the scales of x at `rows`, where x are codes (fp8.py); None: they are values."""
    return acc if x_scales is None else acc * tl.load(x_scales + rows)[:, None]
