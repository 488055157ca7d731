"""What a command shows: tables, progress on stderr, plots in files, and one line for the error that ends it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TaskID, TimeRemainingColumn
from rich.text import Text

from .processes import is_first

PIPED = 120  # columns without a terminal and without COLUMNS
TEXT_WIDTH, HEADING_WIDTH = 24, 16  # a column of text is as wide as this, if need be; a number's heading wraps at this
INTERVAL = 10.0  # seconds between two lines of progress where stderr is no terminal
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 and the signal's number: SIGINT, SIGPIPE
CRASHED = 3


def console(stderr: bool = False) -> Console:
    """For a command's result: as wide as the terminal, or as COLUMNS says."""
    out = Console(stderr=stderr, highlight=False)
    if not out.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        out.width = PIPED
    return out


class Column:
    """`number`: right-aligned and never wrapped; other cells wrap at spaces. A number's heading wraps, too. Where the
    table is too wide, the column of the largest `rank` that is furthest to the right is left out first."""

    def __init__(self, heading: str, number: bool = True, rank: int = 0) -> None:
        self.name, self.rank = heading, rank
        wrapper = textwrap.TextWrapper(HEADING_WIDTH, break_long_words=False, break_on_hyphens=False)
        self.heading, self.number = wrapper.fill(heading) if number else heading, number


