"""Compiled kernels with a barrier, a wait, a fence, a predicate taken out, one at a time: who sees it?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS
from tests.test_jit import on_card

from .launch import Executor, compiled
from .machine import SCHEDULES
from .mutate import Trial, neighbours, sites

pytestmark = pytest.mark.card

BF16 = torch.bfloat16
ATTENTION = {"B": 1, "T": 150, "S": 150, "Hq": 1, "Hkv": 1, "D": 64, "window": 0}
# The operation, and sizes with which each of its loops turns more than once.
TRIALS: list[tuple[str, Mapping[str, Any]]] = [
    ("rms_norm", {"T": 2, "H": 2000}),
    ("embed_rms_norm", {"T": 2, "V": 20, "H": 300, "past": 4}),
    ("gate_route", {"T": 5, "H": 600, "E": 4, "K": 2}),
    ("linear", {"T": 2, "H": 1100, "N": 40}),
    ("linear", Shape(T=40, H=300, N=40, deterministic=True)),
    ("expert_swiglu", {"T": 3, "H": 600, "I": 600, "E": 2, "K": 1}),
    ("expert_swiglu", {"T": 40, "H": 320, "I": 320, "E": 2, "K": 2}),
    ("expert_swiglu", Shape(T=3, H=256, I=256, E=2, K=1, gate_up="int4:128", down="int4:128")),
    ("experts_add_rms_norm", {"T": 2, "H": 600, "I": 64, "E": 2, "K": 1}),
    ("attention", ATTENTION),
    ("attention", {**ATTENTION, "window": 70}),
    ("attention", {**ATTENTION, "T": 1, "S": 700}),
]


class Recorder(Executor):
    """Also keeps a launch of each variant, as it was before it ran."""

    def __init__(self) -> None:
        super().__init__(SCHEDULES[:1])
        self.trials: dict[str, Trial] = {}

    def __call__(self, launched: Any, args: Mapping[str, Any]) -> None:
        code = compiled(launched.ptx)
        if code.key not in self.trials:
            self.trials[code.key] = Trial(code, launched, args)
        super().__call__(launched, args)


@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
@pytest.mark.parametrize(("name", "sizes"), TRIALS, ids=[f"{name}-{i}" for i, (name, _) in enumerate(TRIALS)])
def test_what_is_taken_out_is_missed(name: str, sizes: Any, arch: str, numpy_card: Any, covers: Any) -> None:
    with numpy_card(arch) as card:
        recorder = card.driver.execute = Recorder()
        op = OPS[name]
        op.run(**on_card(op.inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(0))))
        for trial in recorder.trials.values():
            program, kernel = trial.code.program, trial.launched.kernel
            for site in sites(program):
                if not trial.code.ran[site.at]:
                    continue
                how = trial.seen(site.apply(program))
                print("SITE", kernel, arch, site.kind, site.at, "seen" if how else "UNSEEN", neighbours(program, site.at), program.instructions[site.at].text, "|", how[:150])
            for at, maps in trial.without_swizzles():
                print("SITE", kernel, arch, "map", at, trial.seen(program, maps)[:150])
