"""Integer, predicate, bit and move instructions (PTX ISA, sections 9.7.1, 9.7.8 and 9.7.9)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from .parser import Imm, Instruction, Program, Reg, Sink, Symbol, Unmodelled, Vector
from .values import (
    SPECIALS,
    TYPES,
    UNSIGNED,
    Array,
    Step,
    assign,
    by_type,
    elementwise,
    models,
    per_lane,
    reader,
    suffix,
)

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


def shift(operation: Callable[[Any, Any], Any], signed: bool, a: Array, by: Array) -> Array:
    """Shift; by the width or more the result is zero, or of a signed number its sign."""
    width = a.dtype.itemsize * 8
    out = operation(a, np.minimum(by, width - 1).astype(a.dtype))
    return out if signed else np.where(by < width, out, a.dtype.type(0))


ARITHMETIC = {"add": np.add, "sub": np.subtract, "mul.lo": np.multiply, "min": np.minimum, "max": np.maximum}
BITWISE = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
SAME = {"setp.eq": np.equal, "setp.ne": np.not_equal}
LESS = {"setp.lt": np.less, "setp.le": np.less_equal, "setp.gt": np.greater, "setp.ge": np.greater_equal}

by_type(ARITHMETIC | {"div": quotient, "rem": np.fmod} | SAME | LESS, 2, *INTS)
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
    elementwise(
        f"mul.hi.{_kind}",
        lambda a, b, mul=_multiply, bits=_bits: (mul(a, b) >> bits).astype(UNSIGNED[bits]),
        _kind,
        _kind,
    )
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


@models("bfe.u32", "bfe.s32")
def bit_field(inst: Instruction, program: Program) -> Step:
    """`length` bits from `begin` on; a signed field is extended by its last bit."""
    to, source, *field = inst.operands
    if not all(isinstance(operand, Imm) for operand in field):
        raise Unmodelled(f"bit field whose position is in a register: {inst.text}")
    begin, length = (operand.value & 0xFF for operand in field)
    if not 0 < length <= 32 - begin:
        raise Unmodelled(f"bit field beyond the register: {inst.text}")
    a, left, right = reader(source, suffix(inst)), 32 - begin - length, 32 - length
    return lambda frame, mask: assign(frame, to, (a(frame) << left) >> right, mask)


@models(*(f"mov.{kind}" for kind in (*BITS, "u16", "u32", "u64", "s32", "f32", "pred")))
def mov(inst: Instruction, program: Program) -> Step:
    to, source = inst.operands
    if isinstance(source, Vector):
        return _pack(to, source)
    if isinstance(to, Vector):
        return _unpack(to, source)
    if isinstance(source, Symbol):
        return _move_symbol(to, source.name, program)
    if isinstance(to, Sink):
        return lambda frame, mask: None
    kind = "pred" if to.width == 1 else f"b{to.width}"
    if kind != suffix(inst) and to.width != int(suffix(inst)[1:]):
        raise Unmodelled(f"move between widths: {inst.text}")
    value = reader(source, kind)
    return lambda frame, mask: assign(frame, to, value(frame), mask)


def _pack(to: Reg, source: Vector) -> Step:
    """The first item is the lowest part."""
    values = [reader(item, f"b{to.width // len(source.items)}") for item in source.items]

    def step(frame: Any, mask: Any) -> None:
        parts = np.stack([per_lane(frame, value(frame)) for value in values], 1)
        assign(frame, to, parts.view(UNSIGNED[to.width])[:, 0], mask)

    return step


def _unpack(to: Vector, source: Any) -> Step:
    if not isinstance(source, Reg):
        raise Unmodelled(f"parts of {source}")
    part = UNSIGNED[source.width // len(to.items)]

    def step(frame: Any, mask: Any) -> None:
        parts = frame.R[source.slot].view(part).reshape(frame.n, -1)
        for i, reg in enumerate(to.items):
            assign(frame, reg, parts[:, i].copy(), mask)

    return step


def _move_symbol(to: Reg, name: str, program: Program) -> Step:
    """Special registers, and the addresses of shared memory and of parameters."""
    dtype = UNSIGNED[to.width].type
    if name in SPECIALS:
        return lambda frame, mask: assign(frame, to, getattr(frame, SPECIALS[name]), mask)
    if axis := re.fullmatch(r"%nctaid\.([xyz])", name):
        return lambda frame, mask: assign(frame, to, np.uint32(frame.grid[axis[1]]), mask)
    if name in program.shared:
        return lambda frame, mask: assign(frame, to, dtype(frame.machine.shared.base), mask)
    if name in {param.name for param in program.params}:
        return lambda frame, mask: assign(frame, to, dtype(frame.machine.params.addresses[name]), mask)
    raise Unmodelled(f"mov of {name}")
