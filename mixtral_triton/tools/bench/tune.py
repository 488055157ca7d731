"""The command `tune`: climb from a kernel's launch configuration over its neighbours, and what others measured as the
fastest, that compile, fit and are faster."""

import argparse
import csv
import json
import re
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import triton
from rich.text import Text

from ...kernels import tiles
from ...kernels.arch import ARCHS
from ...kernels.fp8 import W8A8
from ...kernels.launch import DEFAULT_ARCH, INTERPRETED, Configs, Launch, LaunchConfig, override_configs, target_arch
from ...kernels.op import runs_on
from ...kernels.record import record_launches
from ...kernels.registry import OPS
from ..gpus import family_note
from ..offline import compile_all
from ..terminal import QUANTIZED, Table, bar, console
from . import measure
from .cases import Case, cases
from .command import micro, sizes_text
from .rivals import BENCHMARKS, rivals

# What may vary: tiles, how many tiles share a stretch of L2, and a decode's splits. SPLIT_K decides a result's bits.
VARIED = ("BLOCK_", "GROUP_", "SPLITS")
WARPS, STAGES = range(1, 17), range(1, 9)
FASTER = 0.98  # of the best time so far; a smaller gain is noise
ROUNDS = 5
COLUMNS = "date", "card", "driver", "triton", "torch", "op", "kernel", "dtype", "sizes", "tile", "us"  # of the results


@dataclass(frozen=True)
class Candidate:
    config: LaunchConfig
    origin: str = ""  # "now", "neighbour", or where others measured it
    outcome: measure.Outcome = field(default_factory=measure.Outcome)


def fixed_tiles(launch: Launch) -> set[str]:
    """Return the tiles that do not vary, of a quantized weight also its depth, which the layout fixes."""
    quantized = launch.constexprs.get("LAYOUT", ("dense",))[0] != "dense"
    return {*getattr(launch.fn, "full_tiles", ()), *(("BLOCK_K",) if quantized else ())}


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


def compile_faults(case: Case, kernel: str, configs: Sequence[LaunchConfig], arch: str) -> list[str | None]:
    """Return why `kernel` should not run with each configuration: it cannot be built or compiled, spills, or does not
    fit. They are compiled together, on all cores."""
    if arch not in ARCHS:  # the offline compiler has no limits of this GPU: a launch must show it
        return [None] * len(configs)
    faults: list[str | None] = [None] * len(configs)
    launches: dict[int, Launch] = {}
    for index, config in enumerate(configs):
        try:
            launches[index] = kernel_configs(case, arch, {kernel: config})[kernel][0]
        except ValueError as error:  # for example, a descriptor's tile that is no power of 2
            faults[index] = f"cannot be built: {error}"
    compiled = compile_all([("", launch) for launch in launches.values()], arch)
    for index, found in zip(launches, compiled, strict=True):
        faults[index] = found.fault
    return faults


def candidates_of(case: Case, kernel: str, arch: str, card: str = "") -> list[Candidate]:
    """Return the configuration now, what others measured for the nearest card and sizes, and the neighbours."""
    launch, now = kernel_configs(case, arch)[kernel]
    found = {
        "now": [now],
        **{origin: [config] for origin, config in rivals(launch, now, arch, case.sizes, card).items()},
    }
    found["neighbour"] = neighbours(now, fixed_tiles(launch))
    candidates: list[Candidate] = []
    for origin, config in ((origin, config) for origin, configs in found.items() for config in configs):
        if config not in [each.config for each in candidates]:
            candidates.append(Candidate(config, origin))
    return candidates


