"""wgmma: products of tiles of shared memory, begun now and done when somebody waits (PTX ISA, section 9.7.15).

Each warp of four computes 16 rows by itself. Until it has waited nobody may read its result, nor change what it reads;
what it reads from registers has to stand behind a `wgmma.fence`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from .copies import Flights
from .floats import widen
from .matrix import held, registers_of_c, rows_of_a, rows_of_c
from .memory import SHARED_BASE, Fault, where
from .text import Imm, Instruction, Program, Unmodelled, Vector
from .tma import swizzled
from .values import Array, Step, effect, reader
from .warp import check_together

SPANS = {1: 128, 2: 64, 3: 32}
NOTHING = np.uint32(0xFFFF_FFFF)  # NaN


@dataclass
class Coming:
    """What the registers of a result will hold, [warps, 16, columns]; the product that each lane waits for, 0: none."""

    rows: Array
    serial: Array


class Tensor:
    """A frame's products under way. Their results are nothing until somebody has waited, in every schedule."""

    def __init__(self, n: int) -> None:
        self.flights = Flights(n)
        self.unfenced = np.ones(n, bool)
        self.fenced: list[Array] = []  # registers as they stood at the last fence
        self.put: dict[int, Array] = {}  # by register: what the last product left there
        self.coming: dict[tuple[int, ...], Coming] = {}
        self.nothing = np.full(n, NOTHING)
        self.serial = 0


@dataclass
class Load:
    """What a product reads: places and values of shared memory, registers; and the registers it writes."""

    serial: int
    slots: tuple[int, ...]
    places: list[tuple[Array, Array, Array]]  # a lane a row, places, what was there
    sources: dict[int, Array]


