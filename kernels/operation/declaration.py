"""What an operation declares about itself: one entry in the registry serves tests, compile, bench and verify."""

import inspect
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, cached_property, wraps
from typing import Any

import torch

from ..launching.arch import multiplies_fp8
from ..weights.composites import COMPOSITE_PARTS, Matrix
from ..weights.formats import matrix_bytes, multiplies_codes
from . import checks
from .checks import Argument, Binder, Within


@dataclass(frozen=True)
class Cost:
    """Compulsory work: floating-point operations, of which `fp8_flops` are products of e4m3 codes, and bytes that must
    cross device memory, or the link to host memory, at least once."""

    flops: int
    bytes: int
    host_bytes: int = 0
    fp8_flops: int = 0

    def __add__(self, other: Any) -> Any:
        return type(self)(*map(sum, zip(vars(self).values(), vars(other).values(), strict=True)))


def as_dict(case: Any) -> dict[str, Any]:
    """Return the fields of a case: its sizes, and the flags and formats that are not at their default."""
    flags = {field.name: field.default for field in fields(case) if isinstance(field.default, bool | str | None)}
    return {name: value for name, value in vars(case).items() if name not in flags or value != flags[name]}


def runs_on(case: Any, arch: str) -> bool:
    """Return whether the GPU has the products of a case: those of e4m3 codes not every one has."""
    return not any(map(multiplies_codes, vars(case).values())) or multiplies_fp8(arch)


@cache
def read_annotations(run: Callable[..., Any]) -> tuple[tuple[Argument, ...], tuple[Argument, ...]]:
    """Return the arguments and the results of an operation."""
    hints = typing.get_type_hints(run, include_extras=True)
    returned = hints["return"]
    parts = typing.get_args(returned) if typing.get_origin(returned) is tuple else (returned,)
    arguments = (Argument.parse(name, hints.get(name, Any)) for name in inspect.signature(run).parameters)
    return tuple(arguments), tuple(Argument.parse("", part) for part in parts if part is not type(None))


def by_position(run: Callable[..., Any]) -> Callable[..., Any]:
    """Return `run` with its keyword-only arguments also by position, as torch's operators and plans give them."""
    parameters = inspect.signature(run).parameters.values()
    by_name = tuple(parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY)
    count = len(parameters) - len(by_name)

    @wraps(run)
    def function(*args: Any, **kwargs: Any) -> Any:
        return run(*args[:count], **dict(zip(by_name, args[count:], strict=False)), **kwargs)

    return function if by_name else run


