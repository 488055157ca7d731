"""`bench --plot`: floors over the size that varies; where something was timed, the times, and the roofline."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..gpus import GPU
from ..terminal import save_plot
from .measure import Row
from .report import sizes_text

LETTERS = {"T": "tokens", "S": "keys", "C": "slots of the cache", "B": "sequences", "H": "width", "N": "columns"}
LIMITS = {"memory": ("o", "memory"), "matmul": ("s", "compute")}  # a marker and a word by `Row.bound`
MARKERS = "^vDPX<>*"
ACROSS = 3  # panels beside each other


@dataclass(frozen=True)
class Series:
    """Rows of one operation that differ in `letter` alone, in its order; `fixed`: their other sizes."""

    letter: str
    fixed: Mapping[str, int]
    rows: Sequence[Row]

    @property
    def sizes(self) -> list[int]:
        return [row.case.sizes[self.letter] for row in self.rows]


def series_of(rows: Sequence[Row]) -> list[Series]:
    """The rows of one operation by the size over which they make the fewest series."""
    letters = [letter for letter in LETTERS if letter in rows[0].case.sizes] or list(rows[0].case.sizes)[:1]
    return min((_by(letter, rows) for letter in letters), key=len)


def _by(letter: str, rows: Sequence[Row]) -> list[Series]:
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.case.sizes[letter]):
        found.setdefault(tuple(_fixed(row.case.as_dict(), letter).items()), []).append(row)
    return [Series(letter, dict(fixed), own) for fixed, own in found.items()]


def _fixed(sizes: Mapping[str, int], letter: str) -> dict[str, int]:
    """The other sizes; of a prompt, T and S are one size."""
    same = {letter, *({"T", "S"} if sizes.get("T") == sizes.get("S") and letter in "TS" else ())}
    return {name: size for name, size in sizes.items() if name not in same}


def _floors(axes: Any, series: Series, index: int | None, label: str) -> None:
    y = [row.floor_s * 1e6 for row in series.rows]
    color, line = ("black", "-") if index is None else (f"C{index % 10}", ("-", "--", ":")[index // 10 % 3])
    axes.plot(series.sizes, y, line, color=color, lw=1, label=label)
    for bound, (marker, _) in LIMITS.items():
        points = [(x, at) for x, at, row in zip(series.sizes, y, series.rows, strict=True) if row.bound == bound]
        axes.plot(*zip(*points, strict=True) if points else ([], []), marker, color=color, ms=4)


def _times(axes: Any, series: Series) -> None:
    """Ours, and every peer of these rows; of one without a time, why."""
    ways = ["ours", *dict.fromkeys(name for row in series.rows for name in row.peers)]
    for index, way in enumerate(ways):
        found = [row.ours if way == "ours" else row.peers.get(way) for row in series.rows]
        seconds = [None if one is None else one.seconds for one in found]
        timed = [(x, took * 1e6) for x, took in zip(series.sizes, seconds, strict=True) if took]
        untold = next((one.verdict for one in found if one is not None and not one.seconds), "-")
        label = way if timed else f"{way}: {'not timed' if untold in ('-', 'right') else untold}"
        x, y = zip(*timed, strict=True) if timed else ([], [])
        style = {"color": f"C{index % 10}", "lw": 2 if way == "ours" else 1, "ms": 4}
        axes.plot(x, y, f"{MARKERS[index % len(MARKERS)]}-", label=label, **style)


def _panel(axes: Any, title: str, drawn: Sequence[Series], constant: Mapping[str, int]) -> None:
    """One operation: the floors of its series and, of a single one, its times."""
    for index, series in enumerate(drawn):
        differs = {name: size for name, size in series.fixed.items() if constant.get(name) != size}
        label = f"floor, {sizes_text(differs)}" if differs else "floor"
        _floors(axes, series, index if len(drawn) > 1 else None, label)
    if len(drawn) == 1 and _timed(drawn[0].rows):
        _times(axes, drawn[0])
    for bound in dict.fromkeys(row.bound for series in drawn for row in series.rows):
        marker, word = LIMITS[bound]
        axes.plot([], [], marker, color="grey", ms=4, label=f"floor set by {word}")
    letter = drawn[0].letter
    _dressed(axes, title, f"{letter}, {LETTERS.get(letter, 'size')}", "time, us")


def _dressed(axes: Any, title: str, x: str, y: str) -> None:
    """Names on both axes, and a legend below them, where it covers nothing."""
    axes.set(xscale="log", yscale="log")
    axes.set_xlabel(x, fontsize=7)
    axes.set_ylabel(y, fontsize=7)
    axes.tick_params(labelsize=7, which="both")
    axes.set_title("\n".join(textwrap.wrap(title, 48)), fontsize=8)
    axes.legend(fontsize=6, loc="upper left", bbox_to_anchor=(0.0, -0.16), ncols=2, frameon=False)
    axes.grid(alpha=0.2)


def _timed(rows: Sequence[Row]) -> bool:
    return any(row.ours.seconds or any(one.seconds for one in row.peers.values()) for row in rows)


def panels(rows: Sequence[Row]) -> Iterator[tuple[str, list[Series], dict[str, int]]]:
    """Title, series and common sizes of each panel: an operation, and where it was timed, each series on its own."""
    for name in dict.fromkeys(row.case.op.name for row in rows):
        own = [row for row in rows if row.case.op.name == name]
        found = series_of(own)
        for drawn in [[one] for one in found] if _timed(own) else [found]:
            first = drawn[0].fixed
            constant = {key: size for key, size in first.items() if all(one.fixed.get(key) == size for one in drawn)}
            yield f"{name}, {sizes_text(constant)}".rstrip(", "), drawn, constant


def _roofline(axes: Any, rows: Sequence[Row], gpu: GPU) -> None:
    """Arithmetic intensity against the FLOP/s that were reached."""
    knee = gpu.matmul / gpu.bandwidth
    reach = [row.flops / row.bytes for row in rows] + [knee]
    low, high = min(reach) / 2, max(reach) * 4
    axes.plot([low, knee, high], [low * gpu.bandwidth, gpu.matmul, gpu.matmul], color="black", label="floor")
    for index, name in enumerate(dict.fromkeys(row.case.op.name for row in rows)):
        own = [row for row in rows if row.case.op.name == name]
        x, y = zip(*((row.flops / row.bytes, row.flops / (row.ours.seconds or 1.0)) for row in own), strict=True)
        axes.plot(x, y, "os^v"[index // 10 % 4], ms=4, label=name)  # there are ten colours
    _dressed(axes, "roofline: ours", "FLOP / compulsory byte", "FLOP/s")


def figure_of(rows: Sequence[Row], gpu: GPU) -> Any:
    """A panel an operation, and the roofline before them where there are times; no roofline of floors alone."""
    from matplotlib.figure import Figure

    drawn = list(panels(rows))
    reached = [row for row in rows if row.ours.seconds and row.flops]
    number = len(drawn) + bool(reached)
    across = max(1, min(ACROSS, number))
    down = -(-max(1, number) // across)
    figure = Figure(figsize=(4.8 * across, 4.0 * down), layout="constrained")
    places = iter(figure.subplots(down, across, squeeze=False).flat)
    if reached:
        _roofline(next(places), reached, gpu)
    for title, series, constant in drawn:
        _panel(next(places), title, series, constant)
    for unused in places:
        unused.set_axis_off()
    times = "" if _timed(rows) else "; no time was measured, these are floors"
    figure.suptitle("\n".join(textwrap.wrap(f"{gpu.name}, {gpu.source}{times}", 60 * across)), fontsize=9)
    return figure


def plot(rows: Sequence[Row], gpu: GPU, file: Path) -> None:
    save_plot(figure_of(rows, gpu), file)
