"""Global memory where the launch's tensors lie, shared memory of each block, parameters; loads and stores of all three.

A load or store has to lie in one region, at a multiple of its size; an address of anything else is a fault.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .text import Address, Instruction, Param, Program, Reg, Symbol, Unmodelled, Vector
from .values import TYPES, Array, Step, assign, effect, reader, writers

# One element of each size that is moved at once; a complex number is 16 bytes that nobody computes with.
CHUNKS = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}
SHARED_BASE = 1024  # a GPU keeps the first KiB; swizzles are functions of the address
UNWRITTEN = 0xFF  # NaN as a float, an address of nothing


class Fault(RuntimeError):
    """What a GPU would answer with an error, or with numbers that mean nothing."""


def where(frame: Any, lane: int) -> str:
    """Of a frame's lane: its block and thread."""
    return f"block ({frame.x[lane]}, {frame.y[lane]}, {frame.z[lane]}), thread {frame.tid[lane]}"


@dataclass(frozen=True)
class Span:
    name: str
    start: int
    size: int


class Region:
    """Bytes of this process's memory."""

    def __init__(self, span: Span) -> None:
        self.name, self.start, self.end = span.name, span.start, span.start + span.size
        self.bytes = np.frombuffer((ctypes.c_ubyte * span.size).from_address(span.start), np.uint8)
        self._views: dict[int, tuple[int, Array]] = {}

    def view(self, size: int) -> tuple[int, Array]:
        """-> the address of the first element, and elements of `size` bytes."""
        if size not in self._views:
            first = self.start // size * size
            length = -(-(self.end - first) // size) * size
            held = np.frombuffer((ctypes.c_ubyte * length).from_address(first), CHUNKS[size])
            self._views[size] = first, held
        return self._views[size]


class Global:
    """The regions of a launch, sorted; those that overlap are one.

    `unsettled`: what launches write that this one may overlap; None: it overlaps none. See early.py.
    """

    unsettled: Sequence[tuple[int, Array]] | None = None

    def __init__(self, spans: Iterable[Span]) -> None:
        merged: list[Span] = []
        for span in sorted((one for one in spans if one.size), key=lambda one: one.start):
            if merged and span.start < merged[-1].start + merged[-1].size:
                last = merged.pop()
                end = max(last.start + last.size, span.start + span.size)
                span = Span(f"{last.name}, {span.name}", last.start, end - last.start)
            merged.append(span)
        self.regions = [Region(span) for span in merged]
        self.starts = [region.start for region in self.regions]
        self._sorted = np.array(self.starts, np.uint64)

    def places(self, addresses: Array, size: int, who: Any) -> Iterator[tuple[Any, Array, Array]]:
        """-> which of the addresses (a slice or a mask), the elements of their region, and their indices there."""
        low, high = int(addresses.min()), int(addresses.max())
        if size > 1 and (addresses & np.uint64(size - 1)).any():
            at = int(np.flatnonzero(addresses & np.uint64(size - 1))[0])
            raise Fault(f"misaligned address {int(addresses[at]):#x} of {size} bytes{who(at)}")
        at = bisect_right(self.starts, low) - 1
        if at >= 0 and high + size <= self.regions[at].end:
            yield slice(None), *self._elements(at, addresses, size)
            return
        which = np.searchsorted(self._sorted, addresses, side="right").astype(np.int64) - 1
        for at in np.unique(which).tolist():
            chosen = which == at
            end = self.regions[at].end if at >= 0 else 0
            outside = chosen & (addresses + np.uint64(size) > np.uint64(end))
            if outside.any():
                first = int(np.flatnonzero(outside)[0])
                near = f"; {self.regions[at].name} ends at {end:#x}" if at >= 0 else ""
                raise Fault(f"illegal address {int(addresses[first]):#x}{who(first)}{near}")
            yield chosen, *self._elements(at, addresses[chosen], size)

    def _elements(self, at: int, addresses: Array, size: int) -> tuple[Array, Array]:
        first, held = self.regions[at].view(size)
        return held, (addresses - np.uint64(first)).astype(np.int64) >> (size.bit_length() - 1)

    def load(self, addresses: Array, size: int, who: Any) -> Array:
        """-> one element of `size` bytes for each address."""
        out = np.empty(len(addresses), CHUNKS[size])
        for chosen, held, index in self.places(addresses, size, who):
            out[chosen] = held[index]
        return out

    def store(self, addresses: Array, values: Array, size: int, who: Any) -> None:
        for chosen, held, index in self.places(addresses, size, who):
            held[index] = values[chosen]

    def save(self) -> list[Array]:
        return [region.bytes.copy() for region in self.regions]

    def restore(self, saved: Sequence[Array]) -> None:
        for region, old in zip(self.regions, saved, strict=True):
            region.bytes[:] = old


class Shared:
    """Shared memory of a batch of blocks, one behind the other."""

    base = SHARED_BASE

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = -(-max(size, 16) // 1024) * 1024
        self.bytes = np.full(blocks * self.stride, UNWRITTEN, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in CHUNKS.items()}

    def offsets(self, frame: Any, addresses: Array, size: int, mask: Any) -> Array:
        """-> places in `bytes`; what `mask` leaves out may be anywhere."""
        local = addresses.astype(np.int64) - SHARED_BASE
        wrong = (local < 0) | (local + size > self.size) | (local & (size - 1) != 0)
        if mask is not None:
            wrong &= mask
            local = np.where(mask, local, 0)
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            what = "misaligned" if 0 <= local[lane] <= self.size - size else "illegal"
            raise Fault(
                f"{what} shared address {int(local[lane])} of {size} bytes, of {self.size}: {where(frame, lane)}"
            )
        return frame.begins + local


class Params:
    """Kernel parameters: bytes of each, and the address that a kernel may take of them."""

    window = 0x7F00_0000  # fits the 32 bits in which Triton moves such an address

    def __init__(self, params: Sequence[Param], values: Sequence[bytes]) -> None:
        self.values = {param.name: value for param, value in zip(params, values, strict=True)}
        self.addresses: dict[str, int] = {}
        self.at: dict[int, str] = {}
        self.descriptors: dict[str, Any] = {}
        end = self.window
        for param in params:
            end = -(-end // param.align) * param.align
            self.addresses[param.name], self.at[end] = end, param.name
            end += param.size


def effective(address: Address, kind: str) -> Any:
    """-> function of a frame: the addresses of all lanes."""
    dtype = TYPES[kind].type
    if isinstance(address.base, Symbol):
        return lambda frame: np.full(frame.n, dtype(frame.machine.shared.base + address.offset))
    base = reader(address.base, kind)
    if address.offset == 0:
        return base
    offset = dtype(address.offset % 2 ** (8 * np.dtype(dtype).itemsize))
    return lambda frame: base(frame) + offset


def chosen(values: Array, mask: Any) -> Array:
    return values if mask is None else values[mask]


def culprit(frame: Any, mask: Any, text: str) -> Any:
    """-> who(place among the lanes of `mask`), for an error."""

    def who(at: int) -> str:
        return f": {where(frame, at if mask is None else int(np.flatnonzero(mask)[at]))}: {text}"

    return who


WIDTHS = [("", 1), ("v2.", 2), ("v4.", 4)]
_KINDS = [*(f"b{bits}" for bits in (8, 16, 32, 64)), "s8", "u8", "s16", "u16", "s32", "u32", "f32", "s64", "u64"]
_VECTORS = [(width, count, kind) for width, count in WIDTHS for kind in _KINDS
            if TYPES[kind].itemsize * count <= 16]  # fmt: skip


def _split(chunks: Array, kind: str, count: int) -> list[Array]:
    """Elements of all registers of a vector -> the values of each."""
    parts = chunks.view(TYPES[kind]).reshape(-1, count)
    return [np.ascontiguousarray(parts[:, i]) for i in range(count)]


def _joined(values: Sequence[Any], frame: Any, kind: str) -> Array:
    """The values of each register of a vector -> elements of all."""
    size = TYPES[kind].itemsize * len(values)
    parts = [np.broadcast_to(value(frame), frame.n) for value in values]
    return np.stack(parts, 1).view(CHUNKS[size])[:, 0]


def _vector(operand: Any, count: int, text: str) -> list[Any]:
    items = list(operand.items) if isinstance(operand, Vector) else [operand]
    if len(items) != count:
        raise Unmodelled(f"{len(items)} registers: {text}")
    return items


def _load_global(one: Instruction, kind: str, count: int) -> Step:
    destinations = _vector(one.operands[0], count, one.text)
    address, size = effective(one.operands[1], "u64"), TYPES[kind].itemsize * count

    def go(frame: Any, mask: Any) -> None:
        got = frame.machine.memory.load(chosen(address(frame), mask), size, culprit(frame, mask, one.text))
        for reg, part in zip(destinations, _split(got, kind, count), strict=True):
            assign(frame, reg, spread(part, mask), mask)

    return go


def spread(values: Array, mask: Any) -> Array:
    """Of the lanes of `mask` -> of all; the others' are nothing."""
    if mask is None:
        return values
    out = np.zeros(len(mask), values.dtype)
    out[mask] = values
    return out


def _store_global(one: Instruction, kind: str, count: int) -> Step:
    values = [reader(item, kind) for item in _vector(one.operands[1], count, one.text)]
    address, size = effective(one.operands[0], "u64"), TYPES[kind].itemsize * count

    def go(frame: Any, mask: Any) -> None:
        new = chosen(_joined(values, frame, kind), mask)
        frame.machine.memory.store(chosen(address(frame), mask), new, size, culprit(frame, mask, one.text))

    return go


def _load_shared(one: Instruction, kind: str, count: int) -> Step:
    destinations = _vector(one.operands[0], count, one.text)
    address, size = effective(one.operands[1], "u32"), TYPES[kind].itemsize * count

    def go(frame: Any, mask: Any) -> None:
        machine = frame.machine
        at = machine.shared.offsets(frame, address(frame), size, mask)
        machine.log.read(frame, slice(None) if mask is None else mask, at, size, one)
        got = machine.shared.views[size][at // size]
        for reg, part in zip(destinations, _split(got, kind, count), strict=True):
            assign(frame, reg, part, mask)

    return go


def _store_shared(one: Instruction, kind: str, count: int) -> Step:
    values = [reader(item, kind) for item in _vector(one.operands[1], count, one.text)]
    address, size = effective(one.operands[0], "u32"), TYPES[kind].itemsize * count

    def go(frame: Any, mask: Any) -> None:
        at = frame.machine.shared.offsets(frame, address(frame), size, mask)
        put(frame, at, _joined(values, frame, kind), size, mask, one)

    return go


def put(frame: Any, at: Array, values: Array, size: int, mask: Any, one: Instruction) -> None:
    """Store elements of `size` bytes at places of shared memory, and have it logged."""
    lanes = slice(None) if mask is None else np.flatnonzero(mask)
    frame.machine.log.write(frame, lanes, at[lanes], values[lanes], size, one)


for _width, _count, _kind in _VECTORS:

    @effect(f"ld.global.{_width}{_kind}")
    def _lg(one: Instruction, program: Program, kind: str = _kind, count: int = _count) -> Step:
        return _load_global(one, kind, count)

    @effect(f"st.global.{_width}{_kind}")
    def _sg(one: Instruction, program: Program, kind: str = _kind, count: int = _count) -> Step:
        return _store_global(one, kind, count)

    for _space in ("shared", "shared::cta"):

        @effect(f"ld.{_space}.{_width}{_kind}")
        def _ls(one: Instruction, program: Program, kind: str = _kind, count: int = _count) -> Step:
            return _load_shared(one, kind, count)

        @effect(f"st.{_space}.{_width}{_kind}")
        def _ss(one: Instruction, program: Program, kind: str = _kind, count: int = _count) -> Step:
            return _store_shared(one, kind, count)


@effect(*(f"ld.param.{kind}" for kind in _KINDS))
def _load_param(one: Instruction, program: Program) -> Step:
    kind = TYPES[one.opcode.rpartition(".")[2]]
    (to,), address = writers(one.operands[0]), one.operands[1]
    if not isinstance(address.base, Symbol) or not isinstance(to, Reg):
        raise Unmodelled(f"a parameter at an address: {one.text}")
    name, offset = address.base.name, address.offset

    def go(frame: Any, mask: Any) -> None:
        value = np.frombuffer(frame.machine.params.values[name], kind, 1, offset)[0]
        assign(frame, to, value, mask)

    return go
