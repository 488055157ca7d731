"""Bind shape letters to sizes, or raise a ValueError that names the operation, the argument, what it got and needs.

What an argument has to be stands beside it, in the signature of an operation's `run`:

    x: Annotated[Tensor, "T H"]               floats; the first such tensor sets the dtype of all that name no other
    w: Annotated[Tensor, "E 2*I H"]           a size may be an expression of others
    ids: Annotated[Tensor, "T K", INTS, Within(0, "E - 1")]   of these dtypes; each element within the bounds
    top_k: Annotated[int, "K", Within(1, "E")]                a number that is a size
    eps: Annotated[float, Above(0.0)]
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any

import torch
from torch import Tensor

from .quantized import QuantizedWeight

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
SINGLE = (torch.float32,)
INTS = (torch.int32, torch.int64)
INT32 = (torch.int32,)
MAY_BE_EMPTY = {"B", "T", "S", "P"}  # a call without tokens is a call; a model without experts is none

Matrix = Tensor | QuantizedWeight

# An argument's name, its values, the least and the most that they may be.
Range = tuple[str, Tensor, int, int]


@dataclass(frozen=True)
class Within:
    """A number, or each element of a tensor, is at least `low` and at most `high`: a number, or an expression of sizes
    and of other arguments."""

    low: int
    high: int | str


@dataclass(frozen=True)
class Above:
    """A finite number greater than `low`."""

    low: float


@dataclass(frozen=True)
class Argument:
    """One argument of an operation, read from its annotation."""

    name: str
    kind: Any  # Tensor, Matrix, bool, int, float, or anything else, which is not checked
    optional: bool
    letters: str  # none: not checked
    dtypes: Sequence[torch.dtype] | None  # None: those of the first float tensor
    rule: Within | Above | None

    @property
    def tensor(self) -> bool:
        return bool(self.letters) and self.kind in (Tensor, Matrix)


def fail(op: str, argument: str, got: Any, needs: str) -> ValueError:
    return ValueError(f"{op}: argument '{argument}' is {got}, needs {needs}")


def dtype_name(dtype: torch.dtype) -> str:
    """As people say it: "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def _names(dtypes: Sequence[torch.dtype]) -> str:
    return " or ".join(map(dtype_name, dtypes))


@cache
def _parse(letters: str) -> tuple[bool, tuple[str, ...]]:
    """Whether any leading dimensions may stand before, and a letter or an expression for each of the others."""
    parts = letters.split()
    leading = parts[0] == "..."
    return leading, tuple(parts[leading:])


@cache
def _code(expression: str) -> CodeType:
    return compile(expression, expression, "eval")


def evaluate(expression: int | str, sizes: Mapping[str, Any]) -> Any:
    """A number as it is; "E - 1", "2*I" by the sizes."""
    return eval(_code(expression), {}, sizes) if isinstance(expression, str) else expression  # type: ignore[arg-type]


def shape_of(letters: str, sizes: Mapping[str, Any]) -> tuple[int, ...]:
    """The shape that `letters` stand for: "... N", "T*K"."""
    leading, parts = _parse(letters)
    return (*(sizes["..."] if leading else ()), *(evaluate(part, sizes) for part in parts))


class Binder:
    """Checks the arguments of one call: the first tensor fixes the device, the first use of a letter its size."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, Any] = {}
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None  # of the floats

    def bind(self, arguments: Iterable[Argument], values: Mapping[str, Any]) -> None:
        """All arguments: tensors of plain letters, then those whose shapes follow from them, then numbers."""
        given = [argument for argument in arguments if values[argument.name] is not None or not argument.optional]
        tensors = [argument for argument in given if argument.tensor]
        follow = [a for a in tensors if not all(part.isidentifier() for part in _parse(a.letters)[1])]
        for argument in (*(a for a in tensors if a not in follow), *follow):
            self.tensor(argument, values[argument.name])
        for argument in given:
            if not argument.tensor:
                self.number(argument, values[argument.name], values)

    def tensor(self, argument: Argument, value: Any) -> None:
        name, letters = argument.name, argument.letters
        quantized = argument.kind == Matrix and isinstance(value, QuantizedWeight)
        if not isinstance(value, Tensor) and not quantized:
            raise fail(self.op, name, f"a {type(value).__name__}", f"a tensor [{letters}]")
        dtypes = argument.dtypes or (FLOATS if self.dtype is None else (self.dtype,))
        if not quantized and value.dtype not in dtypes:
            raise fail(self.op, name, _names([value.dtype]), _names(dtypes))
        if argument.dtypes is None and not quantized:
            self.dtype = value.dtype
        self.device = self.device or value.device
        if value.device != self.device:
            raise fail(self.op, name, f"on {value.device}", f"to be on {self.device}, as the first argument is")
        self._shape(name, value.shape, letters)

    def _shape(self, name: str, whole: torch.Size, letters: str) -> None:
        leading, wanted = _parse(letters)
        got, at = f"of shape {list(whole)}", len(whole) - len(wanted)
        good = at >= 0 if leading else at == 0
        if good and leading:
            good = self.sizes.setdefault("...", whole[:at]) == whole[:at]
        for letter, size in zip(wanted, whole[max(at, 0) :], strict=False):
            need = self.sizes.setdefault(letter, size) if letter.isidentifier() else evaluate(letter, self.sizes)
            good = good and need == size
        if not good:
            raise fail(self.op, name, got, f"[{letters}]{self._known(letters)}")
        for letter in wanted:
            if letter.isidentifier() and letter not in MAY_BE_EMPTY and self.sizes[letter] < 1:
                raise fail(self.op, name, got, f"[{letters}] with {letter} of at least 1")

    def _known(self, letters: str) -> str:
        named = re.findall(r"\w+|\.\.\.", letters)
        known = [(key, size) for key, size in self.sizes.items() if key in named]
        told = [f"{key} = {list(size) if key == '...' else size}" for key, size in known]
        return f" with {', '.join(told)}" if told else ""

    def number(self, argument: Argument, value: Any, values: Mapping[str, Any]) -> None:
        name, rule = argument.name, argument.rule
        if argument.kind is bool:
            boolean(self.op, name, value)
        elif argument.kind is float:
            number(self.op, name, value, above=rule.low if isinstance(rule, Above) else -math.inf)
        elif isinstance(rule, Within):
            integer(self.op, name, value, rule.low, evaluate(rule.high, {**values, **self.sizes}))
            if argument.letters:
                self.sizes[argument.letters] = value


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
