"""Tables that fit the terminal: what does not fit beside the rest of a row stands below it, named. No cell is cut."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.text import Text

PIPED = 120  # columns where there is no terminal, and COLUMNS says nothing
GAP, INDENT = 2, 4
RULE = "─"


def console(stderr: bool = False) -> Console:
    """For a command's result: as wide as the terminal, or as COLUMNS says."""
    out = Console(stderr=stderr, highlight=False)
    if not out.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        out.width = PIPED
    return out


def folded(text: str, width: int, indent: str = "") -> list[str]:
    """Lines of at most `width`, broken at spaces where there are some; the second and later ones indented."""
    return textwrap.wrap(text, max(width, 1), subsequent_indent=indent, break_on_hyphens=False) or [""]


@dataclass(frozen=True)
class Column:
    """`level`: the columns of the highest go below their row together, before those of a lower one."""

    heading: str
    level: int = 0
    right: bool = True


class Table:
    """Rows of cells under headings, a title above and a caption below; a renderable of rich."""

    def __init__(self, title: str, columns: Sequence[Column], caption: str = "") -> None:
        self.title, self.columns, self.caption = title, list(columns), caption
        self.rows: list[tuple[tuple[str, ...], str]] = []

    def add(self, *cells: str, style: str = "") -> None:
        self.rows.append((cells, style))

    def _widths(self) -> list[int]:
        lines = ([column.heading for column in self.columns], *(cells for cells, _ in self.rows))
        return [max(map(cell_len, cells)) for cells in zip(*lines, strict=True)]

    def _beside(self, width: int) -> list[int]:
        """The columns that fit beside each other: the first one, and as many as do of those that hold anything."""
        widths = self._widths()
        kept = [at for at in range(len(self.columns)) if not at or any(cells[at] for cells, _ in self.rows)]
        while len(kept) > 1 and sum(widths[at] for at in kept) + GAP * (len(kept) - 1) > width:
            level = max(self.columns[at].level for at in kept[1:])
            below = [at for at in kept[1:] if self.columns[at].level == level]
            kept = [at for at in kept if at not in (below if level else below[-1:])]
        return kept

    def _line(self, cells: Sequence[str], kept: Sequence[int], widths: Sequence[int]) -> str:
        found = []
        for at in kept:
            space = " " * (widths[at] - cell_len(cells[at]))
            found.append(space + cells[at] if self.columns[at].right else cells[at] + space)
        return (" " * GAP).join(found).rstrip()

    def _below(self, cells: Sequence[str], kept: Sequence[int], width: int) -> Iterator[str]:
        """The other cells that say something, each behind its heading, as many a line as there is room for."""
        line = ""
        for at, column in enumerate(self.columns):
            if at in kept or cells[at] in ("", "-"):
                continue
            item = f"{column.heading} {cells[at]}".strip()
            if line and len(line) + GAP + cell_len(item) > width - INDENT:
                yield line
                line = ""
            line += " " * GAP * bool(line) + item
        if line:
            yield line

    def _row(self, cells: Sequence[str], kept: Sequence[int], width: int) -> Iterator[str]:
        yield from _parts(self._line(cells, kept, self._widths()), width)
        for line in self._below(cells, kept, width):
            yield from (" " * INDENT + part for part in _parts(line, width - INDENT))

    def lines(self, width: int) -> Iterator[tuple[str, str]]:
        """The lines of the table, none wider than `width`, each with its style."""
        kept, widths = self._beside(width), self._widths()
        total = min(width, sum(widths[at] for at in kept) + GAP * (len(kept) - 1))
        yield from ((line, "bold") for line in folded(self.title, width, " " * GAP))
        headings = self._line([column.heading for column in self.columns], kept, widths)
        yield from ((line, "") for line in _parts(headings, width))
        yield RULE * total, ""
        for cells, style in self.rows:
            yield from ((line, style) for line in self._row(cells, kept, width))
        if self.caption:
            yield from ((line, "dim") for line in folded(self.caption, width))
        yield "", ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        for line, style in self.lines(options.max_width):
            line = line.replace(RULE, "-") if options.ascii_only else line
            yield Text(line, style=style, no_wrap=True, overflow="ignore")


def _parts(line: str, width: int) -> list[str]:
    """A line as it is where it fits: its gaps stay."""
    return [line] if cell_len(line) <= width else folded(line, width, " " * GAP)