def tune(
    case: Case,
    kernel: str,
    arch: str,
    timer: measure.Timer | None = None,
    device: torch.device | None = None,
    rounds: int = ROUNDS,
) -> tuple[list[Candidate], int]:
    """Climb from the current configuration -> what was tried, that one first, and the fastest's place."""
    args = None if device is None else case.inputs(device)
    card = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else ""

    def visit(found: Sequence[Candidate]) -> list[Candidate]:
        faults = compile_faults(case, kernel, [each.config for each in found], arch)
        return [replace(each, outcome=attempt(each.config, fault)) for each, fault in zip(found, faults, strict=True)]

    def attempt(config: LaunchConfig, fault: str | None) -> measure.Outcome:
        if fault is not None or args is None or timer is None:
            return measure.Outcome(note=fault)
        with override_configs({kernel: config}), torch.no_grad():
            return measure.attempt(lambda: measure.our_call(case, args), case.op, args, timer)

    fixed, best = fixed_tiles(kernel_configs(case, arch)[kernel][0]), 0
    candidates = visit(candidates_of(case, kernel, arch, card))
    for _ in range(rounds):
        times = [each.outcome.seconds or float("inf") for each in candidates]
        if min(times) >= FASTER * times[best]:
            break
        best, known = times.index(min(times)), [each.config for each in candidates]
        near = [config for config in neighbours(known[best], fixed) if config not in known]
        candidates += visit([Candidate(config, "neighbour") for config in near])
    return candidates, best


def config_file(case: Case) -> str:
    """Return the file with the case's configurations; those of quantized weights stand in tiles.py."""
    quantized = any(getattr(case.sizes, name, None) for name in QUANTIZED)
    module = tiles.__name__ if quantized else case.op.configs.__module__
    return module.removeprefix("mixtral_triton.").replace(".", "/") + ".py"


def _settings(config: LaunchConfig) -> dict[str, int]:
    return {**config.constexprs, "num_warps": config.num_warps, "num_stages": config.num_stages}


def table_row(case: Case, kernel: str, config: LaunchConfig, source: str) -> str:
    """Return the row of the table of tiles with this configuration; "" where a kernel has no table of products."""
    c, sizes, halves = config.constexprs, case.sizes, 2 if "_up_" in kernel else 1
    if not {"BLOCK_N", "BLOCK_K"} <= c.keys() or not {"BLOCK_T", "BLOCK_M"} & c.keys():
        return ""
    quantized = any(getattr(sizes, name, None) not in (None, W8A8) for name in QUANTIZED)
    tile = [c["BLOCK_N"] * halves, 0 if quantized else c["BLOCK_K"], config.num_warps, config.num_stages]
    if "BLOCK_T" in c:
        return f"DecodeTile({', '.join(map(str, [sizes.T, c['BLOCK_T'], *tile]))}, {source!r})"
    rows = sizes.T * getattr(sizes, "K", 1) // getattr(sizes, "E", 1)
    more = "".join(f", {name}={c[name]}" for name in ("GROUP_M", "SHORT_M") if c.get(name))
    return f"PrefillTile({', '.join(map(str, [rows, c['BLOCK_M'], *tile]))}, {source!r}{more})"


def results_file(card: str) -> Path:
    """Return the file of a GPU's results: in the repository, or without one in the current folder."""
    folder = BENCHMARKS / "results"
    name = re.sub(r"\W+", "-", card.lower()) + ".csv"
    return (folder if folder.is_dir() else Path()) / name


