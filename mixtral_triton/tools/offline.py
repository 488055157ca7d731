"""Compile for a GPU that is not there: registers, spills, shared memory, main loops of what an operation launches."""

from __future__ import annotations

import argparse
import functools
import hashlib
import io
import json
import math
import os
import re
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from triton._C.libtriton import get_cache_invalidating_env_vars
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.cache import get_cache_key, get_cache_manager
from triton.runtime.jit import create_function_from_signature

from ..kernels.arch import ARCHS
from ..kernels.checks import FLOATS
from ..kernels.launch import INTERPRETED
from ..kernels.op import Launch, Op
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from . import counted
from .compiled import Assembly, Compiled, as_json, resources_table
from .pool import share
from .predict import family_note
from .terminal import console, write_file

_WIDTHS = ("H", "I")  # of a model: they change no tile
_TOGETHER = 32  # kernels whose loops are counted in one go, since a disassembler takes long to start
_A_WORKER = 16  # kernels that pay for one more process

Dtypes = Sequence[torch.dtype] | None
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], None] | None


def _target(arch: str) -> GPUTarget:
    if INTERPRETED:
        raise ValueError("compile: this process interprets its kernels, needs one with TRITON_INTERPRET unset")
    if arch not in ARCHS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(ARCHS)}")
    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    number = int(arch.removeprefix("sm_"))
    if not _ptxas_knows(number):
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs a later Triton than this {triton.__version__}")
    return GPUTarget("cuda", number, 32)


@functools.cache
def _ptxas_knows(number: int) -> bool:
    name = f"sm_{number}a" if number >= 90 else f"sm_{number}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "empty.ptx").write_text(f".version 8.0\n.target {name}\n.address_size 64\n")
        command = [get_ptxas(number).path, f"--gpu-name={name}", "empty.ptx"]
        return subprocess.run(command, cwd=folder, capture_output=True).returncode == 0


@functools.cache
def _binder(fn: Any, arch: str) -> Any:
    return create_function_from_signature(fn.signature, fn.params, make_backend(_target(arch)))


def _source(launch: Launch, arch: str) -> ASTSource:
    """What Triton's JIT makes of the arguments, by its own functions: a launch finds the kernel in the cache.

    None and 1 are constants, multiples of 16 are known as such.
    """
    fn = launch.fn
    bound, specialized, options = _binder(fn, arch)(**launch.args, **launch.constexprs)
    _, signature, constants, attrs = fn._pack_args(
        make_backend(_target(arch)), {"enable_fp_fusion": True}, bound, specialized, options
    )
    return ASTSource(fn, signature, constants, attrs)


