"""Activations of experts, by name: kernels of the functions in ../../activations.py, and of their derivatives.

A name has its numbers behind it: "silu", "clamped_silu:7", "clamped_swish:1.702:7". Each function takes gate and up in
fp32 and returns what the down projection multiplies, h, and its derivatives in gate and in up; the compiler drops what
a kernel does not use. With s = sigmoid(z), the derivative of gate * s is s * (1 + gate * (1 - s) * dz / dgate).
"""

from functools import cache
from inspect import signature
from math import inf
from typing import Any

import triton
import triton.language as tl

from ...activations import ACTIVATIONS
from ...operation.checks import fail


@triton.jit
def silu(gate, up, NUMBERS: tl.constexpr):
    """gate * sigmoid(gate) * up (Shazeer 2020)."""
    activated, sigmoid = gate / (1.0 + tl.exp(-gate)), 1.0 / (1.0 + tl.exp(-gate))
    return activated * up, up * sigmoid * (1.0 + gate * (1.0 - sigmoid)), activated


@triton.jit
def gelu_tanh(gate, up, NUMBERS: tl.constexpr):
    """GELU by its tanh, with 0.5 * (1 + tanh(z / 2)) = sigmoid(z) (Hendrycks & Gimpel 2016, section 2) * up."""
    squared = gate * gate
    z = 1.5957691216057308 * gate * (1.0 + 0.044715 * squared)  # 2 * sqrt(2 / pi)
    activated, sigmoid = gate / (1.0 + tl.exp(-z)), 1.0 / (1.0 + tl.exp(-z))
    slope = 1.5957691216057308 * (1.0 + 3 * 0.044715 * squared)
    return activated * up, up * sigmoid * (1.0 + gate * (1.0 - sigmoid) * slope), activated


@triton.jit
def clamped_silu(gate, up, NUMBERS: tl.constexpr):
    """`silu` of gate up to a limit, and of up within it (DeepSeek-V4's `_apply_gate` in transformers)."""
    LIMIT: tl.constexpr = NUMBERS[0]
    h, of_gate, of_up = silu(_minimum(gate, LIMIT), _minimum(-_minimum(-up, LIMIT), LIMIT), NUMBERS)
    return h, tl.where(gate <= LIMIT, of_gate, 0.0), tl.where(tl.abs(up) <= LIMIT, of_up, 0.0)


@triton.jit
def clamped_swish(gate, up, NUMBERS: tl.constexpr):
    """gate * sigmoid(alpha * gate) * (up + 1), clamped as `clamped_silu` (gpt-oss, OpenAI 2025; MiniMax-M3)."""
    ALPHA: tl.constexpr = NUMBERS[0]
    LIMIT: tl.constexpr = NUMBERS[1]
    clamped, factor = _minimum(gate, LIMIT), _minimum(-_minimum(-up, LIMIT), LIMIT) + 1.0
    activated, sigmoid = clamped / (1.0 + tl.exp(-ALPHA * clamped)), 1.0 / (1.0 + tl.exp(-ALPHA * clamped))
    of_gate = tl.where(gate <= LIMIT, factor * sigmoid * (1.0 + ALPHA * clamped * (1.0 - sigmoid)), 0.0)
    return activated * factor, of_gate, tl.where(tl.abs(up) <= LIMIT, activated, 0.0)


@triton.jit
def _minimum(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, x)  # a NaN stays


KERNELS: dict[str, Any] = {"silu": silu, "gelu_tanh": gelu_tanh}
KERNELS |= {"clamped_silu": clamped_silu, "clamped_swish": clamped_swish}


@cache
def constants(activation: str) -> dict[str, Any]:
    """Return the constexprs of an activation that kernels take: its function, and its numbers. ValueError, KeyError or
    TypeError for another name, or other numbers than it takes."""
    name, *values = activation.split(":")
    signature(ACTIVATIONS[name][0]).bind(*"xx", *(numbers := tuple(map(float, values))))
    if not all(0 < number < inf for number in numbers):
        raise ValueError(activation)
    return {"ACTIVATION": KERNELS[name], "NUMBERS": numbers}


def check_activation(op: str, args: Any, sizes: Any) -> None:
    try:
        constants(args["activation"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        names = (":".join((name, *[*signature(f).parameters][2:])) for name, (f, _) in ACTIVATIONS.items())
        raise fail(op, "activation", repr(args["activation"]), " or ".join(map(repr, names))) from error
