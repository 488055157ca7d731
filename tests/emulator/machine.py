"""Execution of a launch's blocks: frames of lanes, basic blocks of code, divergence, barriers and waits.

A frame is the set of lanes that run together: all lanes of a batch of blocks in lockstep, or one warp of each of them.
The first basic block that has ready lanes runs next, on these lanes; lanes that reach the same block reconverge.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import floats, integers  # noqa: F401  they register the opcodes that they model
from .copies import AsyncGroups, Barriers
from .memory import Fault, Global, Params, Shared, where
from .parser import Imm, Instruction, Program, Unmodelled
from .pdl import checked
from .races import NoRaceDetector, RaceDetector
from .values import MODELLED, UNSIGNED, Array, Step, check_modelled, guarded, symbol
from .wgmma import TensorCore

MAX_LANES = 1 << 14  # of a batch
MAX_SHARED = 1 << 26  # bytes of a batch


@dataclass(frozen=True)
class Schedule:
    """late: copies complete, and results of wgmma are written, only at a wait; logged: with the race detector."""

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
class BasicBlock:
    """Instructions begin..end - 1: steps without a branch, then `control`, a branch or wait, if there is one."""

    begin: int
    end: int
    steps: list[Step]
    control: Instruction | None
    unguarded: Array


class Code:
    """A program compiled to steps. `ran`: which instructions at least one lane has run; `key`: of a variant."""

    def __init__(self, program: Program, key: str = "") -> None:
        check_modelled(program)
        self.program, self.key = program, key
        self.ran = np.zeros(len(program.instructions), bool)
        self.blocks: dict[int, BasicBlock] = {}
        for begin, end in itertools.pairwise([*program.starts, len(program.instructions)]):
            block = program.instructions[begin:end]
            control = block[-1] if block and block[-1].opcode not in MODELLED else None
            steps = [
                guarded(inst, checked(inst, MODELLED[inst.opcode](inst, program)), at)
                for at, inst in enumerate(block if control is None else block[:-1], begin)
            ]
            unguarded = np.array([at for at, inst in enumerate(block, begin) if inst.guard is None], int)
            self.blocks[begin] = BasicBlock(begin, end, steps, control, unguarded)

    def target(self, inst: Instruction) -> int:
        name = symbol(inst.operands[0])
        if name is None or name not in self.program.labels:
            raise Unmodelled(f"branch to no label: {inst.text}")
        return self.program.labels[name]


Queue = dict[int, Any]  # by the start of a basic block, a mask of lanes; None: all


def join(queue: Queue, at: int, mask: Any) -> None:
    """Add lanes to a queue."""
    if at in queue:
        mask = None if mask is None else queue[at] | mask
    queue[at] = None if mask is None or mask.all() else mask


def leave(queue: Queue, at: int, lanes: Array) -> Array:
    """Remove lanes from a queue; return which of them were in it."""
    mask = queue.pop(at)
    if (rest := ~lanes if mask is None else mask & ~lanes).any():
        queue[at] = rest
    return lanes if mask is None else mask & lanes


class Frame:
    """Lanes that run together: `ready`, waiting `at_barrier` of the block, or waiting `at_mbarrier`."""

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
        # Unwritten registers are NaN and invalid addresses.
        unwritten = {width: ~np.zeros(self.n, UNSIGNED[width]) for width in (1, 16, 32, 64)}
        self.R = [unwritten[width] for width in program.widths]
        self.ready: Queue = {0: None}
        self.at_barrier: Queue = {}
        self.at_mbarrier: Queue = {}
        self.try_failed = np.zeros(self.n, bool)
        self.done = np.zeros(self.n, bool)
        self.before_wait = np.full(self.n, machine.memory.pending is not None)
        self.copies = AsyncGroups(self.n)
        self.tensor = TensorCore(self.n)

    def run(self) -> None:
        """Run until every lane waits or is done."""
        while self.ready:
            at = min(self.ready)
            mask = self.ready.pop(at)
            if at not in self.machine.code.blocks:
                raise Fault(f"{self.machine.code.program.name} runs past its end")
            block = self.machine.code.blocks[at]
            self.ran[block.unguarded] = True
            for step in block.steps:
                step(self, mask)
            if block.control is None:
                join(self.ready, block.end, mask)
            else:
                self._control(block, block.control, mask)

    def _control(self, block: BasicBlock, inst: Instruction, mask: Any) -> None:
        taken = np.ones(self.n, bool) if mask is None else mask
        if inst.guard is not None:
            flag = self.R[inst.guard.slot]
            taken = taken & (~flag if inst.negated else flag)
            fall_through = ~taken if mask is None else mask & ~taken
            if fall_through.any():
                join(self.ready, block.end, fall_through)
            if not taken.any():
                return
            self.ran[block.end - 1] = True
        match inst.opcode.split(".")[0]:
            case "bra":
                join(self.ready, self.machine.code.target(inst), taken)
            case "ret" | "exit":
                self.done |= taken
            case "bar":
                if inst.operands != (Imm(0),):
                    raise Unmodelled(f"barrier of a part of the block: {inst.text}")
                join(self.at_barrier, block.end, taken)
            case _:
                self._try_wait(block, inst, taken)

    def _try_wait(self, block: BasicBlock, inst: Instruction, taken: Array) -> None:
        """`try_wait` may return false before it blocks: in a late schedule it does so once."""
        completed = self.machine.barriers.completed(self, inst, taken)
        rest = taken & ~completed
        flag = inst.operands[0]
        if completed.any():
            self.try_failed &= ~completed
            self.R[flag.slot] = np.where(completed, True, self.R[flag.slot])
            join(self.ready, block.end, completed)
        if self.machine.schedule.late and (first := rest & ~self.try_failed).any():
            self.try_failed |= first
            self.R[flag.slot] = np.where(first, False, self.R[flag.slot])
            join(self.ready, block.end, first)
            rest = rest & ~first
        if rest.any():
            join(self.at_mbarrier, block.begin, rest)

    def count_arrived(self) -> Array:
        """[blocks]: how many lanes wait at a barrier or are done."""
        arrived = self.done.copy()
        for mask in self.at_barrier.values():
            arrived |= True if mask is None else mask
        return arrived.reshape(-1, self.per_block).sum(1)

    def release(self, blocks: Array) -> None:
        """Release the lanes of these blocks from the barrier."""
        lanes = np.repeat(blocks, self.per_block)
        for at in list(self.at_barrier):
            if (released := leave(self.at_barrier, at, lanes)).any():
                join(self.ready, at, released)

    def wake(self) -> bool:
        """Release the lanes whose mbarrier's phase has completed; return whether there were any."""
        woken = False
        for at, mask in list(self.at_mbarrier.items()):
            inst, waiting = self.machine.code.blocks[at].control, np.ones(self.n, bool) if mask is None else mask
            completed = self.machine.barriers.completed(self, inst, waiting, acquire=False)
            if completed.any():
                join(self.ready, at, leave(self.at_mbarrier, at, completed))
                woken = True
        return woken


