"""Every operation of the registry, every test shape and dtype: interpreted (or on the GPU) against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import Op
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.tolerance import measure

CASES = [
    pytest.param(op, sizes, dtype, id=f"{name}-{'-'.join(f'{k}{v}' for k, v in sizes.items())}-{str(dtype)[6:]}")
    for name, op in OPS.items()
    for sizes in op.test_shapes
    for dtype in op.dtypes
]


@pytest.mark.parametrize(("op", "sizes", "dtype"), CASES)
def test_error_is_at_most_twice_that_of_plain_torch(
    op: Op, sizes: Any, dtype: torch.dtype, device: torch.device, covers: Any, request: pytest.FixtureRequest
) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the plain torch way is the reference itself: needs TRITON_INTERPRET=1 or a GPU")
    args = op.inputs(sizes, dtype, device, torch.Generator().manual_seed(0))
    if op.name == "cached_attention" and int(args["new"].min()) < sizes["T"]:
        args["new"] = args["new"] * 0 + sizes["T"]  # rows past `new` mean nothing; test_model has ragged chunks
    error, limit = measure(op.name, args)
    assert error <= limit
    covers("case", request.node.callspec.id)


def described(out: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in (out if isinstance(out, tuple) else (out,)) if x is not None]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_what_an_operation_declares_is_consistent(op: Op) -> None:
    for sizes in (*op.test_shapes, *op.bench_shapes):
        for dtype in op.dtypes:
            args = op.inputs(sizes, dtype, "meta")
            op.check(**args)
            cost = op.cost(sizes, dtype)
            assert cost.bytes > 0 and cost.flops >= 0
            with record_launches() as launches:
                got = op.run(**args)
            want = op.empty(**args)
            assert described(got) == described(want)
            chosen = op.configs(sizes, dtype, "sm_90")
            kernels = {launch.kernel for launch in launches}
            assert kernels & set(chosen) or (op.name == "linear" and kernels == {"aten::mm"})
