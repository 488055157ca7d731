"""Work shared out over processes: results as they come; a process that crashes loses its own piece of work alone."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def _serve(work: Callable[[Piece], Result], connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches everybody; the process that shares out ends the rest
    with suppress(EOFError):  # no more pieces
        while True:
            connection.send(work(connection.recv()))


def share(
    work: Callable[[Piece], Result],
    pieces: Sequence[Piece],
    workers: int,
    crashed: Callable[[Piece, signal.Signals], Result],
    preload: str,
) -> Iterator[tuple[int, Result]]:
    """Index and result of each piece as it is done; pieces are begun in their order.

    `work` is a function that another process can import, and `preload` the module to import before there are many.
    `crashed(piece, signal)` is the result where a signal ended the process. All end where the caller stops.
    ChildProcessError: a process that ended by an exception, which it has printed.
    """
    # Forked from a server without threads, which imports once, and not from here: a fork copies locks that are held.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([preload])
    waiting = list(enumerate(pieces))[::-1]
    busy: dict[Connection, tuple[BaseProcess, int]] = {}

    def start() -> tuple[Connection, BaseProcess]:
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        process.start()
        theirs.close()
        return ours, process

    def give(connection: Connection, process: BaseProcess) -> None:
        index, piece = waiting.pop()
        busy[connection] = process, index
        with suppress(ConnectionError):  # one that has ended shows where its result is read
            connection.send(piece)

    try:
        for _ in range(min(workers, len(pieces))):
            give(*start())
        while busy:
            for connection in wait(list(busy)):
                process, index = busy.pop(connection)
                try:
                    result = connection.recv()
                except (EOFError, ConnectionError):
                    result = crashed(pieces[index], _ended_by(process))
                    connection.close()
                if waiting:
                    give(*(start() if connection.closed else (connection, process)))
                else:
                    connection.close()
                yield index, result
    finally:
        for process, _ in busy.values():
            process.terminate()


def _ended_by(process: BaseProcess) -> signal.Signals:
    process.join()
    if process.exitcode is None or process.exitcode >= 0:
        raise ChildProcessError(f"{process.name} ended with exit code {process.exitcode}, see what it printed")
    return signal.Signals(-process.exitcode)
