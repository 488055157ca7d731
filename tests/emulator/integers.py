"""Integers, predicates, bits and moves: pure functions of registers (PTX ISA, sections 9.7.1, 9.7.8 and 9.7.9)."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from .text import Imm, Instruction, Program, Reg, Sink, Symbol, Unmodelled, Vector
from .values import SPECIALS, TYPES, UNSIGNED, Array, Read, Step, assign, effect, kinds, last, operands, pure, reader

INTS = ("s16", "u16", "s32", "u32", "s64", "u64")
BITS = ("b16", "b32", "b64")


def binary(name: str, function: Callable[[Any, Any], Any], types: tuple[str, ...]) -> None:
    @pure(*kinds(name, *types))
    def build(one: Instruction) -> Read:
        a, b = operands(one)
        return lambda frame: function(a(frame), b(frame))


def unary(name: str, function: Callable[[Any], Any], types: tuple[str, ...]) -> None:
    @pure(*kinds(name, *types))
    def build(one: Instruction) -> Read:
        (a,) = operands(one)
        return lambda frame: function(a(frame))


def quotient(a: Array, b: Array) -> Array:
    """Toward zero, as the remainder that has the dividend's sign."""
    return (a - np.fmod(a, b)) // b


binary("add", np.add, INTS)
binary("sub", np.subtract, INTS)
binary("mul.lo", np.multiply, INTS)
binary("min", np.minimum, INTS)
binary("max", np.maximum, INTS)
binary("max.relu", lambda a, b: np.maximum(np.maximum(a, b), np.int32(0)), ("s32",))
binary("div", quotient, INTS)
binary("rem", np.fmod, INTS)
binary("and", np.bitwise_and, (*BITS, "pred"))
binary("or", np.bitwise_or, (*BITS, "pred"))
binary("xor", np.bitwise_xor, (*BITS, "pred"))
unary("not", np.invert, (*BITS, "pred"))
unary("neg", np.negative, ("s16", "s32", "s64"))
unary("abs", np.abs, ("s16", "s32", "s64"))


@pure("add.s16x2", "add.u16x2")
def add_pairs(one: Instruction) -> Read:
    """Two halves, without a carry between."""
    a, b = operands(one, "b32")

    def go(frame: Any) -> Any:
        halves = [np.broadcast_to(x(frame), frame.n).copy().view(np.uint16) for x in (a, b)]
        return (halves[0] + halves[1]).view(np.uint32)

    return go


@pure("popc.b32", "popc.b64")
def popc(one: Instruction) -> Read:
    (a,) = operands(one)
    return lambda frame: np.bitwise_count(a(frame)).astype(np.uint32)


@pure(*(f"mul.wide.{kind}" for kind in ("s16", "u16", "s32", "u32")))
def mul_wide(one: Instruction) -> Read:
    kind = last(one)
    a, b = operands(one)
    wide = np.dtype(f"{'i' if kind[0] == 's' else 'u'}{int(kind[1:]) // 4}")
    return lambda frame: np.multiply(a(frame), b(frame), dtype=wide)


@pure(*(f"mul.hi.{kind}" for kind in ("s16", "u16", "s32", "u32")))
def mul_hi(one: Instruction) -> Read:
    a, b = operands(one)
    bits = int(last(one)[1:])
    wide = TYPES[f"{last(one)[0]}{2 * bits}"]
    return lambda frame: (np.multiply(a(frame), b(frame), dtype=wide) >> bits).astype(UNSIGNED[bits])


@pure(*kinds("mad.lo", *INTS))
def mad(one: Instruction) -> Read:
    a, b, c = operands(one)
    return lambda frame: a(frame) * b(frame) + c(frame)


@pure(*(f"mad.wide.{kind}" for kind in ("s16", "u16", "s32", "u32")))
def mad_wide(one: Instruction) -> Read:
    wide_kind = f"{last(one)[0]}{2 * int(last(one)[1:])}"
    a, b = (reader(operand, last(one)) for operand in one.operands[1:3])
    c, wide = reader(one.operands[3], wide_kind), TYPES[wide_kind]
    return lambda frame: np.multiply(a(frame), b(frame), dtype=wide) + c(frame)


def _clamped(shift: Callable[[Any, Any], Any], signed: bool) -> Callable[[Any, Any], Any]:
    """A shift by more than the width: zeros, or of a signed number its sign."""

    def clamped(a: Any, by: Any) -> Any:
        width = a.dtype.itemsize * 8
        out = shift(a, np.minimum(by, width - 1).astype(a.dtype))
        if signed or (np.ndim(by) == 0 and by < width):
            return out
        return np.where(by < width, out, a.dtype.type(0))

    return clamped


def _shifts(name: str, shift: Callable[[Any, Any], Any], types: tuple[str, ...]) -> None:
    for kind in types:
        go = _clamped(shift, kind[0] == "s")

        @pure(f"{name}.{kind}")
        def build(one: Instruction, go: Any = go) -> Read:
            a, by = reader(one.operands[1], last(one)), reader(one.operands[2], "u32")
            return lambda frame: go(np.asarray(a(frame)), by(frame))


_shifts("shl", np.left_shift, BITS)
_shifts("shr", np.right_shift, (*BITS, *INTS))


