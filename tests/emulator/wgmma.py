"""wgmma: asynchronous products of shared-memory tiles (PTX ISA, section 9.7.15).

Each warp of a group of four computes 16 rows by itself. Until a wait, no lane may read the result or overwrite the
operands; operands in registers must be written before a `wgmma.fence`.
"""

from collections import namedtuple
from functools import lru_cache
from typing import Any

import numpy as np

from .arithmetic import FROM_E4M3, HALVES, to_fp32
from .copies import AsyncGroups, swizzle
from .memory import SHARED_BASE, Fault, where
from .parser import Imm, Instruction, Program, Unmodelled, Vector
from .races import bits_of
from .values import MODELLED, Array, executes, per_lane, reader
from .warp import check_full_warps, registers, registers_of_c, rows_of_a, rows_of_c

SPANS = {1: 128, 2: 64, 3: 32}
UNDEFINED = np.uint32(0xFFFF_FFFF)  # NaN
SUM_BITS = (
    14  # of a sum of fp8 products (DeepSeek-V3 report, section 3.3.2); the order within an instruction is unknown
)


# The values that result registers will hold, [warps, 16, columns]; by lane the pending product's number, or 0
PendingResult = namedtuple("PendingResult", "rows number")


class TensorCore:
    """A frame's pending products. In every schedule their result registers are undefined until a wait."""

    def __init__(self, n: int) -> None:
        self.groups = AsyncGroups(n)
        self.unfenced = np.ones(n, bool)
        self.fenced: list[Array] = []  # the registers at the last fence
        self.results: dict[int, Array] = {}  # by register: the last product's result
        self.pending: dict[tuple[int, ...], PendingResult] = {}
        self.count = 0


# A pending product: its number, its result's registers, tiles that it read (a lane, offsets and chunks for each row),
# and registers that it read
Product = namedtuple("Product", "number slots tiles sources")


