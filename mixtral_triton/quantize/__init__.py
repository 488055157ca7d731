"""Weights in 4 or 8 bits: which parameters `weights=` quantizes, their formats, and codes and scales of a dense weight.

Rows are quantized independently, so that any piece of rows can be.

K columns, in G groups that share a scale
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.arguments import describe
from ..checkpoint.config import error_prefix
from ..kernels.operation.checks import FLOATS
from ..kernels.weights.formats import BITS, FORMATS
from ..kernels.weights.offload import OffloadedWeight
from ..kernels.weights.quantized import QuantizedWeight, QuantSpec

__all__ = ["OffloadedWeight", "QuantSpec", "QuantizedWeight", "quantize"]

QUANTIZED_PARTS = {"experts": ("gate_up_proj", "down_proj"), "linear": ("qkv_proj", "o_proj", "lm_head")}
ALLOWED = f"None, one of {', '.join(BITS)} (the experts), or a dict of these with the keys {', '.join(QUANTIZED_PARTS)}"
Formats = str | Mapping[str, str] | None  # the experts' format, or one for each of QUANTIZED_PARTS; None: as stored
# Elements that are quantized, or unpacked, at once: in fp32 they fit a CPU's cache, or keep a GPU busy.
PIECE, GPU_PIECE = 1 << 18, 1 << 23


def formats_text(weights: Formats) -> str:
    """Return formats as `--weights` takes them: int4, or experts=int4,linear=int8."""
    parts = weights if isinstance(weights, Mapping) else {}
    return ",".join(f"{part}={format}" for part, format in parts.items()) or str(weights)


def put(weight: QuantizedWeight, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> None:
    """Fill `weight` [..., K] from its device: codes uint8 [..., K], scales [..., G], zeros uint8 [..., G] if any."""
    weight.data.copy_(weight.kind.pack(codes.contiguous(), weight.group))
    weight.scales.copy_(scales)
    if weight.zeros is not None and zeros is not None:
        weight.zeros.copy_(zeros.float() + 128)


def select_specs(
    quantization: Any, shapes: Mapping[str, tuple[int, ...]], caller: str = "Mixtral.from_pretrained"
) -> dict[str, QuantSpec]:
    """Return the specs by name of the parameters that `quantization` names: None, a format, or a dict; see ALLOWED.
    ValueError for anything else, and where int4's groups do not fit a parameter. A tied head stays dense."""
    if quantization is None:
        return {}
    parts = {"experts": quantization} if isinstance(quantization, str) else quantization
    known = isinstance(parts, Mapping) and {*parts} <= {*QUANTIZED_PARTS} and {*map(str, parts.values())} <= {*BITS}
    if not known or not parts:
        raise ValueError(f"{caller}: weights is {quantization!r}, needs {ALLOWED}")
    formats = {name: format for part, format in parts.items() for name in QUANTIZED_PARTS[part]}
    specs: dict[str, QuantSpec] = {}
    for name, shape in shapes.items():
        if (format := formats.get(name.rpartition(".")[2])) is not None:
            with error_prefix(f"{caller}: weights is {quantization!r}, {name}"):
                specs[name] = QuantSpec.default_for(format, shape[-1])
    return specs


def quantize(tensor: Tensor, format: str, group: int | None = None) -> QuantizedWeight:
    """Quantize a tensor [N,K] or [E,N,K] in fp32, bf16 or fp16 to "int4", "int8" or "fp8" (e4m3).

    int4: -8..7 times a bf16 scale per `group` columns, the candidate with the least squared error; group None: 128, 64
    or 32, the largest that divides K. int8 and fp8: an fp32 scale per row, whose largest value maps to the format's.
    ValueError for another format, a group that does not divide K, NaN and infinity.
    """
    right = isinstance(tensor, Tensor) and tensor.dtype in FLOATS and tensor.dim() in (2, 3) and 0 not in tensor.shape
    if not right or tensor.layout != torch.strided or tensor.is_meta or not torch.isfinite(tensor).all():
        need = "finite numbers in fp32, bf16 or fp16, strided, [N, K] or [E, N, K]"
        raise ValueError(f"quantize: argument 'tensor' is {describe(tensor)}, needs {need}")
    weight = QuantSpec.default_for(format, tensor.shape[-1], group).empty(tuple(tensor.shape), tensor.device)
    quantize_into(weight, tensor)
    return weight


@torch.no_grad()
def quantize_into(weight: QuantizedWeight, x: Tensor, columns: slice | None = None) -> None:
    """Quantize x [..., K], finite, into `weight` of the same shape, on its device, a few rows at a time. columns:
    `weight` holds only these columns of x, whose rows have one scale each for all columns."""
    if x.dim() > 2:
        for expert, rows in enumerate(x):
            quantize_into(weight[expert], rows, columns)
        return
    group, kept = (weight.group, slice(None)) if columns is None else (x.shape[-1], columns)
    for piece in pieces(len(x), x.shape[-1], weight.device):
        codes, scales = encode(x[piece].to(weight.device), weight.format, group)
        put(weight[piece], codes[:, kept], scales)


def pieces(N: int, K: int, device: torch.device) -> Iterator[slice]:
    """Return slices of N rows of K columns that `encode` processes efficiently."""
    step = piece_rows(K, device)
    return (slice(start, min(start + step, N)) for start in range(0, N, step))


def piece_rows(K: int, device: torch.device) -> int:
    return max(1, (PIECE if device.type == "cpu" else GPU_PIECE) // K)


def encode(x: Tensor, format: str, group: int) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [n,K] and scales [n,G] (bf16 values for int4) of x [n,K], finite."""
    codes, scales = FORMATS[format].encode(x.float().unflatten(-1, (-1, group)))
    return codes.flatten(-2), scales.squeeze(-1)
