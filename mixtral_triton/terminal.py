"""What the command line shows while it works: a bar, or a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

SILENT = 10.0  # seconds of work without a word where stderr is no terminal


class Bar:
    """Progress: `more` of the total, or `of` a total told later."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self.progress, self.task = progress, task

    def more(self, done: int) -> None:
        self.progress.update(self.task, advance=done)

    def of(self, done: int, total: int) -> None:
        self.progress.update(self.task, completed=done, total=total)


@contextmanager
def bar(label: str, total: int | None, *columns: ProgressColumn) -> Iterator[Bar]:
    """Progress on stderr: a bar where that is a terminal, else a line every SILENT seconds, so none of quick work.

    `total` None: told later.
    """
    console = Console(stderr=True)
    shown = (TextColumn(label), BarColumn(), *columns, TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as progress:
        counted = Bar(progress, progress.add_task(label, total=total))
        with nullcontext() if console.is_terminal else _now_and_then(counted, label, columns):
            yield counted


@contextmanager
def _now_and_then(bar: Bar, label: str, columns: Sequence[ProgressColumn]) -> Iterator[None]:
    """While the block runs: what the columns show, and the seconds left at the speed so far."""
    ended, start = threading.Event(), time.monotonic()

    def say() -> None:
        while not ended.wait(SILENT):
            task, words = bar.progress.tasks[0], ["starting"]
            if task.total is not None:
                words = [str(column(task)).strip() for column in columns]
            if task.completed and task.remaining is not None:
                words.append(f"{(time.monotonic() - start) * task.remaining / task.completed:.0f} s left")
            print(f"{label}: {', '.join(words)}", file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
