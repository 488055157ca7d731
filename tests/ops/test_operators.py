"""Every operation as a custom operator: compiled, exported, with fake tensors; what a bad call and a gradient get."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from mixtral_triton import ops
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS

META = torch.device("meta")
SIZES: dict[str, Any] = {  # of others, their first test shape
    "rms_norm": {"T": 3, "H": 8},
    "add_rms_norm": {"T": 3, "H": 8},
    "embed_rms_norm": {"B": 2, "T": 3, "V": 11, "H": 8, "past": 4},
    "linear": {"T": 3, "H": 8, "N": 5},
    "route": {"T": 5, "E": 6, "K": 2},
    "gate_route": {"T": 5, "H": 8, "E": 6, "K": 2},
    "sort_by_expert": {"T": 7, "E": 4, "K": 2},
    "expert_swiglu": {"T": 5, "H": 8, "I": 12, "E": 4, "K": 2},
    "experts_add_rms_norm": {"T": 5, "H": 8, "I": 12, "E": 4, "K": 2},
    "rope": {"B": 2, "T": 3, "Hq": 4, "Hkv": 2, "D": 8, "P": 9},
    "append": {"B": 2, "T": 3, "Hkv": 2, "D": 8, "C": 5, "past": 4},
    "rope_append_attention": Shape(B=2, T=1, Hq=4, Hkv=2, D=8, C=5, past=4, window=5),
    "attention": Shape(B=2, T=3, S=7, Hq=4, Hkv=2, D=8, window=4, ragged=True),
    "cached_attention": Shape(B=2, T=3, Hq=4, Hkv=2, D=8, C=5, past=4, window=5, fresh=True),
}
SIZES |= {name: Shape(op.test_shapes[0]) for name, op in OPS.items() if name not in SIZES}
traced = pytest.mark.skipif(INTERPRETED, reason="what a graph holds are the operators, whatever runs in them")


def inputs(name: str, device: Any = "cpu", sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Of the operator; `ops.rms_norm` takes both "rms_norm" and "add_rms_norm"."""
    return OPS[name].inputs(sizes or SIZES[name], OPS[name].dtypes[0], device, torch.Generator().manual_seed(0))


def public(name: str) -> Callable[..., Any]:
    return getattr(ops, name.removeprefix("add_"))


