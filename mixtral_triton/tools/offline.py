"""The command `compile`: compile what operations launch for a GPU that need not be there."""

import argparse
import copy
import hashlib
import io
import json
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import redirect_stdout
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import triton
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ..cache import KVCache
from ..generate import prefill
from ..kernels.arch import ARCHS, amd, family
from ..kernels.kernel_args import flatten
from ..kernels.launch import INTERPRETED, Launch, multiprocessors, target_arch
from ..kernels.op import Op, runs_on
from ..kernels.packing import GROUPS
from ..kernels.quantized_cache import vector_bytes
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..model import Mixtral
from ..offload_plan import usable_cores
from .gpus import family_note
from .sass import Loop, main_loops
from .terminal import Table, bar, console, parse_choices

_WARPS, _THREADS, _REGISTERS = 64, 32, 65536  # of an SM: warps at most, threads of each, registers
_WIDTHS = ("H", "I")  # of a model: they change no tile
# Bytes of spills that a kernel may have outside its main loops: harmless, a few instructions a program. AMD: none.
_HARMLESS = {"sm_80": 64, "sm_90": 16, "sm_100": 64}
Progress = Callable[[int, int], object]


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would run on `arch`."""

    op: str
    kernel: str
    arch: str
    num_warps: int
    num_stages: int
    constexprs: Mapping[str, Any]
    signature: Mapping[str, str]  # Triton's types by path: "*bf16"; "constexpr" also for None and 1
    dtype: str  # the narrowest type behind a pointer, a floating-point one where there is one
    limit_bytes: int  # of shared memory that a block can have on `arch`
    registers: int = 0  # of a thread; on AMD the vector registers of a lane, those for accumulation included
    spills: int = 0  # bytes of a thread's registers in memory. NVIDIA: its stack frame; AMD: 4 for each register
    shared_bytes: int = 0  # of a block
    file: str | None = None  # the .cubin or .hsaco under `--out`
    stages: Mapping[str, Path] = field(default_factory=dict, repr=False, compare=False)  # in Triton's cache, by kind
    error: str | None = None  # why it does not compile; its figures are 0 then

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The main loops; none for AMD, whose code is not counted."""
        return main_loops([self.stages["cubin"]], self.arch)[0] if "cubin" in self.stages else ()

    @property
    def loop_spills(self) -> int:
        """Instructions in main loops that store or load a spill."""
        return sum(loop.spills for loop in self.loops) if self.spills else 0

    @property
    def loop_flop_per_instruction(self) -> float | None:
        """The figure of the best main loop (attention: without mask); None where no tensor core's FLOP are known."""
        return max((loop.flop_per_instruction for loop in self.loops if loop.flop_per_instruction), default=None)

    @property
    def loop_clocks(self) -> tuple[float, float] | None:
        """Clocks of shared memory and of the tensor cores for an iteration of the main loop with the most products;
        None where the machine code does not show both."""
        loop = max(self.loops, key=lambda loop: loop.products, default=None)
        return None if loop is None else loop.clocks(self.arch, self.num_warps)

    @property
    def loop_instructions_per_byte(self) -> float | None:
        """Thread instructions of a decode step's attention for a byte of keys and values that an iteration loads."""
        if self.kernel != "attention_decode_kernel" or not self.loops:
            return None
        quantized = self.signature["keys.k_scales"] != "constexpr"
        vector = vector_bytes(self.constexprs["D"], {"fp32": 4}.get(self.dtype, 2), quantized)
        least = min(loop.tensor + loop.other for loop in self.loops)
        return 32 * self.num_warps * least / (2 * self.constexprs["BLOCK_N"] * vector)

    @property
    def programs_per_sm(self) -> int | None:
        """How many programs an SM holds at once, by registers and shared memory; None where that is not known."""
        if self.error or amd(self.arch):
            return None
        registers = max(1, self.registers) * _THREADS * self.num_warps
        reserved = 1024  # by CUDA for each block: an SM has that much more than a block's most
        shared = (ARCHS[self.arch].shared_bytes + reserved) // (self.shared_bytes + reserved)
        return max(1, min(_WARPS // self.num_warps, _REGISTERS // registers, shared))

    @property
    def fault(self) -> str | None:
        """The reason why this kernel should not run, or None."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.loop_spills or self.spills > _HARMLESS.get(family(self.arch), 0):
            spills = f"spills {self.spills} bytes, by {self.loop_spills} instructions in main loops"
            return f"{spills}, needs a smaller tile or more warps"
        if self.shared_bytes > self.limit_bytes:
            takes = f"takes {self.shared_bytes} of {self.limit_bytes} bytes of shared memory"
            return f"{takes}, needs a smaller tile or fewer stages"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return what `compile --json` prints."""
        names = [*vars(self), "loop_flop_per_instruction", "loop_instructions_per_byte", "loop_spills", "fault"]
        names += ["programs_per_sm", "loop_clocks"]
        return {name: getattr(self, name) for name in names if name not in ("signature", "stages", "error", "loops")}


def _target(arch: str) -> GPUTarget:
    if INTERPRETED:
        raise ValueError("compile: this process interprets its kernels, needs one with TRITON_INTERPRET unset")
    if arch not in ARCHS:
        raise ValueError(f"compile: argument 'arch' is {arch!r}, needs one of {', '.join(ARCHS)}")
    return GPUTarget("hip", arch, 64) if amd(arch) else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)


@cache
def _binder(fn: Any, arch: str) -> Any:
    backend = make_backend(_target(arch))  # first: an interpreted kernel has no signature
    return create_function_from_signature(fn.signature, fn.params, backend)


def _source(launch: Launch, arch: str) -> ASTSource:
    """Return what Triton's JIT derives from the arguments, so that a launch finds the kernel in the cache."""
    arguments = _binder(launch.fn, arch)(**launch.args, **launch.constexprs)
    _, *types = launch.fn._pack_args(make_backend(_target(arch)), {"enable_fp_fusion": True}, *arguments)
    return ASTSource(launch.fn, *types)


def _key(launch: Launch, source: ASTSource, widths: bool = True) -> str:
    """Return a name for the kernel that is the same in every process. Which integers are multiples of 16 does not
    count; without `widths`, neither do the sizes of a model that are constants in the code."""
    names, constants = launch.fn.arg_names, sorted(source.constants.items())
    counted = [(path, value) for path, value in constants if widths or names[path[0]] not in _WIDTHS]
    parts = (launch.kernel, source.signature, counted, launch.num_warps, launch.num_stages)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def _usage(stages: Mapping[str, Path]) -> dict[str, int]:
    if "cubin" in stages:
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(stages["cubin"])]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    else:
        text = stages["amdgcn"].read_text()
    found = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", text)}
    if "cubin" in stages:
        return {"registers": found["REG"], "spills": found["STACK"] + found["LOCAL"]}
    return {"registers": found["vgpr_count"], "spills": 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])}


