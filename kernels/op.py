"""What an operation declares about itself: one entry in the registry serves tests, compile, bench and verify."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Cost:
    """Compulsory work: floating-point operations, and bytes that must cross device memory at least once."""

    flops: int
    bytes: int


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched: its tile constants, warps a program and software pipeline stages."""

    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """One device kernel as `record_launches` saw it.

    `grid`, `num_warps` and `num_stages` are None for torch's own kernels. `fn` and `args`, the jitted function and its
    run-time arguments by name, are what the offline compiler needs to build the same kernel without a GPU.
    """

    kernel: str
    grid: tuple[int, ...] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    fn: Any = field(default=None, repr=False, compare=False)
    args: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


@dataclass(frozen=True)
class Op:
    """A fused operation.

    name         its name in `mixtral_triton.ops` and in `torch.ops.mixtral_triton`
    check        check(*args) -> Sizes; raises the ValueError of `checks` on a bad shape, dtype, device or number
    ranges       ranges(*args) -> (argument, integer tensor, least, most) for values that have to lie in a range
    run          the Triton way; arguments already checked
    reference    the same in plain torch
    empty        empty(*args) -> tensors of the right shape and dtype (the fake kernel)
    inputs       inputs(sizes, dtype, device, generator) -> keyword arguments of `run`
    configs      configs(sizes, dtype, arch) -> LaunchConfig by kernel name; pure functions of the sizes
    cost         cost(sizes, dtype) -> Cost
    test_shapes  sizes that the interpreted tests run; bench_shapes: Mixtral 8x7B, compiled offline and timed
    mutates      arguments that the operation writes into
    follows      follows(arguments, results) -> what the results after the first one have to be exactly, given the first
    """

    name: str
    check: Callable[..., Sizes]
    run: Callable[..., Any]
    reference: Callable[..., Any]
    empty: Callable[..., Any]
    inputs: Callable[..., dict[str, Any]]
    configs: Callable[[Sizes, torch.dtype, str], dict[str, LaunchConfig]]
    cost: Callable[[Sizes, torch.dtype], Cost]
    test_shapes: tuple[Sizes, ...]
    bench_shapes: tuple[Sizes, ...]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    mutates: tuple[str, ...] = ()
    ranges: Callable[..., Iterable[tuple[str, torch.Tensor, int, int]]] | None = None
    follows: Callable[[Any, Any], Any] | None = None


def sample(
    *shape: int,
    dtype: torch.dtype,
    device: torch.device | str,
    generator: torch.Generator | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """Normal values for `Op.inputs`, the same on every device; on the meta device a shape only."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """`x` itself where its last dimension is contiguous, which kernels rely on; else a contiguous copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def power_of_2(n: int, low: int = 1, high: int = 1 << 30) -> int:
    """The least power of two that is at least n, clamped to low..high (powers of two themselves)."""
    return max(low, min(high, 1 << max(0, n - 1).bit_length()))
