"""What the command line shows: a bar or a line now and then while it works, one line for what stopped it."""

from __future__ import annotations

import io
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from .toolchain import fault_behind

SILENT = 10.0  # seconds of work without a word where stderr is no terminal
INTERRUPTED, HUNG_UP = 130, 141  # 128 and the signal, as a shell has it: SIGINT, SIGPIPE


def say(line: str) -> None:
    """On stderr, if there is anything to say. Where nobody reads that, there is nobody to tell so."""
    with suppress(OSError, ValueError):
        print(line, end="\n" if line else "", file=sys.stderr, flush=True)


def settle() -> None:
    """Make the output's streams write what their terminal can show, and "?" for the rest. Before the work."""
    first = next(
        filter(None, map(os.environ.get, ("PYTHONUTF8", "PYTHONIOENCODING", "LC_ALL", "LC_CTYPE", "LANG"))), None
    )
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Python takes the C locale for UTF-8; its terminal does not.
            encoding = "ascii" if first in ("C", "POSIX") else stream.encoding
            stream.reconfigure(encoding=encoding, errors="replace")


def ended(error: BaseException, command: str | None) -> int:
    """The exit status for what ended a command, told in one line; what should not happen is raised again."""
    if isinstance(error, SystemExit) and isinstance(error.__context__, BrokenPipeError):
        error = error.__context__  # rich makes the one of the other
    name = "mixtral-triton" if command is None else f"mixtral-triton {command}"
    if isinstance(error, BrokenPipeError):
        _let_go(sys.stdout, sys.stderr)
        return HUNG_UP
    if isinstance(error, KeyboardInterrupt):
        say("\r" * sys.stderr.isatty() + f"{name}: interrupted")  # over the terminal's ^C
        return INTERRUPTED
    message = fault_behind(error)
    if message is None and isinstance(error, (ValueError, OSError)):
        message = _told(error)
    if message is None:
        raise error
    say(f"{name}: {message.removeprefix(f'{command}: ')}")
    return 2


def _told(error: Exception) -> str:
    """In one line. An error of the system names its file, or else the output that could not be written."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename
        if where is None and _is_stuck(sys.stdout):
            where = "standard output"
        if where is not None:
            return f"{where}: {error.strerror}"
    return " ".join(str(error).split())


def _is_stuck(stream: TextIO) -> bool:
    """Whether it takes not even an empty line: an unbuffered one has forgotten what it could not write."""
    try:
        print(file=stream, flush=True)
    except OSError:
        _let_go(stream)
        return True
    return False


def _let_go(*streams: TextIO) -> None:
    """Turn them to where everything can be written: Python writes what is left in them as it ends."""
    for stream in streams:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


class Bar:
    """Progress: `more` of the total, or `of` a total told later."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def more(self, done: int) -> None:
        self.progress.update(self.task, advance=done)

    def of(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


@contextmanager
def bar(label: str, total: int | None, *columns: ProgressColumn, silent: bool = False) -> Iterator[Bar]:
    """Progress on stderr: a bar where that is a terminal, else a line every SILENT seconds, so none of quick work.

    `total` None: told later. silent: nothing at all.
    """
    console = Console(stderr=True)
    shown = (TextColumn(label), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=silent or not console.is_terminal) as progress:
        counted = Bar(progress, progress.add_task(label, total=total))
        with nullcontext() if silent or console.is_terminal else _now_and_then(counted, label, columns):
            yield counted


@contextmanager
def _now_and_then(bar: Bar, label: str, columns: Sequence[ProgressColumn]) -> Iterator[None]:
    """While the block runs: what the columns show, and the seconds left at the speed so far."""
    ended, start = threading.Event(), time.monotonic()

    def speak() -> None:
        while not ended.wait(SILENT):
            task, words = bar.progress.tasks[0], ["starting"]
            if task.total is not None:
                words = [str(column(task)).strip() for column in columns]
            if task.completed and task.remaining is not None:
                words.append(f"{(time.monotonic() - start) * task.remaining / task.completed:.0f} s left")
            say(f"{label}: {', '.join(words)}")

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
