"""What `verify` found, as rows, as a table for a person and as a dictionary for a program."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True)
class Row:
    """One operation of one layer. `error` and `limit` are relative to the largest value of the result."""

    layer: int
    op: str
    case: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        # A NaN in the result is an infinite error, for plain torch too: never right.
        return math.isfinite(self.error) and self.error <= self.limit


@dataclass(frozen=True)
class Report:
    """All rows; `flips` of `routed` routes differ end to end (harmless near ties in 16-bit types, so counted apart)."""

    rows: tuple[Row, ...]
    flips: int
    routed: int
    way: str
    dtype: str
    peer: str = "plain torch"

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    @property
    def verdict(self) -> str:
        bad = [row for row in self.rows if not row.ok]
        if bad:
            worst = max(bad, key=lambda row: row.error / max(row.limit, 1e-30))
            return f"WRONG: {len(bad)} of {len(self.rows)} comparisons fail, worst {worst.op} in layer {worst.layer}"
        return f"RIGHT: all {len(self.rows)} comparisons are within their limits"

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        keys = ("way", "peer", "dtype", "flips", "routed", "verdict")
        return {"ok": self.ok, **{key: getattr(self, key) for key in keys}, "rows": rows}

    def __rich__(self) -> Group:
        """A line an operation, with its worst layer; every failing row is listed below."""
        title = f"{self.way}, beside {self.peer}; {self.dtype}; worst errors, relative to the largest value"
        table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
        for name in ("operation", "case"):
            table.add_column(name, no_wrap=True)
        for name in ("error", "limit", "of it", "layer", "right"):
            table.add_column(name, justify="right", no_wrap=True)
        for (op, case), rows in self._groups().items():
            worst = max(rows, key=lambda row: row.error / max(row.limit, 1e-30))
            share = f"{100 * worst.error / worst.limit:.0f} %" if worst.limit else "-"
            right = sum(row.ok for row in rows)
            style = "green" if right == len(rows) else "bold red"
            cells = (f"{worst.error:.1e}", f"{worst.limit:.1e}", share, str(worst.layer))
            table.add_row(op, case, *cells, Text(f"{right}/{len(rows)}", style=style))
        notes = [Text(f"routes that differ end to end: {self.flips} of {self.routed}")]
        notes += [
            Text(f"layer {row.layer} {row.op} ({row.case}): error {row.error:.2e}, limit {row.limit:.2e}", style="red")
            for row in self.rows
            if not row.ok
        ]
        if self.way == "plain torch":
            notes.append(Text("No kernel ran: set TRITON_INTERPRET=1 before the import, or use a GPU.", style="yellow"))
        return Group(table, *notes, Text(self.verdict, style="bold green" if self.ok else "bold red"))

    def _groups(self) -> dict[tuple[str, str], list[Row]]:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.case), []).append(row)
        return groups

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
