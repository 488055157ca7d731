"""Time a kernel's launch configuration, its neighbours, one step away each, and its rivals, on the GPU there is.

    python benchmarks/tune.py OP [--sizes T=64,...] [--kernel NAME] [--arch ARCH] [--dry]

A rival is what GPUs of the same kind measured as fastest for experts of the nearest sizes (tiles/measured.csv). What
spills or does not fit is left out. With --arch nothing is timed: all are compiled for that architecture. The times go
to results/GPU.csv. To climb on, make the fastest the table's row, which is printed, and run it again.
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from math import log2
from pathlib import Path
from subprocess import getoutput

import torch
import triton
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton.bench import measure
from mixtral_triton.bench.cases import Case, cases
from mixtral_triton.bench.command import micro, sizes_text
from mixtral_triton.bench.compile import compile_all
from mixtral_triton.kernels.launching.arch import ARCHS, family, tma
from mixtral_triton.kernels.launching.launch import Configs, Launch, LaunchConfig, override_configs, target_arch
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.terminal import console, table_of

# What may vary: tiles, how many tiles share a stretch of L2, and a decode's splits. SPLIT_K decides a result's bits. A
# tile of heads, experts, slots or units covers all of them; where another one must and does not, its result is wrong.
VARIED = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_H", "GROUP_M", "SPLITS"}
WARPS, STAGES = range(1, 17), range(1, 9)
MEASURED = Path(__file__).parent / "tiles" / "measured.csv"
RESULTS = Path(__file__).parent / "results"
CARDS = {"gfx942": "MI300X|MI325X", "sm_80": "A100", "sm_89": "RTX_4090|L40S"}
FORMATS = {None: "bf16", "int8": "int8_w8a16", "fp8_w8a8": "fp8_w8a8"}  # names there
LARGE = "128x256x64 g8 w8 s4", "192x256x64 g8 w8 s4"  # of bf16 by TMA; the second was in nobody's search
FASTER = 0.98  # of the time of the present configuration; a smaller gain is noise


@dataclass(frozen=True)
class Candidate:
    config: LaunchConfig
    outcome: measure.Outcome = field(default_factory=measure.Outcome)

    @property
    def settings(self) -> dict[str, int]:
        return {**self.config.constexprs, "num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def halves(kernel: str) -> int:
    """Return how many rows of the weight a row of a tile has, as tables and measured.csv count: gate and up are two."""
    return 2 if "_up_" in kernel else 1


def tile_text(kernel: str, candidate: Candidate) -> str:
    """Return a configuration as measured.csv writes it; of a kernel without such tiles all settings."""
    sizes = candidate.settings
    if not {"BLOCK_N", "BLOCK_K"} <= sizes.keys():
        return " ".join(f"{name}={value}" for name, value in sizes.items())
    rows, columns = sizes.get("BLOCK_M") or sizes["BLOCK_T"], halves(kernel) * sizes["BLOCK_N"]
    group, warps, stages = sizes.get("GROUP_M", 1), sizes["num_warps"], sizes["num_stages"]
    return f"{rows}x{columns}x{sizes['BLOCK_K']} g{group} w{warps} s{stages}"


def table_row(kernel: str, candidate: Candidate, source: str) -> str:
    """Return the row of a table of tiles (CONTRIBUTING.md), but for the rows of x that it is for."""
    if "=" in (tile := tile_text(kernel, candidate)):
        return tile
    cells, sizes = re.sub(r" g\d+ w|x| s", ", ", tile), candidate.settings
    more = "".join(f", {name}={sizes[name]}" for name in ("GROUP_M", "SHORT_M") if sizes.get(name))
    return f'{"PrefillTile" if more else "DecodeTile"}(ROWS, {cells}, "measured: {source}"{more})'


def fixed_tiles(launch: Launch) -> set[str]:
    """Return the tiles of a launch that do not vary: of a quantized weight the columns, which the layout fixes."""
    unit = "BLOCK_N" if "_grad_" in launch.kernel else "BLOCK_K"
    return {unit} if launch.constexprs.get("LAYOUT", ("dense",))[0] != "dense" else set()


def neighbours(config: LaunchConfig, fixed: set[str]) -> list[LaunchConfig]:
    """Return the configurations one step away: a tile or the warps doubled or halved, one stage more or less."""
    varied = {name: size for name, size in config.constexprs.items() if name in VARIED - fixed}
    steps = [(name, size) for name, now in varied.items() for size in (now // 2, now * 2) if size]
    configs = [replace(config, constexprs={**config.constexprs, name: size}) for name, size in steps]
    configs += [replace(config, num_warps=n) for n in (config.num_warps // 2, config.num_warps * 2) if n in WARPS]
    configs += [replace(config, num_stages=n) for n in (config.num_stages - 1, config.num_stages + 1) if n in STAGES]
    return configs


def measured_tiles(case: Case, arch: str) -> list[str]:
    """Return the tiles that GPUs like this one measured as fastest for experts of the nearest sizes."""
    sizes, near = case.sizes, dict[tuple[float, float], list[str]]()
    cards = CARDS.get(arch) or CARDS.get(family(arch), "H100|H200")
    for row in csv.DictReader(line for line in MEASURED.read_text().splitlines() if line[0] != "#"):
        if re.search(cards, row["device"]) and row["dtype"] == FORMATS.get(sizes.gate_up):
            counts = [T for T in row if T.isdigit() and row[T]]
            T = min(counts, key=lambda count: abs(log2(int(count) / max(1, sizes.T))))
            distance = abs(log2(int(row["E"]) / sizes.E)), abs(log2(int(row["N"]) / sizes.I))
            near.setdefault(distance, []).append(row[T])
    return near[min(near)] if near else []


def rivals(case: Case, kernel: str, now: LaunchConfig, arch: str, fixed: set[str]) -> list[LaunchConfig]:
    """Return what others measured in the place of a configuration of the experts' products, and 192 rows beside 128."""
    rows = "BLOCK_M" if "BLOCK_M" in now.constexprs else "BLOCK_T"
    if case.op.name != "expert_swiglu" or not {rows, "BLOCK_N", "BLOCK_K"} <= now.constexprs.keys():
        return []
    by_tma, found = tma(arch) and case.sizes.gate_up in (None, "fp8_w8a8"), []
    large = LARGE if rows == "BLOCK_M" and tma(arch) and case.sizes.gate_up is None else ()
    for tile in dict.fromkeys((*measured_tiles(case, arch), *large)):
        M, N, K, group, warps, stages = map(int, re.findall(r"\d+", tile))
        sizes = {rows: M, "BLOCK_N": N // halves(kernel), "BLOCK_K": K, "GROUP_M": group}
        sizes["SHORT_M"] = 64 if by_tma and M > 64 else 0
        changed = {name: size for name, size in sizes.items() if name in now.constexprs and name not in fixed}
        found.append(LaunchConfig({**now.constexprs, **changed}, warps, stages))
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
    for index, binary in zip(launches, compiled, strict=True):
        faults[index] = binary.fault
    return faults


def tune(
    case: Case, kernel: str, arch: str, timer: measure.Timer | None = None, dry: bool = False
) -> tuple[list[Candidate], int]:
    """Compile the present configuration, its rivals and its neighbours (dry: not even that), and time them on the
    current GPU where there is a `timer` -> all of them, the present one first, and the place of the fastest."""
    launch, now = kernel_configs(case, arch)[kernel]
    fixed, configs = fixed_tiles(launch), [now]
    configs += [config for config in rivals(case, kernel, now, arch, fixed) if config != now]
    configs += [config for config in neighbours(now, fixed) if config not in configs]
    if dry:
        return [Candidate(config) for config in configs], 0
    args = case.inputs(measure.DEVICE) if timer else {}

    def attempt(config: LaunchConfig, fault: str | None) -> Candidate:
        if fault is not None or timer is None:
            return Candidate(config, measure.Outcome(note=fault))
        with override_configs({kernel: config}), torch.no_grad():
            return Candidate(config, measure.attempt(partial(measure.our_call, case), case.op, args, timer))

    candidates = list(map(attempt, configs, compile_faults(case, kernel, configs, arch)))
    times = [candidate.outcome.seconds or float("inf") for candidate in candidates]
    return candidates, times.index(min(times)) if min(times) < FASTER * times[0] else 0


def tune_table(title: str, candidates: Sequence[Candidate], best: int) -> Table:
    rows = []
    for index, candidate in enumerate(candidates):
        cells = {"which": "now" if index == 0 else "best" if index == best else ""}
        cells |= {name: str(value) for name, value in candidate.settings.items()}
        cells |= {"time, us": micro(candidate.outcome.seconds), "note": candidate.outcome.note or ""}
        rows.append((cells, "dim" if candidate.outcome.note else ""))
    return table_of(title, rows)


def append_times(case: Case, kernel: str, candidates: Sequence[Candidate]) -> str:
    """Append what was timed to the file of the GPU's results -> its name."""
    driver = getoutput("nvidia-smi --query-gpu=driver_version --format=csv,noheader || rocm-smi --showdriverversion")
    about = {"date": date.today(), "card": torch.cuda.get_device_name(), "driver": driver.rpartition("\n")[2]}
    name = re.sub(r"\W+", "-", about["card"].lower()) + ".csv"
    about |= {"triton": triton.__version__, "torch": torch.__version__}
    about |= {"op": case.op.name, "kernel": kernel, "sizes": sizes_text(case.as_dict())}
    timed = [[tile_text(kernel, one), f"{1e6 * one.outcome.seconds:.2f}"] for one in candidates if one.outcome.seconds]
    with (RESULTS / name).open("a", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([] if file.tell() else [[*about, "tile", "us"]])
        writer.writerows([*about.values(), *cells] for cells in timed)
    return name


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--sizes", action="append", help="T=N,..., the others are 8x7B's; repeatable; default: T=1")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="this kernel alone; repeatable")
    parser.add_argument("--arch", choices=ARCHS, metavar="ARCH", help="time nothing, compile for it")
    parser.add_argument("--dry", action="store_true", help="list the configurations, and neither compile nor time them")
    args = parser.parse_args(argv)
    if not args.arch and not torch.cuda.is_available():
        parser.error("there is no GPU to time anything: needs --arch")
    arch, timer = args.arch or target_arch(torch.device("cuda")), None if args.arch or args.dry else measure.time_call
    try:
        selected = cases([args.op], args.sizes or ["T=1"])
    except ValueError as error:
        parser.error(str(error))
    for case in selected:
        for kernel in kernel_configs(case, arch):
            if args.kernel and kernel.removesuffix("_kernel") not in args.kernel:
                continue
            candidates, best = tune(case, kernel, arch, timer, args.dry)
            title = f"{kernel}: {case.op.name}, {sizes_text(case.as_dict())}, {case.dtype_name}, {arch}"
            console().print(tune_table(title, candidates, best))
            source = append_times(case, kernel, candidates) if timer else ""
            if best:
                print(f"the table's row: {table_row(kernel, candidates[best], source)}")


if __name__ == "__main__":
    main()
