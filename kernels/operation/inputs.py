"""Cases and random arguments of an operation, from its annotations: for tests, compile and bench."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from ..weights.composites import Cache, Matrix, quantize_cache
from ..weights.formats import parse_name
from ..weights.quantized import QuantizedWeight, QuantSpec
from . import checks
from .checks import Argument
from .declaration import as_dict, letters_of, read_annotations, row_letter

Case = TypeVar("Case")


def shapes(case: type[Case], table: str, **flags: Any) -> tuple[Case, ...]:
    """Return a case for each row of a table of its first fields: `shapes(NormSizes, "1 128, 17 80")`."""
    return tuple(case(*map(int, row.split()), **flags) for row in table.split(","))


def draw(
    shape: Sequence[int], dtype: torch.dtype, device: Any, generator: torch.Generator | None, scale: float = 1.0
) -> torch.Tensor:
    """Draw normal values for `Op.inputs`, the same on every device; unset on meta."""
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


def random_inputs(run: Callable[..., Any], special: Callable[..., dict[str, Any]] | None) -> Any:
    """Return `Op.inputs` for `run`: a function that draws its arguments. `special` may draw some of them.

    Activations are normal. Weights, whose shape has no sequences and no tokens, are normal with a deviation of
    columns ** -0.5. A Matrix is quantized if the case's field of its name is a format, a Cache if `case.cache` is set.
    A number is the case's field of its name, or 1e-5.
    """

    def inputs(case: Any, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
        letters = letters_of(run, case)

        def value(argument: Argument) -> Any:
            if not argument.tensor:
                return letters.get(argument.shape_spec or argument.name, 1e-5)
            shape = checks.shape_of(argument.shape_spec, letters)
            if argument.kind == Matrix and (format := letters[argument.name.removesuffix("_proj")]):
                return sample_quantized(format, *shape, device=device, generator=generator)
            if argument.kind == Cache and case.cache:
                return quantize_cache(draw(shape, dtype, device, generator))
            is_weight = len(shape) > 1 and argument.shape_spec.split()[0] not in ("B", "...", row_letter(run))
            return draw(shape, dtype, device, generator, scale=shape[-1] ** -0.5 if is_weight else 1.0)

        args = {} if special is None else special(case, dtype, device, generator)
        names = {*args, *as_dict(case)}
        required = (a for a in read_annotations(run)[0] if a.name in names or not (a.optional or a.kind in (bool, str)))
        return {a.name: args[a.name] if a.name in args else value(a) for a in required}

    return inputs
