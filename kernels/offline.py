"""Compile for a GPU that is not there: registers, spills, shared memory, main loops of what an operation launches."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, fields
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import mangle_type

from .checks import FLOATS
from .launch import INTERPRETED, record_launches
from .op import Launch, Op, Sizes
from .registry import OPS
from .sass import Loop, main_loops

# Bytes of shared memory a block can have: Triton does not check them when it compiles.
_LIMITS = dict.fromkeys(("sm_86", "sm_89", "sm_120"), 101376) | dict.fromkeys(("gfx90a", "gfx942"), 65536)
_LIMITS |= {"sm_80": 166912, "sm_90": 232448, "sm_100": 232448, "gfx950": 163840}
# Bytes of spills that a kernel may have outside its main loops: harmless, a few instructions a program. AMD: none.
_HARMLESS = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_100", "sm_120"), 64) | {"sm_90": 16}

Dtypes = Sequence[torch.dtype] | None
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None] | None


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

    @cached_property
    def loops(self) -> list[Loop]:
        """The main loops; none for AMD, whose code is not counted."""
        return main_loops(self.asm["cubin"]) if "cubin" in self.asm else []

    @property
    def loop_spills(self) -> int:
        """Instructions in main loops that store or load a spill."""
        return sum(loop.spills for loop in self.loops) if self.spills else 0

    @property
    def loop_flop_per_instruction(self) -> float | None:
        """Of the best main loop (attention: the one without a mask); None without tensor cores whose FLOP are known."""
        loops = self.loops if "mma" in self.asm.get("ptx", "") else []
        return max((loop.flop_per_instruction for loop in loops if loop.flop_per_instruction), default=None)

    @property
    def fault(self) -> str | None:
        """Why this kernel should not run, or None."""
        if self.loop_spills or self.spills > _HARMLESS.get(self.arch, 0):
            return f"spills {self.spills} bytes, by {self.loop_spills} instructions in main loops"
        if self.shared_bytes > self.limit_bytes:
            return f"needs {self.shared_bytes} of {self.limit_bytes} bytes of shared memory"
        return None


def _target(arch: str) -> GPUTarget:
    if INTERPRETED:
        raise ValueError("compile: this process interprets its kernels, needs one with TRITON_INTERPRET unset")
    if arch not in _LIMITS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(sorted(_LIMITS))}")
    return GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)


def _source(launch: Launch, arch: str) -> ASTSource:
    """What Triton's JIT would make of the arguments: None and 1 are constants, multiples of 16 are known as such."""
    backend = make_backend(_target(arch))
    values = {**launch.args, **launch.constexprs}
    signature, constants, attrs = {}, {}, {}
    for index, parameter in enumerate(launch.fn.params):
        name, value, known = parameter.name, values[parameter.name], ""
        signature[name] = "constexpr" if parameter.is_constexpr else mangle_type(value, specialize=True)
        if signature[name] == "constexpr":
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            known = backend.get_tensor_specialization(value, align=True)
        elif isinstance(value, int) and not isinstance(value, bool):
            known = backend.get_int_specialization(value, align=True)
        attrs[(index,)] = backend.parse_attr(known)
    return ASTSource(launch.fn, signature, constants, attrs)


def _key(launch: Launch, source: ASTSource) -> str:
    """Tells kernels apart, the same way in every process. Which integers are multiples of 16 does not count."""
    parts = (launch.kernel, source.signature, sorted(source.constants.items()), launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _record(op: Op, dtype: torch.dtype, sizes: Sizes, arch: str) -> dict[str, Launch]:
    """The Triton launches of one call, by key."""
    with record_launches(arch) as launches:
        op.run(**op.inputs(sizes, dtype, "meta"))
    return {_key(launch, _source(launch, arch)): launch for launch in launches if launch.fn is not None}


def _record_all(ops: Iterable[Op], arch: str, dtypes: Dtypes) -> dict[str, tuple[Launch, tuple[Any, ...]]]:
    """Key -> the first launch of that kernel, and the call it belongs to: operation, dtype, sizes."""
    found: dict[str, tuple[Launch, tuple[Any, ...]]] = {}
    for op in ops:
        wanted = [dtype for dtype in op.dtypes if not dtypes or dtype in dtypes or dtype not in FLOATS]
        for dtype, sizes in product(wanted, op.bench_shapes):
            for key, launch in _record(op, dtype, sizes, arch).items():
                found.setdefault(key, (launch, (op.name, dtype, sizes)))
    return found


def collect(op: Op, arch: str, dtypes: Dtypes = None) -> list[Launch]:
    """The kernels `op` launches on `arch` over its bench shapes and dtypes (of the floats: `dtypes`), each once."""
    return [launch for launch, _ in _record_all([op], arch, dtypes).values()]


def _usage(kernel: Any) -> dict[str, int]:
    text = kernel.asm.get("amdgcn")
    if text is None:
        cubin = next(path for name, path in kernel.metadata_group.items() if name.endswith(".cubin"))
        text = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin], text=True)
    found = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", text)}
    if "REG" in found:
        return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}
    return {"registers": found["vgpr_count"], "spills": 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])}


