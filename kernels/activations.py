"""The activations of experts in plain torch: a function of gate and up that the down projection multiplies.

A name has its numbers behind it: "silu", "clamped_silu:7", "clamped_swish:1.702:7". Their kernels are in
ops/experts/activations.py.
"""

from math import pi, sqrt
from typing import Any

import torch.nn.functional as F
from torch import Tensor


def _times_up(up: Tensor, activated: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    return up * slope, activated


def _swish(gate: Tensor, alpha: float = 1.0) -> tuple[Tensor, Tensor]:
    """gate * sigmoid(alpha * gate) (Ramachandran et al. 2017), and its derivative."""
    sigmoid = (alpha * gate).sigmoid()
    return gate * sigmoid, sigmoid * (1 + alpha * gate * (1 - sigmoid))


def silu(gate: Tensor, up: Tensor) -> Tensor:
    """SwiGLU (Shazeer 2020)."""
    return F.silu(gate) * up


def gelu_tanh(gate: Tensor, up: Tensor) -> Tensor:
    """GELU by its tanh (Hendrycks & Gimpel 2016, section 2), times up: Gemma 4."""
    return F.gelu(gate, approximate="tanh") * up


def clamped_silu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """SwiGLU of a gate up to a limit, and of an up within it: DeepSeek-V4."""
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


def clamped_swish(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """Swish of a gate up to a limit, times 1 + up within it: gpt-oss (OpenAI 2025), MiniMax-M3."""
    gate = gate.clamp(max=limit)
    return (up.clamp(-limit, limit) + 1) * (gate * (gate * alpha).sigmoid())


def _gelu_tanh(gate: Tensor) -> tuple[Tensor, Tensor]:
    tanh = (sqrt(2 / pi) * (gate + 0.044715 * gate**3)).tanh()
    slope = (1 + tanh + gate * (1 - tanh * tanh) * sqrt(2 / pi) * (1 + 3 * 0.044715 * gate**2)) / 2
    return gate * (1 + tanh) / 2, slope


def _clamped(gate: Tensor, up: Tensor, limit: float, alpha: float, offset: float) -> tuple[Tensor, Tensor]:
    activated, slope = _swish(gate.clamp(max=limit), alpha)
    return (up.clamp(-limit, limit) + offset) * slope * (gate <= limit), activated * (up.abs() <= limit)


# A function of gate, up and its numbers, and its derivatives in gate and in up.
ACTIVATIONS: dict[str, Any] = {
    "silu": (silu, lambda gate, up: _times_up(up, *_swish(gate))),
    "gelu_tanh": (gelu_tanh, lambda gate, up: _times_up(up, *_gelu_tanh(gate))),
    "clamped_silu": (clamped_silu, lambda gate, up, limit: _clamped(gate, up, limit, 1.0, 0.0)),
    "clamped_swish": (clamped_swish, lambda gate, up, alpha, limit: _clamped(gate, up, limit, alpha, 1.0)),
}


def activate(gate: Tensor, up: Tensor, activation: str, derivatives: bool = False) -> Any:
    """Return the activation of that name and numbers, or its derivatives in gate and in up."""
    name, *numbers = activation.split(":")
    return ACTIVATIONS[name][derivatives](gate, up, *map(float, numbers))
