"""What `bench` found, as tables and as a plot; `Row.as_dict()` serves programs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
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
MARKERS = {"memory": "o", "matmul": "s"}  # by what sets a floor
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

    def series_over(axis: str) -> list[list[Row]]:
        found: dict[tuple[Any, ...], list[Row]] = {}
        for row in sorted(rows, key=lambda row: row.case.sizes[axis]):
            found.setdefault(tuple(_fixed_sizes(row, axis).items()), []).append(row)
        return list(found.values())

    axes = [name for name in AXES if name in rows[0].case.sizes] or list(rows[0].case.sizes)[:1]
    axis = min(axes, key=lambda name: len(series_over(name)))
    return axis, series_over(axis)


def _fixed_sizes(row: Row, axis: str) -> dict[str, Any]:
    """Return the sizes besides `axis`; a prompt's T and S are one size."""
    sizes = row.case.as_dict()
    varied = {"T", "S"} if axis in "TS" and sizes.get("T") == sizes.get("S") else {axis}
    return {name: size for name, size in sizes.items() if name not in varied}


def _is_timed(rows: Sequence[Row]) -> bool:
    return any(row.ours.seconds or any(one.seconds for one in row.peers.values()) for row in rows)


def _draw_times(axes: Any, x: Sequence[int], rows: Sequence[Row]) -> None:
    """Draw ours and every peer of these rows; the label of one without a time says why."""
    for index, name in enumerate(["ours", *dict.fromkeys(name for row in rows for name in row.peers)]):
        found = [row.ours if name == "ours" else row.peers.get(name, Outcome()) for row in rows]
        points = [(size, one.seconds * 1e6) for size, one in zip(x, found, strict=True) if one.seconds]
        verdict = next((one.verdict for one in found if one.verdict not in ("-", "right")), "not timed")
        label = name if points else f"{name}: {verdict}"
        axes.plot(*(zip(*points, strict=True) if points else ([], [])), "^-", ms=4, color=f"C{index % 10}", label=label)


def _draw_panel(axes: Any, title: str, axis: str, series: Sequence[Sequence[Row]]) -> None:
    """Draw the floors of one operation's series and, of a single one, its times."""
    bounds: dict[str, None] = {}
    common = common_sizes([row for rows in series for row in rows])
    for index, rows in enumerate(series):
        x, y = [row.case.sizes[axis] for row in rows], [row.floor_s * 1e6 for row in rows]
        color = "black" if len(series) == 1 else f"C{index % 10}"
        differing = {name: size for name, size in _fixed_sizes(rows[0], axis).items() if name not in common}
        label = f"floor, {sizes_text(differing)}" if len(series) > 1 else "floor"
        axes.plot(x, y, ("-", "--", ":")[index // 10 % 3], color=color, lw=1, label=label)
        for row, *point in zip(rows, x, y, strict=True):
            axes.plot(*point, MARKERS[row.bound], color=color, ms=4)
            bounds[row.bound] = None
        if len(series) == 1 and _is_timed(rows):
            _draw_times(axes, x, rows)
    for bound in bounds:
        word = {"memory": "memory", "matmul": "compute"}[bound]
        axes.plot([], [], MARKERS[bound], color="grey", ms=4, label=f"floor set by {word}")
    _label(axes, title, f"{axis}, {AXES.get(axis, 'size')}", "time, us")


def _draw_roofline(axes: Any, rows: Sequence[Row], gpu: GPU) -> None:
    """Draw the FLOP/s that were reached over arithmetic intensity."""
    knee = gpu.matmul / gpu.bandwidth
    intensity = [row.flops / row.bytes for row in rows]
    ends = min(*intensity, knee) / 2, knee, max(*intensity, knee) * 4
    axes.plot(ends, [min(x * gpu.bandwidth, gpu.matmul) for x in ends], color="black", label="floor")
    for index, name in enumerate(dict.fromkeys(row.case.op.name for row in rows)):
        points = [
            (row.flops / row.bytes, row.flops / (row.ours.seconds or 1.0)) for row in rows if row.case.op.name == name
        ]
        axes.plot(*zip(*points, strict=True), "os^v"[index // 10 % 4], ms=4, label=name)
    _label(axes, "roofline: ours", "FLOP / compulsory byte", "FLOP/s")


def _label(axes: Any, title: str, x: str, y: str) -> None:
    """Label both axes, with the legend below them, where it covers nothing."""
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(x, fontsize=7)
    axes.set_ylabel(y, fontsize=7)
    axes.tick_params(labelsize=7, which="both")
    axes.set_title("\n".join(textwrap.wrap(title, 48)), fontsize=8)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)
    axes.grid(alpha=0.2)


def figure_of(rows: Sequence[Row], gpu: GPU) -> Any:
    """Return a figure with a panel per operation (per series where timed), after a roofline if anything was timed."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, str, list[list[Row]]]] = []
    for name in dict.fromkeys(row.case.op.name for row in rows):
        axis, found = series_of([row for row in rows if row.case.op.name == name])
        timed = any(map(_is_timed, found))
        for series in [[one] for one in found] if timed else [found]:
            fixed = [_fixed_sizes(one[0], axis) for one in series]
            common = dict(item for item in fixed[0].items() if all(item in one.items() for one in fixed))
            panels.append((f"{name}, {sizes_text(common)}".rstrip(", "), axis, series))
    reached = [row for row in rows if row.ours.seconds and row.flops]
    count = max(1, len(panels) + bool(reached))
    across = min(PANELS_ACROSS, count)
    down = -(-count // across)
    figure = Figure(figsize=(4.8 * across, 4.0 * down), layout="constrained")
    places = iter(figure.subplots(down, across, squeeze=False).flat)
    if reached:
        _draw_roofline(next(places), reached, gpu)
    for panel in panels:
        _draw_panel(next(places), *panel)
    for unused in places:
        unused.set_axis_off()
    note = "" if _is_timed(rows) else "; no time was measured, these are floors"
    figure.suptitle("\n".join(textwrap.wrap(f"{gpu.name}, {gpu.source}{note}", 60 * across)), fontsize=9)
    return figure


def plot(rows: Sequence[Row], gpu: GPU, file: Path) -> None:
    save_plot(figure_of(rows, gpu), file)
