"""A launch that begins before those in front of it have ended (PTX ISA, section 9.7.13, griddepcontrol).

Here launches run one after the other, so what would be a race is looked for: until it has waited, a lane stores
nothing, and reads nothing of what launches write that may still run. Those are all since, and with, the last ordinary
one: each lets the next begin before it has waited itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .memory import Fault, Region, effective, where
from .text import Imm, Instruction, Program, Unmodelled
from .values import TYPES, Array, Step, effect, last, reader, writers

Written = list[tuple[int, Array]]  # an address, and which of the bytes from there


def changed(regions: Iterable[Region], before: Iterable[Array]) -> Written:
    both = ((region, region.bytes != old) for region, old in zip(regions, before, strict=True))
    return [(region.start, differ) for region, differ in both if differ.any()]


@effect("griddepcontrol.launch_dependents")
def launch_dependents(one: Instruction, program: Program) -> Step:
    return lambda frame, mask: None


@effect("griddepcontrol.wait")
def wait(one: Instruction, program: Program) -> Step:
    def go(frame: Any, mask: Any) -> None:
        frame.early &= False if mask is None else ~mask

    return go


def watched(one: Instruction, step: Step) -> Step:
    """`step`, of an instruction that reaches global memory, with a look at lanes that have not waited yet."""
    if ".global" not in one.opcode:
        return step
    touches = _touches(one)

    def go(frame: Any, mask: Any) -> None:
        lanes = frame.early if mask is None else frame.early & mask
        if lanes.any() and (wrong := touches(frame, lanes)).any():
            lane = int(np.argmax(wrong))
            raise Fault(f"before it waits for the launch that writes there: {one.text}: {where(frame, lane)}")
        step(frame, mask)

    return go


def _touches(one: Instruction) -> Any:
    """-> function of a frame and lanes: which of these store, or read what earlier launches write."""
    if one.opcode.startswith("st."):
        return lambda frame, lanes: lanes
    if "bulk" in one.opcode:
        return lambda frame, lanes: _refuse(one)
    address, count = effective(one.operands[1], "u64"), reader(Imm(1), "u32")
    if one.opcode.startswith("ld."):
        size = TYPES[last(one)].itemsize * len(writers(one.operands[0]))
    else:
        size = one.operands[2].value
        count = reader(one.operands[3], "u32") if len(one.operands) > 3 else count

    def reads(frame: Any, lanes: Array) -> Array:
        """Of a copy that takes no bytes the address means nothing."""
        at = np.broadcast_to(address(frame), frame.n).astype(np.int64)[:, None] + np.arange(size)
        wrong = np.zeros(frame.n, bool)
        for start, written in frame.machine.memory.unsettled:
            inside = (at >= start) & (at < start + len(written))
            wrong |= (inside & written[np.where(inside, at - start, 0)]).any(1)
        return wrong & lanes & (count(frame) > 0)

    return reads


def _refuse(one: Instruction) -> Array:
    raise Unmodelled(f"in a launch that began early, before it waits: {one.text}")
