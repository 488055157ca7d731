"""ldmatrix, stmatrix and mma: tiles that a warp's lanes hold together (PTX ISA, section 9.7.14.5)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .floats import widen
from .memory import effective, put
from .text import Instruction, Program, Vector
from .values import Array, Step, assign, effect, reader
from .warp import check_together


def _rows(one: Instruction, operand: Any, count: int) -> Any:
    """-> function of frame and mask: the lanes whose addresses count, and the places of the rows they point to."""
    address = effective(operand, "u32")

    def go(frame: Any, mask: Any) -> tuple[Array, Array]:
        check_together(frame, mask, one)
        used = frame.lane < 8 * count
        if mask is not None:
            used = used & mask
        return used, frame.machine.shared.offsets(frame, address(frame), 16, used)

    return go


def _load(one: Instruction, program: Program) -> Step:
    count, transposed = int(one.opcode.split(".")[4][1]), ".trans." in one.opcode
    rows, destinations = _rows(one, one.operands[1], count), one.operands[0].items

    def go(frame: Any, mask: Any) -> None:
        machine = frame.machine
        used, at = rows(frame, mask)
        machine.log.read(frame, used, at, 16, one)
        chunks = np.zeros(frame.n, np.complex128)
        chunks[used] = machine.shared.views[16][at[used] // 16]
        tiles = chunks.reshape(-1, 32)[:, : 8 * count].copy().view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        for i, part in enumerate(tiles.view(np.uint32).reshape(-1, count, 32).swapaxes(0, 1)):
            assign(frame, destinations[i], part.reshape(-1), mask)

    return go


def _store(one: Instruction, program: Program) -> Step:
    count, transposed = int(one.opcode.split(".")[4][1]), ".trans." in one.opcode
    rows, sources = _rows(one, one.operands[0], count), [reader(item, "b32") for item in one.operands[1].items]

    def go(frame: Any, mask: Any) -> None:
        used, at = rows(frame, mask)
        held = np.stack([np.broadcast_to(source(frame), frame.n).reshape(-1, 32) for source in sources], 1)
        tiles = held.view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            tiles = np.ascontiguousarray(tiles.swapaxes(2, 3))
        chunks = np.zeros((frame.n // 32, 32), np.complex128)
        chunks[:, : 8 * count] = tiles.view(np.complex128).reshape(-1, 8 * count)
        put(frame, at, chunks.reshape(-1), 16, used, one)

    return go


for _count in (1, 2, 4):
    for _trans in ("", ".trans"):
        effect(f"ldmatrix.sync.aligned.m8n8.x{_count}{_trans}.shared.b16")(_load)
        effect(f"stmatrix.sync.aligned.m8n8.x{_count}{_trans}.shared.b16")(_store)


def held(frame: Any, items: Vector) -> Array:
    """Registers of a warp's lanes -> [warps, registers, 32]."""
    parts = [np.broadcast_to(reader(item, "b32")(frame), frame.n).reshape(-1, 32) for item in items.items]
    return np.stack(parts, 1)


def rows_of_a(registers: Array, kind: str) -> Array:
    """[warps, 4, 32] pairs of 16 bits -> fp64 [warps, 16, 16]: lane 4g + t has row g, columns 2t and 2t + 1."""
    parts = widen(registers.view(np.uint16), kind).astype(np.float64)
    parts = parts.reshape(-1, 2, 2, 8, 8)  # column half, row half, row, column
    return parts.transpose(0, 2, 3, 1, 4).reshape(-1, 16, 16)


def columns_of_b(registers: Array, kind: str) -> Array:
    """[warps, 2, 32] -> fp64 [warps, 16, 8]: lane 4g + t has column g, rows 2t and 2t + 1."""
    parts = widen(registers.view(np.uint16), kind).astype(np.float64)
    return parts.reshape(-1, 2, 8, 8).transpose(0, 1, 3, 2).reshape(-1, 16, 8)


def rows_of_c(registers: Array) -> Array:
    """[warps, 4 n, 32] fp32 -> [warps, 16, 8 n]: of each four, registers 0 and 1 are row g, 2 and 3 row g + 8."""
    tiles = registers.shape[1] // 4
    parts = registers.view(np.float32).reshape(-1, tiles, 2, 2, 8, 4)  # tile, row half, low or high, row, column pair
    return parts.transpose(0, 2, 4, 1, 5, 3).reshape(-1, 16, 8 * tiles)


def registers_of_c(rows: Array) -> Array:
    """The way back: fp32 [warps, 16, 8 n] -> [warps, 4 n, 32]."""
    tiles = rows.shape[2] // 8
    parts = rows.reshape(-1, 2, 8, tiles, 4, 2).transpose(0, 3, 1, 5, 2, 4)
    return np.ascontiguousarray(parts).reshape(-1, 4 * tiles, 32)


@effect(*(f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32" for kind in ("bf16", "f16")))
def mma(one: Instruction, program: Program) -> Step:
    """Products and their sum in fp64, rounded once: not the last bit of a GPU's sum, but the same in any order."""
    to, a, b, c = one.operands
    kind = one.opcode.split(".")[7]

    def go(frame: Any, mask: Any) -> None:
        check_together(frame, mask, one)
        total = rows_of_a(held(frame, a), kind) @ columns_of_b(held(frame, b), kind)
        new = registers_of_c((total + rows_of_c(held(frame, c))).astype(np.float32))
        for i, reg in enumerate(to.items):
            assign(frame, reg, new[:, i].reshape(-1), mask)

    return go
