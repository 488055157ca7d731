"""Asynchronous copies to shared memory: cp.async and its groups, mbarriers, TMA (PTX ISA, sections 9.7.9, 9.7.13)."""

from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .memory import CHUNKS, SHARED_BASE, Fault, describe_lane, effective, where
from .parser import Address, Imm, Instruction, Unmodelled
from .values import Array, executes, per_lane, read

SPACES = ("shared::cta", "shared")


# An asynchronous instruction, the lanes that have not yet waited for it, and each lane's group
AsyncOperation = namedtuple("AsyncOperation", "inst lanes group data")


class AsyncGroups:
    """Pending asynchronous operations of a frame, in order; each lane counts its own groups."""

    def __init__(self, n: int) -> None:
        self.pending, self.committed = list[AsyncOperation](), np.zeros(n, np.int32)

    def begin(self, inst: Instruction, mask: Any, data: Any) -> None:
        self.pending.append(AsyncOperation(inst, mask.copy(), self.committed.copy(), data))

    def commit(self, mask: Any) -> None:
        self.committed += mask

    def complete(self, youngest: int, mask: Any) -> Iterator[tuple[AsyncOperation, Array]]:
        """Complete all but the `youngest` committed groups; yield each operation and its completed lanes."""
        rest = []
        for op in self.pending:
            completed = op.lanes & mask & (op.group < self.committed - youngest)
            if completed.any():
                np.logical_and(op.lanes, ~completed, out=op.lanes)
                yield op, completed
            if op.lanes.any():
                rest.append(op)
        self.pending = rest


@executes("cp.async.ca.shared.global", "cp.async.cg.shared.global")
def copy(inst: Instruction, frame: Any, mask: Any) -> None:
    """The optional fourth operand is the number of bytes to read, here all or none; the rest is filled with zeros."""
    to, source, size_operand, *counts = inst.operands
    if not isinstance(size_operand, Imm) or len(counts) > 1:
        raise Unmodelled(inst.text)
    machine, size = frame.machine, size_operand.value
    offsets = machine.shared.offsets(frame, effective(frame, to, "u32"), size, mask)
    bytes_read = per_lane(frame, read(frame, (*counts, size_operand)[0], "u32"))
    reads = (bytes_read != 0) & mask
    if (reads & (bytes_read != size)).any():
        raise Unmodelled(f"copy of a part of {size} bytes: {inst.text}")
    values = np.zeros(frame.n, CHUNKS[size])
    if reads.any():
        addresses = effective(frame, source, "u64")[reads]
        values[reads] = machine.memory.load(addresses, size, describe_lane(frame, reads, inst.text))
    lanes = np.flatnonzero(mask)
    machine.log.begin_copy(frame, lanes, offsets[lanes], size, inst)
    frame.copies.begin(inst, mask, (offsets, values, size))
    if not machine.schedule.late:
        machine.shared.views[size][offsets[lanes] // size] = values[lanes]


@executes("cp.async.commit_group")
def commit(inst: Instruction, frame: Any, mask: Any) -> None:
    frame.copies.commit(mask)


@executes("cp.async.wait_group")
def wait(inst: Instruction, frame: Any, mask: Any) -> None:
    machine = frame.machine
    for op, completed in frame.copies.complete(inst.operands[0].value, mask):
        offsets, values, size = op.data
        lanes = np.flatnonzero(completed)
        if machine.schedule.late:
            machine.shared.views[size][offsets[lanes] // size] = values[lanes]
        machine.log.complete_copy(frame, lanes, offsets[lanes], size)


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
        offsets = self.machine.shared.offsets(frame, effective(frame, inst.operands[1], "u32"), 8, lanes)
        parity = per_lane(frame, read(frame, inst.operands[2], "u32"))
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


def lane_offsets(frame: Any, mask: Any, address: Address) -> Iterator[tuple[int, int]]:
    """Yield each lane and the offset of the mbarrier at its address."""
    offsets = frame.machine.shared.offsets(frame, effective(frame, address, "u32"), 8, mask)
    for lane in np.flatnonzero(mask).tolist():
        yield lane, int(offsets[lane])


@executes(*(f"mbarrier.init.{space}.b64" for space in SPACES))
def init(inst: Instruction, frame: Any, mask: Any) -> None:
    objects = frame.machine.barriers.objects
    for lane, at in lane_offsets(frame, mask, inst.operands[0]):
        if at in objects:
            raise Fault(f"an mbarrier exists already: {inst.text}: {where(frame, lane)}")
        frame.machine.log.set_barrier(frame, [lane], np.array([at]), inst, True)
        objects[at] = Barrier(inst.operands[1].value, inst.operands[1].value)


@executes(*(f"mbarrier.inval.{space}.b64" for space in SPACES))
def inval(inst: Instruction, frame: Any, mask: Any) -> None:
    barriers = frame.machine.barriers
    for lane, at in lane_offsets(frame, mask, inst.operands[0]):
        if barriers.find(at, inst, frame, lane).in_phase:
            raise Fault(f"a phase is incomplete: {inst.text}: {where(frame, lane)}")
        frame.machine.log.set_barrier(frame, [lane], np.array([at]), inst, False)
        del barriers.objects[at]


@executes(*(f"mbarrier.arrive.expect_tx.{space}.b64" for space in SPACES))
def arrive(inst: Instruction, frame: Any, mask: Any) -> None:
    announced = per_lane(frame, read(frame, inst.operands[2], "u32"))
    for lane, at in lane_offsets(frame, mask, inst.operands[1]):
        frame.machine.log.read(frame, [lane], per_lane(frame, at), 8, inst)
        frame.machine.barriers.find(at, inst, frame, lane).update(1, int(announced[lane]))


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


@executes(*(f"cp.async.bulk.tensor.{rank}d.{space}.global.mbarrier::complete_tx::bytes"
            for rank in range(1, 6) for space in (*SPACES, "shared::cluster")))  # fmt: skip
def bulk_copy(inst: Instruction, frame: Any, mask: Any) -> None:
    machine, (to, source, barrier) = frame.machine, inst.operands
    starts, objects = (effective(frame, address, "u32") for address in (to, barrier))
    maps = effective(frame, Address(source.base), "u64")
    corners = [per_lane(frame, read(frame, item, "s32")) for item in source.coordinates]
    for lane in np.flatnonzero(mask).tolist():
        name = machine.params.at.get(int(maps[lane]))
        if name not in machine.params.descriptors:
            raise Fault(f"no descriptor at this address: {inst.text}: {where(frame, lane)}")
        tensor, start = machine.params.descriptors[name], int(starts[lane])
        fits = 0 <= start - SHARED_BASE <= machine.shared.size - tensor.bytes
        if len(corners) != len(tensor.box) or start % 128 or not fits:
            place = f"{start - SHARED_BASE} for the box {tensor.box}"
            raise Fault(f"invalid shared address {place}: {inst.text}: {where(frame, lane)}")
        corner = [int(values[lane]) for values in corners]
        chunks = tensor.load(machine.memory, corner, f": {where(frame, lane)}: {inst.text}".format)
        base = int(frame.begins[lane]) - SHARED_BASE
        offsets = swizzle(start + 16 * np.arange(len(chunks)), tensor.span) + base
        _issue(frame, lane, inst, int(objects[lane]) + base, offsets, chunks)


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


@executes("fence.proxy.async.shared::cta", "fence.proxy.async.shared", "fence.proxy.async")
def fence(inst: Instruction, frame: Any, mask: Any) -> None:
    frame.machine.log.fence(frame, mask)
