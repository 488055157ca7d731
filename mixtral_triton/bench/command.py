"""The command `bench`: measured on the current GPU, or what is known without one, as tables, JSON lines and a plot."""

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import groupby
from typing import Any

import torch
from rich.console import Group
from rich.text import Text

from ..kernels.operation.cases import runs_on
from ..kernels.registry import OPS
from ..terminal import Bar, check_known, check_writable, console, table_of
from . import measure
from .cases import cases, select_cases
from .decode_step import STEP, layer_rows, layer_table
from .gpus import GPU, parse_gpu
from .measure import Outcome, Row
from .peers import PEERS, find_peer


def run(args: argparse.Namespace) -> int:
    """Run the command -> exit status: 1 where an operation or a user's peer is wrong or fails."""
    selected = cases(args.ops, args.sizes, getattr(torch, args.dtype) if args.dtype else None, args.model, args.weights)
    selected = select_cases(selected, args.only) if args.only else selected
    if any(name not in PEERS for name in args.peer) and (len(args.ops) != 1 or args.ops[0] not in OPS):
        raise ValueError("--peer goes with the one operation that it does: bench expert_swiglu --peer MODULE:FUNCTION")
    if args.weights is not None or args.floors:
        check_known("--weights and --floors are of the decode step: OP", args.ops or ["none"], [STEP.name])
    gpu, timed = parse_gpu(args.gpu or "h100"), args.gpu is None and torch.cuda.is_available()
    # Without a GPU nothing is timed, so only what was asked for is checked.
    peers = {name: find_peer(name) for name in args.peer or (PEERS if timed else ())}
    if args.plot is not None:
        check_known("the end of --plot", [args.plot.suffix], (".png", ".svg", ".pdf"))
        check_writable("--plot", args.plot)
        if find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install matplotlib")
    out, timer = console(stderr=args.json), measure.time_call
    if timed:
        gpu = measure.measure_gpu()
    else:
        timer = "--gpu asks for a data sheet" if args.gpu else "there is no GPU"  # type: ignore[assignment]
        out.print(f"No time was measured: {timer}. Floors are those of the GPU below.")
    if args.floors:
        layer = layer_rows(selected[0].sizes, selected[0].dtype, gpu)
        if args.json:
            print(*(json.dumps({"kind": "launch", **row}) for row in layer), sep="\n")
        else:
            console().print(layer_table(selected[0].sizes, layer, gpu))
        return 0
    selected = selected if args.sizes else [case for case in selected if runs_on(case.sizes, gpu.arch)]
    rates = f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.matmul / 1e12:.0f} TFLOP/s of bf16 matrix products"
    out.print(f"{gpu.name} ({gpu.arch}), {gpu.source}: {rates}")
    if args.json:
        about = {name: getattr(gpu, name) for name in ("name", "source", "bandwidth", "matmul", "arch")}
        print(json.dumps({"kind": "gpu", **about, "torch": torch.__version__}), flush=True)
    rows: list[Row] = []
    with Bar("benchmarking", len(selected)) as progress:
        for _, group in groupby(measure.measure_rows(selected, gpu, peers, timer), key=lambda row: row.case.op.name):
            start = len(rows)
            for row in group:
                rows.append(row)
                progress.update(1)
                if args.json:
                    print(json.dumps({"kind": "row", **row.as_dict()}), flush=True)
            if not args.json:
                out.print(op_table(rows[start:]))
    if args.plot is not None:
        figure_of(rows, gpu).savefig(args.plot, dpi=150)
        out.print(f"plot: {args.plot}")
    outcomes = [row.ours for row in rows]
    outcomes += [outcome for row in rows for name, outcome in row.peers.items() if name not in PEERS]
    return 1 if len(rows) < len(selected) or any(outcome.right is False for outcome in outcomes) else 0


def sizes_text(sizes: Mapping[str, Any]) -> str:
    """Return sizes as T4096, or cache=int8."""
    return " ".join(f"{name}={size}" if isinstance(size, str) else f"{name}{size}" for name, size in sizes.items())


def micro(seconds: float | None) -> str:
    """Return microseconds with three digits or more, and no exponent for large numbers."""
    return "" if seconds is None else f"{1e6 * seconds:,.0f}" if seconds >= 1e-3 else f"{1e6 * seconds:.3g}"


def op_table(rows: Sequence[Row]) -> Group:
    """Return a table of one operation's rows, without empty columns, and a line for each note."""
    cells, notes = [], list[str]()
    for row in rows:
        shape = sizes_text(row.case.as_dict())
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        of_row = {"sizes": shape, "time, us": micro(row.ours.seconds), "of floor": share}
        of_row |= {"floor, us": micro(row.floor_s), "bound": row.bound}
        for name, outcome in {"ours": row.ours, **row.peers}.items():
            notes += [f"{name}, {shape}: {outcome.note}"] if outcome.note else []
            ratio = row.ratio(name) if name in row.peers else None
            of_row[f"{name} / ours"] = "" if ratio is None else f"{ratio:.2f}"
        cells.append({**of_row, "launches": str(len(row.launches))})
    shown = [name for name in cells[0] if any(texts[name] for texts in cells)]
    styles = ("bold red" if row.ours.right is False else "" for row in rows)
    lines = [({name: texts[name] for name in shown}, style) for texts, style in zip(cells, styles, strict=True)]
    return Group(table_of(f"{rows[0].case.op.name}, {rows[0].case.dtype_name}", lines), *map(Text, notes))


def figure_of(rows: Sequence[Row], gpu: GPU) -> Any:
    """Return a figure: a panel per operation, a line for each case with its floor and measured times."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    panels = [list(group) for _, group in groupby(rows, key=lambda row: row.case.op.name)]
    heights = [1.5 + 0.18 * len(panel) for panel in panels] or [4.0]
    longest = max((len(sizes_text(row.case.as_dict())) for row in rows), default=0)  # labels of 0.055 inches a letter
    figure = Figure(figsize=(3.7 + 0.055 * longest, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        panel = sorted(panel, key=lambda row: row.floor_s)
        axes.barh(range(len(panel)), [1e6 * row.floor_s for row in panel], color="lightgray", label="floor")
        outcomes = [{"ours": row.ours, **row.peers} for row in panel]
        for name in dict.fromkeys(name for of_row in outcomes for name in of_row):
            times = [1e6 * (of_row.get(name, Outcome()).seconds or math.nan) for of_row in outcomes]
            if not all(map(math.isnan, times)):
                axes.plot(times, range(len(panel)), "o", ms=4, label=name)
        axes.set_yticks(range(len(panel)), [sizes_text(row.case.as_dict()) for row in panel], fontsize=7)
        axes.set(xscale="log", xlabel="time, us", ylim=(-0.7, len(panel) - 0.3))  # no margin that grows with the rows
        axes.set_xlim(left=5e5 * panel[0].floor_s)  # the shortest bar is seen, too
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if panel[-1].floor_s < 100 * panel[0].floor_s else (1,)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())  # which overlaps
        axes.set_title(f"{panel[0].case.op.name}, {panel[0].case.dtype_name}", fontsize=8)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    timed = any(outcome.seconds for row in rows for outcome in (row.ours, *row.peers.values()))
    figure.suptitle(
        f"{gpu.name}, {gpu.source}" + ("" if timed else "; no time was measured, these are floors"), fontsize=9
    )
    return figure
