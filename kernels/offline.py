"""Compile for a GPU that is not there: registers, spills and shared memory of every kernel an operation launches."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import mangle_type

from .launch import INTERPRETED, record_launches
from .op import Launch, Op
from .registry import OPS

# The target, and the bytes of shared memory one block can have there: Triton does not check them when it compiles.
_GPUS = {
    "sm_80": (GPUTarget("cuda", 80, 32), 166912),
    "sm_86": (GPUTarget("cuda", 86, 32), 101376),
    "sm_89": (GPUTarget("cuda", 89, 32), 101376),
    "sm_90": (GPUTarget("cuda", 90, 32), 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), 232448),
    "sm_120": (GPUTarget("cuda", 120, 32), 101376),
    "gfx90a": (GPUTarget("hip", "gfx90a", 64), 65536),
    "gfx942": (GPUTarget("hip", "gfx942", 64), 65536),
    "gfx950": (GPUTarget("hip", "gfx950", 64), 163840),
}
ARCHS = tuple(_GPUS)


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would run on `arch`.

    signature     Triton type by argument ("*bf16", "i32", "constexpr"); constexprs: values of the last kind, the
                  arguments included that Triton's JIT turns into constants (None, and integers that are 1)
    dtype         the narrowest type behind a pointer, a float where there is one: what the operation computes on
    registers     a thread's; on AMD the vector registers of a lane, accumulation registers included
    spills        bytes a thread keeps in local memory since they did not fit its registers. NVIDIA: the stack frame,
                  for which Triton's kernels have no other use (how often it is touched is not counted); AMD: four
                  for each spilled vector register, and for each scalar one
    shared_bytes  of a block; limit_bytes: what a block can have on `arch`
    file          the binary among the files written; None where none were asked for
    asm           "ptx", "cubin", "sass" (made when asked for), or "amdgcn", "hsaco"; and Triton's own stages
    """

    op: str
    kernel: str
    arch: str
    num_warps: int
    num_stages: int
    constexprs: Mapping[str, Any]
    signature: Mapping[str, str]
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    limit_bytes: int
    file: str | None = None
    asm: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)


def _gpu(arch: str) -> tuple[GPUTarget, int]:
    if INTERPRETED:
        raise ValueError("compile: this process interprets kernels, needs one without TRITON_INTERPRET: unset it")
    if arch not in _GPUS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(ARCHS)}")
    return _GPUS[arch]


@dataclass(frozen=True)
class _Source:
    """A launch as `triton.compile` takes it. `key` tells kernels apart, the same way in every process."""

    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    attrs: Mapping[tuple[int], Any]
    options: Mapping[str, Any]
    key: str


def _source(launch: Launch, target: GPUTarget) -> _Source:
    """What Triton's JIT would make of the arguments: None and 1 are constants, multiples of 16 are known as such."""
    backend = make_backend(target)
    values = {**launch.args, **launch.constexprs}
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    attrs: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.fn.params):
        name, value = parameter.name, values[parameter.name]
        signature[name] = "constexpr" if parameter.is_constexpr else mangle_type(value, specialize=True)
        if signature[name] == "constexpr":
            constexprs[name] = value
        elif isinstance(value, torch.Tensor):
            attrs[(index,)] = backend.parse_attr(backend.get_tensor_specialization(value, align=True))
        elif isinstance(value, int) and not isinstance(value, bool):
            attrs[(index,)] = backend.parse_attr(backend.get_int_specialization(value, align=True))
    attrs = {index: attr for index, attr in attrs.items() if attr}
    # Passed, not left to its default, which differs between releases of Triton.
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    key = repr((launch.kernel, target, signature, constexprs, attrs, options))
    return _Source(signature, constexprs, attrs, options, hashlib.sha256(key.encode()).hexdigest())


def collect(op: Op, arch: str, dtypes: Iterable[torch.dtype] | None = None) -> list[Launch]:
    """The different kernels that `op` launches over its bench shapes and `dtypes` (None: all of its own)."""
    target, _ = _gpu(arch)
    found: dict[str, Launch] = {}
    for dtype in op.dtypes if dtypes is None else dtypes:
        for sizes in op.bench_shapes:
            arguments = op.inputs(sizes, dtype, "meta")
            with record_launches(arch) as launches:
                op.run(**arguments)
            for launch in launches:
                if launch.fn is not None:
                    found.setdefault(_source(launch, target).key, launch)
    return list(found.values())


def _cuda_usage(kernel: Any) -> tuple[int, int]:
    """-> registers a thread, bytes a thread spills."""
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", usage)[1]) for name in ("REG", "STACK", "LOCAL"))
    return registers, stack + local


def _hip_usage(kernel: Any) -> tuple[int, int]:
    """-> vector registers a lane, bytes a lane spills."""
    text = kernel.asm["amdgcn"]
    names = ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count")
    registers, vector, scalar = (int(re.search(rf"\.{name}:\s+(\d+)", text)[1]) for name in names)
    return registers, 4 * (vector + scalar)


def _dtype(signature: Mapping[str, str]) -> str:
    pointers = [kind.lstrip("*k") for kind in signature.values() if kind.startswith("*")]
    return min(pointers, key=lambda kind: (kind[0] in "iu", int(re.search(r"\d+", kind)[0])))


def _write(kernel: Any, out: Path, stem: str) -> str:
    """The assembly and the binary under `out` -> the absolute path of the binary."""
    kinds = ("amdgcn", "hsaco") if "hsaco" in kernel.asm else ("ptx", "sass", "cubin")
    for kind in kinds:
        content = kernel.asm[kind]
        (out / f"{stem}.{kind}").write_bytes(content if isinstance(content, bytes) else content.encode())
    return str((out / f"{stem}.{kinds[-1]}").absolute())


def compile_launch(launch: Launch, arch: str, op: str = "", out: Path | None = None) -> Compiled:
    """Compile the kernel of a recorded launch for `arch`; with `out`, an existing folder, write its files there."""
    target, limit = _gpu(arch)
    source = _source(launch, target)
    ast = ASTSource(launch.fn, dict(source.signature), dict(source.constexprs), dict(source.attrs))
    kernel = triton.compile(ast, target=target, options=dict(source.options))
    registers, spills = (_cuda_usage if target.backend == "cuda" else _hip_usage)(kernel)
    return Compiled(
        op=op,
        kernel=launch.kernel,
        arch=arch,
        num_warps=launch.num_warps or 0,
        num_stages=launch.num_stages or 0,
        constexprs=source.constexprs,
        signature=source.signature,
        dtype=_dtype(source.signature),
        registers=registers,
        spills=spills,
        shared_bytes=kernel.metadata.shared,
        limit_bytes=limit,
        file=None if out is None else _write(kernel, out, f"{launch.kernel}.{arch}.{source.key[:10]}"),
        asm=kernel.asm,
    )


def compile_ops(
    names: Sequence[str],
    arch: str,
    out: str | os.PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[Compiled]:
    """Compile every kernel of the operations `names` (none: all) for `arch`, each once, in a fixed order.
    """
    raise NotImplementedError


def as_json(compiled: Compiled) -> dict[str, Any]:
    """What `compile --json` prints of one kernel."""
    raise NotImplementedError
