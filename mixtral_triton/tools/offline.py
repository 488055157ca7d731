"""The command `compile`: compile what operations launch for a GPU that need not be there."""

from __future__ import annotations

import argparse
import copyreg
import functools
import hashlib
import io
import json
import multiprocessing
import os
import pkgutil
import re
import signal
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from ..kernels.arch import ARCHS, amd
from ..kernels.checks import FLOATS
from ..kernels.launch import INTERPRETED
from ..kernels.op import Launch, Op
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from . import sass
from .compiled import Compiled, as_json, resources_table
from .predict import family_note
from .terminal import bar, console, write_file

_WIDTHS = ("H", "I")  # of a model: they change no tile
_KERNELS_PER_WORKER = 16  # fewer do not pay for one more process

Dtypes = Sequence[torch.dtype] | None
PathLike = str | os.PathLike[str]
Progress = Callable[[int, int], object]
Item = TypeVar("Item")
Result = TypeVar("Result")


def _target(arch: str) -> GPUTarget:
    if INTERPRETED:
        raise ValueError("compile: this process interprets its kernels, needs one with TRITON_INTERPRET unset")
    if arch not in ARCHS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(ARCHS)}")
    return GPUTarget("hip", arch, 64) if amd(arch) else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@functools.cache
def _binder(fn: Any, arch: str) -> Any:
    return create_function_from_signature(fn.signature, fn.params, make_backend(_target(arch)))


def _source(launch: Launch, arch: str) -> ASTSource:
    """Return what Triton's JIT derives from the arguments, so that a launch finds the kernel in the cache.

    None and 1 are constants, multiples of 16 are known as such.
    """
    fn = launch.fn
    bound, specialized, options = _binder(fn, arch)(**launch.args, **launch.constexprs)
    backend = make_backend(_target(arch))
    _, *types = fn._pack_args(backend, {"enable_fp_fusion": True}, bound, specialized, options)
    return ASTSource(fn, *types)


def _key(launch: Launch, source: ASTSource, widths: bool = True) -> str:
    """Return a name for the kernel that is the same in every process. Which integers are multiples of 16 does not
    count; without `widths`, neither do the sizes of a model that are constants in the code."""
    names, constants = launch.fn.arg_names, sorted(source.constants.items())
    counted = [(path, value) for path, value in constants if widths or names[path[0]] not in _WIDTHS]
    parts = (launch.kernel, source.signature, counted, launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _usage(stages: Mapping[str, Path]) -> tuple[int, int]:
    """Return registers and bytes of spills, see `Compiled`."""
    if "cubin" in stages:
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(stages["cubin"])]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    else:
        text = stages["amdgcn"].read_text()
    found = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", text)}
    if "cubin" in stages:
        return found["REG"], found["STACK"] + found["LOCAL"]
    return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])


