"""Programs with one thing taken out: a barrier, a wait, a fence, a predicate, what a person would forget."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from .launch import pack
from .machine import SCHEDULES, Code, execute
from .memory import Fault, Global, Params
from .text import Imm, Instruction, Program, Reg, Unmodelled
from .tma import Descriptor
from .values import Array, Step, effect

WAITS = ("cp.async.wait_group", "wgmma.wait_group.sync.aligned", "mbarrier.try_wait")
FENCES = ("fence.proxy.async", "wgmma.fence")
# What orders memory, or reaches shared memory: the neighbours that tell what a barrier is for.
ORDERS = ("bar.", "mbarrier.", "cp.async", "wgmma.", "fence.", "ld.shared", "st.shared", "ldmatrix", "stmatrix")


@effect("removed")
def removed(one: Instruction, program: Program) -> Step:
    return lambda frame, mask: None


@effect("idle")
def idle(one: Instruction, program: Program) -> Step:
    """In the place of a wait or a fence: a fault if it had anything to do."""
    (name, *operands) = one.operands

    def go(frame: Any, mask: Any) -> None:
        if name.startswith("fence"):
            busy = frame.machine.log.unfenced(frame, mask)
        else:
            flights = frame.copies if name.startswith("cp.async") else frame.tensor.flights
            busy = flights.waits(operands[0].value, mask)
        if busy:
            raise Fault(f"{one.text} had something to do")

    return go


@effect("always")
def always(one: Instruction, program: Program) -> Step:
    """In the place of what a predicate guards: a fault if it keeps a lane out. The instruction itself is not done."""
    flag, wanted = one.operands

    def go(frame: Any, mask: Any) -> None:
        value = frame.R[flag.slot]
        keeps = (value == wanted) if flag.width == 1 else value != wanted.value
        if (keeps if mask is None else keeps & mask).any():
            raise Fault(f"not always: {one.text}")

    return go


@dataclass(frozen=True)
class Site:
    """`kind`: what is taken out; `at`: of which instruction; `new`: what stands there instead."""

    kind: str
    at: int
    new: Instruction

    def apply(self, program: Program) -> Program:
        own = program.instructions
        return replace(program, instructions=(*own[: self.at], self.new, *own[self.at + 1 :]))


def if_idle(program: Program, site: Site) -> Program | None:
    """The program with a check in a wait's or a fence's place that it has nothing to do; None: of others."""
    one = program.instructions[site.at]
    if not one.opcode.startswith(("cp.async.wait", "wgmma.wait", "fence.proxy")):
        return None
    return replace(site, new=Instruction("idle", (one.opcode, *one.operands), text=one.text)).apply(program)


def _gone(one: Instruction) -> Instruction:
    return Instruction("removed", (), text=f"removed: {one.text}")


def sites(program: Program) -> Iterator[Site]:
    """All, but of instructions of one name behind one predicate the first."""
    guarded: set[tuple[str, Any]] = set()
    for at, one in enumerate(program.instructions):
        name, operands = one.opcode, one.operands
        if name == "bar.sync":
            yield Site("barrier", at, _gone(one))
        elif name.startswith(WAITS):
            yield Site("wait", at, _gone(one))
        elif name.startswith(FENCES):
            yield Site("fence", at, _gone(one))
        elif ".expect_tx." in name:
            yield Site("expect_tx", at, replace(one, operands=(*operands[:2], Imm(0))))
        elif name == "xor.b32":
            yield Site("swizzle", at, replace(one, opcode="mov.b32", operands=operands[:2]))
        elif ".trans." in name:
            yield Site("trans", at, replace(one, opcode=name.replace(".trans.", ".")))
        elif name.startswith("wgmma.mma_async") and operands[-1] == Imm(1):
            yield Site("trans", at, replace(one, operands=(*operands[:-1], Imm(0))))
        copies = name.startswith(("cp.async.ca", "cp.async.cg")) and isinstance(operands[-1], Reg)
        behind = (name, operands[-1] if copies else one.guard)
        if behind in guarded or behind[1] is None:
            continue
        if copies:
            guarded.add(behind)
            yield Site("predicate", at, replace(one, operands=(*operands[:-1], operands[2])))
        elif name.startswith(("ld.", "st.")):
            guarded.add(behind)
            yield Site("predicate", at, replace(one, guard=None, negated=False))


def _short(opcode: str) -> str:
    if opcode.startswith("cp.async.c"):
        return "commit" if "commit" in opcode else "copy"
    if opcode.startswith("cp.async.bulk"):
        return "bulk copy"
    parts = opcode.split(".")
    return ".".join(parts[:3]) if parts[0] in ("cp", "fence") else ".".join(parts[:2])


def neighbours(program: Program, at: int) -> tuple[str, str]:
    """What stands before and after a barrier, of all that orders memory or reaches shared memory."""

    def first(places: Sequence[int]) -> str:
        for place in places:
            name = program.instructions[place].opcode
            if name.startswith(ORDERS):
                return _short(name)
        return "-"

    return first(range(at - 1, -1, -1)), first(range(at + 1, len(program.instructions)))


class Trial:
    """A launch that can be made again and again on the same memory."""

    def __init__(self, code: Code, launched: Any, args: Mapping[str, Any]) -> None:
        self.code, self.launched, self.packed = code, launched, pack(launched.launcher, args)
        self.memory = Global(self.packed.spans)
        self.before = self.memory.save()
        self.after = self.run(code, SCHEDULES[0])

    def run(self, code: Code, schedule: Any, maps: Mapping[int, Descriptor] | None = None) -> list[Array]:
        params = Params(code.program.params, self.packed.values)
        found = self.packed.maps if maps is None else maps
        params.descriptors = {code.program.params[at].name: one for at, one in found.items()}
        self.memory.restore(self.before)
        try:
            execute(code, schedule, self.launched.grid, self.memory, params, self.launched.shared)
            return self.memory.save()
        finally:
            self.memory.restore(self.before)

    def seen(self, program: Program, maps: Mapping[int, Descriptor] | None = None) -> str:
        """By which schedule, and how, a change is seen; "": by none."""
        code = Code(program)
        for schedule in SCHEDULES[::-1]:
            try:
                got = self.run(code, schedule, maps)
            except (Fault, Unmodelled) as fault:
                return f"{schedule.name}: {fault}"
            if not all(np.array_equal(a, b) for a, b in zip(got, self.after, strict=True)):
                return f"{schedule.name}: other results"
        return ""

    def idle(self, site: Site) -> bool:
        """Whether a wait or a fence never had anything to do, or a barrier no other warp to wait for."""
        if site.kind == "barrier":
            return self.code.program.threads == 32
        checked = if_idle(self.code.program, site)
        if checked is None:
            return False
        try:
            self.run(Code(checked), SCHEDULES[-1])
        except Fault:
            return False
        return True

    def always(self, site: Site) -> bool:
        """Whether a predicate was true of every lane each time."""
        one = self.code.program.instructions[site.at]
        flag = Reg(one.operands[-1].slot, 32) if one.guard is None else one.guard
        new = Instruction("always", (flag, one.operands[2] if one.guard is None else one.negated), text=one.text)
        try:
            self.run(Code(replace(site, new=new).apply(self.code.program)), SCHEDULES[0])
        except Fault as fault:
            return "not always" not in str(fault)
        return True

    def without_swizzles(self) -> Iterator[tuple[int, dict[int, Descriptor]]]:
        """Tensor maps, one of those that are used at a time without its swizzle."""
        for at, one in self.packed.maps.items():
            others = {place: other for place, other in self.packed.maps.items() if place != at}
            if one.span and "no descriptor" in self.seen(self.code.program, others):
                yield at, {**self.packed.maps, at: replace(one, span=0)}