@lru_cache(maxsize=256)
def chunk_offsets(layout: int, rows: int, first: int, transposed: bool) -> Array:
    """Return offsets from a descriptor's start to each chunk of 16 bytes: [rows, 2], or transposed [16, rows / 8]."""
    leading, stride = (layout & 0x3FFF) << 4, (layout >> 16 & 0x3FFF) << 4
    base, mode = layout >> 33 & 7, layout >> 46
    if base or mode not in SPANS:
        raise Unmodelled(f"matrix descriptor of base offset {base}, swizzle {mode}")
    span = SPANS[mode]
    if transposed:
        k, r = np.arange(16)[:, None], first + 8 * np.arange(rows // 8)[None]
        return r // (span // 2) * leading + 2 * (r % (span // 2)) + k // 8 * stride + k % 8 * span
    r, chunk = first + np.arange(rows)[:, None], np.arange(2)[None]
    return r // 8 * stride + r % 8 * span + 16 * chunk


def tile_offsets(frame: Any, descriptors: Array, warps: Array, rows: int, first: Array, transposed: bool) -> Array:
    """[warps] descriptors -> [warps, chunks] offsets into the batch's shared memory. `first`: a warp's first row."""
    lanes = 32 * warps
    layouts = descriptors >> np.uint64(16)
    local = np.empty((len(warps), 2 * rows), np.int64)
    for layout, row in {*zip(layouts.tolist(), first.tolist(), strict=True)}:
        selected = (layouts == layout) & (first == row)
        starts = (descriptors[selected] & np.uint64(0x3FFF)).astype(np.int64) << 4
        offsets = chunk_offsets(layout, rows, row, transposed).reshape(-1)
        local[selected] = swizzle(starts[:, None] + offsets, SPANS[layout >> 46]) - SHARED_BASE
    outside = (local.min(1) < 0) | (local.max(1) + 16 > frame.machine.shared.size)
    if outside.any():
        lane = int(lanes[np.flatnonzero(outside)[0]])
        raise Fault(f"a matrix descriptor points out of shared memory: {where(frame, lane)}")
    return local + frame.begins[lanes][:, None]


def _uniform(frame: Any, values: Any, warps: Array, inst: Instruction) -> Array:
    by_warp = per_lane(frame, values).reshape(-1, 32)[warps]
    if (by_warp != by_warp[:, :1]).any():
        raise Fault(f"lanes of a warp differ in an operand: {inst.text}")
    return by_warp[:, 0]


def keep_bits(total: Array, largest: Array) -> Array:
    """Cut sums off after SUM_BITS bits from the first one of `largest`: of what was added, or of the sum."""
    unit = np.ldexp(1.0, np.frexp(largest)[1] - SUM_BITS)
    return np.trunc(total / unit) * unit


class WgmmaStep:
    """The step of a wgmma instruction, whose operands are parsed once."""

    def __init__(self, inst: Instruction, program: Program) -> None:
        to, a, b, scale_d, *flags = inst.operands
        values = [flag.value if isinstance(flag, Imm) else None for flag in flags]
        self.a_registers = a if isinstance(a, Vector) else None
        self.inst = inst
        shape, self.kind = inst.opcode.split(".")[4], inst.opcode.split(".")[6]
        transposes = 0 if self.kind == "e4m3" else 1 if self.a_registers else 2
        if values[:2] != [1, 1] or len(values) != 2 + transposes or (self.a_registers and not transposes):
            raise Unmodelled(f"negated operand, or unknown flags: {inst.text}")
        self.columns = int(shape[4:-3])
        self.slots = tuple(reg.slot for reg in to.items)
        self.transposed_a = transposes == 2 and values[2] == 1
        self.transposed_b = transposes > 0 and values[-1] == 1
        self.a = None if self.a_registers else reader(a, "u64")
        self.b, self.adds = reader(b, "u64"), reader(scale_d, "pred")

    def __call__(self, frame: Any, mask: Any) -> None:
        tensor, lanes = frame.tensor, frame.all if mask is None else mask
        check_full_warps(frame, lanes, self.inst)
        pending = tensor.pending.get(self.slots)
        accumulates = pending is not None and bool((pending.number[lanes] > 0).all())
        self._check_fence(frame, lanes, accumulates)
        warps = np.flatnonzero(lanes.reshape(-1, 32)[:, 0])
        tensor.count += 1
        product = Product(tensor.count, self.slots, [], {})
        a, b = self._load_a(frame, warps, product), self._load_b(frame, warps, product)
        total = (a.reshape(len(b), -1, a.shape[-1]) @ b.swapaxes(1, 2)).reshape(len(warps), 16, -1)
        largest = np.abs(total)
        adds = _uniform(frame, self.adds(frame), warps, self.inst)
        if adds.any():
            if pending and not accumulates and (pending.number.reshape(-1, 32)[warps] > 0).any():
                raise Unmodelled(f"accumulator that is pending in some warps only: {self.inst.text}")
            c = (
                pending.rows
                if accumulates
                else rows_of_c(np.stack([frame.R[slot].reshape(-1, 32) for slot in self.slots], 1))
            )
            before = c[warps]
            total = np.where(adds[:, None, None], total + before, total)
            largest = np.maximum(largest, np.maximum(np.abs(before), np.abs(total)))
        if self.kind == "e4m3":
            total = keep_bits(total, largest)
        self._set_result(frame, lanes, warps, total.astype(np.float32), product, accumulates)

    def _check_fence(self, frame: Any, lanes: Array, accumulates: bool) -> None:
        """Check that source registers hold the values of the last fence, or those that a product left there."""
        tensor = frame.tensor
        if (tensor.unfenced & lanes).any():
            raise Fault(f"no wgmma.fence before {self.inst.text}")
        slots = [reg.slot for reg in self.a_registers.items] if self.a_registers else []
        for slot in (*slots, *(() if accumulates else self.slots)):
            current, fenced, result = frame.R[slot], tensor.fenced[slot], tensor.results.get(slot)
            same = (current == fenced)[lanes].all() or (result is not None and (current == result)[lanes].all())
            if not same:
                raise Fault(f"no wgmma.fence after a register was written: {self.inst.text}")

    def _load_a(self, frame: Any, warps: Array, product: Product) -> Array:
        """Return A as fp64 [warps, 16, 16]."""
        if self.a_registers:
            product.sources.update({reg.slot: frame.R[reg.slot] for reg in self.a_registers.items})
            return rows_of_a(registers(frame, self.a_registers)[warps], self.kind)
        lanes = 32 * warps
        descriptors = _uniform(frame, self.a(frame), warps, self.inst)
        offsets = tile_offsets(frame, descriptors, warps, 16, 16 * (frame.warp[lanes] % 4), self.transposed_a)
        return self._load_tile(frame, offsets, lanes, bits_of(frame.warp[lanes]), 16, self.transposed_a, product)

    def _load_b(self, frame: Any, warps: Array, product: Product) -> Array:
        """Return B as fp64 [groups, columns, 16]: four warps of a block that read the same B are one group."""
        descriptors = _uniform(frame, self.b(frame), warps, self.inst)
        share = 1
        if len(warps) % 4 == 0:
            groups = descriptors.reshape(-1, 4), frame.block[32 * warps].reshape(-1, 4)
            share = 4 if all((group == group[:, :1]).all() for group in groups) else 1
        lead = warps[::share]
        offsets = tile_offsets(frame, descriptors[::share], lead, self.columns, np.zeros_like(lead), self.transposed_b)
        bits = np.bitwise_or.reduce(bits_of(frame.warp[32 * warps]).reshape(-1, share), axis=1)
        return self._load_tile(frame, offsets, 32 * lead, bits, self.columns, self.transposed_b, product)

    def _load_tile(
        self, frame: Any, offsets: Array, lanes: Array, bits: Array, rows: int, transposed: bool, product: Product
    ) -> Array:
        """Load chunks at [tiles, offsets], read by the warps of `bits`, as fp64 [tiles, rows, 16], of e4m3 32."""
        frame.machine.log.read_async(frame.block[lanes], bits, offsets, 16, self.inst)
        chunks = frame.machine.shared.views[16][offsets // 16]
        product.tiles.append((lanes, offsets, chunks))
        if self.kind == "e4m3":
            return FROM_E4M3[chunks.view(np.uint8)].reshape(-1, rows, 32)
        values = to_fp32(chunks.view(np.uint16), self.kind).astype(np.float64)
        return values.reshape(-1, 16, rows).swapaxes(1, 2) if transposed else values.reshape(-1, rows, 16)

    def _set_result(self, frame: Any, lanes: Any, warps: Any, new: Any, product: Product, accumulates: bool) -> None:
        """Keep the result, fp32 [warps, 16, columns], until a wait; until then its registers are undefined."""
        tensor = frame.tensor
        if (pending := tensor.pending.get(self.slots)) is None:
            if any(set(self.slots) & set(slots) for slots in tensor.pending):
                raise Fault(f"two pending products share a register: {self.inst.text}")
            rows = np.zeros((frame.n // 32, *new.shape[1:]), np.float32)
            pending = tensor.pending[self.slots] = PendingResult(rows, np.zeros(frame.n, np.int64))
        pending.rows[warps], pending.number[lanes] = new, product.number
        for slot in () if accumulates else self.slots:
            frame.R[slot] = np.where(lanes, UNDEFINED, frame.R[slot])
        tensor.groups.begin(self.inst, lanes, product)


for _n in range(8, 257, 8):
    MODELLED[f"wgmma.mma_async.sync.aligned.m64n{_n}k32.f32.e4m3.e4m3"] = WgmmaStep
    for _kind in HALVES:
        MODELLED[f"wgmma.mma_async.sync.aligned.m64n{_n}k16.f32.{_kind}.{_kind}"] = WgmmaStep


@executes("wgmma.fence.sync.aligned")
def fence(inst: Instruction, frame: Any, mask: Any) -> None:
    check_full_warps(frame, mask, inst)
    tensor = frame.tensor
    tensor.unfenced &= ~mask
    if mask.all() or not tensor.fenced:
        tensor.fenced = list(frame.R)
    else:
        pairs = zip(frame.R, tensor.fenced, strict=True)
        tensor.fenced = [new if new is old else np.where(mask, new, old) for new, old in pairs]


@executes("wgmma.commit_group.sync.aligned")
def commit(inst: Instruction, frame: Any, mask: Any) -> None:
    frame.tensor.groups.commit(mask)


@executes("wgmma.wait_group.sync.aligned")
def wait(inst: Instruction, frame: Any, mask: Any) -> None:
    check_full_warps(frame, mask, inst)
    frame.tensor.unfenced |= mask
    for op, completed in frame.tensor.groups.complete(inst.operands[0].value, mask):
        _complete(frame, op.inst, op.data, completed)


def _complete(frame: Any, inst: Instruction, product: Product, completed: Array) -> None:
    """Check that a product's operands are unchanged, and write its result unless a later product owns the registers."""
    shared, tensor = frame.machine.shared.views[16], frame.tensor
    for lanes, offsets, chunks in product.tiles:
        rows = completed[lanes]
        if (shared[offsets[rows] // 16].view(np.uint64) != chunks[rows].view(np.uint64)).any():
            raise Fault(f"shared memory changed under {inst.text} of {frame.machine.code.program.name}")
    for slot, value in product.sources.items():
        if (frame.R[slot] != value)[completed].any():
            raise Fault(f"a register changed under {inst.text}")
    pending = tensor.pending[product.slots]
    lanes = completed & (pending.number == product.number)
    if not lanes.any():
        return
    values = registers_of_c(pending.rows).view(np.uint32)
    for slot, value in zip(product.slots, values.swapaxes(0, 1), strict=True):
        if (frame.R[slot] != UNDEFINED)[lanes].any():
            raise Fault(f"the result's register was written under {inst.text}")
        frame.R[slot] = tensor.results[slot] = np.where(lanes, value.reshape(-1), frame.R[slot])
    pending.number[lanes] = 0
    if not pending.number.any():
        del tensor.pending[product.slots]
