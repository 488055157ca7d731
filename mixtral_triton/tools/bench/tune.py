"""The tuner: it varies a kernel's launch configuration, drops what does not compile or fit, and times the rest.

It tries the configurations of EXTRA_TOKENS, then climbs over neighbours of the fastest so far. A configuration is
overridden where an operation selects its own, so that grids, partial sums and tile descriptors follow it.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from ...kernels.launch import override_configs, target_arch
from ...kernels.op import Launch, LaunchConfig, Op, Shape
from ...kernels.record import record_launches
from ...kernels.registry import OPS
from ..offline import Compiled, compile_launch
from ..predict import family_note
from ..terminal import Column, Table, bar, console
from . import measure
from .cases import Case, cases, check_of
from .measure import DeviceTimer, Timer
from .report import micro, number, sizes_text

# What may vary: tiles, how many tiles share a stretch of L2, and a decode's splits. SPLIT_K decides a result's bits.
VARIED = ("BLOCK_", "GROUP_", "SPLITS")
# Tiles that must cover a full dimension, in every kernel or in one: a smaller one is wrong, a larger one idle.
FULL_DIM_TILES_OF_ALL = {"BLOCK_D", "BLOCK_E", "BLOCK_S", "BLOCK_HQ", "BLOCK_HKV", "BLOCK_HALF"}
FULL_DIM_TILES = {
    **{"attention_decode_kernel": {"BLOCK_M"}, "linear_decode_kernel": {"BLOCK_T"}},
    **{"experts_down_decode_kernel": {"BLOCK_T"}, "experts_up_decode_kernel": {"BLOCK_T"}},
    **{"gate_route_kernel": {"BLOCK_K"}, "route_kernel": {"BLOCK_K"}},
    **{"rms_norm_kernel": {"BLOCK_H"}, "embed_rms_norm_kernel": {"BLOCK_H"}},
}
# The configurations for these numbers of tokens are tried, too: single steps from the current one may not reach them.
EXTRA_TOKENS = (65, 256, 448, 8192)
# Kernels that an operation launches only where `override_configs` names them, because it selects a library there.
ALTERNATIVE_KERNELS = {"linear": {"linear_decode_kernel"}}
WARPS, STAGES = (1, 16), (1, 8)
FASTER = 0.98  # of the best time so far; a smaller gain is noise
ROUNDS = 5


@dataclass(frozen=True)
class Candidate:
    """A configuration, how it compiled, and its time or a note that says why it has none."""

    config: LaunchConfig
    compiled: Compiled | None = None
    seconds: float | None = None
    note: str | None = None

    @property
    def code(self) -> Any:
        asm = {} if self.compiled is None else self.compiled.asm
        return asm.get("cubin") or asm.get("hsaco")

    def as_dict(self) -> dict[str, Any]:
        names = ("registers", "shared_bytes", "loop_flop_per_instruction")
        compiled = {name: self.compiled and getattr(self.compiled, name) for name in names}
        settings = {"num_warps": self.config.num_warps, "num_stages": self.config.num_stages}
        time = {"time_us": self.seconds and self.seconds * 1e6, "note": self.note}
        return {"constexprs": dict(self.config.constexprs), **settings, **compiled, **time}


@dataclass(frozen=True)
class Tuned:
    """The configurations tried for one kernel of one case, the current one first, and the fastest.

    best     the current one where nothing was timed, or nothing is faster by more than noise
    library  whether the operation selects a library here; then the first is what the kernel would be launched with
    library_s  the library's time, where it was timed
    """

    case: Case
    kernel: str
    arch: str
    candidates: tuple[Candidate, ...]
    best: LaunchConfig
    library: bool = False
    library_s: float | None = None

    def as_dict(self) -> dict[str, Any]:
        case = {"op": self.case.op.name, "sizes": self.case.as_dict(), "arch": self.arch, "kernel": self.kernel}
        case["literal"] = literal(self.case.op, self.kernel, self.best)
        library_us = self.library_s and self.library_s * 1e6
        return {**case, "library_us": library_us, "tried": [one.as_dict() for one in self.candidates]}


def full_dim_tiles(op: Op, kernel: str, launch: Launch | None = None) -> set[str]:
    """Return the tiles that do not vary; for a launch on a quantized weight also its depth, which the layout fixes."""
    tiles = FULL_DIM_TILES_OF_ALL | FULL_DIM_TILES.get(kernel, set())
    if op.name == "experts_add_rms_norm" and kernel == "experts_combine_kernel":  # its norm needs the full row
        tiles |= {"BLOCK_H"}
    quantized = launch is not None and launch.constexprs.get("LAYOUT", ("dense",))[0] != "dense"
    return tiles | ({"BLOCK_K"} if quantized else set())


def neighbours(config: LaunchConfig, fixed: set[str]) -> list[LaunchConfig]:
    """Return the configurations one step away: a tile or the warps doubled or halved, one stage more or less."""
    tiles = [name for name in config.constexprs if name.startswith(VARIED) and name not in fixed]
    steps = [(name, size) for name in tiles for size in (config.constexprs[name] // 2, config.constexprs[name] * 2)]
    found = [replace(config, constexprs={**config.constexprs, name: size}) for name, size in steps if size]
    warps = [n for n in (config.num_warps // 2, config.num_warps * 2) if WARPS[0] <= n <= WARPS[1]]
    stages = [n for n in (config.num_stages - 1, config.num_stages + 1) if STAGES[0] <= n <= STAGES[1]]
    found += [replace(config, num_warps=n) for n in warps]
    return found + [replace(config, num_stages=n) for n in stages]


def kernel_configs(
    case: Case, arch: str, config: dict[str, LaunchConfig] | None = None
) -> dict[str, tuple[Launch, LaunchConfig]]:
    """Return the first launch and the configuration of each kernel that the operation configures or could launch."""
    found = _selected_configs(case, arch, config or {})
    for kernel in ALTERNATIVE_KERNELS.get(case.op.name, set()) - set(found):
        config = {kernel: case.op.configs(case.sizes, case.dtype, arch)[kernel]}
        found |= {name: one for name, one in _selected_configs(case, arch, config).items() if name == kernel}
    return found


def extra_configs(case: Case, kernel: str, arch: str, full_dims: set[str]) -> list[LaunchConfig]:
    """Return the configurations that the operation selects for EXTRA_TOKENS, with the same full-dimension tiles."""

    def select(sizes: Shape) -> LaunchConfig | None:
        return case.op.configs(sizes, case.dtype, arch).get(kernel)

    def tiles(config: LaunchConfig | None) -> list[Any]:
        return [config and config.constexprs.get(name) for name in sorted(full_dims)]

    sizes = Shape(case.sizes)
    found = [select(sizes | {"T": T}) for T in EXTRA_TOKENS if "T" in sizes]
    return [one for at, one in enumerate(found) if one and one not in found[:at] and tiles(one) == tiles(select(sizes))]


def _selected_configs(case: Case, arch: str, config: dict[str, LaunchConfig]) -> dict[str, tuple[Launch, LaunchConfig]]:
    shapes = case.inputs(torch.device("meta"))
    with override_configs(config) as used, record_launches(arch) as launches:
        case.op.run(**shapes)
    return {launch.kernel: (launch, used[launch.kernel]) for launch in reversed(launches) if launch.kernel in used}


def compile_candidate(case: Case, kernel: str, config: LaunchConfig, arch: str, on_gpu: bool = False) -> Candidate:
    """Compile `kernel` in `config` for `arch`. `on_gpu`: a GPU of it is current, and a launch can check the rest."""
    try:
        launch, _ = kernel_configs(case, arch, {kernel: config})[kernel]
        compiled = compile_launch(launch, arch, case.op.name)
    except ValueError:  # an architecture that the offline compiler does not know
        if not on_gpu:
            raise
        return Candidate(config)
    except Exception as error:  # the compiler raises whatever its passes do
        lines = str(error).strip().splitlines() or [""]
        return Candidate(config, note=f"does not compile: {type(error).__name__}: {lines[0][:100]}")
    return Candidate(config, compiled, note=compiled.fault)


def tune(case: Case, kernel: str, arch: str, timer: Timer | None = None, device: torch.device | None = None) -> Tuned:
    """Climb from the current configuration. Without a timer, compile it and its neighbours only."""
    time_call, found = None, list[Candidate]()
    if timer is not None and device is not None:
        args = case.inputs(device)
        time_call = partial(measure.attempt, lambda: measure.our_call(case, args), args, check_of(case.op, args), timer)

    def visit(config: LaunchConfig) -> None:
        one = compile_candidate(case, kernel, config, arch, on_gpu=time_call is not None)
        if one.note is None and one.code is not None and one.code in [other.code for other in found]:
            one = replace(one, note="the same code as one before")
        if one.note is None and time_call is not None:
            with override_configs({kernel: config}), torch.no_grad():
                outcome = time_call()
            one = replace(one, note=outcome.note, seconds=outcome.seconds)
        found.append(one)

    launch, current = kernel_configs(case, arch)[kernel]
    library = kernel not in _selected_configs(case, arch, {})
    library_s = time_call().seconds if library and time_call is not None else None
    visit(current)
    best = found[0]
    full = full_dim_tiles(case.op, kernel, launch)
    extra = extra_configs(case, kernel, arch, full)
    for _ in range(ROUNDS):
        start = best
        for config in (*extra, *neighbours(start.config, full)):
            if config not in [one.config for one in found]:
                visit(config)
        for one in found:
            if one.seconds is not None and one.seconds < FASTER * (best.seconds or float("inf")):
                best = one
        if best is start:
            break
    return Tuned(case, kernel, arch, tuple(found), best.config, library, library_s)


def literal(op: Op, kernel: str, config: LaunchConfig) -> str:
    """Return the entry for an operation's `configs`; a comment has its tile, warps and stages, as the tables do."""
    tiles = ", ".join(f'"{name}": {size}' for name, size in config.constexprs.items())
    fixed = full_dim_tiles(op, kernel)
    row = [size for name, size in config.constexprs.items() if name.startswith(VARIED) and name not in fixed]
    row += [config.num_warps, config.num_stages]
    settings = f"num_warps={config.num_warps}, num_stages={config.num_stages}"
    return f'"{kernel}": LaunchConfig({{{tiles}}}, {settings}),  # ({", ".join(map(str, row))})'