def _options(launch: Launch) -> dict[str, Any]:
    """As `launch` gives them. FP fusion is explicit because its default differs between releases of Triton."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return options | ({"launch_pdl": True} if launch.dependent else {})


# So that a launch can be sent to another process.
copyreg.pickle(JITFunction, lambda fn: (pkgutil.resolve_name, (f"{fn.__module__}:{fn.__name__}",)))


@dataclass(frozen=True)
class _Job:
    """A kernel to compile, in this process or another."""

    launch: Launch
    arch: str
    op: str = ""
    out: PathLike | None = None
    cache: str = field(default_factory=lambda: triton.knobs.cache.dir)

    def result(self, **figures: Any) -> Compiled:
        launch, signature = self.launch, _source(self.launch, self.arch).signature
        pointers = [kind.lstrip("*") for kind in signature.values() if kind.startswith("*")]
        fixed = [name for name, kind in signature.items() if kind == "constexpr"]
        return Compiled(
            op=self.op,
            kernel=launch.kernel,
            arch=self.arch,
            num_warps=launch.num_warps or 0,
            num_stages=launch.num_stages or 0,
            constexprs={name: launch.constexprs[name] for name in fixed if name in launch.constexprs},
            signature=signature,
            dtype=min(pointers, key=lambda kind: (kind[0] in "iu", int(re.sub(r"\D+(\d+).*", r"\1", kind)))),
            limit_bytes=ARCHS[self.arch].shared_bytes,
            **{"file": None, "registers": 0, "spills": 0, "shared_bytes": 0, "stages": {}, **figures},
        )

    def compile(self) -> Compiled:
        source = _source(self.launch, self.arch)
        # Where ptxas fails, Triton prints all its input.
        with triton.knobs.cache.scope(), redirect_stdout(io.StringIO()):
            triton.knobs.cache.dir = self.cache
            kernel = triton.compile(source, target=_target(self.arch), options=_options(self.launch))
        stages = {Path(file).suffix[1:]: Path(file) for file in kernel.metadata_group.values()}
        registers, spills = _usage(stages)
        kinds, file = ("amdgcn", "hsaco") if amd(self.arch) else ("ptx", "sass", "cubin"), None
        for kind in kinds if self.out is not None else ():
            content, name = kernel.asm[kind], f"{self.launch.kernel}.{self.arch}.{_key(self.launch, source)}.{kind}"
            file = str(Path(self.out or "").absolute() / name)
            write_file(Path(file), content if isinstance(content, bytes) else content.encode())
        usage = {"registers": registers, "spills": spills, "shared_bytes": kernel.metadata.shared}
        return self.result(file=file, stages=stages, **usage)


def _kernels(ops: Iterable[Op], arch: str, dtypes: Dtypes = None, widths: bool = True) -> dict[str, tuple[str, Launch]]:
    """Return the kernels of the operations over their bench shapes, by `_key`: an operation, and its first launch."""
    found: dict[str, tuple[str, Launch]] = {}
    for op in ops:
        selected = [dtype for dtype in op.dtypes if not dtypes or dtype in dtypes or dtype not in FLOATS]
        for dtype, sizes in product(selected, op.bench_shapes):
            args = op.inputs(sizes, dtype, "meta")
            with record_launches(arch) as launches:
                op.run(**args)
            for launch in launches:
                if launch.fn is not None:
                    found.setdefault(_key(launch, _source(launch, arch), widths), (op.name, launch))
    return found


def collect(op: Op, arch: str, dtypes: Dtypes = None) -> list[Launch]:
    """Return the kernels that `op` launches on `arch` over its bench shapes and dtypes (of the floats: `dtypes`)."""
    return [launch for _, launch in _kernels([op], arch, dtypes).values()]


def compile_launch(launch: Launch, arch: str, op: str = "") -> Compiled:
    """Compile the kernel of one recorded launch for `arch`.

    ValueError: an unknown `arch`, or this process interprets. The compiler raises whatever its passes do.
    """
    return _Job(launch, arch, op).compile()


def _attempt(job: _Job) -> Compiled:
    try:
        return job.compile()
    except OSError as error:  # a full disk, say, is no fault of the kernel
        unnamed = error.errno is not None and error.filename is None  # Triton writes to its cache
        raise OSError(error.errno, error.strerror, job.cache) if unnamed else error from None
    except Exception as error:  # the compiler raises whatever its passes do
        line = (str(error).strip().splitlines() or [""])[0]
        crash = re.search(r"ptxas.* error code -(\d+)", line)
        return job.result(error=f"ptxas crashed with {signal.Signals(int(crash[1])).name}" if crash else line[:200])


@contextmanager
def _process_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Open a pool whose processes end with the block, even in the middle of their work."""
    # Forked from a server without threads that has imported everything once: a fork copies locks that are held.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    before = set(multiprocessing.active_children())
    # Ctrl-C reaches every process; this one ends the others.
    pool = ProcessPoolExecutor(workers, context, initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
        pool.shutdown(cancel_futures=True)


def map_in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[int, Result | BrokenProcessPool]]:
    """Yield index and result of each item as it is done; BrokenProcessPool for an item whose process crashes.

    A crash breaks the whole pool: the items that it leaves undone run again, each in a process of its own.
    """
    futures, undone = {}, set(range(len(items)))
    with _process_pool(workers) as pool:
        with suppress(BrokenProcessPool):  # a crash may come before the last item is submitted
            for index, item in enumerate(items):
                futures[pool.submit(work, item)] = index
        for future in as_completed(futures):
            if not isinstance(future.exception(), BrokenProcessPool):
                undone.remove(futures[future])
                yield futures[future], future.result()
    for index in sorted(undone):
        with _process_pool(1) as pool:
            future = pool.submit(work, items[index])
            error = future.exception()
            yield index, error if isinstance(error, BrokenProcessPool) else future.result()


