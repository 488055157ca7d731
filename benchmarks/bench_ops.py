"""The cases of `mixtral-triton bench` for pytest-benchmark.

    pytest benchmarks/

With a GPU: Mixtral's sizes, each with every installed peer. Without one: the sizes of the checkpoint in the package, on
the plain way of the CPU, and every group and `extra_info` says so. A result is checked once before it is timed: what is
wrong fails, and a peer that is wrong, or cannot do the case, is skipped with the reason. The extra columns of a
benchmark (`--benchmark-json`) hold the compulsory bytes and FLOPs. Times include the host's launches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from mixtral_triton.cli import SMALL
from mixtral_triton.config import MixtralConfig
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.tools.bench.cases import Case, cases, oracle
from mixtral_triton.tools.bench.measure import attempt, our_call
from mixtral_triton.tools.bench.peers import Peer, peers_of
from mixtral_triton.tools.bench.report import sizes_text

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
PLACE = torch.cuda.get_device_name() if GPU else "CPU, plain torch"


def _cases() -> list[Case]:
    return cases() if GPU else cases(quick=True, model=MixtralConfig.from_pretrained(SMALL))


def _params() -> Iterator[Any]:
    for case in _cases():
        shape = "-".join(f"{key}{value}" for key, value in case.as_dict().items())
        for way in (
            Peer("ours", case.op.name, "", lambda op, args, case=case: our_call(case, args)),
            *(peers_of(case.op.name) if GPU else ()),
        ):
            yield pytest.param(case, way, id=f"{case.op.name}-{shape}-{way.name.replace(' ', '_')}")


@pytest.mark.skipif(INTERPRETED, reason="times nothing that is interpreted: needs TRITON_INTERPRET unset")
@pytest.mark.parametrize(("case", "way"), list(_params()))
@torch.no_grad()
def test_op(case: Case, way: Peer, benchmark: Any) -> None:
    args = case.inputs(DEVICE)
    cost = case.cost(args)
    against = f" {sizes_text(case.as_dict())}" if GPU else ""  # with peers, a table a case
    benchmark.group = f"{case.op.name}{against} ({PLACE})"
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, device=PLACE, dtype=case.dtype_name)

    def timed(call: Any) -> float:
        def synchronized() -> None:
            call()
            if GPU:
                torch.cuda.synchronize()

        benchmark.pedantic(synchronized, warmup_rounds=3, rounds=20)
        return 0.0

    outcome = attempt(lambda: way.build(case.op, args), args, oracle(case.op, args), timed)
    if outcome.note:
        (pytest.fail if way.name == "ours" else pytest.skip)(outcome.note)