def _table(tuned: Tuned) -> Table:
    """Return a line per configuration, the current one first; constants that none varies are in the title."""
    first = tuned.candidates[0].config.constexprs
    varied = [name for name in first if len({one.config.constexprs[name] for one in tuned.candidates}) > 1]
    same = "".join(f", {name}={first[name]}" for name in first if name not in varied)
    case = f"{tuned.case.op.name}, {sizes_text(tuned.case.as_dict())}, {tuned.case.dtype_name}, {tuned.arch}"
    headings = ("", *varied, "warps", "stages", "time, us", "registers", "shared", "FLOP/i", "note")
    columns = [Column(heading, number=heading not in ("", "note")) for heading in headings]
    table = Table(f"{tuned.kernel}: {case}{same}", columns)
    for at, one in enumerate(tuned.candidates):
        config, compiled, resources = one.config, one.compiled, ["-", "-", "-"]
        if compiled is not None:
            loop = compiled.loop_flop_per_instruction
            resources = [str(compiled.registers), f"{compiled.shared_bytes:,}", number(loop)]
        mark = "now" if at == 0 else "best" if one.seconds is not None and config == tuned.best else ""
        settings = (*(config.constexprs[name] for name in varied), config.num_warps, config.num_stages)
        cells = (mark, *map(str, settings), micro(one.seconds), *resources, one.note or "")
        table.add(*cells, style="dim" if one.note else "")
    return table


