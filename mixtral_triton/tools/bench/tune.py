"""The command `tune`: climb from a kernel's launch configuration over neighbours that compile, fit and are faster."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import torch
from rich.text import Text

from ...kernels import tiles
from ...kernels.arch import ARCHS
from ...kernels.facts import facts_of
from ...kernels.launch import INTERPRETED, Configs, Launch, LaunchConfig, override_configs, target_arch
from ...kernels.op import runs_on
from ...kernels.record import record_launches
from ...kernels.registry import OPS
from ..offline import compile_launches
from ..predict import family_note
from ..terminal import QUANTIZED, Table, bar, console
from . import measure
from .cases import Case, cases, check_of
from .command import micro, sizes_text

# What may vary: tiles, how many tiles share a stretch of L2, and a decode's splits. SPLIT_K decides a result's bits.
VARIED = ("BLOCK_", "GROUP_", "SPLITS")
WARPS, STAGES = range(1, 17), range(1, 9)
FASTER = 0.98  # of the best time so far; a smaller gain is noise
ROUNDS = 5
Candidate = tuple[LaunchConfig, measure.Outcome]


def fixed_tiles(launch: Launch) -> set[str]:
    """Return the tiles that do not vary, of a quantized weight also its depth, which the layout fixes."""
    quantized = launch.constexprs.get("LAYOUT", ("dense",))[0] != "dense"
    return {*facts_of(launch.kernel).full, *(("BLOCK_K",) if quantized else ())}


def neighbours(config: LaunchConfig, fixed: set[str]) -> list[LaunchConfig]:
    """Return the configurations one step away: a tile or the warps doubled or halved, one stage more or less."""
    varied = {name: size for name, size in config.constexprs.items() if name.startswith(VARIED) and name not in fixed}
    steps = [(name, size) for name, now in varied.items() for size in (now // 2, now * 2) if size]
    found = [replace(config, constexprs={**config.constexprs, name: size}) for name, size in steps]
    found += [replace(config, num_warps=n) for n in (config.num_warps // 2, config.num_warps * 2) if n in WARPS]
    found += [replace(config, num_stages=n) for n in (config.num_stages - 1, config.num_stages + 1) if n in STAGES]
    return found


def kernel_configs(case: Case, arch: str, overrides: Configs | None = None) -> dict[str, tuple[Launch, LaunchConfig]]:
    """Return the first launch and the configuration of each kernel that the operation configures."""
    shapes = case.inputs(torch.device("meta"))
    with override_configs(overrides or {}) as used, record_launches(arch) as launches:
        case.op.run(**shapes)
    return {launch.kernel: (launch, used[launch.kernel]) for launch in reversed(launches) if launch.kernel in used}


def compile_fault(case: Case, kernel: str, config: LaunchConfig, arch: str) -> str | None:
    """Return why `kernel` should not run with `config`: it cannot be built or compiled, spills, or does not fit."""
    if arch not in ARCHS:  # the offline compiler has no limits of this GPU: a launch must show it
        return None
    try:
        launch, _ = kernel_configs(case, arch, {kernel: config})[kernel]
    except ValueError as error:  # for example, a descriptor's tile that is no power of 2
        return f"cannot be built: {error}"
    return compile_launches([launch], arch)[0].fault


def tune(
    case: Case, kernel: str, arch: str, timer: measure.Timer | None = None, device: torch.device | None = None
) -> tuple[list[Candidate], int]:
    """Climb from the current configuration -> what was tried, that one first, and the fastest's place."""
    args = None if device is None else case.inputs(device)

    def visit(config: LaunchConfig) -> Candidate:
        fault = compile_fault(case, kernel, config, arch)
        if fault is not None or args is None or timer is None:
            return config, measure.Outcome(note=fault)
        with override_configs({kernel: config}), torch.no_grad():
            return config, measure.attempt(lambda: measure.our_call(case, args), args, check_of(case.op, args), timer)

    launch, current = kernel_configs(case, arch)[kernel]
    fixed = fixed_tiles(launch)
    candidates, best = [visit(current)], 0
    for _ in range(ROUNDS):
        known = [config for config, _ in candidates]
        candidates += [visit(config) for config in neighbours(known[best], fixed) if config not in known]
        times = [outcome.seconds or float("inf") for _, outcome in candidates]
        if min(times) >= FASTER * times[best]:
            break
        best = times.index(min(times))
    return candidates, best


