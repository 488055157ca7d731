"""What the lanes of a warp do together: shuffles, reductions, elections, and synchronizing (PTX ISA, 9.7.9, 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .memory import Fault, where
from .text import Instruction, Pair, Program, Reg, Unmodelled
from .values import Array, Step, assign, effect, kinds, last, reader, writers

ALL = np.uint32(0xFFFF_FFFF)


def check_together(frame: Any, mask: Any, one: Instruction, members: Any = ALL) -> None:
    """All 32 lanes of a warp are there: the others would be waited for, and what they give is nothing."""
    if np.any(np.asarray(members) != ALL):
        raise Unmodelled(f"a part of a warp: {one.text}")
    if mask is not None:
        warps = mask.reshape(-1, 32)
        torn = warps.any(1) & ~warps.all(1)
        if torn.any():
            lane = 32 * int(np.flatnonzero(torn)[0])
            raise Fault(f"a part of the warp of {where(frame, lane)} runs {one.text}")


def shuffle(name: str, source: Callable[[Array, Array, Array, Array], Array]) -> None:
    """`source(lane, b, segment's first lane, clamp)` -> the lane whose value is taken, and whether it is in range."""

    @effect(f"shfl.sync.{name}.b32")
    def build(one: Instruction, program: Program) -> Step:
        to, *_ = writers(one.operands[0])
        flag = one.operands[0].items[1] if isinstance(one.operands[0], Pair) else None
        a, b, c, members = (reader(operand, "b32") for operand in one.operands[1:])
        lane = np.arange(32)[None]

        def go(frame: Any, mask: Any) -> None:
            check_together(frame, mask, one, members(frame))
            by, bound = (np.broadcast_to(x(frame), frame.n).reshape(-1, 32).astype(np.int64) for x in (b, c))
            segment, clamp = bound >> 8 & 31, bound & 31
            first = lane & segment
            limit = first | clamp & ~segment
            got = source(lane, by & 31, first, segment)
            inside = got >= limit if name == "up" else got <= limit
            got = np.where(inside, got, lane)
            values = np.broadcast_to(a(frame), frame.n).reshape(-1, 32)
            assign(frame, to, np.take_along_axis(values, got, 1).reshape(-1), mask)
            if isinstance(flag, Reg):
                assign(frame, flag, np.ascontiguousarray(inside).reshape(-1), mask)

        return go


shuffle("up", lambda lane, by, first, segment: lane - by)
shuffle("down", lambda lane, by, first, segment: lane + by)
shuffle("bfly", lambda lane, by, first, segment: lane ^ by)
shuffle("idx", lambda lane, by, first, segment: first | by & ~segment)

REDUCED: dict[str, Any] = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip
_INTEGERS = [f"{name}.{kind}" for name in ("add", "min", "max") for kind in ("s32", "u32")]


@effect(*kinds("redux.sync", *_INTEGERS, "and.b32", "or.b32", "xor.b32"))
def redux(one: Instruction, program: Program) -> Step:
    (to,), function = writers(one.operands[0]), REDUCED[one.opcode.split(".")[2]]
    a, members = reader(one.operands[1], last(one)), reader(one.operands[2], "b32")

    def go(frame: Any, mask: Any) -> None:
        check_together(frame, mask, one, members(frame))
        values = np.broadcast_to(a(frame), frame.n).reshape(-1, 32)
        assign(frame, to, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), 32), mask)

    return go


@effect("elect.sync")
def elect(one: Instruction, program: Program) -> Step:
    to, flag = one.operands[0].items
    members = reader(one.operands[1], "b32")

    def go(frame: Any, mask: Any) -> None:
        check_together(frame, mask, one, members(frame))
        assign(frame, to, np.uint32(0), mask)
        assign(frame, flag, frame.lane == 0, mask)

    return go


@effect("bar.warp.sync")
def bar_warp(one: Instruction, program: Program) -> Step:
    members = reader(one.operands[0], "b32")
    return lambda frame, mask: check_together(frame, mask, one, members(frame))
