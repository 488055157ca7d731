"""The output of commands: tables, progress on stderr, plots in files, and one line for the error that ends it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich import box
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TimeRemainingColumn
from rich.text import Text

from .processes import is_first

PIPED = 120  # columns without a terminal and without COLUMNS
TEXT_WIDTH, HEADING_WIDTH = 24, 16  # a column of text is as wide as this, if need be; a number's heading wraps at this
INTERVAL = 10.0  # seconds between two lines of progress where stderr is no terminal
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 and the signal's number: SIGINT, SIGPIPE
CRASHED = 3
QUANTIZED = {"weight", "gate_up", "down"}  # of a case: the formats of quantized weights
FORMATS = QUANTIZED | {"cache"}


def console(stderr: bool = False) -> Console:
    """Return a console for a command's result, as wide as the terminal, or as COLUMNS says."""
    out = Console(stderr=stderr, highlight=False)
    if not out.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        out.width = PIPED
    return out


def parse_sizes(option: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return sizes and formats by name from texts such as "T=4096" and "weight=int4:128"."""
    from ..kernels.quantized import BITS, W8A8  # here, since it imports torch

    texts = [*texts]
    found: dict[str, Any] = {}
    for text in texts:
        name, _, size = text.partition("=")
        form, need = r"\d+", "a size letter and a number: T=4096"
        if name == "cache":
            form, need = "int8", "int8, or no cache=: the cache is then in the model's dtype"
        elif name in QUANTIZED:
            need = f"one of {', '.join((*BITS, W8A8))}, and maybe a group: {name}=int4:128"
            form = rf"{W8A8}|({'|'.join(BITS)})(:[1-9]\d*)?"
        if not (name and re.fullmatch(form, size)):
            raise ValueError(f"{option} is {text!r}, needs {need}")
        if name in found:
            raise ValueError(f"{option} is {','.join(texts)!r}, needs each letter once")
        found[name] = size if name in FORMATS else int(size)
    return found


def parse_choices(option: str, texts: Iterable[str]) -> dict[str, list[Any]]:
    """Return the sizes and formats of each name, one or several: from T=1 and T=4096 {"T": [1, 4096]}."""
    found = dict[str, list[Any]]()
    for name, size in (item for text in texts for item in parse_sizes(option, [text]).items()):
        found.setdefault(name, []).append(size)
    return found


@dataclass
class Table:
    """rich's table of rows with their cells by heading. Text wraps at spaces, a number never, and no cell is cut: empty
    columns are left out, and where the table is too wide those of the largest rank, from the right, but never a key."""

    title: str
    caption: str | Mapping[str, str] = ""  # or one for each heading that needs it
    keys: int = 1  # the first columns, which are text
    text: Collection[str] = ()  # other columns of text; all others hold numbers
    ranks: Mapping[str, int] = field(default_factory=dict)
    rows: list[tuple[dict[str, Text], str]] = field(default_factory=list)  # cells and style

    def add(self, cells: Mapping[str, str | Text], style: str = "") -> None:
        self.rows.append(({name: Text.assemble(cell) for name, cell in cells.items()}, style))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        yield Text(self.title, style="bold")
        keys, widths = list(self.rows[0][0])[: self.keys], {}
        text, most = {*keys, *self.text}, max(1, (options.max_width - 2) // (self.keys + 1) - 2)
        wrapper = textwrap.TextWrapper(HEADING_WIDTH, break_long_words=False, break_on_hyphens=False)
        headings = {name: name if name in text else wrapper.fill(name) for name in self.rows[0][0]}
        for name, heading in headings.items():
            column = [row[name] for row, _ in self.rows]
            if name in keys or any(column):
                longest = max([*map(len, heading.split("\n")), *map(len, column)])
                widths[name] = max(1, min(longest, most, TEXT_WIDTH if name in text else longest))
        shown = list(widths)
        while len(shown) > self.keys + 1 and sum(widths[name] + 2 for name in shown) - 1 > options.max_width:
            shown.remove(max(reversed(shown[self.keys :]), key=lambda name: self.ranks.get(name, 0)))
        table = rich.table.Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0), header_style="")
        for name in shown:
            justify: Any = "left" if name in text else "right"
            table.add_column(Text(headings[name]), min_width=widths[name], justify=justify, overflow="fold")
        for row, style in self.rows:
            table.add_row(*map(row.__getitem__, shown), style=style)
        yield table
        notes, left_out = self.caption, [name for name in widths if name not in shown]
        if not isinstance(notes, str):
            notes = "; ".join(f"{name}: {note}" for name, note in notes.items() if name in shown)
        notes += "\n" if notes else ""
        notes += f"left out at this width: {', '.join(left_out)}; --json has all\n" if left_out else ""
        yield Text(notes, style="dim")


def print_message(line: str) -> None:
    """Print a line on stderr, if there is anything to say and anybody reads it. Other characters than text come from a
    file, and a terminal would act on them: they are escaped."""
    line = "".join(each if each.isprintable() or each in "\r\n\t" else ascii(each)[1:-1] for each in line)
    with suppress(OSError, ValueError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)


class Bar(NamedTuple):
    advance: Callable[[int], None]  # by so much
    update: Callable[..., None]  # to so much, of so much, of a part of the work where it has parts


@contextmanager
def bar(label: str, total: int | None, count: ProgressColumn | None = None, compiles: bool = False) -> Iterator[Bar]:
    """Show the first process's progress on stderr: rich's bar on a terminal, else a line every INTERVAL seconds.
    `total` None: unknown. `count` shows how much is done; None: as a number. `compiles`: this is what is counted."""
    console, done, count = Console(stderr=True), threading.Event(), count or MofNCompleteColumn()
    compiled: list[float] = []  # seconds of each kernel, which an estimate repeats only where each step compiles one

    def record(times: Any, cache_hit: bool, **rest: Any) -> None:
        if not cache_hit:
            compiled.append(times.total / 1e6)

    if "triton" in sys.modules:
        sys.modules["triton"].knobs.compilation.listener = record
    columns, drawn = (BarColumn(), count, TimeRemainingColumn()), is_first() and console.is_terminal
    with Progress("{task.description}", *columns, console=console, transient=True, disable=not drawn) as progress:
        task = progress.add_task(label, total=total)

        def report() -> None:
            before = ""
            while not done.wait(INTERVAL):
                state, estimate = progress.tasks[task], ""
                if state.completed and state.remaining is not None and state.elapsed:
                    elapsed = state.elapsed - sum(() if compiles else compiled)
                    rest = "left" if state.description == label else "for the rest of them"
                    estimate = f", about {elapsed * state.remaining / state.completed:.0f} s {rest}"
                done_so_far = str(count(state)).strip() + (f", {len(compiled)} kernels compiled" if compiled else "")
                if done_so_far != before:  # a line says something new
                    print_message(f"{state.description}: {done_so_far}{estimate}")
                before = done_so_far

        def update(done: int, total: int, part: str = "") -> None:
            if (text := f"{label} {part}".rstrip()) != progress.tasks[task].description:
                compiled.clear()
                progress.reset(task, description=text)  # a step of another part takes another time
            progress.update(task, completed=done, total=total)

        with ThreadPoolExecutor(1) as thread:
            if is_first() and not drawn:
                thread.submit(report)
            try:
                yield Bar(partial(progress.advance, task), update)
            finally:
                done.set()


def nearest(typed: str, names: Iterable[str]) -> str:
    """Return the name that begins with what was typed, else the one most like it, "" if none is."""

    def likeness(name: str) -> tuple[float, float, int]:
        """Compare the characters in order, then in any order (4900 is 4090), then at the same places."""
        pair = name.lower(), typed.lower()
        in_order, in_any = (SequenceMatcher(None, *each).ratio() for each in (pair, tuple(map(sorted, pair))))
        begins = typed and pair[0].startswith(pair[1])
        return 1.0 if begins else in_order, in_any, sum(map(str.__eq__, *pair))

    best = max(names, key=likeness, default="")  # the first of equals
    return best if likeness(best)[0] >= 0.6 else ""


def did_you_mean(message: str) -> str:
    """Return the message with the nearest of the names that it lists behind the wrong one, if one is near."""
    found = re.search(r"'([^']+)'[^']*\b(?:one of|choose from) (?:sm_80 or later: )?(.+)", message)
    names = re.split(r", (?:or )?", re.sub(r"[')]", "", found[2])) if found else []
    near = nearest(found[1], names) if found else ""
    return f"{message}; did you mean {near}?" if near else message


def exit_status(error: BaseException, command: str | None) -> int:
    """Report what ended a command in one line on stderr -> its exit status. An error that no input explains is a crash;
    in Python's development mode (`python -X dev`) it is raised again."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # rich turns the one into the other
    name = "mixtral-triton" if command is None else f"mixtral-triton {command}"
    if isinstance(error, OSError) and error.errno and not error.filename:  # standard output cannot be written
        with suppress(OSError, ValueError):  # Python writes what is left as it ends, and must not fail there again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        start = "\r" if sys.stderr.isatty() else ""  # over the terminal's ^C
        print_message(f"{start}{name}: interrupted")
        return INTERRUPTED
    message, text = None, " ".join(str(error).split())
    if isinstance(error, subprocess.CalledProcessError):  # of Triton's build of a launcher
        message = toolchain_fault()
    elif isinstance(error, RuntimeError) and "C compiler" in text:
        message = toolchain_fault() or text
    elif isinstance(error, OSError) and error.filename:
        message = " ".join(f"{error.filename}: {error.strerror}".split())
        folder = sys.modules["triton"].knobs.cache.dir if "triton" in sys.modules else None
        if folder and str(error.filename).startswith(folder):
            message += ": Triton keeps compiled kernels there, needs TRITON_CACHE_DIR, a folder that can be written"
    elif isinstance(error, (ValueError, OSError)):
        message = text
    if message is not None:
        print_message(f"{name}: {did_you_mean(message.removeprefix(f'{command}: '))}")
        return 2
    if sys.flags.dev_mode or not isinstance(error, Exception):
        raise error
    print_message(f"{name}: crashed: {type(error).__name__}: {text} (python -X dev -m mixtral_triton shows where)")
    return CRASHED


def toolchain_fault() -> str | None:
    """Return what is missing for Triton's first launch on a GPU, which builds a C module against Python's headers."""
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs on a GPU, and there is no gcc or clang: install one, or set CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers when it runs on a GPU, and {header} is not there: install python3-dev"
    return None


def check_writable(option: str, file: Path) -> None:
    """Raise ValueError where an option's file cannot be written: before the work whose result would be lost."""
    folder = file.absolute().parent
    if not folder.is_dir() or file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {str(file)!r} needs a file that can be written, in a folder that exists")