def config_file(case: Case) -> str:
    """Return the file with the case's configurations; those of quantized weights stand in tiles.py."""
    quantized = any(getattr(case.sizes, name, None) for name in QUANTIZED)
    module = tiles.__name__ if quantized else case.op.configs.__module__
    return module.removeprefix("mixtral_triton.").replace(".", "/") + ".py"


def _settings(config: LaunchConfig) -> dict[str, int]:
    return {**config.constexprs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def tune_table(title: str, candidates: Sequence[Candidate], best: int, timed: bool) -> Table:
    settings = [_settings(config) for config, _ in candidates]
    table = Table(title, text=["note"])
    for index, (_, outcome) in enumerate(candidates):
        cells = {"which": "now" if index == 0 else "best" if index == best else ""}
        cells |= {name: str(value) for name, value in settings[index].items()}
        cells |= {"time, us": micro(outcome.seconds)} if timed else {}
        table.add(cells | {"note": outcome.note or ""}, "dim" if outcome.note else "")
    return table


def run(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.ops if name not in OPS]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    if INTERPRETED:
        raise ValueError("tune compiles its kernels, and TRITON_INTERPRET is set: needs it unset")
    if not (args.arch or torch.cuda.is_available()):
        name = (args.ops or ["OP"])[0]
        raise ValueError(
            f"tune times configurations, and there is no GPU: `mixtral-triton compile {name} --arch sm_90` shows "
            f"registers, spills and instructions, and `tune {name} --arch sm_90` which other configurations compile"
        )
    selected = cases(args.ops or tuple(OPS), quick=not args.at, at=args.at)  # a few of each, or those of these sizes
    out, device = console(stderr=args.json), None if args.arch else torch.device("cuda")
    timer, arch = measure.DeviceTimer(device) if device else None, args.arch or target_arch(device)
    selected = [case for case in selected if runs_on(case.sizes, arch)]
    kernels = [(case, kernel) for case in selected for kernel in kernel_configs(case, arch)]
    if not kernels:
        raise ValueError("nothing to tune: at these sizes a library does the work")
    out.print(family_note(arch), end="")
    if timer is None:
        out.print(f"Nothing is timed: neighbours of the present configurations, compiled for {arch}.")
    with bar("tuning", len(kernels)) as progress:
        for done, (case, kernel) in enumerate(kernels, 1):
            candidates, best = tune(case, kernel, arch, timer, device)
            progress.update(done, len(kernels))
            file, now, fastest = config_file(case), *(_settings(candidates[index][0]) for index in (0, best))
            change = {name: (old, fastest[name]) for name, old in now.items() if fastest[name] != old}
            if args.json:
                about = {"op": case.op.name, "sizes": case.as_dict(), "arch": arch, "kernel": kernel, "file": file}
                each = [{**vars(config), **outcome.as_dict()} for config, outcome in candidates]
                print(json.dumps({**about, "change": change, "candidates": each}), flush=True)
                continue
            title = f"{kernel}: {case.op.name}, {sizes_text(case.as_dict())}, {case.dtype_name}, {arch}"
            out.print(tune_table(title, candidates, best, timer is not None))
            if timer is not None:
                lines = ", ".join(f"{name}={new} (now {old})" for name, (old, new) in change.items())
                out.print(Text(f"{file}: {lines or 'the present configuration is the fastest'}"), soft_wrap=True)
    return 0
