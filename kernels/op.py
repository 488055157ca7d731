"""What an operation declares about itself: one entry in the registry serves tests, compile, bench and verify."""

from __future__ import annotations

import inspect
import math
import re
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import product
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from . import checks
from .checks import Argument, Binder, Constraints, Within
from .quantized import sample_quantized, weight_bytes

P = ParamSpec("P")
R = TypeVar("R")
Q = ParamSpec("Q")
S = TypeVar("S")
Sizes = Mapping[str, Any]


# What selects kernels and configurations besides sizes, dtype and architecture, with its default.
SWITCHES = {
    "deterministic": False,  # a row's bits do not depend on the batch
    "norm": False,  # experts: the combine also adds the residual and applies the next norm
    "by_pointers": False,  # a weight's layout does not suit TMA
    **{"weight": None, "gate_up": None, "down": None},  # format and group of a quantized weight ("int4:128")
    **{"causal": True, "ragged": False},  # attention: causal mask; sequences start and end at positions of their own
    "fresh": True,  # cached_attention: the chunk's own keys are arguments beside the cache
    "sms": 0,  # multiprocessors of the GPU; 0: of the architecture's largest
}
# Sizes in docstrings: their names, and their values in the examples.
SIZE_NAMES = {"B": "sequences", "T": "tokens", "S": "keys", "H": "hidden size", "I": "intermediate size"}
SIZE_NAMES |= {"E": "experts", "K": "experts a token", "Hq": "query heads", "Hkv": "key/value heads", "D": "head size"}
SIZE_NAMES |= {"V": "vocabulary", "C": "slots of a cache", "P": "positions of the tables", "N": "rows of the weight"}
EXAMPLE: dict[str, Any] = {"B": 1, "T": 1, "S": 8, "H": 64, "I": 32, "E": 8, "K": 2, "Hq": 4, "Hkv": 2, "D": 32}
EXAMPLE |= {"C": 16, "P": 64, "N": 48, "V": 100, "...": (2,)}


class Shape(dict[str, Any]):
    """Sizes by shape letter, and the switches that differ from their defaults: `Shape(T=1, H=64, deterministic=True)`.

    `shape | {"T": 2}` is a Shape, too.
    """

    def __init__(self, sizes: Any = (), /, **more: Any) -> None:
        values = dict(sizes, **more)
        super().__init__({name: x for name, x in values.items() if name not in SWITCHES or x != SWITCHES[name]})

    def __or__(self, more: Mapping[str, Any]) -> Shape:  # type: ignore[override]
        return Shape(self, **more)

    def __ror__(self, less: Mapping[str, Any]) -> Shape:  # type: ignore[override]
        return Shape(less, **self)

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes, and switches as numbers or text: what a command line would say."""
        return {name: int(value) if isinstance(value, bool) else value for name, value in self.items()}


def switch(sizes: Sizes, name: str) -> Any:
    """Return a switch of `sizes`, or its default."""
    return sizes.get(name, SWITCHES[name])


@dataclass(frozen=True)
class Cost:
    """Compulsory work: floating-point operations, and bytes that must cross device memory, or the link to host memory,
    at least once."""

    flops: int
    bytes: int
    host_bytes: int = 0


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched: tile constants, warps per program and software pipeline stages."""

    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """One device kernel as `record_launches` saw it.

    `grid`, `num_warps` and `num_stages` are None for torch's own kernels. `fn` and `args`, the JIT function and its
    run-time arguments by name, are what the offline compiler needs to build the same kernel without a GPU.
    `dependent`: a programmatic dependent launch, see pdl.py.
    """

    kernel: str
    grid: tuple[int, ...] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    fn: Any = field(default=None, repr=False, compare=False)
    args: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    dependent: bool = False


@cache
def read_annotations(run: Callable[..., Any]) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """Return the arguments and the results of an operation."""
    hints = typing.get_type_hints(run, include_extras=True)
    returned = hints["return"]
    parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    arguments = (Argument.parse(name, hints.get(name, Any)) for name in inspect.signature(run).parameters)
    return tuple(arguments), tuple(Argument.parse("", part) for part in parts if part is not type(None))


