"""Docstrings of the public operations stand by themselves, and calls that no operation has are errors with its name."""

from __future__ import annotations

import inspect
import re

import pytest
import torch
from torch.autograd import forward_ad

from mixtral_triton import ops
from mixtral_triton.kernels.registry import OPS

X, WEIGHT = torch.randn(3, 8), torch.randn(8)
PUBLIC = [*OPS, "rms_norm"]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_names_everything_and_its_example_runs(name: str) -> None:
    function = getattr(ops, name, None) or ops.dispatched(name, {})
    doc = inspect.getdoc(function) or ""
    signature = inspect.signature(function)
    for argument in signature.parameters:
        assert re.search(rf"^    {argument}: (Tensor|int|float|bool)", doc, re.MULTILINE), argument
    assert "Annotated" not in str(signature) and "(`reference" not in doc and "Returns: " in doc and "ValueError" in doc
    if "window" in signature.parameters:
        assert "None, 0 and -1: no window" in doc
    example = re.findall(r">>> (.*)", doc)
    values = {"torch": torch, "ops": ops}
    assert len(example) == 2
    exec(example[0], values)
    eval(example[1], values)


@pytest.mark.parametrize("name", OPS)
def test_letters_of_every_shape_are_explained(name: str) -> None:
    doc = inspect.getdoc(ops.__getattr__(name)) or ""
    sizes = doc.partition("Sizes: ")[2].partition("\n")[0]
    used = set(
        re.findall(r"[A-Z]\w*", " ".join(re.findall(r"\[.*?\]", doc.partition("Arguments:")[2].partition("Sizes")[0])))
    )
    assert used and used <= set(re.findall(r"\b[A-Z]\w*", sizes)), used


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
