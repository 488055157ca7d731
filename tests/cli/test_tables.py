"""Tables at the widths of terminals, of which no cell is cut and none is lost, and progress."""

import io
import re
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from mixtral_triton import terminal
from mixtral_triton.bench.cases import cases
from mixtral_triton.bench.command import op_table
from mixtral_triton.bench.compile import collect, describe, resources_table
from mixtral_triton.bench.gpus import GPUS
from mixtral_triton.bench.measure import Outcome, untimed_row
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.terminal import table_of
from mixtral_triton.verification.report import Report, Row
from tests.cli.commands import shown

pytestmark = pytest.mark.compiled


def printed(renderable: Any, width: int) -> str:
    """What a terminal of that width shows, which wraps lines itself: none is cut."""
    out = Console(width=width, soft_wrap=True)
    with out.capture() as captured:
        out.print(renderable)
    assert "…" not in captured.get()
    return captured.get()


def holds(text: str, *cells: str) -> bool:
    """Whether the text has all words of the cells, each as often as the cells have it."""
    words, needed = re.findall(r"\S+", text), [word for cell in cells for word in cell.split()]
    return all(words.count(word) >= needed.count(word) for word in needed)


@pytest.mark.parametrize("width", [12, 40, 80, 120])
def test_cells_wider_than_the_terminal_are_folded(width: int) -> None:
    """None is left out, none is cut, and what looks like markup is text."""
    wide = {"first": "one two three [red]", "second": "z" * 50, "third": "words " * 9}
    table = table_of("A title", [(wide, ""), ({"first": "short", "second": "-", "third": ""}, "dim")])
    text = printed(table, width)
    assert text.count("z") == 50 and [each.justify for each in table.columns] == ["left", "right", "right"]
    assert width < 80 or holds(text, "one two three [red]", "words " * 9)


@pytest.mark.parametrize("width", [60, 80])
def test_errors_of_a_report_are_whole_on_a_narrow_terminal(width: int) -> None:
    case = "every expert, decode, int4 with linear layers in int8"
    rows = Row(31, "rope_append_attention", case, 1.5e-3, 3.0e-3), Row(None, "logits", case, 2.5e-5, 1.0e-4)
    text = shown(Report(rows, 0, 0, "Triton", "bfloat16"), width)
    assert holds(text, case, case, "rope_append_attention", "1.5e-03", "3.0e-03", "2.5e-05", "1.0e-04", "1/1", "1/1")
    assert "…" not in text and max(map(len, text.splitlines())) <= width


def test_verdict_is_the_last_line_at_any_width() -> None:
    report = Report((Row(31, "linear", "qkv", 0.0, 1.0),), 0, 0, "plain torch", "bfloat16", "transformers' own modules")
    assert len(report.verdict) > 110 and str(report).splitlines()[-1] == report.verdict


def test_bench_table() -> None:
    """Of the peers one is right, one does not take the case, one is wrong; empty columns are left out."""
    rows = [untimed_row(case, GPUS["h100"]) for case in cases(["expert_swiglu"])[:6]]
    peers = {"torch": Outcome(note="ragged keys"), "a:b": Outcome(note="wrong: an error of 1.0e-01", right=False)}
    timed = [
        replace(
            row, ours=Outcome(row.floor_s, right=True), peers={"mine": Outcome(2 * row.floor_s, right=True), **peers}
        )
        for row in rows
    ]
    text, plain = printed(op_table(timed), 120), printed(op_table(rows), 120)
    assert text.count("100 %") == text.count("2.00") == text.count("ragged keys") == text.count("wrong: ") == len(rows)
    assert "of floor" in " ".join(text.split()) and "of floor" not in plain and "a:b / ours" not in text


def test_compile_table() -> None:
    """Kernels with the same figures are one row; a fault makes another."""
    figures = {"registers": 40, "spills": 0, "shared_bytes": 163872, "loop_flop_per_instruction": None, "fault": None}
    figures |= {"programs_per_sm": 1, "loop_clocks": (1088.0, 1024.0), "num_warps": 16, "num_stages": 3}
    row = {**figures, "kernel": "down_kernel", "dtype": "bf16", "constexprs": {"BLOCK_M": 128, "BLOCK_N": 256}}
    launches = collect([OPS["linear"]], "sm_90", choices={"T": [1], "weight": ["int4:128"]})
    described = describe(next(iter(launches.values()))[1], "sm_90", "linear").as_dict()
    row["constexprs"] |= {"LAYOUT": described["constexprs"]["LAYOUT"]}
    table = resources_table("sm_90", [row, row, row | {"fault": "spills 8 bytes", "spills": 12345}])
    assert table.row_count == 2 and holds(
        printed(table, 120), "down", "int4:128", "12,345", "163,872", "128x256", "1,088/1,024"
    )


@pytest.mark.slow
def test_progress_is_drawn_on_a_terminal_and_in_a_log_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of another part are counted anew."""
    for terminal_at_hand, interval, shows in ((True, 10.0, True), (False, 0.0, True), (False, 10.0, False)):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda: terminal_at_hand)  # noqa: B023
        monkeypatch.setattr(terminal, "INTERVAL", interval)
        monkeypatch.setattr("sys.stderr", stream)
        with terminal.Bar("verifying") as progress:
            time.sleep(0.15)
            for done, total, part in ((1, 2, "weights"), (2, 2, "weights"), (1, 30, "layers"), (2, 30, "layers")):
                progress.set(done, total, part)
                time.sleep(0.15)
        shown = stream.getvalue()
        assert ("verifying layers:" in shown) == ("2/30" in shown) == ("2/2" in shown) == shows, shown
        monkeypatch.undo()