def append_results(file: Path, card: str, case: Case, kernel: str, candidates: Sequence[Candidate]) -> None:
    """Append the time of each candidate that was timed."""
    driver = ""
    with suppress(OSError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().partition("\n")[0]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    about = [date, card, driver, triton.__version__, torch.__version__, case.op.name, kernel, case.dtype_name]
    about.append(sizes_text(case.as_dict()))
    new = not file.exists()
    with file.open("a", newline="") as out:
        writer = csv.writer(out)
        writer.writerows([COLUMNS] if new else [])
        for each in (each for each in candidates if each.outcome.seconds):
            writer.writerow([*about, sizes_text(_settings(each.config)), f"{(each.outcome.seconds or 0) * 1e6:.2f}"])


def tune_table(title: str, candidates: Sequence[Candidate], best: int, timed: bool) -> Table:
    settings = [_settings(each.config) for each in candidates]
    table, noted = Table(title, text=["from", "note"]), any(each.outcome.note for each in candidates)
    for index, each in enumerate(candidates):
        cells = {"which": "best" if index == best > 0 else ""}
        cells |= {name: str(value) for name, value in settings[index].items()}
        cells |= {"time, us": micro(each.outcome.seconds)} if timed else {}
        cells |= {"from": each.origin} | ({"note": each.outcome.note or ""} if noted else {})
        table.add(cells, "dim" if each.outcome.note else "")
    return table


def run(args: argparse.Namespace) -> int:
    if unknown := [name for name in args.ops if name not in OPS]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    if INTERPRETED:
        raise ValueError("tune compiles its kernels, and TRITON_INTERPRET is set: needs it unset")
    if not (args.arch or args.dry or torch.cuda.is_available()):
        name = (args.ops or ["OP"])[0]
        raise ValueError(
            f"tune times configurations, and there is no GPU: `mixtral-triton compile {name} --arch sm_90` shows "
            f"registers, spills and instructions, and `tune {name} --arch sm_90` which other configurations compile"
        )
    # A few of each, or those of these sizes.
    selected = cases(args.ops or tuple(OPS), quick=not (args.at or args.sizes), at=args.at, sizes=args.sizes)
    timed = not (args.arch or args.dry)
    out, device = console(stderr=args.json), torch.device("cuda") if timed else None
    timer = measure.time_call if device else None
    arch = args.arch or (target_arch(torch.device("cuda")) if torch.cuda.is_available() else DEFAULT_ARCH)
    selected = [case for case in selected if runs_on(case.sizes, arch)]
    kernels = [(case, kernel) for case in selected for kernel in kernel_configs(case, arch)]
    named = {name.removesuffix("_kernel") for name in args.kernel}
    kernels = [pair for pair in kernels if not named or pair[1].removesuffix("_kernel") in named]
    if not kernels:
        raise ValueError("nothing to tune: at these sizes a library does the work, or --kernel is another one")
    out.print(family_note(arch), end="")
    if timer is None:
        what = "candidates" if args.dry else f"candidates, compiled for {arch}"
        out.print(f"Nothing is timed: the present configurations and their {what}.")
    card = torch.cuda.get_device_name() if timed else ""
    with bar("tuning", len(kernels)) as progress:
        for done, (case, kernel) in enumerate(kernels, 1):
            if args.dry:
                candidates, best = candidates_of(case, kernel, arch), 0
            else:
                candidates, best = tune(case, kernel, arch, timer, device, args.rounds)
            progress.update(done, len(kernels))
            if timed:
                append_results(results_file(card), card, case, kernel, candidates)
            _print(args, out, case, kernel, arch, candidates, best, timed, card)
    return 0


def _print(
    args: argparse.Namespace,
    out: Any,
    case: Case,
    kernel: str,
    arch: str,
    candidates: Sequence[Candidate],
    best: int,
    timed: bool,
    card: str,
) -> None:
    file, now, fastest = config_file(case), *(_settings(candidates[index].config) for index in (0, best))
    change = {name: (old, fastest[name]) for name, old in now.items() if fastest[name] != old}
    if args.json:
        about = {"op": case.op.name, "sizes": case.as_dict(), "arch": arch, "kernel": kernel, "file": file}
        each = [{**vars(one.config), "origin": one.origin, **one.outcome.as_dict()} for one in candidates]
        print(json.dumps({**about, "change": change, "candidates": each}), flush=True)
        return
    title = f"{kernel}: {case.op.name}, {sizes_text(case.as_dict())}, {case.dtype_name}, {arch}"
    out.print(tune_table(title, candidates, best, timed))
    if timed:
        lines = ", ".join(f"{name}={new} (now {old})" for name, (old, new) in change.items())
        row = table_row(case, kernel, candidates[best].config, f"measured: {results_file(card).name}") if change else ""
        lines = f"{lines}; {row}" if row else lines
        out.print(Text(f"{file}: {lines or 'the present configuration is the fastest'}"), soft_wrap=True)
