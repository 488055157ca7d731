"""What `bench` found, as tables for a person and as a roofline plot; `Row.as_dict` is for programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from .bench import Row
from .kernels.roofline import Card

WIDTH = 160  # of tables that go to a file


def card_line(card: Card, sheet: Card | None = None) -> str:
    line = f"{card.name} ({card.arch}), {card.source}: {card.bandwidth / 1e12:.2f} TB/s"
    line += f", {card.matmul / 1e12:.0f} TFLOP/s of bf16 matrix products"
    if sheet is not None:
        line += f"; data sheet: {sheet.bandwidth / 1e12:.2f} TB/s, {sheet.matmul / 1e12:.0f} TFLOP/s"
    return line


def plain_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _shape(row: Row, rows: Sequence[Row]) -> str:
    """The sizes that differ between the rows of a table."""
    constant = {key for key in row.case.sizes if len({other.case.sizes.get(key) for other in rows}) == 1}
    shown = {key: size for key, size in row.case.sizes.items() if key not in constant} or row.case.sizes
    return " ".join(f"{key}{size}" for key, size in shown.items())


def _number(value: float | None) -> str:
    """Three digits or more, no exponent where a person would write none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def micro(seconds: float | None) -> str:
    return _number(None if seconds is None else seconds * 1e6)


def _launches(row: Row) -> str:
    """How many device kernels a call has, and how many of them are torch's own."""
    torch_own = sum(not name.endswith("_kernel") for name in row.launches)
    return f"{len(row.launches)}" + (f" ({torch_own} torch)" if torch_own else "")


def op_table(rows: Sequence[Row]) -> Group:
    """The rows of one operation, with notes on what could not be measured."""
    timed = any(row.ours.seconds is not None or row.ours.said for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    columns = ["MB", "GFLOP", "bound", "launches", "floor, us"]
    columns += ["time, us", "of floor", *(f"{name} / ours" for name in peers)] if timed else []
    table = plain_table(rows[0].case.op.name, ("sizes",), columns)
    notes: dict[str, None] = {}
    for row in rows:
        cells = [_number(row.bytes / 1e6), _number(row.flops / 1e9), row.bound, _launches(row), micro(row.floor_s)]
        if timed:
            share = "-" if row.share is None else f"{100 * row.share:.0f} %"
            ratios = [row.ratio(name) if name in row.peers else None for name in peers]
            cells += [micro(row.ours.seconds), share, *("-" if x is None else f"{x:.2f}" for x in ratios)]
        shape = _shape(row, rows)
        table.add_row(shape, *cells, style="bold red" if row.ours.said else None)
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.said:
                notes[f"{name}, {shape}: {outcome.said}"] = None
    return Group(table, *(Text(note, style="red" if note.startswith("ours") else "yellow") for note in notes))


def resources_table(arch: str, kernels: Sequence[dict[str, Any]]) -> Table:
    """Compiled kernels, as `offline.as_json` gives them."""
    numbers = ("registers", "spills", "shared_bytes", "loop_flop_per_instruction")
    headings = ("w/s", "regs", "spills", "shared", "FLOP/i")
    table = plain_table(f"Compiled for {arch}", ("kernel", "dtype", "tile"), headings)
    table.caption = (
        "w/s: warps and stages; regs: registers of a thread; FLOP/i: of the tensor cores, for each other instruction "
        "of the main loop"
    )
    for row in kernels:
        tile = "x".join(str(size) for name, size in row["constexprs"].items() if name.startswith("BLOCK_"))
        cells = ("" if row[name] is None else f"{row[name]:,.0f}" for name in numbers)
        left = (row["kernel"].removesuffix("_kernel"), row["dtype"], tile, f"{row['num_warps']}/{row['num_stages']}")
        table.add_row(*left, *cells, style="bold red" if row["fault"] else None)
    return table


def traffic_table(arch: str, counted: Sequence[dict[str, Any]]) -> Table:
    """Lines of `bench_traffic`."""
    title = f"Counted in the interpreter, at reduced sizes with the tiles of {arch}; 1 is what is compulsory"
    table = plain_table(title, ("operation", "sizes"), ("bytes touched", "bytes moved", "FLOP issued"))
    table.caption = (
        "moved: all loads and stores, as if there were no cache; "
        "FLOP issued: a tensor core's tile has 16 rows, however few the tokens"
    )
    for line in counted:
        sizes = " ".join(f"{letter}{size}" for letter, size in line["sizes"].items())
        ratios = (line[key] for key in ("touched", "moved", "issued"))
        table.add_row(line["op"], sizes, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios))
    return table


def plot(rows: Sequence[Row], card: Card, file: Path) -> None:
    """The roofline: arithmetic intensity against FLOP/s reached, and where no time was measured, within reach."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6))
    axes = figure.subplots()
    drawn = [row for row in rows if row.flops]
    knee = card.matmul / card.bandwidth
    reach = [row.flops / row.bytes for row in drawn] + [knee]
    low, high = min(reach) / 2, max(reach) * 4
    axes.plot([low, knee, high], [low * card.bandwidth, card.matmul, card.matmul], color="black", label="floor")
    for index, name in enumerate(dict.fromkeys(row.case.op.name for row in drawn)):
        points = [row for row in drawn if row.case.op.name == name]
        timed = [row for row in points if row.ours.seconds]
        x = [row.flops / row.bytes for row in timed or points]
        y = [row.flops / (row.ours.seconds or row.floor_s) for row in timed or points]
        marker = "os^v"[index // 10 % 4]  # there are ten colours
        axes.plot(x, y, marker, ms=5, label=name, fillstyle="full" if timed else "none")
    axes.set(xscale="log", yscale="log", xlabel="FLOP / compulsory byte", ylabel="FLOP/s")
    times = "" if any(row.ours.seconds for row in rows) else "; no time was measured: points are floors"
    axes.set_title(f"{card.name}, {card.source}{times}", fontsize=9)
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file)
