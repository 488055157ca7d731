"""QuantizedWeight: a weight in 4 or 8 bits, in a layout that kernels stream (packing.py), of a format (formats.py).

E experts (or none), N rows, K columns: the depth of the sum; G groups of columns that share a scale
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .formats import BITS, FORMATS, multiplies_codes
from .packing import Format

SCALES = torch.float32, torch.bfloat16, torch.float16  # dtypes


class QuantizedWeight(nn.Module):
    """Stored: a weight [E, N, K] or [N, K]: value = (code - zero) * scale, in fp32.

    format  the name of one of FORMATS, which say what a code is
    data    int16 [(E,) N, K' * bits / 16], see `Format.pack`
    scales  [(E,) N, G], as stored: never rounded
    zeros   bf16 [(E,) N, G], 128 + zero, of a format that has them; None: the format's zero everywhere
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
        if self.format not in FORMATS:
            raise ValueError(f"QuantizedWeight: format is {self.format!r}, needs one of {', '.join(BITS)}")
        groups = self.kind.stored_groups
        if self.group != K and not (self.group in groups and K % self.group == 0):
            needs = f"{' or '.join(map(str, groups))} that divide {K}, or {K}" if groups else f"{K}: one scale a row"
            raise ValueError(f"QuantizedWeight: group is {self.group}, {self.format} needs {needs}")
        scales, elements = (*lead, K // self.group), (*lead, self.kind.row_elements(K, self.group))
        zeros = (torch.bfloat16,) if self.kind.has_zeros else ()
        of_scales = tuple(dict.fromkeys((*SCALES, self.kind.scale_dtype)))
        needed = {
            "data": (elements, (torch.int16,)),
            "scales": (scales, of_scales),
            "zeros": (scales, zeros),
        }
        for name, (shape, dtypes) in needed.items():
            x = getattr(self, name)
            if x is not None and (tuple(x.shape) != shape or x.dtype not in dtypes):
                got, needs = f"{x.dtype} {list(x.shape)}", f"{' or '.join(map(str, dtypes)) or None} {list(shape)}"
                raise ValueError(f"QuantizedWeight: {name} of {self.format} are {got}, need {needs}")

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        """Move and never convert: a rounded scale would change the weight."""
        for name, tensor in self._buffers.items():
            if tensor is not None:
                moved = fn(tensor)
                self._buffers[name] = moved if moved.dtype == tensor.dtype else tensor.to(moved.device)
        return self

    @property
    def name(self) -> str:
        """Format and group: "FORMAT:GROUP"; "FORMAT" where a row has one scale."""
        return self.format if self.group == self.shape[-1] else f"{self.format}:{self.group}"

    def fault(self) -> str | None:
        """Return what a kernel could not read: nothing, since `_check` has refused it."""
        return None

    @property
    def kind(self) -> Format:
        return FORMATS[self.format]

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides a launch and `tensors` do not show."""
        return self.format, self.group, self.shape

    @property
    def tensors(self) -> tuple[Any, ...]:
        """data, as kernels read it, scales, zeros or None."""
        tensors: tuple[Any, ...] = tuple(self._buffers.values())  # an attribute of a module is read more slowly
        if multiplies_codes(self.format) and tensors[0].dtype == torch.int16:  # else addresses
            return self.kind.elements(tensors[0]), *tensors[1:]
        return tensors

    value_dtype: torch.dtype | None = None  # which must be that of x; None: of any
    first_part = "data"  # which takes the argument's place in torch's operator

    @property
    def device(self) -> torch.device:
        return self.scales.device  # data may be that of one expert in host memory

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

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:  # torch sets it after the tensors
            self.set_extra_state(state)
        for name, tensor in self._buffers.items():
            part = state_dict.get(f"{prefix}{name}")
            if tensor is not None and part is not None and part.dtype != tensor.dtype:  # a copy would round scales
                raise ValueError(f"QuantizedWeight: the state's {name} are {part.dtype}, needs {tensor.dtype}")
        super()._load_from_state_dict(state_dict, prefix, *args)

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

    def viewed_as(self, format: str) -> QuantizedWeight:
        """Return the view of this weight in another format of the same codes, made once: it has the same tensors, later
        ones, too, and is no part of a state."""
        view = self.__dict__.get("_view")
        if view is None:
            view = object.__new__(type(self))
            view.__dict__.update(self.__dict__, format=format)  # buffers included: the dict, so both change together
            self.__dict__["_view"] = view  # `setattr` would make it a submodule
        return view  # type: ignore[no-any-return]

    @property
    def codes(self) -> Tensor:
        """The codes, uint8 [(E,) N, K]."""
        return self.kind.unpack(self.data.to(self.device), self.shape[-1], self.group)

    def values(self) -> Tensor:
        """Return code - zero in fp32, [(E,) N, K]: the weight without its scales."""
        zeros = None if self.zeros is None else self.zeros.float()[..., None] - 128
        return self.kind.values(self.codes.unflatten(-1, (-1, self.group)), zeros).flatten(-2)

    def dequantize(self) -> Tensor:
        """Return the exact weight in fp32, [(E,) N, K]."""
        values = self.values().unflatten(-1, (-1, self.group))
        return values.mul_(self.scales.float()[..., None]).flatten(-2)

    def product(self, x: Tensor) -> Tensor:
        """x [..., K] -> x @ weight.T [..., N] for a weight [N, K], in plain torch."""
        return self.kind.product(x, self)

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.shape)}, group {self.group}"


@dataclass(frozen=True)
class QuantSpec:
    """Stored: how a QuantizedWeight is: format, columns of a group (K: one scale per row), dtype of scales, zeros."""

    format: str
    group: int
    scales: torch.dtype
    zeros: bool = False

    @classmethod
    def default_for(cls, format: str, K: int, group: int | None = None) -> QuantSpec:
        """Return what `quantize` produces."""
        if not isinstance(format, str) or format not in BITS:
            raise ValueError(f"quantize: format is {format!r}, needs one of {', '.join(BITS)}")
        groups = FORMATS[format].groups or (K,)
        if not (sizes := [size for size in groups if K % size == 0 and group in (None, size)]):
            needs = f"groups of {' or '.join(map(str, groups))} that divide {K} columns"
            whole = " and ".join(name for name in BITS if not FORMATS[name].groups)
            raise ValueError(f"quantize: group is {group!r}, {format} needs {needs}; {whole} take whole rows")
        return cls(format, sizes[0], FORMATS[format].scale_dtype)

    def empty(self, shape: tuple[int, ...], device: Any) -> QuantizedWeight:
        """Return a weight of `shape` with unset values."""
        *lead, K = shape
        data = torch.empty(*lead, FORMATS[self.format].row_elements(K, self.group), dtype=torch.int16, device=device)
        scales = torch.empty(*lead, K // self.group, dtype=self.scales, device=device)
        zeros = torch.empty_like(scales, dtype=torch.bfloat16) if self.zeros else None
        return QuantizedWeight(self.format, data, scales, zeros, tuple(shape), self.group)
