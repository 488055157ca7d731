"""Mixtral 8x7B and its family on fused Triton kernels, each checked against plain torch."""

from .cache import KVCache
from .config import MixtralConfig
from .model import Mixtral

__all__ = ["KVCache", "Mixtral", "MixtralConfig"]
