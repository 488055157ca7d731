"""Compile for a GPU that is not there: registers, spills and shared memory of every kernel an operation launches."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import lru_cache
from itertools import product, repeat
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import mangle_type

from .checks import FLOATS
from .launch import INTERPRETED, record_launches
from .op import Launch, Op
from .registry import OPS

# Bytes of shared memory a block can have: Triton does not check them when it compiles.
_LIMITS = dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101376) | dict.fromkeys(("gfx90a", "gfx942"), 65536)
_LIMITS |= {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx950": 163840}


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would run on `arch`.

    file          path of the .cubin or .hsaco; None where no files were asked for
    signature     Triton's type by argument: "*bf16", "i32", "constexpr" (also what the JIT makes constant: None, 1)
    dtype         the narrowest type behind a pointer, a floating-point one where there is one
    registers     of a thread; on AMD the vector registers of a lane, those for accumulation included
    spills        bytes a thread keeps in memory for want of registers. NVIDIA: its stack frame, for which a Triton
                  kernel has no other use; AMD: 4 for each spilled vector register, and for each scalar one
    shared_bytes  of a block; limit_bytes: what a block can have on `arch`
    asm           "ptx", "cubin" and "sass", or "amdgcn" and "hsaco"; Triton's own stages beside them
    """

    op: str
    kernel: str
    arch: str
    file: str | None
    num_warps: int
    num_stages: int
    constexprs: Mapping[str, Any]
    signature: Mapping[str, str]
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    limit_bytes: int
    asm: Mapping[str, Any] = field(repr=False, compare=False)


def _target(arch: str) -> GPUTarget:
    if INTERPRETED:
        raise ValueError("compile: this process interprets its kernels, needs one with TRITON_INTERPRET unset")
    if arch not in _LIMITS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(sorted(_LIMITS))}")
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _source(launch: Launch, target: GPUTarget) -> ASTSource:
    """What Triton's JIT would make of the arguments: None and 1 are constants, multiples of 16 are known as such."""
    backend = make_backend(target)
    values = {**launch.args, **launch.constexprs}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attrs: dict[tuple[int], Any] = {}
    for index, parameter in enumerate(launch.fn.params):
        name, value, known = parameter.name, values[parameter.name], ""
        signature[name] = "constexpr" if parameter.is_constexpr else mangle_type(value, specialize=True)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            known = backend.get_tensor_specialization(value, align=True)
        elif isinstance(value, int) and not isinstance(value, bool):
            known = backend.get_int_specialization(value, align=True)
        if known:
            attrs[(index,)] = backend.parse_attr(known)
    return ASTSource(launch.fn, signature, constants, attrs)


