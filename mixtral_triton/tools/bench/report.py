"""What `bench` found, as tables and as a plot; `Row.as_dict()` serves programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from ..gpus import GPU
from ..terminal import Column, Table, save_plot
from .measure import Outcome, Row

PREDICTED = (
    "Predicted from the launches, the GPU's data sheet and estimates of it, not measured; "
    "limit: what takes most of what is predicted."
)
AXES = {"T": "tokens", "S": "keys", "C": "slots of the cache", "B": "sequences", "H": "width", "N": "columns"}
MARKERS = ".os^vDPX*"  # of the floor, ours and each peer
PANELS_ACROSS = 3


def gpu_line(gpu: GPU, sheet: GPU | None = None) -> str:
    line = f"{gpu.name} ({gpu.arch}), {gpu.source}: {gpu.bandwidth / 1e12:.2f} TB/s"
    line += f", {gpu.matmul / 1e12:.0f} TFLOP/s of bf16 matrix products"
    if sheet is not None:
        line += f"; data sheet: {sheet.bandwidth / 1e12:.2f} TB/s, {sheet.matmul / 1e12:.0f} TFLOP/s"
    return line


def sizes_text(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}{'=' * isinstance(size, str)}{size}" for name, size in sizes.items())


def number(value: float | None) -> str:
    """Format with three digits or more, and no exponent for large numbers."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def micro(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e6)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def common_sizes(rows: Sequence[Row]) -> dict[str, Any]:
    """Return the sizes that are the same in all of several rows."""
    first, *rest = (row.case.as_dict() for row in rows)
    return {name: size for name, size in first.items() if rest and all(one.get(name) == size for one in rest)}


def _launches(row: Row) -> str:
    """Format the number of device kernels of a call, and how many of them are torch's."""
    by_torch = sum(not name.endswith("_kernel") for name in row.launches)
    return f"{len(row.launches)}" + (f" ({by_torch} torch)" if by_torch else "")


def _cells(row: Row, peers: Sequence[str], timed: bool, predicted: bool) -> list[str]:
    cells = []
    if timed:
        cells += [row.ours.verdict if row.ours.seconds is None else micro(row.ours.seconds), _percent(row.share)]
    if predicted:
        one = row.predicted
        time, share, limit = ("-", "-", "-") if one is None else (micro(one.seconds), _percent(one.share), one.limit)
        cells += [time, limit] if timed else [time, share, limit]
    cells += [micro(row.floor_s), row.bound]
    for name in peers:
        ratio = row.ratio(name) if name in row.peers else None
        cells.append(row.peers.get(name, Outcome()).verdict if ratio is None else f"{ratio:.2f}")
    return [*cells, number(row.bytes / 1e6), number(row.flops / 1e9), _launches(row)]


def op_table(rows: Sequence[Row]) -> Group:
    """Return the table of one operation, with notes on what could not be measured."""
    timed = any(row.ours.seconds is not None or row.ours.note for row in rows)
    predicted = any(row.predicted is not None for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    columns = [Column("sizes", number=False), *([Column("time, us"), Column("of floor")] if timed else [])]
    if predicted:
        columns += [Column("predicted, us"), *([] if timed else [Column("of floor")])]
        columns += [Column("limit", number=False)]
    columns += [Column("floor, us"), Column("bound", number=False)]
    columns += [Column(f"{name} / ours" if timed else name) for name in peers]
    columns += [Column(name) for name in ("MB", "GFLOP", "launches")]
    case, common = rows[0].case, common_sizes(rows)
    title = ", ".join(filter(None, (case.op.name, case.dtype_name, sizes_text(common))))
    table = Table(title, columns, PREDICTED if predicted else "")
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        sizes = row.case.as_dict()
        shape = sizes_text({name: size for name, size in sizes.items() if name not in common} or sizes)
        table.add(shape, *_cells(row, peers, timed, predicted), style="bold red" if row.ours.right is False else "")
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.note:
                notes.setdefault((name, outcome.note), []).append(shape)
    return Group(table, *(_note(*key, shapes, len(rows)) for key, shapes in notes.items()))


def _note(name: str, note: str, shapes: Sequence[str], rows: int) -> Text:
    where = f", {'; '.join(shapes)}" if len(shapes) < rows or rows == 1 else ""
    return Text(f"{name}{where}: {note}", style="red" if name == "ours" else "yellow")


def traffic_table(arch: str, lines: Sequence[dict[str, Any]]) -> Table:
    """Return the table of the lines that `command.count_cases` yields."""
    ratios = {"touched": "bytes touched", "moved": "bytes moved", "issued": "FLOP issued"}
    table = Table(
        f"Counted in the interpreter, at reduced sizes with the tiles of {arch}; 1 is what is compulsory",
        [Column("operation", number=False), Column("sizes", number=False), *map(Column, ratios.values())],
        "moved: all loads and stores, as if there were no cache; "
        "FLOP issued: a tensor core's tile has 16 rows, however few the tokens",
    )
    for line in lines:
        cells = ("-" if line[name] is None else f"{line[name]:.2f}" for name in ratios)
        table.add(line["op"], sizes_text(line["sizes"]), *cells)
    return table


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


def _is_timed(rows: Sequence[Row]) -> bool:
    return any(row.ours.seconds or any(one.seconds for one in row.peers.values()) for row in rows)


def _draw_panel(axes: Any, axis: str, found: Sequence[Sequence[Row]]) -> None:
    """Draw the floors of one operation's series and, where timed, ours and the peers."""
    rows = [row for series in found for row in series]
    common = common_sizes(rows)
    for index, series in enumerate(found):
        label = _fixed_sizes(series[0], axis, list(common)) if len(found) > 1 else ""
        times: dict[str, list[float | None]] = {
            "floor": [row.floor_s for row in series],
            "ours": [row.ours.seconds for row in series],
        }
        for name in dict.fromkeys(name for row in series for name in row.peers):
            times[name] = [row.peers.get(name, Outcome()).seconds for row in series]
        for at, (name, seconds) in enumerate(times.items()):
            points = [(row.case.sizes[axis], one * 1e6) for row, one in zip(series, seconds, strict=True) if one]
            if points:
                x, y = ([point[place] for point in points] for place in (0, 1))
                text = f"{name}, {label}".rstrip(", ")
                axes.plot(x, y, MARKERS[at % len(MARKERS)] + "-", label=text, color=f"C{(index + at) % 10}", ms=4, lw=1)
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

    panels: list[tuple[str, list[list[Row]]]] = []
    for name in dict.fromkeys(row.case.op.name for row in rows):
        axis, found = series_of([row for row in rows if row.case.op.name == name])
        panels += [(axis, [series]) for series in found] if _is_timed(rows) else [(axis, found)]
    across = max(1, min(PANELS_ACROSS, len(panels)))
    down = -(-max(1, len(panels)) // across)
    figure = Figure(figsize=(4.8 * across, 4.0 * down), layout="constrained")
    for axes, panel in zip_longest(figure.subplots(down, across, squeeze=False).flat, panels):
        if panel is None:
            axes.set_axis_off()
        else:
            _draw_panel(axes, *panel)
    note = "" if _is_timed(rows) else "; no time was measured, these are floors"
    figure.suptitle("\n".join(textwrap.wrap(f"{gpu.name}, {gpu.source}{note}", 60 * across)), fontsize=9)
    return figure


def plot(rows: Sequence[Row], gpu: GPU, file: Path) -> None:
    save_plot(figure_of(rows, gpu), file)
