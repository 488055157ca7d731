"""The registry of arguments that are several tensors: weights that are quantized or lie elsewhere, caches of 8 bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .offload import OFFLOADED, OffloadedWeight
from .quantized import QuantizedWeight
from .quantized_cache import QuantizedCache, quantized_vectors, vector_bytes

Matrix = Tensor | QuantizedWeight
Cache = Tensor | QuantizedCache
COMPOSITES = QuantizedWeight, QuantizedCache
# What torch's operator takes at its end for such an argument. The first part takes the argument's own place.
COMPOSITE_PARTS = {Matrix: (("scales", Tensor), ("zeros", Tensor), ("layout", str)), Cache: (("scales", Tensor),)}
quantize_cache = QuantizedCache.of

__all__ = ["COMPOSITES", "COMPOSITE_PARTS", "Cache", "Matrix", "compose", "first_part", "quantize_cache"]
__all__ += ["quantized_vectors", "vector_bytes"]


def first_part(x: Any) -> Any:
    """Return the tensor that takes the place of an argument in torch's operator: of a composite its data or codes."""
    return getattr(x, x.first_part) if isinstance(x, COMPOSITES) else x


def compose(kind: Any, first: Any, parts: Iterator[Any]) -> Any:
    """Return the argument of this kind, given its first part; of the others it takes its own from `parts`."""
    values: list[Any] = [next(parts, None) for _ in COMPOSITE_PARTS.get(kind, ())]
    if not values or values[-1] is None:
        return first
    if kind == Cache:
        return QuantizedCache(first, *values)
    weight_of: Any = OffloadedWeight.of if values[-1].startswith(OFFLOADED) else QuantizedWeight.of
    return weight_of(first, *values)
