"""A command's surroundings: its backend, tables, progress on stderr, and one line for the error that ends it. Nothing
here imports torch before it is used."""

import argparse
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

INTERVAL = 10.0  # seconds between two states of progress where stderr is no terminal
INTERRUPTED, CLOSED_PIPE = 130, 141  # 128 and the signal's number: SIGINT, SIGPIPE
CRASHED = 3


def console(stderr: bool = False) -> Console:
    """Return a console for a command's result, as wide as the terminal, or as COLUMNS says; a file takes any width."""
    output = Console(stderr=stderr, highlight=False, soft_wrap=True)  # the terminal wraps what is wider
    if not output.is_terminal and "COLUMNS" not in os.environ:
        output.width = 1000  # columns, more than a row has
    return output


def table_of(title: str, rows: Sequence[tuple[Mapping[str, str | Text], str]], caption: str = "") -> Table:
    """Return rich's table of rows, each the cells by heading and a style. Cells of a table that is wider than the
    terminal are folded."""
    looks: dict[str, Any] = {
        "box": box.SIMPLE_HEAD,
        "show_edge": False,
        "padding": (0, 1, 0, 0),
        "title_justify": "left",
        "caption_justify": "left",
    }
    table = Table(title=Text(title), caption=Text(caption), **looks)
    for name in rows[0][0]:
        whole = name.split() if table.columns else [cells[name] for cells, _ in rows]  # names of rows are not folded
        justify: Any = "right" if table.columns else "left"
        table.add_column(Text(name), justify=justify, overflow="fold", min_width=max(map(len, whole), default=1))
    for cells, style in rows:
        table.add_row(*map(Text.assemble, cells.values()), style=style)
    return table


def print_message(line: str) -> None:
    """Print a line on stderr, if there is anything to say and anybody reads it. Other characters than text come from a
    file or a library that read one, and a terminal would act on them: they are escaped."""
    line = "".join(char if char.isprintable() or char in "\r\n\t" else ascii(char)[1:-1] for char in line)
    if line and sys.stderr is not None:
        with suppress(OSError, ValueError):
            print(line, file=sys.stderr, flush=True)


class Bar(tqdm):
    """Progress on stderr, in a log only after a while. `total` None: unknown."""

    def __init__(self, label: str, total: int | None = None, unit: str = "it") -> None:
        seconds = 0.1 if sys.stderr is not None and sys.stderr.isatty() else INTERVAL
        options: dict[str, Any] = {"unit": unit, "unit_scale": unit == "B", "leave": False}
        options |= {"mininterval": seconds, "delay": seconds, "miniters": 1, "disable": sys.stderr is None}
        self.label = label
        super().__init__(desc=label, total=total, **options)

    def set(self, done: int, total: int, part: str = "") -> None:
        """Show that so much is done, of a part of the work where it has parts."""
        if done < self.n:
            self.reset()  # a step of another part takes another time
        self.total = total
        self.set_description_str(f"{self.label} {part}", refresh=False)
        self.update(done - self.n)


def did_you_mean(message: str, options: Iterable[str] = ()) -> str:
    """Return the message with the nearest of the names that it lists behind the wrong one, if one is near; behind an
    unknown option the nearest of `options`."""
    pattern = r"'([^']+)'[^']*\b(?:one of|choose from) (.+)|unrecognized arguments: (--[^\s=]+)"
    if not (wrong := re.search(pattern, message)):
        return message
    listed = options if wrong[2] is None else (name.strip("' )").removeprefix("or ") for name in wrong[2].split(","))
    names = {name.lower(): name for name in listed}
    near = [] if wrong[3] in names else get_close_matches((wrong[1] or wrong[3]).lower(), names, 1)  # another command's
    return f"{message}; did you mean {names[near[0]]}?" if near else message


def exit_status(error: BaseException, command: str | None) -> int:
    """Report what ended a command in one line on stderr -> its exit status. An error that no input explains is a crash;
    in Python's development mode (`python -X dev`) it is raised again."""
    name, text = "mixtral-triton" if command is None else f"mixtral-triton {command}", " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno and not error.filename:  # standard output cannot be written
        with suppress(OSError, ValueError):  # Python writes what is left as it ends, and must not fail there again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):  # of which rich exits
        return CLOSED_PIPE
    if isinstance(error, KeyboardInterrupt):
        print_message(f"{name}: interrupted")
        return INTERRUPTED
    if isinstance(error, (ValueError, OSError)) or "C compiler" in text:  # Triton's launches on a GPU need one
        print_message(f"{name}: {did_you_mean(text.removeprefix(f'{command}: '))}")
        return 2
    if sys.flags.dev_mode or not isinstance(error, Exception):
        raise error
    print_message(f"{name}: crashed: {type(error).__name__}: {text} (python -X dev -m mixtral_triton shows where)")
    return CRASHED


def check_range(name: str, value: float, least: float, most: float | None = None, what: str = "") -> None:
    """Raise ValueError where a number is below `least` or above `most`, which is `what`."""
    if not least <= value <= (value if most is None else most):
        need = f"at least {least}" if most is None else f"{least} to {most}{what and ', '}{what}"
        raise ValueError(f"{name} is {value}, needs {need}")


def check_known(what: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raise ValueError for the first of the names that is not known."""
    allowed = [*known]
    if unknown := [name for name in names if name not in allowed]:
        raise ValueError(f"{what} is {unknown[0]!r}, needs one of {', '.join(allowed)}")


def check_writable(option: str, file: Path) -> None:
    """Raise ValueError where an option's file cannot be written: before the work whose result would be lost."""
    folder = file.absolute().parent
    if not folder.is_dir() or file.is_dir() or not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"{option} {str(file)!r} needs a file that can be written, in a folder that exists")


def select_backend(args: argparse.Namespace, interpret: bool) -> str:
    """Set TRITON_INTERPRET, before any kernel is imported -> a note to print; empty on a GPU, and where the variable
    decides. `interpret`: without a GPU this command interprets the kernels rather than run the torch backend."""
    requested, value = getattr(args, "interpret", False), os.environ.get("TRITON_INTERPRET")
    on_cpu = args.device is not None and args.device.startswith("cpu")
    if requested and args.device is not None and not on_cpu:
        raise ValueError(f"--interpret runs on the CPU, and --device is {args.device!r}: needs one of the two")
    if interpret or requested or value is not None:
        # Interpreted tiles are small products, for which the threads of numpy's OpenBLAS wait for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if requested:
        args.device = args.device or "cpu"
    elif value is not None:
        return ""
    import torch  # after OPENBLAS_NUM_THREADS

    if not requested and not on_cpu and torch.cuda.is_available():
        return ""
    reason = "--interpret" if requested else "--device cpu" if on_cpu else "No GPU found"
    if not (interpret or requested):
        return f"{reason}: plain torch, on the CPU. --interpret runs the Triton kernels, interpreted: far slower."
    os.environ["TRITON_INTERPRET"] = "1"
    return f"{reason}: the Triton kernels run interpreted, on the CPU. Right, and slow."
