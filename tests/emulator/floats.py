"""Floating point: correctly rounded, subnormals kept unless `.ftz` says otherwise (PTX ISA, sections 9.7.3 to 9.7.5).

Approximate instructions are rounded correctly, too, so their last bits are not a GPU's. What a NaN's bits are is not
modelled: a GPU's are 0x7fffffff, and no kernel looks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .integers import binary, unary
from .text import Instruction
from .values import Array, Read, kinds, last, operands, pure

F32, F64, U16, U32, U64 = np.float32, np.float64, np.uint16, np.uint32, np.uint64
TINY = F32(2.0**-126)


def flush(x: Array) -> Array:
    """Subnormals as zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def odd(total: Array, error: Array) -> Array:
    """fp64 `total`, to which `error` is missing, rounded to odd: what is rounded next is rounded as if only once."""
    even = (total.view(U64) & U64(1)) == 0
    wrong = even & (error != 0) & np.isfinite(total)
    return np.where(wrong, np.nextafter(total, np.copysign(np.inf, error)), total)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b, and what its rounding lost (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma32(a: Any, b: Any, c: Any) -> Array:
    """The product is exact in fp64; the sum is rounded there and again to fp32, which is wrong only at a tie."""
    product = np.multiply(a, b, dtype=F64)
    total = product + c
    out = total.astype(F32)
    tie = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    if tie.any():
        lost = odd(*two_sum(product, np.broadcast_to(c, product.shape).astype(F64)))
        out = np.where(tie, lost.astype(F32), out)
    return out


def from_bf16(bits: Any) -> Array:
    return (np.asarray(bits).astype(U32) << U32(16)).view(F32)


def from_f16(bits: Any) -> Array:
    return np.asarray(bits).view(np.float16).astype(F32)


def to_bf16(x: Array) -> Array:
    """To the nearest, ties to even -> bits."""
    bits = x.view(U32)
    rounded = ((bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


def to_f16(x: Array) -> Array:
    """-> bits."""
    return np.where(np.isnan(x), U16(0x7FFF), x.astype(np.float16).view(U16))


def fma16(a: Any, b: Any, c: Any, kind: str) -> Array:
    """Bits of bf16 or fp16, rounded once."""
    x, y, z = (widen(one, kind).astype(F64) for one in (a, b, c))
    exact = odd(*two_sum(x * y, z))
    if kind == "f16":
        return to_f16(exact)
    narrow = exact.astype(F32)
    lost = exact - narrow
    bits = narrow.view(U32)
    towards = np.nextafter(narrow, np.copysign(F32(np.inf), lost.astype(F32)))
    narrow = np.where((lost != 0) & (bits & U32(1) == 0) & np.isfinite(narrow), towards, narrow)
    return to_bf16(narrow)


def widen(bits: Any, kind: str) -> Array:
    """Bits of a 16-bit float -> fp32."""
    return {"bf16": from_bf16, "f16": from_f16}[kind](bits)


def narrow(x: Array, kind: str) -> Array:
    return {"bf16": to_bf16, "f16": to_f16}[kind](x)


def _extreme(pick: Callable[[Any, Any], Any], zeros: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Array]:
    """The number of two, not the NaN; -0 is below +0."""

    def go(a: Any, b: Any) -> Array:
        out = np.asarray(pick(a, b))
        both = (a == 0) & (b == 0)
        if np.any(both):
            signs = zeros(np.asarray(a, F32).view(U32), np.asarray(b, F32).view(U32)).view(F32)
            out = np.where(both, signs, out)
        return out

    return go


minimum = _extreme(np.fmin, np.bitwise_or)
maximum = _extreme(np.fmax, np.bitwise_and)
ARITHMETIC: dict[str, Callable[..., Any]] = {"add": np.add, "sub": np.subtract, "mul": np.multiply}

for _name, _function in ARITHMETIC.items():
    for _rounding in ("", ".rn"):
        binary(f"{_name}{_rounding}", _function, ("f32",))
binary("div.rn", np.divide, ("f32",))
binary("div.full", np.divide, ("f32",))
binary("div.approx", np.divide, ("f32",))
binary("min", minimum, ("f32",))
binary("max", maximum, ("f32",))
binary("min.NaN", lambda a, b: np.where(np.isnan(a) | np.isnan(b), F32(np.nan), minimum(a, b)), ("f32",))
binary("max.NaN", lambda a, b: np.where(np.isnan(a) | np.isnan(b), F32(np.nan), maximum(a, b)), ("f32",))
unary("neg", np.negative, ("f32",))
unary("abs", np.abs, ("f32",))
unary("ex2.approx", lambda a: np.exp2(a.astype(F64)).astype(F32), ("f32",))
unary("ex2.approx.ftz", lambda a: flush(np.exp2(flush(a).astype(F64)).astype(F32)), ("f32",))
unary("rsqrt.approx", lambda a: (1 / np.sqrt(a.astype(F64))).astype(F32), ("f32",))
unary("rsqrt.approx.ftz", lambda a: flush((1 / np.sqrt(flush(a).astype(F64))).astype(F32)), ("f32",))
unary("sqrt.rn", np.sqrt, ("f32",))


@pure("fma.rn.f32")
def fma(one: Instruction) -> Read:
    a, b, c = operands(one)
    return lambda frame: fma32(a(frame), b(frame), c(frame))


@pure("fma.rn.ftz.f32")
def fma_ftz(one: Instruction) -> Read:
    a, b, c = operands(one)
    return lambda frame: flush(fma32(*(flush(x(frame)) for x in (a, b, c))))


# Pairs of 16 bits are computed as twice as many halves.


def _sixteen(name: str, count: int, go: Callable[..., Array]) -> None:
    for kind in ("bf16", "f16"):

        @pure(f"{name}.{kind}")
        def single(one: Instruction, kind: str = kind) -> Read:
            reads = operands(one, "b16")
            return lambda frame: go(*(np.asarray(read(frame)) for read in reads), kind)

        @pure(f"{name}.{kind}x2")
        def double(one: Instruction, kind: str = kind) -> Read:
            reads = operands(one, "b32")

            def halves(frame: Any) -> Any:
                parts = [np.broadcast_to(read(frame), frame.n).copy().view(U16) for read in reads]
                return go(*parts, kind).view(U32)

            return halves


for _name, _function in ARITHMETIC.items():
    for _rounding in ("", ".rn"):
        _sixteen(
            f"{_name}{_rounding}",
            2,
            lambda a, b, kind, f=_function: narrow(f(widen(a, kind), widen(b, kind)), kind),
        )
_sixteen("fma.rn", 3, fma16)
_sixteen("neg", 1, lambda a, kind: a ^ U16(0x8000))
_sixteen("abs", 1, lambda a, kind: a & U16(0x7FFF))
_sixteen("min", 2, lambda a, b, kind: narrow(minimum(widen(a, kind), widen(b, kind)), kind))
_sixteen("max", 2, lambda a, b, kind: narrow(maximum(widen(a, kind), widen(b, kind)), kind))


def _unordered(compare: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip
COMPARE |= {f"{name}u": _unordered(compare) for name, compare in COMPARE.items()}
COMPARE |= {
    "ne": lambda a, b: (a != b) & ~np.isnan(a) & ~np.isnan(b),
    "neu": np.not_equal,
    "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
for _name, _function in COMPARE.items():
    binary(f"setp.{_name}", _function, ("f32",))
    for _kind in ("bf16", "f16"):

        @pure(f"setp.{_name}.{_kind}")
        def _setp(one: Instruction, compare: Any = _function) -> Read:
            kind = last(one)
            a, b = operands(one, "b16")
            return lambda frame: compare(widen(a(frame), kind), widen(b(frame), kind))


# conversions


@pure("cvt.f32.bf16", "cvt.f32.f16")
def cvt_wider(one: Instruction) -> Read:
    (a,) = operands(one, "b16")
    kind = last(one)
    return lambda frame: widen(a(frame), kind)


@pure("cvt.rn.bf16.f32", "cvt.rn.f16.f32")
def cvt_narrower(one: Instruction) -> Read:
    (a,) = operands(one)
    kind = one.opcode.split(".")[2]
    return lambda frame: narrow(np.asarray(a(frame)), kind)


@pure("cvt.rn.bf16x2.f32", "cvt.rn.f16x2.f32")
def cvt_pair(one: Instruction) -> Read:
    """The first operand is the high half."""
    a, b = operands(one)
    kind = one.opcode.split(".")[2][:-2]

    def go(frame: Any) -> Array:
        high, low = (narrow(np.asarray(x(frame)), kind).astype(U32) for x in (a, b))
        return high << U32(16) | low

    return go


@pure(*kinds("cvt.rn.f32", "s32", "u32", "s64", "u64", "s16", "u16"))
def cvt_from_integer(one: Instruction) -> Read:
    (a,) = operands(one)
    return lambda frame: np.asarray(a(frame)).astype(F32)


@pure("cvt.rzi.s32.f32", "cvt.rzi.u32.f32")
def cvt_to_integer(one: Instruction) -> Read:
    """Toward zero, clamped; NaN is 0."""
    (a,) = operands(one)
    limits = np.iinfo(np.int32 if "s32" in one.opcode else U32)

    def go(frame: Any) -> Array:
        x = np.trunc(np.nan_to_num(np.asarray(a(frame)).astype(F64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        return np.clip(x, limits.min, limits.max).astype(limits.dtype)

    return go
