"""No operation minds how its arguments lie in memory: every tensor of every one, in views, against the reference.

Each way that an operation goes (the kernels it launches, the tensors it is given) is tried at its smallest test shape,
made smaller yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import ops
from mixtral_triton.kernels import launch
from mixtral_triton.kernels.op import Op, Shape, Sizes
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS

Args = dict[str, Any]
INTERPRET = launch.interpret
LIMIT = 4e-6  # of the largest value, in fp32
MOST = {"H": 24, "I": 20, "N": 24, "E": 6, "V": 20, "Hq": 4, "Hkv": 2, "D": 16, "C": 80, "S": 60, "past": 70}


def tensors(args: Args) -> dict[str, Tensor]:
    return {name: value for name, value in args.items() if isinstance(value, Tensor)}


def ways(op: Op) -> Iterator[Sizes]:
    """Of the test shapes that launch the same kernels on the same arguments: that with the fewest dimensions of one,
    which have no stride to get wrong, and the smallest of those."""
    found: dict[Any, list[tuple[int, int, Sizes]]] = {}
    for shape in op.test_shapes:
        sizes = Shape(shape)
        if len(sizes.as_dict().keys() & {"weight", "gate_up", "down"}) == 0:  # whose groups want their columns
            sizes |= {letter: min(size, MOST.get(letter, size)) for letter, size in shape.items()}
        args = op.inputs(sizes, op.dtypes[0], "meta")
        with record_launches() as launches:
            op.run(**args)
        way = frozenset(one.kernel for one in launches), frozenset(tensors(args))
        shapes = [x.shape for x in tensors(args).values()]
        ones, elements = sum(1 in shape for shape in shapes), sum(shape.numel() for shape in shapes)
        found.setdefault(way, []).append((ones, elements, sizes))
    yield from (min(shapes, key=lambda shape: shape[:2])[2] for shapes in found.values())


CASES = [(name, sizes) for name, op in OPS.items() for sizes in ways(op)]
INTEGERS = [
    pytest.param(name, sizes, argument, id=f"{name}-{argument}-{number}")
    for number, (name, sizes) in enumerate(CASES)
    for argument, value in tensors(OPS[name].inputs(sizes, OPS[name].dtypes[0], "meta")).items()
    if not value.is_floating_point()
]


def sliced(x: Tensor, last: int = 2) -> Tensor:
    """Every second element of every dimension; whoever reads the others sees NaN, or a number out of every range."""
    big = torch.full([2 * n + 1 for n in x.shape], float("nan") if x.is_floating_point() else 10**6, device=x.device)
    places = [slice(1, 1 + 2 * n, 2) for n in x.shape[:-1]]
    return big.to(x.dtype)[(*places, slice(1, 1 + last * x.shape[-1], last))].copy_(x)


def transposed(x: Tensor, last: int = -1) -> Tensor:
    return x.transpose(0, last).contiguous().transpose(0, last)


def expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape)


def laid_out(layout: Callable[..., Tensor], name: str, x: Tensor, written: bool) -> Tensor:
    """A cache's last dimension stays dense, and one that is written into has no element twice. A gate repeats columns:
    of experts that are the same a rounding would choose."""
    if name == "gate" and layout is expanded:
        return x[:, :1].expand(x.shape)
    if not name.endswith("cache"):
        return layout(x)
    if layout is expanded:
        return x.clone() if written else expanded(x)
    return layout(x, 1)


def results(function: Callable[..., Any], args: Args, mutates: tuple[str, ...]) -> list[Tensor]:
    out = function(**args)
    return [*(out if isinstance(out, tuple) else () if out is None else (out,)), *(args[name] for name in mutates)]


def check(name: str, sizes: Sizes, device: Any, change: Callable[[str, Tensor], Tensor]) -> None:
    """The operation on arguments as `change` lays them out, beside its reference on dense copies of them."""
    op = OPS[name]
    args = op.inputs(sizes, op.dtypes[0], device, torch.Generator().manual_seed(0))
    if name == "cached_attention":
        args["new"] = torch.full_like(args["new"], sizes["T"])  # what stands on padding means nothing
    args |= {key: change(key, value) for key, value in tensors(args).items()}
    dense = {key: value.clone(memory_format=torch.contiguous_format) for key, value in tensors(args).items()}
    kept = {key: value.clone() for key, value in dense.items() if key not in op.mutates}
    wanted = results(op.call_reference, args | dense, op.mutates)
    for got, want in zip(results(getattr(ops, name.removeprefix("add_")), args, op.mutates), wanted, strict=True):
        if want.is_floating_point():
            assert (got - want).abs().max() <= LIMIT * want.abs().max()
        else:
            assert torch.equal(got, want)
    assert all(torch.equal(args[key], value) for key, value in kept.items())


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(torch.int32, sliced), (torch.int32, expanded), (torch.int64, sliced), (torch.int64, transposed)],
    ids=("int32 sliced", "int32 expanded", "int64 sliced", "int64 transposed"),
)
@pytest.mark.parametrize(("name", "sizes", "argument"), INTEGERS)
def test_integers(
    name: str,
    sizes: Sizes,
    argument: str,
    dtype: torch.dtype,
    layout: Callable[..., Tensor],
    device: torch.device,
) -> None:
    """One argument at a time."""
    check(name, sizes, device, lambda key, x: layout(x.to(dtype)) if key == argument else x)


@pytest.mark.parametrize("layout", (sliced, transposed, expanded))
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(CASES)])
def test_all_at_once(name: str, sizes: Sizes, layout: Callable[..., Tensor], device: torch.device) -> None:
    check(name, sizes, device, lambda key, x: laid_out(layout, key, x, key in OPS[name].mutates))


@pytest.mark.parametrize(("name", "sizes"), CASES, ids=[f"{name}-{number}" for number, (name, _) in enumerate(CASES)])
def test_a_sign_yet_to_be_applied(
    name: str, sizes: Sizes, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in the imaginary part of a conjugate, whose memory holds the opposite."""
    monkeypatch.setattr(launch, "interpret", INTERPRET)  # a guard's copy would have the sign

    def change(key: str, x: Tensor) -> Tensor:
        return torch._neg_view(-x) if x.is_floating_point() and not key.endswith("cache") else x

    check(name, sizes, device, change)
