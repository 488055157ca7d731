"""Race detectors: for shared memory, and for programmatic dependent launches.

In a lockstep run the first one records who wrote and who read each byte since the last barrier. Faults: a read of
unwritten bytes; accesses of two warps, one of them a write, without a barrier between; a read of a copy that has not
completed, or that the reader has not waited for; an asynchronous read of stored bytes without a proxy fence between.
Warps that store equal values to one place are no fault, because replicated layouts do so.

A programmatic dependent launch overlaps the ones before it (PTX ISA, section 9.7.13). The emulator runs launches one
after the other; before its griddepcontrol.wait, a lane may store nothing and read nothing that a launch writes which
may still run. These are all launches from the last ordinary one on, because each may start the next before it waits;
those before a launch that starts the next after its wait have ended. A prefetch reads no value.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import triton

from .memory import VECTORS, Fault, Region, effective, where
from .parser import Instruction, Program, Unmodelled
from .values import TYPES, Array, Step, destinations, executes, per_lane, read, suffix

# PTX's memory model requires a fence between cp.async and wgmma, which Triton 3.6 does not emit.
FENCED_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
NEVER, IN_FLIGHT = -1, 1 << 30
OVERWRITES = "race: writes over another warp's value"
NO_FENCE = "no fence.proxy.async after the store"


class NoRaceDetector:
    """Stands in for the detector in schedules that run one warp after the other."""

    def __init__(self, machine: Any) -> None:
        self.views = machine.shared.views

    def write(self, frame: Any, lanes: Any, offsets: Array, values: Array, size: int, inst: Instruction) -> None:
        """Store elements of `size` bytes; the last lane's value stays where several lanes write."""
        self.views[size][offsets // size] = values

    def __getattr__(self, name: str) -> Any:
        """Record nothing: all other methods of a RaceDetector do nothing."""
        return lambda *args: None


def granularity(program: Program) -> int:
    """Return the size in bytes of the smallest access of shared memory, at most 4."""
    sizes = [4]
    for inst in program.instructions:
        parts = inst.opcode.split(".")
        if parts[0] in ("ld", "st") and parts[1].startswith("shared"):
            sizes.append(int(parts[-1][1:]) // 8 * VECTORS.get(f"{parts[2]}.", 1))
    return min(sizes)


def bits_of(warps: Array) -> Array:
    return np.left_shift(np.uint32(1), warps.astype(np.uint32))


class RaceDetector:
    def __init__(self, machine: Any) -> None:
        self.machine, self.unit = machine, granularity(machine.code.program)
        n, shape = len(machine.shared.bytes) // self.unit, (len(machine.blocks), machine.warps)
        self.values = machine.shared.views[self.unit]
        self.time = np.full(n, NEVER, np.int32)  # the epoch of the last write
        self.writer = np.zeros(n, np.int64)  # its warp
        self.read_time = np.full(n, NEVER, np.int32)
        self.readers = np.zeros(n, np.uint32)  # bits of warps, in that epoch
        self.stored = np.zeros(n, np.int32)  # the tick of the generic proxy's last write; 0: none
        self.unacquired = np.zeros(n, np.uint32)  # bits of warps that have not waited for the copy that wrote it
        self.in_barrier = np.zeros(n, bool)
        self.epoch = np.zeros(len(machine.blocks), np.int32)
        self.tick = 1
        self.fenced = np.zeros(shape, np.int32)
        self.all_warps = np.uint32((1 << machine.warps) - 1)
        self.fresh: list[tuple[int, slice]] = []  # blocks and ranges of copies that some warp has not acquired

    def _units(self, offsets: Array, size: int) -> Array:
        return (offsets // self.unit)[:, None] + np.arange(size // self.unit)

    def _range(self, start: int, size: int) -> slice:
        return slice(start // self.unit, (start + size) // self.unit)

    def _raise_if(self, wrong: Array, block: Array, bits: Array, inst: Instruction, message: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))[0])
            x, y, z = self.machine.blocks[block[row]]
            name = self.machine.code.program.name
            raise Fault(f"{message}: {inst.text}: block ({x}, {y}, {z}), warps {int(bits[row]):#b} of {name}")

    def barrier(self, blocks: Array) -> None:
        """Begin a new epoch; a copy that one warp has acquired is visible to all after the barrier."""
        self.epoch[blocks] += 1
        rest = []
        for block, units in self.fresh:
            if blocks[block] and (self.unacquired[units] != self.all_warps).any():
                self.unacquired[units] = 0
            else:
                rest.append((block, units))
        self.fresh = rest

    def read(self, frame: Any, lanes: Any, offsets: Array, size: int, inst: Instruction) -> None:
        self._read(frame.block[lanes], bits_of(frame.warp[lanes]), self._units(offsets[lanes], size), inst)

    def read_async(self, block: Array, bits: Array, offsets: Array, size: int, inst: Instruction) -> None:
        """Record a read by wgmma: a block, bits of warps and a row of offsets each."""
        units = self._units(offsets.reshape(-1), size).reshape(len(block), -1)
        self._read(block, bits, units, inst)
        reader_fence = np.empty(len(block), np.int32)
        for warp_bits in np.unique(bits).tolist():
            warps, rows = [w for w in range(self.machine.warps) if warp_bits >> w & 1], bits == warp_bits
            reader_fence[rows] = self.fenced[block[rows]][:, warps].min(1)
        fenced = np.maximum(self.fenced[block[:, None], self.writer[units]], reader_fence[:, None])
        missing = (self.stored[units] > 0) & (self.stored[units] >= fenced)
        self._raise_if(missing, block, bits, inst, NO_FENCE)

    def _read(self, block: Array, bits: Array, units: Array, inst: Instruction) -> None:
        epoch, warps = self.epoch[block][:, None], bits[:, None]
        time = self.time[units]
        self._raise_if(time == NEVER, block, bits, inst, "reads unwritten shared memory")
        self._raise_if(time == IN_FLIGHT, block, bits, inst, "reads where a copy is in flight")
        foreign = (warps & ~bits_of(self.writer[units])) != 0
        self._raise_if((time == epoch) & foreign, block, bits, inst, "race: reads what another warp writes")
        self._raise_if((self.unacquired[units] & warps) != 0, block, bits, inst, "reads a copy without a wait for it")
        self.readers[units[self.read_time[units] != epoch]] = 0
        self.read_time[units] = epoch
        for warp_bits in np.unique(bits):
            self.readers[units[bits == warp_bits]] |= warp_bits

    def _check_overwrite(self, block: Array, warp: Array, units: Array, inst: Instruction) -> None:
        bits = bits_of(warp)
        self._raise_if(self.in_barrier[units], block, bits, inst, "writes over an mbarrier")
        foreign = (self.readers[units] & ~bits[:, None]) != 0
        current = self.read_time[units] == self.epoch[block][:, None]
        self._raise_if(current & foreign, block, bits, inst, "race: writes what another warp reads")
        self._raise_if(self.time[units] == IN_FLIGHT, block, bits, inst, "writes where a copy is in flight")

    def _foreign(self, block: Array, warp: Array, units: Array) -> Array:
        """Return where another warp has written since the last barrier."""
        return (self.time[units] == self.epoch[block][:, None]) & (self.writer[units] != warp[:, None])

    def _check_replace(self, block: Array, warp: Array, units: Array, inst: Instruction) -> None:
        """Check a write whose value no other warp may write as well."""
        self._check_overwrite(block, warp, units, inst)
        self._raise_if(self._foreign(block, warp, units), block, bits_of(warp), inst, OVERWRITES)

    def write(self, frame: Any, lanes: Any, offsets: Array, values: Array, size: int, inst: Instruction) -> None:
        block, warp, units = frame.block[lanes], frame.warp[lanes], self._units(offsets, size)
        bits = bits_of(warp)
        new = values.view(self.values.dtype).reshape(units.shape)
        self._check_overwrite(block, warp, units, inst)
        self._raise_if((self.unacquired[units] & bits[:, None]) != 0, block, bits, inst, "writes over a copy in flight")
        old, foreign = self.values[units], self._foreign(block, warp, units)
        self.values[units] = new
        self._set_writer(block, warp, units)
        if foreign.any() or (self.writer[units] != warp[:, None]).any():
            self.values[units] = old
            self._write_by_warp(block, warp, units, new, foreign, inst)

    def _write_by_warp(
        self, block: Array, warp: Array, units: Array, new: Array, foreign: Array, inst: Instruction
    ) -> None:
        """Write one warp after the other; what a warp leaves must equal what another warp left there."""
        written = np.zeros(len(self.values), bool)
        written[units[foreign]] = True
        for w in np.unique(warp).tolist():
            rows = warp == w
            targets = units[rows]
            before = self.values[targets]
            self.values[targets] = new[rows]
            differs = written[targets] & (before != self.values[targets])
            bits = np.full(len(targets), 1 << w)
            self._raise_if(differs, block[rows], bits, inst, "race: warps write different values")
            written[targets] = True

    def _set_writer(self, block: Array, warp: Array, units: Array) -> None:
        self.tick += 1
        self.time[units] = self.epoch[block][:, None]
        self.writer[units] = warp[:, None]
        self.stored[units] = self.tick

    def begin_copy(self, frame: Any, lanes: Any, offsets: Array, size: int, inst: Instruction) -> None:
        units = self._units(offsets, size)
        self._check_replace(frame.block[lanes], frame.warp[lanes], units, inst)
        self.time[units] = IN_FLIGHT

    def complete_copy(self, frame: Any, lanes: Any, offsets: Array, size: int) -> None:
        units = self._units(offsets, size)
        self._set_writer(frame.block[lanes], frame.warp[lanes], units)
        if not FENCED_COPIES:
            self.stored[units] = 0

    def bulk_copy(self, block: int, warp: int, start: int, size: int, inst: Instruction) -> None:
        """Record a copy of the asynchronous proxy, for which every warp must wait."""
        target = self._range(start, size)
        units = np.arange(target.start, target.stop)[None]
        self._check_replace(np.array([block]), np.array([warp]), units, inst)
        fenced = np.maximum(self.fenced[block, self.writer[units]], self.fenced[block, warp])
        missing = (self.stored[units] > 0) & (self.stored[units] >= fenced)
        self._raise_if(missing, np.array([block]), np.array([1 << warp]), inst, NO_FENCE)
        self.time[target], self.stored[target] = self.epoch[block] - 1, 0
        self.unacquired[target] = self.all_warps
        self.fresh.append((block, target))

    def acquire(self, start: int, size: int, warp: int) -> None:
        self.unacquired[self._range(start, size)] &= ~np.uint32(1 << warp)

    def fence(self, frame: Any, mask: Any) -> None:
        self.tick += 1
        self.fenced[frame.block[mask], frame.warp[mask]] = self.tick

    def set_barrier(self, frame: Any, lanes: Any, offsets: Array, inst: Instruction, exists: bool) -> None:
        block, warp, units = frame.block[lanes], frame.warp[lanes], self._units(offsets, 8)
        self.in_barrier[units] = False
        self._check_replace(block, warp, units, inst)
        self._set_writer(block, warp, units)
        self.stored[units] = 0
        self.in_barrier[units] = exists


Writes = list[tuple[int, Array]]  # addresses, and which of the bytes from there on were written


def changed_bytes(regions: Iterable[Region], before: Iterable[Array]) -> Writes:
    both = ((region, region.bytes != old) for region, old in zip(regions, before, strict=True))
    return [(region.start, differs) for region, differs in both if differs.any()]


@executes("griddepcontrol.launch_dependents")
def launch_dependents(inst: Instruction, frame: Any, mask: Any) -> None:
    frame.machine.memory.released_early |= bool((frame.before_wait & mask).any())


@executes("griddepcontrol.wait")
def wait(inst: Instruction, frame: Any, mask: Any) -> None:
    frame.before_wait &= ~mask


def checked(inst: Instruction, step: Step) -> Step:
    """Add to a step that accesses global memory a check of the lanes that have not waited yet."""
    if ".global" not in inst.opcode or inst.opcode.startswith("prefetch."):
        return step

    def checked_step(frame: Any, mask: Any) -> None:
        lanes = frame.before_wait if mask is None else frame.before_wait & mask
        if lanes.any() and (found := _races(inst, frame, lanes)).any():
            lane = int(np.argmax(found))
            raise Fault(f"before the wait for the launch that writes there: {inst.text}: {where(frame, lane)}")
        step(frame, mask)

    return checked_step


def _races(inst: Instruction, frame: Any, lanes: Array) -> Array:
    """Return which of the lanes store, or read bytes that pending launches write."""
    if inst.opcode.startswith("st."):
        return lanes
    if "bulk" in inst.opcode:
        raise Unmodelled(f"TMA before the wait of a programmatic dependent launch: {inst.text}")
    to, address, *rest = inst.operands
    is_load = inst.opcode.startswith("ld.")
    size = TYPES[suffix(inst)].itemsize * len(destinations(to)) if is_load else rest[0].value
    at = per_lane(frame, effective(frame, address, "u64")).astype(np.int64)[:, None] + np.arange(size)
    found = np.zeros(frame.n, bool)
    for start, written in frame.machine.memory.pending:
        inside = (at >= start) & (at < start + len(written))
        found |= (inside & written[np.where(inside, at - start, 0)]).any(1)
    # A copy of no bytes ignores its address.
    return found & lanes & (read(frame, rest[1], "u32") > 0) if rest[1:] else found & lanes
