"""Every operation of the registry: each test shape and dtype, interpreted or on the GPU, against the reference; its
declarations, its docstring, and calls that no operation has."""

import doctest
import inspect
import re
from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.operation.cases import OpWithCases
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPERATIONS, OPS, dispatched
from mixtral_triton.verification.tolerance import Tolerance
from tests.support.calls import as_tuple, inputs_without_padding, selected_configs


def slow(op: OpWithCases, sizes: Any, dtype: torch.dtype) -> bool:
    """The quick run takes shapes in fp32 and bf16 by turns, and the first in fp16, which has bf16's tiles. Of experts
    with 20 tokens and more it takes the first shape, in fp32."""
    if hasattr(sizes, "gate_up") and sizes.T >= 20:
        many = next(each for each in op.test_shapes if each.T >= 20)
        return sizes is not many or dtype != torch.float32
    number, turns = op.test_shapes.index(sizes), (torch.float32, torch.bfloat16)
    if dtype in turns and len(op.dtypes) > 1:
        return dtype != turns[number % 2]
    return dtype == torch.float16 and number > 0


CASES = [
    pytest.param(name, sizes, dtype, marks=[pytest.mark.slow] if slow(op, sizes, dtype) else [])
    for name, op in OPS.items()
    for sizes in op.test_shapes
    for dtype in op.dtypes
]
# Sums over many tiles of positive numbers: the rounding errors of an accumulator in 16 bits grow with each tile.
DEEP: list[Any] = [("linear", {"T": T, "N": 24, "deterministic": T > 3}) for T in (3, 20)]
DEEP += [("expert_swiglu", {"T": T, "I": 16, "E": 1, "K": 1}) for T in (3, 70, 200)]
DEEP = [(name, OPS[name].case(H=4096, **sizes), torch.bfloat16) for name, sizes in DEEP]
CASES += [*DEEP[:-1], pytest.param(*DEEP[-1], marks=[pytest.mark.slow])]


@pytest.mark.parametrize(("name", "sizes", "dtype"), CASES, ids=str)
def test_error_is_at_most_twice_that_of_plain_torch(name: str, sizes: Any, dtype: Any, device: torch.device) -> None:
    if device.type == "cpu" and not INTERPRETED:
        pytest.skip("the torch backend is the reference itself: needs TRITON_INTERPRET=1 or a GPU")
    args = inputs_without_padding(name, sizes, device, dtype)
    if (name, sizes, dtype) in DEEP:
        args |= {key: x.abs() for key, x in args.items() if isinstance(x, torch.Tensor)}
        if "down_proj" in args:  # one column of h decides: the errors of several would cancel
            args["down_proj"][..., 1:] = 0.0
    error, limit = Tolerance(name, args).measure(dispatched(name, args))
    assert error <= limit


ARGUMENTS_MOST = 18  # of a kernel, beside its constexprs


def describe(out: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in as_tuple(out)]


@pytest.mark.compiled
@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_declarations_of_an_operation_are_consistent(op: OpWithCases) -> None:
    for sizes in (*op.test_shapes, *op.bench_shapes):
        for dtype in op.dtypes:
            args = op.inputs(sizes, dtype, "meta")
            op.check(**args)
            cost = op.cost(sizes, dtype)
            assert cost.bytes > 0 and cost.flops >= 0
            with record_launches() as launches:
                got = op.run(**args)
            assert describe(got) == describe(op.empty(**args))
            assert all(len(launch.args) <= ARGUMENTS_MOST for launch in launches)
            kernels = {launch.kernel for launch in launches}
            assert kernels & set(selected_configs(op.name, sizes, dtype)) or kernels == {"aten::mm"}


@pytest.mark.parametrize("name", OPERATIONS)
def test_docstring_names_every_argument_and_its_example_runs(name: str) -> None:
    function = getattr(ops, name)
    doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
    named = set(re.findall(r"\w+", doc))
    assert set(signature.parameters) <= named and "Annotated" not in str(signature) and "Returns" in doc
    torch.manual_seed(0)
    test = doctest.DocTestParser().get_doctest(doc, {"ops": ops, "torch": torch}, name, None, None)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 1 and result.failed == 0


X, WEIGHT = torch.randn(3, 8), torch.randn(8)


def norm(x: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, WEIGHT, 1e-5)


TRANSFORMS = {
    "vmap": lambda: torch.func.vmap(norm)(X[None]),
    "jvp": lambda: torch.func.jvp(norm, (X,), (X,)),
    "grad": lambda: torch.func.grad(lambda x: norm(x).sum())(X),
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_raise_value_error_with_the_name(case: str) -> None:
    with pytest.raises(ValueError, match=r"mixtral_triton\.ops\.rms_norm is for inference only: vmap, jvp, grad"):
        TRANSFORMS[case]()


@pytest.mark.parametrize("kind", [TypeError, ValueError])
def test_wrong_signatures_name_the_operation(kind: Any) -> None:
    x = X.view(3, 1, 1, 8)
    for args, more in (((x,), {}), ((x,) * 20, {}), ((x,) * 3, {"size": 1})):
        with pytest.raises(kind, match=r"^attention: "):
            ops.attention(*args, **more)
    for call in (ops.attention, ops.attention.unchecked):
        with pytest.raises(kind, match=r"^attention: .* takes 3 positional arguments but 4 were"):
            call(x, x, x, 3)
