"""Execution of a launch's blocks: frames of lanes, basic blocks of code, divergence, barriers and waits.

A frame is the set of lanes that run together: all lanes of a batch of blocks in lockstep, or one warp of each of them.
The first basic block that has ready lanes runs next, on these lanes; lanes that reach the same block reconverge.
"""

import itertools
from collections import namedtuple
from collections.abc import Sequence
from typing import Any

import numpy as np

from . import arithmetic  # noqa: F401  it registers the opcodes that it models
from .copies import AsyncGroups, Barriers
from .memory import Fault, Global, Params, Shared, where
from .parser import Imm, Instruction, Program, Unmodelled
from .races import NoRaceDetector, RaceDetector, checked
from .values import CONTROL, MODELLED, UNSIGNED, Array, guarded
from .wgmma import TensorCore

MAX_LANES = 1 << 14  # of a batch
MAX_SHARED = 1 << 26  # bytes of a batch


# late: warps run backwards, and copies complete only at a wait; lockstep: all warps together, with the race detector
Schedule = namedtuple("Schedule", "name late lockstep")
SCHEDULES = (
    Schedule("warps forwards, copies at once", late=False, lockstep=False),
    Schedule("warps backwards, copies late", late=True, lockstep=False),
    Schedule("lockstep, logged", late=False, lockstep=True),
)
# Instructions begin..end - 1: steps without a branch, then `control`, a branch or wait, if there is one.
BasicBlock = namedtuple("BasicBlock", "begin end steps control unguarded")


class Code:
    """A program compiled to steps. `ran`: which instructions at least one lane has run."""

    def __init__(self, program: Program) -> None:
        unknown = sorted({inst.opcode for inst in program.instructions} - MODELLED.keys() - CONTROL)
        if unknown:
            raise Unmodelled(f"{program.name}: not modelled: {', '.join(unknown)}")
        self.program = program
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


Queue = dict[int, Array]  # by the start of a basic block, a mask of lanes


def join(queue: Queue, at: int, lanes: Array) -> None:
    queue[at] = queue[at] | lanes if at in queue else lanes


def leave(queue: Queue, at: int, lanes: Array) -> Array:
    """Remove lanes from a queue; return which of them were in it."""
    waiting = queue.pop(at)
    if (rest := waiting & ~lanes).any():
        queue[at] = rest
    return waiting & lanes


class Frame:
    """Lanes that run together: `ready`, waiting `at_barrier` of the block, or waiting `at_mbarrier`."""

    def __init__(self, machine: "Machine", warps: Sequence[int]) -> None:
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
        unwritten = {width: ~np.zeros(self.n, UNSIGNED[width]) for width in UNSIGNED}
        self.R = [unwritten[width] for width in program.widths]
        self.ready: Queue = {0: np.ones(self.n, bool)}
        self.at_barrier: Queue = {}
        self.at_mbarrier: Queue = {}
        self.try_failed = np.zeros(self.n, bool)
        self.done, self.all = np.zeros(self.n, bool), np.ones(self.n, bool)
        self.before_wait = np.full(self.n, machine.memory.pending is not None)
        self.copies = AsyncGroups(self.n)
        self.tensor = TensorCore(self.n)

    def run(self) -> None:
        while self.ready:
            at = min(self.ready)
            lanes = self.ready.pop(at)
            mask = None if lanes.all() else lanes
            if at not in self.machine.code.blocks:
                raise Fault(f"{self.machine.code.program.name} runs past its end")
            block = self.machine.code.blocks[at]
            self.ran[block.unguarded] = True
            for step in block.steps:
                step(self, mask)
            if block.control is None:
                join(self.ready, block.end, lanes)
            else:
                self._control(block, block.control, lanes)

    def _control(self, block: BasicBlock, inst: Instruction, taken: Array) -> None:
        if inst.guard is not None:
            flag = ~self.R[inst.guard.slot] if inst.negated else self.R[inst.guard.slot]
            if (fall_through := taken & ~flag).any():
                join(self.ready, block.end, fall_through)
            taken = taken & flag
            if not taken.any():
                return
            self.ran[block.end - 1] = True
        match inst.opcode.split(".")[0]:
            case "bra":
                target = self.machine.code.program.labels.get(getattr(inst.operands[0], "name", ""))
                if target is None:
                    raise Unmodelled(f"branch to no label: {inst.text}")
                join(self.ready, target, taken)
            case "ret" | "exit":
                self.machine.memory.released_early |= bool((taken & self.before_wait).any())
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

    def barred(self) -> Array:
        return np.logical_or.reduce([np.zeros(self.n, bool), *self.at_barrier.values()])

    def release(self, blocks: Array) -> None:
        lanes = np.repeat(blocks, self.per_block)
        for at in list(self.at_barrier):
            if (released := leave(self.at_barrier, at, lanes)).any():
                join(self.ready, at, released)

    def wake(self) -> bool:
        """Release the lanes whose mbarrier's phase has completed; return whether there were any."""
        woken = False
        for at, waiting in list(self.at_mbarrier.items()):
            inst = self.machine.code.blocks[at].control
            completed = self.machine.barriers.completed(self, inst, waiting, acquire=False)
            if completed.any():
                join(self.ready, at, leave(self.at_mbarrier, at, completed))
                woken = True
        return woken