def _options(launch: Launch) -> dict[str, Any]:
    """Return the compiler's options. FP fusion is explicit because its default differs between releases of Triton."""
    options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "enable_fp_fusion": True}
    return options | ({"launch_pdl": True} if launch.dependent else {})


def _describe(launch: Launch, arch: str, op: str, **figures: Any) -> Compiled:
    """Return the launch's kernel with `figures`; without any, those of a kernel that does not compile."""
    signature = dict(flatten(_source(launch, arch).signature))
    pointers = [kind.lstrip("*") for kind in signature.values() if kind.startswith("*")]
    dtype = min(pointers, key=lambda kind: (kind[0] in "iu", int(re.sub(r"\D+(\d+).*", r"\1", kind))))
    constexprs = {name: launch.constexprs[name] for name in signature if name in launch.constexprs}
    program = launch.num_warps or 0, launch.num_stages or 0
    limit = ARCHS[arch].shared_bytes
    return Compiled(op, launch.kernel, arch, *program, constexprs, signature, dtype, limit, **figures)


def collect(
    ops: Iterable[Op], arch: str, widths: bool = True, at: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, tuple[str, Launch]]:
    """Return the operation's name and a launch of each kernel, over bench shapes and dtypes, by `_key`. `at`: sizes in
    place of those of the shapes, one or several of a name; ValueError where an operation has none of that name."""
    found: dict[str, tuple[str, Launch]] = {}
    at = at or {}
    for op in ops:
        names = {field.name for field in fields(op.case)}
        if unknown := [name for name in at if name not in names]:
            raise ValueError(f"--at has {unknown[0]}, and {op.name} has {', '.join(sorted(names))}")
        changes = [dict(zip(at, values, strict=True)) for values in product(*at.values())]
        shapes = [replace(shape, **change) for shape in op.bench_shapes for change in changes if runs_on(shape, arch)]
        for dtype, sizes in product(op.dtypes, dict.fromkeys(shapes)):
            args = op.inputs(sizes, dtype, "meta")
            with record_launches(arch) as launches:
                op.run(**args)
            for launch in (launch for launch in launches if launch.fn is not None):
                found.setdefault(_key(launch, _source(launch, arch), widths), (op.name, launch))
    return found


