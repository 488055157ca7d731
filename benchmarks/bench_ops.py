"""The cases of `mixtral-triton bench` for pytest-benchmark: `pytest benchmarks/`.

With a GPU: Mixtral's sizes, each with every installed peer. Without: small sizes in plain torch on the CPU. A wrong
result fails before it is timed, a peer that cannot do the case is skipped. Times include the host's launches.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mixtral_triton.bench.cases import BENCHED, Case, cases
from mixtral_triton.bench.measure import attempt, our_call, wall_seconds
from mixtral_triton.bench.peers import PEERS, Peer
from mixtral_triton.kernels.launching.launch import INTERPRETED, target_arch
from mixtral_triton.kernels.operation.declaration import Cost, runs_on
from mixtral_triton.kernels.registry import OPS

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
DEVICE_NAME = torch.cuda.get_device_name() if GPU else "CPU, plain torch"


def _params() -> Iterator[Any]:
    for case in (
        [case for case in cases() if runs_on(case.sizes, target_arch(DEVICE))]
        if GPU
        else [Case(op, op.test_shapes[0], op.dtypes[0]) for op in BENCHED.values()]
    ):
        shape = "-".join(f"{key}{value}" for key, value in case.as_dict().items())
        ours: Peer = lambda op, args, case=case: our_call(case, args)  # noqa: E731
        for name, peer in {"ours": ours, **(PEERS if GPU and case.op.name in OPS else {})}.items():
            yield pytest.param(case, name, peer, id=f"{case.op.name}-{shape}-{name}")


@pytest.mark.skipif(INTERPRETED, reason="times nothing that is interpreted: needs TRITON_INTERPRET unset")
@pytest.mark.parametrize(("case", "name", "peer"), list(_params()))
@torch.no_grad()
def test_op(case: Case, name: str, peer: Peer, benchmark: Any) -> None:
    args = case.inputs(DEVICE)
    cost = sum(case.costs(args), Cost(0, 0))
    benchmark.group = f"{case.op.name} {case.as_dict()} ({DEVICE_NAME})"
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, device=DEVICE_NAME, dtype=case.dtype_name)

    def timer(call: Any) -> float:
        benchmark.pedantic(wall_seconds, (call, DEVICE), warmup_rounds=3, rounds=20)
        return 0.0

    outcome = attempt(lambda: peer(case.op, args), case.op, args, timer)
    if outcome.note:
        (pytest.fail if name == "ours" else pytest.skip)(outcome.note)
