"""An operation as torch's custom operator, whose arguments are tensors, numbers and texts."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..weights.composite_args import COMPOSITE_PARTS, Cache, Matrix, compose, first_part
from .checks import Argument
from .declaration import Op

TYPES = {Tensor: "Tensor", Matrix: "Tensor", Cache: "Tensor", bool: "bool", int: "SymInt", float: "float", str: "str"}
TYPES[tuple[int, int]] = "int[]"


def register(op: Op, run: Callable[[tuple[Any, ...]], Any]) -> Any:
    """Register `torch.ops.mixtral_triton.<name>`: its schema, `run` of all arguments, the fake kernel, the gradients.

    The schemas of `linear`, whose weight may be quantized, and of `append`, which writes into caches:

        (Tensor x, Tensor weight, bool deterministic=False, Tensor? weight_scales=None, Tensor? weight_zeros=None,
            str? weight_layout=None) -> Tensor
        (Tensor k, Tensor v, Tensor(a2!) k_cache, Tensor(a3!) v_cache, Tensor past, Tensor new,
            Tensor(a6!)? k_cache_scales=None, Tensor(a7!)? v_cache_scales=None) -> ()
    """

    def function(*args: Any) -> Any:
        return run(unflatten_args(op.arguments, args))

    def fake(*args: Any) -> Any:
        return op.empty(*unflatten_args(op.arguments, args))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise ValueError(f"mixtral_triton.ops.{op.name} is for inference only: it has no backward pass")

    caches = (argument.name for argument in op.arguments if argument.kind == Cache and argument.name in op.mutates)
    mutates = [*op.mutates, *(f"{name}_scales" for name in caches)]
    schema = schema_of(op, mutates)
    operator = torch.library.custom_op(f"mixtral_triton::{op.name}", function, mutates_args=mutates, schema=schema)
    operator.register_fake(fake)
    if mutates:
        _count_writes(operator._opoverload, operator._lib)
    else:
        gradients, setup_context = op.gradients or (backward, None)
        operator.register_autograd(gradients, setup_context=setup_context)
    return operator


def schema_of(op: Op, mutates: Sequence[str]) -> str:
    """Return the schema of torch's operator: the arguments of `run`, then the other parts of composite ones."""
    declared: list[str] = []

    def declare(name: str, kind: Any, optional: bool, default: Any) -> None:
        alias = f"(a{len(declared)}!)" if name in mutates else ""
        value = f'"{default}"' if isinstance(default, str) else default
        needed = default is parameter.empty
        declared.append(f"{TYPES[kind]}{alias}{'?' * optional} {name}" + ("" if needed else f"={value}"))

    for argument, parameter in zip(op.arguments, op.signature.parameters.values(), strict=True):
        declare(argument.name, argument.kind, argument.optional, parameter.default)
    for argument in op.arguments:
        for part, kind in COMPOSITE_PARTS.get(argument.kind, ()):
            declare(f"{argument.name}_{part}", kind, True, None)
    results = ", ".join(["Tensor"] * len(op.results))
    return f"({', '.join(declared)}) -> {results if len(op.results) == 1 else f'({results})'}"


def _count_writes(overload: Any, library: torch.library.Library) -> None:
    """Count the writes into the tensors that an operator mutates, in the place of torch's function, which before 2.13
    raises an IndexError where the last arguments have their defaults, as the scales of a cache that has none."""
    infos = [argument.alias_info for argument in overload._schema.arguments]
    mutated = [index for index, info in enumerate(infos) if info is not None and info.is_write]

    def count(keyset: Any, *args: Any) -> Any:
        increment_version([args[index] for index in mutated if index < len(args) and args[index] is not None])
        return overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that torch's function is replaced
        library.impl(overload, count, "ADInplaceOrView", with_keyset=True, allow_override=True)


def flatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn all arguments of `run` into those of torch's operator: the codes of a composite take its place, and its
    other parts follow all other arguments."""
    parts: list[Any] = []
    for argument, x in zip(arguments, args, strict=True):
        for name, _ in COMPOSITE_PARTS.get(argument.kind, ()):
            parts.append(None if isinstance(x, Tensor) else getattr(x, name, None))
    return (*map(first_part, args), *parts)


def unflatten_args(arguments: Sequence[Argument], args: Sequence[Any]) -> tuple[Any, ...]:
    """Turn the arguments of torch's operator into those of `run`."""
    parts: Iterator[Any] = iter(args[len(arguments) :])
    pairs = zip(arguments, args, strict=False)
    return tuple(tuple(x) if isinstance(x, list) else compose(argument.kind, x, parts) for argument, x in pairs)
