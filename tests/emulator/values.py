"""Registers as arrays over lanes, operands as functions that read them, and the table of opcodes that are modelled.

A register of 16, 32 or 64 bits is an array of unsigned integers, a predicate one of booleans; nobody changes an array
that a register holds. The types are the opcodes': an operand is read as one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .text import Imm, Instruction, Pair, Program, Reg, Sink, Symbol, Unmodelled, Vector

Array = np.ndarray
UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
TYPES = {f"{kind}{bits}": UNSIGNED[bits] for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
TYPES |= {name: UNSIGNED[bits] for name, bits in (("bf16", 16), ("bf16x2", 32), ("f16x2", 32))}  # as bits

Read = Callable[[Any], Any]  # of a frame -> an array, or one number for all lanes
Step = Callable[[Any, Any], None]  # of a frame and the lanes that take part; None: all
MODELLED: dict[str, Callable[[Instruction, Program], Step]] = {}


def bits_of(kind: str) -> int:
    return 1 if kind == "pred" else TYPES[kind].itemsize * 8


def reader(operand: Any, kind: str) -> Read:
    """`operand` as values of type `kind`: a register at least as wide, of which the low bits count."""
    dtype, bits = TYPES[kind], bits_of(kind)
    if isinstance(operand, Imm):
        if kind == "pred":
            return _always(np.bool_(operand.value != 0))
        return _always(np.array(operand.value & (1 << bits) - 1, UNSIGNED[bits]).view(dtype)[()])
    if not isinstance(operand, Reg) or operand.width < bits or (operand.width == 1) != (bits == 1):
        raise Unmodelled(f"{operand} as {kind}")
    slot, low = operand.slot, UNSIGNED[bits]
    if operand.width > bits:
        return lambda frame: frame.R[slot].astype(low).view(dtype)
    if dtype == low:
        return lambda frame: frame.R[slot]
    return lambda frame: frame.R[slot].view(dtype)


def _always(value: Any) -> Read:
    return lambda frame: value


def writers(operand: Any) -> list[Reg | Sink]:
    """The registers that an instruction's first operand names."""
    return list(operand.items) if isinstance(operand, (Vector, Pair)) else [operand]


def as_register(value: Any, width: int, n: int) -> Array:
    """`value` as a register of `width` bits keeps it: sign or zeros before a narrower one, by its dtype."""
    value = np.asarray(value)
    if value.dtype.itemsize * 8 < width and width > 1:
        value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width // 8}")
    if value.ndim == 0:
        value = np.full(n, value)
    return value.view(UNSIGNED[width])


def assign(frame: Any, reg: Reg | Sink, value: Any, mask: Any) -> None:
    if isinstance(reg, Sink):
        return
    new = as_register(value, reg.width, frame.n)
    frame.R[reg.slot] = new if mask is None else np.where(mask, new, frame.R[reg.slot])


def guarded(one: Instruction, step: Step, at: int) -> Step:
    """`step` on the lanes that `@p` lets through; notes in the frame that it ran."""
    if one.guard is None:
        return step
    slot, negated = one.guard.slot, one.negated

    def go(frame: Any, mask: Any) -> None:
        taken = ~frame.R[slot] if negated else frame.R[slot]
        if mask is not None:
            taken = taken & mask
        if taken.all():
            taken = None
        elif not taken.any():
            return
        frame.ran[at] = True
        step(frame, taken)

    return go


def pure(*opcodes: str) -> Callable[[Any], Any]:
    """Decorates build(one) -> function of a frame -> the value of the first operand."""

    def declare(build: Any) -> Any:
        for opcode in opcodes:
            MODELLED[opcode] = _pure_step(build)
        return build

    return declare


def _pure_step(build: Any) -> Callable[[Instruction, Program], Step]:
    def make(one: Instruction, program: Program) -> Step:
        value = build(one)
        destinations = writers(one.operands[0])
        if len(destinations) > 1:

            def several(frame: Any, mask: Any) -> None:
                for reg, new in zip(destinations, value(frame), strict=True):
                    assign(frame, reg, new, mask)

            return several
        (reg,) = destinations
        if isinstance(reg, Sink):
            return lambda frame, mask: None
        if not isinstance(reg, Reg):
            raise Unmodelled(f"result of: {one.text}")
        slot, width, dtype = reg.slot, reg.width, UNSIGNED[reg.width]

        def single(frame: Any, mask: Any) -> None:
            new = value(frame)
            if new.dtype != dtype or new.ndim == 0:
                new = as_register(new, width, frame.n)
            frame.R[slot] = new if mask is None else np.where(mask, new, frame.R[slot])

        return single

    return make


def effect(*opcodes: str) -> Callable[[Any], Any]:
    """Decorates build(one, program) -> step."""

    def declare(build: Any) -> Any:
        for opcode in opcodes:
            MODELLED[opcode] = build
        return build

    return declare


def kinds(stem: str, *types: str) -> tuple[str, ...]:
    return tuple(f"{stem}.{kind}" for kind in types)


def last(one: Instruction) -> str:
    """The type that ends the opcode."""
    return one.opcode.rpartition(".")[2]


def operands(one: Instruction, kind: str | None = None, begin: int = 1) -> list[Read]:
    """All operands after the first, as the opcode's last type."""
    return [reader(operand, kind or last(one)) for operand in one.operands[begin:]]


def check_modelled(program: Program) -> None:
    """Every opcode is known, whole; else an error names all that are not."""
    unknown = sorted({one.opcode for one in program.instructions} - MODELLED.keys() - CONTROL)
    if unknown:
        raise Unmodelled(f"{program.name}: not modelled: {', '.join(unknown)}")


CONTROL = {"bra", "bra.uni", "ret", "exit", "bar.sync"} | {
    f"mbarrier.try_wait.parity.{space}.b64" for space in ("shared::cta", "shared")
}


SPECIALS = {"%tid.x": "tid", "%ctaid.x": "x", "%ctaid.y": "y", "%ctaid.z": "z", "%laneid": "lane"}  # arrays of a frame


def symbol(operand: Any) -> str | None:
    return operand.name if isinstance(operand, Symbol) else None
