"""A pytest plugin: every n-th test from the i-th on, so that several processes share a run (`-p benchmarks.shard`)."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shard", default="0/1", metavar="I/N", help="run the tests I, I + N, I + 2 N, ...")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    index, count = map(int, config.getoption("--shard").split("/"))
    items[:] = items[index::count]