class SignatureError(ValueError, TypeError):
    """A call that does not fit the signature: Python's TypeError, and a ValueError like an operation's other errors."""


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """A fused operation. Its signature is that of `run` and stands nowhere else: the checks, torch's operator, the
    shapes of its results and the torch backend derive from the annotations there (checks.py).

    run              launches the Triton kernels, its arguments already checked; its name is the operation's
    reference        the same in plain torch; it takes the arguments it shares with `run`, by name
    inputs           inputs(sizes, dtype, device, generator) -> keyword arguments of `run`
    configs          configs(sizes, dtype, arch) -> LaunchConfig by kernel name, a pure function
    cost             cost(sizes, dtype) -> Cost
    test_shapes      sizes that the interpreted tests run
    bench_shapes     Mixtral's sizes, compiled offline and timed
    dtypes           dtypes of the floating-point arguments
    mutates          names of the arguments that the operation writes into
    derived_outputs  derived_outputs(args, results) -> what the last results must equal exactly, given those before them
    """

    run: Callable[P, R]
    reference: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    configs: Callable[[Sizes, torch.dtype, str], dict[str, LaunchConfig]]
    cost: Callable[[Sizes, torch.dtype], Cost]
    test_shapes: tuple[Sizes, ...]
    bench_shapes: tuple[Sizes, ...]
    dtypes: tuple[torch.dtype, ...] = checks.FLOATS
    mutates: tuple[str, ...] = ()
    derived_outputs: Callable[[Any, Any], Any] | None = None

    @property
    def name(self) -> str:
        """Its name in `mixtral_triton.ops` and in `torch.ops.mixtral_triton`."""
        return self.run.__name__  # type: ignore[attr-defined]

    def variant(self, run: Callable[Q, S], **changes: Any) -> Op[Q, S]:
        """Return the entry of another function, with the other fields of this one except for `changes`."""
        return replace(self, run=run, **changes)  # type: ignore[arg-type,return-value]

    @cached_property
    def constraints(self) -> Constraints:
        return getattr(self.run, "constraints", Constraints())

    @cached_property
    def error_name(self) -> str:
        """The public name, with which errors start: `ops.rms_norm` also calls add_rms_norm."""
        return self.name.removeprefix("add_")

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.run)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)

    @cached_property
    def deterministic_place(self) -> int | None:
        """The place of the argument `deterministic`, or None."""
        return self.names.index("deterministic") if "deterministic" in self.names else None

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return read_annotations(self.run)[0]

    @cached_property
    def results(self) -> tuple[Argument, ...]:
        return read_annotations(self.run)[1]

    def bind(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Return the arguments of a call in the order of `run`, defaults filled in."""
        try:
            bound = self.signature.bind(*args, **kwargs)
        except TypeError as error:
            raise SignatureError(f"{self.error_name}: {error}") from None
        bound.apply_defaults()
        return bound.args

    def bind_by_name(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(zip(self.names, self.bind(*args, **kwargs), strict=True))

    def check(self, *args: Any, **kwargs: Any) -> Binder:
        """Raise ValueError on a wrong shape, dtype, device or number; return what was bound."""
        values, binder = self.bind_by_name(*args, **kwargs), Binder(self.error_name)
        binder.bind(self.arguments, values)
        if self.constraints.rule is not None:
            self.constraints.rule(binder.op, values, binder.sizes)
        return binder

    def bounds(self, args: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """`check`, then yield each bounded integer tensor's name with the least and greatest value it may hold."""
        sizes = {**args, **self.check(**args).sizes}
        for argument in self.arguments:
            if argument.tensor and isinstance(argument.rule, Within) and args[argument.name] is not None:
                yield argument.name, argument.rule.low, checks.evaluate(argument.rule.high, sizes)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        """Return unset results of the right shapes and dtypes: the fake kernel."""
        binder = self.check(*args, **kwargs)
        results = tuple(
            torch.empty(
                checks.shape_of(result.shape_spec, binder.sizes),
                dtype=binder.dtype if result.dtypes is None else result.dtypes[0],
                device=binder.device,
            )
            for result in self.results
        )
        return results if len(results) > 1 else results[0] if results else None

    def plain_signature(self, matrix: Any = checks.Matrix) -> inspect.Signature:
        """The signature without what only checks read: Tensor, int, ..., and `matrix` for a Matrix."""
        parameters = []
        for argument, parameter in zip(self.arguments, self.signature.parameters.values(), strict=True):
            kind = matrix if argument.kind == checks.Matrix else argument.kind
            parameters.append(parameter.replace(annotation=kind | None if argument.optional else kind))
        return inspect.Signature(parameters)

    def help(self) -> str:
        """Return a docstring that stands by itself: what is computed, arguments, results, errors and an example."""
        what, reference = (
            re.sub(r"\s\(`reference\.\w+`\)", "", inspect.getdoc(function) or "")
            for function in (self.run, self.reference)
        )
        sizes = set(re.findall(r"\w+", " ".join(each.shape_spec for each in (*self.arguments, *self.results))))
        parameters = self.signature.parameters.values()
        required = [a for a, p in zip(self.arguments, parameters, strict=True) if p.default is p.empty]
        values = {a.name: f"torch.{a.example(EXAMPLE)}" for a in required if a.tensor}
        numbers = [a.name if a.tensor else a.example(EXAMPLE) for a in required]
        return "\n".join(
            (
                *(what, "", reference, "", "Arguments:"),
                *(f"    {argument.name}: {argument.describe()}" for argument in self.arguments),
                f"Returns: {', '.join(result.describe() for result in self.results) or 'nothing'}",
                f"Sizes: {', '.join(f'{size} {SIZE_NAMES[size]}' for size in SIZE_NAMES if size in sizes)}",
                "Tensors of float32, bfloat16 or float16 share one of these.",
                "Raises ValueError that names the argument for a wrong shape, dtype, device or number, on a CPU also",
                "for a value out of its range; for gradients, vmap, jvp and grad; and for a call of another signature.",
                "Example:",
                f"    >>> {', '.join(values)} = {', '.join(values.values())}",
                f"    >>> ops.{self.name}({', '.join(numbers)})",
            )
        )

    @cached_property
    def _reference_names(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.reference).parameters)

    def reference_args(self, args: Mapping[str, Any]) -> dict[str, Any]:
        """Select the arguments that the reference takes."""
        return {name: value for name, value in args.items() if name in self._reference_names}

    def call_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Call the reference with the arguments of `run`."""
        return self.reference(**self.reference_args({**dict(zip(self.names, args, strict=False)), **kwargs}))


def shapes(names: str, table: str, **switches: Any) -> tuple[Shape, ...]:
    """Return a Shape for each row of a table: `shapes("T H", "1 128, 17 80", deterministic=True)`."""
    rows = [map(int, row.split()) for row in table.split(",")]
    return tuple(Shape(dict(zip(names.split(), row, strict=True)), **switches) for row in rows)


def shape_grid(**values: Any) -> tuple[Shape, ...]:
    """Return a Shape for each combination of values, tuples or single ones: `shape_grid(T=(1, 64), H=4096)`."""
    options = [value if isinstance(value, tuple) else (value,) for value in values.values()]
    return tuple(Shape(zip(values, row, strict=True)) for row in product(*options))


def sampler(dtype: torch.dtype, device: Any, generator: torch.Generator | None) -> Callable[..., torch.Tensor]:
    """Return draw(*shape, scale=1.0): normal values for `Op.inputs`, the same on every device; unset on meta."""

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        if torch.device(device).type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)

    return draw


def streaming_cost(run: Callable[..., Any], flops: Callable[[Sizes], int]) -> Callable[[Sizes, torch.dtype], Cost]:
    """Return `Op.cost` for an operation that reads each required argument once and writes each result once."""

    def tensor_bytes(argument: Argument, sizes: Sizes, dtype: torch.dtype) -> int:
        *rows, columns = checks.shape_of(argument.shape_spec, {"...": (sizes["T"],), **sizes})
        weights = switch(sizes, argument.name) if argument.kind == checks.Matrix else None
        stored = dtype if argument.dtypes is None or dtype in argument.dtypes else argument.dtypes[0]
        return weight_bytes(weights, math.prod(rows), columns, stored.itemsize)

    def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
        tensors = [a for part in read_annotations(run) for a in part if a.tensor and not a.optional]
        return Cost(flops=flops(sizes), bytes=sum(tensor_bytes(a, sizes, dtype) for a in tensors))

    return cost


def random_inputs(run: Callable[..., Any], special: Callable[..., dict[str, Any]] | None = None) -> Any:
    """Return `Op.inputs` for `run`: the arguments that `special` returns, and random ones by their annotations.

    Tensors have normal values, divided by the root of the columns where no dimension counts sequences or tokens. A
    Matrix is quantized where a switch says so. Numbers are sizes, switches, or 1e-5.
    """

    def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
        def value(argument: Argument) -> Any:
            if argument.kind is bool:
                return bool(sizes[argument.name])
            if not argument.tensor:
                return sizes.get(argument.shape_spec or argument.name, 1e-5)
            shape = checks.shape_of(argument.shape_spec, {"...": (sizes.get("T"),), **sizes})
            if argument.kind == checks.Matrix and (format := switch(sizes, argument.name.removesuffix("_proj"))):
                return sample_quantized(format, *shape, device=device, generator=generator)
            is_weight = len(shape) > 1 and argument.shape_spec.split()[0] not in ("B", "T", "...")
            return sampler(dtype, device, generator)(*shape, scale=shape[-1] ** -0.5 if is_weight else 1.0)

        args = {} if special is None else special(sizes, dtype, device, generator)
        names = {*args, *sizes}
        required = (a for a in read_annotations(run)[0] if a.name in names or not (a.optional or a.kind is bool))
        return {a.name: args[a.name] if a.name in args else value(a) for a in required}

    return inputs


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` with a contiguous last dimension, which kernels rely on: itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """Return the least power of two that is at least n, clamped to low..high (powers of two themselves)."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))
