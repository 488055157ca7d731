"""QuantizedWeight: a weight in 4 or 8 bits, in a layout that kernels stream.

E experts (or none), N rows, K columns: the depth of the sum; G groups of columns that share a scale

A row is stored in units of 64, 128 or 256 columns. A unit's int16 elements hold one code in each field, and field s of
element j is column s * J + j of the unit (J elements a unit). So each field, shifted down, is a tile of J neighbouring
columns, and its product with x needs no interleave. K is padded to a full unit with codes of value 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .kernel_args import dense_rows

GROUPS = (128, 64, 32)  # columns that may share a scale, besides a full row
BITS = {"int4": 4, "int8": 8, "fp8": 8}
# Dtypes of the scales that quantizing makes. One scale a group takes an eighth of the codes' bytes.
SCALES = {"int4": torch.bfloat16, "int8": torch.float32, "fp8": torch.float32}
QUANT_NAMES = ("int4:128", "int8", "fp8")  # `QuantizedWeight.name`s that quantizing makes, benchmarked and compiled
# The format of fp8 weights with one scale a row whose products quantize x, too (`with_fp8_activations`).
W8A8 = "fp8_w8a8"
FP8_MAX = 448.0  # the largest value of e4m3
# The least magnitude that maps to FP8_MAX, so that its inverse is finite: a row of zeros has this one, too.
LEAST_AMAX = FP8_MAX * 2.0**-126
ZERO_INT4 = 8  # the code of value 0 where there are no zeros


def stored_format(format: str) -> str:
    """Return the format of the codes and their layout."""
    return "fp8" if format == W8A8 else format


def unit_columns(format: str, K: int, group: int) -> int:
    """Return the columns of a unit: each field lies within one group, and K is padded as little as possible."""
    if format != "int4":
        return 128 if group >= 64 else 64
    return 256 if group >= 64 and K % 256 == 0 else 128


def row_elements(format: str, K: int, group: int) -> int:
    """Return the int16 elements of a row of K columns, padding included."""
    unit = unit_columns(format, K, group)
    return -(-K // unit) * unit * BITS[stored_format(format)] // 16


def tile_columns(weights: str, K: int) -> int:
    """Return the columns of a field, which are also the elements of a unit, for a `QuantizedWeight.name`."""
    format, _, group = weights.partition(":")
    return unit_columns(format, K, int(group or K)) * BITS[format] // 16


def matrix_bytes(weights: str | None, rows: int, K: int, itemsize: int) -> int:
    """Return the bytes of `rows` rows of K columns with their scales, for a `QuantizedWeight.name` or None (dense)."""
    if weights is None:
        return rows * K * itemsize
    format, _, group = stored_format(weights).partition(":")
    return rows * (K * BITS[format] // 8 + K // int(group or K) * SCALES[format].itemsize)


def sample_quantized(weights: str, *shape: int, device: Any, generator: Any = None) -> QuantizedWeight:
    """Draw a weight of the format `weights`, its values about as large as a dense weight's of K columns."""
    format, _, group = stored_format(weights).partition(":")
    K = shape[-1]
    weight = QuantSpec(format, int(group or K), SCALES[format]).empty(shape, device)
    if weight.device.type != "meta":
        data = torch.randint(-(1 << 15), 1 << 15, weight.data.shape, generator=generator, dtype=torch.int16)
        # Without the highest exponent bit no fp8 code is NaN.
        weight.data.copy_(data & -16449 if format == "fp8" else data)
        scales = torch.rand(weight.scales.shape, generator=generator) + 0.5
        weight.scales.copy_(scales * K**-0.5 / {"int4": 4, "int8": 64, "fp8": 0.5}[format])
    return weight.with_fp8_activations() if weights == W8A8 else weight


