"""Bind shape letters to sizes, or raise a ValueError that names the operation, the argument, what it got and needs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTS = (torch.int32, torch.int64)

# An argument's name, its values, the least and the most that they may be.
Range = tuple[str, Tensor, int, int]


def fail(op: str, argument: str, got: Any, needs: str) -> ValueError:
    return ValueError(f"{op}: argument '{argument}' is {got}, needs {needs}")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@cache
def _parse(letters: str) -> tuple[bool, tuple[str | int, ...]]:
    """Whether any leading dimensions may stand before, and the letters or fixed sizes."""
    parts = letters.split()
    leading = parts[0] == "..."
    return leading, tuple(int(part) if part.isdigit() else part for part in parts[leading:])


class Binder:
    """Checks the arguments of one call: the first tensor fixes the device, the first use of a letter its size."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, int] = {}
        self.shapes: dict[str, tuple[str, str]] = {}  # the shape letters of an argument -> its name, its shape
        self.device: torch.device | None = None

    def tensor(self, name: str, value: Any, letters: str, dtypes: Sequence[torch.dtype]) -> None:
        """`letters` like "B T Hq D" or "... H"; a number is a fixed size; `dtypes` are the allowed ones."""
        if not isinstance(value, Tensor):
            raise fail(self.op, name, f"a {type(value).__name__}", f"a tensor [{letters}]")
        if value.dtype not in dtypes:
            raise fail(self.op, name, _names([value.dtype]), _names(dtypes))
        self.device = self.device or value.device
        if value.device != self.device:
            raise fail(self.op, name, f"on {value.device}", f"to be on {self.device}, as the first argument is")
        self._shape(name, value, letters)

    def _shape(self, name: str, value: Tensor, letters: str) -> None:
        leading, wanted = _parse(letters)
        self.shapes.setdefault(letters, (name, str(list(value.shape))))
        shape = value.shape[-len(wanted) :] if leading else value.shape
        good = len(shape) == len(wanted)
        if good:
            for letter, size in zip(wanted, shape, strict=True):
                need = letter if isinstance(letter, int) else self.sizes.setdefault(letter, size)
                good = good and need == size
        if not good:
            known = ", ".join(f"{key} = {self.sizes[key]}" for key in wanted if key in self.sizes)
            raise fail(
                self.op, name, f"of shape {list(value.shape)}", f"[{letters}]" + (f" with {known}" if known else "")
            )

    def positive(self, *letters: str) -> None:
        for letter in letters:
            if self.sizes[letter] < 1:
                shape = next(letters for letters in self.shapes if letter in letters.split())
                name, got = self.shapes[shape]
                raise fail(self.op, name, f"of shape {got}", f"[{shape}] with {letter} of at least 1")


def number(op: str, name: str, value: Any, *, above: float = -math.inf) -> float:
    """A finite number greater than `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value) or value <= above:
        raise fail(op, name, repr(value), "a finite number" + ("" if above == -math.inf else f" above {above:g}"))
    return float(value)


def boolean(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise fail(op, name, repr(value), "True or False")
    return value


def integer(op: str, name: str, value: Any, low: int, high: int) -> int:
    """An integer in low..high; a compiler's, which stands for several, too."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)) or not low <= value <= high:
        raise fail(op, name, repr(value), f"an integer in {low}..{high}")
    return value


def readable(x: Tensor) -> bool:
    """Whether the host may look at values: on a CPU, where nothing waits for it. On a GPU a look would stall the
    stream, so kernels mask; in a trace there is nothing to see."""
    return x.device.type == "cpu" and type(x) is Tensor and not torch.compiler.is_compiling()


def in_range(op: str, name: str, value: Tensor, low: int, high: int) -> None:
    """Every element in low..high, where the host may look."""
    if value.numel() == 0 or not readable(value):
        return
    if value.numel() <= 64:  # where a step per element is quicker than two operators
        values = value.flatten().tolist()
        least, most = min(values), max(values)
    else:
        least, most = (int(v) for v in torch.aminmax(value))
    if least < low or most > high:
        raise fail(op, name, f"from {least} to {most}", f"values in {low}..{high}")