@lru_cache(maxsize=256)
def chunk_offsets(layout: int, rows: int, first: int, transposed: bool) -> Array:
    """From a descriptor's start to each chunk of 16 bytes: [rows, 2], or transposed [16, rows / 8]."""
    leading, stride = (layout & 0x3FFF) << 4, (layout >> 16 & 0x3FFF) << 4
    base, swizzle = layout >> 33 & 7, layout >> 46
    if base or swizzle not in SPANS:
        raise Unmodelled(f"a matrix descriptor of base offset {base}, swizzle {swizzle}")
    span = SPANS[swizzle]
    if transposed:
        k, r = np.arange(16)[:, None], first + 8 * np.arange(rows // 8)[None]
        return r // (span // 2) * leading + 2 * (r % (span // 2)) + k // 8 * stride + k % 8 * span
    r, chunk = first + np.arange(rows)[:, None], np.arange(2)[None]
    return r // 8 * stride + r % 8 * span + 16 * chunk


def places_of(frame: Any, descriptors: Array, warps: Array, rows: int, first: Array, transposed: bool) -> Array:
    """[warps] descriptors -> [warps, chunks] places in the batch's shared memory. `first`: a warp's first row."""
    lanes = 32 * warps
    layouts = descriptors >> np.uint64(16)
    local = np.empty((len(warps), 2 * rows), np.int64)
    for layout, row in {*zip(layouts.tolist(), first.tolist(), strict=True)}:
        own = (layouts == layout) & (first == row)
        starts = (descriptors[own] & np.uint64(0x3FFF)).astype(np.int64) << 4
        offsets = chunk_offsets(layout, rows, row, transposed).reshape(-1)
        local[own] = swizzled(starts[:, None] + offsets, SPANS[layout >> 46]) - SHARED_BASE
    outside = (local.min(1) < 0) | (local.max(1) + 16 > frame.machine.shared.size)
    if outside.any():
        lane = int(lanes[np.flatnonzero(outside)[0]])
        raise Fault(f"a matrix descriptor leads out of shared memory: {where(frame, lane)}")
    return local + frame.begins[lanes][:, None]


def elements(chunks: Array, rows: int, kind: str, transposed: bool) -> Array:
    """[warps, chunks] -> fp64 [warps, rows, 16]."""
    values = widen(chunks.view(np.uint16), kind).astype(np.float64)
    return values.reshape(-1, 16, rows).swapaxes(1, 2) if transposed else values.reshape(-1, rows, 16)


@dataclass(frozen=True)
class WgmmaForm:
    """An instruction's operands, read once."""

    one: Instruction
    kind: str
    columns: int
    slots: tuple[int, ...]  # of the result's registers
    a: Any
    b: Any
    added: Any
    transposed: tuple[bool, bool]

    @classmethod
    def of(cls, one: Instruction) -> WgmmaForm:
        to, a, b, added, *flags = one.operands
        values = [flag.value if isinstance(flag, Imm) else None for flag in flags]
        from_registers = isinstance(a, Vector)
        if values[:2] != [1, 1] or len(values) != (3 if from_registers else 4):
            raise Unmodelled(f"a sign, or flags: {one.text}")
        transposed = (False, values[2] == 1) if from_registers else (values[2] == 1, values[3] == 1)
        shape, kind = one.opcode.split(".")[4], one.opcode.split(".")[6]
        added = reader(added, "pred")
        a = a if from_registers else reader(a, "u64")
        slots = tuple(reg.slot for reg in to.items)
        return cls(one, kind, int(shape[4:-3]), slots, a, reader(b, "u64"), added, transposed)


def _issue(one: Instruction, program: Program) -> Step:
    form = WgmmaForm.of(one)

    def go(frame: Any, mask: Any) -> None:
        check_together(frame, mask, one)
        tensor, lanes = frame.tensor, np.ones(frame.n, bool) if mask is None else mask
        coming = tensor.coming.get(form.slots)
        chained = coming is not None and bool((coming.serial[lanes] > 0).all())
        _check_fence(frame, lanes, form, chained)
        warps = np.flatnonzero(lanes.reshape(-1, 32)[:, 0])
        tensor.serial += 1
        load = Load(tensor.serial, form.slots, [], {})
        a = _left(frame, warps, form, load)
        b = _right(frame, warps, form, load)
        total = (a.reshape(len(b), -1, 16) @ b.swapaxes(1, 2)).reshape(len(warps), 16, -1)
        added = _uniform(frame, form.added(frame), warps, one)
        if added.any():
            before = coming.rows[warps] if chained else _from_registers(frame, form, warps)
            total = np.where(added[:, None, None], total + before, total)
        _leave(frame, lanes, warps, total.astype(np.float32), form, load, chained)

    return go


def _from_registers(frame: Any, form: WgmmaForm, warps: Array) -> Array:
    """Fp32 [warps, 16, columns]: what a product is added to."""
    coming = frame.tensor.coming.get(form.slots)
    if coming is not None and (coming.serial.reshape(-1, 32)[warps] > 0).any():
        raise Unmodelled(f"of some warps the sum is under way, of others not: {form.one.text}")
    held_there = np.stack([frame.R[slot].reshape(-1, 32)[warps] for slot in form.slots], 1)
    return rows_of_c(held_there)


def _uniform(frame: Any, values: Any, warps: Array, one: Instruction) -> Array:
    """One value a warp."""
    by_warp = np.broadcast_to(values, frame.n).reshape(-1, 32)[warps]
    if (by_warp != by_warp[:, :1]).any():
        raise Fault(f"lanes of a warp differ in an operand: {one.text}")
    return by_warp[:, 0]


def _left(frame: Any, warps: Array, form: WgmmaForm, load: Load) -> Array:
    """-> fp64 [warps, 16, 16]"""
    if isinstance(form.a, Vector):
        load.sources = {reg.slot: frame.R[reg.slot] for reg in form.a.items}
        return rows_of_a(held(frame, form.a)[warps], form.kind)
    first = 16 * (frame.warp[32 * warps] % 4)
    places = places_of(frame, _uniform(frame, form.a(frame), warps, form.one), warps, 16, first, form.transposed[0])
    bits = np.left_shift(np.uint32(1), frame.warp[32 * warps].astype(np.uint32))
    return elements(_fetch(frame, places, 32 * warps, bits, form, load), 16, form.kind, form.transposed[0])


def _right(frame: Any, warps: Array, form: WgmmaForm, load: Load) -> Array:
    """-> fp64 [groups, columns, 16]: four warps of a block that read the same are a group, else each is one."""
    descriptors = _uniform(frame, form.b(frame), warps, form.one)
    share = 1
    if len(warps) % 4 == 0:
        fours = descriptors.reshape(-1, 4), frame.block[32 * warps].reshape(-1, 4)
        share = 4 if all((one == one[:, :1]).all() for one in fours) else 1
    lead = warps[::share]
    places = places_of(frame, descriptors[::share], lead, form.columns, np.zeros_like(lead), form.transposed[1])
    bits = np.left_shift(np.uint32(1), frame.warp[32 * warps].astype(np.uint32))
    bits = np.bitwise_or.reduce(bits.reshape(-1, share), axis=1)
    got = _fetch(frame, places, 32 * lead, bits, form, load)
    return elements(got, form.columns, form.kind, form.transposed[1])


def _fetch(frame: Any, places: Array, lanes: Array, bits: Array, form: WgmmaForm, load: Load) -> Array:
    """Chunks at [rows, places], noted as read by the warps of `bits`."""
    machine = frame.machine
    machine.log.asynchronous(frame.block[lanes], bits, places, 16, form.one)
    got = machine.shared.views[16][places // 16]
    load.places.append((lanes, places, got))
    return got


def _check_fence(frame: Any, lanes: Array, form: WgmmaForm, chained: bool) -> None:
    """Registers that a product reads or adds to stand as at the last fence, or as a product left them."""
    tensor = frame.tensor
    if (tensor.unfenced & lanes).any():
        raise Fault(f"no wgmma.fence before {form.one.text}")
    slots = [reg.slot for reg in form.a.items] if isinstance(form.a, Vector) else []
    for slot in (*slots, *(() if chained else form.slots)):
        now, then, own = frame.R[slot], tensor.fenced[slot], tensor.put.get(slot)
        same = now is then or now is own or (now == then)[lanes].all()
        if not same and (own is None or (now != own)[lanes].any()):
            raise Fault(f"no wgmma.fence after a register was written: {form.one.text}")


def _leave(frame: Any, lanes: Array, warps: Array, new: Array, form: WgmmaForm, load: Load, chained: bool) -> None:
    """Fp32 [warps, 16, columns]: it comes when somebody waits."""
    tensor, everyone = frame.tensor, bool(lanes.all())
    coming = tensor.coming.get(form.slots)
    if coming is None:
        if any(set(form.slots) & set(others) for others in tensor.coming):
            raise Fault(f"a register of two products under way: {form.one.text}")
        coming = Coming(np.zeros((frame.n // 32, *new.shape[1:]), np.float32), np.zeros(frame.n, np.int64))
        tensor.coming[form.slots] = coming
    coming.rows = new if everyone else coming.rows.copy()
    coming.rows[warps] = new
    coming.serial = np.where(lanes, load.serial, coming.serial)
    for slot in () if chained else form.slots:
        frame.R[slot] = tensor.nothing if everyone else np.where(lanes, tensor.nothing, frame.R[slot])
    tensor.flights.begin(form.one, None if everyone else lanes, load)


for _n in range(8, 257, 8):
    for _kind in ("bf16", "f16"):
        effect(f"wgmma.mma_async.sync.aligned.m64n{_n}k16.f32.{_kind}.{_kind}")(_issue)


@effect("wgmma.fence.sync.aligned")
def fence(one: Instruction, program: Program) -> Step:
    def go(frame: Any, mask: Any) -> None:
        check_together(frame, mask, one)
        frame.tensor.unfenced &= False if mask is None else ~mask
        if mask is None or not frame.tensor.fenced:
            frame.tensor.fenced = list(frame.R)
        else:
            old = frame.tensor.fenced
            frame.tensor.fenced = [
                new if new is before else np.where(mask, new, before) for new, before in zip(frame.R, old, strict=True)
            ]

    return go


@effect("wgmma.commit_group.sync.aligned")
def commit(one: Instruction, program: Program) -> Step:
    return lambda frame, mask: frame.tensor.flights.commit(mask)


@effect("wgmma.wait_group.sync.aligned")
def wait(one: Instruction, program: Program) -> Step:
    youngest = one.operands[0].value

    def go(frame: Any, mask: Any) -> None:
        check_together(frame, mask, one)
        tensor = frame.tensor
        tensor.unfenced |= True if mask is None else mask
        for flight, now in tensor.flights.due(youngest, mask):
            _land(frame, flight.one, flight.load, now)

    return go


def _land(frame: Any, one: Instruction, load: Load, now: Array) -> None:
    shared = frame.machine.shared.views[16]
    for lanes, places, got in load.places:
        rows = now[lanes]
        if (shared[places[rows] // 16].view(np.uint64) != got[rows].view(np.uint64)).any():
            raise Fault(f"shared memory changed under {one.text} of {frame.machine.code.program.name}")
    for slot, value in load.sources.items():
        if frame.R[slot] is not value and (frame.R[slot] != value)[now].any():
            raise Fault(f"a register changed under {one.text}")
    tensor, coming = frame.tensor, frame.tensor.coming[load.slots]
    own = now & (coming.serial == load.serial)  # of others a later product has the registers
    if not own.any():
        return
    values, everyone = registers_of_c(coming.rows).view(np.uint32), bool(own.all())
    for slot, value in zip(load.slots, values.swapaxes(0, 1), strict=True):
        if frame.R[slot] is not tensor.nothing and (frame.R[slot] != NOTHING)[own].any():
            raise Fault(f"the result's register was written under {one.text}")
        new = value.reshape(-1)
        frame.R[slot] = tensor.put[slot] = new if everyone else np.where(own, new, frame.R[slot])
    coming.serial = np.where(own, 0, coming.serial)
    if not coming.serial.any():
        del tensor.coming[load.slots]
