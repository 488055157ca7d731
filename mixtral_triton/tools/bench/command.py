"""The command `bench`: measured on the current GPU, or what is known without one, as tables, JSON lines and a plot."""

import argparse
import inspect
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import cycle, groupby
from typing import Any

import torch
from rich.console import Console, Group
from rich.text import Text

from ...kernels.op import runs_on
from ...kernels.registry import OPERATIONS
from ..gpus import GPU, find_gpu
from ..predict import family_note
from ..terminal import Table, bar, check_writable, console
from .cases import Case, cases, sizes_of
from .measure import Outcome, Row, checked_row, current_gpu, timed_rows
from .peers import PEERS, import_peer

PREDICTED = {"predicted, us": "optimistic-cautious, not measured: by the launches, the data sheet and estimates"}
PREDICTED["limit"] = "what takes most of the optimistic time"
MARKERS = "os^vDPX*."  # of ours and each peer


def run(args: argparse.Namespace) -> int:
    """Run the command -> exit status: 1 where an operation or a user's peer, but no other, is wrong or fails."""
    selected = cases(args.ops, args.quick, args.at, args.sizes, getattr(torch, args.dtype) if args.dtype else None)
    if args.peer and len(args.ops) != 1:
        raise ValueError("--peer goes with the one operation that it does: bench expert_swiglu --peer MODULE:FUNCTION")
    for option, value in (("--offload", args.offload), ("--cache-dtype", args.cache_dtype)):
        if value and args.ops != ["decode_step"]:
            raise ValueError(f"{option} is {value!r}, and goes with decode_step: bench decode_step {option} {value}")
    if args.cache_dtype:
        selected = [replace(case, sizes=replace(case.sizes, cache=args.cache_dtype)) for case in selected]
    user_peers = [import_peer(text) for text in dict.fromkeys(args.peer)]
    gpu = find_gpu(args.gpu or "h100")
    if unknown := set(args.without) - (known := {peer.name for peer in PEERS}):
        raise ValueError(f"--without is {min(unknown)!r}, needs one of {', '.join(sorted(known))}")
    if args.plot is not None:
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            raise ValueError(f"--plot {str(args.plot)!r} needs a name that ends in .png, .svg or .pdf")
        check_writable("--plot", args.plot)
        if find_spec("matplotlib") is None:
            raise ValueError("--plot needs matplotlib: pip install matplotlib")
    out, timer = console(stderr=args.json), None
    if args.gpu is None and torch.cuda.is_available():
        device, gpu, timer = current_gpu()
    selected = selected if args.sizes else [case for case in selected if runs_on(case.sizes, gpu.arch)]
    if args.offload:
        selected = [case.offloaded(args.offload, gpu) for case in selected]
    if timer is not None:
        peers = [*(peer for peer in PEERS if peer.name not in args.without), *user_peers]
        source = timed_rows(selected, peers, device, gpu, timer)
    else:
        reason = "--gpu asks for a data sheet" if args.gpu else "there is no GPU"
        source = (checked_row(case, gpu, user_peers, reason) for case in selected)
        figures = "Floors (predictions need its rate of L2)" if not gpu.l2 else "Predicted times and floors"
        out.print(f"No time was measured: {reason}. {figures} are those of the GPU below.")
    rates = f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.matmul / 1e12:.0f} TFLOP/s of bf16 matrix products"
    out.print(f"{gpu.name} ({gpu.arch}), {gpu.source}: {rates}")
    out.print(family_note(gpu.arch), end="")
    if args.json:
        about = {name: getattr(gpu, name) for name in ("name", "source", "bandwidth", "matmul", "arch")}
        print(json.dumps({"kind": "gpu", **about, "torch": torch.__version__}), flush=True)
    rows = _print_rows(source, len(selected), args.json, out)
    if args.plot is not None:
        figure_of(rows, gpu).savefig(args.plot, dpi=150)
        out.print(f"plot: {args.plot}")
    outcomes = [row.ours for row in rows]
    outcomes += [outcome for row in rows for name, outcome in row.peers.items() if name in args.peer]
    return 1 if len(rows) < len(selected) or any(one.right is False for one in outcomes) else 0


def describe(name: str) -> str:
    """Return the sizes of the operation `name` and its arguments; ValueError for an unknown name."""
    op = cases([name])[0].op
    known, needed = sizes_of(op)
    example = ",".join(f"{key}={value}" for key, value in Case(op, op.bench_shapes[0]).as_dict().items())
    sizes = f"{name} --sizes {example}\nSizes that may be left out: {', '.join(set(known) - set(needed)) or 'none'}"
    return f"{sizes}\n{inspect.getdoc(OPERATIONS[name])}" if name in OPERATIONS else sizes


def _print_rows(source: Iterator[Row], total: int, as_lines: bool, out: Console) -> list[Row]:
    rows: list[Row] = []
    with bar("benchmarking", total) as progress:
        for _, group in groupby(source, key=lambda row: row.case.op.name):
            start = len(rows)
            for row in group:
                rows.append(row)
                progress.update(len(rows), total)
                if as_lines:
                    print(json.dumps({"kind": "row", **row.as_dict()}), flush=True)
            if not as_lines:
                out.print(op_table(rows[start:]))
    return rows


