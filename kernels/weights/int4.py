"""int4: four codes 0..15 an element; value = (code - zero) * scale, the zero 8 unless a group has its own.

PTX makes 128 + code of a field in bf16, 1024 + code in fp16. Zeros are stored as bf16 128 + zero.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import GROUPS, Format, apply_to_pairs, ptx, unpack_field, usable_scales

# Candidates for the scale, relative to the one that clips nothing: a smaller one clips some values and rounds the
# others less. More candidates find little more.
STEPS = (1.0, 0.93, 0.86, 0.79, 0.72, 0.65)

# $0 = result, $1 = two elements, $2 = how far to shift. lop3 with 0xEA: (a & b) | c.
_CODES = "shr.b32 t, $1, $2; lop3.b32 $0, t, 0x000F000F, {}, 0xEA;"
CODES_BF16, CODES_FP16 = ptx(_CODES.format("0x43004300")), ptx(_CODES.format("0x64006400"))
# $0 = $1 - $2
MINUS_BF16 = ptx("mov.b32 c, 0xBF80BF80; fma.rn.bf16x2 $0, $2, c, $1;")
MINUS_FP16 = ptx("mov.b32 c, 0xBC00BC00; fma.rn.f16x2 $0, $2, c, $1;")


class Int4(Format):
    name, bits, largest, typical, scale_dtype = "int4", 4, 7.0, 4.0, torch.bfloat16
    groups, has_zeros, code_of_zero, scale_error = GROUPS, True, 8, 1.01 * 2**-8

    def unit_columns(self, K: int, group: int) -> int:
        return 256 if group >= 64 and K % 256 == 0 else 128

    def values(self, codes: Tensor, zeros: Any = None) -> Tensor:
        return codes.float().sub_(self.code_of_zero if zeros is None else zeros)

    def codes(self, values: Tensor) -> Tensor:
        return (_round(values) + self.code_of_zero).to(torch.uint8)

    def encode(self, parts: Tensor) -> tuple[Tensor, Tensor]:
        """As `Format.encode`, with the best of several bf16 scales: that with the least squared error."""
        widest = usable_scales(parts.abs().amax(-1, keepdim=True) / self.largest)  # clips nothing
        best, least = widest, torch.full_like(widest, float("inf"))
        for step in (*STEPS, None, None):
            if step is None:  # the least-squares scale of the best scale's codes
                values = _round(parts / best)
                scales = (values * parts).sum(-1, keepdim=True) / values.square().sum(-1, keepdim=True).clamp(min=1.0)
            else:
                scales = widest * step
            scales = usable_scales(scales.bfloat16().float())
            error = (_round(parts / scales) * scales).sub_(parts).square_().sum(-1, keepdim=True)
            best, least = scales.where(error < least, best), error.minimum(least)
        return self.codes(parts / best), best


def _round(values: Tensor) -> Tensor:
    return values.round_().clamp_(-8, 7)


@triton.jit
def int4_values(tile, field, zeros, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        BF16: tl.constexpr = dtype == tl.bfloat16
        ONE: tl.constexpr = 128 if BF16 else 1024
        codes = unpack_field(tile, 4 * field, CODES_BF16 if BF16 else CODES_FP16, dtype)
        if zeros is None:
            zero = tl.full([1, 1], ONE + 8, tl.float32).to(dtype)
        else:
            zero = zeros if BF16 else (zeros.to(tl.float32) + (ONE - 128)).to(dtype)
        return apply_to_pairs(codes, zero, MINUS_BF16 if BF16 else MINUS_FP16, dtype)
    else:
        code = ((tile.to(tl.int32) >> (4 * field)) & 15).to(tl.float32)
        return (code - 8 if zeros is None else code - (zeros.to(tl.float32) - 128)).to(dtype)
