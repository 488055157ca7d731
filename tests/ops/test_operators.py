"""Every operation as a custom operator: compiled, exported, with fake tensors; wrong calls raise ValueError."""

import re
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import Parameter

from mixtral_triton.kernels.operation import call
from mixtral_triton.kernels.registry import OPERATIONS, OPS
from mixtral_triton.kernels.weights.quantized_cache import QuantizedCache
from tests.support.calls import as_tuple, copies, inputs, tensors

META = torch.device("meta")
LETTERS = {"B": 2, "T": 3, "V": 11, "H": 8, "I": 12, "N": 5, "E": 6, "K": 2, "Hq": 4, "Hkv": 2, "D": 8, "P": 9}
LETTERS |= {"C": 5, "S": 7, "past": 4, "window": 5}
SIZES = {
    name: {letter: LETTERS.get(letter, size) for letter, size in vars(op.test_shapes[0]).items()}
    for name, op in OPS.items()
}
SIZES["rope_append_attention"] = SIZES["rope_append_attention"] | {"T": 1}
SIZES["attention"] = SIZES["attention"] | {"ragged": True}
pytestmark = pytest.mark.usefixtures("unguarded")  # other tests run the same kernels under guard


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
def test_registered(name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operator, and calls with positional and with keyword arguments, give the same results. It counts writes
    itself: torch before 2.13 fails where a cache has no scales."""
    monkeypatch.setattr(torch._library.utils, "fill_defaults", None, raising=False)  # which torch had not before
    args, operator = make_inputs(name, device), getattr(torch.ops.mixtral_triton, name).default
    changed = {a.name for a in operator._schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert changed == {f"{cache}{part}" for cache in OPS[name].mutates for part in ("", "_scales")}
    assert same(run(operator, args), run(OPERATIONS[name], args))
    written = copies(args)
    versions = {key: x._version for key, x in written.items() if isinstance(x, Tensor)}
    operator(**written)
    assert {key for key in versions if written[key]._version > versions[key]} == set(OPS[name].mutates)
    parameters = signature(OPERATIONS[name]).parameters
    args = {key: parameter.default for key, parameter in parameters.items()} | args
    by_name = [key for key, parameter in parameters.items() if parameter.kind is parameter.KEYWORD_ONLY]

    def by_position(**args: Any) -> Any:
        positional = (args[key] for key in args if key not in by_name)
        return OPERATIONS[name](*positional, **{key: args[key] for key in by_name})

    assert same(run(by_position, args), run(OPERATIONS[name], args))


@pytest.mark.parametrize("name", OPS)
def test_no_tokens(name: str, device: torch.device) -> None:
    letter = "T" if "T" in SIZES[name] and name != "rope_append_attention" else OPS[name].row_letter
    sizes = dict(SIZES[name]) | {letter: 0}
    args, empty = make_inputs(name, device, sizes), OPS[name].empty(**make_inputs(name, META, sizes))
    got = as_tuple(OPERATIONS[name](**args))
    assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in as_tuple(empty)]
    assert not any(x.count_nonzero() for x in got)  # of sort_by_expert too, whose offsets are not empty


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.mixtral_triton, name).default, (), make_inputs(name))


def transposed(value: Any) -> Any:
    strided = isinstance(value, Tensor) and value.dim() > 1
    return value.transpose(0, -1).contiguous().transpose(0, -1) if strided else value


def layout(x: Tensor) -> Any:
    return x.shape, x.dtype, [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


UNMASKED = ("attention", {"B": 2, "T": 3, "S": 7, "Hq": 4, "Hkv": 2, "D": 8, "window": 0, "causal": False})


@pytest.mark.parametrize("change", (lambda x: x, transposed), ids=("dense", "transposed"))
@pytest.mark.parametrize(("name", "sizes"), [*SIZES.items(), UNMASKED])
def test_fake_results_have_the_layout_of_real_ones(name: str, sizes: Any, change: Any, device: torch.device) -> None:
    """Compiled code relies on the strides too, for example in a later `.view`."""
    args = make_inputs(name, device, sizes)
    args = {key: value if key.endswith("cache") else change(value) for key, value in args.items()}
    want = [layout(x) for x in as_tuple(OPERATIONS[name](**args))]
    with FakeTensorMode() as mode:
        fake = OPERATIONS[name](**args | {key: mode.from_tensor(x) for key, x in tensors(args).items()})
    meta = OPERATIONS[name](**args | {key: x.to(META) for key, x in tensors(args).items()})
    assert [layout(x) for x in as_tuple(fake)] == [layout(x) for x in as_tuple(meta)] == want


QUANTIZED = {"expert_swiglu": {"H": 128, "E": 4, "K": 2, "gate_up": "int4:32", "down": "int8"}}
QUANTIZED["linear"], QUANTIZED["experts_add_rms_norm"] = {"H": 128, "weight": "int4:64"}, QUANTIZED["expert_swiglu"]
GRAPHS = [
    *SIZES.items(),
    *((name, SIZES[name] | more) for name, more in QUANTIZED.items()),
    *((name, SIZES[name] | {"cache": "int8"}) for name in ("append", "cached_attention", "rope_append_attention")),
]


class Call(torch.nn.Module):
    """`ops.<name>` between two other operations of a graph, its caches of 8 bits made within the graph."""

    def __init__(self, name: str, numbers: dict[str, Any]) -> None:
        super().__init__()
        weights = {key: x for key, x in numbers.items() if isinstance(x, torch.nn.Module)}
        self.name, self.numbers, self.weights = name, numbers, torch.nn.ModuleDict(weights)

    def forward(self, args: dict[str, list[Tensor]]) -> list[Tensor]:
        copied = {key: [x + 0 for x in parts] for key, parts in args.items()}
        made = {key: QuantizedCache(*parts) if len(parts) > 1 else parts[0] for key, parts in copied.items()}
        out = OPERATIONS[self.name](**self.numbers | dict(self.weights.items()) | made)
        return [x * 2 for x in (*as_tuple(out), *(x for key in OPS[self.name].mutates for x in copied[key]))]


def graph_call(name: str, sizes: Any, device: Any) -> tuple[Call, dict[str, list[Tensor]]]:
    args = make_inputs(name, device, sizes)
    parts = {key: list(getattr(x, "tensors", [x])) for key, x in tensors(args).items()}
    return Call(name, {key: value for key, value in args.items() if key not in parts}), parts


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize(("name", "sizes"), GRAPHS, ids=str)
def test_compile(name: str, sizes: Any, dynamic: bool, device: torch.device) -> None:
    torch._dynamo.reset()
    call, args = graph_call(name, sizes, device)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    assert same(compiled(args), call(args))


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "sizes"), GRAPHS, ids=str)
def test_export(name: str, sizes: Any, device: torch.device) -> None:
    call, args = graph_call(name, sizes, device)
    program = torch.export.export(call, (args,))
    assert same(program.module()(args), call(args))
    assert f"mixtral_triton.{name}" in str(program.graph)


ones, zeros = torch.ones, torch.zeros
NAN, INF = float("nan"), float("inf")
I32, I64 = torch.int32, torch.int64
WRONG: dict[tuple[str, str], list[Any]] = {
    ("rms_norm", "x"): [zeros(3, 8, dtype=I64)],
    ("rms_norm", "weight"): [ones(7), ones(1, 8)],
    ("rms_norm", "eps"): [-1.0, NAN, "small", 2**70],
    ("add_rms_norm", "residual"): [zeros(1, 8)],
    ("route", "logits"): [zeros(6), zeros(3, 0)],
    ("route", "top_k"): [-1, 0, 7, 2.0, True],
    ("sort_by_expert", "ids"): [zeros(7, dtype=I32)],
    ("sort_by_expert", "num_experts"): [0],
    ("expert_swiglu", "gate_up_proj"): [zeros(6, 12, 8)],
    ("expert_swiglu", "down_proj"): [zeros(6, 8, 0), zeros(6, 8, 7), zeros(5, 8, 16)],
    ("expert_swiglu", "ids"): [zeros(4, 2, dtype=I32)],
    ("expert_swiglu", "weights"): [ones(3, 3)],
    ("rope", "k"): [zeros(2, 4, 2, 8)],
    ("rope", "cos"): [ones(9, 8)],
    ("rope", "sin"): [ones(8, 4)],
    ("attention", "k"): [zeros(2, 7, 2, 9)],
    ("attention", "v"): [zeros(2, 8, 2, 8)],
    ("attention", "window"): [-2, 4.0],
    ("attention", "scale"): [0.0, INF],
    ("attention", "causal"): ["no"],
    ("attention", "lengths"): [zeros(3, dtype=I32), ones(2, dtype=torch.int16)],
}
VALUES = {  # checked on the CPU only
    ("sort_by_expert", "ids"): [zeros(3, 2, dtype=I32) + 6],
    ("expert_swiglu", "ids"): [zeros(3, 2, dtype=I64) - 1],
    ("rope", "positions"): [zeros(2, 3, dtype=I64) + 9, zeros(2, 3, dtype=I32) - 1],
    ("embed_rms_norm", "new"): [zeros(2, dtype=I32) + 4],
    ("embed_rms_norm", "past"): [zeros(2, dtype=I64) + 100],
}
TENSORS = [(name, key) for name in OPS for key in tensors(make_inputs(name, META))]


def check_rejected(name: str, args: dict[str, Any], argument: str, got: str) -> None:
    with pytest.raises(ValueError, match=rf"(?s)^{name}: .*'{argument}'.*({got})"):
        OPERATIONS[name](**args)


@pytest.mark.parametrize("cached", (False, True), ids=("first call", "after a right call"))
@pytest.mark.parametrize("place", WRONG)
def test_wrong_argument_raises_value_error(place: tuple[str, str], cached: bool, device: torch.device) -> None:
    name, argument = place
    for value in WRONG[place]:
        args, got = make_inputs(name, device), f"{value}|{type(value).__name__}"
        if cached:  # a cached check must not let the next call pass
            OPERATIONS[name](**args)
        if isinstance(value, Tensor):
            value, got = value.to(device), re.escape(f"{list(value.shape)}") + f"|{str(value.dtype)[6:]}"
        check_rejected(name, args | {argument: value}, argument, got)


class Subclass(Tensor):
    pass


def test_operations_of_equal_arguments_share_no_check() -> None:
    """The bounds of a cached check are those of the operation."""
    ids = torch.tensor([4])
    for high in (5, 3):
        bounds = {"bounds": lambda args, high=high: [("ids", 0, high)], "bind_by_name": lambda ids: {"ids": ids}}
        op = SimpleNamespace(run=lambda: None, names=("ids",), name="toy", **bounds)
        with nullcontext() if high == 5 else pytest.raises(ValueError, match="toy: argument 'ids'"):
            call.check(op, (ids,))  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", (Tensor.clone, partial(Parameter, requires_grad=False), Subclass), ids=str)
@pytest.mark.parametrize("place", VALUES)
def test_value_out_of_range_raises_value_error(place: tuple[str, str], kind: Any) -> None:
    name, argument = place
    for value in VALUES[place] * 2:
        OPERATIONS[name](**make_inputs(name))
        check_rejected(name, make_inputs(name) | {argument: kind(value)}, argument, str(int(value.flatten()[0])))


UNSUITABLE: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: None, "None"),
    (lambda x: [1.0], "list"),
    (lambda x: 3, "int"),
    (lambda x: "text", "str"),
    (lambda x: x.new_zeros(()), r"\[\]"),
    (Tensor.double, "float64"),
    (Tensor.bfloat16, "bfloat16"),
    (Tensor.to_sparse, "sparse_coo"),
    (lambda x: x.to(META), "meta"),  # the message names the argument on meta, or the next one
]


@pytest.mark.parametrize(("change", "got"), UNSUITABLE, ids=[got for _, got in UNSUITABLE])
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_unsuitable_tensor_raises_value_error(name: str, argument: str, change: Any, got: str, device: Any) -> None:
    args = make_inputs(name, device)
    schema = {one.name: one.type for one in getattr(torch.ops.mixtral_triton, name).default._schema.arguments}
    optional = isinstance(schema[argument], torch.OptionalType)
    first = next(key for key, x in tensors(args).items() if x.is_floating_point() or name == "sort_by_expert")
    if (got == "None" and optional) or (got == "bfloat16" and argument == first):
        pytest.skip("may be None, or of another dtype")
    if got == "meta" and name in ("route", "sort_by_expert"):
        pytest.skip("has one tensor")
    named = r"\w+" if got == "meta" else argument
    check_rejected(name, args | {argument: change(args[argument])}, named, got)


@pytest.mark.compiled
@pytest.mark.parametrize(("name", "argument"), TENSORS)
def test_backward_raises_value_error(name: str, argument: str, device: torch.device) -> None:
    """The forward of arguments with gradients equals that without; only the backward is rejected."""
    args = make_inputs(name, device)
    if not args[argument].is_floating_point():
        return
    with_gradient = copies(args) | {argument: args[argument].clone().requires_grad_()}
    if OPS[name].mutates:
        with pytest.raises(ValueError, match=f"{name}.*inference only"):
            OPERATIONS[name](**with_gradient)
        return
    out = [x for x in as_tuple(OPERATIONS[name](**with_gradient)) if x.is_floating_point()]
    assert same([x.detach() for x in out], run(OPERATIONS[name], args)[: len(out)])
    if (name, argument) in (("expert_swiglu", "x"), ("expert_swiglu", "weights")):
        grads = OPERATIONS["expert_swiglu_backward"](torch.ones_like(out[0]), **args)
        out[0].sum().backward()
        return torch.testing.assert_close(with_gradient[argument].grad, grads[argument == "weights"])
    with pytest.raises(ValueError, match=f"{name}.*(inference only|experts that require gradients)"):
        sum(x.sum() for x in out).backward()
