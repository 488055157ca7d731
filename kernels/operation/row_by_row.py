"""The torch backend in deterministic mode: one token, or one sequence, at a time."""

from typing import Any

import torch
import torch.nn.functional as F

from .declaration import Op


def sequential(op: Op, args: tuple[Any, ...]) -> Any:
    """Run the reference for one token, or one sequence, at a time: its bits then do not depend on the batch."""
    values = op.bind_by_name(*args)
    first, letter = values[op.names[0]], op.arguments[0].shape_spec.split()[0]
    batched = {
        argument.name: values[argument.name].reshape(-1, first.shape[-1]) if letter == "..." else values[argument.name]
        for argument in op.arguments
        if argument.shape_spec.split()[:1] == [letter] and values[argument.name] is not None
    }
    parts = []
    for i in range(max(1, len(batched[op.names[0]]))):  # an empty batch runs once, for the results' shapes
        row = {**values, **{name: value[i : i + 1] for name, value in batched.items()}}
        if op.truncate_sequence is not None:
            row = op.truncate_sequence(row)
        # Copies: a library's order of a sum may depend on where in memory rows start.
        copies = {
            name: row[name].clone(memory_format=torch.contiguous_format) for name in batched if row[name] is not None
        }
        parts.append(op.call_reference(**row | copies))
        for name in op.mutates:
            row[name].copy_(copies[name])
    return _concatenate(parts, first.shape[:-1])


def _concatenate(parts: list[Any], shape: torch.Size) -> Any:
    """Join the parts of a batch to results of `shape`, the last dimension aside; pad shorter sequences with zeros."""
    if isinstance(parts[0], tuple):
        return tuple(_concatenate(list(same), shape) for same in zip(*parts, strict=True))
    if parts[0].dim() == 4:
        parts = [F.pad(part, (0, 0, 0, 0, 0, shape[1] - part.shape[1])) for part in parts]
    return torch.cat(parts).view(*shape, parts[0].shape[-1])
