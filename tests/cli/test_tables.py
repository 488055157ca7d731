"""Every table of bench, compile and tune at the widths of terminals: no cell is cut, nothing is lost."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from rich.console import Console

from mixtral_triton.cli import main
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import LaunchConfig
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import BENCHED, cases
from mixtral_triton.tools.bench.measure import Outcome, Row, untimed_row
from mixtral_triton.tools.bench.report import op_table, traffic_table
from mixtral_triton.tools.bench.tune import Candidate, Tuned, kernel_configs, literal, tune_report
from mixtral_triton.tools.resources import folded, resources_table
from mixtral_triton.tools.roofline import GPUS
from mixtral_triton.tools.tables import PIPED, Column, Table, console

WIDTHS = (80, 100, 120)
compiled_way = pytest.mark.skipif(INTERPRETED, reason="compiles: needs a process without TRITON_INTERPRET")
at_widths = pytest.mark.parametrize("width", WIDTHS)


def printed(what: Any, width: int) -> str:
    """What a terminal of that width shows: every line fits, none is cut."""
    out = Console(width=width, color_system=None)
    with out.capture() as captured:
        out.print(what)
    text = captured.get()
    assert "…" not in text and "..." not in text
    assert all(len(line) <= width for line in text.splitlines()), text
    return text


def holds(text: str, *cells: str) -> bool:
    """Whether all words of the cells stand in the text, as often as they are asked for."""
    words = re.findall(r"\S+", text)
    asked = [word for cell in cells for word in cell.split()]
    return all(words.count(word) >= asked.count(word) for word in asked)


PEERS = ("torch", "torch.compile", "HF grouped_mm", "Liger", "vLLM", "examples.my_experts:swiglu", "a.b.c.d:e")


def timed(row: Row) -> Row:
    """A row as a GPU gives it: nine ways, of which one is wrong, one unfit, one failed."""
    peers = {name: Outcome(row.floor_s * (2 + at), right=True) for at, name in enumerate(PEERS)}
    peers["mine:off"] = Outcome(note="wrong: an error of 1.0e-01, where 3.8e-06 would be right", right=False)
    peers["SDPA"], peers["flash-attention"] = (
        Outcome(note="ragged keys"),
        Outcome(note="fails: OSError: x", right=False),
    )
    return Row(
        row.case, row.flops, row.bytes, row.floor_s, row.bound, row.launches, Outcome(row.floor_s, right=True), peers
    )


@at_widths
@pytest.mark.parametrize("name", BENCHED)
def test_the_table_of_an_operation(name: str, width: int) -> None:
    rows = [untimed_row(case, GPUS["h100"]) for case in cases([name], quick=True)]
    text = printed(op_table(rows), width)
    assert all(
        holds(text, f"{len(row.launches)}", row.bound, f"{row.bytes / 1e6:.3g}") for row in rows if row.bytes < 1e9
    )
    text = printed(op_table([timed(row) for row in rows]), width)
    for at, peer in enumerate(PEERS):
        assert peer in text and text.count(f"{2 + at:.2f}") >= len(rows)
    assert text.count("100 %") == len(rows) and text.count("wrong") >= len(rows) + 1 and text.count("fails") > len(rows)
    assert " ".join(text.split()).count("ragged keys") == 1, "what is true of all rows is said once"


@at_widths
def test_the_table_of_traffic(width: int) -> None:
    sizes = [case.as_dict() for case in cases(["cached_attention", "embed_rms_norm"], quick=True)]
    lines = [
        {"op": "experts_add_rms_norm", "sizes": own, "touched": 1.25, "moved": 1e4, "issued": None} for own in sizes
    ]
    text = printed(traffic_table("sm_90", lines), width)
    assert text.count("1.25") == text.count("10000.00") == len(lines)
    assert all(holds(text, *(f"{letter}{size}" for letter, size in own.items())) for own in sizes)


@at_widths
def test_the_table_of_the_tuner(width: int) -> None:
    case = next(case for case in cases(["expert_swiglu"]) if case.sizes["T"] == 64)
    kernel = "experts_down_decode_kernel"
    config = kernel_configs(case, "sm_90")[kernel][1]
    wide = LaunchConfig({**config.constexprs, "BLOCK_N": 123}, 16, 7)
    said = "does not compile: CompilationError: " + "a reason of many words " * 4
    tuned = Tuned(
        case, kernel, "sm_90", (Candidate(config, None, 1e-3), Candidate(wide, None, None, said.strip())), config
    )
    text = printed(tune_report(tuned, width), width)
    assert holds(text, said, "123", "16", "7", "1,000", *(f"{name}={config.constexprs[name]}" for name in ("SPLIT_K",)))
    code, row = literal(case.op, kernel, config).split("  # ")
    assert row in text, "the comment stays in one line, or the rest of it would be code"
    pasted = text[text.index('"experts_down_decode_kernel"') :]
    assert eval(f"{{{pasted}}}", {"LaunchConfig": LaunchConfig}) == {kernel: config} and code.count(":") > 3


def compiled(**changes: Any) -> dict[str, Any]:
    """A line of `compile --json`, as far as the table reads it."""
    figures = {"registers": 40, "spills": 0, "shared_bytes": 163872, "loop_flop_per_instruction": 2093.0, "fault": None}
    launch = {"kernel": "experts_down_decode_kernel", "dtype": "bf16", "num_warps": 16, "num_stages": 3}
    constants = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "CAUSAL": True, "SPLITS": 4}
    return {**figures, **launch, "constexprs": constants, "arguments": {"x_ptr": "*bf16", "T": "i32"}, **changes}


def test_what_tells_kernels_apart_is_shown_and_equal_ones_are_one_row() -> None:
    splits = [
        compiled(constexprs={**compiled()["constexprs"], "SPLITS": n}, registers=r)
        for n, r in ((4, 1), (8, 1), (16, 2))
    ]
    assert [words for _, _, words in folded(splits)] == ["SPLITS=4|SPLITS=8", "SPLITS=16"]
    assert [words for _, _, words in folded([compiled(), compiled(dtype="fp16")])] == [""]
    assert folded([compiled(), compiled(dtype="fp16")])[0][1] == "bf16 fp16"
    one = compiled(arguments={"x_ptr": "*bf16", "T": "constexpr"}, registers=41)
    assert [words for _, _, words in folded([compiled(), one])] == ["T>1", "T=1"]
    bare = compiled(arguments={"x_ptr": "constexpr", "T": "i32"}, registers=41)
    assert [words for _, _, words in folded([compiled(), bare])] == ["x bf16", "no x"]
    assert [words for _, _, words in folded([compiled(), compiled()])] == [""], "twice the same"


def test_kernels_that_do_not_combine_are_listed_one_by_one() -> None:
    def kernel(causal: bool, splits: int, registers: int) -> dict[str, Any]:
        return compiled(
            constexprs={**compiled()["constexprs"], "CAUSAL": causal, "SPLITS": splits}, registers=registers
        )

    found = folded([kernel(True, 1, 7), kernel(False, 2, 7), kernel(True, 2, 8), kernel(False, 1, 9)])
    assert [words for _, _, words in found] == [
        "CAUSAL=1 SPLITS=1; CAUSAL=0 SPLITS=2",
        "CAUSAL=1 SPLITS=2",
        "CAUSAL=0 SPLITS=1",
    ]


@at_widths
def test_the_table_of_compiled_kernels(width: int) -> None:
    kernels = [
        compiled(constexprs={**compiled()["constexprs"], "CAUSAL": bool(n % 2), "SPLITS": n}, registers=100 + n)
        for n in range(4)
    ]
    kernels.append(compiled(kernel="attention_prefill_kernel", fault="spills 8 bytes", spills=12345))
    text = printed(resources_table("sm_90", kernels), width)
    assert holds(text, "experts_down_decode", "attention_prefill", "12,345", *(str(100 + n) for n in range(4)))
    assert all(f"SPLITS={n}" in text for n in range(4)) and text.count("128x256x128") == text.count("2,093") == 5


@compiled_way
@at_widths
def test_compile_tells_all_its_rows_apart(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["compile", "rms_norm", "add_rms_norm", "route", "--arch", "sm_90"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and all(len(line) <= width for line in out.splitlines())
    assert "ADD=0" in out and "ADD=1" in out
    rows = re.findall(r"^(?:rms_norm|route) .*\n(?:    .*\n)*", out, re.M)
    assert len(rows) == len(set(rows)) >= 6


def test_a_table_narrower_than_its_cells_breaks_them_and_loses_nothing() -> None:
    table = Table(
        "A title of several words", [Column("first", right=False), Column("second"), Column("empty")], "a caption"
    )
    table.add("one two three four five six seven", "z" * 50, "")
    table.add("short", "-", "")
    for width in (12, 20, 40):
        text = printed(table, width)
        assert holds(text, "one two three four five six seven", "short") and text.count("z") == 50
        assert "empty" not in text


def test_columns_go_below_by_their_level() -> None:
    table = Table("", [Column("a", right=False), Column("bbbb", level=2), Column("cccc", level=1), Column("dddd")])
    table.add("1", "2222222222", "3333333333", "4444444444")
    assert "bbbb" in printed(table, 40).splitlines()[1]
    heads = printed(table, 30).splitlines()
    assert "cccc" in heads[1] and "bbbb" not in heads[1] and "bbbb 2222222222" in heads[4]
    heads = printed(table, 20).splitlines()
    assert "dddd" in heads[1] and "cccc" not in heads[1]


def test_without_a_terminal_tables_are_as_wide_as_columns_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert console().width == PIPED
    monkeypatch.setenv("COLUMNS", "93")
    assert console().width == 93


@compiled_way
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
@at_widths
def test_bench_and_tune_from_the_command_line(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    assert main(["bench", "route", "attention", "--quick"]) == 0
    assert main(["tune", "route", "--at", "T=64", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and all(len(line) <= width for line in out.splitlines())
    assert {"route", "attention"} <= set(OPS) and "bytes touched" in out and "note" in out
