"""Floating-point instructions: correctly rounded; `.ftz` flushes subnormals (PTX ISA, sections 9.7.3 to 9.7.5).

Approximate instructions are rounded correctly as well, so their last bits differ from a GPU's. The payload of a NaN is
not modelled: a GPU produces 0x7fffffff, and no kernel reads it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .values import TYPES, Array, by_type, elementwise

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
TINY = F32(2.0**-126)
HALVES = ("bf16", "f16")


def flush(x: Array) -> Array:
    """Replace subnormals by zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def round_to_odd(total: Array, error: Array) -> Array:
    """Round the exact sum total + error to odd, so that a second rounding to fewer bits is correct."""
    even = (total.view(f"u{total.itemsize}") & 1) == 0
    inexact = even & (error != 0) & np.isfinite(total)
    return np.where(inexact, np.nextafter(total, np.copysign(np.inf, error, dtype=total.dtype)), total)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """Return a + b and its rounding error (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma32(a: Any, b: Any, c: Any) -> Array:
    """fp32 fma: the product is exact in fp64; the twice rounded sum is wrong only at a tie, which is rounded to odd."""
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    out = total.astype(F32)
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if tie.any():
        exact = round_to_odd(*two_sum(product, np.broadcast_to(c, product.shape).astype(F64)))
        out = np.where(tie, exact.astype(F32), out)
    return out


def widen(bits: Any, kind: str) -> Array:
    """Convert the bits of a 16-bit float to fp32."""
    bits = np.asarray(bits)
    return (bits.astype(U32) << U32(16)).view(F32) if kind == "bf16" else bits.view(np.float16).astype(F32)


def narrow(x: Any, kind: str) -> Array:
    """Convert fp32, of fp16 also fp64, to the bits of a 16-bit float: to nearest, ties to even."""
    x = np.asarray(x)
    if kind == "f16":
        rounded = x.astype(np.float16).view(U16)
    else:
        bits = x.view(U32)
        rounded = ((bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def fma16(a: Any, b: Any, c: Any, kind: str) -> Array:
    """Bits of bf16 or fp16, rounded once."""
    x, y, z = (widen(bits, kind).astype(F64) for bits in (a, b, c))
    exact = round_to_odd(*two_sum(x * y, z))
    if kind == "bf16":
        single = exact.astype(F32)
        exact = round_to_odd(single, (exact - single).astype(F32))
    return narrow(exact, kind)


def _extreme(pick: Callable[[Any, Any], Any], zeros: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Array]:
    """Return the number of a number and a NaN; -0 is less than +0."""

    def extreme(a: Any, b: Any) -> Array:
        out = np.asarray(pick(a, b))
        both = (a == 0) & (b == 0)
        if np.any(both):
            out = np.where(both, zeros(a.astype(F32).view(U32), b.astype(F32).view(U32)).view(F32), out)
        return out

    return extreme


def _propagate_nan(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: np.where(np.isnan(a) | np.isnan(b), F32(np.nan), function(a, b))


def _exp2(a: Array) -> Array:
    return np.exp2(a.astype(F64)).astype(F32)


def _rsqrt(a: Array) -> Array:
    return (1 / np.sqrt(a.astype(F64))).astype(F32)


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
ARITHMETIC |= {f"{name}.rn": function for name, function in ARITHMETIC.items()}
EXTREMES = {"min": _extreme(np.fmin, np.bitwise_or), "max": _extreme(np.fmax, np.bitwise_and)}
DIVIDE = dict.fromkeys(("div.rn", "div.full", "div.approx"), np.divide)
EXTREMES_NAN = {f"{name}.NaN": _propagate_nan(function) for name, function in EXTREMES.items()}
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "ex2.approx": _exp2,
    "ex2.approx.ftz": lambda a: flush(_exp2(flush(a))),
    "rsqrt.approx": _rsqrt,
    "rsqrt.approx.ftz": lambda a: flush(_rsqrt(flush(a))),
    "sqrt.rn": np.sqrt,
}
COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
COMPARE |= {f"{name}u": lambda a, b, c=c: c(a, b) | np.isnan(a) | np.isnan(b) for name, c in COMPARE.items()}
COMPARE |= {
    "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    "neu": np.not_equal,
    "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
COMPARE = {f"setp.{name}": compare for name, compare in COMPARE.items()}

by_type(ARITHMETIC | DIVIDE | EXTREMES | EXTREMES_NAN | COMPARE, 2, "f32")
by_type(FUNCTIONS, 1, "f32")
by_type({"fma.rn": fma32, "fma.rn.ftz": lambda *args: flush(fma32(*map(flush, args)))}, 3, "f32")


def _halves(function: Callable[..., Array], *pairs: Array) -> Array:
    """Apply a function of 16-bit operands to both halves of 32-bit ones."""
    pairs = tuple(pair.copy() for pair in np.broadcast_arrays(*pairs))
    return function(*(pair.view(U16) for pair in pairs)).view(U32)


def _in_fp32(function: Callable[[Any, Any], Any]) -> Callable[..., Array]:
    return lambda a, b, kind: narrow(function(widen(a, kind), widen(b, kind)), kind)


SIXTEEN_BITS: dict[str, tuple[int, Callable[..., Array]]] = {
    name: (2, _in_fp32(function)) for name, function in (ARITHMETIC | EXTREMES).items()
}
SIXTEEN_BITS |= {
    "fma.rn": (3, fma16),
    "neg": (1, lambda a, kind: a ^ U16(0x8000)),
    "abs": (1, lambda a, kind: a & U16(0x7FFF)),
}


def _cvt_pair(high: Array, low: Array, kind: str) -> Array:
    return narrow(high, kind).astype(U32) << U32(16) | narrow(low, kind)


def _cvt_to_integer(a: Array, kind: str) -> Array:
    """Round toward zero and clamp; NaN becomes 0."""
    limits = np.iinfo(TYPES[kind])
    x = np.trunc(np.nan_to_num(a.astype(F64), nan=0.0, posinf=np.inf, neginf=-np.inf))
    return np.clip(x, limits.min, limits.max).astype(limits.dtype)


for _kind in HALVES:
    for _name, (_arity, _function) in SIXTEEN_BITS.items():
        _single = partial(_function, kind=_kind)
        elementwise(f"{_name}.{_kind}", _single, *["b16"] * _arity)
        elementwise(f"{_name}.{_kind}x2", partial(_halves, _single), *["b32"] * _arity)
    for _name, _compare in COMPARE.items():
        elementwise(
            f"{_name}.{_kind}", lambda a, b, c=_compare, kind=_kind: c(widen(a, kind), widen(b, kind)), "b16", "b16"
        )
    elementwise(f"cvt.f32.{_kind}", partial(widen, kind=_kind), "b16")
    elementwise(f"cvt.rn.{_kind}.f32", partial(narrow, kind=_kind), "f32")
    elementwise(f"cvt.rn.{_kind}x2.f32", partial(_cvt_pair, kind=_kind), "f32", "f32")
by_type({"cvt.rn.f32": lambda a: a.astype(F32)}, 1, "s32", "u32", "s64", "u64", "s16", "u16")
for _kind in ("s32", "u32"):
    elementwise(f"cvt.rzi.{_kind}.f32", partial(_cvt_to_integer, kind=_kind), "f32")
