"""Layouts of a quantized linear on disk: its tensors, and how its rows decode to codes, scales and zeros.

N rows, K columns, G groups of columns that share a scale. int32 elements hold eight codes of 4 bits, or four of 8, the
first in the lowest bits.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.quantized import GROUPS, ZERO_INT4
from .spec import QuantSpec

Shape = tuple[int, ...]
Read = Callable[..., Tensor]  # read(part, *index): a slice of that tensor of the linear
Rows = tuple[Tensor, Tensor, Tensor | None]  # codes uint8 [n,K], scales [n,G], zeros uint8 [n,G]

FLOATS = ("F32", "BF16", "F16")
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # positions in an int32 of the codes of eight neighbouring columns


@dataclass(frozen=True)
class Part:
    """A tensor of a linear, with the dtypes (safetensors' names) and shapes that it may have."""

    dtypes: tuple[str, ...]
    shapes: tuple[Shape, ...]
    needed: bool = True


def unpacked(x: Tensor, bits: int) -> Tensor:
    """Unpack int32 [..., n] to uint8 [..., n * 32 / bits]."""
    data = x.contiguous().view(torch.uint8)
    return data if bits == 8 else torch.stack((data & 15, data >> 4), dim=-1).flatten(-2)


def columns(group: int | None, K: int) -> int:
    """Return the columns of a group, K for one scale per row (None); ValueError for unsupported groups."""
    size = K if group in (None, K) else group
    if size != K and size not in GROUPS:
        raise ValueError(f"group size is {group}, needs 32, 64, 128 or one scale per row")
    if K % size:
        raise ValueError(f"groups of {group} do not divide {K} columns")
    return size


class Layout:
    """How one linear [N,K] is stored. Only a quantized linear has the part `marker`."""

    marker = "qweight"
    scale = "scales"

    def has(self, dtypes: Mapping[str, str]) -> bool:
        """Whether a linear whose parts have these dtypes is quantized."""
        return self.marker in dtypes

    def parts(self, N: int, K: int) -> dict[str, Part]:
        raise NotImplementedError

    def spec(self, K: int, scales: torch.dtype) -> QuantSpec:
        raise NotImplementedError

    def check(self, read: Read, N: int, K: int, parts: Collection[str]) -> None:
        """Raise ValueError for unsupported values in the stored parts."""

    def rows(self, read: Read, N: int, K: int, start: int, stop: int) -> Rows:
        """Return the rows start..stop; start is a multiple of 128."""
        raise NotImplementedError


@dataclass(frozen=True)
class EightBits(Layout):
    """A byte per code, "fp8" (e4m3) or "int8" (two's complement): `weight` [N,K], and a scale per tensor, row or block.

    block  rows and columns of a block; None: the scale's shape decides between tensor and rows
    """

    format: str
    scale: str = "weight_scale"
    block: tuple[int, int] | None = None

    marker = "weight"

    @property
    def dtype(self) -> str:
        return "F8_E4M3" if self.format == "fp8" else "I8"

    def has(self, dtypes: Mapping[str, str]) -> bool:
        return dtypes.get("weight") == self.dtype

    def parts(self, N: int, K: int) -> dict[str, Part]:
        shapes: tuple[Shape, ...] = ((), (1,), (N, 1), (N,))
        if self.block is not None:
            shapes = ((-(-N // self.block[0]), -(-K // self.block[1])),)
        return {"weight": Part((self.dtype,), ((N, K),)), self.scale: Part(FLOATS, shapes)}

    def spec(self, K: int, scales: torch.dtype) -> QuantSpec:
        return QuantSpec(self.format, columns(self.block and self.block[1], K), scales)

    def rows(self, read: Read, N: int, K: int, start: int, stop: int) -> Rows:
        codes = read("weight", slice(start, stop)).view(torch.uint8)
        if self.block is not None:
            tall = self.block[0]
            blocks = read(self.scale, slice(start // tall, -(-stop // tall)))
            first = start // tall * tall
            return codes, blocks.repeat_interleave(tall, 0)[start - first : stop - first], None
        scales = read(self.scale).reshape(-1)
        return codes, (scales[start:stop] if len(scales) == N else scales.expand(stop - start))[:, None], None


@dataclass(frozen=True)
class Packed(Layout):
    """compressed-tensors' pack-quantized: codes along K, each with 2^(bits - 1) added; zeros along N, likewise."""

    bits: int
    group: int | None
    symmetric: bool
    reordered: bool = False  # by the config, which then requires `weight_g_idx`

    marker = "weight_packed"
    scale = "weight_scale"

    def parts(self, N: int, K: int) -> dict[str, Part]:
        G = K // columns(self.group, K)
        found = {
            "weight_packed": Part(("I32",), ((N, -(-K * self.bits // 32)),)),
            "weight_scale": Part(FLOATS, ((N, G),)),
            "weight_shape": Part(("I64", "I32"), ((2,),)),
            "weight_g_idx": Part(("I32", "I64"), ((K,),), self.reordered),
        }
        if not self.symmetric:
            found["weight_zero_point"] = Part(("I32",), ((-(-N // 8), G),))
        return found

    def spec(self, K: int, scales: torch.dtype) -> QuantSpec:
        return QuantSpec("int4" if self.bits == 4 else "int8", columns(self.group, K), scales, not self.symmetric)

    def check(self, read: Read, N: int, K: int, parts: Collection[str]) -> None:
        if (shape := read("weight_shape").tolist()) != [N, K]:
            raise ValueError(f"weight_shape says {shape}, the config {[N, K]}")
        if "weight_g_idx" in parts:
            in_order(read("weight_g_idx"), columns(self.group, K))

    def rows(self, read: Read, N: int, K: int, start: int, stop: int) -> Rows:
        codes = unpacked(read("weight_packed", slice(start, stop)), self.bits)[:, :K]
        if self.bits == 8:
            codes = codes ^ 128
        zeros = None
        if not self.symmetric:
            packed = read("weight_zero_point", slice(start // 8, -(-stop // 8)))
            zeros = unpacked(packed.t(), 4)[:, : stop - start].t()
        return codes, read("weight_scale", slice(start, stop)), zeros


@dataclass(frozen=True)
class Columns(Layout):
    """GPTQ and AWQ, transposed: `scales` [G,N], and `qzeros` [G,N/8] packed along N.

    kind       "gptq": `qweight` [K/8,N] packed along K. "awq": [K,N/8] along N, in AWQ_ORDER as the zeros
    off        subtracted from a zero before it was stored: 1 in GPTQ's first version
    symmetric  all zeros are 8
    reordered  by the config, which then requires `g_idx`
    """

    kind: str
    group: int | None
    off: int = 0
    symmetric: bool = False
    reordered: bool = False

    def parts(self, N: int, K: int) -> dict[str, Part]:
        if N % 8 or K % 8:
            raise ValueError(f"{[N, K]} cannot be packed by eights: needs multiples of 8")
        G = K // columns(self.group, K)
        found = {
            "qweight": Part(("I32",), ((K // 8, N) if self.kind == "gptq" else (K, N // 8),)),
            "qzeros": Part(("I32",), ((G, N // 8),)),
            "scales": Part(FLOATS, ((G, N),)),
            "bias": Part(FLOATS, ((N,),), needed=False),
        }
        return found | ({"g_idx": Part(("I32", "I64"), ((K,),), self.reordered)} if self.kind == "gptq" else {})

    def spec(self, K: int, scales: torch.dtype) -> QuantSpec:
        return QuantSpec("int4", columns(self.group, K), scales, not self.symmetric)

    def check(self, read: Read, N: int, K: int, parts: Collection[str]) -> None:
        if "g_idx" in parts:
            in_order(read("g_idx"), columns(self.group, K))
        if "bias" in parts and read("bias").any():
            raise ValueError("has a bias that is not 0, and Mixtral has none")

    def rows(self, read: Read, N: int, K: int, start: int, stop: int) -> Rows:
        part, eights = slice(start, stop), slice(start // 8, stop // 8)
        zeros = unpacked(read("qzeros", slice(None), eights), 4)
        if self.kind == "gptq":
            codes = unpacked(read("qweight", slice(None), part).t(), 4)
        else:
            codes, zeros = (awq_order(x) for x in (unpacked(read("qweight", slice(None), eights), 4), zeros))
            codes = codes.t()
        if self.off and (zeros == 15).any():
            raise ValueError("stores a zero of 15: 16 to some readers of this format and 0 to others; gptq_v2 is clear")
        zeros = zeros.t() + self.off
        if self.symmetric and (zeros != ZERO_INT4).any():
            raise ValueError(f"is symmetric by its config, and has a zero other than {ZERO_INT4}")
        return codes, read("scales", slice(None), part).t(), None if self.symmetric else zeros


def awq_order(x: Tensor) -> Tensor:
    """Reorder [..., N], as AWQ packs eight columns, to the order of the columns."""
    return x.unflatten(-1, (-1, 8))[..., AWQ_ORDER].flatten(-2)


def in_order(g_idx: Tensor, group: int) -> None:
    """Raise ValueError unless the columns of each group are contiguous, which act-order changes."""
    K = len(g_idx)
    if not torch.equal(g_idx.long(), torch.arange(K, device=g_idx.device) // group):
        raise ValueError(
            "is in act-order (g_idx scatters the groups): quantize without it (desc_act false), or from bf16"
        )
