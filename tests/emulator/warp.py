"""Instructions of a whole warp: shuffles, reductions, elections, ldmatrix, stmatrix and mma (PTX ISA, section 9.7)."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import HALVES, to_fp32
from .memory import Fault, effective, store_shared, where
from .parser import Instruction, Unmodelled, Vector
from .values import Array, assign, destinations, executes, per_warp, read, suffix

ALL = np.uint32(0xFFFF_FFFF)


def check_full_warps(frame: Any, mask: Any, inst: Instruction, members: Any = ALL) -> None:
    """Raise unless all 32 lanes of each active warp run the instruction, and it names all of them as members."""
    if np.any(np.asarray(members) != ALL):
        raise Unmodelled(f"part of a warp: {inst.text}")
    warps = mask.reshape(-1, 32)
    if (partial := warps.any(1) & ~warps.all(1)).any():
        lane = 32 * int(np.flatnonzero(partial)[0])
        raise Fault(f"part of the warp of {where(frame, lane)} runs {inst.text}")


# lane, b, the segment's first lane, the segment mask -> the lane whose value is read
SHUFFLES: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "up": lambda lane, by, first, segment: lane - by,
    "down": lambda lane, by, first, segment: lane + by,
    "bfly": lambda lane, by, first, segment: lane ^ by,
    "idx": lambda lane, by, first, segment: first | by & ~segment,
}


@executes(*(f"shfl.sync.{name}.b32" for name in SHUFFLES))
def shuffle(inst: Instruction, frame: Any, mask: Any) -> None:
    name, (to, *sources, members) = inst.opcode.split(".")[2], inst.operands
    check_full_warps(frame, mask, inst, read(frame, members, "b32"))
    values, by, bound = (per_warp(frame, operand) for operand in sources)
    lane, by, bound = np.arange(32)[None], by.astype(np.int64), bound.astype(np.int64)
    segment, clamp = bound >> 8 & 31, bound & 31
    first = lane & segment
    limit = first | clamp & ~segment
    source = SHUFFLES[name](lane, by & 31, first, segment)
    inside = source >= limit if name == "up" else source <= limit
    source = np.where(inside, source, lane)
    target, *flags = destinations(to)
    assign(frame, target, np.take_along_axis(values, source, 1).reshape(-1), mask)
    for flag in flags:
        assign(frame, flag, np.ascontiguousarray(inside).reshape(-1), mask)


REDUCTIONS: dict[str, Any] = {f"{name}.{kind}": function for kind in ("s32", "u32") for name, function in
                              (("add", np.add), ("min", np.minimum), ("max", np.maximum))}  # fmt: skip
REDUCTIONS |= {"and.b32": np.bitwise_and, "or.b32": np.bitwise_or, "xor.b32": np.bitwise_xor}


@executes(*(f"redux.sync.{name}" for name in REDUCTIONS))
def redux(inst: Instruction, frame: Any, mask: Any) -> None:
    to, source, members = inst.operands
    check_full_warps(frame, mask, inst, read(frame, members, "b32"))
    values = per_warp(frame, source, suffix(inst))
    reduce = REDUCTIONS[inst.opcode.removeprefix("redux.sync.")].reduce
    assign(frame, to, np.repeat(reduce(values, axis=1, dtype=values.dtype), 32), mask)


@executes("elect.sync")
def elect(inst: Instruction, frame: Any, mask: Any) -> None:
    (to, flag), members = inst.operands[0].items, inst.operands[1]
    check_full_warps(frame, mask, inst, read(frame, members, "b32"))
    assign(frame, to, np.uint32(0), mask)
    assign(frame, flag, frame.lane == 0, mask)


@executes("bar.warp.sync")
def bar_warp(inst: Instruction, frame: Any, mask: Any) -> None:
    check_full_warps(frame, mask, inst, read(frame, inst.operands[0], "b32"))


def _rows(inst: Instruction, frame: Any, mask: Any, address: Any, count: int) -> tuple[Array, Array]:
    """Return the lanes that hold row addresses of `count` tiles, and the offsets of these rows."""
    check_full_warps(frame, mask, inst)
    lanes = mask & (frame.lane < 8 * count)
    return lanes, frame.machine.shared.offsets(frame, effective(frame, address, "u32"), 16, lanes)


_FORMS = [f"sync.aligned.m8n8.x{count}{trans}.shared.b16" for count in (1, 2, 4) for trans in ("", ".trans")]


def _tiles(inst: Instruction, halves: Array) -> Array:
    """Split 16-bit elements into tiles [warps, count, 8, 8], transposed if the opcode says so."""
    tiles = halves.reshape(-1, int(inst.opcode.split(".")[4][1]), 8, 8)
    return np.ascontiguousarray(tiles.swapaxes(2, 3)) if ".trans." in inst.opcode else tiles


@executes(*(f"ldmatrix.{form}" for form in _FORMS))
def ldmatrix(inst: Instruction, frame: Any, mask: Any) -> None:
    targets, count = inst.operands[0].items, len(inst.operands[0].items)
    lanes, offsets = _rows(inst, frame, mask, inst.operands[1], count)
    frame.machine.log.read(frame, lanes, offsets, 16, inst)
    chunks = np.zeros(frame.n, np.complex128)
    chunks[lanes] = frame.machine.shared.views[16][offsets[lanes] // 16]
    tiles = _tiles(inst, chunks.reshape(-1, 32)[:, : 8 * count].copy().view(np.uint16))
    for reg, words in zip(targets, tiles.view(np.uint32).reshape(-1, count, 32).swapaxes(0, 1), strict=True):
        assign(frame, reg, words.reshape(-1), mask)


@executes(*(f"stmatrix.{form}" for form in _FORMS))
def stmatrix(inst: Instruction, frame: Any, mask: Any) -> None:
    address, sources = inst.operands
    count = len(sources.items)
    lanes, offsets = _rows(inst, frame, mask, address, count)
    tiles = _tiles(inst, registers(frame, sources).view(np.uint16))
    chunks = np.zeros((frame.n // 32, 32), np.complex128)
    chunks[:, : 8 * count] = tiles.view(np.complex128).reshape(-1, 8 * count)
    store_shared(frame, offsets, chunks.reshape(-1), 16, lanes, inst)


def registers(frame: Any, vector: Vector) -> Array:
    """Return the values of a vector's registers as [warps, registers, 32]."""
    return np.stack([per_warp(frame, item) for item in vector.items], 1)