@dataclass
class Machine:
    """Executes a batch of blocks."""

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
        self.log = RaceDetector(self) if self.schedule.logged else NoRaceDetector(self)
        groups = [list(range(self.warps))] if self.schedule.lockstep else [[w] for w in range(self.warps)]
        self.frames = [Frame(self, warps) for warps in (groups[::-1] if self.schedule.backwards else groups)]

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while True:
                for frame in self.frames:
                    frame.run()
                if all(frame.done.all() for frame in self.frames):
                    break
                if not (self._release() or self._wake() or (self.barriers.complete_late_copies() and self._wake())):
                    raise Fault(f"deadlock: {self._waiting()}")
        for frame in self.frames:
            for groups in (frame.copies, frame.tensor.groups):
                if groups.pending:
                    raise Fault(f"no wait for: {groups.pending[0].inst.text}")
        self.barriers.check_end()

    def _release(self) -> bool:
        complete = sum(frame.count_arrived() for frame in self.frames) == self.warps * 32
        waits = np.zeros(len(self.blocks), bool)
        for frame in self.frames:
            for mask in frame.at_barrier.values():
                waits |= True if mask is None else mask.reshape(-1, frame.per_block).any(1)
        released = complete & waits
        if not released.any():
            return False
        self.log.barrier(released)
        for frame in self.frames:
            frame.release(released)
        return True

    def _wake(self) -> bool:
        woken = [frame.wake() for frame in self.frames]
        return any(woken)

    def _waiting(self) -> str:
        """Describe a waiting lane, of those at an mbarrier if there are any."""
        program, waits = self.code.program, []
        for frame in self.frames:
            for kind, queue in enumerate((frame.at_mbarrier, frame.at_barrier)):
                for at, mask in queue.items():
                    lane = 0 if mask is None else int(np.flatnonzero(mask)[0])
                    inst = None if kind else self.code.blocks[at].control
                    waits.append((kind, f"{where(frame, lane)} of {program.name}: {inst.text if inst else 'bar.sync'}"))
        return min(waits)[1] if waits else program.name


def execute(
    code: Code,
    schedule: Schedule,
    grid: tuple[int, int, int],
    memory: Global,
    params: Params,
    shared_size: int,
    fenced_copies: bool = True,
) -> None:
    """Execute all blocks of a launch, in batches."""
    warps, rest = divmod(code.program.threads, 32)
    if rest:
        raise Unmodelled(f"{code.program.threads} threads a block")
    z, y, x = np.meshgrid(*(np.arange(n) for n in reversed(grid)), indexing="ij")
    blocks = np.stack((x, y, z), -1).reshape(-1, 3)
    blocks = blocks[::-1] if schedule.backwards else blocks
    most = max(1, min(MAX_LANES // (32 * warps), MAX_SHARED // max(shared_size, 1)))
    for begin in range(0, len(blocks), most):
        batch = blocks[begin : begin + most]
        Machine(code, schedule, memory, params, shared_size, grid, batch, warps, fenced_copies).run()
