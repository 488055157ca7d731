"""Docstrings of the operations, and calls that no operation has."""

from __future__ import annotations

import doctest
import inspect
import re

import pytest
import torch
from torch.autograd import forward_ad

from mixtral_triton import ops
from mixtral_triton.kernels.registry import OPERATIONS

X, WEIGHT = torch.randn(3, 8), torch.randn(8)


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


def test_dir_lists_the_operations_alone() -> None:
    assert dir(ops) == sorted(OPERATIONS) and set(ops.__all__) == set(OPERATIONS)


def norm(x: torch.Tensor) -> torch.Tensor:
    return ops.rms_norm(x, WEIGHT, 1e-5)


def forward_derivative() -> None:
    with forward_ad.dual_level():
        norm(forward_ad.make_dual(X, X))


TRANSFORMS = {
    "vmap": lambda: torch.func.vmap(norm)(X[None]),
    "jvp": lambda: torch.func.jvp(norm, (X,), (X,)),
    "grad": lambda: torch.func.grad(lambda x: norm(x).sum())(X),
    "forward": forward_derivative,
}


@pytest.mark.parametrize("case", TRANSFORMS)
def test_transforms_raise_value_error_with_the_name(case: str) -> None:
    with pytest.raises(ValueError, match=r"mixtral_triton\.ops\.rms_norm is for inference only: vmap, jvp, grad"):
        TRANSFORMS[case]()
    norm(X)
    with forward_ad.dual_level():
        norm(X)  # no derivative is asked for


def test_wrong_signatures_name_the_operation() -> None:
    calls = (lambda: ops.attention(X), lambda: ops.attention(X, X, X, size=1), lambda: ops.attention(*[X] * 20))
    for call in calls:
        for kind in (TypeError, ValueError):
            with pytest.raises(kind, match=r"^attention: "):
                call()
