"""QuantSpec: how a parameter is quantized; which parameters `weights=` quantizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels.quantized import BITS, GROUPS, SCALES, QuantizedWeight, pack

PARTS = {"experts": ("gate_up_proj", "down_proj"), "linear": ("qkv_proj", "o_proj", "lm_head")}
ALLOWED = f"None, one of {', '.join(BITS)} (the experts), or a dict of these with the keys {', '.join(PARTS)}"


@dataclass(frozen=True)
class QuantSpec:
    """The layout of a QuantizedWeight: format, columns of a group (K: one scale per row), dtype of scales, zeros."""

    format: str
    group: int
    scales: torch.dtype
    zeros: bool = False

    @classmethod
    def default_for(cls, format: str, K: int, group: int | None = None) -> QuantSpec:
        """Return what `quantize` produces: int4 in groups with bf16 scales; int8 and fp8 with an fp32 scale per row."""
        if format not in BITS:
            raise ValueError(f"quantize: format is {format!r}, needs one of {', '.join(BITS)}")
        groups = GROUPS if format == "int4" else (K,)
        if not (sizes := [size for size in groups if K % size == 0 and group in (None, size)]):
            needs = f"groups of {' or '.join(map(str, groups))} that divide {K} columns"
            raise ValueError(f"quantize: group is {group!r}, {format} needs {needs}; int8 and fp8 take whole rows")
        return cls(format, sizes[0], SCALES[format])

    def empty(self, shape: tuple[int, ...], device: Any) -> QuantizedWeight:
        """Return a weight of `shape` with unset values."""
        return QuantizedWeight.empty(self.format, tuple(shape), self.group, self.scales, self.zeros, device)


def put(weight: QuantizedWeight, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
    """Fill `weight` [..., K] from its device: codes uint8 [..., K], scales [..., G], zeros uint8 [..., G] if any."""
    weight.data.copy_(pack(codes.contiguous(), weight.format, weight.group))
    weight.scales.copy_(scales)
    if weight.zeros is not None and zeros is not None:
        weight.zeros.copy_(zeros.float() + 128)


def select_specs(
    weights: Any, shapes: Mapping[str, tuple[int, ...]], caller: str = "Mixtral.from_pretrained"
) -> dict[str, QuantSpec]:
    """Return the specs by name of the parameters that `weights` quantizes: None, a format, or a dict; see ALLOWED.

    ValueError for anything else, and where int4's groups do not fit a parameter. A tied head stays dense.
    """
    if weights is None:
        return {}
    wanted = {"experts": weights} if isinstance(weights, str) else weights
    known = isinstance(wanted, Mapping) and all(PARTS.get(part) and wanted[part] in BITS for part in wanted)
    if not wanted or not known:
        raise ValueError(f"{caller}: weights is {weights!r}, needs {ALLOWED}")
    formats = {name: format for part, format in wanted.items() for name in PARTS[part]}
    specs: dict[str, QuantSpec] = {}
    for name, shape in shapes.items():
        if (format := formats.get(name.rpartition(".")[2])) is not None:
            try:
                specs[name] = QuantSpec.default_for(format, shape[-1])
            except ValueError as error:
                raise ValueError(f"{caller}: weights is {weights!r}, {name}: {error}") from None
    return specs