@pure("bfe.u32", "bfe.s32")
def bfe(one: Instruction) -> Read:
    """`length` bits from `begin` on; of a signed one the last of them repeats above."""
    if not all(isinstance(operand, Imm) for operand in one.operands[2:]):
        raise Unmodelled(f"a field at a place that a register tells: {one.text}")
    begin, length = (operand.value & 0xFF for operand in one.operands[2:])
    if not 0 < length <= 32 - begin:
        raise Unmodelled(f"a field over the edge: {one.text}")
    a = reader(one.operands[1], last(one))
    left, right = 32 - begin - length, 32 - length
    return lambda frame: (a(frame) << left) >> right


@pure("lop3.b32")
def lop3(one: Instruction) -> Read:
    a, b, c = (reader(operand, "b32") for operand in one.operands[1:4])
    table = one.operands[4].value

    def go(frame: Any) -> Any:
        x, y, z = np.asarray(a(frame)), b(frame), c(frame)
        out = np.zeros_like(x)
        for row in range(8):
            if table >> row & 1:
                out = out | (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        return out

    return go


@pure("prmt.b32")
def prmt(one: Instruction) -> Read:
    """Four of the eight bytes of a and b; a selector's high bit repeats the byte's sign instead."""
    a, b, c = operands(one)

    def go(frame: Any) -> Any:
        both = np.asarray(a(frame)).astype(np.uint64) | np.asarray(b(frame)).astype(np.uint64) << np.uint64(32)
        selectors, out = np.asarray(c(frame)).astype(np.uint64), np.uint64(0)
        for i in range(4):
            selector = selectors >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> np.uint64(8) * (selector & np.uint64(7)) & np.uint64(0xFF)
            byte = np.where(selector & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
            out = out | byte << np.uint64(8 * i)
        return np.asarray(out).astype(np.uint32)

    return go


_LESS = {"lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
_SAME = {"eq": np.equal, "ne": np.not_equal}
for _name, _compare in (_LESS | _SAME).items():
    binary(f"setp.{_name}", _compare, (*INTS, *(BITS if _name in _SAME else ())))


@pure(*kinds("selp", *BITS, *INTS, "f32"))
def selp(one: Instruction) -> Read:
    a, b = (reader(operand, last(one)) for operand in one.operands[1:3])
    p = reader(one.operands[3], "pred")
    return lambda frame: np.where(p(frame), a(frame), b(frame))


@pure("cvta.param.u64")
def cvta(one: Instruction) -> Read:
    """The window of parameters lies where the generic address says."""
    return operands(one)[0]


@effect(*kinds("mov", *BITS, "u16", "u32", "u64", "s32", "f32", "pred"))
def mov(one: Instruction, program: Program) -> Step:
    to, source = one.operands
    if isinstance(source, Vector):
        return _packed(to, source)
    if isinstance(to, Vector):
        return _unpacked(to, source)
    if isinstance(source, Symbol):
        return _address(to, source, program)
    if isinstance(to, Sink):
        return lambda frame, mask: None
    kind = {1: "pred", 16: "b16", 32: "b32", 64: "b64"}[to.width]
    value = reader(source, kind)
    if kind != last(one) and UNSIGNED[to.width].itemsize * 8 != int(last(one)[1:]):
        raise Unmodelled(f"a move between widths: {one.text}")
    return lambda frame, mask: assign(frame, to, value(frame), mask)


def _packed(to: Reg, source: Vector) -> Step:
    """The first item is lowest."""
    part = to.width // len(source.items)
    values = [reader(item, f"b{part}") for item in source.items]

    def go(frame: Any, mask: Any) -> None:
        parts = [np.broadcast_to(value(frame), frame.n) for value in values]
        assign(frame, to, np.stack(parts, 1).view(UNSIGNED[to.width])[:, 0], mask)

    return go


def _unpacked(to: Vector, source: Any) -> Step:
    if not isinstance(source, Reg):
        raise Unmodelled(f"parts of {source}")
    part = UNSIGNED[source.width // len(to.items)]

    def go(frame: Any, mask: Any) -> None:
        parts = frame.R[source.slot].view(part).reshape(frame.n, -1)
        for i, reg in enumerate(to.items):
            assign(frame, reg, parts[:, i].copy(), mask)

    return go


def _address(to: Reg, source: Symbol, program: Program) -> Step:
    if source.name in SPECIALS:
        name = SPECIALS[source.name]
        return lambda frame, mask: assign(frame, to, getattr(frame, name), mask)
    if found := re.fullmatch(r"%nctaid\.([xyz])", source.name):
        axis = found[1]
        return lambda frame, mask: assign(frame, to, np.uint32(frame.grid[axis]), mask)
    if source.name in program.shared:
        return lambda frame, mask: assign(frame, to, UNSIGNED[to.width].type(frame.machine.shared.base), mask)
    if source.name in {param.name for param in program.params}:
        dtype = UNSIGNED[to.width]
        return lambda frame, mask: assign(frame, to, dtype.type(frame.machine.params.addresses[source.name]), mask)
    raise Unmodelled(f"mov of {source.name}")


def _convert(to: str, source: str) -> None:
    @pure(f"cvt.{to}.{source}")
    def build(one: Instruction) -> Read:
        a = reader(one.operands[1], source)
        dtype = np.dtype(f"{'i' if to[0] == 's' else 'u'}{int(to[1:]) // 8}")
        return lambda frame: np.asarray(a(frame)).astype(dtype)


for _to in ("s8", "u8", *INTS):
    for _source in ("s8", "u8", *INTS):
        if _to != _source:
            _convert(_to, _source)