def compile_launch(launch: Launch, arch: str, op: str = "", out: Path | None = None) -> Compiled:
    """Compile the kernel of one recorded launch for `arch`, and keep its files in the folder `out`. ValueError for an
    unknown `arch`, or where this process interprets; the compiler raises whatever its passes do."""
    source, file = _source(launch, arch), None
    kernel = triton.compile(source, target=_target(arch), options=_options(launch))
    stages = {Path(path).suffix[1:]: Path(path) for path in kernel.metadata_group.values()}
    if out is not None:
        for kind in ("amdgcn", "hsaco") if amd(arch) else ("ptx", "sass", "cubin"):
            content = kernel.asm[kind]
            file = str(out.absolute() / f"{launch.kernel}.{arch}.{_key(launch, source)}.{kind}")
            Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    usage = {"shared_bytes": kernel.metadata.shared, **_usage(stages)}
    return _describe(launch, arch, op, file=file, stages=stages, **usage)


def _attempt(launch: Launch, arch: str, op: str, out: Path | None) -> Compiled:
    try:
        return compile_launch(launch, arch, op, out)
    except OSError:  # a full disk, for example, is no fault of the kernel
        raise
    except Exception as error:  # the compiler raises whatever its passes do
        line = (str(error).strip().splitlines() or [""])[0]
        crash = re.search(r"ptxas.* error code -(\d+)", line)
        message = f"ptxas crashed with {signal.Signals(int(crash[1])).name}" if crash else line[:200]
        return _describe(launch, arch, op, error=message)


def compile_all(
    kernels: Iterable[tuple[str, Launch]],
    arch: str,
    progress: Progress = lambda *numbers: None,
    out: Path | None = None,
) -> list[Compiled]:
    """Compile each kernel, on all cores: Triton's passes release the GIL, and ptxas is a process."""
    pool = ThreadPoolExecutor(usable_cores())
    with redirect_stdout(io.StringIO()):  # where ptxas fails, Triton prints all its input
        try:
            futures = [pool.submit(_attempt, launch, arch, op, out) for op, launch in kernels]
            for done, future in enumerate(as_completed(futures), 1):
                future.result()
                progress(done, len(futures))
        finally:  # after Ctrl-C or an error, only what has begun is finished
            pool.shutdown(cancel_futures=True)
    return [future.result() for future in futures]


def compile_launches(
    launches: Iterable[Launch], arch: str, progress: Progress = lambda *numbers: None
) -> list[Compiled]:
    """Compile the kernels of recorded launches into Triton's cache, each once, on all cores."""
    distinct = {}
    for launch in launches:  # what is known of its integers, and a dependent launch, make another kernel of it, too
        source = _source(launch, arch)
        distinct[_key(launch, source), repr(source.attrs), launch.dependent] = "", launch
    return compile_all(distinct.values(), arch, progress)


