"""What an operation declares about itself: one entry in the registry serves tests, compile, bench and verify."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Generic, ParamSpec, TypeVar

import torch

from . import checks, signature
from .checks import Argument, Binder, Range, Within

P = ParamSpec("P")
R = TypeVar("R")
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Switches:
    """What changes a call and is no size.

    deterministic  a row's bits do not depend on the batch
    norm           experts: their combine is the residual add and the next norm, too
    by_pointers    a weight that TMA does not take
    weight, gate_up, down    the name of a quantized weight, its format and group ("int4:128"); None: dense
    causal, ragged attention: no key after the query; sequences begin and end at places of their own
    fresh          cached_attention: the chunk's own keys come beside the cache
    sms            multiprocessors of the current GPU; 0: of the largest of its kind
    """

    deterministic: bool = False
    norm: bool = False
    by_pointers: bool = False
    weight: str | None = None
    gate_up: str | None = None
    down: str | None = None
    causal: bool = True
    ragged: bool = False
    fresh: bool = True
    sms: int = 0


_SWITCHES = {one.name: one.default for one in fields(Switches)}


class Shape(dict[str, int]):
    """Sizes by their letter, and switches: `Shape(T=1, H=64, deterministic=True)`; `shape | {"T": 2}` keeps both."""

    def __init__(self, sizes: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        told = {**(sizes.as_dict() if isinstance(sizes, Shape) else sizes or {}), **more}
        super().__init__({name: size for name, size in told.items() if name not in _SWITCHES})
        self.switches = Switches(**{name: _as(_SWITCHES[name], told[name]) for name in _SWITCHES if name in told})

    def __or__(self, more: Mapping[str, Any]) -> Shape:  # type: ignore[override]
        return Shape(self.as_dict(), **(more.as_dict() if isinstance(more, Shape) else more))

    def __ror__(self, less: Mapping[str, Any]) -> Shape:  # type: ignore[override]
        return Shape(less) | self

    def as_dict(self) -> dict[str, Any]:
        """Sizes, and the switches that are not as usual: `Shape(shape.as_dict())` is the same."""
        told = {name: getattr(self.switches, name) for name in _SWITCHES}
        told = {name: value for name, value in told.items() if value != _SWITCHES[name]}
        return {**self, **{name: int(value) if isinstance(value, bool) else value for name, value in told.items()}}


def _as(usual: Any, value: Any) -> Any:
    """A switch as its kind: 1, written down by somebody, is True."""
    return bool(value) if isinstance(usual, bool) else value


def switches(sizes: Sizes) -> Switches:
    """Those of `sizes`; of a plain dictionary, which has none, the usual ones."""
    return sizes.switches if isinstance(sizes, Shape) else Switches()


@dataclass(frozen=True)
class Cost:
    """Compulsory work: floating-point operations, and bytes that must cross device memory at least once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched: its tile constants, warps a program and software pipeline stages."""

    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """One device kernel as `record_launches` saw it.

    `grid`, `num_warps` and `num_stages` are None for torch's own kernels. `fn` and `args`, the jitted function and its
    run-time arguments by name, are what the offline compiler needs to build the same kernel without a GPU.
    `dependent`: it begins before the launch in front of it has ended, see pdl.py.
    """

    kernel: str
    grid: tuple[int, ...] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    fn: Any = field(default=None, repr=False, compare=False)
    args: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)
    dependent: bool = False


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """A fused operation. Its signature stands in `run` and nowhere else: the check, the operator that torch's compiler
    sees, the shapes of its results and the plain way derive from the annotations there (see checks.py).

    run          the Triton way, its arguments already checked; its name is the operation's
    reference    the same in plain torch; it takes the arguments that it has in common with `run`, by name
    inputs       inputs(sizes, dtype, device, generator) -> keyword arguments of `run`
    configs      configs(sizes, dtype, arch) -> LaunchConfig by kernel name; pure functions of the sizes
    cost         cost(sizes, dtype) -> Cost
    test_shapes  sizes that the interpreted tests run; bench_shapes: Mixtral 8x7B, compiled offline and timed
    mutates      arguments that the operation writes into
    public       the name that people call it by, and that its errors give, where that is another
    rule         rule(name, arguments by name, sizes) raises where the arguments do not go together
    ranges       ranges(arguments by name) -> more values that have to lie in a range, none of them an argument
    follows      follows(arguments, results) -> what the last results have to be exactly, given those before them
    trim         trim(arguments by name of one sequence): without what other sequences made it longer by
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
    public: str = ""
    rule: Callable[[str, Mapping[str, Any], Mapping[str, Any]], None] | None = None
    ranges: Callable[[Mapping[str, Any]], Iterable[Range]] | None = None
    derived_outputs: Callable[[Any, Any], Any] | None = None
    truncate_sequence: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @property
    def name(self) -> str:
        """In `mixtral_triton.ops` and in `torch.ops.mixtral_triton`."""
        return self.run.__name__  # type: ignore[attr-defined]

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.run)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)

    @cached_property
    def deterministic(self) -> int | None:
        """The place of the argument of this name; None: there is none."""
        return self.names.index("deterministic") if "deterministic" in self.names else None

    @cached_property
    def _hints(self) -> dict[str, Any]:
        return typing.get_type_hints(self.run, include_extras=True)

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return tuple(signature.argument(name, self._hints.get(name, Any)) for name in self.names)

    @cached_property
    def results(self) -> tuple[Argument, ...]:
        returned = self._hints["return"]
        parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
        return tuple(signature.argument("", part) for part in parts if part is not type(None))

    def by_place(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """The arguments of a call in the order of `run`, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.args

    def by_name(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(zip(self.names, self.by_place(*args, **kwargs), strict=True))

    def check(self, *args: Any, **kwargs: Any) -> Binder:
        """ValueError on a wrong shape, dtype, device or number -> what was bound."""
        values, binder = self.by_name(*args, **kwargs), Binder(self.public or self.name)
        binder.bind(self.arguments, values)
        if self.rule is not None:
            self.rule(binder.op, values, binder.sizes)
        return binder

    def bounds(self, given: Mapping[str, Any]) -> Iterator[tuple[str, int, int]]:
        """`check`, then the names of the integer tensors that are given, and between what their elements have to be."""
        sizes = {**given, **self.check(**given).sizes}
        for argument in self.arguments:
            if argument.tensor and isinstance(argument.rule, Within) and given[argument.name] is not None:
                yield argument.name, argument.rule.low, checks.evaluate(argument.rule.high, sizes)

    def empty(self, *args: Any, **kwargs: Any) -> Any:
        """Unset results of the right shapes and dtypes: what the operation is to a compiler."""
        binder = self.check(*args, **kwargs)
        made = tuple(
            torch.empty(
                checks.shape_of(result.letters, binder.sizes),
                dtype=binder.dtype if result.dtypes is None else result.dtypes[0],
                device=binder.device,
            )
            for result in self.results
        )
        return made if len(made) > 1 else made[0] if made else None

    @cached_property
    def _plain_names(self) -> tuple[str, ...]:
        taken = inspect.signature(self.reference).parameters
        return tuple(name for name in self.names if name in taken)

    def common(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Of arguments by name, those that the reference takes."""
        return {name: given[name] for name in self._plain_names if name in given}

    @cached_property
    def _plain_places(self) -> int:
        """How many of the first arguments of `run` are all that the reference takes, by place; 0: it takes others."""
        taken = inspect.signature(self.reference).parameters.values()
        same = tuple(one.name for one in taken) == self.names[: len(taken)]
        return len(taken) if same and all(one.kind is one.POSITIONAL_OR_KEYWORD for one in taken) else 0

    def plain(self, *args: Any, **kwargs: Any) -> Any:
        """The reference, called as `run` is."""
        if not kwargs and self._plain_places:
            return self.reference(*args[: self._plain_places])
        return self.reference(**self.common({**dict(zip(self.names, args, strict=False)), **kwargs}))


def sample(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal values for `Op.inputs`, the same on every device; on the meta device a shape only."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its last dimension is contiguous, which kernels rely on; else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The least power of two that is at least n, clamped to low..high (powers of two themselves)."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))
