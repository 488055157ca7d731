"""mbarriers: objects in shared memory that count arrivals and bytes (PTX ISA, section 9.7.13.15)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import Fault, effective, where
from .text import Instruction, Program
from .values import Array, Step, effect, reader

SPACES = ("shared::cta", "shared")


@dataclass
class Barrier:
    """`parity` of the phase that is under way; `copies`: places and sizes that came in it and in the one before."""

    count: int
    pending: int
    bytes: int = 0
    parity: int = 0
    copies: list[tuple[int, int]] = field(default_factory=list)
    landed: list[tuple[int, int]] = field(default_factory=list)

    def advance(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.parity = self.count, self.parity ^ 1
            self.landed, self.copies = self.copies, []


class Barriers:
    """Those of a batch of blocks, by their place in its shared memory."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.objects: dict[int, Barrier] = {}
        self.flying: list[Any] = []  # copies, each a function that lands it

    def find(self, at: int, one: Instruction, frame: Any, lane: int) -> Barrier:
        if at not in self.objects:
            raise Fault(f"no mbarrier there: {one.text}: {where(frame, lane)}")
        return self.objects[at]

    def arrive(self, barrier: Barrier, announced: int) -> None:
        barrier.bytes += announced
        barrier.pending -= 1
        barrier.advance()

    def complete(self, barrier: Barrier, size: int) -> None:
        barrier.bytes -= size
        barrier.advance()

    def over(self, frame: Any, one: Instruction, lanes: Array, look: bool = True) -> Array:
        """Of `lanes`, those that wait for a phase that is over. `look`: they see what was copied in it."""
        at = self.machine.shared.offsets(frame, effective(one.operands[1], "u32")(frame), 8, lanes)
        parity = np.broadcast_to(reader(one.operands[2], "u32")(frame), frame.n)
        places = np.flatnonzero(lanes)
        if look:
            self.machine.log.read(frame, places, at, 8, one)
        keys, which = np.unique(np.stack((at[places], parity[places] & 1)), axis=1, return_inverse=True)
        out = np.zeros(frame.n, bool)
        for i, (place, phase) in enumerate(keys.T.tolist()):
            own = places[which.reshape(-1) == i]
            barrier = self.find(place, one, frame, int(own[0]))
            if barrier.parity != phase:
                out[own] = True
                for warp in np.unique(frame.warp[own]).tolist() if look else ():
                    for start, size in barrier.landed:
                        self.machine.log.seen(start, size, warp)
        return out

    def land(self) -> bool:
        """Late copies come at last -> whether there were any."""
        flying, self.flying = self.flying, []
        for copy in flying:
            copy()
        return bool(flying)

    def check_end(self) -> None:
        if self.flying:
            raise Fault(f"nobody waited for a copy of {self.machine.code.program.name}")
        for at, barrier in self.objects.items():
            if barrier.bytes or barrier.pending != barrier.count or barrier.copies:
                raise Fault(f"an mbarrier at {at} waits for {barrier.bytes} bytes at the end")


def each_lane(one: Instruction, address: Any, go: Any) -> Step:
    """go(frame, lane, place of the mbarrier) for each lane, one after the other."""

    def step(frame: Any, mask: Any) -> None:
        lanes = np.arange(frame.n) if mask is None else np.flatnonzero(mask)
        at = frame.machine.shared.offsets(frame, address(frame), 8, mask)
        for lane in lanes.tolist():
            go(frame, lane, int(at[lane]))

    return step


@effect(*(f"mbarrier.init.{space}.b64" for space in SPACES))
def init(one: Instruction, program: Program) -> Step:
    count = one.operands[1].value

    def go(frame: Any, lane: int, at: int) -> None:
        objects = frame.machine.barriers.objects
        if at in objects:
            raise Fault(f"an mbarrier is there already: {one.text}: {where(frame, lane)}")
        frame.machine.log.own(frame, [lane], np.array([at]), one)
        objects[at] = Barrier(count, count)

    return each_lane(one, effective(one.operands[0], "u32"), go)


@effect(*(f"mbarrier.inval.{space}.b64" for space in SPACES))
def inval(one: Instruction, program: Program) -> Step:
    def go(frame: Any, lane: int, at: int) -> None:
        barriers = frame.machine.barriers
        barrier = barriers.find(at, one, frame, lane)
        if barrier.bytes or barrier.pending != barrier.count:
            raise Fault(f"a phase is under way: {one.text}: {where(frame, lane)}")
        frame.machine.log.disown(frame, [lane], np.array([at]), one)
        del barriers.objects[at]

    return each_lane(one, effective(one.operands[0], "u32"), go)


@effect(*(f"mbarrier.arrive.expect_tx.{space}.b64" for space in SPACES))
def arrive(one: Instruction, program: Program) -> Step:
    announced = reader(one.operands[2], "u32")

    def go(frame: Any, lane: int, at: int) -> None:
        machine = frame.machine
        machine.log.read(frame, [lane], np.broadcast_to(at, frame.n), 8, one)
        barrier = machine.barriers.find(at, one, frame, lane)
        machine.barriers.arrive(barrier, int(np.broadcast_to(announced(frame), frame.n)[lane]))

    return each_lane(one, effective(one.operands[1], "u32"), go)
