"""Each operation of the registry at its bench shapes, beside plain torch and torch.compile of the reference, on a GPU.

    pytest benchmarks/bench_ops.py --benchmark-group-by=group

The extra columns of a benchmark (`--benchmark-json`) hold the compulsory bytes and FLOPs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.op import Op
from mixtral_triton.kernels.registry import OPS

CASES = [
    pytest.param(op, sizes, id=f"{name}-{'-'.join(f'{key}{value}' for key, value in sizes.items())}")
    for name, op in OPS.items()
    for sizes in op.bench_shapes
]
WAYS: dict[str, Callable[[Op], Callable[..., Any]]] = {
    "ours": lambda op: op.run,
    "torch": lambda op: op.reference,
    "torch.compile": lambda op: torch.compile(op.reference),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: no time is measured without one")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("op", "sizes"), CASES)
def test_op(op: Op, sizes: Any, way: str, benchmark: Any) -> None:
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]
    args = op.inputs(sizes, dtype, "cuda", torch.Generator().manual_seed(0))
    function = WAYS[way](op)
    cost = op.cost(sizes, dtype)
    benchmark.group = f"{op.name} {dict(sizes)}"
    benchmark.extra_info.update(bytes=cost.bytes, flops=cost.flops, gpu=torch.cuda.get_device_name())

    def call() -> None:
        function(**args)
        torch.cuda.synchronize()

    benchmark.pedantic(call, warmup_rounds=3, rounds=20)
