"""The PTX emulator detects each barrier, wait, fence or predicate that is removed from a compiled kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import override_configs
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS
from tests.compile.test_jit import on_fake_gpu

from .launch import Executor, compiled
from .machine import SCHEDULES, Code
from .mutate import Mutation, Trial, mutations, neighbours

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
    # The loop that follows waits before it overwrites the operands or reads the sum.
    "wait: wgmma.commit_group ... copy", "wait: bulk copy ... bar.sync",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """Sizes with which each loop of an operation repeats.

    `kernels`: prefixes of the names of the mutated kernels; `like`: the sizes whose configs it uses.
    """

    op: str
    sizes: Mapping[str, Any]
    kernels: tuple[str, ...] = ("",)
    like: Mapping[str, Any] | None = None


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
    Case("linear", Shape(T=64, H=320, N=64, deterministic=True)),
    Case("expert_swiglu", {"T": 16, "H": 512, "I": 512, "E": 2, "K": 1}),
    experts(192),  # a full tile
    experts(128),  # two parts of a tile
    experts(40),  # one part
    Case("expert_swiglu", {"T": 1040, "H": 64, "I": 64, "E": 8, "K": 2}, ("gather_by_expert", "sort_by_expert")),
    Case("expert_swiglu", Shape(T=16, H=256, I=256, E=2, K=1, gate_up="int4:128", down="int4:128")),
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
        self.kernels = kernels
        self.trials: dict[str, Trial] = {}

    def __call__(self, launched: Any, args: Mapping[str, Any]) -> None:
        code = compiled(launched.ptx)
        if code.key not in self.trials and launched.kernel.startswith(self.kernels):
            # A copy, because the cached code also records what ran in other tests.
            self.trials[code.key] = Trial(Code(code.program, code.key), launched, args)
        super().__call__(launched, args)


def is_justified(trial: Trial, mutation: Mutation, purpose: str) -> bool:
    """Return whether a trial detects a mutation, or the mutation has no effect."""
    keys = {f"{mutation.kind}: {purpose}", f"{mutation.kind}: {trial.launched.kernel}"}
    detected = trial.detect(mutation.apply(trial.code.program))
    return bool(detected) or trial.is_idle(mutation) or bool(keys & REDUNDANT)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", TRIALS, ids=[f"{case.op}-{i}" for i, case in enumerate(TRIALS)])
def test_each_mutation_is_detected(case: Case, arch: str, ptx_emulator: Any, covers: Any) -> None:
    """Without predicates, because some of them exclude accesses that do no harm."""
    op, counts, missed = OPS[case.op], Counter[str](), []
    dtype = BF16 if BF16 in op.dtypes else op.dtypes[0]
    configs = op.configs(case.like, dtype, arch) if case.like else {}
    with ptx_emulator(arch) as gpu, override_configs(configs):
        recorder = gpu.driver.execute = Recorder(case.kernels)
        op.run(**on_fake_gpu(op.inputs(case.sizes, dtype, "cpu", torch.Generator().manual_seed(0))))
        assert recorder.trials
        for trial in recorder.trials.values():
            program, kernel = trial.code.program, trial.launched.kernel
            for name, descriptors in trial.without_swizzles():
                assert trial.detect(program, descriptors), f"{kernel}: tensor map {name} without its swizzle"
            for mutation in mutations(program):
                if trial.code.ran[mutation.at] and mutation.kind != "predicate":
                    counts[mutation.kind] += 1
                    purpose = neighbours(program, mutation.at)
                    if not is_justified(trial, mutation, purpose):
                        missed.append(f"{kernel}: {program.instructions[mutation.at].text}: {purpose}")
    covers("instructions removed from compiled kernels", f"{case.op} {case.sizes} {arch}: {dict(counts)}")
    assert missed == []
