"""The command `compile`: compile what operations launch for a GPU that need not be there."""

import argparse
import json
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

from ..kernels.launching.arch import ARCHS, amd
from ..kernels.launching.kernel_args import flatten
from ..kernels.launching.launch import Launch
from ..kernels.operation.cases import OpWithCases, as_dict, runs_on
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..kernels.weights.packing import GROUPS
from ..model.precompile import Progress, build, kernel_key, on_all_cores, source_of
from ..terminal import Bar, Table, check_known, check_range, console, table_of
from .sass import Loop, main_loops

_WARPS, _THREADS, _REGISTERS = 64, 32, 65536  # of an SM: warps at most, threads of each, registers
# Bytes that a thread may spill outside main loops, on NVIDIA: a few instructions. Triton 3.7 spills more there.
OUTSIDE_LOOPS = 308 if triton.__version__.startswith("3.7") else 64
CAPTION = (
    "w/s: warps and stages; regs: registers of a thread; p/SM: programs that an SM holds at once; FLOP/i: of the "
    "tensor cores, for each other instruction of the main loop; smem/tensor: clocks that shared memory and the tensor "
    "cores take for an iteration of the main loop; kernels: how many have these figures"
)


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
    spills: int = 0  # bytes of a thread's registers in memory. NVIDIA: its stack frame; AMD: 4 for each vector register
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
        if self.loop_spills or self.spills > (0 if amd(self.arch) else OUTSIDE_LOOPS):
            spills = f"spills {self.spills} bytes, by {self.loop_spills} instructions in main loops"
            return f"{spills}, needs a smaller tile or more warps"
        if self.shared_bytes > self.limit_bytes:
            takes = f"takes {self.shared_bytes} of {self.limit_bytes} bytes of shared memory"
            return f"{takes}, needs a smaller tile or fewer stages"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return what `compile --json` prints."""
        names = [*vars(self), "loop_flop_per_instruction", "loop_spills", "fault", "programs_per_sm", "loop_clocks"]
        shown = {name: getattr(self, name) for name in names if name not in ("signature", "stages", "error", "loops")}
        named = {name: x._asdict() for name, x in self.constexprs.items() if hasattr(x, "_asdict")}
        return shown | {"constexprs": {**self.constexprs, **named}}


def _usage(stages: Mapping[str, Path]) -> dict[str, int]:
    if "cubin" in stages:
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(stages["cubin"])]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    else:
        text = stages["amdgcn"].read_text()
    counts = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", text)}
    if "cubin" in stages:
        return {"registers": counts["REG"], "spills": counts["STACK"] + counts["LOCAL"]}
    # A scalar register that spills goes to a lane of a vector register, not to memory.
    return {"registers": counts["vgpr_count"], "spills": 4 * counts["vgpr_spill_count"]}


def describe(launch: Launch, arch: str, op: str, **figures: Any) -> Compiled:
    """Return the launch's kernel with `figures`; without any, those of a kernel that does not compile."""
    signature = dict(flatten(source_of(launch, arch).signature))
    pointers = [kind.lstrip("*") for kind in signature.values() if kind.startswith("*")]
    dtype = min(pointers, key=lambda kind: (kind[0] in "iu", int(re.sub(r"\D+(\d+).*", r"\1", kind))))
    constexprs = {name: launch.constexprs[name] for name in signature if name in launch.constexprs}
    constexprs = {name: getattr(value, "__name__", value) for name, value in constexprs.items()}  # of a function
    program = launch.num_warps or 0, launch.num_stages or 0
    limit = ARCHS[arch].shared_bytes
    return Compiled(op, launch.kernel, arch, *program, constexprs, signature, dtype, limit, **figures)


def collect(
    ops: Iterable[OpWithCases], arch: str, widths: bool = True, choices: Mapping[str, Sequence[Any]] | None = None
) -> dict[str, tuple[str, Launch]]:
    """Return the operation's name and a launch of each kernel, over bench shapes and dtypes, by `kernel_key`.
    `choices`: sizes in place of those of the shapes, one or several of a name; ValueError where an operation has none
    of that name."""
    kernels: dict[str, tuple[str, Launch]] = {}
    choices = choices or {}
    for op in ops:
        check_known(f"{op.name}: a name of --at", choices, (field.name for field in fields(op.case)))
        changes = [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]
        shapes = [replace(shape, **change) for shape in op.bench_shapes for change in changes if runs_on(shape, arch)]
        for dtype, sizes in product(op.dtypes, dict.fromkeys(shapes)):
            if choices:
                check_sizes("--at", op, sizes, dtype)
            args = op.inputs(sizes, dtype, "meta")
            with record_launches(arch) as launches:
                op.run(**args)
            for launch in (launch for launch in launches if launch.fn is not None):
                kernels.setdefault(kernel_key(launch, source_of(launch, arch), widths), (op.name, launch))
    return kernels


