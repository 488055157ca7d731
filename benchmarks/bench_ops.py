"""The cases of `mixtral-triton bench` for pytest-benchmark, each with every installed peer, on a GPU.

    pytest benchmarks/bench_ops.py --benchmark-group-by=group

A result is checked once before it is timed: what is wrong, or cannot do the case, is skipped with the reason. The extra
columns of a benchmark (`--benchmark-json`) hold the compulsory bytes and FLOPs. Times include the host's launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mixtral_triton.bench import attempt, ours
from mixtral_triton.bench_cases import Case, cases, oracle
from mixtral_triton.peers import Peer, peers_of

DEVICE = torch.device("cuda")


def _params() -> Iterator[Any]:
    for case in cases():
        shape = "-".join(f"{key}{value}" for key, value in case.sizes.items())
        for way in (
            Peer("ours", case.op.name, "", lambda op, args, case=case: ours(case, args)),
            *peers_of(case.op.name),
        ):
            yield pytest.param(case, way, id=f"{case.op.name}-{shape}-{way.name.replace(' ', '_')}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no time is measured without one")
@pytest.mark.parametrize(("case", "way"), _params())
@torch.no_grad()
def test_op(case: Case, way: Peer, benchmark: Any) -> None:
    args = case.inputs(DEVICE)
    cost = case.cost(args)
    benchmark.group = f"{case.op.name} {dict(case.sizes)}"
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, gpu=torch.cuda.get_device_name())

    def timed(call: Any) -> float:
        def synchronized() -> None:
            call()
            torch.cuda.synchronize()

        benchmark.pedantic(synchronized, warmup_rounds=3, rounds=20)
        return 0.0

    outcome = attempt(lambda: way.build(case.op, args), args, oracle(case.op, args), timed)
    if outcome.said:
        (pytest.fail if way.name == "ours" else pytest.skip)(outcome.said)
