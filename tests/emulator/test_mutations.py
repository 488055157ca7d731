"""The PTX emulator detects each barrier, wait, fence, swizzle or transposition that is removed from a kernel."""

from collections import Counter, namedtuple
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from mixtral_triton.kernels.launching.launch import override_configs
from mixtral_triton.kernels.registry import OPS
from tests.support.calls import inputs, selected_configs

from .copies import Descriptor
from .launch import Executor, Launch, compiled
from .machine import SCHEDULES, Code
from .memory import Fault
from .parser import Imm, Instruction, Program, Unmodelled
from .values import executes

pytestmark = pytest.mark.emulator

BF16 = torch.bfloat16
# Mutations that no launch can detect: a kind, with the ordering instructions around the removed one or with the kernel.
# A trial shows only that this launch's results stay and no race is detected, so other neighbours fail.
REDUNDANT = {
    # Nothing in shared memory was accessed before, or is accessed after.
    "barrier: - ... st.shared", "barrier: cp.async.wait_group ... -",
    # Mbarriers are initialized in unused memory.
    "barrier: cp.async.wait_group ... mbarrier.init",
    # One thread initializes, announces and copies in program order, so one barrier before the copy is enough.
    "barrier: mbarrier.init ... mbarrier.arrive", "barrier: mbarrier.arrive ... bulk copy",
    "barrier: bulk copy ... mbarrier.arrive", "barrier: bulk copy ... bulk copy",
    "barrier: fence.proxy.async ... bulk copy", "barrier: commit ... mbarrier.arrive",
    "barrier: wgmma.commit_group ... mbarrier.arrive", "barrier: wgmma.wait_group ... mbarrier.arrive",
    # One thread invalidates them in program order, and the loop's barriers follow the last wait.
    "barrier: mbarrier.inval ... mbarrier.inval", "barrier: wgmma.wait_group ... mbarrier.inval",
    # Each warp has waited for the copy itself, or other barriers precede the next write.
    "barrier: mbarrier.try_wait ... wgmma.fence", "barrier: wgmma.wait_group ... wgmma.fence",
    # The memory was last read before another barrier, or no other warp reads it.
    "barrier: wgmma.commit_group ... copy", "barrier: cp.async.wait_group ... copy",
    "barrier: cp.async.wait_group ... st.shared", "barrier: commit ... st.shared",
    # Another barrier precedes the loop and ends it.
    "barrier: cp.async.wait_group ... ldmatrix.sync",
    # It permutes ids that are counted together.
    "swizzle: gather_by_expert_kernel",
    # No register of the product has changed since a fence.
    "fence: wgmma.commit_group ... wgmma.mma_async",
    # The same wait follows, or the reader of the sum waits for all products.
    "wait: commit ... cp.async.wait_group", "wait: wgmma.commit_group ... fence.proxy.async",
    # The products or copies have completed, or the loop that follows waits before it overwrites what they read.
    "wait: wgmma.commit_group ... copy", "wait: bulk copy ... bar.sync", "wait: ldmatrix.sync ... bar.sync",
    "wait: cp.async.wait_group ... bar.sync",
    # Nothing has been stored since the last fence.
    "fence: wgmma.wait_group ... wgmma.fence", "fence: bulk copy ... mbarrier.try_wait",
}  # fmt: skip
# The instructions that a mutation removes, by the mutation's kind.
REMOVED = {
    "barrier": ("bar.sync",),
    "wait": ("cp.async.wait_group", "wgmma.wait_group.sync.aligned", "mbarrier.try_wait"),
    "fence": ("fence.proxy.async", "wgmma.fence"),
}
# Instructions that order memory or access shared memory: as neighbours they identify a barrier's purpose.
ORDERING = ("bar.", "mbarrier.", "cp.async", "wgmma.", "fence.", "ld.shared", "st.shared", "ldmatrix", "stmatrix")


@executes("removed")
def removed(inst: Instruction, frame: Any, mask: Any) -> None:
    """Do nothing."""


class Mutation(NamedTuple):
    """The replacement of instruction `at` by `new`; `kind`: what that removes."""

    kind: str
    at: int
    new: Instruction

    def apply(self, program: Program) -> Program:
        before, after = program.instructions[: self.at], program.instructions[self.at + 1 :]
        return replace(program, instructions=(*before, self.new, *after))


def mutations(program: Program) -> Iterator[Mutation]:
    for at, inst in enumerate(program.instructions):
        name, operands = inst.opcode, inst.operands
        for kind, prefixes in REMOVED.items():
            if name.startswith(prefixes):
                yield Mutation(kind, at, Instruction("removed", (), text=f"removed: {inst.text}"))
        if ".expect_tx." in name:
            yield Mutation("expect_tx", at, inst._replace(operands=(*operands[:2], Imm(0))))
        elif name == "xor.b32":
            yield Mutation("swizzle", at, inst._replace(opcode="mov.b32", operands=operands[:2]))
        elif ".trans." in name:
            yield Mutation("trans", at, inst._replace(opcode=name.replace(".trans.", ".")))
        elif name.startswith("wgmma.mma_async") and operands[-1] == Imm(1):
            yield Mutation("trans", at, inst._replace(operands=(*operands[:-1], Imm(0))))


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


