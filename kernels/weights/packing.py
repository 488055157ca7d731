"""What stored formats of weights share: codes packed in int16 elements, read on the host and on the device.

N rows, K columns: the depth of the sum; J elements of a unit

A row is stored in units of 64, 128 or 256 columns. A unit's int16 elements hold one code in each field, and field s of
element j is column s * J + j of the unit. So each field, shifted down, is a tile of J neighbouring columns, and its
product with x needs no interleave. K is padded to a full unit with codes of value 0.

On the device, plain arithmetic goes through fp32: in the interpreter, on AMD, and for fp32. For 16-bit types on NVIDIA
two elements, which lie in one register, are moved at once to where a float has its bits (PTX), and an exact fma puts
them right.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

GROUPS = (128, 64, 32)  # columns that may share a scale, besides a full row


class Format(ABC):
    """What a stored format is. A leaf has a file of its own, with its values on the device; formats.py lists them."""

    name: ClassVar[str]
    bits: ClassVar[int]  # of a code
    largest: ClassVar[float]  # value at scale 1
    typical: ClassVar[float]  # magnitude there of random codes' values
    float_dtype: ClassVar[torch.dtype | None] = None  # whose numbers the codes are; None: integers
    scale_dtype: ClassVar[torch.dtype] = torch.float32  # of the scales that quantizing makes
    scale_error: ClassVar[float] = 1e-6  # of rounding such a scale, relative to it
    groups: ClassVar[tuple[int, ...]] = ()  # columns that share one of these; (): a row has one
    stored_groups: ClassVar[tuple[int, ...]] = GROUPS  # columns that may share a stored scale, besides a full row
    has_zeros: ClassVar[bool] = False  # whether a group may have a zero of its own
    code_of_zero: ClassVar[int] = 0
    multiplies_codes: ClassVar[bool] = False  # whether products take codes as they lie in memory, those of x, too

    @property
    def fields(self) -> int:
        """Codes that kernels take from an element; 1: they multiply what is stored."""
        return 1 if self.multiplies_codes else 16 // self.bits

    def unit_columns(self, K: int, group: int) -> int:
        """Return the columns of a unit: each field lies within one group, and K is padded as little as possible."""
        return 128 if group >= 64 else 64

    def row_elements(self, K: int, group: int) -> int:
        """Return the int16 elements of a row of K columns, padding included."""
        unit = self.unit_columns(K, group)
        return -(-K // unit) * unit * self.bits // 16

    def row_bytes(self, K: int, group: int) -> int:
        """Return the bytes of a row without padding, with its scales as quantizing makes them."""
        return K * self.bits // 8 + K // group * self.scale_dtype.itemsize

    def pack(self, codes: Tensor, group: int) -> Tensor:
        """Pack codes uint8 [..., K], one a byte -> int16 [..., K' * bits / 16], K' the padded columns."""
        unit, fields = self.unit_columns(codes.shape[-1], group), 16 // self.bits
        if padding := -codes.shape[-1] % unit:
            codes = nn.functional.pad(codes, (0, padding), value=self.code_of_zero)
        parts = codes.unflatten(-1, (-1, fields, unit // fields)).to(torch.int32)
        packed = sum(parts[..., s, :] << (self.bits * s) for s in range(fields))
        return packed.to(torch.int16).flatten(-2)  # type: ignore[union-attr]  # wraps: a field reaches the sign bit

    def unpack(self, data: Tensor, K: int, group: int) -> Tensor:
        """Invert `pack`: int16 [..., K' * bits / 16] -> uint8 [..., K]."""
        elements = (
            data.contiguous().view(torch.uint8).unflatten(-1, (-1, self.unit_columns(K, group) * self.bits // 16, 2))
        )
        if self.bits == 4:  # a byte has two fields, the lower first
            elements = torch.stack((elements & 15, elements >> 4), dim=-1).flatten(-2)
        return elements.transpose(-1, -2).flatten(-3)[..., :K]

    @abstractmethod
    def values(self, codes: Tensor, zeros: Any = None) -> Tensor:
        """Return code - zero in fp32. codes uint8; zeros broadcast to them, None: the format's."""

    def encode(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize finite fp32 parts [..., group] -> codes uint8 of that shape, scales [..., 1]."""
        scales = usable_scales(parts.abs().amax(-1, keepdim=True) / self.largest)
        return self.codes(parts / scales), scales

    @abstractmethod
    def codes(self, values: Tensor) -> Tensor:
        """Return the nearest codes uint8 of values at scale 1."""

    def fault(self, codes: Tensor) -> str | None:
        """Return what a product with these stored codes would not bear, or None."""
        return None

    @property
    def offset_bit(self) -> int:
        """The bit that differs between a code and value + 2 ** (bits - 1), which the hub packs."""
        return self.code_of_zero ^ 1 << self.bits - 1

    def elements(self, data: Tensor) -> Tensor:
        """Return the rows of a weight as kernels read them."""
        return data

    def sample(self, bits: Tensor) -> Tensor:
        """Return random int16 elements whose codes all have finite values."""
        return bits

    def product(self, x: Tensor, weight: Any) -> Tensor:
        """x [..., K] -> x @ weight.T [..., N], in plain torch: the exact values, rounded to x's dtype."""
        return nn.functional.linear(x, weight.dequantize().to(x.dtype))


def usable_scales(scales: Tensor) -> Tensor:
    """Replace scales of 0 by 1, since any scale fits zeros, and subnormal ones by the least normal number."""
    return scales.clamp(min=torch.finfo(torch.float32).tiny).where(scales > 0, 1.0)


def ptx(*lines: str) -> tl.constexpr:
    return tl.constexpr("{ .reg .b32 t, u, c, z; " + " ".join(lines) + " }")


# $0 = $1 * $2
TIMES_BF16 = ptx("mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z;")
TIMES_FP16 = ptx("mov.b32 z, 0x80008000; fma.rn.f16x2 $0, $1, $2, z;")


@triton.jit
def unpack_field(tile, shift, ASM: tl.constexpr, dtype: tl.constexpr):
    # `shift` fills a register an element, of which the second is not looked at.
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [tile, shift], dtype=dtype.value, is_pure=True, pack=2)


@triton.jit
def apply_to_pairs(a, b, ASM: tl.constexpr, dtype: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=dtype.value, is_pure=True, pack=2)


@triton.jit
def scale_values(values, scales, PTX: tl.constexpr):
    """values [rows, columns] * scales [rows, 1], rounded once; beside bf16 values a scale is rounded to bf16 before."""
    dtype: tl.constexpr = values.dtype
    if dtype == tl.bfloat16:
        scales = scales.to(dtype)
    if PTX and dtype == scales.dtype and dtype != tl.float32:
        return apply_to_pairs(values, scales, TIMES_BF16 if dtype == tl.bfloat16 else TIMES_FP16, dtype)
    else:
        return (values.to(tl.float32) * scales.to(tl.float32)).to(dtype)
