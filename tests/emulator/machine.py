"""Blocks of a launch, executed: frames of lanes, straight pieces of code, divergence, barriers, and what waits.

A frame is what runs as one: all lanes of a batch of blocks in lockstep, or one warp of each of them. The piece at the
lowest place that has lanes ready runs first, on those lanes; lanes that are at one place are together again.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import early, floats, integers, matrix, tma, warp  # noqa: F401  each declares the opcodes that it models
from .barriers import Barriers
from .copies import Flights
from .memory import Fault, Global, Params, Shared, where
from .monitor import Log, NoLog
from .text import Imm, Instruction, Program, Unmodelled
from .values import MODELLED, UNSIGNED, Array, Step, check_modelled, guarded, symbol
from .wgmma import Tensor

LANES_MOST = 1 << 14  # of a batch
SHARED_MOST = 1 << 26  # bytes of a batch


@dataclass(frozen=True)
class Schedule:
    """late: copies, and the results of wgmma, land no sooner than somebody waits for them."""

    name: str
    lockstep: bool = False
    backwards: bool = False
    late: bool = False
    logged: bool = False


SCHEDULES = (
    Schedule("warps forwards, copies at once"),
    Schedule("warps backwards, copies late", backwards=True, late=True),
    Schedule("lockstep, logged", lockstep=True, logged=True),
)


@dataclass
class Piece:
    """Instructions begin..end - 1 without a branch; then `last`, if it is one that decides where lanes go."""

    begin: int
    end: int
    steps: list[Step]
    last: Instruction | None
    unguarded: Array


class Code:
    """A program as steps. `ran` has the instructions that at least one lane has run; `key` tells variants apart."""

    def __init__(self, program: Program, key: str = "") -> None:
        self.key = key
        check_modelled(program)
        self.program = program
        self.ran = np.zeros(len(program.instructions), bool)
        self.pieces: dict[int, Piece] = {}
        starts = [*program.starts, len(program.instructions)]
        for begin, after in itertools.pairwise(starts):
            own = program.instructions[begin:after]
            ends = bool(own) and own[-1].opcode not in MODELLED
            straight = own[:-1] if ends else own
            made = [early.watched(one, MODELLED[one.opcode](one, program)) for one in straight]
            steps = [guarded(one, step, begin + i) for i, (one, step) in enumerate(zip(straight, made, strict=True))]
            plain = np.array([begin + i for i, one in enumerate(own) if one.guard is None], int)
            self.pieces[begin] = Piece(begin, after, steps, own[-1] if ends else None, plain)

    def target(self, one: Instruction) -> int:
        name = symbol(one.operands[0])
        if name is None or name not in self.program.labels:
            raise Unmodelled(f"branch to no label: {one.text}")
        return self.program.labels[name]


class Frame:
    """Lanes that run as one. `ready`, `barred`, `parked`: by the place of a piece, which lanes (None: all)."""

    def __init__(self, machine: Machine, warps: Sequence[int]) -> None:
        program, blocks = machine.code.program, machine.blocks
        self.machine, self.ran = machine, machine.code.ran
        lanes = np.concatenate([np.arange(32) + 32 * w for w in warps])
        count = len(blocks)
        self.n, self.per_block = count * len(lanes), len(lanes)
        self.tid = np.tile(lanes, count).astype(np.uint32)
        self.lane = self.tid & np.uint32(31)
        self.warp = (self.tid >> 5).astype(np.int64)
        self.block = np.repeat(np.arange(count), len(lanes))
        self.x, self.y, self.z = (np.repeat(blocks[:, i], len(lanes)).astype(np.uint32) for i in range(3))
        self.grid = dict(zip("xyz", machine.grid, strict=True))
        self.begins = self.block * machine.shared.stride
        unwritten = {
            width: ~np.zeros(self.n, UNSIGNED[width]) for width in (1, 16, 32, 64)
        }  # NaN, an address of nothing
        self.R = [unwritten[width] for width in program.widths]
        self.ready: dict[int, Any] = {0: None}
        self.barred: dict[int, Any] = {}
        self.parked: dict[int, Any] = {}
        self.refused = np.zeros(self.n, bool)
        self.done = np.zeros(self.n, bool)
        self.early = np.full(self.n, machine.memory.unsettled is not None)
        self.copies = Flights(self.n)
        self.tensor = Tensor(self.n)

    def join(self, queue: dict[int, Any], at: int, mask: Any) -> None:
        if at in queue:
            mask = None if mask is None else queue[at] | mask
        queue[at] = None if mask is None or mask.all() else mask

    def run(self) -> None:
        """Until every lane waits or is done."""
        pieces = self.machine.code.pieces
        while self.ready:
            at = min(self.ready)
            mask = self.ready.pop(at)
            if at not in pieces:
                raise Fault(f"{self.machine.code.program.name} runs over its end")
            piece = pieces[at]
            self.ran[piece.unguarded] = True
            for step in piece.steps:
                step(self, mask)
            if piece.last is None:
                self.join(self.ready, piece.end, mask)
            else:
                self._leave(piece, piece.last, mask)

    def _leave(self, piece: Piece, one: Instruction, mask: Any) -> None:
        taken = np.ones(self.n, bool) if mask is None else mask
        if one.guard is not None:
            flag = self.R[one.guard.slot]
            taken = taken & (~flag if one.negated else flag)
            stay = ~taken if mask is None else mask & ~taken
            if stay.any():
                self.join(self.ready, piece.end, stay)
            if not taken.any():
                return
            self.ran[piece.end - 1] = True
        kind = one.opcode.split(".")[0]
        if kind == "bra":
            self.join(self.ready, self.machine.code.target(one), taken)
        elif kind in ("ret", "exit"):
            self.done |= taken
        elif kind == "bar":
            if one.operands != (Imm(0),):
                raise Unmodelled(f"a barrier of a part of the block: {one.text}")
            self.join(self.barred, piece.end, taken)
        else:
            self._wait(piece, one, taken)

    def _wait(self, piece: Piece, one: Instruction, taken: Array) -> None:
        """`try_wait` may say no before it blocks: with late copies it does so once."""
        over = self.machine.barriers.over(self, one, taken)
        no = taken & ~over
        flag = one.operands[0]
        if over.any():
            self.refused &= ~over
            self.R[flag.slot] = np.where(over, True, self.R[flag.slot])
            self.join(self.ready, piece.end, over)
        if self.machine.schedule.late and (first := no & ~self.refused).any():
            self.refused |= first
            self.R[flag.slot] = np.where(first, False, self.R[flag.slot])
            self.join(self.ready, piece.end, first)
            no = no & ~first
        if no.any():
            self.join(self.parked, piece.begin, no)

    def settled(self) -> Array:
        """[blocks]: how many lanes stand at a barrier or are done."""
        waits = self.done.copy()
        for mask in self.barred.values():
            waits |= True if mask is None else mask
        return waits.reshape(-1, self.per_block).sum(1)

    def release(self, blocks: Array) -> None:
        """Lanes of these blocks leave the barrier."""
        lanes = np.repeat(blocks, self.per_block)
        for at, mask in list(self.barred.items()):
            go = lanes if mask is None else mask & lanes
            if go.any():
                self.join(self.ready, at, go)
            del self.barred[at]
            rest = ~lanes if mask is None else mask & ~lanes
            if rest.any():
                self.barred[at] = rest

    def wake(self) -> bool:
        """Lanes whose mbarrier's phase is over run on."""
        pieces, woken = self.machine.code.pieces, False
        for at, mask in list(self.parked.items()):
            one = pieces[at].last
            over = self.machine.barriers.over(self, one, np.ones(self.n, bool) if mask is None else mask, look=False)
            if over.any():
                del self.parked[at]
                rest = ~over if mask is None else mask & ~over
                if rest.any():
                    self.parked[at] = rest
                self.join(self.ready, at, over)
                woken = True
        return woken


