"""Bind shape letters to sizes, or raise a ValueError that names the operation, the argument, what it got and needs.

The annotations of an operation's `run` say what each argument must be:

    x: Annotated[Tensor, "T H"]               floats; the first such tensor sets the dtype of all that name no other
    w: Annotated[Tensor, "E 2*I H"]           a size may be an expression of others
    ids: Annotated[Tensor, "T K", INTS, Within(0, "E - 1")]   of these dtypes; each element within the bounds
    top_k: Annotated[int, "K", Within(1, "E")]                a number that is a size
    eps: float                                                finite and above 0; with bounds it may be 0
"""

from __future__ import annotations

import math
import re
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import CodeType, UnionType
from typing import Annotated, Any

import torch
from torch import Tensor

from ..weights.composite_args import COMPOSITES, Cache, Matrix

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP32 = (torch.float32,)
INTS = (torch.int32, torch.int64)
INT32 = (torch.int32,)
MAY_BE_EMPTY = {"B", "T", "S", "P"}  # a call without tokens is a call; a model without experts is none

# Annotations that operations share.
Tokens = Annotated[Tensor, "T H"]
RoutingWeights = Annotated[Tensor, "T K", FP32]
SlotWeights = Annotated[Tensor, "T K", (torch.float32, None)]


@dataclass(frozen=True)
class Within:
    """Bounds of a number, or of each element of a tensor; `high` may be an expression of sizes and other arguments."""

    low: int
    high: int | str


@dataclass(frozen=True)
class Argument:
    """One argument of an operation, read from its annotation."""

    name: str
    kind: Any  # Tensor, Matrix, Cache, bool, int, float; anything else is not checked
    optional: bool
    shape_spec: str  # letters and expressions; empty: not checked
    dtypes: Sequence[Any] | None  # None, also as one of them: the dtype of the first float tensor
    rule: Within | None

    @property
    def tensor(self) -> bool:
        return bool(self.shape_spec) and self.kind in (Tensor, Matrix, Cache)

    @classmethod
    def parse(cls, name: str, hint: Any) -> Argument:
        """Read an annotation such as `Annotated[Tensor, "T H", INTS, Within(0, "E - 1")] | None`."""
        parts = [part for part in typing.get_args(hint) if part is not type(None)]
        optional = typing.get_origin(hint) in (UnionType, typing.Union) and len(parts) == 1
        kind, notes = parts[0] if optional else hint, list[Any]()
        if typing.get_origin(kind) is Annotated:
            kind, *notes = typing.get_args(kind)
        spec = next((note for note in notes if isinstance(note, str)), "")
        dtypes = next((note for note in notes if isinstance(note, tuple)), None)
        rule = next((note for note in notes if isinstance(note, Within)), None)
        return cls(name, kind, optional, spec, dtypes, rule)


def fail(op: str, argument: str, got: Any, needs: str) -> ValueError:
    return ValueError(f"{op}: argument '{argument}' is {got}, needs {needs}")


def dtype_name(dtype: torch.dtype) -> str:
    """Return the dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")


SIZED = re.compile(r"(?:(\d+)\*)?([^\W\d]\w*)")  # a letter, or a multiple of one: the first use of it gives its size


@cache
def _parse(spec: str) -> tuple[bool, tuple[str, ...]]:
    """Return whether leading dimensions are free ("..."), and a letter or an expression for each of the others."""
    parts = spec.split()
    leading = parts[0] == "..."
    return leading, tuple(parts[leading:])


@cache
def _code(expression: str) -> CodeType:
    return compile(expression, expression, "eval")


def evaluate(expression: int | str, sizes: Mapping[str, Any]) -> Any:
    """Return a number as it is, and an expression such as "E - 1" or "2*I" with `sizes` put in."""
    return eval(_code(expression), {}, sizes) if isinstance(expression, str) else expression  # type: ignore[arg-type]


def shape_of(spec: str, sizes: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the shape that a spec such as "... N" or "T*K" stands for."""
    leading, parts = _parse(spec)
    return (*(sizes["..."] if leading else ()), *(evaluate(part, sizes) for part in parts))


