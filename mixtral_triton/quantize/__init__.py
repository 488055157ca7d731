"""Weights in 4 or 8 bits: quantization, the layouts of checkpoints on the hub, and writing one of them."""

from __future__ import annotations

from ..kernels.quantized import QuantizedWeight
from .quantizers import quantize

__all__ = ["QuantizedWeight", "quantize"]
