"""Every operation as a custom operator: compiled, exported, with fake tensors; wrong calls raise ValueError."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from tests.support.calls import as_tuple, copies, inputs, public, tensors

META = torch.device("meta")
SIZES: dict[str, Any] = {  # any other operation: its first test shape
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
traced = pytest.mark.skipif(INTERPRETED, reason="graphs hold the operators: run once, without the interpreter")


def make_inputs(name: str, device: Any = "cpu", sizes: Any = None) -> dict[str, Any]:
    return inputs(name, sizes or SIZES[name], device)


def run(function: Callable[..., Any], args: dict[str, Any]) -> tuple[Tensor, ...]:
    """The results of a call on copies, and the copies themselves."""
    args = copies(args)
    return as_tuple(function(**args)) + tuple(tensors(args).values())


def same(got: Iterable[Tensor], want: Iterable[Tensor]) -> bool:
    pairs = zip(got, want, strict=True)
    return all(a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in pairs)


@pytest.mark.parametrize("name", OPS)
def test_registered(name: str, device: torch.device) -> None:
    args, operator = make_inputs(name, device), getattr(torch.ops.mixtral_triton, name).default
    changed = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert changed == set(OPS[name].mutates)
    assert same(run(operator, args), run(public(name), args))


@pytest.mark.parametrize("name", OPS)
def test_positional_and_keyword_arguments_agree(name: str, device: torch.device) -> None:
    args = {key: parameter.default for key, parameter in signature(public(name)).parameters.items()}
    args |= make_inputs(name, device)
    positional = copies(args)
    got = as_tuple(public(name)(*positional.values())) + tuple(tensors(positional).values())
    assert same(got, run(public(name), args))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mixtral_triton, name).default, (), make_inputs(name))


def transposed(value: Any) -> Any:
    strided = isinstance(value, Tensor) and value.dim() > 1
    return value.transpose(0, -1).contiguous().transpose(0, -1) if strided else value


def layout(x: Tensor) -> Any:
    return x.shape, x.dtype, [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


UNMASKED = ("attention", Shape(B=2, T=3, S=7, Hq=4, Hkv=2, D=8, window=0, causal=False))


@pytest.mark.parametrize("change", (lambda x: x, transposed), ids=("dense", "transposed"))
@pytest.mark.parametrize(("name", "sizes"), [*SIZES.items(), UNMASKED])
def test_fake_results_have_the_layout_of_real_ones(name: str, sizes: Any, change: Any, device: torch.device) -> None:
    """Compiled code relies on the strides too, for example in a later `.view`."""
    args = make_inputs(name, device, sizes)
    args = {key: value if key.endswith("cache") else change(value) for key, value in args.items()}
    want = [layout(x) for x in as_tuple(public(name)(**args))]
    with FakeTensorMode() as mode:
        fake = public(name)(**args | {key: mode.from_tensor(x) for key, x in tensors(args).items()})
    meta = public(name)(**args | {key: x.to(META) for key, x in tensors(args).items()})
    assert [layout(x) for x in as_tuple(fake)] == [layout(x) for x in as_tuple(meta)] == want


# torch.compile and torch.export, with static and dynamic sizes


class Call(torch.nn.Module):
    """`ops.<name>` between two other operations of a graph."""

    def __init__(self, name: str, numbers: dict[str, Any]) -> None:
        super().__init__()
        self.name, self.numbers = name, numbers

    def forward(self, args: dict[str, Tensor]) -> list[Tensor]:
        args = {key: value + 0 for key, value in args.items()}
        out = public(self.name)(**args, **self.numbers)
        return [x * 2 for x in (*as_tuple(out), *(args[key] for key in OPS[self.name].mutates))]


def graph_call(name: str, device: Any = "cpu") -> tuple[Call, dict[str, Tensor]]:
    args = make_inputs(name, device)
    return Call(name, {key: value for key, value in args.items() if not isinstance(value, Tensor)}), tensors(args)


@traced
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("name", OPS)
def test_compile(name: str, dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    call, args = graph_call(name, device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert same(compiled(args), call(args))


NUMBERS = [("route", "top_k"), ("gate_route", "top_k"), ("sort_by_expert", "num_experts"), ("attention", "window")]


@traced
@pytest.mark.parametrize(("name", "argument"), NUMBERS, ids=[case[0] for case in NUMBERS])
def test_compile_with_a_dynamic_number(name: str, argument: str) -> None:
    """The compiler passes a symbol where an argument was another number before."""
    args = make_inputs(name)
    call = torch.compile(lambda number: public(name)(**args | {argument: number}), fullgraph=True, backend="aot_eager")
    for number in (4, 5, 6):
        assert same(as_tuple(call(number)), as_tuple(public(name)(**args | {argument: number})))


@traced
@pytest.mark.parametrize("name", OPS)
def test_export(name: str, device: torch.device) -> None:
    call, args = graph_call(name, device)
    program = torch.export.export(call, (args,))
    assert same(program.module()(args), call(args))
    assert f"mixtral_triton.{name}" in str(program.graph)


DYNAMIC = [  # operation, the dynamic dimension by argument, other sizes to run with
    ("rms_norm", {"x": 0}, {"T": 9}),
    ("add_rms_norm", {"x": 0, "residual": 0}, {"T": 9}),
    ("route", {"logits": 0}, {"T": 11}),
    ("expert_swiglu", {"x": 0, "ids": 0, "weights": 0}, {"T": 70}),
    ("rope", {"q": 1, "k": 1, "positions": 1}, {"T": 6}),
    ("attention", {"k": 1, "v": 1}, {"S": 20}),
]


@traced
@pytest.mark.parametrize(("name", "dynamic", "other"), DYNAMIC, ids=[case[0] for case in DYNAMIC])
def test_export_with_a_dynamic_size(name: str, dynamic: dict[str, int], other: dict[str, int]) -> None:
    call, args = graph_call(name)
    size = torch.export.Dim("size", min=2, max=100)
    shapes = {key: {dynamic[key]: size} if key in dynamic else None for key in args}
    program = torch.export.export(call, (args,), dynamic_shapes=(shapes,))
    more = tensors(OPS[name].inputs(SIZES[name] | other, OPS[name].dtypes[0], "cpu"))
    assert same(program.module()(more), call(more))


# Wrong calls: operation, argument, its value, what the message says

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
VALUES = [  # checked on the CPU only
    ("sort_by_expert", "ids", zeros(7, 2, dtype=torch.int32) + 4, "4"),
    ("expert_swiglu", "ids", zeros(5, 2, dtype=torch.int64) - 1, "-1"),
    ("rope", "positions", zeros(2, 3, dtype=torch.int64) + 9, "9"),
    ("rope", "positions", zeros(2, 3, dtype=torch.int32) - 1, "-1"),
]
TENSORS = [(name, key) for name in OPS for key in tensors(make_inputs(name, META))]


def check_rejected(name: str, args: dict[str, Any], argument: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{name.removeprefix('add_')}: .*'{argument}'.*({got})"):
        public(name)(**args)


@pytest.mark.parametrize("cached", (False, True), ids=("first call", "after a right call"))
@pytest.mark.parametrize(("name", "argument", "value", "got"), WRONG)
def test_wrong_argument_raises_value_error(
    name: str, argument: str, value: Any, got: str, cached: bool, device: torch.device
) -> None:
    args = make_inputs(name, device)
    if cached:  # a cached check must not let the next call pass
        public(name)(**args)
    args[argument] = value.to(device) if isinstance(value, Tensor) else value
    check_rejected(name, args, argument, got)


@pytest.mark.parametrize(("name", "argument", "value", "got"), VALUES)
def test_value_out_of_range_raises_value_error(name: str, argument: str, value: Tensor, got: str) -> None:
    for _ in range(2):
        public(name)(**make_inputs(name))
        check_rejected(name, make_inputs(name) | {argument: value}, argument, got)


@pytest.mark.parametrize("value", (None, [1.0], 3, "text"), ids=str)
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_argument_that_is_no_tensor_raises_value_error(
    name: str, argument: str, value: Any, device: torch.device
) -> None:
    schema = {one.name: one.type for one in getattr(torch.ops.mixtral_triton, name).default._schema.arguments}
    if value is None and (argument == "residual" or isinstance(schema[argument], torch.OptionalType)):
        pytest.skip("may be None")
    check_rejected(name, make_inputs(name, device) | {argument: value}, argument, type(value).__name__)


@pytest.mark.parametrize(("name", "argument"), [case for case in TENSORS if case[0] not in ("route", "sort_by_expert")])
def test_argument_on_another_device_raises_value_error(name: str, argument: str, device: torch.device) -> None:
    """The message names the argument on meta, or the next one, which is not where the first is."""
    args = make_inputs(name, device)
    with pytest.raises(ValueError, match=rf"(?s)^{name.removeprefix('add_')}: argument '.*meta"):
        public(name)(**args | {argument: args[argument].to(META)})


@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_backward_raises_value_error(name: str, argument: str, device: torch.device) -> None:
    """The forward of arguments with gradients equals that without; only the backward is rejected."""
    args = make_inputs(name, device)
    if not args[argument].is_floating_point():
        return
    with_gradient = copies(args) | {argument: args[argument].clone().requires_grad_()}
    if OPS[name].mutates:
        with pytest.raises(ValueError, match=f"{name}.*inference only"):
            public(name)(**with_gradient)
        return
    out = [x for x in as_tuple(public(name)(**with_gradient)) if x.is_floating_point()]
    assert same([x.detach() for x in out], run(public(name), args)[: len(out)])
    with pytest.raises(ValueError, match=f"{name}.*inference only"):
        sum(x.sum() for x in out).backward()


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.deterministic_place is not None])
def test_deterministic_is_also_an_argument_of_unchecked_calls(name: str) -> None:
    """A model calls operations unchecked; on the torch backend no reference has the argument."""
    args = make_inputs(name) | {"deterministic": True}
    got, want = (as_tuple(function(**copies(args))) for function in (getattr(ops.unchecked, name), public(name)))
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))
