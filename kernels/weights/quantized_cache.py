"""QuantizedCache: keys or values in 8 bits.

B batch, Hkv key/value heads, C slots, D head size

A vector of D numbers, one head of one token, is quantized from itself alone, with one fp32 scale: its largest absolute
value / 127; number = code * scale. A vector with NaN or inf has the scale NaN.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CODE_MAX = 127
SCALE_MIN = 2.0**-126  # the least normal number: a vector of zeros has codes 0, and no NaN
_MAX, _MIN = tl.constexpr(float(CODE_MAX)), tl.constexpr(SCALE_MIN)
_MAGIC = tl.constexpr(1.5 * 2.0**23)  # added to a number, it rounds it to an integer, which its low bits then hold


def vector_bytes(D: int, itemsize: int, quantized: bool) -> int:
    """Return the bytes of a cached key or value, with its scale where it is quantized."""
    return D + 4 if quantized else D * itemsize


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., D] -> codes int8 [..., D], scales fp32 [...]."""
    x = x.float()
    largest = x.abs().amax(-1)
    scales = (largest / CODE_MAX).clamp(min=SCALE_MIN).masked_fill(~(largest < torch.inf), torch.nan)
    return (x * (1.0 / scales)[..., None]).nan_to_num(0.0).round().to(torch.int8), scales


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 [..., D]: each code times its scale."""
    return codes.float() * scales[..., None]


def as_stored(x: Tensor) -> Tensor:
    """Return x [..., D] as a cache of 8 bits gives it back, in x's dtype."""
    return dequantize(*quantize(x)).to(x.dtype)


class QuantizedCache:
    """Keys or values [B, Hkv, C, D] of a ring cache in 8 bits.

    codes   int8 [B, Hkv, C, D], the last two dimensions contiguous
    scales  fp32 [B, Hkv, C], of the strides of `codes` / D: the same index finds a vector's codes and its scale
    """

    dtype, as_stored = torch.int8, staticmethod(as_stored)
    key, value_dtype, first_part = (), None, "codes"  # as of a QuantizedWeight

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        self.codes, self.scales = codes, scales

    @classmethod
    def empty(cls, *shape: int, device: Any = None) -> QuantizedCache:
        """Return an unset cache; all leading dimensions of [..., D] are free."""
        codes = torch.empty(shape, dtype=torch.int8, device=device)
        return cls(codes, torch.empty(shape[:-1], dtype=torch.float32, device=device))

    @classmethod
    def of(cls, x: Tensor) -> QuantizedCache:
        """Quantize x [..., D]."""
        return cls(*quantize(x))

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.codes, self.scales

    def fault(self) -> str | None:
        """Return what a kernel could not read, or None."""
        codes, scales = self.tensors
        right = scales.shape == codes.shape[:-1] and scales.device == codes.device and codes.stride(-1) == 1
        places = zip(codes.shape, codes.stride(), scales.stride(), strict=False)
        right = right and all(size <= 1 or stride == codes.shape[-1] * of_scale for size, stride, of_scale in places)
        if right and codes.dtype == torch.int8 and scales.dtype == torch.float32:
            return None
        got = " and ".join(f"{x.dtype} {list(x.shape)} of strides {x.stride()} on {x.device}" for x in self.tensors)
        return f"of {got}, needs int8 codes, and for each vector a float32 scale, of the codes' strides / D"

    def dequantize(self) -> Tensor:
        """Return the exact keys or values in fp32 [B, Hkv, C, D]."""
        return dequantize(*self.tensors)

    def map(self, function: Any) -> QuantizedCache:
        """Return the cache of function(codes), function(scales)."""
        return QuantizedCache(*map(function, self.tensors))

    def to(self, *args: Any) -> QuantizedCache:
        """Move; nothing is converted."""
        return self.map(lambda x: x.to(*args))

    def clone(self, **options: Any) -> QuantizedCache:
        return self.map(lambda x: x.clone(**options))

    def copy_(self, other: QuantizedCache) -> QuantizedCache:
        for x, y in zip(self.tensors, other.tensors, strict=True):
            x.copy_(y)
        return self

    def zero_(self) -> QuantizedCache:
        return self.map(Tensor.zero_)

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: Any) -> QuantizedCache:
        """Return views; `index` reaches no further than the slots."""
        return self.map(lambda x: x[index])

    def __setitem__(self, index: Any, values: Tensor) -> None:
        """Quantize values [..., D] into the slots at `index`."""
        for x, part in zip(self.tensors, quantize(values), strict=True):
            x[index] = part


@triton.jit
def quantized_vectors(x):
    """Vectors [rows, D] -> codes [rows, D] in fp32, scales fp32 [rows]."""
    x = x.to(tl.float32)
    largest = tl.max(tl.where(tl.abs(x) < float("inf"), tl.abs(x), float("inf")), axis=1)  # a maximum ignores NaN
    scales = tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + _MAX), _MIN)
    scales = tl.where(largest < float("inf"), scales, float("nan"))
    inverse = tl.div_rn(tl.zeros_like(scales) + 1.0, scales)[:, None]
    # A code of a vector with NaN or inf is any number.
    return (x * inverse + _MAGIC) - _MAGIC, scales