def check_sizes(option: str, op: OpWithCases, sizes: Any, dtype: Any) -> None:
    """Raise ValueError where a user's sizes make no arguments of the operation."""
    try:
        if hasattr(sizes, "K"):
            check_range(f"K of {option}", sizes.K, 0, sizes.E, "which is E: a token's experts differ")
        op.check(**op.inputs(sizes, dtype, torch.device("meta"), None))
    except (RuntimeError, OverflowError, TypeError, ZeroDivisionError, LookupError):
        text = ",".join(f"{name}={value}" for name, value in as_dict(sizes).items())
        raise ValueError(f"{option} is {text!r:.80}, needs tensors that can be") from None


def compile_launch(launch: Launch, arch: str, op: str = "", out: Path | None = None) -> Compiled:
    """Compile the kernel of one recorded launch for `arch`, and keep its files in the folder `out`. ValueError for an
    unknown `arch`, or where this process interprets; the compiler raises whatever its passes do."""
    kernel, file = build(launch, arch), None
    stages = {Path(path).suffix[1:]: Path(path) for path in kernel.metadata_group.values()}
    if out is not None:
        name = f"{launch.kernel}.{arch}.{kernel_key(launch, source_of(launch, arch))}"
        for kind in ("amdgcn", "hsaco") if amd(arch) else ("ptx", "sass", "cubin"):
            content = kernel.asm[kind]
            file = str(out.absolute() / f"{name}.{kind}")
            Path(file).write_bytes(content if isinstance(content, bytes) else content.encode())
    usage = {"shared_bytes": kernel.metadata.shared, **_usage(stages)}
    return describe(launch, arch, op, file=file, stages=stages, **usage)


def _describe_fault(launch: Launch, arch: str, op: str, error: BaseException) -> Compiled:
    while error.__cause__ is not None:  # Triton wraps an error once for each function that it is inlined into
        error = error.__cause__
    line = (getattr(error, "error_message", None) or str(error).strip() or repr(error)).splitlines()[0]
    return describe(launch, arch, op, error=line[:200])


def compile_all(
    kernels: Iterable[tuple[str, Launch]],
    arch: str,
    progress: Progress = lambda *numbers: None,
    out: Path | None = None,
) -> list[Compiled]:
    """Compile each kernel, on all cores."""
    kernels = [*kernels]
    results = on_all_cores(lambda kernel: compile_launch(kernel[1], arch, kernel[0], out), kernels, progress)
    compiled = zip(kernels, results, strict=True)
    return [_describe_fault(x, arch, op, y) if isinstance(y, Exception) else y for (op, x), y in compiled]


def compile_ops(
    ops: Sequence[str],
    arch: str,
    out: Path | None = None,
    progress: Progress = lambda *numbers: None,
    kernel: str | None = None,
    choices: Mapping[str, Sequence[Any]] | None = None,
) -> list[Compiled]:
    """Compile the kernels of operations, by name, over their bench shapes, each once: a second model's widths make no
    other kernel. `out`: a folder for the files, created if missing. kernel: this one alone. choices: as in `collect`.
    ValueError for an unknown name or `arch`."""
    check_known("argument 'OP'", ops, OPS)
    launches = collect([op for name, op in OPS.items() if name in ops], arch, widths=False, choices=choices)
    if kernel is not None:
        name = f"{kernel.removesuffix('_kernel')}_kernel"
        check_known("--kernel", [name], dict.fromkeys(launch.kernel for _, launch in launches.values()))
        launches = {key: entry for key, entry in launches.items() if entry[1].kernel == name}
    if not launches:
        raise ValueError(f"{', '.join(ops)}: no kernel runs at these sizes, needs larger ones of --at")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    kernels = compile_all(launches.values(), arch, progress, out)
    counted = [binary for binary in kernels if "cubin" in binary.stages]
    # Together, since the disassembler takes long to start.
    for binary, loops in zip(counted, main_loops([binary.stages["cubin"] for binary in counted], arch), strict=True):
        vars(binary)["loops"] = loops  # where the cached property looks
    return kernels


