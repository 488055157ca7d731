"""What `verify` found, as rows, as a table for a person and as a dictionary for a program."""

from __future__ import annotations

import io
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from .quantization import Quantization

PLAIN = "plain torch"  # the way where no kernel runs
WIDE = 90  # columns that the whole table needs


@dataclass(frozen=True)
class Row:
    """One comparison: of an operation of a layer, of a layer (op "layer"), of loaded tensors (op "weights").

    layer  None: before or behind the layers
    case   which input, or which way to cut the text
    error  of an operation relative to the largest value of the result; of a layer and of logits the worst token's,
           relative to its norm; of loaded tensors the largest difference
    limit  what the error may be: mostly twice plain torch's own
    """

    layer: int | None
    op: str
    case: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        # A NaN in the result is an infinite error, for plain torch too: never right.
        return math.isfinite(self.error) and self.error <= self.limit

    @property
    def where(self) -> str:
        return self.op if self.layer is None else f"{self.op} in layer {self.layer}"

    @property
    def share(self) -> float:
        """Of the limit."""
        return self.error / max(self.limit, 1e-30)


@dataclass(frozen=True)
class Report:
    """All rows; `flips` of `routed` routes differ end to end (harmless near ties in 16-bit types, so counted apart).

    quantization  what it cost, beside the files without; None where nothing was quantized on the way from them. No part
                  of the verdict: the rows compare with the dequantized weights
    """

    rows: tuple[Row, ...]
    flips: int
    routed: int
    way: str
    dtype: str
    peer: str = PLAIN
    quantization: Quantization | None = None

    @property
    def compared(self) -> bool:
        """False where plain torch stood beside itself, which is always right."""
        return (self.way, self.peer) != (PLAIN, PLAIN)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if not row.ok]

    @property
    def ok(self) -> bool:
        """Something was compared, and every comparison is within its limit."""
        return self.compared and not self.wrong

    @property
    def verdict(self) -> str:
        if self.wrong:
            first = self.wrong[0]
            count = f"{len(self.wrong)} of {len(self.rows)} comparisons fail"
            return f"WRONG: {count}, the first is {first.where} ({first.case})"
        if not self.compared:
            return "NOTHING WAS COMPARED: no kernel ran, and plain torch stood beside itself"
        return f"RIGHT: all {len(self.rows)} comparisons are within their limits"

    def as_dict(self) -> dict[str, Any]:
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        keys = ("compared", "way", "peer", "dtype", "flips", "routed", "verdict")
        quantization = None if self.quantization is None else asdict(self.quantization)
        told = {key: getattr(self, key) for key in keys}
        return {"ok": self.ok, **told, "quantization": quantization, "rows": rows}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """A line an operation, with its worst layer; every failing row is listed below."""
        yield Text(f"{self.way}, beside {self.peer}; {self.dtype}; the worst of all layers")
        yield self._table(wide=options.max_width >= WIDE)
        yield Text(f"routes that differ end to end: {self.flips} of {self.routed}")
        if self.quantization is not None:
            yield Text(str(self.quantization))
        for row in self.wrong:
            yield Text(f"{row.where} ({row.case}): error {row.error:.2e}, limit {row.limit:.2e}", style="red")
        if self.way == PLAIN:
            yield Text("No kernel ran: set TRITON_INTERPRET=1 before the import, or use a GPU.", style="yellow")
        yield Text(self.verdict, style="bold green" if self.ok else "bold red" if self.wrong else "bold yellow")

    def _table(self, wide: bool) -> Table:
        """Narrow, without the share of the limit: error and limit say it."""
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        for name in ("operation", "case"):
            table.add_column(name, no_wrap=True)
        for name in ("error", "limit", *(("of it",) if wide else ()), "layer", "right"):
            table.add_column(name, justify="right", no_wrap=True)
        for (op, case), rows in self._groups().items():
            worst = max(rows, key=lambda row: row.share)
            share = f"{100 * worst.share:.0f} %" if worst.limit else "-"
            right = sum(row.ok for row in rows)
            cells = [f"{worst.error:.1e}", f"{worst.limit:.1e}", *((share,) if wide else ())]
            layer = "-" if worst.layer is None else str(worst.layer)
            style = "green" if right == len(rows) else "bold red"
            table.add_row(op, case, *cells, layer, Text(f"{right}/{len(rows)}", style=style))
        return table

    def _groups(self) -> dict[tuple[str, str], list[Row]]:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.case), []).append(row)
        return groups

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]
