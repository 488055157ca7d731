"""Corrections to Triton's interpreter, active during our launches.

They replace what is private there, as read in Triton 3.6, 3.7 and 3.9 (`_replacements`). Where one of these is missing,
Triton's own interpreter runs, with a warning once.

The interpreter stores bfloat16 as raw 16-bit integers: `tl.dot` multiplies those integers, and a cast from float32
truncates where hardware rounds to nearest even. So does a cast to e4m3, whose NaN `tl.dot` reads as 480. It also
derives the same few types and shapes anew in each operation, which takes a third of its time: here they are remembered.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from math import prod
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl

try:
    from triton.runtime import interpreter
except ImportError:
    interpreter = None  # type: ignore[assignment]

_E4M3_MAX = torch.finfo(torch.float8_e4m3fn).max


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32 (exact)."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, rounded to nearest, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def f32_to_fp8(values: np.ndarray) -> np.ndarray:
    """float32 -> uint8 bit patterns of e4m3, rounded to nearest, ties to even, saturated; a NaN stays a NaN."""
    values = np.clip(np.asarray(values, np.float32), -_E4M3_MAX, _E4M3_MAX)
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def _values(handle: Any) -> np.ndarray:
    """Return a handle's values in a dtype that numpy computes in."""
    kind = handle.dtype.scalar
    if kind == tl.float8e4nv:
        return torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float().numpy()
    return bf16_to_f32(handle.data) if kind == tl.bfloat16 else handle.data


def _cast(builder: Any, src: Any, dst_type: Any) -> Any:
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target) or source == target:
        return type(builder).cast_impl(builder, src, dst_type)
    values = _values(src)
    if target == tl.bfloat16:
        return type(src)(f32_to_bf16(values.astype(np.float32)), target)
    return type(builder).cast_impl(builder, type(src)(values, tl.float32), dst_type)


# In one order of the sum: that of np.matmul depends on the row's place in the tile, above all without AVX-512.
_product = partial(np.einsum, "mk,kn->mn")


def _cast_by_bits(builder: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if src.dtype.scalar == tl.float32 and dst_type.scalar == tl.float8e4nv:
        return type(src)(f32_to_fp8(src.data), dst_type.scalar)
    return type(builder).create_fp_to_fp(builder, src, dst_type, rounding_mode)


def _dot(builder: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    # Contiguous: another layout of a tile has another order of the sum.
    a, b = (np.ascontiguousarray(_values(x), d.data.dtype) for x in (a, b))
    return type(d)(_product(a, b) + d.data, d.dtype.scalar)


@cache
def _language_modules(fn: Any) -> frozenset[int]:
    return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)


def _patch_once(patch_language: Any) -> Any:
    """Patch each language module once a launch. The interpreter repeats it for every device function that a program
    calls, which takes most of its time."""
    done: set[int] = set()

    def patch_new(fn: Any) -> Any:
        modules = _language_modules(fn)
        if modules <= done:
            return None
        done.update(modules)
        return patch_language(fn)

    return patch_new


def _patch_tensor(patch_tensor: Any) -> Any:
    """Read a loop's bound as an element: Triton 3.6 converts an array [1], which numpy from 2.4 on refuses."""

    def patch_new(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: int(self.handle.data.item())

    return patch_new


@cache
def _remember_dtypes(numpy_dtype: Any) -> Any:
    of_scalar = cache(numpy_dtype)

    def patch_new(dtype: Any) -> np.dtype[Any]:
        return np.dtype(np.uint64) if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)

    return patch_new


@cache
def _shape(sizes: tuple[int, ...]) -> dict[str, Any]:
    """Return the attributes of a block's type that depend on its shape alone, and `constants`, those of its tensors."""
    shape = tl.tuple(sizes)
    constants = tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(prod(sizes))
    attributes = {"shape": shape, "numel": tl.core.validate_block_shape(shape), "constants": constants}
    attributes["prefix"] = f"<{sizes}, "  # of the type's name
    vars(shape)["attributes"] = attributes
    return attributes


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    attributes = vars(shape).get("attributes") if type(shape) is tl.tuple else None
    if attributes is None:
        sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
        if not sizes:
            raise TypeError("0d block_type is forbidden")
        attributes = _shape(sizes)
    vars(self).update(attributes, element_ty=element_ty, name=f"{attributes['prefix']}{element_ty}>")


def _unwrap(unwrap: Any) -> Any:
    plain = frozenset((tl.tensor, int, bool, tl.dtype, type(None)))
    return lambda x: x if type(x) in plain else x.value if type(x) is tl.constexpr else unwrap(x)


def _equal_dtypes(equal: Any) -> Any:
    return lambda self, other: self is other or equal(self, other)


def _equal_shapes(equal: Any) -> Any:
    return lambda self, other: tl.constexpr(self.values == other) if type(other) is list else equal(self, other)


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.constants if type.is_block() else _shape(())["constants"]


def _replacements(builder: Any) -> list[tuple[Any, str, Callable[[Any], Any]]]:
    """Return what is replaced: a place, its attribute's name, and what makes the new attribute from the old one."""
    return [
        (builder, "options", lambda _: interpreter.InterpreterOptions(sanitize_overflow=False)),  # integers wrap
        (builder, "cast_impl", lambda _: partial(_cast, builder)),
        (builder, "create_fp_to_fp", lambda _: partial(_cast_by_bits, builder)),
        (builder, "create_dot", lambda _: partial(_dot, builder)),
        (interpreter, "_patch_lang", _patch_once),
        (interpreter, "_patch_lang_tensor", _patch_tensor),
        (interpreter, "_get_np_dtype", _remember_dtypes),
        (tl.block_type, "__init__", lambda _: _init_block_type),
        (tl.core, "_unwrap_if_constexpr", _unwrap),
        (tl.block_type, "to_ir", lambda _: lambda self, builder: self),
        (tl.dtype, "__eq__", _equal_dtypes),
        (tl.tuple, "__eq__", _equal_shapes),
        (tl.tensor, "__init__", lambda _: _init_tensor),
    ]


@cache
def _warn(missing: str) -> None:
    text = f"mixtral_triton: the interpreter of Triton {triton.__version__} has no {missing}"
    warnings.warn(f"{text}: kernels run in it uncorrected, and bfloat16 is wrong there", stacklevel=4)


@contextmanager
def interpreting() -> Iterator[Any]:
    """Correct bfloat16 casts and dots within the block, let integers wrap; yield the interpreter's builder."""
    builder = getattr(interpreter, "interpreter_builder", None)
    changes = _replacements(builder)
    if missing := [name for place, name, _ in changes if not hasattr(place, name)]:
        _warn(", ".join(missing))
        changes = []
    with ExitStack() as stack, np.errstate(all="ignore"):  # a GPU gives inf and NaN without a warning
        for place, name, make in changes:
            stack.enter_context(patch.object(place, name, make(getattr(place, name))))
        yield builder


@contextmanager
def every_launch_corrected() -> Iterator[list[Any]]:
    """Correct within the block the interpreter's launches of any kernel, not those of `launch` alone; yield the list of
    those launched. Arithmetic of bf16 other than `tl.dot` stays wrong: this package's kernels have none."""
    run, launched = interpreter.GridExecutor.__call__, list[Any]()

    def corrected(self: Any, *args: Any, **kwargs: Any) -> None:
        launched.append(self.fn)
        with interpreting():  # of each launch: what it patches, Triton takes back at a launch's end
            run(self, *args, **kwargs)

    with patch.object(interpreter.GridExecutor, "__call__", corrected):
        yield launched