def pack(codes: Tensor, format: str, group: int) -> Tensor:
    """Pack codes uint8 [..., K], one a byte -> int16 [..., K' * bits / 16], K' the padded columns."""
    bits, K = BITS[stored_format(format)], codes.shape[-1]
    unit, fields = unit_columns(format, K, group), 16 // bits
    padding = -K % unit
    if padding:
        codes = nn.functional.pad(codes, (0, padding), value=ZERO_INT4 if format == "int4" else 0)
    parts = codes.unflatten(-1, (-1, fields, unit // fields)).to(torch.int32)
    packed = sum(parts[..., s, :] << (bits * s) for s in range(fields))
    return packed.to(torch.int16).flatten(-2)  # type: ignore[union-attr]  # wraps: a field reaches the sign bit


def unpack(data: Tensor, format: str, K: int, group: int) -> Tensor:
    """Invert `pack`: int16 [..., K' * bits / 16] -> uint8 [..., K]."""
    unit = unit_columns(format, K, group) * BITS[stored_format(format)] // 16
    elements = data.contiguous().view(torch.uint8).unflatten(-1, (-1, unit, 2))
    if format == "int4":  # a byte has two fields, the lower first
        elements = torch.stack((elements & 15, elements >> 4), dim=-1).flatten(-2)
    return elements.transpose(-1, -2).flatten(-3)[..., :K]


def encode_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize activations x [..., K] to e4m3 in fp32 -> codes float8_e4m3fn [..., K], a scale a row fp32 [..., 1].

    A row's largest magnitude maps to FP8_MAX. A row with a NaN or an infinity has a code that is NaN.
    """
    values = x.float()
    largest = values.abs().amax(-1, keepdim=True).clamp(min=LEAST_AMAX)
    most = torch.full_like(largest, FP8_MAX)  # torch divides by a number, or a number, with two roundings
    codes = (values * (most / largest)).clamp(-FP8_MAX, FP8_MAX)
    return codes.to(torch.float8_e4m3fn), largest / most


class QuantizedWeight(nn.Module):
    """A weight [E, N, K] or [N, K]: value = (code - zero) * scale, in fp32.

    format  "int4": codes 0..15, zero 8 unless `zeros` says otherwise; "int8": two's complement; "fp8": e4m3, none of
            them NaN (0x7F, 0xFF): loading refuses those, kernels look at no value; "fp8_w8a8": the same, a scale a row,
            of a view whose products quantize x (`with_fp8_activations`)
    data    int16 [(E,) N, K' * bits / 16], see `pack`
    scales  [(E,) N, G], as stored: never rounded
    zeros   int4 only: bf16 [(E,) N, G], 128 + zero; None: 8 everywhere
    shape   that of the dense weight
    group   columns that share a scale; K where a row has one scale

    An nn.Module, its tensors buffers: `.to(device)` moves them and no `.to(dtype)` converts them.
    """

    data: Tensor
    scales: Tensor
    zeros: Tensor | None

    def __init__(
        self, format: str, data: Tensor, scales: Tensor, zeros: Tensor | None, shape: tuple[int, ...], group: int
    ) -> None:
        super().__init__()
        self.format, self.shape, self.group = format, torch.Size(shape), group
        self.register_buffer("data", data)
        self.register_buffer("scales", scales)
        self.register_buffer("zeros", zeros)
        self._check()

    def _check(self) -> None:
        *lead, K = self.shape
        if stored_format(self.format) not in BITS:
            raise ValueError(f"QuantizedWeight: format is {self.format!r}, needs one of {', '.join(BITS)}")
        if self.group < 1 or K % self.group or (self.group != K and self.group not in GROUPS):
            raise ValueError(f"QuantizedWeight: group is {self.group}, needs 32, 64 or 128 that divide {K}, or {K}")
        if self.format == W8A8 and self.group != K:
            raise ValueError(f"QuantizedWeight: group is {self.group}, {W8A8} needs {K}: one scale a row")
        groups = (*lead, K // self.group)
        shapes = {"data": (*lead, row_elements(self.format, K, self.group)), "scales": groups, "zeros": groups}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"QuantizedWeight: {name} has shape {list(tensor.shape)}, needs {list(shape)}")
        if self.data.dtype != torch.int16 or not self.scales.is_floating_point():
            dtypes = f"{self.data.dtype} and {self.scales.dtype}"
            raise ValueError(f"QuantizedWeight: data and scales are {dtypes}, need int16 and floats")
        if self.zeros is not None and (self.format != "int4" or self.zeros.dtype != torch.bfloat16):
            raise ValueError(f"QuantizedWeight: zeros of {self.format} are {self.zeros.dtype}, need int4 and bfloat16")

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        """Move and never convert: a rounded scale would change the weight."""
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    @property
    def name(self) -> str:
        """Format and group: "int4:128"; "int4" where a row has one scale."""
        return self.format if self.group == self.shape[-1] else f"{self.format}:{self.group}"

    @property
    def tensors(self) -> tuple[Any, ...]:
        """data, scales, zeros or None; data of "fp8_w8a8" as float8_e4m3fn [(E,) N, K'], in the order of its bytes."""
        tensors: tuple[Any, ...] = tuple(self._buffers.values())  # an attribute of a module is read more slowly
        if self.format != W8A8 or tensors[0].dtype != torch.int16:  # addresses of experts (offload.py)
            return tensors
        return dense_rows(tensors[0]).view(torch.float8_e4m3fn), *tensors[1:]

    @property
    def device(self) -> torch.device:
        return self.scales.device  # data may be that of one expert in host memory (offload.py)

    @property
    def nbytes(self) -> int:
        """Bytes of the codes, scales and zeros."""
        return sum(tensor.nbytes for tensor in self.buffers())

    @property
    def layout(self) -> str:
        """What the tensors do not show, as text for torch's operators (`of`)."""
        return f"{self.format} {self.group} {' '.join(map(str, self.shape))}"

    @classmethod
    def of(cls, data: Tensor, scales: Tensor, zeros: Tensor | None, layout: str) -> QuantizedWeight:
        format, *numbers = layout.split()
        group, *shape = map(int, numbers)
        return cls(format, data, scales, zeros, tuple(shape), group)

    def get_extra_state(self) -> Tensor:
        """Return the layout as bytes, which safetensors takes: formats of 8 bits have the same shapes and dtypes."""
        return torch.tensor(list(self.layout.encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Any) -> None:
        layout = bytes(state.tolist()).decode(errors="replace")
        if layout != self.layout:
            got, need = f"of format, group and shape {layout!r:.80}", f"{self.layout!r}, this weight's"
            raise ValueError(f"QuantizedWeight: the state is {got}, needs {need}")

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:  # torch sets it after the tensors
            self.set_extra_state(state)
        for name, tensor in self._buffers.items():
            part = state_dict.get(f"{prefix}{name}")
            if tensor is not None and part is not None and part.dtype != tensor.dtype:  # a copy would round scales
                raise ValueError(f"QuantizedWeight: the state's {name} are {part.dtype}, needs {tensor.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    @property
    def spec(self) -> QuantSpec:
        return QuantSpec(self.format, self.group, self.scales.dtype, self.zeros is not None)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice) -> QuantizedWeight:
        """Return views of one expert, or of a slice of the first dimension."""
        data, zeros = self.data[index], None if self.zeros is None else self.zeros[index]
        shape = (*data.shape[:-1], self.shape[-1])
        return type(self)(self.format, data, self.scales[index], zeros, shape, self.group)

    @property
    def takes_fp8_activations(self) -> bool:
        """Whether `with_fp8_activations` has a view."""
        return stored_format(self.format) == "fp8" and self.group == self.shape[-1]

    def with_fp8_activations(self) -> QuantizedWeight:
        """Return the view of this weight whose products quantize x to e4m3, one scale a row: it has the same tensors,
        later ones, too, and is no part of a state. ValueError unless this is fp8 with one scale a row."""
        view = self.__dict__.get("_fp8_view")
        if view is None:
            if not self.takes_fp8_activations:
                got = f"a weight of {self.format} in groups of {self.group} columns"
                raise ValueError(f"with_fp8_activations: got {got}, needs fp8 with one scale a row")
            view = object.__new__(type(self))
            view.__dict__.update(self.__dict__, format=W8A8)  # buffers included: the dict, so that both change together
            self.__dict__["_fp8_view"] = view  # `setattr` would make it a submodule
        return view  # type: ignore[no-any-return]

    def values(self) -> Tensor:
        """Return code - zero in fp32, [(E,) N, K]: the weight without its scales."""
        codes = unpack(self.data.to(self.device), self.format, self.shape[-1], self.group)
        if stored_format(self.format) == "fp8":
            return codes.view(torch.float8_e4m3fn).float()
        if self.format == "int8":
            return codes.view(torch.int8).float()
        codes = codes.unflatten(-1, (-1, self.group))
        return codes.float().sub_(ZERO_INT4 if self.zeros is None else self.zeros.float()[..., None] - 128).flatten(-2)

    def dequantize(self) -> Tensor:
        """Return the exact weight in fp32, [(E,) N, K]."""
        values = self.values().unflatten(-1, (-1, self.group))
        return values.mul_(self.scales.float()[..., None]).flatten(-2)

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> x @ weight.T [..., N] for a weight [N, K], in plain torch.

        Dequantizes exactly in fp32 and rounds to x's dtype. "fp8_w8a8" multiplies the codes of x and of the weight in
        fp32 (fp64 where x is), then by the scales of both, and rounds once.
        """
        if self.format == W8A8:
            codes, scales = encode_rows(x)
            dtype = x.dtype if x.dtype == torch.float64 else torch.float32
            products = nn.functional.linear(codes.to(dtype), self.values().to(dtype))
            return (products * scales * self.scales.float().squeeze(-1)).to(x.dtype)
        return nn.functional.linear(x, self.dequantize().to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.shape)}, group {self.group}"


def with_fp8_activations(weight: Any) -> Any:
    """Return the view of an fp8 weight with one scale a row whose products quantize activations; others as they are."""
    quantizes = isinstance(weight, QuantizedWeight) and weight.takes_fp8_activations
    return weight.with_fp8_activations() if quantizes else weight


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
        if not isinstance(format, str) or format not in BITS:
            raise ValueError(f"quantize: format is {format!r}, needs one of {', '.join(BITS)}")
        groups = GROUPS if format == "int4" else (K,)
        if not (sizes := [size for size in groups if K % size == 0 and group in (None, size)]):
            needs = f"groups of {' or '.join(map(str, groups))} that divide {K} columns"
            raise ValueError(f"quantize: group is {group!r}, {format} needs {needs}; int8 and fp8 take whole rows")
        return cls(format, sizes[0], SCALES[format])

    def empty(
        self, shape: tuple[int, ...], device: Any, kind: type[QuantizedWeight] = QuantizedWeight
    ) -> QuantizedWeight:
        """Return a weight of `shape` with unset values."""
        *lead, K = shape
        data = torch.empty(*lead, row_elements(self.format, K, self.group), dtype=torch.int16, device=device)
        scales = torch.empty(*lead, K // self.group, dtype=self.scales, device=device)
        zeros = torch.empty_like(scales, dtype=torch.bfloat16) if self.zeros else None
        return kind(self.format, data, scales, zeros, tuple(shape), self.group)
