"""From a tile of a quantized weight's int16 elements to the numbers of one of their fields, on the device.

FORMAT  "int4", "int8" or "fp8" (e4m3), see quantized.py; field s of an element holds the bits from s * (16 / FIELDS) on

Plain arithmetic goes through fp32: in the interpreter, on AMD, and for fp32. For 16-bit types on NVIDIA two elements,
which lie in one register, are moved at once to where a float has its bits (PTX), and an exact fma puts them right:

        bf16                                              fp16
int4    128 + code                                        1024 + code
int8    128 + low seven bits, less 128 or 256 by the sign  1024 + 128 + number, less 1152
fp8     exponent 120 too low                              exponent 8 too low
"""

import triton
import triton.language as tl


def _ptx(*lines: str) -> tl.constexpr:
    return tl.constexpr("{ .reg .b32 t, u, c, z; " + " ".join(lines) + " }")


# $0 = result, $1 = two elements, $2 = how far to shift. lop3 with 0xEA: (a & b) | c; with 0x6A: (a & b) ^ c.
_INT4 = "shr.b32 t, $1, $2; lop3.b32 $0, t, 0x000F000F, {}, 0xEA;"
INT4_BF16, INT4_FP16 = _ptx(_INT4.format("0x43004300")), _ptx(_INT4.format("0x64006400"))
INT8_BF16 = _ptx(
    "shr.b32 t, $1, $2; lop3.b32 u, t, 0x00800080, 0x43004300, 0xEA; lop3.b32 t, t, 0x007F007F, 0x43004300, 0xEA;",
    "mov.b32 c, 0xBF80BF80; fma.rn.bf16x2 $0, u, c, t;",
)
INT8_FP16 = _ptx(
    "shr.b32 t, $1, $2; lop3.b32 t, t, 0x00FF00FF, 0x64806480, 0x6A;",
    "mov.b32 c, 0x3C003C00; mov.b32 z, 0xE480E480; fma.rn.f16x2 $0, t, c, z;",
)
_FP8 = "shl.b32 t, $1, $2; shr.b32 u, t, {}; and.b32 u, u, {}; lop3.b32 u, t, 0x80008000, u, 0xEA;"
FP8_BF16 = _ptx(
    _FP8.format(4, "0x07F007F0"), "mov.b32 c, 0x7B807B80; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, u, c, z;"
)
FP8_FP16 = _ptx(_FP8.format(1, "0x3F803F80"), "mov.b32 c, 0x5C005C00; mov.b32 z, 0x80008000; fma.rn.f16x2 $0, u, c, z;")
# $0 = $1 - $2, $0 = $1 * $2
MINUS_BF16 = _ptx("mov.b32 c, 0xBF80BF80; fma.rn.bf16x2 $0, $2, c, $1;")
MINUS_FP16 = _ptx("mov.b32 c, 0xBC00BC00; fma.rn.f16x2 $0, $2, c, $1;")
TIMES_BF16 = _ptx("mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z;")
TIMES_FP16 = _ptx("mov.b32 z, 0x80008000; fma.rn.f16x2 $0, $1, $2, z;")


@triton.constexpr_function
def fields_of(FORMAT):
    """Codes of an element; 1 where products multiply what is stored."""
    return 4 if FORMAT == "int4" else 1 if FORMAT in ("dense", "fp8_w8a8") else 2


@triton.jit
def _moved(tile, shift, ASM: tl.constexpr, dtype: tl.constexpr):
    # `shift` fills a register an element, of which the second is not looked at.
    return tl.inline_asm_elementwise(ASM, "=r,r,r,r", [tile, shift], dtype=dtype.value, is_pure=True, pack=2)


@triton.jit
def _paired(a, b, ASM: tl.constexpr, dtype: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r,r", [a, b], dtype=dtype.value, is_pure=True, pack=2)


@triton.jit
def _by_ptx(tile, field, zeros, FORMAT: tl.constexpr, dtype: tl.constexpr):
    BF16: tl.constexpr = dtype == tl.bfloat16
    if FORMAT == "int4":
        ONE: tl.constexpr = 128 if BF16 else 1024
        codes = _moved(tile, 4 * field, INT4_BF16 if BF16 else INT4_FP16, dtype)
        if zeros is None:
            zero = tl.full([1, 1], ONE + 8, tl.float32).to(dtype)
        else:
            zero = zeros if BF16 else (zeros.to(tl.float32) + (ONE - 128)).to(dtype)
        return _paired(codes, zero, MINUS_BF16 if BF16 else MINUS_FP16, dtype)
    elif FORMAT == "int8":
        return _moved(tile, 8 * field, INT8_BF16 if BF16 else INT8_FP16, dtype)
    else:
        return _moved(tile, 8 - 8 * field, FP8_BF16 if BF16 else FP8_FP16, dtype)


@triton.jit
def _plain(tile, field, zeros, FORMAT: tl.constexpr):
    bits = tile.to(tl.int32)
    if FORMAT == "int4":
        code = ((bits >> (4 * field)) & 15).to(tl.float32)
        return code - 8 if zeros is None else code - (zeros.to(tl.float32) - 128)
    code = (bits >> (8 * field)) & 255
    if FORMAT == "int8":
        return ((code ^ 128) - 128).to(tl.float32)
    else:
        # The sign to the top, the rest to where fp32 has it: its exponent is 120 too low.
        moved = (code & 128) << 24 | (code & 127) << 20
        return moved.to(tl.float32, bitcast=True) * 2.0**120


@triton.jit
def unpacked(tile, field, zeros, FORMAT: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Field `field` of int16 [rows, columns] as dtype, exactly: its numbers, of int4 code - zero.

    `zeros`: 128 + zero [rows, 1], or None: 8.
    """
    if PTX and dtype != tl.float32:
        return _by_ptx(tile, field, zeros, FORMAT, dtype)
    else:
        return _plain(tile, field, zeros, FORMAT).to(dtype)


@triton.jit
def scaled(values, scales, PTX: tl.constexpr):
    """values [rows, columns] * scales [rows, 1], rounded once; beside bf16 values a scale is rounded to bf16 before."""
    dtype: tl.constexpr = values.dtype
    if dtype == tl.bfloat16:
        scales = scales.to(dtype)
    if PTX and dtype == scales.dtype and dtype != tl.float32:
        return _paired(values, scales, TIMES_BF16 if dtype == tl.bfloat16 else TIMES_FP16, dtype)
    else:
        return (values.to(tl.float32) * scales.to(tl.float32)).to(dtype)
