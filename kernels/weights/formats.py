"""The registry of the stored formats of weights, by name, on the host and on the device.

What a format is stands in its file: int4.py, int8.py, fp8.py. A new one has a file and its entries here.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .fp8 import W8A8, Fp8, Fp8Products, fp8_values
from .fp8 import without_code_products as without_code_products
from .fp8_rows import quantize_rows as quantize_rows
from .int4 import Int4, int4_values
from .int8 import Int8, int8_values
from .names import FORMAT_NAMES
from .packing import Format

FORMATS: dict[str, Format] = {format.name: format for format in (Int4(), Int8(), Fp8(), Fp8Products())}
# Bits of a code by the formats that a weight is quantized to; the others are views of them.
BITS = {name: FORMATS[name].bits for name in FORMAT_NAMES}
QUANT_NAMES = ("int4:128", "int8", "fp8")  # `QuantizedWeight.name`s that quantizing makes, benchmarked and compiled
CODE_PRODUCTS = W8A8  # the format whose products multiply codes, those of x, too


def parse_name(name: str, K: int) -> tuple[Format, int]:
    """Return the format and the group of a `QuantizedWeight.name` with K columns."""
    format, _, group = name.partition(":")
    return FORMATS[format], int(group or K)


def find_format(bits: int, floats: bool = False) -> str:
    """Return the name of the format of codes of so many bits, integers or floats."""
    return next(name for name in BITS if BITS[name] == bits and floats == (FORMATS[name].float_dtype is not None))


def multiplies_codes(name: Any) -> bool:
    """Return whether products of weights of this name multiply codes, those of x, too."""
    return bool(name == CODE_PRODUCTS)


def tile_columns(name: str | None, K: int) -> int | None:
    """Return the columns of a field, which are also the elements of a unit, for a `QuantizedWeight.name`; None where
    kernels take any number of columns: they multiply what is stored."""
    if name is None or multiplies_codes(name):
        return None
    format, group = parse_name(name, K)
    return format.unit_columns(K, group) * format.bits // 16


def matrix_bytes(name: str | None, rows: int, K: int, itemsize: int) -> int:
    """Return the bytes of `rows` rows of K columns with their scales, for a `QuantizedWeight.name` or None (dense)."""
    if name is None:
        return rows * K * itemsize
    format, group = parse_name(name, K)
    return rows * format.row_bytes(K, group)


@triton.constexpr_function
def element_type(format, dtype):
    """Return the type of a stored element."""
    return dtype if format == "dense" else tl.float8e4nv if format == "fp8_w8a8" else tl.int16


@triton.jit
def field_values(tile, field, zeros, LAYOUT: tl.constexpr, dtype: tl.constexpr):
    """Field `field` of int16 elements [rows, columns] as dtype, exactly: code - zero. zeros: 128 + zero [rows, 1], or
    None: the format's."""
    PTX: tl.constexpr = LAYOUT.ptx and dtype != tl.float32
    if LAYOUT.format == "int4":
        return int4_values(tile, field, zeros, dtype, PTX)
    elif LAYOUT.format == "int8":
        return int8_values(tile, field, zeros, dtype, PTX)
    else:
        tl.static_assert(LAYOUT.format == "fp8", "a format without a branch here")
        return fp8_values(tile, field, zeros, dtype, PTX)