def _key(launch: Launch, source: ASTSource) -> str:
    """Tells kernels apart, the same way in every process. Which integers are multiples of 16 does not count."""
    parts = (launch.kernel, source.signature, sorted(source.constants.items()), launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _launches(ops: Iterable[Op], arch: str, dtypes: Sequence[torch.dtype] | None) -> dict[str, tuple[str, Launch]]:
    """Key -> the first operation that launches the kernel, and how it does."""
    target = _target(arch)
    found: dict[str, tuple[str, Launch]] = {}
    for op in ops:
        wanted = [dtype for dtype in op.dtypes if dtypes is None or dtype in dtypes or dtype not in FLOATS]
        for dtype, sizes in product(wanted, op.bench_shapes):
            arguments = op.inputs(sizes, dtype, "meta")
            with record_launches(arch) as launches:
                op.run(**arguments)
            for launch in launches:
                if launch.fn is not None:
                    found.setdefault(_key(launch, _source(launch, target)), (op.name, launch))
    return found


def collect(op: Op, arch: str, dtypes: Sequence[torch.dtype] | None = None) -> list[Launch]:
    """The kernels that `op` launches on `arch` over its bench shapes and dtypes, of the floats only those in `dtypes`.

    Two are the same where the function, its types and constants, its warps and its stages are.
    """
    return [launch for _, launch in _launches([op], arch, dtypes).values()]


def _numbers(text: str, *names: str) -> list[int]:
    return [int(match[1]) for match in (re.search(rf"{name}:?\s*(\d+)", text) for name in names) if match]


def _usage(kernel: Any) -> tuple[int, int]:
    """-> registers and spilled bytes of a thread."""
    if "amdgcn" in kernel.asm:
        names = (r"\.vgpr_count", r"\.vgpr_spill_count", r"\.sgpr_spill_count")
        registers, vector, scalar = _numbers(kernel.asm["amdgcn"], *names)
        return registers, 4 * (vector + scalar)
    cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, local = _numbers(usage, "REG", "STACK", "LOCAL")
    return registers, stack + local


def _write(asm: Mapping[str, Any], out: str, stem: str) -> str:
    """The assembly and the binary under `out` -> the absolute path of the binary."""
    kinds = ("amdgcn", "hsaco") if "amdgcn" in asm else ("ptx", "sass", "cubin")
    paths = [Path(out).absolute() / f"{stem}.{kind}" for kind in kinds]
    for kind, path in zip(kinds, paths, strict=True):
        path.write_bytes(asm[kind] if isinstance(asm[kind], bytes) else asm[kind].encode())
    return str(paths[-1])


def compile_launch(launch: Launch, arch: str, op: str = "", out: str | None = None) -> Compiled:
    """Compile the kernel of one recorded launch for `arch`; its files go into the folder `out`, which must exist."""
    source = _source(launch, _target(arch))
    # FP fusion is named because its default differs between releases of Triton.
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    kernel = triton.compile(source, target=_target(arch), options=options)
    pointers = [kind.lstrip("*") for kind in source.signature.values() if kind.startswith("*")]
    registers, spills = _usage(kernel)
    return Compiled(
        op=op,
        kernel=launch.kernel,
        arch=arch,
        file=None if out is None else _write(kernel.asm, out, f"{launch.kernel}.{arch}.{_key(launch, source)}"),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        constexprs={name: launch.constexprs[name] for name in source.signature if name in launch.constexprs},
        signature=source.signature,
        dtype=min(pointers, key=lambda kind: (kind[0] in "iu", _numbers(kind, "[a-z]"))),
        registers=registers,
        spills=spills,
        shared_bytes=kernel.metadata.shared,
        limit_bytes=_LIMITS[arch],
        asm=kernel.asm,
    )


@lru_cache(maxsize=1)
def _recorded(names: tuple[str, ...], arch: str, dtypes: Dtypes) -> dict[str, tuple[str, Launch]]:
    return _launches([OPS[name] for name in names], arch, dtypes)


def _compile_anew(key: str, asked: tuple[Any, ...], out: str | None) -> Compiled:
    """In a worker, which records the launches itself: neither a jitted function nor a meta tensor travels."""
    op, launch = _recorded(*asked)[key]
    return compile_launch(launch, asked[1], op, out)


def _compile_all(found: dict[str, tuple[str, Launch]], asked: tuple[Any, ...], out: str | None) -> Iterator[Compiled]:
    workers = min(len(found) // 16, os.cpu_count() or 1)  # one takes seconds to start
    if workers < 2:
        yield from (compile_launch(launch, asked[1], op, out) for op, launch in found.values())
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(_compile_anew, found, repeat(asked), repeat(out))


def compile_ops(
    names: Sequence[str], arch: str, out: str | None = None, progress: Progress = None, dtypes: Dtypes = None
) -> Iterator[Compiled]:
    """The kernels of the operations `names` (none: all) for `arch`, each compiled once, in the registry's order.

    `out`: a folder, made where missing, for .ptx, .sass and .cubin (.amdgcn and .hsaco) files. `progress` is told how
    many kernels are done, and of how many. Large jobs are shared with other processes, so a script that calls this
    needs its `if __name__ == "__main__"`. ValueError: an unknown name or `arch`, or this process interprets.
    """
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"compile: argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    asked = (tuple(name for name in OPS if name in names or not names), arch, dtypes)
    found = _launches([OPS[name] for name in asked[0]], arch, dtypes)
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)

    def results() -> Iterator[Compiled]:
        for done, compiled in enumerate(_compile_all(found, asked, out), 1):
            if progress is not None:
                progress(done, len(found))
            yield compiled

    return results()


def as_json(compiled: Compiled) -> dict[str, Any]:
    """What `compile --json` prints of one kernel: all but its signature and assembly."""
    names = (each.name for each in fields(Compiled) if each.name not in ("signature", "asm"))
    return {name: getattr(compiled, name) for name in names}
