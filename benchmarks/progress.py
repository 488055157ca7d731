"""What a command that may die has begun and ended, as lines of JSON: the next try goes on behind what it died of.

Also a pytest plugin (`-p benchmarks.progress --progress FILE`) that writes and obeys such a file. Its lines:
"begin" (a test, or a case with its number), "outcome" and "row" (how it ended), "cut" (killed for want of time: what
was begun last is to be tried again), "end" (nothing is left).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def events(*files: Path) -> list[dict[str, Any]]:
    """The lines of JSON in those of the files that are there; a killed process's last line may be cut off."""
    return [event for file in files if file.is_file() for event in _lines(file)]


def _lines(file: Path) -> Iterator[dict[str, Any]]:
    for line in file.read_text(errors="replace").splitlines():
        try:
            told = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(told, dict):
            yield told


def begun(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What began and is not to be tried again."""
    kept: list[dict[str, Any]] = []
    for event in found:
        if event.get("kind") == "begin":
            kept.append(event)
        elif event.get("kind") == "cut" and kept and not _ended(kept[-1], found):
            kept.pop()
    return kept


def _ended(begin: dict[str, Any], found: list[dict[str, Any]]) -> bool:
    """Whether something came of it: the outcome of the test, or the row of the case."""
    if "test" in begin:
        return any(event.get("kind") == "outcome" and event["test"] == begin["test"] for event in found)
    same = (begin["op"], begin["sizes"])
    return any(event.get("kind") == "row" and (event["op"], event["sizes"]) == same for event in found)


def died(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What began, was not cut off, and came to no end."""
    return [begin for begin in begun(found) if not _ended(begin, found)]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--progress", type=Path, metavar="FILE", help="leave out what it says was begun; write on in it")
    parser.addoption("--operation", metavar="OP", help="only the tests of this operation of the registry")
    parser.addoption("--most", type=int, metavar="N", help="at most so many tests")


def _operation(item: Any) -> str | None:
    op = getattr(item, "callspec", None) and item.callspec.params.get("op")
    return getattr(op, "name", None)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    name, file = config.getoption("--operation"), config.getoption("--progress")
    done = {event["test"] for event in begun(events(file))} if file else set()
    chosen = [item for item in items if item.nodeid not in done and name in (None, _operation(item))]
    items[:] = chosen[: config.getoption("--most")]


class Writer:
    """Writes lines as tests begin and end; stops the process where a test leaves the GPU in an error."""

    def __init__(self, file: Path) -> None:
        self.file, self.lost = file, False

    def write(self, **line: Any) -> None:
        with self.file.open("a") as out:
            print(json.dumps(line), file=out)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(kind="begin", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or (report.when == "setup" and not report.passed):
            self.write(
                kind="outcome", test=report.nodeid, outcome=report.outcome, note=str(report.longrepr or "")[-300:]
            )

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        import torch

        try:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        except RuntimeError:
            self.lost = True
            item.session.shouldstop = "the GPU is in an error: every later test of this process would fail"

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
            session.exitstatus = pytest.ExitCode.OK
        if not self.lost and exitstatus in (0, 1, 5):
            self.write(kind="end")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--progress"):
        config.pluginmanager.register(Writer(file))
