"""Asynchronous copies to shared memory: cp.async and its groups, mbarriers, TMA (PTX ISA 9.7.9.25-27, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import CHUNKS, SHARED_BASE, Fault, describe_lane, effective, where
from .parser import Address, Imm, Instruction, Program, Unmodelled
from .values import Array, Step, lane_indices, models, per_lane, reader

SPACES = ("shared::cta", "shared")


@dataclass
class AsyncOperation:
    """An asynchronous instruction and the lanes that have not yet waited for it."""

    inst: Instruction
    lanes: Array
    group: Array
    data: Any


class AsyncGroups:
    """Pending asynchronous operations of a frame, in order; each lane counts its own groups."""

    def __init__(self, n: int) -> None:
        self.n, self.pending = n, list[AsyncOperation]()
        self.committed = np.zeros(n, np.int32)

    def begin(self, inst: Instruction, mask: Any, data: Any) -> None:
        lanes = np.ones(self.n, bool) if mask is None else mask.copy()
        self.pending.append(AsyncOperation(inst, lanes, self.committed.copy(), data))

    def commit(self, mask: Any) -> None:
        self.committed += 1 if mask is None else mask.astype(np.int32)

    def would_wait(self, youngest: int, mask: Any) -> bool:
        """Return whether a wait for all but the `youngest` groups would complete anything."""
        lanes = True if mask is None else mask
        return any((op.lanes & (op.group < self.committed - youngest) & lanes).any() for op in self.pending)

    def complete(self, youngest: int, mask: Any) -> Iterator[tuple[AsyncOperation, Array]]:
        """Complete all but the `youngest` committed groups; yield each operation and its completed lanes."""
        rest = []
        for op in self.pending:
            completed = op.lanes & (op.group < self.committed - youngest)
            if mask is not None:
                completed &= mask
            if completed.any():
                op.lanes &= ~completed
                yield op, completed
            if op.lanes.any():
                rest.append(op)
        self.pending = rest


@models("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def copy(inst: Instruction, program: Program) -> Step:
    """The optional fourth operand is the number of bytes to read, here all or none; the rest is filled with zeros."""
    to, source, size_operand, *rest = inst.operands
    if not isinstance(size_operand, Imm) or len(rest) > 1:
        raise Unmodelled(inst.text)
    size, count = size_operand.value, reader(rest[0] if rest else size_operand, "u32")
    target, address = effective(to, "u32"), effective(source, "u64")

    def step(frame: Any, mask: Any) -> None:
        machine = frame.machine
        offsets = machine.shared.offsets(frame, target(frame), size, mask)
        bytes_read = per_lane(frame, count(frame))
        reads = (bytes_read != 0) if mask is None else (bytes_read != 0) & mask
        if (reads & (bytes_read != size)).any():
            raise Unmodelled(f"copy of a part of {size} bytes: {inst.text}")
        values = np.zeros(frame.n, CHUNKS[size])
        if reads.any():
            values[reads] = machine.memory.load(address(frame)[reads], size, describe_lane(frame, reads, inst.text))
        lanes = slice(None) if mask is None else np.flatnonzero(mask)
        machine.log.begin_copy(frame, lanes, offsets[lanes], size, inst)
        frame.copies.begin(inst, mask, (offsets, values, size))
        if not machine.schedule.late:
            machine.shared.views[size][offsets[lanes] // size] = values[lanes]

    return step


@models("cp.async.commit_group")
def commit(inst: Instruction, program: Program) -> Step:
    return lambda frame, mask: frame.copies.commit(mask)


@models("cp.async.wait_group")
def wait(inst: Instruction, program: Program) -> Step:
    youngest = inst.operands[0].value

    def step(frame: Any, mask: Any) -> None:
        machine = frame.machine
        for op, completed in frame.copies.complete(youngest, mask):
            offsets, values, size = op.data
            lanes = np.flatnonzero(completed)
            if machine.schedule.late:
                machine.shared.views[size][offsets[lanes] // size] = values[lanes]
            machine.log.complete_copy(frame, lanes, offsets[lanes], size)

    return step


@dataclass
class Barrier:
    """An mbarrier: `parity` of the current phase; ranges (offset, size) copied in it and in the one before."""

    count: int
    arrivals: int
    bytes: int = 0
    parity: int = 0
    copied: list[tuple[int, int]] = field(default_factory=list)
    copied_before: list[tuple[int, int]] = field(default_factory=list)

    @property
    def in_phase(self) -> bool:
        return bool(self.bytes or self.arrivals != self.count)

    def update(self, arrivals: int = 0, announced: int = 0) -> None:
        """Count arrivals and announced bytes; the phase ends when nothing is missing."""
        self.arrivals -= arrivals
        self.bytes += announced
        if self.arrivals == 0 and self.bytes == 0:
            self.arrivals, self.parity = self.count, self.parity ^ 1
            self.copied_before, self.copied = self.copied, []


class Barriers:
    """The mbarriers of a batch of blocks, by their offset in its shared memory."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine
        self.objects: dict[int, Barrier] = {}
        self.late_copies: list[Callable[[], None]] = []

    def find(self, at: int, inst: Instruction, frame: Any, lane: int) -> Barrier:
        if at not in self.objects:
            raise Fault(f"no mbarrier at this address: {inst.text}: {where(frame, lane)}")
        return self.objects[at]

    def completed(self, frame: Any, inst: Instruction, lanes: Array, acquire: bool = True) -> Array:
        """Return which lanes wait for a completed phase; with `acquire` they see what was copied in it."""
        log = self.machine.log
        offsets = self.machine.shared.offsets(frame, effective(inst.operands[1], "u32")(frame), 8, lanes)
        parity = per_lane(frame, reader(inst.operands[2], "u32")(frame))
        waiting = np.flatnonzero(lanes)
        if acquire:
            log.read(frame, waiting, offsets, 8, inst)
        keys, index = np.unique(np.stack((offsets[waiting], parity[waiting] & 1)), axis=1, return_inverse=True)
        out = np.zeros(frame.n, bool)
        for i, (offset, phase) in enumerate(keys.T.tolist()):
            members = waiting[index.reshape(-1) == i]
            barrier = self.find(offset, inst, frame, int(members[0]))
            if barrier.parity != phase:
                out[members] = True
                for warp in np.unique(frame.warp[members]).tolist() if acquire else ():
                    for start, size in barrier.copied_before:
                        log.acquire(start, size, warp)
        return out

    def complete_late_copies(self) -> bool:
        """Complete the copies that a late schedule holds back; return whether there were any."""
        copies, self.late_copies = self.late_copies, []
        for complete in copies:
            complete()
        return bool(copies)

    def check_end(self) -> None:
        if self.late_copies:
            raise Fault(f"a copy of {self.machine.code.program.name} has no wait")
        for at, barrier in self.objects.items():
            if barrier.in_phase or barrier.copied:
                raise Fault(f"an mbarrier at {at} waits for {barrier.bytes} bytes at the end")


