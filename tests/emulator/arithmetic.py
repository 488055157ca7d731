"""Arithmetic, predicate, bit, move and conversion instructions (PTX ISA, sections 9.7.1 to 9.7.5, 9.7.8 and 9.7.9).

Floats are correctly rounded; `.ftz` flushes subnormals. Last bits differ from a GPU's in approximate instructions, as
they are correctly rounded as well, and in an fma whose sum fp64 rounds to a tie, which is rare. The payload of a NaN is
not modelled: a GPU produces 0x7fffffff, and no kernel reads it.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .parser import Imm, Instruction, Pair, Reg, Symbol, Unmodelled, Vector
from .values import SPECIALS, TYPES, UNSIGNED, Array, assign, by_type, elementwise, executes, per_lane, read, suffix

F32, F64, U16, U32 = np.float32, np.float64, np.uint16, np.uint32
TINY = F32(2.0**-126)
HALVES = ("bf16", "f16")


def flush(x: Array) -> Array:
    """Replace subnormals by zeros of their sign."""
    return np.where(np.abs(x) < TINY, np.copysign(F32(0), x), x)


def fma32(a: Any, b: Any, c: Any) -> Array:
    return (np.multiply(a, b, dtype=F64) + c).astype(F32)


def to_fp32(bits: Any, kind: str) -> Array:
    bits = np.asarray(bits)
    return (bits.astype(U32) << U32(16)).view(F32) if kind == "bf16" else bits.view(np.float16).astype(F32)


def from_fp32(x: Any, kind: str) -> Array:
    """Convert fp32, of fp16 also fp64, to the bits of a 16-bit float: to nearest, ties to even."""
    x = np.asarray(x)
    if kind == "f16":
        rounded = x.astype(np.float16).view(U16)
    else:
        bits = x.view(U32)
        rounded = ((bits + U32(0x7FFF) + (bits >> U32(16) & U32(1))) >> U32(16)).astype(U16)
    return np.where(np.isnan(x), U16(0x7FFF), rounded)


_MAGNITUDES = np.arange(127)  # of e4m3, whose code 127 is NaN
_E4M3 = np.where(
    _MAGNITUDES < 8, _MAGNITUDES * 2.0**-9, (8 + _MAGNITUDES % 8) * 2.0 ** (_MAGNITUDES // 8 - 10.0)
)  # ascending
FROM_E4M3 = np.concatenate((_E4M3, [np.nan], -_E4M3, [np.nan]))  # by code


def to_e4m3(x: Array) -> Array:
    """Convert fp32 to codes, to nearest, ties to even, beyond the largest value to that."""
    size = np.minimum(np.abs(x).astype(F64), _E4M3[-1])
    above = np.searchsorted(_E4M3, np.nan_to_num(size))
    below = np.maximum(above - 1, 0)
    middle = (_E4M3[below] + _E4M3[above]) / 2
    code = np.where((size < middle) | ((size == middle) & (below % 2 == 0)), below, above)
    return np.where(np.isnan(x), 127, code | np.signbit(x) * 128).astype(np.uint8)


def _cvt_e4m3_pair(high: Array, low: Array) -> Array:
    return to_e4m3(high).astype(U16) << U16(8) | to_e4m3(low)


def fma16(a: Any, b: Any, c: Any, kind: str) -> Array:
    x, y, z = (to_fp32(bits, kind).astype(F64) for bits in (a, b, c))
    return from_fp32((x * y + z).astype(F32) if kind == "bf16" else x * y + z, kind)


def _extreme(pick: Callable[[Any, Any], Any], zeros: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Array]:
    """Return the number of a number and a NaN; -0 is less than +0."""

    def extreme(a: Any, b: Any) -> Array:
        out = np.asarray(pick(a, b))
        both = (a == 0) & (b == 0)
        if np.any(both):
            out = np.where(both, zeros(a.astype(F32).view(U32), b.astype(F32).view(U32)).view(F32), out)
        return out

    return extreme


def _exp2(a: Array) -> Array:
    return np.exp2(a.astype(F64)).astype(F32)


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
EXTREMES = {"min": _extreme(np.fmin, np.bitwise_or), "max": _extreme(np.fmax, np.bitwise_and)}
DIVIDE = dict.fromkeys(("div.full", "div.approx", "div.rn"), np.divide)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": np.negative,
    "abs": np.abs,
    "ex2.approx": _exp2,
    "ex2.approx.ftz": lambda a: flush(_exp2(flush(a))),
    "rsqrt.approx.ftz": lambda a: flush((1 / np.sqrt(flush(a).astype(F64))).astype(F32)),
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

by_type(ARITHMETIC | DIVIDE | EXTREMES | COMPARE, 2, "f32")
by_type(FUNCTIONS, 1, "f32")
by_type({"fma.rn": fma32, "fma.rn.ftz": lambda *args: flush(fma32(*map(flush, args)))}, 3, "f32")


def _halves(function: Callable[..., Array], *pairs: Array) -> Array:
    """Apply a function of 16-bit operands to both halves of 32-bit ones."""
    pairs = tuple(pair.copy() for pair in np.broadcast_arrays(*pairs))
    return function(*(pair.view(U16) for pair in pairs)).view(U32)


def _in_fp32(function: Callable[[Any, Any], Any], a: Array, b: Array, kind: str) -> Array:
    return function(to_fp32(a, kind), to_fp32(b, kind))


SIXTEEN_BITS: dict[str, tuple[int, Callable[..., Array]]] = {"fma.rn": (3, fma16)}
SIXTEEN_BITS["abs"] = 1, lambda a, kind: a & U16(0x7FFF)
for _name, _function in {"add": np.add, "sub": np.subtract, "mul": np.multiply, **EXTREMES}.items():
    SIXTEEN_BITS[_name] = 2, lambda a, b, kind, f=_function: from_fp32(_in_fp32(f, a, b, kind), kind)


def _cvt_pair(high: Array, low: Array, kind: str) -> Array:
    return from_fp32(high, kind).astype(U32) << U32(16) | from_fp32(low, kind)


for _kind in HALVES:
    for _name, (_arity, _function) in SIXTEEN_BITS.items():
        _single = partial(_function, kind=_kind)
        elementwise(f"{_name}.{_kind}", _single, *["b16"] * _arity)
        elementwise(f"{_name}.{_kind}x2", partial(_halves, _single), *["b32"] * _arity)
    for _name, _compare in COMPARE.items():
        elementwise(f"{_name}.{_kind}", partial(_in_fp32, _compare, kind=_kind), "b16", "b16")
    elementwise(f"cvt.f32.{_kind}", partial(to_fp32, kind=_kind), "b16")
    elementwise(f"cvt.rn.{_kind}.f32", partial(from_fp32, kind=_kind), "f32")
    elementwise(f"cvt.rn.{_kind}x2.f32", partial(_cvt_pair, kind=_kind), "f32", "f32")
elementwise("cvt.rn.satfinite.e4m3x2.f32", _cvt_e4m3_pair, "f32", "f32")
# Towards zero, saturated; a NaN is 0.
elementwise("cvt.rzi.s16.f32", lambda a: np.clip(np.nan_to_num(a), -(1 << 15), (1 << 15) - 1).astype(np.int16), "f32")
by_type({"cvt.rn.f32": lambda a: a.astype(F32)}, 1, "s32", "u32", "s64", "u64", "s16", "u16", "s8", "u8")
elementwise("cvt.rn.f16.s16", lambda a: from_fp32(a.astype(F32), "f16"), "s16")


@executes(*(f"{name}.{kind}x2" for name in COMPARE for kind in HALVES))
def compare_pairs(inst: Instruction, frame: Any, mask: Any) -> None:
    """Compare the low halves for the first predicate, the high halves for the second."""
    (predicates, *pairs), kind = inst.operands, suffix(inst)
    if not isinstance(predicates, Pair):
        raise Unmodelled(f"one predicate of a pair: {inst.text}")
    halves = (per_lane(frame, read(frame, pair, "b32")).copy().view(U16).reshape(-1, 2) for pair in pairs)
    holds = _in_fp32(COMPARE[inst.opcode.removesuffix(f".{kind}")], *halves, kind.removesuffix("x2"))
    for i, predicate in enumerate(predicates.items):
        assign(frame, predicate, holds[:, i], mask)


NARROW = ("s16", "u16", "s32", "u32")
INTS = (*NARROW, "s64", "u64")
BITS = ("b16", "b32", "b64")


def quotient(a: Array, b: Array) -> Array:
    """Divide toward zero: the remainder has the dividend's sign."""
    return (a - np.fmod(a, b)) // b


