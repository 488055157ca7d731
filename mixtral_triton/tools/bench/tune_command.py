"""The command `tune`: the configurations that compile and fit, timed where there is a GPU, and the literal to paste."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from ...kernels.launch import target_arch
from ...kernels.op import LaunchConfig, Op
from ...kernels.registry import OPS
from ..predict import family_note
from ..terminal import Column, Table, console
from .cases import Case, cases
from .report import micro, sizes_text
from .timing import DeviceTimer, Timer
from .tune import VARIED, Candidate, Tuned, full_dim_tiles, kernel_configs, tune


def run(args: argparse.Namespace, bar: Callable[..., Any]) -> int:
    chosen = _chosen(args.ops, args.at)
    out = console(stderr=args.json)
    device, timer, reason = _device(args)
    arch = args.arch or target_arch(device)
    if note := family_note(arch):
        out.print(note)
    if timer is None:
        out.print(f"Nothing was timed: {reason}. These are the neighbours of the present choice, compiled for {arch}.")
    kernels = [(case, kernel) for case in chosen for kernel in kernel_configs(case, arch)]
    if not kernels:
        raise ValueError("nothing to tune: at these sizes a library does the work")
    with bar("tuning", len(kernels)) as progress:
        for done, (case, kernel) in enumerate(kernels, 1):
            tuned = tune(case, kernel, arch, timer, device)
            progress.update(done, len(kernels))
            if args.json:
                print(json.dumps(as_dict(tuned)), flush=True)
            else:
                out.print(shown(tuned, out.width))
    return 0


def _device(args: argparse.Namespace) -> tuple[torch.device | None, Timer | None, str]:
    """Where to time, with what; or no such place, and why."""
    if args.dry_run or args.arch:
        return None, None, "--dry-run was given" if args.dry_run else f"--arch asks for {args.arch}, here or not"
    if not torch.cuda.is_available():
        return None, None, "there is no GPU"
    device = torch.device("cuda")
    return device, DeviceTimer(device), ""


def _chosen(names: Sequence[str], at: Sequence[str]) -> list[Case]:
    """A few cases of each operation, or all with the sizes that `at` names."""
    if unknown := [name for name in names if name not in OPS]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(OPS)}")
    return cases(names or tuple(OPS), quick=not at, at=at)


def literal(op: Op, kernel: str, config: LaunchConfig) -> str:
    """What goes into an operation's `configs`; behind it the tile, warps and stages as the tables write them."""
    tiles = ", ".join(f'"{name}": {size}' for name, size in config.constexprs.items())
    row = [
        size
        for name, size in config.constexprs.items()
        if name.startswith(VARIED) and name not in full_dim_tiles(op, kernel)
    ]
    row += [config.num_warps, config.num_stages]
    settings = f"num_warps={config.num_warps}, num_stages={config.num_stages}"
    return f'"{kernel}": LaunchConfig({{{tiles}}}, {settings}),  # ({", ".join(map(str, row))})'


def _case(tuned: Tuned) -> str:
    case = tuned.case
    return f"{case.op.name}, {sizes_text(case.as_dict())}, {case.dtype_name}, {tuned.arch}"


def _code(tuned: Tuned, width: int) -> list[str]:
    """`literal` in lines that are Python at any width: its comment stands above it."""
    code, row = literal(tuned.case.op, tuned.kernel, tuned.best).split("  # ")
    return [
        f"    # {row}",
        *("    " + line for line in textwrap.wrap(code, width - 4, subsequent_indent=" " * 4, break_on_hyphens=False)),
    ]


def _constants(tuned: Tuned) -> tuple[list[str], str]:
    """The constants that vary between configurations, and the others in words."""
    first = tuned.candidates[0].config.constexprs
    same = [name for name in first if len({one.config.constexprs[name] for one in tuned.candidates}) == 1]
    words = "".join(f", {name}={first[name]}" for name in same)
    return [name for name in first if name not in same], words


def _table(tuned: Tuned) -> Table:
    """A line a configuration, the present choice first; what none of them varies stands in the title."""
    names, same = _constants(tuned)
    columns = [Column(name) for name in ("", *names, "warps", "stages", "time, us", "registers", "shared", "FLOP/i")]
    columns[0] = Column("", number=False)
    table = Table(f"{tuned.kernel}: {_case(tuned)}{same}", [*columns, Column("held against it", number=False)])
    for at, one in enumerate(tuned.candidates):
        compiled, config = one.compiled, one.config
        measured = ["-", "-", "-"]
        if compiled is not None:
            loop = compiled.loop_flop_per_instruction
            measured = [str(compiled.registers), f"{compiled.shared_bytes:,}", "-" if loop is None else f"{loop:,.0f}"]
        tile = [str(config.constexprs[name]) for name in names]
        mark = "now" if at == 0 else "best" if one.seconds is not None and config == tuned.best else ""
        cells = (mark, *tile, str(config.num_warps), str(config.num_stages), micro(one.seconds), *measured)
        table.add(*cells, one.note or "", style="dim" if one.note else "")
    return table


def shown(tuned: Tuned, width: int) -> Group:
    """The configurations, then what to paste, in lines of at most `width`."""
    timed = any(one.seconds is not None for one in tuned.candidates)
    word = "nothing timed; the present choice is" if not timed else "the fastest is"
    if timed and tuned.best == tuned.candidates[0].config:
        word = "nothing is faster than the present choice,"
    if tuned.library:
        took = "" if tuned.library_s is None else f", which takes {micro(tuned.library_s)} us"
        word = f"a library is the present choice{took}; of this kernel, {word}"
    return Group(_table(tuned), Text(word), *(Text(line) for line in _code(tuned, width)), Text())


def _tried(one: Candidate) -> dict[str, Any]:
    compiled = one.compiled
    return {
        "constexprs": dict(one.config.constexprs),
        "num_warps": one.config.num_warps,
        "num_stages": one.config.num_stages,
        "registers": None if compiled is None else compiled.registers,
        "shared_bytes": None if compiled is None else compiled.shared_bytes,
        "loop_flop_per_instruction": None if compiled is None else compiled.loop_flop_per_instruction,
        "time_us": None if one.seconds is None else one.seconds * 1e6,
        "note": one.note,
    }


def as_dict(tuned: Tuned) -> dict[str, Any]:
    return {
        "op": tuned.case.op.name,
        "sizes": tuned.case.as_dict(),
        "arch": tuned.arch,
        "kernel": tuned.kernel,
        "literal": literal(tuned.case.op, tuned.kernel, tuned.best),
        "library_us": None if tuned.library_s is None else tuned.library_s * 1e6,
        "tried": [_tried(one) for one in tuned.candidates],
    }