def with_layers(model: Mixtral, indices: Sequence[int]) -> Any:
    """Return a copy of the model on the same weights, with these of its layers alone."""
    model = copy.copy(model)
    model._modules = {**model._modules, "layers": nn.ModuleList(model.layers[index] for index in indices)}
    model.config = replace(model.config, num_hidden_layers=len(indices))
    return model


def on_meta(model: Mixtral, indices: Sequence[int]) -> Any:
    """Return a copy of the model with these layers on the meta device, without a caller's hooks and other ranks."""
    model, ranks = with_layers(model, indices), model.ranks
    memo: dict[int, Any] = {id(x): x.detach().to("meta") for x in (*model.parameters(), *model.buffers())}
    if ranks is not None:
        collectives: dict[str, Any] = {"all_reduce": lambda part, in_order: part}
        collectives["all_gather"] = lambda part, size: part.new_empty((*part.shape[:-1], size))
        collectives |= dict.fromkeys(("gather", "all_gather_object"), lambda part: [part] * ranks.shard.ranks)
        memo[id(ranks)] = SimpleNamespace(shard=ranks.shard, local_ids=ranks.local_ids, **collectives)
    model = copy.deepcopy(model, memo)
    for module in model.modules():  # which may read values
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def on_meta_by_kind(model: Mixtral) -> Any:
    """Return `on_meta` with a layer that has experts in host memory, and one without."""
    kinds = {bool(getattr(layer.down_proj, "on_host", ())): index for index, layer in enumerate(model.layers)}
    return on_meta(model, [*kinds.values()])


def launch_text(
    model: Mixtral, tokens: int, new: int, cache_dtype: torch.dtype | None = None, batch: int = 1, held: int = 0
) -> None:
    """Launch on the meta device what `generate` launches for prompts of up to so many tokens, `held` of which a cache
    has, and `new` ones."""
    model = on_meta_by_kind(model)
    ids, lengths = (
        torch.empty(shape, dtype=torch.int64, device="meta") for shape in ((batch, tokens - held), (batch,))
    )
    cache = KVCache(model.config, batch, tokens + new, "meta", cache_dtype or model.dtype)
    model.head(prefill(model, cache, ids, lengths))
    model.head(model.hidden(ids[:, :1], cache)[:, 0])


def compile_ahead(model: Mixtral, launch: Callable[[], object], progress: Progress) -> None:
    """Compile the kernels that `launch` launches on the meta device for the model's GPU, if the compiler can."""
    arch = target_arch(model.device)
    if INTERPRETED or model.device.type != "cuda" or arch not in ARCHS:
        return
    with torch.no_grad(), record_launches(arch, multiprocessors(model.device)) as records:
        launch()
    launches = [each for each in records if each.fn is not None]
    # Each rank begins with other kernels, and finds in the cache what another has compiled.
    first = 0 if model.ranks is None else len(launches) * model.ranks.shard.rank // model.ranks.shard.ranks
    compile_launches(launches[first:] + launches[:first], arch, progress)


