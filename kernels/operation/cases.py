"""Cases, random arguments and costs of an operation: what tests, compile, bench and `verify` draw of it.

A call does not import this file; an operation's own file does, to declare them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ParamSpec, TypeVar

import torch

from ..launching.arch import multiplies_fp8
from ..weights.composite_args import Cache, Matrix, quantize_cache
from ..weights.formats import matrix_bytes, multiplies_codes, parse_name
from ..weights.quantized import QuantizedWeight, QuantSpec
from .call import Operation
from .checks import FLOATS, Argument, shape_of
from .declaration import Op, by_position

P = ParamSpec("P")
R = TypeVar("R")
Case = TypeVar("Case")


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


@dataclass(frozen=True, kw_only=True)
class OpWithCases(Op):
    """An operation as the registry lists it: what a call needs, and what is drawn of it.

    case             the dataclass of what draws inputs: sizes by shape letter, and flags
    test_shapes      cases that the interpreted tests run
    bench_shapes     cases of Mixtral's sizes, compiled offline and timed
    dtypes           dtypes of the floating-point arguments
    derived_outputs  derived_outputs(args, results) -> what the last results must equal exactly, given those before
    draw             draw(case, dtype, device, generator) -> arguments that `inputs` cannot draw from the annotations:
                     indices, lengths, tables
    count            count(case, dtype) -> Cost; None: `flops`, and each required argument read once and each result
                     written once
    """

    case: type[Any]
    test_shapes: Sequence[Any]
    bench_shapes: Sequence[Any]
    dtypes: tuple[torch.dtype, ...] = FLOATS
    derived_outputs: Callable[[Any, Any], Any] | None = None
    draw: Callable[..., dict[str, Any]] | None = None
    count: Callable[..., Cost] | None = None
    flops: Callable[..., int] = lambda case: 0

    def case_of(self, fields: Any) -> Any:
        """Return the case of a mapping of its fields, or a case as it is."""
        return self.case(**fields) if isinstance(fields, Mapping) else fields

    @property
    def row_letter(self) -> str:
        """The letter that counts rows, which a shape with "..." leaves out: T, where the operation names none."""
        first = self.arguments[0].shape_spec.split()[0]
        return "T" if first == "..." else first

    def _letters(self, case: Any) -> dict[str, Any]:
        return {"...": (getattr(case, self.row_letter),), **vars(case)}

    def cost(self, sizes: Any, dtype: torch.dtype) -> Cost:
        """Return the compulsory work of a case, or of a mapping of its fields."""
        case = self.case_of(sizes)
        if self.count is not None:
            return self.count(case, dtype)
        total, letters = 0, self._letters(case)
        for a in (a for part in (self.arguments, self.results) for a in part if a.tensor and not a.optional):
            *rows, columns = shape_of(a.shape_spec, letters)
            weights = letters[a.name] if a.kind == Matrix else None
            stored = dtype if a.dtypes is None or dtype in a.dtypes else a.dtypes[0]
            total += matrix_bytes(weights, math.prod(rows), columns, stored.itemsize)
        return Cost(flops=self.flops(case), bytes=total)

    def inputs(self, sizes: Any, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
        """Draw the arguments of `run` for a case, or for a mapping of its fields.

        Activations are normal. Weights, whose shape has no sequences and no tokens, are normal with a deviation of
        columns ** -0.5. A Matrix is quantized if the case's field of its name is a format, a Cache if `case.cache` is
        set. A number is the case's field of its name, or 1e-5.
        """
        case = self.case_of(sizes)

        def value(argument: Argument) -> Any:
            letters = self._letters(case)
            if not argument.tensor:
                return letters.get(argument.shape_spec or argument.name, 1e-5)
            shape = shape_of(argument.shape_spec, letters)
            if argument.kind == Matrix and (format := letters[argument.name.removesuffix("_proj")]):
                return sample_quantized(format, *shape, device=device, generator=generator)
            if argument.kind == Cache and case.cache:
                return quantize_cache(draw(shape, dtype, device, generator))
            is_weight = len(shape) > 1 and argument.shape_spec.split()[0] not in ("B", "...", self.row_letter)
            return draw(shape, dtype, device, generator, scale=shape[-1] ** -0.5 if is_weight else 1.0)

        args = {} if self.draw is None else self.draw(case, dtype, device, generator)
        names = {*args, *as_dict(case)}
        required = (a for a in self.arguments if a.name in names or not (a.optional or a.kind in (bool, str)))
        return {a.name: args[a.name] if a.name in args else value(a) for a in required}


def operation(name: str | None = None, **fields: Any) -> Callable[[Callable[P, R]], Operation[P, R]]:
    """Make the function below, which launches kernels on checked arguments, an operation, and register it with torch.

    name    None: the function's
    fields  the other fields of an OpWithCases
    """

    def decorate(run: Callable[P, R]) -> Operation[P, R]:
        return Operation(OpWithCases(name=name or run.__name__, run=by_position(run), **fields))

    return decorate


def as_dict(case: Any) -> dict[str, Any]:
    """Return the fields of a case: its sizes, and the flags and formats that are not at their default."""
    flags = {
        field.name: field.default for field in fields(case) if isinstance(field.default, bool | str | float | None)
    }
    return {name: value for name, value in vars(case).items() if name not in flags or value != flags[name]}


def runs_on(case: Any, arch: str) -> bool:
    """Return whether the GPU has the products of a case: those of e4m3 codes not every one has."""
    return not any(map(multiplies_codes, vars(case).values())) or multiplies_fp8(arch)


def shapes(case: type[Case], table: str, **flags: Any) -> tuple[Case, ...]:
    """Return a case for each row of a table of its first fields: `shapes(NormSizes, "1 128, 17 80")`."""
    return tuple(case(*map(int, row.split()), **flags) for row in table.split(","))


def draw(
    shape: Sequence[int], dtype: torch.dtype, device: Any, generator: torch.Generator | None, scale: float = 1.0
) -> torch.Tensor:
    """Draw normal values, the same on every device; unset on meta."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def sample_quantized(name: str, *shape: int, device: Any, generator: Any = None) -> QuantizedWeight:
    """Draw a weight of a `QuantizedWeight.name`, its values about as large as a dense weight's of K columns."""
    K = shape[-1]
    format, group = parse_name(name, K)
    weight = QuantSpec(format.name, group, format.scale_dtype).empty(shape, device)
    if weight.device.type != "meta":
        data = torch.randint(-(1 << 15), 1 << 15, weight.data.shape, generator=generator, dtype=torch.int16)
        weight.data.copy_(format.sample(data))
        scales = torch.rand(weight.scales.shape, generator=generator) + 0.5
        weight.scales.copy_(scales * K**-0.5 / format.typical)
    return weight
