"""Time a kernel's launch configuration and its neighbours, one step away each, on the GPU there is.

    python benchmarks/tune.py OP [--sizes T=64,...] [--kernel NAME] [--arch ARCH]

Those that spill or do not fit are left out. With --arch nothing is timed: they are compiled for that architecture. To
climb on, make the fastest the table's row (CONTRIBUTING.md) and run it again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton.bench import measure
from mixtral_triton.bench.cases import Case, cases
from mixtral_triton.bench.command import micro, sizes_text
from mixtral_triton.bench.compile import compile_all
from mixtral_triton.kernels.launching.arch import ARCHS
from mixtral_triton.kernels.launching.launch import Configs, Launch, LaunchConfig, override_configs, target_arch
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.terminal import console, table_of

# What may vary: tiles, how many tiles share a stretch of L2, and a decode's splits. SPLIT_K decides a result's bits. A
# tile of heads, experts, slots or units covers all of them; where another one must and does not, its result is wrong.
VARIED = {"BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_T", "BLOCK_H", "GROUP_M", "SPLITS"}
WARPS, STAGES = range(1, 17), range(1, 9)
FASTER = 0.98  # of the time of the present configuration; a smaller gain is noise


@dataclass(frozen=True)
class Candidate:
    config: LaunchConfig
    outcome: measure.Outcome = field(default_factory=measure.Outcome)

    @property
    def settings(self) -> dict[str, int]:
        return {**self.config.constexprs, "num_warps": self.config.num_warps, "num_stages": self.config.num_stages}


def fixed_tiles(launch: Launch) -> set[str]:
    """Return the tiles of a launch that do not vary: the depth of a quantized weight's, which the layout fixes."""
    return {"BLOCK_K"} if launch.constexprs.get("LAYOUT", ("dense",))[0] != "dense" else set()


def neighbours(config: LaunchConfig, fixed: set[str]) -> list[LaunchConfig]:
    """Return the configurations one step away: a tile or the warps doubled or halved, one stage more or less."""
    varied = {name: size for name, size in config.constexprs.items() if name in VARIED - fixed}
    steps = [(name, size) for name, now in varied.items() for size in (now // 2, now * 2) if size]
    configs = [replace(config, constexprs={**config.constexprs, name: size}) for name, size in steps]
    configs += [replace(config, num_warps=n) for n in (config.num_warps // 2, config.num_warps * 2) if n in WARPS]
    configs += [replace(config, num_stages=n) for n in (config.num_stages - 1, config.num_stages + 1) if n in STAGES]
    return configs


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


def tune(case: Case, kernel: str, arch: str, timer: measure.Timer | None = None) -> tuple[list[Candidate], int]:
    """Compile the present configuration and its neighbours, and time them on the current GPU where there is a `timer`
    -> all of them, the present one first, and the place of the fastest."""
    launch, now = kernel_configs(case, arch)[kernel]
    configs = [now, *neighbours(now, fixed_tiles(launch))]
    args = case.inputs(measure.DEVICE) if timer else {}

    def attempt(config: LaunchConfig, fault: str | None) -> Candidate:
        if fault is not None or timer is None:
            return Candidate(config, measure.Outcome(note=fault))
        with override_configs({kernel: config}), torch.no_grad():
            return Candidate(config, measure.attempt(lambda: measure.our_call(case, args), case.op, args, timer))

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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("op", choices=OPS, metavar="OP", help=", ".join(OPS))
    parser.add_argument("--sizes", action="append", help="T=N,..., the others are 8x7B's; repeatable; default: T=1")
    parser.add_argument("--kernel", action="append", metavar="NAME", help="this kernel alone; repeatable")
    parser.add_argument("--arch", choices=ARCHS, metavar="ARCH", help="time nothing, compile for it")
    args = parser.parse_args(argv)
    if not args.arch and not torch.cuda.is_available():
        parser.error("there is no GPU to time anything: needs --arch")
    arch, timer = args.arch or target_arch(torch.device("cuda")), None if args.arch else measure.time_call
    for case in cases([args.op], args.sizes or ["T=1"]):
        for kernel in kernel_configs(case, arch):
            if args.kernel and kernel.removesuffix("_kernel") not in args.kernel:
                continue
            candidates, best = tune(case, kernel, arch, timer)
            title = f"{kernel}: {case.op.name}, {sizes_text(case.as_dict())}, {case.dtype_name}, {arch}"
            console().print(tune_table(title, candidates, best))


if __name__ == "__main__":
    main()
