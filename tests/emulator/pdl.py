"""Programmatic dependent launch: a launch that overlaps the ones before it (PTX ISA, section 9.7.13, griddepcontrol).

The emulator runs launches one after the other and looks for accesses that would race: before its griddepcontrol.wait,
a lane may store nothing and read nothing that a launch writes which may still run. These are all launches from the
last ordinary one on, because each of them may start the next one before it has waited itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from .memory import Fault, Region, effective, where
from .parser import Imm, Instruction, Program, Unmodelled
from .values import TYPES, Array, Step, destinations, models, per_lane, reader, suffix

Writes = list[tuple[int, Array]]  # addresses, and which of the bytes from there on were written


def changed_bytes(regions: Iterable[Region], before: Iterable[Array]) -> Writes:
    both = ((region, region.bytes != old) for region, old in zip(regions, before, strict=True))
    return [(region.start, differs) for region, differs in both if differs.any()]


@models("griddepcontrol.launch_dependents")
def launch_dependents(inst: Instruction, program: Program) -> Step:
    return lambda frame, mask: None


@models("griddepcontrol.wait")
def wait(inst: Instruction, program: Program) -> Step:
    def step(frame: Any, mask: Any) -> None:
        frame.before_wait &= False if mask is None else ~mask

    return step


def checked(inst: Instruction, step: Step) -> Step:
    """Add to a step that accesses global memory a check of the lanes that have not waited yet."""
    if ".global" not in inst.opcode:
        return step
    races = _races(inst)

    def checked_step(frame: Any, mask: Any) -> None:
        lanes = frame.before_wait if mask is None else frame.before_wait & mask
        if lanes.any() and (found := races(frame, lanes)).any():
            lane = int(np.argmax(found))
            raise Fault(f"before the wait for the launch that writes there: {inst.text}: {where(frame, lane)}")
        step(frame, mask)

    return checked_step


def _races(inst: Instruction) -> Any:
    """Return a function of a frame and lanes: which of them store, or read bytes that pending launches write."""
    if inst.opcode.startswith("st."):
        return lambda frame, lanes: lanes
    if "bulk" in inst.opcode:

        def unmodelled(frame: Any, lanes: Array) -> Array:
            raise Unmodelled(f"TMA before the wait of a programmatic dependent launch: {inst.text}")

        return unmodelled
    address, count = effective(inst.operands[1], "u64"), reader(Imm(1), "u32")
    if inst.opcode.startswith("ld."):
        size = TYPES[suffix(inst)].itemsize * len(destinations(inst.operands[0]))
    else:
        size = inst.operands[2].value
        count = reader(inst.operands[3], "u32") if len(inst.operands) > 3 else count

    def reads_pending(frame: Any, lanes: Array) -> Array:
        at = per_lane(frame, address(frame)).astype(np.int64)[:, None] + np.arange(size)
        found = np.zeros(frame.n, bool)
        for start, written in frame.machine.memory.pending:
            inside = (at >= start) & (at < start + len(written))
            found |= (inside & written[np.where(inside, at - start, 0)]).any(1)
        return found & lanes & (count(frame) > 0)  # a copy of no bytes ignores its address

    return reads_pending
