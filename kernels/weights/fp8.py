"""fp8: two e4m3 codes an element (Micikevicius et al. 2022); value = code * scale. None is NaN (0x7F, 0xFF): loading
refuses those, kernels look at no value.

PTX moves the bits to where a float has them, whose exponent is then 120 too low in bf16 and 8 too low in fp16.

W8A8 is the format of a view of such a weight with one scale a row, whose products quantize x, too (fp8_rows.py): they
multiply codes, and a sum is multiplied by the scales of both.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from ..launching.kernel_args import dense_rows
from .packing import Format, ptx, unpack_field

W8A8 = "fp8_w8a8"
FP8_MAX = 448.0  # the largest value of e4m3
# The least magnitude that maps to FP8_MAX, so that its inverse is finite: a row of zeros has this one, too.
LEAST_AMAX = FP8_MAX * 2.0**-126

# $0 = result, $1 = two elements, $2 = how far to shift. lop3 with 0xEA: (a & b) | c.
_MOVED = "shl.b32 t, $1, $2; shr.b32 u, t, {}; and.b32 u, u, {}; lop3.b32 u, t, 0x80008000, u, 0xEA;"
VALUES_BF16 = ptx(
    _MOVED.format(4, "0x07F007F0"), "mov.b32 c, 0x7B807B80; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, u, c, z;"
)
VALUES_FP16 = ptx(
    _MOVED.format(1, "0x3F803F80"), "mov.b32 c, 0x5C005C00; mov.b32 z, 0x80008000; fma.rn.f16x2 $0, u, c, z;"
)


class Fp8(Format):
    name, bits, largest, typical, float_dtype = "fp8", 8, FP8_MAX, 0.5, torch.float8_e4m3fn

    def values(self, codes: Tensor, zeros: Any = None) -> Tensor:
        return codes.view(torch.float8_e4m3fn).float()

    def codes(self, values: Tensor) -> Tensor:
        return values.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)

    def fault(self, codes: Tensor) -> str | None:
        return "a weight is NaN (0x7F or 0xFF in fp8)" if ((codes & 127) == 127).any() else None

    def sample(self, bits: Tensor) -> Tensor:
        return bits & -16449  # without the highest exponent bit no code is NaN


class Fp8Products(Fp8):
    name, multiplies_codes, stored_groups = W8A8, True, ()

    def elements(self, data: Tensor) -> Tensor:
        """Return float8_e4m3fn [(E,) N, K'], in the order of the weight's bytes."""
        return dense_rows(data).view(torch.float8_e4m3fn)

    def product(self, x: Tensor, weight: Any) -> Tensor:
        """Multiply the codes of x and of the weight in fp32 (fp64 where x is), then by both scales; round once."""
        codes, scales = encode_rows(x)
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        products = nn.functional.linear(codes.to(dtype), weight.values().to(dtype))
        return (products * scales * weight.scales.float().squeeze(-1)).to(x.dtype)


def encode_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations x [..., K] to e4m3 in fp32 -> codes float8_e4m3fn [..., K], a scale a row fp32 [..., 1].

    A row's largest magnitude maps to FP8_MAX. A row with a NaN or an infinity has a code that is NaN.
    """
    values = x.float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    most = torch.full_like(largest, FP8_MAX)  # torch divides by a number, or a number, with two roundings
    codes = (values * (most / largest)).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), largest / most


def encoded_bytes(K: int) -> int:
    """Return the bytes of a row of activations in e4m3, padding and its scale included."""
    return 2 * Fp8().row_elements(K, K) + 4


def takes_fp8_activations(weight: Any, K: int) -> bool:
    """Return whether products of a weight of K columns, or of a spec of one, may quantize activations."""
    return getattr(weight, "format", None) == Fp8.name and weight.group == K


def with_fp8_activations(weight: Any) -> Any:
    """Return the view of an fp8 weight with one scale a row whose products quantize activations; others as they are."""
    return weight.viewed_as(W8A8) if takes_fp8_activations(weight, weight.shape[-1]) else weight


def without_code_products(weight: Any) -> Any:
    """Return the weight of which `weight` is the view that quantizes activations; others as they are."""
    return weight.viewed_as(Fp8.name) if getattr(weight, "format", None) == W8A8 else weight


@triton.jit
def fp8_values(tile, field, zeros, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        return unpack_field(tile, 8 - 8 * field, VALUES_BF16 if dtype == tl.bfloat16 else VALUES_FP16, dtype)
    else:
        code = (tile.to(tl.int32) >> (8 * field)) & 255
        # The sign to the top, the rest to where fp32 has it: its exponent is 120 too low.
        bits = (code & 128) << 24 | (code & 127) << 20
        return (bits.to(tl.float32, bitcast=True) * 2.0**120).to(dtype)
