"""A weight, dense or quantized, as kernels see it, and the device functions that load its next tile.

E experts (or none), N rows, K columns: the depth of the sum; G groups of columns that share a scale

A launch passes WeightArgs and LAYOUT. BLOCK_K columns go into one product. An element of a quantized weight holds
several codes, so a tile of BLOCK_K elements holds the next fields * BLOCK_K columns: a unit (packing.py). A dense
weight has one field, and so has one whose codes are multiplied as they are stored, with those of x: its K is K'.
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

from ..launching import launch
from ..launching.arch import ARCHS, sums_fp8_exactly
from ..launching.kernel_args import ALIGNMENT, Groups, Pointer, Rows, dense_rows
from ..launching.launch import LaunchConfig, describe, tma_can_read, unpacks_by_ptx
from ..launching.pdl import pdl_wait
from .formats import element_type, field_values, quantize_rows
from .packing import scale_values
from .quantized import QuantizedWeight

# Device: what selects code for a weight: its format ("dense" or quantized), columns that share a scale (of codes that
# are multiplied K', the padded columns), codes that an element has, whether PTX unpacks them, whether its pointer is a
# table of the experts' addresses, whether sums of products of codes are added to fp32 tile by tile.
Layout = namedtuple("Layout", "format group fields ptx table promoted")
# Device: the rows of a weight that a program reads: WeightArgs, pointers of a tile [rows, BLOCK_K] of the first column,
# the indices of the rows among all (for scales and zeros), and a descriptor that reads at `coords`, or None.
WeightRows = namedtuple("WeightRows", "weight ptrs rows desc coords")


class WeightArgs(NamedTuple):
    """Device: a weight as an argument of kernels."""

    ptr: Pointer  # [(E,) N, K] values, codes or int16 elements; or int64 [E], addresses of the experts' rows
    scales: Pointer  # [(E,) N, G], or None
    zeros: Pointer  # the same, or None
    stride_n: int  # between rows
    stride_e: int | None  # between experts, if there are any


@dataclass(frozen=True)
class Weight:
    """Host: a weight [E, N, K] or [N, K] as launches take it.

    data    values, codes or int16 elements, rows contiguous; or the experts' addresses
    rows    `data`, or such rows as the addresses lead to
    scales  [(E,) N, G] and zeros the same or None, contiguous; a dense weight has neither
    name    `QuantizedWeight.name`, which `configs` reads; None: dense
    fields  codes of an element that are multiplied one by one; 1: products take what is stored
    stored  the weight, unless it is a tensor
    """

    data: Tensor
    rows: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    name: str | None = None
    format: str = "dense"
    group: int = 0
    fields: int = 1
    stored: Any = None

    @classmethod
    def of(cls, weight: Tensor | QuantizedWeight) -> Weight:
        if isinstance(weight, Tensor):
            data = dense_rows(weight)
            return cls(data, data)
        data, *parts = weight.tensors
        data = dense_rows(data)
        rows: Any = weight.stored_rows if data.dtype == torch.int64 else data  # or of a table of addresses
        scales, zeros = (None if part is None else part.contiguous() for part in parts)
        if weight.name is None:
            return cls(data, rows, stored=weight)
        kind, group = weight.kind, weight.group
        if kind.multiplies_codes:
            group = rows.shape[-1]
        return cls(data, rows, scales, zeros, weight.name, weight.format, group, kind.fields, weight)

    @property
    def multiplies_codes(self) -> bool:
        return self.fields == 1 and self.scales is not None

    @property
    def is_table(self) -> bool:
        """Whether `data` are addresses of rows."""
        return self.rows is not self.data

    @property
    def args(self) -> WeightArgs:
        between_experts = self.rows.stride(0) if self.rows.dim() == 3 else None
        return WeightArgs(self.data, self.scales, self.zeros, self.rows.stride(-2), between_experts)

    @property
    def args_for_many_rows(self) -> WeightArgs:
        """Return `args` for a kernel that reads a tile once for each tile of x."""
        return self.args._replace(ptr=self.stored.data_for_many_rows()) if self.is_table else self.args

    def rows_of(self, x: Rows, groups: Groups | None = None, top_k: int = 0) -> Rows:
        """Return x as products take it: as it is, or its codes. groups, top_k: see `quantize_rows`."""
        return quantize_rows(x, groups, top_k) if self.multiplies_codes else x

    def layout(self, arch: str) -> Layout:
        ptx = self.fields > 1 and unpacks_by_ptx(arch)
        promoted = self.multiplies_codes and not sums_fp8_exactly(arch)
        return Layout(self.format, self.group, self.fields, ptx, self.is_table, promoted)

    def prefetch_bytes(self, columns: int, config: LaunchConfig, grid: tuple[int, ...], arch: str) -> int:
        """Return how many bytes of each row the programs of a decode kernel prefetch: a power of two; 0: none.

        columns  of a row that one program reads, of BLOCK_N rows

        What resident programs prefetch together stays below half of L2. Shared memory bounds their number: it holds
        num_stages - 1 tiles of the weight and of x, or one, at the least. What an address leads to is not prefetched.
        """
        known, tile = ARCHS.get(arch), config.constexprs
        dense_fp32 = self.name is None and self.data.dtype == torch.float32  # whose decode kernels load nothing early
        if not launch.PREFETCH or known is None or not known.l2_bytes or self.is_table or dense_fp32:
            return 0
        depth, rows, bits = tile["BLOCK_K"], tile["BLOCK_N"], 16 // self.fields
        buffers = max(1, config.num_stages - 1)
        nbytes = 2 * buffers * depth * (rows + tile["BLOCK_T"] * 16 // bits)
        resident = max(1, min(prod(grid), known.sms * max(1, known.shared_bytes // nbytes)))
        row = columns * bits // 8
        most = min(row, known.l2_bytes // 2 // (resident * rows))
        return 1 << most.bit_length() - 1 if most >= 128 else 0

    @property
    def multiplied_as_stored(self) -> bool:
        """Whether products take its values, or codes, as they lie in memory: TMA can then bring their tiles."""
        return self.fields == 1

    def takes_tma(self, arch: str) -> bool:
        return self.multiplied_as_stored and not self.is_table and tma_can_read(self.data, arch)

    def descriptor(self, parts: int, config: LaunchConfig, arch: str) -> TensorDescriptor | None:
        """Describe [(E,) N, K], or with 2 parts [E, 2, N / 2, K]: loads have BLOCK_N rows a part. None: pointers."""
        if not self.multiplied_as_stored or self.is_table:
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
        element: tl.constexpr = element_type(LAYOUT.format, dtype)
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
    FIELDS: tl.constexpr = LAYOUT.fields
    if w.desc is not None:
        return w.desc.load(w.coords + (k,)).reshape(w.ptrs.shape)  # noqa: RUF005  # the JIT knows no starred element
    else:
        return _stored_tile(w.ptrs, k, K, FIELDS > 1 or K // BLOCK_K * BLOCK_K == K, FIELDS)


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
    Its scales multiply before the products, except those of whole rows (`times_scales`).
    """
    GROUP: tl.constexpr = LAYOUT.group
    FIELDS: tl.constexpr = LAYOUT.fields
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
                    stored = w.weight
                    zeros = None if stored.zeros is None else _load_group(stored.zeros, w.rows, group, inside, K, GROUP)
                    scales = None if GROUP == K else _load_group(stored.scales, w.rows, group, inside, K, GROUP)
                values = field_values(tile, field, zeros, LAYOUT, x.dtype)
                values = values if GROUP == K else scale_values(values, scales, LAYOUT.ptx)
            else:  # loaded after x: on sm_80 the loop then has fewer instructions
                values = weight_tile(w, k, K, BLOCK_K, LAYOUT)
            acc = add_product(acc, x, values, LAYOUT)
        if x_desc is None:
            x_ptrs += UNIT  # stepped, not computed from k: fewer instructions in the loop
    return acc