def compile_ops(
    ops: Sequence[str],
    arch: str,
    out: Path | None = None,
    progress: Progress = lambda *numbers: None,
    kernel: str | None = None,
    at: Mapping[str, Sequence[Any]] | None = None,
) -> list[Compiled]:
    """Compile the kernels of operations, by name, over their bench shapes, each once: a second model's widths make no
    other kernel. `out`: a folder for the files, created if missing. kernel: this one alone. at: as in `collect`.
    ValueError for an unknown name or `arch`."""
    if unknown := [name for name in ops if name not in OPS]:
        raise ValueError(f"compile: argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    found = collect([op for name, op in OPS.items() if name in ops], arch, widths=False, at=at)
    if kernel is not None:
        names = dict.fromkeys(launch.kernel for _, launch in found.values())
        found = {key: each for key, each in found.items() if each[1].kernel in (kernel, f"{kernel}_kernel")}
        if not found:
            raise ValueError(f"--kernel is {kernel!r}, needs one of {', '.join(names)}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    kernels = compile_all(found.values(), arch, progress, out)
    counted = [one for one in kernels if "cubin" in one.stages]
    # Together, since the disassembler takes long to start.
    for one, loops in zip(counted, main_loops([one.stages["cubin"] for one in counted], arch), strict=True):
        vars(one)["loops"] = loops  # where the cached property looks
    return kernels


def _tile(row: Mapping[str, Any]) -> str:
    return "x".join(str(size) for name, size in row["constexprs"].items() if name.startswith("BLOCK_"))


def _format(row: Mapping[str, Any]) -> str:
    """Return the name of a quantized weight's format; "" for a dense weight, and for a kernel that reads none."""
    layout = row["constexprs"].get("LAYOUT")
    if layout is None or layout[0] == "dense":
        return ""
    return f"{layout[0]}:{layout[1]}" if layout[1] in GROUPS else str(layout[0])


def resources_table(arch: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate rows of `Compiled.as_dict`: a line for all kernels of the same name, dtype, tile and figures."""
    figures = {"regs": "registers", "spills": "spills", "shared": "shared_bytes", "FLOP/i": "loop_flop_per_instruction"}
    caption = {"w/s": "warps and stages", "regs": "registers of a thread", "kernels": "how many have these figures"}
    tiles = (name.removeprefix("BLOCK_") for row in rows for name in row["constexprs"] if name.startswith("BLOCK_"))
    caption["tile"] = f"BLOCK_ of {', '.join(dict.fromkeys(tiles))}, those that a kernel has"
    caption["p/SM"] = "programs that an SM holds at once"
    caption["FLOP/i"] = "of the tensor cores, for each other instruction of the main loop"
    caption["smem/tensor"] = "clocks that shared memory and the tensor cores take for an iteration of the main loop"
    caption["i/B"] = "thread instructions there for a byte of a cache"
    lines: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        line = {"kernel": row["kernel"].removesuffix("_kernel"), "dtype": row["dtype"], "tile": _tile(row)}
        line["weight"] = _format(row)
        line["w/s"] = f"{row['num_warps']}/{row['num_stages']}"
        line |= {name: "" if row[key] is None else f"{row[key]:,.0f}" for name, key in figures.items()}
        line["p/SM"] = str(row["programs_per_sm"] or "")
        line["smem/tensor"] = "/".join(f"{clocks:,.0f}" for clocks in row["loop_clocks"] or ())
        per_byte = row["loop_instructions_per_byte"]
        line["i/B"] = "" if per_byte is None else f"{per_byte:.1f}"
        lines.update([("bold red" if row["fault"] else "", *line.items())])
    table = Table(f"Compiled for {arch}", caption, keys=3, text=["weight"])
    for (style, *cells), count in lines.items():
        table.add(dict(cells) | {"kernels": str(count)}, style)
    return table


def run(args: argparse.Namespace) -> int:
    """Run the command `compile` -> exit status: 1 where a kernel must not run."""
    status, out = 0, console()
    for arch in dict.fromkeys(args.arch):
        with bar(f"compiling for {arch}", None) as progress:
            ops, at = args.ops or list(OPS), parse_choices("--at", args.at)
            compiled = compile_ops(ops, arch, args.out, progress.update, args.kernel, at)
            rows = [one.as_dict() for one in compiled]
        faults = [row for row in rows if row["fault"]]
        status |= bool(faults)
        if args.json:
            print("\n".join(map(json.dumps, rows)))
            continue
        out.print(family_note(arch), end="")
        out.print(resources_table(arch, rows))
        for row in faults:
            kernel = f"{row['op']}, {row['kernel']}, {row['dtype']}"
            out.print(f"{kernel}: {row['fault']} (tile {_tile(row)})", style="red", markup=False)
        limit, style = ARCHS[arch].shared_bytes, "bold red" if faults else "bold green"
        verdict = f"{len(faults)} of them must not run" if faults else "none spills in its main loop, all fit"
        out.print(f"{len(rows)} kernels; shared memory of a block: {limit:,} bytes at most. [{style}]{verdict}[/]")
    return status
