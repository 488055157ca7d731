"""Weights in 4 or 8 bits: quantizing them, the layouts that checkpoints on the hub have, and writing one of these."""

from __future__ import annotations

from ..kernels.quantized import QuantizedWeight
from .quantizers import quantize

__all__ = ["QuantizedWeight", "quantize"]
