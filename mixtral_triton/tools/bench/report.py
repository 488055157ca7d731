"""What `bench` found, as tables for a person; `Row.as_dict()` is for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.text import Text

from ..gpus import GPU
from ..terminal import Column, Table
from .measure import Outcome, Row

PREDICTED = (
    "Predicted from the launches, the GPU's data sheet and estimates of it, not measured; "
    "limit: what takes most of what is predicted."
)


def gpu_line(gpu: GPU, sheet: GPU | None = None) -> str:
    line = f"{gpu.name} ({gpu.arch}), {gpu.source}: {gpu.bandwidth / 1e12:.2f} TB/s"
    line += f", {gpu.matmul / 1e12:.0f} TFLOP/s of bf16 matrix products"
    if sheet is not None:
        line += f"; data sheet: {sheet.bandwidth / 1e12:.2f} TB/s, {sheet.matmul / 1e12:.0f} TFLOP/s"
    return line


def sizes_text(sizes: Mapping[str, Any]) -> str:
    return " ".join(f"{name}{'=' * isinstance(size, str)}{size}" for name, size in sizes.items())


def _constant(rows: Sequence[Row]) -> dict[str, int]:
    """The sizes that are the same in all rows of a table, where there are several."""
    sizes = rows[0].case.as_dict() if len(rows) > 1 else {}
    return {key: size for key, size in sizes.items() if all(row.case.as_dict().get(key) == size for row in rows)}


def _shape(row: Row, rows: Sequence[Row]) -> str:
    """The sizes that differ between the rows of a table."""
    constant = _constant(rows)
    sizes = row.case.as_dict()
    return sizes_text({key: size for key, size in sizes.items() if key not in constant} or sizes)


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


def _ratio(row: Row, peer: str) -> str:
    """A peer's cell: its time by ours, or the first word of what is said of it."""
    ratio, outcome = row.ratio(peer) if peer in row.peers else None, row.peers.get(peer, Outcome())
    return f"{ratio:.2f}" if ratio is not None else outcome.verdict


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _predicted_columns(timed: bool) -> list[Column]:
    """Beside a measurement the time alone, and what limits it."""
    return [
        Column("predicted, us"),
        *([] if timed else [Column("of floor")]),
        Column("limit", number=False),
    ]


def _predicted_cells(row: Row, timed: bool) -> list[str]:
    said = row.predicted
    time, share, limit = ("-", "-", "-") if said is None else (micro(said.seconds), _percent(said.share), said.limit)
    return [time, limit] if timed else [time, share, limit]


def op_table(rows: Sequence[Row]) -> Group:
    """The rows of one operation, with notes on what could not be measured."""
    timed = any(row.ours.seconds is not None or row.ours.note for row in rows)
    peers = list(dict.fromkeys(name for row in rows for name in row.peers))
    foreseen = any(row.predicted is not None for row in rows)
    columns = [Column("sizes", number=False), *([Column("time, us"), Column("of floor")] if timed else [])]
    columns += _predicted_columns(timed) if foreseen else []
    columns += [Column("floor, us"), Column("bound", number=False)]
    columns += [Column(f"{name} / ours" if timed else name) for name in peers]
    columns += [Column(name) for name in ("MB", "GFLOP", "launches")]
    first = rows[0].case
    title = ", ".join(filter(None, (first.op.name, first.dtype_name, sizes_text(_constant(rows)))))
    table = Table(title, columns, PREDICTED if foreseen else "")
    notes: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        shape, cells = _shape(row, rows), []
        if timed:
            cells = [row.ours.verdict if row.ours.seconds is None else micro(row.ours.seconds), _percent(row.share)]
        cells += _predicted_cells(row, timed) if foreseen else []
        cells += [micro(row.floor_s), row.bound, *(_ratio(row, name) for name in peers)]
        cells += [_number(row.bytes / 1e6), _number(row.flops / 1e9), _launches(row)]
        table.add(shape, *cells, style="bold red" if row.ours.right is False else "")
        for name, outcome in (("ours", row.ours), *row.peers.items()):
            if outcome.note:
                notes.setdefault((name, outcome.note), []).append(shape)
    return Group(table, *(_note(*said, shapes, len(rows)) for said, shapes in notes.items()))


def _note(way: str, said: str, shapes: Sequence[str], rows: int) -> Text:
    """What is said of a way, once, and of which rows where not of all of them."""
    where = f", {'; '.join(shapes)}" if len(shapes) < rows or rows == 1 else ""
    return Text(f"{way}{where}: {said}", style="red" if way == "ours" else "yellow")


def traffic_table(arch: str, counted: Sequence[dict[str, Any]]) -> Table:
    """Lines of `bench_traffic`."""
    ratios = {"touched": "bytes touched", "moved": "bytes moved", "issued": "FLOP issued"}
    columns = [Column("operation", number=False), Column("sizes", number=False), *map(Column, ratios.values())]
    table = Table(
        f"Counted in the interpreter, at reduced sizes with the tiles of {arch}; 1 is what is compulsory",
        columns,
        "moved: all loads and stores, as if there were no cache; "
        "FLOP issued: a tensor core's tile has 16 rows, however few the tokens",
    )
    for line in counted:
        cells = ("-" if line[key] is None else f"{line[key]:.2f}" for key in ratios)
        table.add(line["op"], sizes_text(line["sizes"]), *cells)
    return table