def _tile(row: Mapping[str, Any]) -> str:
    return "x".join(str(size) for name, size in row["constexprs"].items() if name.startswith("BLOCK_"))


def _format(row: Mapping[str, Any]) -> str:
    """Return the name of a quantized weight's format; "" for a dense weight, and for a kernel that reads none."""
    layout = row["constexprs"].get("LAYOUT")
    if layout is None or layout["format"] == "dense":
        return ""
    return f"{layout['format']}:{layout['group']}" if layout["group"] in GROUPS else str(layout["format"])


def resources_table(arch: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate rows of `Compiled.as_dict`: a line for all kernels of the same name, dtype, tile and figures."""
    figures = {"regs": "registers", "spills": "spills", "shared": "shared_bytes", "FLOP/i": "loop_flop_per_instruction"}
    tiles = (name.removeprefix("BLOCK_") for row in rows for name in row["constexprs"] if name.startswith("BLOCK_"))
    lines: Counter[tuple[Any, ...]] = Counter()
    for row in rows:
        line = {"kernel": row["kernel"].removesuffix("_kernel"), "dtype": row["dtype"], "tile": _tile(row)}
        line["weight"] = _format(row)
        line["w/s"] = f"{row['num_warps']}/{row['num_stages']}"
        line |= {name: "" if row[key] is None else f"{row[key]:,.0f}" for name, key in figures.items()}
        line["p/SM"] = str(row["programs_per_sm"] or "")
        line["smem/tensor"] = "/".join(f"{clocks:,.0f}" for clocks in row["loop_clocks"] or ())
        lines.update([("bold red" if row["fault"] else "", *line.items())])
    shown = [(dict(cells) | {"kernels": str(count)}, style) for (style, *cells), count in lines.items()]
    caption = f"tile: BLOCK_ of {', '.join(dict.fromkeys(tiles))}, those that a kernel has; {CAPTION}"
    return table_of(f"Compiled for {arch}", shown, caption)


def parse_sizes(option: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return sizes and formats by name from texts such as "T=4096" and "weight=int4:128"."""
    sizes: dict[str, Any] = {}
    for text in texts:
        name, _, size = text.partition("=")
        if not name or not size:
            raise ValueError(
                f"{option} is {text!r}, needs a size letter and a number, or a format: T=4096, weight=int8"
            )
        if name == "cache" and size != "int8":
            raise ValueError(f"{option} is {text!r}, needs int8, or no cache=: the cache is then in the model's dtype")
        sizes[name] = int(size) if size.isdecimal() else size
    return sizes


def parse_choices(option: str, texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return the sizes and formats of each name, one or several: from T=1 and T=4096 {"T": [1, 4096]}."""
    choices = dict[str, list[Any]]()
    for name, size in (item for text in texts for item in parse_sizes(option, [text]).items()):
        choices.setdefault(name, []).append(size)
    return choices


def run(args: argparse.Namespace) -> int:
    """Run the command `compile` -> exit status: 1 where a kernel must not run."""
    status, out = 0, console()
    for arch in dict.fromkeys(args.arch):
        with Bar(f"compiling for {arch}") as progress:
            ops, choices = args.ops or list(OPS), parse_choices("--at", args.at)
            compiled = compile_ops(ops, arch, args.out, progress.set, args.kernel, choices)
            rows = [binary.as_dict() for binary in compiled]
        faults = [row for row in rows if row["fault"]]
        status |= bool(faults)
        if args.json:
            print("\n".join(map(json.dumps, rows)))
            continue
        out.print(resources_table(arch, rows))
        for row in faults:
            kernel = f"{row['op']}, {row['kernel']}, {row['dtype']}"
            out.print(f"{kernel}: {row['fault']} (tile {_tile(row)})", style="red", markup=False)
        limit, style = ARCHS[arch].shared_bytes, "bold red" if faults else "bold green"
        verdict = f"{len(faults)} of them must not run" if faults else "none spills in its main loop, all fit"
        out.print(f"{len(rows)} kernels; shared memory of a block: {limit:,} bytes at most. [{style}]{verdict}[/]")
    return status
