"""cp.async: copies from global to shared memory that a thread waits for by groups (PTX ISA, section 9.7.9.25.3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from .memory import CHUNKS, culprit, effective
from .text import Imm, Instruction, Program, Unmodelled
from .values import Array, Step, effect, reader


@dataclass
class Flight:
    """What an instruction began, and the lanes that have not yet waited for it."""

    one: Instruction
    lanes: Array
    group: Array
    load: Any


class Flights:
    """In order. Groups are counted lane by lane."""

    def __init__(self, n: int) -> None:
        self.n, self.pending = n, list[Flight]()
        self.committed = np.zeros(n, np.int32)

    def begin(self, one: Instruction, mask: Any, load: Any) -> Flight:
        lanes = np.ones(self.n, bool) if mask is None else mask.copy()
        self.pending.append(Flight(one, lanes, self.committed.copy(), load))
        return self.pending[-1]

    def commit(self, mask: Any) -> None:
        self.committed += 1 if mask is None else mask.astype(np.int32)

    def waits(self, youngest: int, mask: Any) -> bool:
        """Whether anything would end now."""
        lanes = True if mask is None else mask
        return any((one.lanes & (one.group < self.committed - youngest) & lanes).any() for one in self.pending)

    def due(self, youngest: int, mask: Any) -> Iterator[tuple[Flight, Array]]:
        """All but the `youngest` committed groups end -> each flight, and the lanes for which it ends now."""
        rest = []
        for flight in self.pending:
            now = flight.lanes & (flight.group < self.committed - youngest)
            if mask is not None:
                now &= mask
            if now.any():
                flight.lanes &= ~now
                yield flight, now
            if flight.lanes.any():
                rest.append(flight)
        self.pending = rest


@effect("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def copy(one: Instruction, program: Program) -> Step:
    to, source, size, *rest = one.operands
    if not isinstance(size, Imm) or len(rest) > 1:
        raise Unmodelled(one.text)
    n, count = size.value, reader(rest[0], "u32") if rest else (lambda frame: np.uint32(size.value))
    target, address = effective(to, "u32"), effective(source, "u64")

    def go(frame: Any, mask: Any) -> None:
        """Bytes that are not read are zeros: this is the mask."""
        machine = frame.machine
        at = machine.shared.offsets(frame, target(frame), n, mask)
        bytes_read = np.broadcast_to(count(frame), frame.n)
        reads = (bytes_read != 0) if mask is None else (bytes_read != 0) & mask
        if (reads & (bytes_read != n)).any():
            raise Unmodelled(f"a part of {n} bytes: {one.text}")
        values = np.zeros(frame.n, CHUNKS[n])
        if reads.any():
            values[reads] = machine.memory.load(address(frame)[reads], n, culprit(frame, reads, one.text))
        lanes = slice(None) if mask is None else np.flatnonzero(mask)
        machine.log.fly(frame, lanes, at[lanes], n, one)
        frame.copies.begin(one, mask, (at, values, n))
        if not machine.schedule.late:
            machine.shared.views[n][at[lanes] // n] = values[lanes]

    return go


@effect("cp.async.commit_group")
def commit(one: Instruction, program: Program) -> Step:
    return lambda frame, mask: frame.copies.commit(mask)


@effect("cp.async.wait_group")
def wait(one: Instruction, program: Program) -> Step:
    youngest = one.operands[0].value

    def go(frame: Any, mask: Any) -> None:
        machine = frame.machine
        for flight, now in frame.copies.due(youngest, mask):
            at, values, n = flight.load
            lanes = np.flatnonzero(now)
            if machine.schedule.late:
                machine.shared.views[n][at[lanes] // n] = values[lanes]
            machine.log.land(frame, lanes, at[lanes], n)

    return go
