"""What `bench` found, as tables and as a plot; `Row.as_dict()` serves programs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle, groupby
from typing import Any

from rich.console import Group
from rich.text import Text

from ..gpus import GPU
from ..terminal import Column, Table
from .measure import Outcome, Row

PREDICTED = {"predicted, us": "optimistic-cautious, not measured: by the launches, the data sheet and estimates"}
PREDICTED["limit"] = "what takes most of the optimistic time"
MANY = 20  # cases that a panel shows side by side, with labels that can be read at 1,000 pixels
MARKERS = ".os^vDPX*"  # of the floor, ours and each peer


def gpu_line(gpu: GPU, sheet: GPU | None = None) -> str:
    rates = [f"{one.bandwidth / 1e12:.2f} TB/s, {one.matmul / 1e12:.0f} TFLOP/s" for one in (gpu, sheet) if one]
    line = f"{gpu.name} ({gpu.arch}), {gpu.source}: {rates[0]} of bf16 matrix products"
    return "; data sheet: ".join([line, *rates[1:]])


def sizes_text(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}{'=' * isinstance(size, str)}{size}" for name, size in sizes.items())


def number(value: float | None) -> str:
    """Format with three digits or more, and no exponent for large numbers."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def micro(seconds: float | None) -> str:
    return number(seconds and seconds * 1e6)


def _title_and_shapes(rows: Sequence[Row]) -> tuple[str, list[str]]:
    """Return a title of the operation with the sizes that all rows share, and the text of each row's other sizes."""
    sizes = [row.case.as_dict() for row in rows]
    shared = {name: size for name, size in sizes[0].items() if all(one.get(name) == size for one in sizes[1:])}
    common, case = shared if len(rows) > 1 else {}, rows[0].case
    shapes = [sizes_text({name: size for name, size in one.items() if name not in common} or one) for one in sizes]
    return ", ".join(filter(None, (case.op.name, case.dtype_name, sizes_text(common)))), shapes


def _cells(row: Row, peers: Sequence[str], timed: bool) -> dict[str, str]:
    """Return the cells of a row by their headings; the table leaves empty columns out."""
    one = row.predicted
    share = row.share if timed else one.share if one else None
    cells = {
        "time, us": row.ours.verdict * timed if row.ours.seconds is None else micro(row.ours.seconds),
        "predicted, us": f"{micro(one.seconds)}-{micro(one.cautious)}" if one else "",
        "limit": one.limit if one else "",
        "of floor": "-" * timed if share is None else f"{100 * share:.0f} %",
        **{"floor, us": micro(row.floor_s), "bound": row.bound},
    }
    for name in peers:
        ratio = row.ratio(name) if name in row.peers else None
        text = row.peers.get(name, Outcome()).verdict if ratio is None else f"{ratio:.2f}"
        cells[f"{name} / ours" if timed else name] = text
    by_torch = sum(not name.endswith("_kernel") for name in row.launches)
    cells |= {"MB": number(row.cost.bytes / 1e6), "GFLOP": number(row.cost.flops / 1e9)}
    cells["MB of host memory"] = number(row.cost.host_bytes / 1e6) if row.cost.host_bytes else ""
    return {**cells, "launches": f"{len(row.launches)}" + (f" ({by_torch} torch)" if by_torch else "")}


def op_table(rows: Sequence[Row]) -> Group:
    """Return the table of one operation, with notes on what could not be measured."""
    timed = any(row.ours.seconds is not None or row.ours.note for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    title, texts = _title_and_shapes(rows)
    headings = ("sizes", *_cells(rows[0], peers, timed))
    last = ("limit", "floor, us", "bound", "MB", "GFLOP", "MB of host memory", "launches")
    columns = [Column(each, each not in ("sizes", "limit", "bound"), each in last) for each in headings]
    table = Table(title, columns, PREDICTED if any(row.predicted for row in rows) else "")
    notes: dict[tuple[str, str], list[str]] = {}
    for row, shape in zip(rows, texts, strict=True):
        table.add(shape, *_cells(row, peers, timed).values(), style="bold red" if row.ours.right is False else "")
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.note:
                notes.setdefault((name, outcome.note), []).append(shape)
    lines = []
    for (name, note), shapes in notes.items():
        where = f", {'; '.join(shapes)}" if len(shapes) < len(rows) or len(rows) == 1 else ""
        lines.append(Text(f"{name}{where}: {note}", style="red" if name == "ours" else "yellow"))
    return Group(table, *lines)


def _draw_panel(axes: Any, rows: Sequence[Row]) -> None:
    """Draw floors and ranges of predicted times of one operation's cases and, where timed, ours and the peers; of more
    than MANY cases as horizontal bars, the longest floor first."""
    wide = len(rows) > MANY
    title, shapes = _title_and_shapes(rows := sorted(rows, key=lambda row: row.floor_s) if wide else rows)
    outcomes = [{"floor": Outcome(row.floor_s), "ours": row.ours, **row.peers} for row in rows]
    for marker, name in zip(cycle(MARKERS), dict.fromkeys(name for each in outcomes for name in each), strict=False):
        seconds = [each.get(name, Outcome()).seconds for each in outcomes]
        points = range(len(rows)), [1e6 * (time or math.nan) for time in seconds]
        if wide and name == "floor":
            axes.barh(*points, label=name, color="lightgray")
        elif any(seconds):
            axes.plot(*(points[::-1] if wide else points), marker, ms=4, label=name)
    if ranges := [(at, row.predicted) for at, row in enumerate(rows) if row.predicted]:
        ends = ([1e6 * one.seconds for _, one in ranges], [1e6 * one.cautious for _, one in ranges])
        draw = axes.hlines if wide else axes.vlines
        draw([at for at, _ in ranges], *ends, "black" if wide else "gray", label="predicted")
    set_ticks = axes.set_yticks if wide else axes.set_xticks
    set_ticks(range(len(rows)), shapes, rotation=90 * (not wide), fontsize=6 + wide)
    (axes.set_xscale if wide else axes.set_yscale)("log")
    (axes.set_xlabel if wide else axes.set_ylabel)("time, us", fontsize=7)
    axes.margins(y=0.01 if wide else None)
    axes.set_title("\n".join(textwrap.wrap(title, 80)), fontsize=8)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    axes.grid(alpha=0.2)


def figure_of(rows: Sequence[Row], gpu: GPU) -> Any:
    """Return a figure with a panel per operation, in which each case has a place."""
    from matplotlib.figure import Figure

    panels = [list(group) for _, group in groupby(rows, key=lambda row: row.case.op.name)]
    most = max(map(len, panels), default=0)
    heights = [1.0 + 0.18 * len(panel) if len(panel) > MANY else 4.0 for panel in panels] or [4.0]
    figure = Figure(figsize=(6.7 if most > MANY else 5.0 + 0.12 * most, sum(heights)), layout="constrained")
    grid = figure.subplots(len(heights), squeeze=False, height_ratios=heights)
    for axes, panel in zip(grid.flat, panels, strict=False):
        _draw_panel(axes, panel)
    timed = any(one.seconds for row in rows for one in (row.ours, *row.peers.values()))
    known = "floors" if gpu.chip is None else "floors and predicted times"
    note = "" if timed else f"; no time was measured, these are {known}"
    figure.suptitle("\n".join(textwrap.wrap(f"{gpu.name}, {gpu.source}{note}", 60)), fontsize=9)
    return figure