class Binder:
    """Checks the arguments of one call: the first tensor fixes the device, the first use of a letter its size."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.sizes: dict[str, Any] = {}
        self.origins: dict[str, tuple[str, torch.Size]] = {}  # the argument that has a letter first, and its shape
        self.device: torch.device | None = None
        self.dtype: torch.dtype | None = None  # of the floats
        self.may_be_empty = set(MAY_BE_EMPTY)

    def bind(self, arguments: Iterable[Argument], values: Mapping[str, Any]) -> None:
        """Check the tensors in order, then shapes of letters and their multiples, those that are other expressions of
        them, and numbers."""
        present = [argument for argument in arguments if values[argument.name] is not None or not argument.optional]
        tensors = [argument for argument in present if argument.tensor]
        for first in tensors[:1]:
            self.may_be_empty |= {*first.shape_spec.split()[:1]}  # the rows, whatever an operation calls them
        for argument in tensors:
            self.bind_tensor(argument, values[argument.name])
        for derived in (False, True):
            for argument in tensors:
                if derived != all(SIZED.fullmatch(part) for part in _parse(argument.shape_spec)[1]):
                    self._bind_shape(argument.name, values[argument.name].shape, argument.shape_spec)
        for argument in present:
            if not argument.tensor:
                self.bind_number(argument, values[argument.name], values)

    def bind_tensor(self, argument: Argument, value: Any) -> None:
        name, spec = argument.name, argument.shape_spec
        if not isinstance(value, argument.kind):
            raise fail(self.op, name, f"a {type(value).__name__}", f"a tensor [{spec}]")
        dtype = value.value_dtype if isinstance(value, COMPOSITES) else value.dtype  # None: of a composite with codes
        dtypes: dict[Any, None] = {
            known or self.dtype: None for known in argument.dtypes or ((None,) if self.dtype else FLOATS)
        }
        if dtype is not None and dtype not in dtypes:
            raise fail(self.op, name, dtype_name(dtype), " or ".join(map(dtype_name, dtypes)))
        if argument.dtypes is None and dtype is not None:
            self.dtype = dtype
        self.device = self.device or value.device
        if isinstance(value, COMPOSITES) and (fault := value.fault()):
            raise ValueError(f"{self.op}: argument '{name}' is {fault}")
        if isinstance(value, Tensor) and value.layout != torch.strided:
            raise fail(self.op, name, f"of layout {value.layout}", "a strided tensor")
        if value.device != self.device:
            raise fail(self.op, name, f"on {value.device}", f"to be on {self.device}, as the first argument is")

    def _bind_shape(self, name: str, shape: torch.Size, spec: str) -> None:
        leading, parts = _parse(spec)
        got, extra = f"of shape {list(shape)}", len(shape) - len(parts)
        fits = extra >= 0 if leading else extra == 0
        if fits and leading:
            fits = self.sizes.setdefault("...", shape[:extra]) == shape[:extra]
        for part, size in zip(parts, shape[max(extra, 0) :], strict=False):
            try:
                if (multiple := SIZED.fullmatch(part)) and multiple[2] not in self.sizes:
                    self.sizes[multiple[2]] = size // int(multiple[1]) if multiple[1] else size
                    self.origins[multiple[2]] = name, shape
                need = evaluate(part, self.sizes)
            except NameError as error:  # a mistake in the annotations
                raise fail(self.op, name, f"[{spec}]", f"a tensor argument with {error.name} alone") from error
            fits = fits and need == size
        if not fits:
            raise fail(self.op, name, got, f"[{spec}]{self._known_sizes(name, spec)}")
        for part in parts:
            if part.isidentifier() and part not in self.may_be_empty and self.sizes[part] < 1:
                raise fail(self.op, name, got, f"[{spec}] with {part} of at least 1")

    def _known_sizes(self, argument: str, spec: str) -> str:
        letters = [letter for letter in self.sizes if letter in re.findall(r"\w+|\.\.\.", spec)]
        sizes = (list(self.sizes[letter]) if letter == "..." else self.sizes[letter] for letter in letters)
        text = ", ".join(f"{letter} = {size}" for letter, size in zip(letters, sizes, strict=True))
        origins = dict.fromkeys(self.origins[letter] for letter in letters if letter in self.origins)
        by = " and ".join(f"'{name}' {list(shape)}" for name, shape in origins if name != argument)
        return (text and f" with {text}") + (by and f" by {by}")

    def bind_number(self, argument: Argument, value: Any, values: Mapping[str, Any]) -> None:
        if argument.kind is bool:
            fits, needs = isinstance(value, bool), "True or False"
        elif argument.kind is float:
            zero = argument.rule is not None  # may be 0
            fits = isinstance(value, (int, float)) and (0 < value < math.inf or (zero and value == 0))
            needs = "a finite number, 0 or above" if zero else "a finite number above 0"
            fits = fits and not isinstance(value, bool) and (isinstance(value, float) or value < 1 << 63)
        elif argument.rule is not None:
            low, high = argument.rule.low, evaluate(argument.rule.high, {**values, **self.sizes})
            fits = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and low <= value <= high
            needs = f"an integer in {low}..{high}"
        else:
            return
        if not fits:
            raise fail(self.op, argument.name, repr(value), needs)
        if argument.shape_spec:
            self.sizes[argument.shape_spec] = value


def readable(x: Tensor) -> bool:
    """Return whether the host may read values: only on a CPU, outside a trace.

    On a GPU a read would stall the stream, so kernels mask what is out of range. A subclass has values unless it
    dispatches torch's operations itself, as a fake tensor does.
    """
    has_values = type(x).__torch_dispatch__ is Tensor.__torch_dispatch__
    return x.device.type == "cpu" and has_values and not torch.compiler.is_compiling()


def check_values(op: str, name: str, value: Tensor, low: int, high: int) -> None:
    """Raise ValueError where a readable tensor holds a value outside low..high."""
    if value.numel() == 0 or not readable(value):
        return
    least, greatest = (int(v) for v in torch.aminmax(value))
    if least < low or greatest > high:
        raise fail(op, name, f"from {least} to {greatest}", f"values in {low}..{high}")
