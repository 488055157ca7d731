"""The cases of `mixtral-triton bench` for pytest-benchmark: `pytest benchmarks/`.

With a GPU: Mixtral's sizes. Without: small sizes in plain torch on the CPU. A wrong result fails before it is timed.
Times include the host's launches.
"""

from functools import partial
from typing import Any

import pytest
import torch

from mixtral_triton.bench.cases import BENCHED, Case, cases
from mixtral_triton.bench.command import sizes_text
from mixtral_triton.bench.measure import attempt, our_call, wall_seconds
from mixtral_triton.kernels.launching.launch import INTERPRETED, target_arch
from mixtral_triton.kernels.operation.cases import Cost, runs_on

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if GPU else "CPU, plain torch"


def _cases() -> list[Case]:
    if GPU:
        return [case for case in cases() if runs_on(case.sizes, target_arch(DEVICE))]
    return [Case(op, op.test_shapes[0], op.dtypes[0]) for op in BENCHED.values()]


@pytest.mark.skipif(INTERPRETED, reason="times nothing that is interpreted: needs TRITON_INTERPRET unset")
@pytest.mark.parametrize("case", _cases(), ids=lambda case: f"{case.op.name}-{sizes_text(case.as_dict())}")
@torch.no_grad()
def test_op(case: Case, benchmark: Any) -> None:
    args = case.inputs(DEVICE)
    cost = sum(case.costs(args), Cost(0, 0))
    benchmark.group = f"{case.op.name} {sizes_text(case.as_dict())} ({DEVICE_NAME})"
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, device=DEVICE_NAME, dtype=case.dtype_name)

    def timer(call: Any) -> float:
        benchmark.pedantic(wall_seconds, (call, DEVICE), warmup_rounds=3, rounds=20)
        return 0.0

    outcome = attempt(partial(our_call, case), case.op, args, timer)
    assert not outcome.note, outcome.note
