"""Mutations of a compiled program: one barrier, wait, fence, predicate, swizzle or transposition removed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .copies import Descriptor
from .launch import pack
from .machine import SCHEDULES, Code, execute
from .memory import Fault, Global
from .parser import Imm, Instruction, Program, Reg, Unmodelled
from .values import Array, Step, models

# The instructions that a mutation removes, by the mutation's kind.
REMOVED = {
    "barrier": ("bar.sync",),
    "wait": ("cp.async.wait_group", "wgmma.wait_group.sync.aligned", "mbarrier.try_wait"),
    "fence": ("fence.proxy.async", "wgmma.fence"),
}
# Instructions that order memory or access shared memory: as neighbours they identify a barrier's purpose.
ORDERING = ("bar.", "mbarrier.", "cp.async", "wgmma.", "fence.", "ld.shared", "st.shared", "ldmatrix", "stmatrix")


@models("removed")
def removed(inst: Instruction, program: Program) -> Step:
    return lambda frame, mask: None


@models("idle")
def idle(inst: Instruction, program: Program) -> Step:
    """Replace a wait or a fence by a check that it has nothing to wait for or to order."""
    (name, *operands) = inst.operands

    def step(frame: Any, mask: Any) -> None:
        if name.startswith("fence"):
            busy = frame.machine.log.stores_unfenced(frame, mask)
        else:
            groups = frame.copies if name.startswith("cp.async") else frame.tensor.groups
            busy = groups.would_wait(operands[0].value, mask)
        if busy:
            raise Fault(f"not idle: {inst.text}")

    return step


@dataclass(frozen=True)
class Mutation:
    """The replacement of instruction `at` by `new`; `kind`: what that removes."""

    kind: str
    at: int
    new: Instruction

    def apply(self, program: Program) -> Program:
        before, after = program.instructions[: self.at], program.instructions[self.at + 1 :]
        return replace(program, instructions=(*before, self.new, *after))


def mutations(program: Program) -> Iterator[Mutation]:
    """Yield all mutations; of instructions with one opcode and predicate only the first loses its predicate."""
    guarded: set[tuple[str, Any]] = set()
    for at, inst in enumerate(program.instructions):
        name, operands = inst.opcode, inst.operands
        for kind, prefixes in REMOVED.items():
            if name.startswith(prefixes):
                yield Mutation(kind, at, Instruction("removed", (), text=f"removed: {inst.text}"))
        if ".expect_tx." in name:
            yield Mutation("expect_tx", at, replace(inst, operands=(*operands[:2], Imm(0))))
        elif name == "xor.b32":
            yield Mutation("swizzle", at, replace(inst, opcode="mov.b32", operands=operands[:2]))
        elif ".trans." in name:
            yield Mutation("trans", at, replace(inst, opcode=name.replace(".trans.", ".")))
        elif name.startswith("wgmma.mma_async") and operands[-1] == Imm(1):
            yield Mutation("trans", at, replace(inst, operands=(*operands[:-1], Imm(0))))
        is_copy = name.startswith(("cp.async.ca", "cp.async.cg")) and isinstance(operands[-1], Reg)
        predicate = operands[-1] if is_copy else inst.guard
        if predicate is None or (name, predicate) in guarded or not (is_copy or name.startswith(("ld.", "st."))):
            continue
        guarded.add((name, predicate))
        if is_copy:
            yield Mutation("predicate", at, replace(inst, operands=(*operands[:-1], operands[2])))
        else:
            yield Mutation("predicate", at, replace(inst, guard=None, negated=False))


def _short(opcode: str) -> str:
    if opcode.startswith("cp.async.c"):
        return "commit" if "commit" in opcode else "copy"
    if opcode.startswith("cp.async.bulk"):
        return "bulk copy"
    parts = opcode.split(".")
    return ".".join(parts[: 3 if parts[0] in ("cp", "fence") else 2])


def neighbours(program: Program, at: int) -> str:
    """Return the ordering instructions before and after an instruction."""
    sides = program.instructions[:at][::-1], program.instructions[at + 1 :]
    ordering = ([_short(inst.opcode) for inst in side if inst.opcode.startswith(ORDERING)] for side in sides)
    return " ... ".join((*opcodes, "-")[0] for opcodes in ordering)


class Trial:
    """A launch that runs repeatedly on the same memory."""

    def __init__(self, code: Code, launched: Any, args: Mapping[str, Any]) -> None:
        self.code, self.launched, self.packed = code, launched, pack(launched.launcher, args)
        self.memory = Global(self.packed.spans)
        self.before = self.memory.save()
        self.descriptors = self.packed.params(code.program.params).descriptors
        self.after = self.run(code, SCHEDULES[0])

    def run(self, code: Code, schedule: Any, descriptors: Mapping[str, Any] | None = None) -> list[Array]:
        """Return the memory after a run that starts with the memory before the launch."""
        self.memory.restore(self.before)
        params = self.packed.params(code.program.params)
        params.descriptors = dict(self.descriptors if descriptors is None else descriptors)
        try:
            execute(code, schedule, self.launched.grid, self.memory, params, self.launched.shared)
            return self.memory.save()
        finally:
            self.memory.restore(self.before)

    def detect(self, program: Program, descriptors: Mapping[str, Any] | None = None) -> str:
        """Return how a schedule detects a mutated program; "" if none does."""
        code = Code(program)
        for schedule in SCHEDULES[::-1]:
            try:
                results = self.run(code, schedule, descriptors)
            except (Fault, Unmodelled) as fault:
                return str(fault)
            if not all(map(np.array_equal, results, self.after)):
                return "other results"
        return ""

    def is_idle(self, mutation: Mutation) -> bool:
        """Return whether a wait or fence never has an effect, or a barrier no other warp to wait for."""
        if mutation.kind == "barrier":
            return self.code.program.threads == 32
        inst = self.code.program.instructions[mutation.at]
        if not inst.opcode.startswith(("cp.async.wait", "wgmma.wait", "fence.proxy")):
            return False
        check = Instruction("idle", (inst.opcode, *inst.operands), text=inst.text)
        try:
            self.run(Code(replace(mutation, new=check).apply(self.code.program)), SCHEDULES[-1])
        except Fault:
            return False
        return True

    def without_swizzles(self) -> Iterator[tuple[str, dict[str, Descriptor]]]:
        """Yield tensor maps in which one map that the kernel uses has no swizzle."""
        for name, descriptor in self.descriptors.items():
            rest = {other: self.descriptors[other] for other in self.descriptors if other != name}
            if descriptor.span and "no descriptor" in self.detect(self.code.program, rest):
                yield name, self.descriptors | {name: replace(descriptor, span=0)}
