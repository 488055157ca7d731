"""Weights in 4 or 8 bits: quantization, the layouts of checkpoints on the hub, and writing one of them."""

from __future__ import annotations

from ..kernels.offload import OffloadedWeight
from ..kernels.quantized import QuantizedWeight
from .quantizers import quantize

__all__ = ["OffloadedWeight", "QuantizedWeight", "quantize"]