class Trial(Launch):
    """A launch that runs repeatedly, and the memory `after` it."""

    def __init__(self, launched: Any, args: Mapping[str, Any]) -> None:
        # A copy of the code, because the cached one also records what ran in other tests.
        super().__init__(Code(compiled(launched.ptx).program), launched, args)
        self.after = self.run(self.code, SCHEDULES[0])
        self.memory.restore(self.before)

    def detect(self, program: Program, descriptors: Mapping[str, Any] | None = None) -> str:
        """Return how a schedule detects a mutated program; "" if none does."""
        code, right = Code(program), self.params.descriptors
        self.params.descriptors = right if descriptors is None else descriptors
        try:
            same = (all(map(np.array_equal, self.run(code, each), self.after)) for each in SCHEDULES[::-1])
            return "" if all(same) else "other results"
        except (Fault, Unmodelled) as fault:
            return str(fault)
        finally:
            self.params.descriptors = right

    def without_swizzles(self) -> Iterator[tuple[str, dict[str, Descriptor]]]:
        """Yield tensor maps in which one map that the kernel uses has no swizzle."""
        for name, descriptor in (known := self.params.descriptors).items():
            rest = {other: known[other] for other in known if other != name}
            if descriptor.span and "no descriptor" in self.detect(self.code.program, rest):
                yield name, known | {name: replace(descriptor, span=0)}


# Sizes with which each loop of an operation repeats; prefixes of the kernels' names; sizes whose configs apply.
Case = namedtuple("Case", "op sizes kernels like", defaults=(("",), None))


def experts(T: int) -> Case:
    """Return one expert's rows in tiles of 192 rows, or the largest of sm_80."""
    sizes = {"H": 320, "I": 320, "E": 1, "K": 1}
    return Case("expert_swiglu", {"T": T, **sizes}, ("experts_",), {"T": 192, **sizes})


ATTENTION = {"B": 1, "T": 33, "S": 700, "Hq": 1, "Hkv": 1, "D": 64, "window": 0}
TRIALS = [
    Case("rms_norm", {"T": 2, "H": 2000}),
    Case("embed_rms_norm", {"B": 1, "T": 2, "V": 20, "H": 300, "past": 4}),
    Case("gate_route", {"T": 16, "H": 600, "E": 16, "K": 2}),
    Case("sort_by_expert", {"T": 1024, "E": 8, "K": 2}),
    Case("linear", {"T": 16, "H": 3072, "N": 32}),
    Case("linear", {"T": 64, "H": 320, "N": 64, "deterministic": True}),
    Case("expert_swiglu", {"T": 60, "H": 512, "I": 512, "E": 2, "K": 1}),
    experts(192),  # a full tile
    experts(128),  # two parts of a tile
    experts(40),  # one part
    Case("expert_swiglu", {"T": 1040, "H": 64, "I": 64, "E": 8, "K": 2}, ("gather_by_expert", "sort_by_expert")),
    Case("expert_swiglu", {"T": 16, "H": 256, "I": 256, "E": 2, "K": 1, "gate_up": "int4:128", "down": "int4:128"}),
    Case("attention", ATTENTION),
    Case("attention", {**ATTENTION, "window": 600}),
    Case("attention", {**ATTENTION, "T": 1, "Hq": 16}),
    Case("rms_norm_gate_route", {"T": 16, "H": 600, "E": 16, "K": 2}),
    Case("rope_append_attention", {"B": 1, "T": 1, "Hq": 16, "Hkv": 1, "D": 64, "C": 700, "window": 0, "past": 690}),
]


class Recorder(Executor):
    """Also keeps the first launch of each variant of some kernels, with the memory before it."""

    def __init__(self, kernels: tuple[str, ...]) -> None:
        super().__init__(SCHEDULES[:1])
        self.kernels, self.trials = kernels, dict[str, Trial]()

    def __call__(self, launched: Any, args: Mapping[str, Any]) -> None:
        if launched.ptx not in self.trials and launched.kernel.startswith(self.kernels):
            self.trials[launched.ptx] = Trial(launched, args)
        super().__call__(launched, args)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", TRIALS, ids=[f"{case.op}-{i}" for i, case in enumerate(TRIALS)])
def test_each_removed_instruction_is_detected(case: Case, arch: str, ptx_emulator: Any, covers: Any) -> None:
    op, counts, missed = OPS[case.op], Counter[str](), []
    dtype = BF16 if BF16 in op.dtypes else op.dtypes[0]
    configs = selected_configs(case.op, case.like, dtype, arch) if case.like else {}
    with ptx_emulator(arch) as gpu, override_configs(configs):
        recorder = gpu.driver.execute = Recorder(case.kernels)
        op.run(**inputs(case.op, case.sizes, "cuda:0", dtype))
        assert recorder.trials
        for trial in recorder.trials.values():
            program, kernel = trial.code.program, trial.launched.kernel
            for name, descriptors in trial.without_swizzles():
                assert trial.detect(program, descriptors), f"{kernel}: tensor map {name} without its swizzle"
            for mutation in mutations(program):
                kind, at, _ = mutation
                if not trial.code.ran[at]:
                    continue
                counts[kind] += 1
                purpose = neighbours(program, at)
                redundant = {f"{kind}: {purpose}", f"{kind}: {kernel}"} & REDUNDANT
                no_other_warp = kind == "barrier" and program.threads == 32
                if not (redundant or no_other_warp or trial.detect(mutation.apply(program))):
                    missed.append(f"{kernel}: {program.instructions[at].text}: {purpose}")
    covers("instructions removed from compiled kernels", f"{case.op} {case.sizes} {arch}: {dict(counts)}")
    assert missed == []