def rows_of_a(words: Array, kind: str) -> Array:
    """[warps, 4, 32] pairs of 16 bits -> fp64 [warps, 16, 16]: lane 4g + t holds row g, columns 2t and 2t + 1."""
    parts = to_fp32(words.view(np.uint16), kind).astype(np.float64)
    parts = parts.reshape(-1, 2, 2, 8, 8)  # column half, row half, row, column
    return parts.transpose(0, 2, 3, 1, 4).reshape(-1, 16, 16)


def columns_of_b(words: Array, kind: str) -> Array:
    """[warps, 2, 32] -> fp64 [warps, 16, 8]: lane 4g + t holds column g, rows 2t and 2t + 1."""
    parts = to_fp32(words.view(np.uint16), kind).astype(np.float64)
    return parts.reshape(-1, 2, 8, 8).transpose(0, 1, 3, 2).reshape(-1, 16, 8)


def rows_of_c(words: Array) -> Array:
    """[warps, 4 n, 32] fp32 -> [warps, 16, 8 n]: of each four, registers 0 and 1 are row g, 2 and 3 row g + 8."""
    tiles = words.shape[1] // 4
    parts = words.view(np.float32).reshape(-1, tiles, 2, 2, 8, 4)  # tile, row half, low or high, row, column pair
    return parts.transpose(0, 2, 4, 1, 5, 3).reshape(-1, 16, 8 * tiles)


def registers_of_c(rows: Array) -> Array:
    """Invert rows_of_c: fp32 [warps, 16, 8 n] -> [warps, 4 n, 32]."""
    tiles = rows.shape[2] // 8
    parts = rows.reshape(-1, 2, 8, tiles, 4, 2).transpose(0, 3, 1, 5, 2, 4)
    return np.ascontiguousarray(parts).reshape(-1, 4 * tiles, 32)


@executes(*(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" for kind in HALVES))
def mma(inst: Instruction, frame: Any, mask: Any) -> None:
    """Products and sums in fp64, rounded once: independent of the order, but not a GPU's last bit."""
    check_full_warps(frame, mask, inst)
    kind, (to, *sources) = inst.opcode.split(".")[7], inst.operands
    a, b, c = (registers(frame, vector) for vector in sources)
    new = registers_of_c((rows_of_a(a, kind) @ columns_of_b(b, kind) + rows_of_c(c)).astype(np.float32))
    for i, reg in enumerate(to.items):
        assign(frame, reg, new[:, i].reshape(-1), mask)
