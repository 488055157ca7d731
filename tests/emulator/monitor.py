"""What a run in lockstep notes of each piece of shared memory: who wrote it and who read it since the last barrier.

Faults: a read of what nobody wrote; accesses of two warps of which one writes, with no barrier between; a read of what
a copy has not brought, or brought for others; an asynchronous read of what was stored without a fence of the proxies
between. Warps that store equal values at one place are no fault: replicated layouts do.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .memory import Fault
from .text import Instruction, Program
from .values import Array

NEVER, IN_FLIGHT = -1, 1 << 30


class NoLog:
    """For schedules that run one warp after the other."""

    def __init__(self, machine: Any) -> None:
        self.views = machine.shared.views

    def write(self, frame: Any, lanes: Any, at: Array, values: Array, size: int, one: Instruction) -> None:
        """Elements of `size` bytes at places of shared memory; of equal places the last lane's stays."""
        self.views[size][at // size] = values

    def read(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is noted."""

    fly = land = bulk = seen = barrier = fence = asynchronous = own = disown = unfenced = read


def granule(program: Program) -> int:
    """Bytes of the smallest access of shared memory."""
    sizes = [16]
    for one in program.instructions:
        parts = one.opcode.split(".")
        if parts[0] in ("ld", "st") and parts[1].startswith("shared"):
            count = int(parts[2][1]) if parts[2][0] == "v" else 1
            sizes.append(int(parts[-1][1:]) // 8 * count)
    return min(4, *sizes)


class Log:
    def __init__(self, machine: Any) -> None:
        self.machine, self.g = machine, granule(machine.code.program)
        places = len(machine.shared.bytes) // self.g
        self.values = machine.shared.views[self.g]
        self.time = np.full(places, NEVER, np.int32)  # the epoch of the last write
        self.writer = np.zeros(places, np.int64)  # its warp
        self.read_time = np.full(places, NEVER, np.int32)
        self.readers = np.zeros(places, np.uint32)  # a bit a warp, of that epoch
        self.stored = np.zeros(places, np.int32)  # when the generic proxy wrote; 0: it did not
        self.unseen = np.zeros(places, np.uint32)  # a bit a warp that has not waited for the copy that wrote it
        self.owned = np.zeros(places, bool)  # by an mbarrier
        self.epoch = np.zeros(len(machine.blocks), np.int32)
        self.tick = 1
        self.fenced = np.zeros((len(machine.blocks), machine.warps), np.int32)
        self.fresh: list[tuple[int, slice]] = []  # blocks and places that somebody has not seen

    def _places(self, at: Array, size: int) -> Array:
        return (at // self.g)[:, None] + np.arange(size // self.g)

    def _fault(self, wrong: Array, block: Array, warps: Array, one: Instruction, what: str) -> None:
        if wrong.any():
            row = int(np.flatnonzero(wrong.reshape(len(wrong), -1).any(1))[0])
            x, y, z = self.machine.blocks[block[row]]
            name = self.machine.code.program.name
            raise Fault(f"{what}: {one.text}: block ({x}, {y}, {z}), warps {int(warps[row]):#b} of {name}")

    def barrier(self, blocks: Array) -> None:
        """What one warp has seen, all have."""
        self.epoch[blocks] += 1
        rest = []
        for block, places in self.fresh:
            everyone = np.uint32((1 << self.machine.warps) - 1)
            if blocks[block] and (self.unseen[places] != everyone).any():
                self.unseen[places] = 0
            else:
                rest.append((block, places))
        self.fresh = rest

    def read(self, frame: Any, lanes: Any, at: Array, size: int, one: Instruction) -> None:
        bits = np.left_shift(np.uint32(1), frame.warp[lanes].astype(np.uint32))
        self._read(frame.block[lanes], bits, at[lanes], size, one)

    def asynchronous(self, block: Array, bits: Array, at: Array, size: int, one: Instruction) -> None:
        """By wgmma: rows of places, a block and warps each."""
        self._read(block, bits, at, size, one)
        places = self._places(at.reshape(-1), size).reshape(len(block), -1)
        reader = np.empty(len(block), np.int32)
        for one_bits in np.unique(bits).tolist():
            own = [w for w in range(self.machine.warps) if one_bits >> w & 1]
            reader[bits == one_bits] = self.fenced[block[bits == one_bits]][:, own].min(1)
        fenced = np.maximum(self.fenced[block[:, None], self.writer[places]], reader[:, None])
        missing = (self.stored[places] > 0) & (self.stored[places] >= fenced)
        self._fault(missing, block, bits, one, "no fence.proxy.async after the store")

    def _read(self, block: Array, bits: Array, at: Array, size: int, one: Instruction) -> None:
        places = self._places(at.reshape(len(block), -1).reshape(-1), size).reshape(len(block), -1)
        epoch, mine = self.epoch[block][:, None], bits[:, None]
        time = self.time[places]
        self._fault(time == NEVER, block, bits, one, "reads shared memory that nobody wrote")
        self._fault(time == IN_FLIGHT, block, bits, one, "reads where a copy is in flight")
        others = mine & ~np.left_shift(np.uint32(1), self.writer[places].astype(np.uint32))
        self._fault((time == epoch) & (others != 0), block, bits, one, "race: reads what another warp writes")
        self._fault((self.unseen[places] & mine) != 0, block, bits, one, "reads a copy that it did not wait for")
        old = self.read_time[places] != epoch
        self.readers[places[old]] = 0
        self.read_time[places] = epoch
        for one_bits in np.unique(bits):
            self.readers[places[bits == one_bits]] |= one_bits

    def _overwrite(self, block: Array, warp: Array, places: Array, one: Instruction) -> None:
        """Is anything there that others still read, or that is no place for data?"""
        bits = np.left_shift(np.uint32(1), warp.astype(np.uint32))
        self._fault(self.owned[places], block, bits, one, "writes over an mbarrier")
        others = (self.readers[places] & ~bits[:, None]) != 0
        now = self.read_time[places] == self.epoch[block][:, None]
        self._fault(now & others, block, bits, one, "race: writes what another warp reads")
        self._fault(self.time[places] == IN_FLIGHT, block, bits, one, "writes where a copy is in flight")

    def write(self, frame: Any, lanes: Any, at: Array, values: Array, size: int, one: Instruction) -> None:
        block, warp, places = frame.block[lanes], frame.warp[lanes], self._places(at, size)
        bits = np.left_shift(np.uint32(1), warp.astype(np.uint32))
        new = values.view(self.values.dtype).reshape(places.shape)
        self._overwrite(block, warp, places, one)
        self._fault((self.unseen[places] & bits[:, None]) != 0, block, bits, one, "writes over a copy in flight")
        old, foreign = self.values[places], self._foreign(block, warp, places)
        self.values[places] = new
        self._written(block, warp, places)
        if foreign.any() or (self.writer[places] != warp[:, None]).any():
            self._one_by_one(block, warp, places, old, new, foreign, one)

    def _foreign(self, block: Array, warp: Array, places: Array) -> Array:
        """Where another warp has written since the last barrier."""
        return (self.time[places] == self.epoch[block][:, None]) & (self.writer[places] != warp[:, None])

    def _one_by_one(
        self, block: Array, warp: Array, places: Array, old: Array, new: Array, foreign: Array, one: Instruction
    ) -> None:
        """What stays of one warp's lanes has to be what stays of another's."""
        self.values[places] = old
        seen = np.zeros(len(self.values), bool)
        seen[places[foreign]] = True
        for w in np.unique(warp).tolist():
            rows = warp == w
            own, known = places[rows], seen[places[rows]]
            before = self.values[own]
            self.values[own] = new[rows]
            bits = np.full(len(own), 1 << w)
            differs = known & (before != self.values[own])
            self._fault(differs, block[rows], bits, one, "race: warps write different values")
            seen[own] = True

    def _written(self, block: Array, warp: Array, places: Array) -> None:
        self.tick += 1
        self.time[places] = self.epoch[block][:, None]
        self.writer[places] = warp[:, None]
        self.stored[places] = self.tick

    def fly(self, frame: Any, lanes: Any, at: Array, size: int, one: Instruction) -> None:
        """A copy of the lane's sets out to these places."""
        block, warp, places = frame.block[lanes], frame.warp[lanes], self._places(at, size)
        self._overwrite(block, warp, places, one)
        foreign = self._foreign(block, warp, places)
        bits = np.left_shift(np.uint32(1), warp.astype(np.uint32))
        self._fault(foreign, block, bits, one, "race: writes over another warp's value")
        self.time[places] = IN_FLIGHT

    def land(self, frame: Any, lanes: Any, at: Array, size: int) -> None:
        places = self._places(at, size)
        self._written(frame.block[lanes], frame.warp[lanes], places)
        if not self.machine.fenced_copies:
            self.stored[places] = 0

    def bulk(self, block: int, warp: int, start: int, size: int, one: Instruction) -> None:
        """A copy of the asynchronous proxy: every warp has to wait for it."""
        places = np.arange(start // self.g, (start + size) // self.g)[None]
        blocks, warps = np.array([block]), np.array([warp])
        self._overwrite(blocks, warps, places, one)
        foreign = self._foreign(blocks, warps, places)
        self._fault(foreign, blocks, 1 << warps, one, "race: writes over another warp's value")
        fence = np.maximum(self.fenced[block, self.writer[places]], self.fenced[block, warp])
        late = (self.stored[places] > 0) & (self.stored[places] >= fence)
        self._fault(late, blocks, 1 << warps, one, "no fence.proxy.async after the store")
        own = slice(start // self.g, (start + size) // self.g)
        self.time[own], self.stored[own] = self.epoch[block] - 1, 0
        self.unseen[own] = (1 << self.machine.warps) - 1
        self.fresh.append((block, own))

    def seen(self, start: int, size: int, warp: int) -> None:
        """A warp has waited for a copy."""
        self.unseen[start // self.g : (start + size) // self.g] &= ~np.uint32(1 << warp)

    def fence(self, frame: Any, mask: Any) -> None:
        self.tick += 1
        lanes = slice(None) if mask is None else mask
        self.fenced[frame.block[lanes], frame.warp[lanes]] = self.tick

    def unfenced(self, frame: Any, mask: Any) -> bool:
        """Whether one of these warps has stored anything since its last fence."""
        lanes = slice(None) if mask is None else mask
        places = self.machine.shared.stride // self.g
        for block, warp in {*zip(frame.block[lanes].tolist(), frame.warp[lanes].tolist(), strict=True)}:
            own = slice(block * places, (block + 1) * places)
            stored = self.stored[own][self.writer[own] == warp]
            if (stored > self.fenced[block, warp]).any():
                return True
        return False

    def own(self, frame: Any, lanes: Any, at: Array, one: Instruction) -> None:
        """An mbarrier is made at these places."""
        self._object(frame, lanes, at, one, True)

    def disown(self, frame: Any, lanes: Any, at: Array, one: Instruction) -> None:
        self._object(frame, lanes, at, one, False)

    def _object(self, frame: Any, lanes: Any, at: Array, one: Instruction, made: bool) -> None:
        places = self._places(at, 8)
        self.owned[places] = False
        block, warp = frame.block[lanes], frame.warp[lanes]
        bits = np.left_shift(np.uint32(1), warp.astype(np.uint32))
        self._fault(self._foreign(block, warp, places), block, bits, one, "race: writes over another warp's value")
        self._overwrite(block, warp, places, one)
        self._written(block, warp, places)
        self.stored[places] = 0
        self.owned[places] = made
