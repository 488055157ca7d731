"""What `bench` found, as tables and as a plot; `Row.as_dict()` serves programs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Group
from rich.text import Text

from ..gpus import GPU
from ..predict import Prediction
from ..terminal import Column, Table
from .measure import Outcome, Row

PREDICTED = (
    "Predicted from the launches, the GPU's data sheet and estimates of it, not measured: optimistic-cautious; "
    "limit: what takes most of the former."
)
AXES = {"S": "keys", "T": "tokens", "B": "sequences", "C": "slots of the cache", "H": "width", "N": "columns"}
MARKERS = ".os^vDPX*"  # of the floor, ours and each peer
PANELS_ACROSS = 3


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


def common_sizes(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the sizes that are the same in all of several rows."""
    first, *rest = (row.case.as_dict() for row in rows)
    return {name: size for name, size in first.items() if rest and all(one.get(name) == size for one in rest)}


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
    case, common = rows[0].case, common_sizes(rows)
    title = ", ".join(filter(None, (case.op.name, case.dtype_name, sizes_text(common))))
    headings = ("sizes", *_cells(rows[0], peers, timed))
    columns = [Column(heading, number=heading not in ("sizes", "limit", "bound")) for heading in headings]
    table = Table(title, columns, PREDICTED if any(row.predicted for row in rows) else "")
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        sizes = row.case.as_dict()
        shape = sizes_text({name: size for name, size in sizes.items() if name not in common} or sizes)
        style = "bold red" if row.ours.right is False else ""
        table.add(shape, *_cells(row, peers, timed).values(), style=style)
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.note:
                notes.setdefault((name, outcome.note), []).append(shape)
    lines = []
    for (name, note), shapes in notes.items():
        where = f", {'; '.join(shapes)}" if len(shapes) < len(rows) or len(rows) == 1 else ""
        lines.append(Text(f"{name}{where}: {note}", style="red" if name == "ours" else "yellow"))
    return Group(table, *lines)


def series_of(rows: Sequence[Row]) -> tuple[str, list[list[Row]]]:
    """Return the size that varies most among one operation's rows, and a series over it for each set of the others."""
    axis = max(AXES, key=lambda name: len({row.case.sizes.get(name) for row in rows}))
    series: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.case.sizes[axis]):
        series.setdefault(_other_sizes(row, axis), []).append(row)
    return axis, list(series.values())


def _other_sizes(row: Row, axis: str, common: Mapping[str, Any] | None = None) -> str:
    """Return the text of the sizes besides `axis` and the `common` ones; a prompt's T and S are one size."""
    sizes = row.case.as_dict()
    varied = {"T", "S"} if axis in "TS" and sizes.get("T") == sizes.get("S") else {axis}
    return sizes_text({name: size for name, size in sizes.items() if name not in {*varied, *(common or ())}})


def _draw_panel(axes: Any, axis: str, found: Sequence[Sequence[Row]]) -> None:
    """Draw floors and ranges of predicted times of one operation's series and, where timed, ours and the peers."""
    common = common_sizes([row for series in found for row in series])
    for index, series in enumerate(found):
        label = f", {_other_sizes(series[0], axis, common)}" if len(found) > 1 else ""
        sizes = [row.case.sizes[axis] for row in series]
        outcomes = [{"floor": Outcome(row.floor_s), "ours": row.ours, **row.peers} for row in series]
        names = dict.fromkeys(name for each in outcomes for name in each)
        lines = {name: [each.get(name, Outcome()).seconds for each in outcomes] for name in names}
        for at, (name, seconds) in enumerate(lines.items()):
            if any(seconds):
                style = {"marker": MARKERS[at % len(MARKERS)], "color": f"C{(index + at) % 10}", "ms": 4, "lw": 1}
                axes.plot(sizes, [1e6 * (time or math.nan) for time in seconds], label=name + label, **style)
        ranges = [row.predicted or Prediction(math.nan, math.nan, "", (), 0.0) for row in series]
        if any(row.predicted for row in series):
            low = [1e6 * one.seconds for one in ranges]
            bars = [[0.0] * len(low), [1e6 * (one.cautious - one.seconds) for one in ranges]]
            style = {"ecolor": f"C{index % 10}", "capsize": 3, "label": "" if index else "predicted"}
            axes.errorbar(sizes, low, bars, fmt="none", **style)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"{axis}, {AXES[axis]}", fontsize=7)
    axes.set_ylabel("time, us", fontsize=7)
    axes.tick_params(labelsize=7, which="both")
    title = f"{found[0][0].case.op.name}, {sizes_text(common)}".rstrip(", ")
    axes.set_title("\n".join(textwrap.wrap(title, 48)), fontsize=8)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)
    axes.grid(alpha=0.2)


def figure_of(rows: Sequence[Row], gpu: GPU) -> Any:
    """Return a figure with a panel per operation or, where timed, per series."""
    from matplotlib.figure import Figure

    timed = any(one.seconds for row in rows for one in (row.ours, *row.peers.values()))
    panels: list[tuple[str, list[list[Row]]]] = []
    for name in dict.fromkeys(row.case.op.name for row in rows):
        axis, found = series_of([row for row in rows if row.case.op.name == name])
        panels += [(axis, [series]) for series in found] if timed else [(axis, found)]
    across = max(1, min(PANELS_ACROSS, len(panels)))
    down = -(-max(1, len(panels)) // across)
    figure = Figure(figsize=(4.8 * across, 4.0 * down), layout="constrained")
    for axes, panel in zip_longest(figure.subplots(down, across, squeeze=False).flat, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw_panel(axes, *panel)
    known = "floors" if gpu.chip is None else "floors and predicted times"
    note = "" if timed else f"; no time was measured, these are {known}"
    figure.suptitle("\n".join(textwrap.wrap(f"{gpu.name}, {gpu.source}{note}", 60 * across)), fontsize=9)
    return figure
