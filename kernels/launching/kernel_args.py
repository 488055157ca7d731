"""Kernel arguments of several values: NamedTuples that the host fills and kernels read.

A NamedTuple of tensors, numbers and None is one parameter of a kernel. Triton specializes its integers as it does
parameters (1, multiples of 16), and `do_not_specialize` reaches none of them: what changes from call to call, as a
number of tokens, stays a parameter of its own. So do TMA descriptors, which Triton 3.6 and 3.7 find nowhere else.
A kernel asks whether a NamedTuple is None only of those without a None inside, which Triton 3.6 cannot compare.

B batch, T tokens or rows, H columns, D head size, E experts, N slots (token, expert)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor

Pointer = Any  # a tensor on the host, a pointer on the device
ALIGNMENT = 16  # bytes: what a kernel assumes of an address in a table


class Rows(NamedTuple):
    ptr: Pointer  # [T, H] values or codes, the columns contiguous
    stride: int  # between rows
    scales: Pointer = None  # [T] fp32 of codes; None: values

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        x = dense_rows(x)
        return cls(x, x.stride(0))


class Groups(NamedTuple):
    """The slots of each expert, as `sort_by_expert` returns them."""

    order: Pointer  # [N] sorted slots
    offsets: Pointer  # [E + 1] groups in `order`
    E: int


class Heads(NamedTuple):
    """Queries, keys or values."""

    ptr: Pointer  # [B, T, heads, D], the last dimension contiguous
    stride_b: int
    stride_t: int
    stride_h: int

    @classmethod
    def of(cls, x: Tensor) -> Heads:
        x = dense_rows(x)
        return cls(x, x.stride(0), x.stride(1), x.stride(2))


def dense_rows(x: Tensor) -> Tensor:
    """Return `x` with a contiguous last dimension, which kernels rely on: itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def flatten(args: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the arguments by path, those of a NamedTuple one by one: "weight.scales"."""
    for name, value in args.items():
        if hasattr(value, "_fields"):
            yield from ((f"{name}.{path}", part) for path, part in flatten(value._asdict()))
        else:
            yield name, value