class Machine:
    def __init__(
        self, code: Code, schedule: Schedule, memory: Global, params: Params, shared: int, grid: Any, blocks: Array
    ) -> None:
        """blocks: the indices [n, 3] of a batch of the grid's blocks, which have `shared` bytes of memory each."""
        self.code, self.schedule, self.memory, self.params = code, schedule, memory, params
        self.grid, self.blocks = grid, blocks
        self.warps = code.program.threads // 32
        self.shared, self.barriers = Shared(len(blocks), shared), Barriers(self)
        self.log = RaceDetector(self) if schedule.lockstep else NoRaceDetector(self)
        groups = [list(range(self.warps))] if schedule.lockstep else [[w] for w in range(self.warps)]
        self.frames = [Frame(self, warps) for warps in (groups[::-1] if schedule.late else groups)]

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
            for operation in (*frame.copies.pending, *frame.tensor.groups.pending):
                raise Fault(f"no wait for: {operation.inst.text}")
        self.barriers.check_end()

    def _release(self) -> bool:
        barred, arrived = np.zeros(len(self.blocks), int), np.zeros(len(self.blocks), int)
        for frame in self.frames:
            lanes = frame.barred()
            barred += lanes.reshape(-1, frame.per_block).sum(1)
            arrived += (lanes | frame.done).reshape(-1, frame.per_block).sum(1)
        released = (barred > 0) & (arrived == self.warps * 32)
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
        name = self.code.program.name
        for frame in self.frames:
            for at, lanes in frame.at_mbarrier.items():
                return f"{where(frame, int(np.argmax(lanes)))} of {name}: {self.code.blocks[at].control.text}"
        return f"bar.sync of {name}"


def execute(code: Code, schedule: Schedule, grid: Any, memory: Global, params: Params, shared: int) -> None:
    warps = code.program.threads // 32
    if code.program.threads % 32:
        raise Unmodelled(f"{code.program.threads} threads a block")
    z, y, x = np.meshgrid(*(np.arange(n) for n in reversed(grid)), indexing="ij")
    blocks = np.stack((x, y, z), -1).reshape(-1, 3)
    blocks = blocks[::-1] if schedule.late else blocks
    most = max(1, min(MAX_LANES // (32 * warps), MAX_SHARED // max(shared, 1)))
    for begin in range(0, len(blocks), most):
        batch = blocks[begin : begin + most]
        Machine(code, schedule, memory, params, shared, grid, batch).run()
