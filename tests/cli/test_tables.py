"""Tables at the widths of terminals, of which no cell is cut and none is lost, and the estimate of the time left."""

import re
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import triton

from mixtral_triton import verify
from mixtral_triton.kernels.launch import LaunchConfig
from mixtral_triton.tools import terminal
from mixtral_triton.tools.bench.cases import BENCHED, cases
from mixtral_triton.tools.bench.command import op_table
from mixtral_triton.tools.bench.measure import Outcome, untimed_row
from mixtral_triton.tools.bench.tune import Candidate, kernel_configs, tune_table
from mixtral_triton.tools.gpus import GPUS
from mixtral_triton.tools.offline import resources_table
from mixtral_triton.tools.terminal import PIPED, Table, console
from tests.cli.commands import shown
from tests.support.models import random_model, tokens

pytestmark = pytest.mark.compiled
at_widths = pytest.mark.parametrize("width", [80, 100, 120])


def printed(renderable: Any, width: int) -> str:
    """What a terminal of that width shows: every line fits, none is cut."""
    text = shown(renderable, width)
    assert "…" not in text and all(len(line) <= width for line in text.splitlines()), text
    return text


def holds(text: str, *cells: str) -> bool:
    """Whether the text has all words of the cells, each as often as the cells have it."""
    words, needed = re.findall(r"\S+", text), [word for cell in cells for word in cell.split()]
    return all(words.count(word) >= needed.count(word) for word in needed)


@at_widths
def test_columns_beyond_the_width_are_left_out_by_rank_and_named(width: int) -> None:
    """No row continues elsewhere and no cell is cut; empty columns are left out; long text wraps."""
    ranks = [0, 1, *[0] * 8, 2, -1]
    names = ["key", *(f"name of {n}" for n in range(12)), "none", "text"]
    table = Table("A title", "A caption", text=["text"], ranks=dict(zip(names[1:], ranks, strict=False)))
    rows = [[f"k{row}", *(f"{row}{n:09}" for n in range(12)), "", f"words{row} " * 30] for row in range(3)]
    for row in rows:
        table.add(dict(zip(names, row, strict=True)))
    text = printed(table, width)
    assert holds(text, "A title", "A caption", "k0", "k1", "k2") and "none" not in text and text.count("k0") == 1
    note = " ".join(text.split("left out at this width: ")[1].split())
    order = [11, 0, *range(2, 10), 1, 10]  # the last one is left out first
    shown = [n for n in range(12) if "name of " + str(n) not in re.split(", |;", note)]
    assert shown and shown == sorted(order[: len(shown)]) and note.endswith("; --json has all")
    assert holds(text, *(row[1 + n] for row in rows for n in shown)) and text.count("0000000") == 3 * len(shown)


@pytest.mark.parametrize("width", [12, 20, 40])
def test_cells_wider_than_the_terminal_are_folded(width: int) -> None:
    table = Table("A title of several words", "a caption")
    table.add({"first": "one two three four five six seven", "second": "z" * 50})
    table.add({"first": "short", "second": "-"})
    text = printed(table, width)
    assert text.count("z") == 50 and (width == 12 or holds(text, "one two three four five six seven", "short"))


@at_widths
@pytest.mark.parametrize("name", BENCHED)
def test_bench_table(name: str, width: int) -> None:
    """Of the peers one is right, one does not take the case, one is wrong; empty columns are left out."""
    rows = [untimed_row(case, GPUS["h100"]) for case in cases([name], quick=True)]
    peers = {"torch": Outcome(note="ragged keys"), "a:b": Outcome(note="wrong: an error of 1.0e-01", right=False)}
    timed = [
        replace(
            row, ours=Outcome(row.floor_s, right=True), peers={"mine": Outcome(2 * row.floor_s, right=True), **peers}
        )
        for row in rows
    ]
    text, plain = printed(op_table(timed), width), printed(op_table(rows), width)
    assert text.count("100 %") == text.count("2.00") == text.count("ragged keys") == text.count("wrong: ") == len(rows)
    assert "of floor" in " ".join(text.split()) and "of floor" not in plain and "a:b / ours" not in text