def each_lane(*opcodes: str, address: int) -> Callable[[Any], Any]:
    """Model mbarrier opcodes by a function of inst, frame, lane and the mbarrier's offset (operand `address`)."""

    def register(function: Callable[[Instruction, Any, int, int], None]) -> Any:
        @models(*(opcode.format(space) for opcode in opcodes for space in SPACES))
        def build(inst: Instruction, program: Program) -> Step:
            addresses = effective(inst.operands[address], "u32")

            def step(frame: Any, mask: Any) -> None:
                offsets = frame.machine.shared.offsets(frame, addresses(frame), 8, mask)
                for lane in lane_indices(frame, mask).tolist():
                    function(inst, frame, lane, int(offsets[lane]))

            return step

        return function

    return register


@each_lane("mbarrier.init.{}.b64", address=0)
def init(inst: Instruction, frame: Any, lane: int, at: int) -> None:
    objects = frame.machine.barriers.objects
    if at in objects:
        raise Fault(f"an mbarrier exists already: {inst.text}: {where(frame, lane)}")
    frame.machine.log.set_barrier(frame, [lane], np.array([at]), inst, True)
    objects[at] = Barrier(inst.operands[1].value, inst.operands[1].value)


@each_lane("mbarrier.inval.{}.b64", address=0)
def inval(inst: Instruction, frame: Any, lane: int, at: int) -> None:
    barriers = frame.machine.barriers
    if barriers.find(at, inst, frame, lane).in_phase:
        raise Fault(f"a phase is incomplete: {inst.text}: {where(frame, lane)}")
    frame.machine.log.set_barrier(frame, [lane], np.array([at]), inst, False)
    del barriers.objects[at]


@each_lane("mbarrier.arrive.expect_tx.{}.b64", address=1)
def arrive(inst: Instruction, frame: Any, lane: int, at: int) -> None:
    frame.machine.log.read(frame, [lane], per_lane(frame, at), 8, inst)
    announced = per_lane(frame, reader(inst.operands[2], "u32")(frame))[lane]
    frame.machine.barriers.find(at, inst, frame, lane).update(1, int(announced))