def sizes_text(sizes: Mapping[str, Any]) -> str:
    """Return sizes as T4096, cache=int8 or offload2.5."""
    texts = {name: f"={size}" if isinstance(size, str) else f"{size:.10g}" for name, size in sizes.items()}
    return " ".join(f"{name}{text}" for name, text in texts.items())


def number(value: float | None) -> str:
    """Format with three digits or more, and no exponent for large numbers."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def micro(seconds: float | None) -> str:
    return number(seconds and seconds * 1e6)


def _title_and_shapes(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return a title of the operation with the sizes that all rows share, and the text of each row's other sizes."""
    sizes, case = [row.case.as_dict() for row in rows], rows[0].case
    shared = {name: size for name, size in sizes[0].items() if all(one.get(name) == size for one in sizes[1:])}
    common = shared if len(rows) > 1 else {}
    shapes = [sizes_text({name: size for name, size in one.items() if name not in common} or one) for one in sizes]
    return ", ".join(filter(None, (case.op.name, case.dtype_name, sizes_text(common)))), shapes


def _cells(row: Row, peers: Sequence[str], timed: bool) -> dict[str, str]:
    one = row.predicted
    share = row.share if timed else one.share if one else None
    cells = {
        "time, us": micro(row.ours.seconds) if row.ours.seconds is not None else row.ours.verdict if timed else "",
        "predicted, us": f"{micro(one.seconds)}-{micro(one.cautious)}" if one else "",
        "limit": one.limit if one else "",
        "of floor": f"{100 * share:.0f} %" if share is not None else "-" if timed else "",
        **{"floor, us": micro(row.floor_s), "bound": row.bound},
    }
    for name in peers:
        ratio = row.ratio(name) if name in row.peers else None
        text = row.peers.get(name, Outcome()).verdict if ratio is None else f"{ratio:.2f}"
        cells[f"{name} / ours" if timed else name] = text
    cells |= {"MB": number(row.cost.bytes / 1e6), "GFLOP": number(row.cost.flops / 1e9)}
    cells["MB of host memory"] = number(row.cost.host_bytes / 1e6) if row.cost.host_bytes else ""
    return {**cells, "launches": str(len(row.launches))}


def op_table(rows: Sequence[Row]) -> Group:
    timed = any(row.ours.seconds is not None or row.ours.note for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    title, texts = _title_and_shapes(rows)
    table = Table(title, PREDICTED, text=("limit", "bound"))
    notes: dict[tuple[str, str], list[str]] = {}
    for row, shape in zip(rows, texts, strict=True):
        table.add({"sizes": shape, **_cells(row, peers, timed)}, "bold red" if row.ours.right is False else "")
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.note:
                notes.setdefault((name, outcome.note), []).append(shape)
    lines = []
    for (name, note), shapes in notes.items():
        where = f", {'; '.join(shapes)}" if len(shapes) < len(rows) or len(rows) == 1 else ""
        lines.append(Text(f"{name}{where}: {note}", style="red" if name == "ours" else "yellow"))
    return Group(table, *lines)


def figure_of(rows: Sequence[Row], gpu: GPU) -> Any:
    """Return a figure: a panel per operation, a line for each case with its floor, predicted and measured times."""
    from matplotlib.figure import Figure

    panels = [list(group) for _, group in groupby(rows, key=lambda row: row.case.op.name)]
    heights = [1.5 + 0.18 * len(panel) for panel in panels] or [4.0]
    figure = Figure(figsize=(6.7, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        title, shapes = _title_and_shapes(panel := sorted(panel, key=lambda row: row.floor_s))
        axes.barh(range(len(panel)), [1e6 * row.floor_s for row in panel], color="lightgray", label="floor")
        outcomes = [{"ours": row.ours, **row.peers} for row in panel]
        names = dict.fromkeys(name for each in outcomes for name in each)
        for marker, name in zip(cycle(MARKERS), names, strict=False):
            times = [1e6 * (each.get(name, Outcome()).seconds or math.nan) for each in outcomes]
            if not all(map(math.isnan, times)):
                axes.plot(times, range(len(panel)), marker, ms=4, label=name)
        if ranges := [(index, row.predicted) for index, row in enumerate(panel) if row.predicted]:
            ends = ([1e6 * one.seconds for _, one in ranges], [1e6 * one.cautious for _, one in ranges])
            axes.hlines([index for index, _ in ranges], *ends, "black", label="predicted")
        axes.set_yticks(range(len(panel)), shapes, fontsize=7)
        axes.set_xscale("log")
        axes.set_xlabel("time, us", fontsize=7)
        axes.margins(y=0.01)
        axes.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=8)
        axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
        axes.grid(alpha=0.2)
    timed = any(one.seconds for row in rows for one in (row.ours, *row.peers.values()))
    known = "floors and predicted times" if gpu.l2 else "floors"
    note = "" if timed else f"; no time was measured, these are {known}"
    figure.suptitle("\n".join(textwrap.wrap(f"{gpu.name}, {gpu.source}{note}", 60)), fontsize=9)
    return figure
