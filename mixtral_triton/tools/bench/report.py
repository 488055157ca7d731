"""What `bench` found, as tables and as a plot; `Row.as_dict()` serves programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from rich.console import Group
from rich.text import Text

from ..gpus import GPU
from ..terminal import Column, Table
from .measure import Outcome, Row

PREDICTED = (
    "Predicted from the launches, the GPU's data sheet and estimates of it, not measured: optimistic-cautious; "
    "limit: what takes most of the former."
)
AXES = {"T": "tokens", "S": "keys", "C": "slots of the cache", "B": "sequences", "H": "width", "N": "columns"}
MARKERS = ".os^vDPX*"  # of the floor, ours and each peer
PANELS_ACROSS = 3


def gpu_line(gpu: GPU, sheet: GPU | None = None) -> str:
    line = f"{gpu.name} ({gpu.arch}), {gpu.source}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.matmul / 1e12:.0f} TFLOP/s"
    line += " of bf16 matrix products"
    if sheet is None:
        return line
    return f"{line}; data sheet: {sheet.bandwidth / 1e12:.2f} TB/s, {sheet.matmul / 1e12:.0f} TFLOP/s"


def sizes_text(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}{'=' * isinstance(size, str)}{size}" for name, size in sizes.items())


def number(value: float | None) -> str:
    """Format with three digits or more, and no exponent for large numbers."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def micro(seconds: float | None) -> str:
    return number(seconds and seconds * 1e6)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def common_sizes(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the sizes that are the same in all of several rows."""
    first, *rest = (row.case.as_dict() for row in rows)
    return {name: size for name, size in first.items() if rest and all(one.get(name) == size for one in rest)}


def _cells(row: Row, peers: Sequence[str], timed: bool, predicted: bool) -> dict[str, str]:
    """Return the cells of a row by their headings."""
    cells = {}
    if timed:
        cells["time, us"] = row.ours.verdict if row.ours.seconds is None else micro(row.ours.seconds)
        cells["of floor"] = _percent(row.share)
    if predicted:
        one = row.predicted
        cells["predicted, us"] = f"{micro(one.seconds)}-{micro(one.cautious)}" if one else "-"
        if not timed:
            cells["of floor"] = _percent(one.share if one else None)
        cells["limit"] = one.limit if one else "-"
    cells |= {"floor, us": micro(row.floor_s), "bound": row.bound}
    for name in peers:
        ratio = row.ratio(name) if name in row.peers else None
        text = row.peers.get(name, Outcome()).verdict if ratio is None else f"{ratio:.2f}"
        cells[f"{name} / ours" if timed else name] = text
    by_torch = sum(not name.endswith("_kernel") for name in row.launches)
    launches = f"{len(row.launches)}" + (f" ({by_torch} torch)" if by_torch else "")
    return {**cells, "MB": number(row.bytes / 1e6), "GFLOP": number(row.flops / 1e9), "launches": launches}


def op_table(rows: Sequence[Row]) -> Group:
    """Return the table of one operation, with notes on what could not be measured."""
    timed = any(row.ours.seconds is not None or row.ours.note for row in rows)
    predicted = any(row.predicted is not None for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    case, common = rows[0].case, common_sizes(rows)
    title = ", ".join(filter(None, (case.op.name, case.dtype_name, sizes_text(common))))
    headings = ("sizes", *_cells(rows[0], peers, timed, predicted))
    columns = [Column(heading, number=heading not in ("sizes", "limit", "bound")) for heading in headings]
    table = Table(title, columns, PREDICTED if predicted else "")
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        sizes = row.case.as_dict()
        shape = sizes_text({name: size for name, size in sizes.items() if name not in common} or sizes)
        style = "bold red" if row.ours.right is False else ""
        table.add(shape, *_cells(row, peers, timed, predicted).values(), style=style)
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.note:
                notes.setdefault((name, outcome.note), []).append(shape)
    return Group(table, *(_note(*key, shapes, len(rows)) for key, shapes in notes.items()))


def _note(name: str, note: str, shapes: Sequence[str], rows: int) -> Text:
    where = f", {'; '.join(shapes)}" if len(shapes) < rows or rows == 1 else ""
    return Text(f"{name}{where}: {note}", style="red" if name == "ours" else "yellow")


def series_of(rows: Sequence[Row]) -> tuple[str, list[list[Row]]]:
    """Return the size over which one operation's rows form the fewest series, and these, each in its order."""
    found = {}
    for axis in [name for name in AXES if name in rows[0].case.sizes] or list(rows[0].case.sizes)[:1]:
        series: dict[str, list[Row]] = {}
        for row in sorted(rows, key=lambda row: row.case.sizes[axis]):
            series.setdefault(_fixed_sizes(row, axis), []).append(row)
        found[axis] = list(series.values())
    axis = min(found, key=lambda axis: len(found[axis]))
    return axis, found[axis]


def _fixed_sizes(row: Row, axis: str, common: Sequence[str] = ()) -> str:
    """Return the text of the sizes besides `axis` and the `common` ones; a prompt's T and S are one size."""
    sizes = row.case.as_dict()
    varied = {"T", "S"} if axis in "TS" and sizes.get("T") == sizes.get("S") else {axis}
    return sizes_text({name: size for name, size in sizes.items() if name not in {*varied, *common}})


def _outcome(row: Row, name: str) -> Outcome:
    return {"floor": Outcome(row.floor_s), "ours": row.ours, **row.peers}.get(name, Outcome())


def _draw_panel(axes: Any, axis: str, found: Sequence[Sequence[Row]]) -> None:
    """Draw floors and ranges of predicted times of one operation's series and, where timed, ours and the peers."""
    rows = [row for series in found for row in series]
    common = common_sizes(rows)
    for index, series in enumerate(found):
        label = _fixed_sizes(series[0], axis, list(common)) if len(found) > 1 else ""
        peers = dict.fromkeys(name for row in series for name in row.peers)
        for at, name in enumerate(("floor", "ours", *peers)):
            seconds = {row.case.sizes[axis]: _outcome(row, name).seconds for row in series}
            points = {size: 1e6 * time for size, time in seconds.items() if time}
            if points:
                style = {"marker": MARKERS[at % len(MARKERS)], "color": f"C{(index + at) % 10}", "ms": 4, "lw": 1}
                axes.plot(list(points), list(points.values()), label=f"{name}, {label}".rstrip(", "), **style)
        ranges = {row.case.sizes[axis]: row.predicted for row in series if row.predicted is not None}
        if ranges:
            low, high = ([1e6 * getattr(one, name) for one in ranges.values()] for name in ("seconds", "cautious"))
            bars = [[0.0] * len(low), [above - below for below, above in zip(low, high, strict=True)]]
            style = {"ecolor": f"C{index % 10}", "capsize": 3, "label": "" if index else "predicted"}
            axes.errorbar(list(ranges), low, bars, fmt="none", **style)
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(f"{axis}, {AXES.get(axis, 'size')}", fontsize=7)
    axes.set_ylabel("time, us", fontsize=7)
    axes.tick_params(labelsize=7, which="both")
    title = f"{rows[0].case.op.name}, {sizes_text(common)}".rstrip(", ")
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