class Table:
    """rich's table with a title and a caption: a text, or one for each heading that needs it. No cell is cut. Empty
    columns are left out, and named ones where it is too wide, but never the first `keys`."""

    def __init__(
        self, title: str, columns: Sequence[Column], caption: str | dict[str, str] = "", keys: int = 1
    ) -> None:
        self.title, self.columns, self.caption, self.keys = title, list(columns), caption, keys
        self.rows: list[tuple[list[Text], str]] = []

    def add(self, *cells: str | Text, style: str = "") -> None:
        self.rows.append(([cell if isinstance(cell, Text) else Text(cell) for cell in cells], style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.title, style="bold")
        most = max(1, (options.max_width - 2) // (self.keys + 1) - 2)
        keys = list(range(self.keys))
        widths = {}
        for index, column in enumerate(self.columns):
            cells = [cells[index] for cells, _ in self.rows]
            if index in keys or any(cells):
                longest = max([*map(len, column.heading.split("\n")), *map(len, cells)])
                widths[index] = max(1, min(longest, most, longest if column.number else TEXT_WIDTH))
        shown, left_out = list(widths), list[str]()
        while len(shown) > self.keys + 1 and sum(widths[n] + 2 for n in shown) - 1 > options.max_width:
            last = max(shown[self.keys :], key=lambda n: (self.columns[n].rank, n))
            shown.remove(last)
            left_out.insert(0, self.columns[last].name)
        table = rich.table.Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="")
        for column, width in ((self.columns[n], widths[n]) for n in shown):
            justify: Any = "right" if column.number else "left"
            table.add_column(Text(column.heading), min_width=width, justify=justify, overflow="fold")
        for cells, style in self.rows:
            table.add_row(*(cells[n] for n in shown), style=style)
        yield table
        caption, names = self.caption, [self.columns[n].name for n in shown]
        if isinstance(caption, dict):
            caption = "; ".join(f"{name}: {text}" for name, text in caption.items() if name in names)
        note = f"left out at this width: {', '.join(left_out)}; --json has all" if left_out else ""
        yield Text("".join(f"{line}\n" for line in (caption, note) if line), style="dim")


def print_message(line: str) -> None:
    """Print a line on stderr, if there is anything to say and anybody reads it. Other characters than text come from a
    file, and a terminal would act on them: they are escaped."""
    line = "".join(each if each.isprintable() or each in "\r\n\t" else ascii(each)[1:-1] for each in line)
    with suppress(OSError, ValueError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)


class Bar(NamedTuple):
    """The progress of one task."""

    progress: Progress
    task: TaskID

    def advance(self, done: int) -> None:
        self.progress.update(self.task, advance=done)

    def update(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


@contextmanager
def bar(label: str, total: int | None, count: ProgressColumn | None = None) -> Iterator[Bar]:
    """Show the first process's progress on stderr: rich's bar on a terminal, else a line every INTERVAL seconds.

    `total` None: unknown. `count` shows how much is done; None: as a number.
    """
    console, done, count = Console(stderr=True), threading.Event(), count or MofNCompleteColumn()
    compiled, triton = list[float](), sys.modules.get("triton")  # seconds of each kernel, which no estimate may repeat
    if triton is not None:
        record = lambda times, cache_hit, **rest: compiled.extend([times.total / 1e6] * (not cache_hit))  # noqa: E731
        triton.knobs.compilation.listener = record
    columns, drawn = (BarColumn(), count, TimeRemainingColumn()), is_first() and console.is_terminal
    with Progress("{task.description}", *columns, console=console, transient=True, disable=not drawn) as progress:
        task = progress.add_task(label, total=total)

        def report() -> None:
            before = ""
            while not done.wait(INTERVAL):
                state, estimate = progress.tasks[task], ""
                if state.completed and state.remaining is not None and state.elapsed:
                    seconds = (state.elapsed - sum(compiled)) * state.remaining / state.completed
                    estimate = f", about {seconds:.0f} s left"
                done_so_far = str(count(state)).strip() + f", {len(compiled)} kernels compiled" * bool(compiled)
                if done_so_far != before:  # a line says something new
                    print_message(f"{label}: {done_so_far}{estimate}")
                before = done_so_far

        with ThreadPoolExecutor(1) as thread:
            if is_first() and not drawn:
                thread.submit(report)
            try:
                yield Bar(progress, task)
            finally:
                done.set()


def did_you_mean(message: str) -> str:
    """Return the message with the nearest of the names that it lists behind the wrong one, if one is near."""
    found = re.search(r"'([^']+)'[^']*\b(?:one of|choose from) (?:sm_80 or later: )?(.+)", message)
    names = re.split(r", (?:or )?", re.sub(r"[')]", "", found[2])) if found else []
    near = get_close_matches(found[1].lower(), [name.lower() for name in names], 1) if found else []
    return message + "".join(f"; did you mean {name}?" for name in names if name.lower() in near)


def exit_status(error: BaseException, command: str | None) -> int:
    """Report what ended a command in one line on stderr -> its exit status.

    An error that no input explains is a crash; in Python's development mode (`python -X dev`) it is raised again."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # rich turns the one into the other
    name = "mixtral-triton" if command is None else f"mixtral-triton {command}"
    if isinstance(error, OSError) and error.errno and not error.filename:  # standard output cannot be written
        with suppress(OSError, ValueError):  # Python writes what is left as it ends, and must not fail there again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        print_message("\r" * sys.stderr.isatty() + f"{name}: interrupted")  # over the terminal's ^C
        return INTERRUPTED
    message, text = _compiler_message(error), " ".join(str(error).split())
    if message is None and isinstance(error, (ValueError, OSError)):
        message = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else text
        folder = sys.modules["triton"].knobs.cache.dir if "triton" in sys.modules else None
        if folder and isinstance(error, OSError) and str(error.filename).startswith(folder):
            message += ": Triton keeps compiled kernels there, needs TRITON_CACHE_DIR, a folder that can be written"
    if message is None and (sys.flags.dev_mode or not isinstance(error, Exception)):
        raise error
    if message is None:
        print_message(f"{name}: crashed: {type(error).__name__}: {text} (python -X dev -m mixtral_triton shows where)")
        return CRASHED
    print_message(f"{name}: {did_you_mean(message.removeprefix(f'{command}: '))}")
    return 2


def toolchain_fault() -> str | None:
    """Return what is missing for Triton's first launch on a GPU, which builds a C module against Python's headers."""
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs on a GPU, and there is no gcc or clang: install one, or set CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers when it runs on a GPU, and {header} is not there: install python3-dev"
    return None


def _compiler_message(error: BaseException) -> str | None:
    """Return what is missing, if `error` is Triton's for an absent or failing C compiler."""
    if isinstance(error, RuntimeError) and "C compiler" in str(error):
        return toolchain_fault() or str(error)
    return toolchain_fault() if isinstance(error, subprocess.CalledProcessError) else None


def check_writable(option: str, file: Path) -> None:
    """Raise ValueError where an option's file cannot be written: before the work whose result would be lost."""
    folder = file.absolute().parent
    if not folder.is_dir() or file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {str(file)!r} needs a file that can be written, in a folder that exists")


def check_plot(file: Path) -> None:
    """Raise ValueError where `--plot FILE` cannot be written: before the work whose result would be lost."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {str(file)!r} needs a name that ends in .png, .svg or .pdf")
    check_writable("--plot", file)
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mixtral-triton[plot]'")
