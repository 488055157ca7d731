"""The signature of an operation's `run`, read: what each argument has to be, and how torch's dispatcher takes it.

A quantized weight is several tensors, and an operator of torch takes tensors: its codes stand in the place of the
weight, its scales, its zeros and its layout behind all other arguments.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Annotated, Any

import torch
from torch import Tensor

from .checks import Above, Argument, Matrix, Within
from .quantized import QuantizedWeight

_PARTS = (("scales", Tensor), ("zeros", Tensor), ("layout", str))


def argument(name: str, hint: Any) -> Argument:
    kind, optional = _required(hint)
    notes: list[Any] = []
    if typing.get_origin(kind) is Annotated:
        kind, *notes = typing.get_args(kind)
        kind, inner = _required(kind)
        optional = optional or inner
    letters = next((note for note in notes if isinstance(note, str)), "")
    dtypes = next((note for note in notes if isinstance(note, tuple)), None)
    rule = next((note for note in notes if isinstance(note, (Within, Above))), None)
    return Argument(name, kind, optional, letters, dtypes, rule)


def _required(kind: Any) -> tuple[Any, bool]:
    """`X | None` -> X, True."""
    parts = [part for part in typing.get_args(kind) if part is not type(None)]
    optional = typing.get_origin(kind) in (UnionType, typing.Union) and len(parts) == 1
    return (parts[0], True) if optional else (kind, False)


def schema(run: Callable[..., Any], arguments: Sequence[Argument], results: int, mutates: Sequence[str]) -> str:
    """Of the operator."""
    parameters = []
    for one, parameter in zip(arguments, inspect.signature(run).parameters.values(), strict=True):
        kind = Tensor if one.kind == Matrix else one.kind
        parameters.append(parameter.replace(annotation=kind | None if one.optional else kind))
    for one in arguments:
        for part, kind in _PARTS if one.kind == Matrix else ():
            more = inspect.Parameter(f"{one.name}_{part}", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
            parameters.append(more.replace(annotation=kind | None))
    returned = {0: None, 1: Tensor}.get(results, tuple[(Tensor,) * results])  # type: ignore[misc]

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(parameters, return_annotation=returned)  # type: ignore[attr-defined]
    return torch.library.infer_schema(prototype, mutates_args=mutates)


def flatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """All arguments of `run` as those of the operator."""
    own, parts = list(args), []
    for place, (one, x) in enumerate(zip(arguments, args, strict=True)):
        if isinstance(x, QuantizedWeight):
            own[place] = x.data
        if one.kind == Matrix:
            parts += (x.scales, x.zeros, x.layout) if isinstance(x, QuantizedWeight) else (None, None, None)
    return (*own, *parts)


def unflatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of the operator as those of `run`."""
    own, parts = list(args[: len(arguments)]), args[len(arguments) :]
    weights = [place for place, one in enumerate(arguments) if one.kind == Matrix]
    for at, place in enumerate(weights[: len(parts) // len(_PARTS)]):
        scales, zeros, layout = parts[len(_PARTS) * at : len(_PARTS) * (at + 1)]
        if layout is not None:
            own[place] = QuantizedWeight.of(own[place], scales, zeros, layout)
    return tuple(own)
