"""Global memory (the launch's tensors), shared memory of each block, parameters, and the loads and stores of all three.

A load or store must lie in one region, at a multiple of its size; any other address is a fault.
"""

import ctypes
from bisect import bisect_right
from collections import namedtuple
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from .parser import Address, Instruction, Param, Reg, Symbol, Unmodelled
from .values import TYPES, Array, assign, destinations, executes, per_lane, read, suffix

# The dtype in which elements of each size are copied; 16 bytes are a complex number that nothing computes with.
CHUNKS = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8"), 16: np.dtype("c16")}
SHARED_BASE = 1024  # a GPU reserves the first KiB; swizzles are functions of the address
UNWRITTEN = 0xFF  # NaN as a float, an invalid address


class Fault(RuntimeError):
    """An error that a GPU would report, or a race whose result it would leave undefined."""


def where(frame: Any, lane: int) -> str:
    return f"block ({frame.x[lane]}, {frame.y[lane]}, {frame.z[lane]}), thread {frame.tid[lane]}"


Span = namedtuple("Span", "name start size")


class Region:
    def __init__(self, span: Span) -> None:
        self.name, self.start, self.end = span.name, span.start, span.start + span.size
        self.loaded = 0  # bytes, by all lanes
        self.bytes = np.frombuffer((ctypes.c_ubyte * span.size).from_address(span.start), np.uint8)
        self._views: dict[int, tuple[int, Array]] = {}

    def view(self, size: int) -> tuple[int, Array]:
        """Return the address of the first element and the elements of `size` bytes."""
        if size not in self._views:
            first = self.start // size * size
            length = -(-(self.end - first) // size) * size
            elements = np.frombuffer((ctypes.c_ubyte * length).from_address(first), CHUNKS[size])
            self._views[size] = first, elements
        return self._views[size]


class Global:
    """The regions of a launch, sorted; overlapping ones are merged.

    pending         the bytes that launches write which this one may overlap; None: it overlaps none. See races.py
    released_early  a lane let the next launch start before its own wait
    """

    pending: Sequence[tuple[int, Array]] | None = None
    released_early = False

    def __init__(self, spans: Iterable[Span]) -> None:
        merged: list[Span] = []
        for span in sorted((span for span in spans if span.size), key=lambda span: span.start):
            if merged and span.start < merged[-1].start + merged[-1].size:
                last = merged.pop()
                end = max(last.start + last.size, span.start + span.size)
                span = Span(f"{last.name}, {span.name}", last.start, end - last.start)
            merged.append(span)
        self.regions = [Region(span) for span in merged]
        self.starts = [region.start for region in self.regions]
        self._sorted = np.array(self.starts, np.uint64)

    def locate(self, addresses: Array, size: int, describe: Any) -> Iterator[tuple[Any, Array, Array]]:
        """Yield for each region a selection (slice or mask) of the addresses, its elements, and the indices there."""
        low, high = int(addresses.min()), int(addresses.max())
        if size > 1 and (misaligned := addresses & np.uint64(size - 1)).any():
            at = int(np.flatnonzero(misaligned)[0])
            raise Fault(f"misaligned address {int(addresses[at]):#x} of {size} bytes{describe(at)}")
        at = bisect_right(self.starts, low) - 1
        if at >= 0 and high + size <= self.regions[at].end:
            yield slice(None), *self._elements(at, addresses, size)
            return
        regions = np.searchsorted(self._sorted, addresses, side="right").astype(np.int64) - 1
        for at in np.unique(regions).tolist():
            selected = regions == at
            end = self.regions[at].end if at >= 0 else 0
            outside = selected & (addresses + np.uint64(size) > np.uint64(end))
            if outside.any():
                first = int(np.flatnonzero(outside)[0])
                near = f"; {self.regions[at].name} ends at {end:#x}" if at >= 0 else ""
                raise Fault(f"illegal address {int(addresses[first]):#x}{describe(first)}{near}")
            yield selected, *self._elements(at, addresses[selected], size)

    def _elements(self, at: int, addresses: Array, size: int) -> tuple[Array, Array]:
        first, elements = self.regions[at].view(size)
        return elements, (addresses - np.uint64(first)).astype(np.int64) >> (size.bit_length() - 1)

    def load(self, addresses: Array, size: int, describe: Any) -> Array:
        out = np.empty(len(addresses), CHUNKS[size])
        for selected, elements, index in self.locate(addresses, size, describe):
            out[selected] = elements[index]
            self.regions[bisect_right(self.starts, int(addresses[selected][0])) - 1].loaded += index.size * size
        return out

    def store(self, addresses: Array, values: Array, size: int, describe: Any) -> None:
        for selected, elements, index in self.locate(addresses, size, describe):
            elements[index] = values[selected]

    def save(self) -> list[Array]:
        return [region.bytes.copy() for region in self.regions]

    def restore(self, saved: Sequence[Array]) -> None:
        for region, old in zip(self.regions, saved, strict=True):
            region.bytes[:], region.loaded = old, 0


class Shared:
    """Shared memory of a batch of blocks, one after the other."""

    base = SHARED_BASE

    def __init__(self, blocks: int, size: int) -> None:
        self.size = size
        self.stride = -(-max(size, 16) // 1024) * 1024
        self.bytes = np.full(blocks * self.stride, UNWRITTEN, np.uint8)
        self.views = {size: self.bytes.view(dtype) for size, dtype in CHUNKS.items()}

    def offsets(self, frame: Any, addresses: Array, size: int, mask: Any) -> Array:
        """Return offsets into `bytes`; addresses of lanes outside the mask are not checked."""
        local = addresses.astype(np.int64) - SHARED_BASE
        wrong = mask & ((local < 0) | (local + size > self.size) | (local & (size - 1) != 0))
        if wrong.any():
            lane = int(np.flatnonzero(wrong)[0])
            what = "misaligned" if 0 <= local[lane] <= self.size - size else "illegal"
            access = f"{int(local[lane])} of {size} bytes, of {self.size}"
            raise Fault(f"{what} shared address {access}: {where(frame, lane)}")
        return frame.begins + np.where(mask, local, 0)


class Params:
    """Kernel parameters: the bytes of each, and the address that a kernel may take of it."""

    window = 0x7F00_0000  # fits the 32 bits in which Triton moves such an address

    def __init__(self, params: Sequence[Param], values: Sequence[bytes], descriptors: dict[str, Any]) -> None:
        self.values = {param.name: value for param, value in zip(params, values, strict=True)}
        self.descriptors = descriptors
        self.addresses: dict[str, int] = {}
        self.at: dict[int, str] = {}
        end = self.window
        for param in params:
            end = -(-end // param.align) * param.align
            self.addresses[param.name], self.at[end] = end, param.name
            end += param.size


def effective(frame: Any, address: Address, kind: str) -> Array:
    """Return the addresses of all lanes."""
    dtype = TYPES[kind]
    if isinstance(address.base, Symbol):
        return np.full(frame.n, dtype.type(frame.machine.shared.base + address.offset))
    base = read(frame, address.base, kind)
    return base + dtype.type(address.offset % 2 ** (8 * dtype.itemsize)) if address.offset else base


def describe_lane(frame: Any, mask: Any, text: str) -> Any:
    """Return a function of an index among the masked lanes, which describes the lane in an error."""
    return lambda at: f": {where(frame, int(np.flatnonzero(mask)[at]))}: {text}"


def store_shared(frame: Any, offsets: Array, values: Array, size: int, mask: Any, inst: Instruction) -> None:
    lanes = np.flatnonzero(mask)
    frame.machine.log.write(frame, lanes, offsets[lanes], values[lanes], size, inst)


_KINDS = [*(f"b{bits}" for bits in (8, 16, 32, 64)), "s8", "u8", "s16", "u16", "s32", "u32", "f32", "s64", "u64"]
_SPACES = ("global", "shared", "shared::cta")
VECTORS = {"": 1, "v2.": 2, "v4.": 4}
_FORMS = [f"{space}.{vector}{kind}" for space in _SPACES for vector, count in VECTORS.items() for kind in _KINDS
          if TYPES[kind].itemsize * count <= 16]  # fmt: skip


def access(inst: Instruction, frame: Any, registers: Any, address: Any) -> tuple[bool, list[Any], Array, str, int]:
    """Return whether a load or store is global, its registers, addresses, type, and size in bytes."""
    parts = inst.opcode.replace(".cg", "").split(".")
    is_global, kind, items = parts[1] == "global", parts[-1], destinations(registers)
    if len(items) != (int(parts[2][1]) if len(parts) == 4 else 1):
        raise Unmodelled(f"{len(items)} registers: {inst.text}")
    addresses = effective(frame, address, "u64" if is_global else "u32")
    return is_global, items, addresses, kind, TYPES[kind].itemsize * len(items)


# Without caches a load from L2 (.cg) is like another.
@executes(*(f"ld.{form}".replace("global", space) for form in _FORMS for space in ("global", "global.cg")))
def load(inst: Instruction, frame: Any, mask: Any) -> None:
    is_global, targets, at, kind, size = access(inst, frame, *inst.operands)
    machine = frame.machine
    if is_global:
        chunks = np.zeros(frame.n, CHUNKS[size])
        chunks[mask] = machine.memory.load(at[mask], size, describe_lane(frame, mask, inst.text))
    else:
        offsets = machine.shared.offsets(frame, at, size, mask)
        machine.log.read(frame, mask, offsets, size, inst)
        chunks = machine.shared.views[size][offsets // size]
    parts = chunks.view(TYPES[kind]).reshape(frame.n, -1)
    for i, reg in enumerate(targets):
        assign(frame, reg, np.ascontiguousarray(parts[:, i]), mask)


@executes(*(f"st.{form}" for form in _FORMS))
def store(inst: Instruction, frame: Any, mask: Any) -> None:
    is_global, sources, at, kind, size = access(inst, frame, *inst.operands[::-1])
    machine = frame.machine
    values = [per_lane(frame, read(frame, source, kind)) for source in sources]
    chunks = np.stack(values, 1).view(CHUNKS[size])[:, 0]
    if is_global:
        machine.memory.store(at[mask], chunks[mask], size, describe_lane(frame, mask, inst.text))
    else:
        store_shared(frame, machine.shared.offsets(frame, at, size, mask), chunks, size, mask, inst)


@executes("prefetch.global.L2")
def prefetch(inst: Instruction, frame: Any, mask: Any) -> None:
    """Check that the address is in bounds: a GPU ignores others."""
    at = per_lane(frame, effective(frame, *inst.operands, "u64"))
    for _ in frame.machine.memory.locate(at[mask], 1, describe_lane(frame, mask, inst.text)):
        pass


@executes(*(f"ld.param.{kind}" for kind in _KINDS))
def load_param(inst: Instruction, frame: Any, mask: Any) -> None:
    to, address = inst.operands
    (reg,) = destinations(to)
    if not isinstance(address.base, Symbol) or not isinstance(reg, Reg):
        raise Unmodelled(f"parameter at a computed address: {inst.text}")
    value = frame.machine.params.values[address.base.name]
    assign(frame, reg, np.frombuffer(value, TYPES[suffix(inst)], 1, address.offset)[0], mask)
