"""TMA: boxes of a tensor copied to shared memory by a descriptor (PTX ISA, section 9.7.9.27; CUDA's tensor maps)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .barriers import SPACES
from .memory import CHUNKS, SHARED_BASE, Fault, effective, where
from .text import Address, Instruction, Program
from .values import Array, Step, effect, reader


@dataclass(frozen=True)
class Descriptor:
    """Innermost dimension first. `strides`: bytes, of all but the first; `span`: of a swizzle, or 0."""

    base: int
    size: int  # bytes of an element
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    span: int

    @property
    def bytes(self) -> int:
        return int(np.prod(self.box)) * self.size

    def fetch(self, memory: Any, coordinates: Sequence[int], who: Any) -> Array:
        """-> the box as chunks of 16 bytes, dense; what lies outside of the tensor is zero."""
        per_chunk = 16 // self.size
        whole = coordinates[0] % per_chunk == 0 and self.sizes[0] % per_chunk == 0
        step = per_chunk if whole else 1
        offsets = np.zeros((1,) * len(self.box), np.int64)
        inside = np.ones((1,) * len(self.box), bool)
        for axis, (first, size, length) in enumerate(zip(coordinates, self.sizes, self.box, strict=True)):
            at = first + np.arange(0, length, step if axis == 0 else 1)
            shape = [1] * len(self.box)
            shape[-1 - axis] = len(at)
            inside = inside & ((at >= 0) & (at < size)).reshape(shape)
            offsets = offsets + at.reshape(shape) * (self.size if axis == 0 else self.strides[axis - 1])
        offsets, inside = np.broadcast_arrays(offsets, inside)
        element = self.size * step
        out = np.zeros(inside.size, CHUNKS[element])
        places = inside.reshape(-1)
        if places.any():
            addresses = (self.base + offsets.reshape(-1)[places]).astype(np.uint64)
            out[places] = memory.load(addresses, element, who)
        return out.view(CHUNKS[16])


def swizzled(addresses: Array, span: int) -> Array:
    """The address in its place: bits 7 and up choose among the chunks of a row of `span` bytes."""
    return addresses if span == 0 else addresses ^ ((addresses >> 7) & (span // 16 - 1)) << 4


def _bulk(one: Instruction, program: Program) -> Step:
    to, source, barrier = one.operands
    target, mbarrier = effective(to, "u32"), effective(barrier, "u32")
    descriptor = effective(Address(source.base), "u64")
    coordinates = [reader(item, "s32") for item in source.coordinates]

    def go(frame: Any, mask: Any) -> None:
        machine = frame.machine
        lanes = np.arange(frame.n) if mask is None else np.flatnonzero(mask)
        starts, maps, objects = target(frame), descriptor(frame), mbarrier(frame)
        corners = [np.broadcast_to(read(frame), frame.n) for read in coordinates]
        for lane in lanes.tolist():
            name = machine.params.at.get(int(maps[lane]))
            if name not in machine.params.descriptors:
                raise Fault(f"no descriptor there: {one.text}: {where(frame, lane)}")
            tensor = machine.params.descriptors[name]
            start = int(starts[lane])
            if (
                len(corners) != len(tensor.box)
                or start % 128
                or not 0 <= start - SHARED_BASE <= (machine.shared.size - tensor.bytes)
            ):
                raise Fault(f"{start - SHARED_BASE} is no place for {tensor.box}: {one.text}: {where(frame, lane)}")
            corner = [int(read[lane]) for read in corners]
            got = tensor.fetch(machine.memory, corner, f": {where(frame, lane)}: {one.text}".format)
            places = swizzled(start + 16 * np.arange(len(got)), tensor.span) - SHARED_BASE + int(frame.begins[lane])
            send(frame, lane, one, int(objects[lane]), places, got)

    return go


def send(frame: Any, lane: int, one: Instruction, mbarrier: int, places: Array, got: Array) -> None:
    """Now, or when somebody waits for it."""
    machine = frame.machine
    at = int(frame.begins[lane]) + mbarrier - SHARED_BASE
    barrier = machine.barriers.find(at, one, frame, lane)
    machine.log.read(frame, [lane], np.broadcast_to(at, frame.n), 8, one)
    first, size = int(places.min()), 16 * len(got)
    machine.log.bulk(int(frame.block[lane]), int(frame.warp[lane]), first, size, one)

    def land() -> None:
        if machine.barriers.objects.get(at) is not barrier:
            raise Fault(f"its mbarrier is gone: {one.text}: {where(frame, lane)}")
        machine.shared.views[16][places // 16] = got
        barrier.copies.append((first, size))
        machine.barriers.complete(barrier, size)

    if machine.schedule.late:
        machine.barriers.flying.append(land)
    else:
        land()


for _rank in range(1, 6):
    for _space in (*SPACES, "shared::cluster"):
        effect(f"cp.async.bulk.tensor.{_rank}d.{_space}.global.mbarrier::complete_tx::bytes")(_bulk)


@effect("fence.proxy.async.shared::cta", "fence.proxy.async.shared", "fence.proxy.async")
def fence(one: Instruction, program: Program) -> Step:
    return lambda frame, mask: frame.machine.log.fence(frame, mask)