@dataclass
class Machine:
    """A batch of blocks at work."""

    code: Code
    schedule: Schedule
    memory: Global
    params: Params
    shared_size: int
    grid: tuple[int, int, int]
    blocks: Array  # [blocks, 3]
    warps: int
    fenced_copies: bool = True
    shared: Shared = field(init=False)
    barriers: Barriers = field(init=False)
    log: Any = field(init=False)
    frames: list[Frame] = field(init=False)

    def __post_init__(self) -> None:
        self.shared = Shared(len(self.blocks), self.shared_size)
        self.barriers = Barriers(self)
        self.log = Log(self) if self.schedule.logged else NoLog(self)
        own = [[w] for w in range(self.warps)] if not self.schedule.lockstep else [list(range(self.warps))]
        self.frames = [Frame(self, warps) for warps in (own[::-1] if self.schedule.backwards else own)]

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                for frame in self.frames:
                    frame.run()
                if all(frame.done.all() for frame in self.frames):
                    break
                if not (self._release() or self._wake() or (self.barriers.land() and self._wake())):
                    raise Fault(f"waits for ever: {self._hung()}")
            self._check_end()

    def _release(self) -> bool:
        full = sum(frame.settled() for frame in self.frames) == self.warps * 32
        waits = np.zeros(len(self.blocks), bool)
        for frame in self.frames:
            for mask in frame.barred.values():
                waits |= True if mask is None else mask.reshape(-1, frame.per_block).any(1)
        released = full & waits
        if not released.any():
            return False
        self.log.barrier(released)
        for frame in self.frames:
            frame.release(released)
        return True

    def _wake(self) -> bool:
        woken = [frame.wake() for frame in self.frames]  # each of them
        return any(woken)

    def _hung(self) -> str:
        program, waits = self.code.program, []
        for frame in self.frames:
            for queue, kind in ((frame.parked, 0), (frame.barred, 1)):
                for at, mask in queue.items():
                    lane = 0 if mask is None else int(np.flatnonzero(mask)[0])
                    one = None if kind else self.code.pieces[at].last
                    waits.append((kind, f"{where(frame, lane)} of {program.name}: {one.text if one else 'bar.sync'}"))
        return min(waits)[1] if waits else program.name

    def _check_end(self) -> None:
        for frame in self.frames:
            for flights in (frame.copies, frame.tensor.flights):
                if flights.pending:
                    raise Fault(f"nobody waited for: {flights.pending[0].one.text}")
        self.barriers.check_end()


def execute(
    code: Code,
    schedule: Schedule,
    grid: tuple[int, int, int],
    memory: Global,
    params: Params,
    shared_size: int,
    fenced_copies: bool = True,
) -> None:
    """All blocks of a launch, in batches."""
    warps, ragged = divmod(code.program.threads, 32)
    if ragged:
        raise Unmodelled(f"{code.program.threads} threads a block")
    z, y, x = np.meshgrid(*(np.arange(n) for n in reversed(grid)), indexing="ij")
    blocks = np.stack((x, y, z), -1).reshape(-1, 3)
    blocks = blocks[::-1] if schedule.backwards else blocks
    most = max(1, min(LANES_MOST // (32 * warps), SHARED_MOST // max(shared_size, 1)))
    for begin in range(0, len(blocks), most):
        batch = blocks[begin : begin + most]
        Machine(code, schedule, memory, params, shared_size, grid, batch, warps, fenced_copies).run()