def _compile_all(jobs: Sequence[_Job]) -> Iterator[tuple[int, Compiled]]:
    """Yield index and kernel as they are done; many are shared with other processes."""
    workers = min(len(jobs) // _KERNELS_PER_WORKER, len(os.sched_getaffinity(0)))
    if workers <= 1:
        yield from enumerate(map(_attempt, jobs))
        return
    for index, result in map_in_processes(_attempt, jobs, workers):
        yield index, jobs[index].result(error="Triton crashed") if isinstance(result, BrokenProcessPool) else result


def compile_launches(launches: Iterable[Launch], arch: str) -> Iterator[Compiled]:
    """Compile the kernels of recorded launches into Triton's cache, each once, on all cores."""
    sources = [(launch, _source(launch, arch)) for launch in launches]
    # What is known of its integers makes another kernel of it, too.
    distinct = {(_key(launch, source), repr(source.attrs)): launch for launch, source in sources}
    return (compiled for _, compiled in _compile_all([_Job(launch, arch) for launch in distinct.values()]))


def compile_ops(
    ops: Sequence[str], arch: str, out: PathLike | None = None, progress: Progress = lambda done, total: None
) -> list[Compiled]:
    """Compile the kernels of operations, by name, over their bench shapes, in the order of the registry.

    A kernel that does not compile is among them, with its error. Each is compiled once, also where a second model's
    widths (H and I, constants in the code) change nothing else. `out`: a folder, created if missing, for .ptx, .sass
    and .cubin (.amdgcn and .hsaco) files. `progress` is called with the numbers of finished and of all kernels. Large
    jobs are shared with other processes, so a script that calls this needs its `if __name__ == "__main__"`.
    ValueError for an unknown name or `arch`.
    """
    if unknown := [name for name in ops if name not in OPS]:
        raise ValueError(f"compile: argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    found = _kernels([op for name, op in OPS.items() if name in ops], arch, widths=False)
    jobs = [_Job(launch, arch, name, out) for name, launch in found.values()]
    if out is not None:
        Path(out).mkdir(parents=True, exist_ok=True)
    kernels: dict[int, Compiled] = {}
    for index, compiled in _compile_all(jobs):
        kernels[index] = compiled
        progress(len(kernels), len(jobs))
    # Together: the disassembler takes long to start.
    counted = [one for one in kernels.values() if "cubin" in one.stages]
    for one, loops in zip(counted, sass.main_loops([one.stages["cubin"] for one in counted], arch), strict=True):
        vars(one)["loops"] = loops  # where the cached property looks
    return [kernels[index] for index in range(len(jobs))]


def run(args: argparse.Namespace) -> int:
    """Run the command `compile` -> exit status: 1 where a kernel must not run."""
    if args.out is not None and args.out.exists() and not args.out.is_dir():
        raise ValueError(f"--out {str(args.out)!r} is a file, needs a folder")
    with bar(f"compiling for {args.arch}", None) as progress:
        rows = list(map(as_json, compile_ops(args.ops or list(OPS), args.arch, args.out, progress.update)))
    faults = [row for row in rows if row["fault"]]
    if args.json:
        print("\n".join(map(json.dumps, rows)))
        return 1 if faults else 0
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