def compile_binder(name: str, parameters: Iterable[inspect.Parameter]) -> Callable[..., tuple[Any, ...]]:
    """Return a function of these parameters that returns its arguments in their order, defaults filled in, or raises a
    SignatureError, which names `name`. Python itself binds them: quickly, and as a compiler follows."""
    plain = inspect.Signature([parameter.replace(annotation=parameter.empty) for parameter in parameters])
    bind = eval(f"lambda {str(plain)[1:-1]}: ({', '.join(plain.parameters)},)")
    bind.__qualname__ = name

    def bind_arguments(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            return bind(*args, **kwargs)  # type: ignore[no-any-return]
        except TypeError as error:
            raise SignatureError(f"{name}: {error}") from None

    return bind_arguments


def row_letter(run: Callable[..., Any]) -> str:
    """Return the letter that counts rows, which a shape with "..." leaves out: T, where the operation names none."""
    spec = read_annotations(run)[0][0].shape_spec.split()
    return "T" if spec[0] == "..." else spec[0]


def letters_of(run: Callable[..., Any], case: Any) -> dict[str, Any]:
    return {"...": (getattr(case, row_letter(run)),), **vars(case)}


def streaming_cost(run: Callable[..., Any], flops: Callable[[Any], int]) -> Callable[[Any, torch.dtype], Cost]:
    """Return `Op.cost` for an operation that reads each required argument once and writes each result once."""

    def cost(case: Any, dtype: torch.dtype) -> Cost:
        total, letters = 0, letters_of(run, case)
        for a in (a for part in read_annotations(run) for a in part if a.tensor and not a.optional):
            *rows, columns = checks.shape_of(a.shape_spec, letters)
            weights = letters[a.name] if a.kind == Matrix else None
            stored = dtype if a.dtypes is None or dtype in a.dtypes else a.dtypes[0]
            total += matrix_bytes(weights, math.prod(rows), columns, stored.itemsize)
        return Cost(flops=flops(case), bytes=total)

    return cost


class SignatureError(ValueError, TypeError):
    """A call that does not fit the signature: Python's TypeError, and a ValueError like an operation's other errors."""


@dataclass(frozen=True)
class Op:
    """What is known of an operation. Its signature is that of `run` and stands nowhere else: the checks, torch's
    operator, the shapes of its results and the torch backend derive from the annotations there (checks.py).

    name               its name in `mixtral_triton.ops` and in `torch.ops.mixtral_triton`
    run                launches the Triton kernels, its arguments already checked, and each of them also by position
    reference          the same in plain torch; it takes the arguments it shares with `run`, by name
    case               the dataclass of what draws inputs: sizes by shape letter, and flags. `inputs` and `cost` take a
                       mapping of its fields, too
    inputs             inputs(case, dtype, device, generator) -> keyword arguments of `run`
    cost               cost(case, dtype) -> Cost
    test_shapes        cases that the interpreted tests run
    bench_shapes       cases of Mixtral's sizes, compiled offline and timed
    dtypes             dtypes of the floating-point arguments
    mutates            names of the arguments that the operation writes into
    derived_outputs    derived_outputs(args, results) -> what the last results must equal exactly, given those before
    rule               rule(name, args, sizes) raises ValueError where the arguments do not fit together
    truncate_sequence  truncate_sequence(args) cuts the padding of one sequence, so that the torch backend's bits do not
                       depend on the length of the others
    growing            growing(args) -> where tensors grow from call to call, the key of a call without their sizes,
                       the paths of the kernel arguments that have these, as "keys.stride_kb", and their values;
                       None: as any other call
    error_name         the public name, with which errors start; empty: `name`
    """

    name: str
    run: Callable[..., Any]
    reference: Callable[..., Any]
    case: type[Any]
    inputs: Callable[..., dict[str, Any]]
    cost: Callable[[Any, torch.dtype], Cost]
    test_shapes: Sequence[Any]
    bench_shapes: Sequence[Any]
    dtypes: tuple[torch.dtype, ...] = checks.FLOATS
    mutates: tuple[str, ...] = ()
    derived_outputs: Callable[[Any, Any], Any] | None = None
    rule: Callable[[str, Mapping[str, Any], Mapping[str, Any]], None] | None = None
    truncate_sequence: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    growing: Callable[[Sequence[Any]], tuple[tuple[Any, ...], Sequence[str], tuple[int, ...]] | None] | None = None
    error_name: str = ""

    def case_of(self, fields: Any) -> Any:
        """Return the case of a mapping of its fields, or a case as it is."""
        return self.case(**fields) if isinstance(fields, Mapping) else fields

    @cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.run)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(self.signature.parameters)

    @cached_property
    def deterministic_index(self) -> int | None:
        """The position of the argument `deterministic`, or None."""
        return self.names.index("deterministic") if "deterministic" in self.names else None

    @cached_property
    def arguments(self) -> tuple[Argument, ...]:
        return read_annotations(self.run)[0]

    @cached_property
    def results(self) -> tuple[Argument, ...]:
        return read_annotations(self.run)[1]

    @property
    def public_name(self) -> str:
        return self.error_name or self.name

    @cached_property
    def bind(self) -> Callable[..., tuple[Any, ...]]:
        """A function that returns the arguments of a call, all of which may be by position, in the order of `run`."""
        parameters = self.signature.parameters.values()
        return compile_binder(self.public_name, (x.replace(kind=x.POSITIONAL_OR_KEYWORD) for x in parameters))

    def bind_by_name(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return dict(zip(self.names, self.bind(*args, **kwargs), strict=True))

    def check(self, *args: Any, **kwargs: Any) -> Binder:
        """Raise ValueError on a wrong shape, dtype, device or number; return what was bound."""
        values, binder = self.bind_by_name(*args, **kwargs), Binder(self.public_name)
        binder.bind(self.arguments, values)
        if self.rule is not None:
            self.rule(binder.op, values, binder.sizes)
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

    def plain_signature(self, composite: Any = None) -> inspect.Signature:
        """Return the public signature with plain types: Tensor, int, ...

        composite  the type for a Matrix or a Cache in torch's operator, which takes all arguments by position; None:
                   the public signature
        """
        results: dict[int, Any] = {0: None, 1: torch.Tensor}
        returned = results.get(len(self.results), tuple[(torch.Tensor,) * len(self.results)])  # type: ignore[misc]
        parameters: list[inspect.Parameter] = []
        for argument, parameter in zip(self.arguments, self.signature.parameters.values(), strict=True):
            kind = argument.kind if composite is None or argument.kind not in COMPOSITE_PARTS else composite
            if composite is not None:
                parameter = parameter.replace(kind=parameter.POSITIONAL_OR_KEYWORD)
            parameters.append(parameter.replace(annotation=kind | None if argument.optional else kind))
        return inspect.Signature(parameters, return_annotation=returned)

    @cached_property
    def _reference_names(self) -> frozenset[str]:
        return frozenset(inspect.signature(self.reference).parameters)

    def call_reference(self, *args: Any, **kwargs: Any) -> Any:
        """Call the reference with those arguments of `run` that it takes."""
        values = {**dict(zip(self.names, args, strict=False)), **kwargs}
        return self.reference(**{name: value for name, value in values.items() if name in self._reference_names})
