"""Compiled kernels with a barrier, a wait, a fence, a predicate taken out, one at a time: who sees it?"""

from __future__ import annotations

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
from .redundant import REDUNDANT

pytestmark = pytest.mark.emulator

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """Sizes with which each loop of an operation turns more than once.

    `kernels`: as the names of those begin that are looked at; `like`: sizes whose launch choices it takes.
    """

    op: str
    sizes: Mapping[str, Any]
    kernels: tuple[str, ...] = ("",)
    like: Mapping[str, Any] | None = None


def experts(T: int) -> Case:
    """One expert's rows in tiles of 192, or of as many as sm_80 has."""
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
    experts(192),  # a whole tile,
    experts(128),  # two parts of one,
    experts(40),  # and one
    Case("expert_swiglu", {"T": 1040, "H": 64, "I": 64, "E": 8, "K": 2}, ("gather_by_expert", "sort_by_expert")),
    Case("expert_swiglu", Shape(T=16, H=256, I=256, E=2, K=1, gate_up="int4:128", down="int4:128")),
    Case("attention", ATTENTION),
    Case("attention", {**ATTENTION, "window": 600}),
    Case("attention", {**ATTENTION, "T": 1, "Hq": 16}),
    Case("rms_norm_gate_route", {"T": 16, "H": 600, "E": 16, "K": 2}),
    Case(
        "rope_append_attention",
        {"B": 1, "T": 1, "Hq": 16, "Hkv": 1, "D": 64, "C": 700, "window": 0, "past": 690},
    ),
]


class Recorder(Executor):
    """Also keeps a launch of each variant of some kernels, as it was before it ran."""

    def __init__(self, kernels: tuple[str, ...]) -> None:
        super().__init__(SCHEDULES[:1])
        self.kernels = kernels
        self.trials: dict[str, Trial] = {}

    def __call__(self, launched: Any, args: Mapping[str, Any]) -> None:
        code = compiled(launched.ptx)
        if code.key not in self.trials and launched.kernel.startswith(self.kernels):
            # Of its own: the cached one notes what ran in other tests, too.
            self.trials[code.key] = Trial(Code(code.program, code.key), launched, args)
        super().__call__(launched, args)


def verdict(trial: Trial, site: Mutation) -> tuple[str, str]:
    """-> "caught", "idle" (it has nothing to do: no copy in flight, nothing stored, no lane kept out), "redundant" or
    "missed"; and why."""
    how = trial.detect(site.apply(trial.code.program))
    if how:
        return "caught", how
    if site.kind == "predicate":
        return ("idle", "true of every lane") if trial.is_always_true(site) else ("missed", "")
    if trial.is_idle(site):
        return "idle", "nothing was in flight, or stored"
    around = site.kind, *neighbours(trial.code.program, site.at)
    for key in (around, (site.kind, trial.launched.kernel)):
        if key in REDUNDANT:
            return "redundant", REDUNDANT[key]
    return "missed", " ... ".join(around)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize("case", TRIALS, ids=[f"{case.op}-{i}" for i, case in enumerate(TRIALS)])
def test_what_is_taken_out_is_missed(case: Case, arch: str, ptx_emulator: Any, covers: Any) -> None:
    """But for predicates: those that keep out what would do no harm need not be seen."""
    op = OPS[case.op]
    dtype = BF16 if BF16 in op.dtypes else op.dtypes[0]
    chosen = op.configs(case.like, dtype, arch) if case.like else {}
    with ptx_emulator(arch) as gpu, override_configs(chosen):
        recorder = gpu.driver.execute = Recorder(case.kernels)
        op.run(**on_fake_gpu(op.inputs(case.sizes, dtype, "cpu", torch.Generator().manual_seed(0))))
        assert recorder.trials
        missed = []
        for trial in recorder.trials.values():
            program, kernel = trial.code.program, trial.launched.kernel
            for at, maps in trial.without_swizzles():
                assert trial.detect(program, maps), f"{kernel}: a tensor map, {at}, without its swizzle"
            for site in mutations(program):
                if trial.code.ran[site.at]:
                    what, why = verdict(trial, site)
                    text = program.instructions[site.at].text
                    line = f"{kernel} {arch} {trial.code.key} {site.at}: {text}: {why}"
                    covers("GPU mutation", f"{site.kind} {what} {line}")
                    if what == "missed" and site.kind != "predicate":
                        missed.append(f"{kernel}, instruction {site.at}: {text}: {why}")
        assert missed == []
