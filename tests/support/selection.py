"""Which tests run: those of one operation (`--op`), and those that this process can run at all.

Tests that need a GPU, a compiling process or an interpreting one are left out when they are collected; a line at the
end says how many. conftest.py imports the hooks.
"""

import datetime
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.operation.cases import OpWithCases
from mixtral_triton.kernels.registry import OPS

NOT_SIMULATED = {  # tests for a GPU that the simulated one cannot run, and why
    **dict.fromkeys(
        ("test_backward_raises_value_error", "test_a_step_of_lora"),
        "autograd has no thread for a simulated GPU, and aborts",
    ),
    **dict.fromkeys(
        (
            "test_save_pretrained_of_an_applied_model_writes_what_the_model_writes",
            "test_quantized_experts_that_were_saved_are_read_as_stored",
        ),
        "safetensors reads the storage of tensors, which a simulated GPU's do not have",
    ),
    "test_a_static_cache_with_torch_compile_is_one_graph": "torch.compile does not trace a simulated GPU's tensors",
    "test_compile": "torch.compile does not trace a simulated GPU's tensors",
    **dict.fromkeys(
        ("test_lazy_negation", "test_lazily_negated_scales_of_a_quantized_weight", "test_lazily_negated_lengths"),
        "a simulated GPU's tensors have no negative bit",
    ),
    "test_bad_loads[cuda-{'device': 'cuda:99'}]": "a simulated GPU answers in place of any, also to torch's parser",
    "test_a_captured_step_is_one_chain": "a simulated graph has no nodes to dump",
    "test_sequence_of_a_model_at_any_place[cuda-1001]": "takes an hour; the interpreted run has 1,001 sequences, too",
    "test_two_threads_generate_what_each_generates_alone": "a simulated GPU's tensors are one thread's",
}
# The quick run takes the first case with compiled kernels, and none interpreted.
slow_interpreted = pytest.mark.slow if INTERPRETED else pytest.mark.exhaustive
LEFT_OUT = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "run this fraction of the selected tests, shuffled"
    parser.addoption("--sample", type=float, default=1.0, metavar="F", help=text)
    today = int(f"{datetime.date.today():%Y%m%d}")  # a controller of xdist hands its own to its workers
    parser.addoption("--seed", type=int, default=today, help="of --sample; by default the date")
    text = "run the cases of this operation alone, or of those whose names contain NAME; repeatable"
    parser.addoption("--first", action="store_true", help="run one test of each function: the first that is selected")
    parser.addoption("--op", action="append", default=[], metavar="NAME", help=text)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[LEFT_OUT] = Counter()
    config.pluginmanager.register(Exhaustive())
    if not 0 < (fraction := config.getoption("--sample")) <= 1:
        raise pytest.UsageError(f"--sample is {fraction}, needs a number above 0, at most 1")
    for name in config.getoption("--op"):
        if not any(name in op for op in OPS):
            raise pytest.UsageError(f"--op is {name!r}, needs one of {', '.join(OPS)}, or a part of a name")


def operations_of(value: Any) -> set[str]:
    """Return the names of the operations that a test's parameter names, or holds."""
    if isinstance(value, str):
        return {value} & OPS.keys()
    if isinstance(value, OpWithCases):
        return {value.name}
    if isinstance(value, Sequence):
        return set[str]().union(*map(operations_of, value))
    return operations_of(getattr(value, "op", None)) if hasattr(value, "op") else set()


def operations_of_item(item: pytest.Item) -> set[str]:
    return operations_of(tuple(getattr(getattr(item, "callspec", None), "params", {}).values()))


def missing(item: pytest.Item) -> str | None:
    """Return what a test needs and this process lacks."""
    if "gpu" in item.keywords and (INTERPRETED or not torch.cuda.is_available()):
        return "a GPU"
    simulated = "gpu" in getattr(item, "fixturenames", ()) and (INTERPRETED or torch.cuda.is_available())
    other = item.get_closest_marker("compiled" if INTERPRETED else "interpreted") is not None
    if simulated or other or any(mark.args[:1] == (True,) for mark in item.iter_markers("skipif")):
        return "a compiling process" if INTERPRETED else "an interpreting one, or a machine without a GPU"
    return None


class Exhaustive:
    """Marks all cases but the first of a test that is marked exhaustive as slow, before -m selects; with --op all but
    the first of each operation."""

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        cases = set[Any]()
        for item in items:
            if item.get_closest_marker("exhaustive") is None or missing(item) is not None:
                continue
            names = frozenset(operations_of_item(item) if config.getoption("--op") else ())
            if (case := (item.nodeid.partition("[")[0], names)) in cases:
                item.add_marker(pytest.mark.slow)
            cases.add(case)


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, left_out, functions = [], [], set[str]()
    stub = sys.modules.get("tests.support.stub.gpu")
    for item in items:
        names_of_test = {item.name, getattr(item, "originalname", item.name)} & NOT_SIMULATED.keys()
        if stub is not None and stub._active and "gpu" in item.keywords and names_of_test:
            item.add_marker(pytest.mark.skip(reason=NOT_SIMULATED[names_of_test.pop()]))
        need = missing(item)
        if need is not None:
            config.stash[LEFT_OUT][need] += 1
        names = config.getoption("--op")
        found = operations_of_item(item) if names else set[str]()
        wanted = not names or any(name in found if name in OPS else any(name in op for op in found) for name in names)
        function = item.nodeid.partition("[")[0]
        repeated = config.getoption("--first") and function in functions
        selected = need is None and wanted and not repeated
        functions |= {function} if selected else set()
        (kept if selected else left_out).append(item)
    if (fraction := config.getoption("--sample")) < 1:
        random.Random(config.getoption("--seed")).shuffle(kept)  # a larger fraction begins with a smaller one
        most = math.ceil(fraction * len(kept))
        kept, left_out = kept[:most], left_out + kept[most:]
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_sessionfinish(session: pytest.Session) -> None:
    output = getattr(session.config, "workeroutput", None)
    if output is not None:  # a process of pytest-xdist: each collects all tests
        output["left_out"] = dict(session.config.stash[LEFT_OUT])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: Any) -> None:
    node.config.stash[LEFT_OUT] = Counter(getattr(node, "workeroutput", {}).get("left_out", {}))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Workers that are done take tests from others, so that none waits behind a long one."""
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = terminalreporter.config.stash[LEFT_OUT]
    if counts:
        needs = ", ".join(f"{count} need {need}" for need, count in sorted(counts.items()))
        terminalreporter.write_line(f"left out: {needs}")
    fraction, seed = (terminalreporter.config.getoption(name) for name in ("--sample", "--seed"))
    if fraction < 1:
        terminalreporter.write_line(f"a sample of the tests: --sample {fraction:g} --seed {seed} repeats it")