@triton.jit
def add_products(
    acc,  # [rows, T]
    w,  # WeightRows, their pointers those of column `begin`
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
    UNIT: tl.constexpr = x_ptrs.shape[0] * LAYOUT.fields
    AHEAD: tl.constexpr = PDL and x_ptrs.dtype.element_ty.primitive_bitwidth == 16
    if PDL and not AHEAD:
        pdl_wait(PDL)
    if AHEAD:
        tile = _stored_tile(w.ptrs, 0, K - begin, EVEN, LAYOUT.fields)
        pdl_wait(PDL)
        acc = _add_tile(acc, tile, w, x_ptrs, live, begin, 0, EVEN, K, LAYOUT)
    for k in range(UNIT if AHEAD else 0, SPAN, UNIT):
        tile = _stored_tile(w.ptrs, k, K - begin, EVEN, LAYOUT.fields)
        acc = _add_tile(acc, tile, w, x_ptrs, live, begin, k, EVEN, K, LAYOUT)
    return acc


@triton.jit
def _add_tile(acc, tile, w, x_ptrs, live, begin, k, EVEN: tl.constexpr, K: tl.constexpr, LAYOUT: tl.constexpr):
    """`add_products` of the FIELDS * BLOCK_K columns from begin + k on, whose values or elements are `tile`."""
    BLOCK_K: tl.constexpr = x_ptrs.shape[0]
    GROUP: tl.constexpr = LAYOUT.group
    FIELDS: tl.constexpr = LAYOUT.fields
    BY_ROW: tl.constexpr = GROUP == K or FIELDS == 1
    dtype: tl.constexpr = x_ptrs.dtype.element_ty
    offs_k = tl.arange(0, BLOCK_K)
    part = acc if BY_ROW else tl.zeros_like(acc)
    for field in tl.static_range(FIELDS):
        column = k + field * BLOCK_K
        x = tl.load(x_ptrs + column, mask=live if EVEN else live & (offs_k[:, None] < K - begin - column), other=0.0)
        if FIELDS > 1:
            if field == 0 or field * BLOCK_K % GROUP == 0:
                stored = w.weight
                has_group = None if EVEN or BY_ROW else tl.full([1, 1], begin + column, tl.int32) < K
                # A unit starts with a group, or the group is the whole row.
                group = begin // GROUP + k // GROUP + field * BLOCK_K // GROUP
                zeros = None if stored.zeros is None else _load_group(stored.zeros, w.rows, group, has_group, K, GROUP)
                scales = None if BY_ROW else _load_group(stored.scales, w.rows, group, has_group, K, GROUP)
            part = tl.dot(field_values(tile, field, zeros, LAYOUT, dtype), x, part, input_precision="ieee")
            if not BY_ROW and (field + 1) * BLOCK_K % GROUP == 0:
                acc += part * scales.to(tl.float32)  # type: ignore[union-attr]
                part = tl.zeros_like(acc)
        else:
            part = tl.dot(tile, x, part, input_precision="ieee")
    return part if BY_ROW else acc


@triton.jit
def times_scales(acc, w, K: tl.constexpr, LAYOUT: tl.constexpr, AXIS: tl.constexpr, row_scales=None, x_rows=None):
    """Multiply acc's rows, or with AXIS 1 its columns, by the scales of WeightRows with one scale a row, and before its
    rows by those that x has at x_rows, where it is codes."""
    if row_scales is not None:
        acc *= tl.load(row_scales + x_rows)[:, None]
    if LAYOUT.format != "dense" and LAYOUT.group == K:
        acc *= tl.expand_dims(tl.load(w.weight.scales + w.rows).to(tl.float32), 1 - AXIS)
    return acc