@at_widths
def test_tune_table(width: int) -> None:
    case = next(case for case in cases(["expert_swiglu"]) if case.sizes.T == 64)
    kernel = "experts_down_decode_kernel"
    config = kernel_configs(case, "sm_90")[kernel][1]
    wide = LaunchConfig({**config.constexprs, "BLOCK_N": 123}, 16, 7)
    fault = "does not compile: CompilationError: " + "a reason of many words " * 4
    candidates = Candidate(config, "now", Outcome(1e-3)), Candidate(wide, "neighbour", Outcome(note=fault.strip()))
    text = printed(tune_table(f"{kernel}: {case.op.name}", candidates, 0, True), width)
    assert holds(text, "123", "16", "7", "1,000", f"{kernel}:") and "SPLIT_K" in text
    assert all(word in text for word in fault.split())


def compiled(**changes: Any) -> dict[str, Any]:
    """A line of `compile --json`, as far as the table reads it."""
    figures = {"registers": 40, "spills": 0, "shared_bytes": 163872, "loop_flop_per_instruction": 2093.0, "fault": None}
    figures |= {"loop_instructions_per_byte": None, "programs_per_sm": 1, "loop_clocks": (1088.0, 1024.0)}
    launch = {"kernel": "experts_down_decode_kernel", "dtype": "bf16", "num_warps": 16, "num_stages": 3}
    return {**figures, **launch, "constexprs": {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}, **changes}


@at_widths
def test_compile_table(width: int) -> None:
    """Kernels with the same figures are one row; a fault makes another."""
    kernels = [compiled(registers=100 + n % 4) for n in range(8)]
    kernels.append(compiled(kernel="attention_prefill_kernel", fault="spills 8 bytes", spills=12345))
    text = printed(resources_table("sm_90", kernels), width)
    assert holds(text, "attention_prefill", "12,345") and not holds(text, "104")
    assert "FLOP/i: of the tensor cores" in " ".join(text.split())
    without = printed(resources_table("sm_90", [compiled(loop_flop_per_instruction=None)]), width)
    assert "FLOP/i" not in without and "regs: registers of a thread" in without, "a legend explains what is shown"
    assert text.count("128x256x128") % 5 == 0 and all(text.count(str(100 + n)) == 1 for n in range(4))


def test_width_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == PIPED
    monkeypatch.setenv("COLUMNS", "60")
    assert console().width == 60


def test_estimate_of_the_time_left_is_of_steps_of_one_kind(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """`verify` on random weights: what is said after the first step of each kind, of which the clock counts another."""
    clock, steps = [0.0], list[tuple[str, int]]()
    monkeypatch.setattr(terminal, "Progress", partial(terminal.Progress, get_time=lambda: clock[0]))
    monkeypatch.setattr(terminal, "INTERVAL", 0.01)
    seconds = {"operations of the first layer": 100.0, "operations of other layers": 10.0, "layers of forwards": 1.0}
    with terminal.bar("verifying", None) as progress:

        def update(done: int, total: int, part: str) -> None:
            steps.append((part, total))
            clock[0] += seconds.get(part, 5.0) if done else 0.0
            progress.update(done, total, part)
            time.sleep(0.1 if done in (0, 1) else 0.0)

        verify(random_model(num_hidden_layers=3), tokens(2, 6), update)
    kinds, printed = dict(steps), capsys.readouterr().err
    assert kinds["layers of forwards"] % 3 == 0 and kinds["operations of other layers"] == 2 and kinds["generate"] == 1
    for part, total in kinds.items():
        assert f"verifying {part}: 0/{total}\n" in printed
        left = (total - 1) * seconds.get(part, 5.0)
        assert f"verifying {part}: 1/{total}, about {left:.0f} s for the rest" in printed or part == "generate"


def test_estimate_of_the_time_left_is_without_compilation(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(terminal, "Progress", partial(terminal.Progress, get_time=lambda: clock[0]))
    monkeypatch.setattr(terminal, "INTERVAL", 0.01)
    with terminal.bar("verifying", 10) as progress:
        for cache_hit in (False, True):
            times = SimpleNamespace(total=90e6)  # microseconds
            given = {"src": None, "metadata": {}, "metadata_group": {}}
            triton.knobs.compilation.listener(**given, times=times, cache_hit=cache_hit)
        clock[0] = 100.0
        progress.update(1, 10)
        time.sleep(0.5)
    assert "verifying: 1/10, 1 kernels compiled, about 90 s left" in capsys.readouterr().err