def results(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else () if out is None else (out,)


def copies(args: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in args.items()}


def run(function: Callable[..., Any], args: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of a call on copies, and the copies themselves."""
    own = copies(args)
    return results(function(**own)) + tuple(value for value in own.values() if isinstance(value, Tensor))


def same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    pairs = zip(got, want, strict=True)
    return all(a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("name", OPS)
def test_registered(name: str, device: torch.device) -> None:
    args, operator = inputs(name, device), getattr(torch.ops.mixtral_triton, name).default
    changed = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert changed == set(OPS[name].mutates)
    assert same(run(operator, args), run(public(name), args))


@pytest.mark.parametrize("name", OPS)
def test_arguments_by_place_or_by_name(name: str, device: torch.device) -> None:
    args = {key: parameter.default for key, parameter in signature(public(name)).parameters.items()}
    args |= inputs(name, device)
    own = copies(args)
    by_place = results(public(name)(*own.values())) + tuple(x for x in own.values() if isinstance(x, Tensor))
    assert same(by_place, run(public(name), args))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mixtral_triton, name).default, (), inputs(name))


def transposed(value: Any) -> Any:
    strided = isinstance(value, Tensor) and value.dim() > 1
    return value.transpose(0, -1).contiguous().transpose(0, -1) if strided else value


def steps(x: Tensor) -> list[int]:
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


UNMASKED = ("attention", Shape(B=2, T=3, S=7, Hq=4, Hkv=2, D=8, window=0, causal=False))


@pytest.mark.parametrize("layout", (lambda x: x, transposed), ids=("dense", "transposed"))
@pytest.mark.parametrize(("name", "sizes"), [*SIZES.items(), UNMASKED])
def test_fake_results_are_laid_out_as_real_ones(
    name: str, sizes: dict[str, int], layout: Any, device: torch.device
) -> None:
    """Compiled code relies on the strides too: a later `.view` is decided by them."""
    args = inputs(name, device, sizes)
    args = {key: value if key.endswith("cache") else layout(value) for key, value in args.items()}
    real = results(public(name)(**args))
    with FakeTensorMode() as mode:
        fake = {key: mode.from_tensor(value) if isinstance(value, Tensor) else value for key, value in args.items()}
        described = results(public(name)(**fake))
    on_meta = {key: value.to(META) if isinstance(value, Tensor) else value for key, value in args.items()}
    for got in (described, results(public(name)(**on_meta))):
        for a, b in zip(got, real, strict=True):
            assert (a.shape, a.dtype, steps(a)) == (b.shape, b.dtype, steps(b))


# compile and export, with sizes of a trace and with free ones


class Call(torch.nn.Module):
    """`ops.<name>` between two other operations, as a part of a graph."""

    def __init__(self, name: str, rest: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.rest = name, rest

    def forward(self, tensors: dict[str, Tensor]) -> list[Tensor]:
        tensors = {key: value + 0 for key, value in tensors.items()}
        out = public(self.name)(**tensors, **self.rest)
        return [x * 2 for x in (*results(out), *(tensors[key] for key in OPS[self.name].mutates))]


def graph_call(name: str, device: Any = "cpu") -> tuple[Call, dict[str, Tensor]]:
    args = inputs(name, device)
    tensors = {key: value for key, value in args.items() if isinstance(value, Tensor)}
    return Call(name, {key: value for key, value in args.items() if key not in tensors}), tensors


@traced
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("name", OPS)
def test_compile(name: str, dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    call, tensors = graph_call(name, device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert same(tuple(compiled(tensors)), tuple(call(tensors)))


NUMBERS = [("route", "top_k"), ("gate_route", "top_k"), ("sort_by_expert", "num_experts"), ("attention", "window")]


@traced
@pytest.mark.parametrize(("name", "argument"), NUMBERS, ids=[case[0] for case in NUMBERS])
def test_compile_with_a_free_number(name: str, argument: str) -> None:
    """The compiler passes a symbol where an argument was another number before."""
    args = inputs(name)
    call = torch.compile(lambda number: public(name)(**args | {argument: number}), fullgraph=True, backend="aot_eager")
    for number in (4, 5, 6):
        assert same(results(call(number)), results(public(name)(**args | {argument: number})))


@traced
@pytest.mark.parametrize("name", OPS)
def test_export(name: str, device: torch.device) -> None:
    call, tensors = graph_call(name, device)
    program = torch.export.export(call, (tensors,))
    assert same(tuple(program.module()(tensors)), tuple(call(tensors)))
    assert f"mixtral_triton.{name}" in str(program.graph)


FREE = [  # operation, the dimension that is free by argument, other sizes to run with
    ("rms_norm", {"x": 0}, {"T": 9}),
    ("add_rms_norm", {"x": 0, "residual": 0}, {"T": 9}),
    ("route", {"logits": 0}, {"T": 11}),
    ("expert_swiglu", {"x": 0, "ids": 0, "weights": 0}, {"T": 70}),
    ("rope", {"q": 1, "k": 1, "positions": 1}, {"T": 6}),
    ("attention", {"k": 1, "v": 1}, {"S": 20}),
]


@traced
@pytest.mark.parametrize(("name", "free", "other"), FREE, ids=[case[0] for case in FREE])
def test_export_with_a_free_size(name: str, free: dict[str, int], other: dict[str, int]) -> None:
    call, tensors = graph_call(name)
    size = torch.export.Dim("size", min=2, max=100)
    shapes = {key: {free[key]: size} if key in free else None for key in tensors}
    program = torch.export.export(call, (tensors,), dynamic_shapes=(shapes,))
    op = OPS[name]
    more = {key: x for key, x in op.inputs(SIZES[name] | other, op.dtypes[0], "cpu").items() if key in tensors}
    assert same(tuple(program.module()(more)), tuple(call(more)))


# bad calls: (operation, argument, what it is instead, what the message says of it)

ones, zeros = torch.ones, torch.zeros
WRONG: list[tuple[str, str, Any, str]] = [
    ("rms_norm", "x", zeros(()), r"\[\]"),
    ("rms_norm", "x", zeros(3, 8, dtype=torch.float64), "float64"),
    ("rms_norm", "x", zeros(3, 8, dtype=torch.int64), "int64"),
    ("rms_norm", "weight", ones(7), r"\[7\]"),
    ("rms_norm", "weight", ones(1, 8), r"\[1, 8\]"),
    ("rms_norm", "weight", ones(8).bfloat16(), "bfloat16"),
    ("rms_norm", "eps", -1.0, "-1"),
    ("rms_norm", "eps", float("nan"), "nan"),
    ("rms_norm", "eps", "small", "small|str"),
    ("add_rms_norm", "residual", zeros(1, 8), r"\[1, 8\]"),
    ("add_rms_norm", "residual", zeros(3, 8).half(), "float16"),
    ("route", "logits", zeros(6), r"\[6\]"),
    ("route", "logits", zeros(5, 6, dtype=torch.float64), "float64"),
    ("route", "logits", zeros(5, 0), "0"),
    ("route", "top_k", 0, "0"),
    ("route", "top_k", 7, "7.*6"),
    ("route", "top_k", 2.0, "2.0|float"),
    ("route", "top_k", True, "True|bool"),
    ("sort_by_expert", "ids", zeros(7, 2), "float32"),
    ("sort_by_expert", "ids", zeros(7, dtype=torch.int32), r"\[7\]"),
    ("sort_by_expert", "num_experts", 0, "0"),
    ("expert_swiglu", "gate_up_proj", zeros(4, 12, 8), r"\[4, 12, 8\]"),
    ("expert_swiglu", "gate_up_proj", zeros(4, 24, 8).bfloat16(), "bfloat16"),
    ("expert_swiglu", "down_proj", zeros(8, 12), r"\[8, 12\]"),
    ("expert_swiglu", "down_proj", zeros(4, 8, 0), "0"),
    ("expert_swiglu", "ids", zeros(5, 2), "float32"),
    ("expert_swiglu", "ids", zeros(4, 2, dtype=torch.int32), r"\[4, 2\]"),
    ("expert_swiglu", "weights", ones(5, 3), r"\[5, 3\]"),
    ("expert_swiglu", "weights", ones(5, 2).bfloat16(), "bfloat16"),
    ("rope", "k", zeros(2, 4, 2, 8), r"\[2, 4, 2, 8\]"),
    ("rope", "k", zeros(2, 3, 2, 8).half(), "float16"),
    ("rope", "cos", ones(9, 4).bfloat16(), "bfloat16"),
    ("rope", "sin", ones(9, 4).double(), "float64"),
    ("rope", "cos", ones(9, 8), r"\[9, 8\]"),
    ("rope", "sin", ones(8, 4), r"\[8, 4\]"),
    ("rope", "positions", zeros(2, 3), "float32"),
    ("rope", "positions", zeros(3, dtype=torch.int64), r"\[3\]"),
    ("attention", "q", zeros(2, 3, 5, 8), "5"),
    ("attention", "q", zeros(2, 3, 8), r"\[2, 3, 8\]"),
    ("attention", "k", zeros(2, 7, 2, 9), r"\[2, 7, 2, 9\]"),
    ("attention", "v", zeros(2, 8, 2, 8), r"\[2, 8, 2, 8\]"),
    ("attention", "v", zeros(2, 7, 2, 8).half(), "float16"),
    ("attention", "window", -2, "-2"),
    ("attention", "window", 4.0, "4.0|float"),
    ("attention", "scale", 0.0, "0.0"),
    ("attention", "scale", float("inf"), "inf"),
    ("attention", "causal", "no", "no|str"),
    ("attention", "starts", zeros(2), "float32"),
    ("attention", "lengths", zeros(3, dtype=torch.int32), r"\[3\]"),
    ("attention", "lengths", ones(2, dtype=torch.int16), "int16"),
    ("attention", "lengths", [7, 7], "list"),
]
VALUES = [  # read on the CPU only
    ("sort_by_expert", "ids", zeros(7, 2, dtype=torch.int32) + 4, "4"),
    ("expert_swiglu", "ids", zeros(5, 2, dtype=torch.int64) - 1, "-1"),
    ("rope", "positions", zeros(2, 3, dtype=torch.int64) + 9, "9"),
    ("rope", "positions", zeros(2, 3, dtype=torch.int32) - 1, "-1"),
]
TENSORS = [(name, key) for name in OPS for key, value in inputs(name, META).items() if isinstance(value, Tensor)]


def refused(name: str, args: dict[str, Any], argument: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{name.removeprefix('add_')}: .*'{argument}'.*({got})"):
        public(name)(**args)


@pytest.mark.parametrize("times", (1, 2), ids=("fresh", "after a good call"))
@pytest.mark.parametrize(("name", "argument", "value", "got"), WRONG)
def test_wrong_argument(name: str, argument: str, value: Any, got: str, times: int, device: torch.device) -> None:
    args = inputs(name, device)
    if times == 2:  # a check that is remembered must not let the next call pass
        public(name)(**args)
    refused(name, args | {argument: value.to(device) if isinstance(value, Tensor) else value}, argument, got)


@pytest.mark.parametrize(("name", "argument", "value", "got"), VALUES)
def test_value_out_of_range(name: str, argument: str, value: Tensor, got: str) -> None:
    for _ in range(2):
        public(name)(**inputs(name))
        refused(name, inputs(name) | {argument: value}, argument, got)


def optional(name: str) -> set[str]:
    arguments = getattr(torch.ops.mixtral_triton, name).default._schema.arguments
    return {argument.name for argument in arguments if isinstance(argument.type, torch.OptionalType)}


@pytest.mark.parametrize("instead", (None, [1.0], 3, "text"), ids=str)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_no_tensor(name: str, argument: str, instead: Any, device: torch.device) -> None:
    if instead is None and (argument == "residual" or argument in optional(name)):
        pytest.skip("may be None")
    refused(name, inputs(name, device) | {argument: instead}, argument, type(instead).__name__)


@pytest.mark.parametrize(("name", "argument"), [case for case in TENSORS if case[0] not in ("route", "sort_by_expert")])
def test_another_device(name: str, argument: str, device: torch.device) -> None:
    """One argument on meta: it is named, or the next one is, which is not where the first is."""
    args = inputs(name, device)
    with pytest.raises(ValueError, match=rf"(?s)^{name.removeprefix('add_')}: argument '.*meta"):
        public(name)(**args | {argument: args[argument].to(META)})


# gradients


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_backward_is_refused(name: str, argument: str, device: torch.device) -> None:
    """The forward is what it is without gradients; only the backward is refused."""
    args = inputs(name, device)
    if not args[argument].is_floating_point():
        return
    own = copies(args) | {argument: args[argument].clone().requires_grad_()}
    if OPS[name].mutates:
        with pytest.raises(ValueError, match=f"{name}.*inference only"):
            public(name)(**own)
        return
    out = [x for x in results(public(name)(**own)) if x.is_floating_point()]
    assert same(tuple(x.detach() for x in out), tuple(x for x in run(public(name), args)[: len(out)]))
    with pytest.raises(ValueError, match=f"{name}.*inference only"):
        sum(x.sum() for x in out).backward()


DETERMINISTIC = [name for name in SIZES if "deterministic" in inspect.signature(OPS[name].run).parameters]


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_deterministic_is_found_by_name(name: str) -> None:
    """Also past the checks, where a model calls: on the plain way it is an argument that no reference has."""
    args = inputs(name) | {"deterministic": True}
    got, want = (results(function(**copies(args))) for function in (getattr(ops.unchecked, name), public(name)))
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
