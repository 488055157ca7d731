"""int8: two codes in two's complement an element; value = code * scale.

PTX makes 128 + the low seven bits in bf16, less 128 or 256 by the sign; in fp16 1024 + 128 + number, less 1152.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .packing import Format, ptx, unpack_field

# $0 = result, $1 = two elements, $2 = how far to shift. lop3 with 0xEA: (a & b) | c; with 0x6A: (a & b) ^ c.
VALUES_BF16 = ptx(
    "shr.b32 t, $1, $2; lop3.b32 u, t, 0x00800080, 0x43004300, 0xEA; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA;",
    "mov.b32 c, 0xBF80BF80; fma.rn.bf16x2 $0, u, c, t;",
)
VALUES_FP16 = ptx(
    "shr.b32 t, $1, $2; lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A;",
    "mov.b32 c, 0x3C003C00; mov.b32 z, 0xE480E480; fma.rn.f16x2 $0, t, c, z;",
)


class Int8(Format):
    name, bits, largest, typical = "int8", 8, 127.0, 64.0

    def values(self, codes: Tensor, zeros: Any = None) -> Tensor:
        return codes.view(torch.int8).float()

    def codes(self, values: Tensor) -> Tensor:
        return values.round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)


@triton.jit
def int8_values(tile, field, zeros, dtype: tl.constexpr, PTX: tl.constexpr):
    if PTX:
        return unpack_field(tile, 8 * field, VALUES_BF16 if dtype == tl.bfloat16 else VALUES_FP16, dtype)
    else:
        code = (tile.to(tl.int32) >> (8 * field)) & 255
        return ((code ^ 128) - 128).to(tl.float32).to(dtype)