@dataclass(frozen=True)
class Descriptor:
    """A tensor map, innermost dimension first. `strides`: bytes, of all but the first; `span`: of a swizzle, or 0."""

    base: int
    element_size: int  # bytes
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    span: int

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.element_size

    def load(self, memory: Any, coordinates: Sequence[int], describe: Any) -> Array:
        """Return the box as dense chunks of 16 bytes; elements outside the tensor are zero."""
        per_chunk = 16 // self.element_size
        aligned = coordinates[0] % per_chunk == 0 and self.sizes[0] % per_chunk == 0
        step = per_chunk if aligned else 1
        offsets = np.zeros((1,) * len(self.box), np.int64)
        inside = np.ones((1,) * len(self.box), bool)
        for axis, (first, size, length) in enumerate(zip(coordinates, self.sizes, self.box, strict=True)):
            at = first + np.arange(0, length, step if axis == 0 else 1)
            shape = [1] * len(self.box)
            shape[-1 - axis] = len(at)
            inside = inside & ((at >= 0) & (at < size)).reshape(shape)
            offsets = offsets + at.reshape(shape) * (self.element_size if axis == 0 else self.strides[axis - 1])
        offsets, inside = (array.reshape(-1) for array in np.broadcast_arrays(offsets, inside))
        out = np.zeros(inside.size, CHUNKS[self.element_size * step])
        if inside.any():
            addresses = (self.base + offsets[inside]).astype(np.uint64)
            out[inside] = memory.load(addresses, self.element_size * step, describe)
        return out.view(CHUNKS[16])


def swizzle(addresses: Array, span: int) -> Array:
    """Permute the 16-byte chunks of each row of `span` bytes by bits 7 and up of the address."""
    return addresses if span == 0 else addresses ^ ((addresses >> 7) & (span // 16 - 1)) << 4


@models(*(f"cp.async.bulk.tensor.{rank}d.{space}.global.mbarrier::complete_tx::bytes"
          for rank in range(1, 6) for space in (*SPACES, "shared::cluster")))  # fmt: skip
def bulk_copy(inst: Instruction, program: Program) -> Step:
    to, source, barrier = inst.operands
    target, mbarrier = effective(to, "u32"), effective(barrier, "u32")
    descriptor = effective(Address(source.base), "u64")
    coordinates = [reader(item, "s32") for item in source.coordinates]

    def step(frame: Any, mask: Any) -> None:
        machine = frame.machine
        starts, maps, objects = target(frame), descriptor(frame), mbarrier(frame)
        corners = [per_lane(frame, read(frame)) for read in coordinates]
        for lane in lane_indices(frame, mask).tolist():
            name = machine.params.at.get(int(maps[lane]))
            if name not in machine.params.descriptors:
                raise Fault(f"no descriptor at this address: {inst.text}: {where(frame, lane)}")
            tensor, start = machine.params.descriptors[name], int(starts[lane])
            fits = 0 <= start - SHARED_BASE <= machine.shared.size - tensor.bytes
            if len(corners) != len(tensor.box) or start % 128 or not fits:
                place = f"{start - SHARED_BASE} for the box {tensor.box}"
                raise Fault(f"invalid shared address {place}: {inst.text}: {where(frame, lane)}")
            corner = [int(read[lane]) for read in corners]
            chunks = tensor.load(machine.memory, corner, f": {where(frame, lane)}: {inst.text}".format)
            base = int(frame.begins[lane]) - SHARED_BASE
            offsets = swizzle(start + 16 * np.arange(len(chunks)), tensor.span) + base
            _issue(frame, lane, inst, int(objects[lane]) + base, offsets, chunks)

    return step


def _issue(frame: Any, lane: int, inst: Instruction, at: int, offsets: Array, chunks: Array) -> None:
    """Complete the copy and its transaction at once, or in a late schedule when no lane can proceed without it."""
    machine = frame.machine
    barrier = machine.barriers.find(at, inst, frame, lane)
    machine.log.read(frame, [lane], per_lane(frame, at), 8, inst)
    first, size = int(offsets.min()), 16 * len(chunks)
    machine.log.bulk_copy(int(frame.block[lane]), int(frame.warp[lane]), first, size, inst)

    def complete() -> None:
        if machine.barriers.objects.get(at) is not barrier:
            raise Fault(f"the mbarrier of a copy is invalid: {inst.text}: {where(frame, lane)}")
        machine.shared.views[16][offsets // 16] = chunks
        barrier.copied.append((first, size))
        barrier.update(0, -size)

    if machine.schedule.late:
        machine.barriers.late_copies.append(complete)
    else:
        complete()


@models("fence.proxy.async.shared::cta", "fence.proxy.async.shared", "fence.proxy.async")
def fence(inst: Instruction, program: Program) -> Step:
    return lambda frame, mask: frame.machine.log.fence(frame, mask)