def add_halves(a: Array, b: Array) -> Array:
    """Add the two halves without a carry between them."""
    high, low = np.uint32(0xFFFF_0000), np.uint32(0xFFFF)
    return (a & high) + (b & high) | (a + b) & low


def lop3(a: Array, b: Array, c: Array, table: Array) -> Array:
    out = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            out = out | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def prmt(a: Array, b: Array, selectors: Array) -> Array:
    """Select four of the eight bytes of a and b; a selector's high bit repeats the byte's sign bit."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.uint64(0)
    for i in range(4):
        selector = selectors.astype(np.uint64) >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> np.uint64(8) * (selector & np.uint64(7)) & np.uint64(0xFF)
        byte = np.where(selector & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
        out = out | byte << np.uint64(8 * i)
    return np.asarray(out).astype(np.uint32)


def mul_high(multiply: Callable[[Any, Any], Any], bits: int, a: Array, b: Array) -> Array:
    return (multiply(a, b) >> bits).astype(UNSIGNED[bits])


def shift(operation: Callable[[Any, Any], Any], signed: bool, a: Array, by: Array) -> Array:
    """Shift; by the width or more the result is zero, or of a signed number its sign."""
    width = a.dtype.itemsize * 8
    out = operation(a, np.minimum(by, width - 1).astype(a.dtype))
    return out if signed else np.where(by < width, out, a.dtype.type(0))


INTEGER = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
SAME = {"setp.eq": np.equal, "setp.ne": np.not_equal}
LESS = {"setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater, "setp.ge": np.greater_equal}

by_type(INTEGER | {"div": quotient, "rem": np.fmod} | SAME | LESS, 2, *INTS)
by_type({"mad.lo": lambda a, b, c: a * b + c}, 3, *INTS)
by_type({"max.relu": lambda a, b: np.maximum(np.maximum(a, b), np.int32(0))}, 2, "s32")
by_type(BITWISE, 2, *BITS, "pred")
by_type(SAME, 2, *BITS)
by_type({"not": np.invert}, 1, *BITS, "pred")
by_type({"neg": np.negative, "abs": np.abs}, 1, "s16", "s32", "s64")
by_type({"popc": lambda a: np.bitwise_count(a).astype(np.uint32)}, 1, "b32", "b64")
by_type({"cvta.param": lambda a: a}, 1, "u64")  # parameters lie at their generic addresses
by_type({"prmt": prmt}, 3, "b32")
by_type({"lop3": lop3}, 4, "b32")
for _kind in ("s16x2", "u16x2"):
    elementwise(f"add.{_kind}", add_halves, "b32", "b32")
for _kind in NARROW:
    _bits, _wide = int(_kind[1:]), f"{_kind[0]}{2 * int(_kind[1:])}"
    _multiply = partial(np.multiply, dtype=TYPES[_wide])
    elementwise(f"mul.wide.{_kind}", _multiply, _kind, _kind)
    elementwise(f"mad.wide.{_kind}", lambda a, b, c, mul=_multiply: mul(a, b) + c, _kind, _kind, _wide)
    elementwise(f"mul.hi.{_kind}", partial(mul_high, _multiply, _bits), _kind, _kind)
for _kind in BITS:
    elementwise(f"shl.{_kind}", partial(shift, np.left_shift, False), _kind, "u32")
for _kind in (*BITS, *INTS):
    elementwise(f"shr.{_kind}", partial(shift, np.right_shift, _kind[0] == "s"), _kind, "u32")
for _kind in (*BITS, *INTS, "f32"):
    elementwise(f"selp.{_kind}", lambda a, b, p: np.where(p, a, b), _kind, _kind, "pred")
for _to in ("s8", "u8", *INTS):
    for _source in ("s8", "u8", *INTS):
        if _to != _source:
            elementwise(f"cvt.{_to}.{_source}", lambda a, to=TYPES[_to]: a.astype(to), _source)


@executes("bfe.u32", "bfe.s32")
def bit_field(inst: Instruction, frame: Any, mask: Any) -> None:
    """`length` bits from `begin` on; a signed field is extended by its last bit."""
    to, source, *field = inst.operands
    if not all(isinstance(operand, Imm) for operand in field):
        raise Unmodelled(f"bit field whose position is in a register: {inst.text}")
    begin, length = (operand.value & 0xFF for operand in field)
    if not 0 < length <= 32 - begin:
        raise Unmodelled(f"bit field beyond the register: {inst.text}")
    a, left, right = read(frame, source, suffix(inst)), 32 - begin - length, 32 - length
    assign(frame, to, (a << left) >> right, mask)


@executes(*(f"mov.{kind}" for kind in (*BITS, "u16", "u32", "u64", "s32", "f32", "pred")))
def mov(inst: Instruction, frame: Any, mask: Any) -> None:
    """Move a value, or split it into a vector or join one, whose first item is the lowest part."""
    to, source = inst.operands
    if isinstance(source, Vector):
        kind = f"b{to.width // len(source.items)}"
        parts = np.stack([per_lane(frame, read(frame, item, kind)) for item in source.items], 1)
        assign(frame, to, parts.view(UNSIGNED[to.width])[:, 0], mask)
    elif isinstance(to, Vector):
        if not isinstance(source, Reg):
            raise Unmodelled(f"parts of {source}")
        parts = frame.R[source.slot].view(UNSIGNED[source.width // len(to.items)]).reshape(frame.n, -1)
        for i, reg in enumerate(to.items):
            assign(frame, reg, parts[:, i].copy(), mask)
    elif isinstance(source, Symbol):
        assign(frame, to, symbol_value(frame, source.name, UNSIGNED[to.width].type), mask)
    elif isinstance(to, Reg):
        kind = "pred" if to.width == 1 else f"b{to.width}"
        if kind != suffix(inst) and to.width != int(suffix(inst)[1:]):
            raise Unmodelled(f"move between widths: {inst.text}")
        assign(frame, to, read(frame, source, kind), mask)


def symbol_value(frame: Any, name: str, dtype: Any) -> Any:
    """Return a special register, or the address of shared memory or of a parameter."""
    machine = frame.machine
    if name in SPECIALS:
        return getattr(frame, SPECIALS[name])
    if axis := re.fullmatch(r"%nctaid\.([xyz])", name):
        return np.uint32(frame.grid[axis[1]])
    if name in machine.code.program.shared:
        return dtype(machine.shared.base)
    if name in machine.params.addresses:
        return dtype(machine.params.addresses[name])
    raise Unmodelled(f"mov of {name}")