def tune_report(tuned: Tuned, width: int) -> Group:
    """Return the table and, in lines of at most `width` that are Python, the literal to paste."""
    timed = any(one.seconds is not None for one in tuned.candidates)
    verdict = "the fastest is" if timed else "nothing timed; the present choice is"
    if timed and tuned.best == tuned.candidates[0].config:
        verdict = "nothing is faster than the present choice,"
    if tuned.library:
        time = "" if tuned.library_s is None else f", which takes {micro(tuned.library_s)} us"
        verdict = f"a library is the present choice{time}; of this kernel, {verdict}"
    code, row = literal(tuned.case.op, tuned.kernel, tuned.best).split("  # ")
    wrapped = textwrap.wrap(code, width - 4, subsequent_indent=" " * 4, break_on_hyphens=False)
    lines = [f"    # {row}", *("    " + line for line in wrapped)]
    return Group(_table(tuned), Text(verdict), *map(Text, lines), Text())


def run(args: argparse.Namespace) -> int:
    """Run the command `tune` and return its exit status."""
    if unknown := [name for name in args.ops if name not in OPS]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    selected = cases(args.ops or tuple(OPS), quick=not args.at, at=args.at)  # a few of each, or those of these sizes
    out = console(stderr=args.json)
    device, timer, reason = None, None, "there is no GPU"
    if args.dry_run or args.arch:
        reason = "--dry-run was given" if args.dry_run else f"--arch asks for {args.arch}, here or not"
    elif torch.cuda.is_available():
        device = torch.device("cuda")
        timer = DeviceTimer(device)
    arch = args.arch or target_arch(device)
    if note := family_note(arch):
        out.print(note)
    if timer is None:
        out.print(f"Nothing was timed: {reason}. These are the neighbours of the present choice, compiled for {arch}.")
    kernels = [(case, kernel) for case in selected for kernel in kernel_configs(case, arch)]
    if not kernels:
        raise ValueError("nothing to tune: at these sizes a library does the work")
    with bar("tuning", len(kernels)) as progress:
        for done, (case, kernel) in enumerate(kernels, 1):
            tuned = tune(case, kernel, arch, timer, device)
            progress.update(done, len(kernels))
            if args.json:
                print(json.dumps(tuned.as_dict()), flush=True)
            else:
                out.print(tune_report(tuned, out.width))
    return 0