def _write(asm: Mapping[str, Any], out: PathLike, stem: str) -> str:
    """The assembly and the binary under `out` -> the absolute path of the binary."""
    kinds = ("amdgcn", "hsaco") if "amdgcn" in asm else ("ptx", "sass", "cubin")
    for kind in kinds:
        path = Path(out).absolute() / f"{stem}.{kind}"
        path.write_bytes(asm[kind] if isinstance(asm[kind], bytes) else asm[kind].encode())
    return str(path)


def compile_launch(launch: Launch, arch: str, op: str = "", out: PathLike | None = None) -> Compiled:
    """Compile the kernel of one recorded launch for `arch`; its files go into the folder `out`, which must exist."""
    source = _source(launch, arch)
    program = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    # FP fusion is named because its default differs between releases of Triton.
    kernel = triton.compile(source, target=_target(arch), options={**program, "enable_fp_fusion": True})
    pointers = [kind.lstrip("*") for kind in source.signature.values() if kind.startswith("*")]
    return Compiled(
        op=op,
        kernel=launch.kernel,
        arch=arch,
        file=None if out is None else _write(kernel.asm, out, f"{launch.kernel}.{arch}.{_key(launch, source)}"),
        **program,
        constexprs={name: launch.constexprs[name] for name in source.signature if name in launch.constexprs},
        signature=source.signature,
        dtype=min(pointers, key=lambda kind: (kind[0] in "iu", int(re.search(r"\d+", kind)[0]))),
        **_usage(kernel),
        shared_bytes=kernel.metadata.shared,
        limit_bytes=_LIMITS[arch],
        asm=kernel.asm,
    )


def _compile(key: str, name: str, dtype: torch.dtype, sizes: Sizes, arch: str, out: PathLike | None) -> Compiled:
    """In a worker: the call is recorded anew, since neither a jitted function nor a meta tensor travels."""
    compiled = compile_launch(_record(OPS[name], dtype, sizes, arch)[key], arch, name, out)
    as_json(compiled)  # loops are counted here, once, and travel with the rest
    return compiled


def _compile_all(jobs: Sequence[tuple[Any, ...]], progress: Progress) -> Iterator[Compiled]:
    workers = min(len(jobs) // 16, os.cpu_count() or 1)  # one takes seconds to start
    with ProcessPoolExecutor(max(workers, 1), multiprocessing.get_context("spawn")) as pool:
        results = (pool.map if workers > 1 else map)(_compile, *zip(*jobs, strict=True))
        for done, compiled in enumerate(results, 1):
            if progress is not None:
                progress(done, len(jobs))
            yield compiled


def compile_ops(
    names: Sequence[str], arch: str, out: PathLike | None = None, progress: Progress = None, dtypes: Dtypes = None
) -> Iterator[Compiled]:
    """The kernels of the operations `names` (none: all) for `arch`, each compiled once, in the registry's order.

    `out`: a folder, made where missing, for .ptx, .sass and .cubin (.amdgcn and .hsaco) files. `progress` is told how
    many kernels are done, and of how many. Large jobs are shared with other processes, so a script that calls this
    needs its `if __name__ == "__main__"`. ValueError: an unknown name or `arch`, or this process interprets.
    """
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"compile: argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    chosen = [op for op in OPS.values() if op.name in names or not names]
    jobs = [(key, *call, arch, out) for key, (_, call) in _record_all(chosen, arch, dtypes).items()]
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    return _compile_all(jobs, progress)


def as_json(compiled: Compiled) -> dict[str, Any]:
    """What `compile --json` prints of one kernel: all but its signature and assembly."""
    known = {f.name: getattr(compiled, f.name) for f in fields(compiled) if f.name not in ("signature", "asm")}
    found = {name: getattr(compiled, name) for name in ("loop_flop_per_instruction", "loop_spills", "fault")}
    return {**known, **found}
