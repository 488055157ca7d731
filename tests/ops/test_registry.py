"""Every operation of the registry, every test shape and dtype: interpreted (or on the GPU) against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import Op
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS, dispatched
from mixtral_triton.tools.tolerance import Tolerance
from tests.support.calls import as_tuple, inputs_without_padding

# fp16 has bf16's tiles: the quick run takes the first shape in it.
CASES = [
    pytest.param(name, sizes, dtype, marks=[pytest.mark.slow] if dtype == torch.float16 and number else [])
    for name, op in OPS.items()
    for number, sizes in enumerate(op.test_shapes)
    for dtype in op.dtypes
]


@pytest.mark.parametrize(("name", "sizes", "dtype"), CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(name: str, sizes: Any, dtype: Any, device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the torch backend is the reference itself: needs TRITON_INTERPRET=1 or a GPU")
    args = inputs_without_padding(name, sizes, device, dtype)
    error, limit = Tolerance(name, args).measure(dispatched(name, args))
    assert error <= limit


def describe(out: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in as_tuple(out)]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_declarations_of_an_operation_are_consistent(op: Op) -> None:
    for sizes in (*op.test_shapes, *op.bench_shapes):
        for dtype in op.dtypes:
            args = op.inputs(sizes, dtype, "meta")
            op.check(**args)
            cost = op.cost(sizes, dtype)
            assert cost.bytes > 0 and cost.flops >= 0
            with record_launches() as launches:
                got = op.run(**args)
            assert describe(got) == describe(op.empty(**args))
            kernels = {launch.kernel for launch in launches}
            assert kernels & set(op.configs(sizes, dtype, "sm_90")) or (op.name == "linear" and kernels == {"aten::mm"})
