"""The output of commands: tables, progress on stderr, and one line for the error that ends it."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import rich.table
from rich import box
from rich.console import Console
from rich.text import Text
from tqdm import tqdm

from .processes import is_first

PIPED = 500  # columns without a terminal and without COLUMNS
TEXT_WIDTH = 24  # a column of text is as wide as this, if need be
INTERVAL = 10.0  # seconds between two states of progress where stderr is no terminal
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 and the signal's number: SIGINT, SIGPIPE
CRASHED = 3
QUANTIZED = {"weight", "gate_up", "down"}  # of a case: the formats of quantized weights
FORMATS = QUANTIZED | {"cache"}


def console(stderr: bool = False) -> Console:
    """Return a console for a command's result, as wide as the terminal, or as COLUMNS says."""
    out = Console(stderr=stderr, highlight=False, soft_wrap=True)  # the terminal wraps what is wider
    if not out.is_terminal and not os.environ.get("COLUMNS", "").isdecimal():
        out.width = PIPED
    return out


def parse_sizes(option: str, texts: Iterable[str]) -> dict[str, Any]:
    """Return sizes and formats by name from texts such as "T=4096" and "weight=int4:128"."""
    from ..kernels.formats import BITS
    from ..kernels.fp8 import W8A8  # here, since it imports torch

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


class Table(rich.table.Table):
    """rich's table of rows with their cells by heading. Text wraps at spaces, a number never: where all together are
    wider than the terminal, the table is.

    caption  a text, or one for each heading that needs it
    keys     the first columns, which are text
    text     other columns of text; all others hold numbers
    """

    def __init__(
        self, title: str, caption: str | Mapping[str, str] = "", keys: int = 1, text: Collection[str] = ()
    ) -> None:
        notes = caption if isinstance(caption, str) else "; ".join(f"{name}: {x}" for name, x in caption.items())
        looks: dict[str, Any] = {"box": box.SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
        looks |= {"title_justify": "left", "title_style": "bold", "caption_justify": "left", "caption_style": "dim"}
        super().__init__(title=Text(title), caption=Text(notes) if notes else None, header_style="", **looks)
        self.keys, self.text = keys, text

    def add(self, cells: Mapping[str, str | Text], style: str = "") -> None:
        """Add a row; the first one's headings are the columns."""
        for at, name in enumerate(cells if not self.columns else ()):
            left = at < self.keys or name in self.text
            word = max(map(len, name.split()), default=1)
            self.add_column(Text(name), justify="left" if left else "right", overflow="fold", min_width=word)
        self.add_row(*map(Text.assemble, cells.values()), style=style)
        for column, cell in zip(self.columns, cells.values(), strict=True):
            widest = len(cell) if column.justify == "right" else min(len(cell), TEXT_WIDTH)
            column.min_width = max(column.min_width or 1, widest)


def print_message(line: str) -> None:
    """Print a line on stderr, if there is anything to say and anybody reads it. Other characters than text come from a
    file, and a terminal would act on them: they are escaped."""
    line = "".join(each if each.isprintable() or each in "\r\n\t" else ascii(each)[1:-1] for each in line)
    with suppress(OSError, ValueError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)


class Bar(NamedTuple):
    advance: Callable[[int], object]  # by so much
    update: Callable[..., None]  # to so much, of so much, of a part of the work where it has parts


@contextmanager
def bar(label: str, total: int | None, unit: str = "it") -> Iterator[Bar]:
    """Show the first process's progress on stderr by tqdm, in a log only after a while. `total` None: unknown."""
    hidden, seconds = sys.stderr is None or not is_first(), INTERVAL
    if not hidden and sys.stderr.isatty():
        seconds = 0.1
    options: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "leave": False, "disable": hidden}
    options |= {"mininterval": seconds, "delay": seconds, "miniters": 1}
    shown, shown_part = tqdm(desc=label, total=total, **options), ""

    def update(done: int, total: int, part: str = "") -> None:
        nonlocal shown, shown_part
        if part != shown_part:
            shown.close()  # a step of another part takes another time
            shown, shown_part = tqdm(desc=f"{label} {part}".rstrip(), total=total, **options), part
        shown.total = total
        shown.update(done - shown.n)

    try:
        yield Bar(lambda count: shown.update(count), update)
    finally:
        shown.close()


def did_you_mean(message: str, options: Iterable[str] = ()) -> str:
    """Return the message with the nearest of the names that it lists behind the wrong one, if one is near; behind an
    unknown option the nearest of `options`."""
    listed = re.search(r"'([^']+)'[^']*\b(?:one of|choose from) (?:sm_80 or later: )?(.+)", message)
    unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
    typed, names = unknown[1] if unknown else "", [*options]
    if listed:
        typed, names = listed[1], re.split(r", (?:or )?", re.sub(r"[')]", "", listed[2]))
    by_text = {name.lower(): name for name in names}
    near = get_close_matches(typed.lower(), by_text, 1)
    return f"{message}; did you mean {by_text[near[0]]}?" if near else message


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