def _key(launch: Launch, source: ASTSource, widths: bool = True) -> str:
    """Tells kernels apart, the same way in every process. Which integers are multiples of 16 does not count, nor do,
    without `widths`, the sizes of a model that stand in the code as constants."""
    names, constants = launch.fn.arg_names, sorted(source.constants.items())
    told = [(path, value) for path, value in constants if widths or names[path[0]] not in _WIDTHS]
    parts = (launch.kernel, source.signature, told, launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _figures(assembly: Assembly) -> counted.Figures:
    if "cubin" in assembly:
        return counted.figures(assembly.paths["cubin"])
    found = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", assembly["amdgcn"])}
    return counted.Figures(found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"]))


def _write(asm: Mapping[str, Any], out: PathLike, stem: str) -> str:
    """The assembly and the binary under `out` -> the absolute path of the binary."""
    kinds = ("amdgcn", "hsaco") if "amdgcn" in asm else ("ptx", "sass", "cubin")
    for kind in kinds:
        path, content = Path(out).absolute() / f"{stem}.{kind}", asm[kind]
        write_file(path, content if isinstance(content, bytes) else content.encode())
    return str(path)


@dataclass(frozen=True)
class _Job:
    """A kernel to compile, in what travels to another process, as a jitted function and meta tensors do not."""

    op: str
    arch: str
    out: PathLike | None
    cache: str
    key: str
    module: str
    launch: Launch
    signature: Mapping[str, str]
    constants: Mapping[Any, Any]
    attrs: Mapping[Any, Any]

    @classmethod
    def of(cls, launch: Launch, arch: str, op: str, out: PathLike | None) -> _Job:
        _target(arch)  # ValueError where nothing can be compiled
        source = _source(launch, arch)
        told = (source.signature, source.constants, source.attrs)
        plain = replace(launch, fn=None, args={})
        return cls(op, arch, out, triton.knobs.cache.dir, _key(launch, source), launch.fn.__module__, plain, *told)

    def source(self, fn: Any = None) -> ASTSource:
        fn = fn or getattr(import_module(self.module), self.launch.kernel)
        return ASTSource(fn, self.signature, self.constants, self.attrs)

    @property
    def options(self) -> dict[str, Any]:
        """As `launch` gives them: FP fusion is named because its default differs between releases of Triton."""
        launch = self.launch
        more = {"launch_pdl": True} if launch.dependent else {}
        return {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True, **more}

    def result(self, **found: Any) -> Compiled:
        pointers = [kind.lstrip("*") for kind in self.signature.values() if kind.startswith("*")]
        launch, fixed = self.launch, [name for name, kind in self.signature.items() if kind == "constexpr"]
        return Compiled(
            op=self.op,
            kernel=launch.kernel,
            arch=self.arch,
            num_warps=launch.num_warps or 0,
            num_stages=launch.num_stages or 0,
            constexprs={name: launch.constexprs[name] for name in fixed if name in launch.constexprs},
            signature=self.signature,
            dtype=min(pointers, key=lambda kind: (kind[0] in "iu", int(re.search(r"\d+", kind)[0]))),
            limit_bytes=ARCHS[self.arch].shared_bytes,
            **found,
        )

    def failed(self, error: str) -> Compiled:
        nothing = {"file": None, "registers": 0, "spills": 0, "shared_bytes": 0, "asm": Assembly(())}
        return self.result(**nothing, error=error)

    def is_stored(self) -> bool:
        """Whether Triton's cache has it."""
        backend, source = make_backend(_target(self.arch)), self.source()
        key = get_cache_key(source, backend, backend.parse_options(self.options), get_cache_invalidating_env_vars())
        manager = get_cache_manager(hashlib.sha256(key.encode()).hexdigest())
        return manager.get_group(f"{source.name[:150]}.json") is not None

    def compile(self, fn: Any = None) -> Compiled:
        triton.knobs.cache.dir = self.cache
        with redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints all it was given
            kernel = triton.compile(self.source(fn), target=_target(self.arch), options=self.options)
        assembly = Assembly(kernel.metadata_group.values())
        figures, stem = _figures(assembly), f"{self.launch.kernel}.{self.arch}.{self.key}"
        return self.result(
            file=None if self.out is None else _write(assembly, self.out, stem),
            registers=figures.registers,
            spills=figures.spills,
            shared_bytes=kernel.metadata.shared,
            asm=assembly,
        )


def _kernels(ops: Iterable[Op], arch: str, dtypes: Dtypes, widths: bool = True) -> dict[str, tuple[str, Launch]]:
    """The kernels of the operations over their bench shapes, by `_key`: an operation, and its first launch of each."""
    found: dict[str, tuple[str, Launch]] = {}
    for op in ops:
        wanted = [dtype for dtype in op.dtypes if not dtypes or dtype in dtypes or dtype not in FLOATS]
        for dtype, sizes in product(wanted, op.bench_shapes):
            shapes = op.inputs(sizes, dtype, "meta")
            with record_launches(arch) as launches:
                op.run(**shapes)
            for launch in launches:
                if launch.fn is not None:
                    found.setdefault(_key(launch, _source(launch, arch), widths), (op.name, launch))
    return found


def collect(op: Op, arch: str, dtypes: Dtypes = None) -> list[Launch]:
    """The kernels `op` launches on `arch` over its bench shapes and dtypes (of the floats: `dtypes`), each once."""
    return [launch for _, launch in _kernels([op], arch, dtypes).values()]


def compile_launch(launch: Launch, arch: str, op: str = "", out: PathLike | None = None) -> Compiled:
    """Compile the kernel of one recorded launch for `arch`; its files go into the folder `out`, which must exist.

    ValueError: an `arch` that is not known, here or to Triton, or this process interprets. The compiler raises whatever
    its passes do.
    """
    return _Job.of(launch, arch, op, out).compile(launch.fn)


def _attempt(job: _Job) -> Compiled | OSError:
    try:
        return job.compile()
    except OSError as error:  # a full disk, say: no fault of the kernel, and to be raised where the caller is
        nameless = error.errno is not None and error.filename is None  # Triton writes to its cache
        return OSError(error.errno, error.strerror, job.cache) if nameless else error
    except Exception as error:  # the compiler raises whatever its passes do
        line = (str(error).strip().splitlines() or [""])[0]
        crash = re.search(r"ptxas.* error code -(\d+)", line)
        return _crashed(job, signal.Signals(int(crash[1])), "ptxas") if crash else job.failed(line[:200])


def _or_raise(result: Compiled | OSError) -> Compiled:
    if isinstance(result, OSError):
        raise result
    return result


def _crashed(job: _Job, by: signal.Signals, what: str = "Triton") -> Compiled:
    return job.failed(f"{what} crashed with {by.name}")


def compile_launches(launches: Iterable[Launch], arch: str) -> Iterator[Compiled]:
    """The kernels of recorded launches into Triton's cache, each once, by all cores: a launch finds them there."""
    jobs = [_Job.of(launch, arch, "", None) for launch in launches]
    # What is known of its integers makes another kernel of it, too.
    distinct = {(job.key, repr(job.attrs)): job for job in jobs}
    return (compiled for _, compiled in _compile_all(list(distinct.values())))


def _weight(job: _Job) -> int:
    """The size of the kernel's tile: what takes longest to compile has the largest."""
    return math.prod(size for name, size in job.launch.constexprs.items() if name.startswith("BLOCK_"))


def _compile_all(jobs: Sequence[_Job]) -> Iterator[tuple[int, Compiled]]:
    """Index and kernel as they are done: first what Triton's cache has, then the heaviest first."""
    stored = [index for index, job in enumerate(jobs) if job.is_stored()]
    yield from ((index, _or_raise(_attempt(jobs[index]))) for index in stored)
    left = sorted(set(range(len(jobs))) - set(stored), key=lambda index: -_weight(jobs[index]))
    pieces = [jobs[index] for index in left]
    workers = min(len(left) // _A_WORKER, len(os.sched_getaffinity(0)))
    if workers > 1:
        found = share(_attempt, pieces, workers, _crashed, preload=f"{__package__}.warm")
    else:
        found = enumerate(map(_attempt, pieces))
    yield from ((left[place], _or_raise(result)) for place, result in found)


def _count(kernels: Sequence[tuple[int, Compiled]]) -> Sequence[tuple[int, Compiled]]:
    """The main loops of several kernels in one go: from here on they are remembered."""
    counted.loops([kernel.asm.paths["cubin"] for _, kernel in kernels], kernels[0][1].arch)
    return kernels


def _counted(jobs: Sequence[_Job], progress: Progress) -> Iterator[tuple[int, Compiled]]:
    """`_compile_all`, with the main loops counted beside it where something depends on them."""
    batch: list[tuple[int, Compiled]] = []
    counting: deque[Future[Sequence[tuple[int, Compiled]]]] = deque()
    with ThreadPoolExecutor(1) as beside:
        for done, (index, compiled) in enumerate(_compile_all(jobs), 1):
            if progress is not None:
                progress(done, len(jobs))
            if not compiled.asks_loops:
                yield index, compiled
            else:
                batch.append((index, compiled))
            if len(batch) == _TOGETHER:
                counting.append(beside.submit(_count, batch))
                batch = []
            while counting and counting[0].done():
                yield from counting.popleft().result()
        if batch:
            counting.append(beside.submit(_count, batch))
        for counts in counting:
            yield from counts.result()


def _in_order(found: Iterable[tuple[int, Compiled]]) -> Iterator[tuple[int, Compiled]]:
    early: dict[int, Compiled] = {}
    turn = 0
    for index, compiled in found:
        early[index] = compiled
        while turn in early:
            yield turn, early.pop(turn)
            turn += 1


def compile_ops(
    names: Sequence[str],
    arch: str,
    out: PathLike | None = None,
    progress: Progress = None,
    dtypes: Dtypes = None,
    as_done: bool = False,
) -> Iterator[Compiled]:
    """The kernels of the operations `names` (none: all) for `arch`, in the registry's order; with `as_done` as soon as
    each is done. One that does not compile is among them, with its error.

    Each is compiled once, also where a second model's widths (H and I, constants in the code) change nothing else.
    `out`: a folder, made where missing, for .ptx, .sass and .cubin (.amdgcn and .hsaco) files. `progress` is told how
    many kernels are done, and of how many. Large jobs are shared with other processes, so a script that calls this
    needs its `if __name__ == "__main__"`. Triton's cache keeps the kernels, and beside them what was counted.
    ValueError: an unknown name or `arch`, or this process interprets.
    """
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"compile: argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    chosen = [op for op in OPS.values() if op.name in names or not names]
    return compile_shapes(chosen, arch, out, progress, dtypes, as_done)


def compile_shapes(
    ops: Iterable[Op],
    arch: str,
    out: PathLike | None = None,
    progress: Progress = None,
    dtypes: Dtypes = None,
    as_done: bool = False,
) -> Iterator[Compiled]:
    """`compile_ops` of operations as they are given: over their own bench shapes."""
    kernels = _kernels(ops, arch, dtypes, widths=False)
    jobs = [_Job.of(launch, arch, name, out) for name, launch in kernels.values()]
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    found = _counted(jobs, progress)
    return (compiled for _, compiled in (found if as_done else _in_order(found)))


def run(args: argparse.Namespace, bar: Callable[[str, None], Any]) -> int:
    """The command `compile` -> exit status: 1 where a kernel must not run."""
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file, needs a folder")
    rows: list[dict[str, Any]] = []
    with bar(f"compiling for {args.arch}", None) as progress:
        # JSON streams; the table has the registry's order.
        for kernel in compile_ops(args.ops, args.arch, out=args.out, progress=progress.update, as_done=args.json):
            rows.append(as_json(kernel))
            if args.json:
                print(json.dumps(rows[-1]), flush=True)
    faults = [row for row in rows if row["fault"]]
    if not args.json:
        out = console()
        if note := family_note(args.arch):
            out.print(note)
        out.print(resources_table(args.arch, rows))
        for row in faults:
            out.print(f"{row['op']}, {row['kernel']}, {row['dtype']}: {row['fault']}", style="red", markup=False)
        limit = ARCHS[args.arch].shared_bytes
        verdict = f"{len(faults)} of them must not run" if faults else "none spills in its main loop, all fit"
        style = "bold red" if faults else "bold green"
        out.print(f"{len(rows)} kernels; shared memory of a block: {limit:,} bytes at most. [{style}]{verdict}[/]")
    return 1 if faults else 0
