"""Registers as numpy arrays over lanes, operands as functions that read them, and the table of modelled opcodes.

A register of 16, 32 or 64 bits is an array of unsigned integers, a predicate one of booleans. Steps replace these
arrays and never write into them. Types belong to opcodes: an operand is read as the type that its opcode names.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from .parser import Imm, Instruction, Pair, Program, Reg, Sink, Unmodelled, Vector

Array = np.ndarray
UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}
TYPES = {f"{kind}{bits}": UNSIGNED[bits] for kind in "bu" for bits in (8, 16, 32, 64)}
TYPES |= {f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
TYPES |= {"f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype(bool)}
TYPES |= {name: UNSIGNED[bits] for name, bits in (("bf16", 16), ("bf16x2", 32), ("f16x2", 32))}  # as bits
SPECIALS = {"%tid.x": "tid", "%ctaid.x": "x", "%ctaid.y": "y", "%ctaid.z": "z", "%laneid": "lane"}  # arrays of a frame
# Control instructions, which machine.py executes.
CONTROL = {"bra", "bra.uni", "ret", "exit", "bar.sync"} | {
    f"mbarrier.try_wait.parity.{space}.b64" for space in ("shared::cta", "shared")
}

Read = Callable[[Any], Any]  # of a frame -> an array over its lanes, or one value for all of them
Step = Callable[[Any, Any], None]  # of a frame and a mask of active lanes; None: all
MODELLED: dict[str, Callable[[Instruction, Program], Step]] = {}


def reader(operand: Any, kind: str) -> Read:
    """Return a function that reads `operand` as values of type `kind`: the low bits of a register at least as wide."""
    dtype, bits = TYPES[kind], 1 if kind == "pred" else TYPES[kind].itemsize * 8
    if isinstance(operand, Imm):
        value = operand.value != 0 if kind == "pred" else operand.value & (1 << bits) - 1
        constant = np.array(value, UNSIGNED[bits]).view(dtype)
        return lambda frame: constant
    if not isinstance(operand, Reg) or operand.width < bits or (operand.width == 1) != (bits == 1):
        raise Unmodelled(f"{operand} as {kind}")
    slot, low = operand.slot, UNSIGNED[bits]
    if operand.width > bits:
        return lambda frame: frame.R[slot].astype(low).view(dtype)
    if dtype == low:
        return lambda frame: frame.R[slot]
    return lambda frame: frame.R[slot].view(dtype)


def destinations(operand: Any) -> list[Reg | Sink]:
    return list(operand.items) if isinstance(operand, (Vector, Pair)) else [operand]


def assign(frame: Any, reg: Reg | Sink, value: Any, mask: Any) -> None:
    """Write `value`, one for all lanes or one a lane, to the masked lanes; its dtype decides about sign extension."""
    if isinstance(reg, Sink):
        return
    dtype = UNSIGNED[reg.width]
    if value.dtype != dtype or value.ndim == 0:
        if value.dtype.itemsize < dtype.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
        value = np.full(frame.n, value).view(dtype) if value.ndim == 0 else value.view(dtype)
    whole = mask is None or mask is frame.all
    frame.R[reg.slot] = value if whole else np.where(mask, value, frame.R[reg.slot])


def guarded(inst: Instruction, step: Step, at: int) -> Step:
    """Restrict `step` to the lanes whose guard predicate holds, and record in the frame that some ran it."""
    if inst.guard is None:
        return step
    slot, negated = inst.guard.slot, inst.negated

    def guarded_step(frame: Any, mask: Any) -> None:
        active = ~frame.R[slot] if negated else frame.R[slot]
        if mask is not None:
            active = active & mask
        if active.all():
            active = None
        elif not active.any():
            return
        frame.ran[at] = True
        step(frame, active)

    return guarded_step


def executes(*opcodes: str) -> Callable[[Any], Any]:
    """Register a function of an instruction, a frame and the mask of its active lanes, which executes these opcodes."""

    def register(function: Any) -> Any:
        def build(inst: Instruction, program: Program) -> Step:
            return lambda frame, mask: function(inst, frame, frame.all if mask is None else mask)

        MODELLED.update(dict.fromkeys(opcodes, build))
        return function

    return register


def elementwise(opcode: str, function: Callable[..., Any], *types: str) -> None:
    """Model an opcode by a numpy function of its source operands, which have these types."""

    def build(inst: Instruction, program: Program) -> Step:
        target, *sources = inst.operands
        if not isinstance(target, (Reg, Sink)):
            raise Unmodelled(f"result of: {inst.text}")
        reads = [reader(source, kind) for source, kind in zip(sources, types, strict=True)]
        return lambda frame, mask: assign(frame, target, function(*(read(frame) for read in reads)), mask)

    build.types = types
    MODELLED[opcode] = build


def by_type(table: dict[str, Callable[..., Any]], arity: int, *types: str) -> None:
    """Model each name of the table for each type, which all operands have: add -> add.s32, add.u32, ..."""
    for name, function in table.items():
        for kind in types:
            elementwise(f"{name}.{kind}", function, *[kind] * arity)


def suffix(inst: Instruction) -> str:
    return inst.opcode.rpartition(".")[2]


def read(frame: Any, operand: Any, kind: str) -> Array:
    return reader(operand, kind)(frame)


def per_lane(frame: Any, value: Any) -> Array:
    return np.broadcast_to(value, frame.n)


def per_warp(frame: Any, operand: Any, kind: str = "b32") -> Array:
    """Return an operand as [warps, 32]."""
    return per_lane(frame, read(frame, operand, kind)).reshape(-1, 32)
