"""verify: right on the shipped checkpoint, and it sees a planted fault in any operation."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import mixtral_triton
from mixtral_triton import Mixtral, ops
from mixtral_triton.cli import main
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.verification import verify
from mixtral_triton.verification.report import Report, Row
from tests.support.models import random_model

IDS = torch.randint(50, (2, 20), generator=torch.Generator().manual_seed(0))
SMALL = Path(mixtral_triton.__file__).parent / "small"


def tiny(dtype: torch.dtype = torch.float32, window: int | None = 8) -> Mixtral:
    sizes = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return random_model(dtype=dtype, sliding_window=window, **sizes)


def check_complete(report: Report, layers: int) -> None:
    for layer in range(layers):
        assert {row.op for row in report.rows if row.layer == layer} >= {*OPS, "layer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [8] if INTERPRETED else [8, 100, None])
def test_a_right_model_is_found_right(dtype: torch.dtype, window: int | None) -> None:
    report = verify(tiny(dtype, window), IDS[:, :10] if INTERPRETED else IDS)
    assert not report.wrong, str(report)
    check_complete(report, 2)
    assert [row.op for row in report.rows if row.layer is None] == ["rms_norm", "logits"]
    if dtype == torch.float32:
        assert report.flips == 0


def test_one_token(device: torch.device) -> None:
    model = tiny().to(device)
    assert not verify(model, torch.zeros((1, 1), dtype=torch.int64, device=device)).wrong


@pytest.mark.skipif(INTERPRETED, reason="the command line test runs it interpreted; here once on the plain way")
def test_the_shipped_checkpoint_and_the_default_input() -> None:
    """Without a kernel: nothing is wrong, and that is not called right."""
    report = verify(SMALL)
    assert not report.wrong and not report.ok
    assert "NOTHING WAS COMPARED" in str(report) and "RIGHT" not in str(report)
    check_complete(report, 4)


@pytest.mark.skipif(INTERPRETED, reason="the command line on the plain way")
def test_plain_torch_beside_itself_is_no_success(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # said by the user, so that verify does not turn it on
    assert main(["verify", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and not found["compared"] and all(row["ok"] for row in found["rows"])


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_the_terminal(width: int) -> None:
    """Every operation, layer and failing row is there, and no cell is cut."""
    rows = [Row(31, op, case, 1.5e-3, 1e-3) for op in (*OPS, "layer") for case in ("every expert, prefill", "routes")]
    report = Report((*rows, Row(None, "logits", "end to end", 1e-3, 2e-3)), 1, 384, "Triton, interpreted", "bfloat16")
    console = Console(file=io.StringIO(), width=width)
    console.print(report)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert not any("…" in line for line in lines) and max(map(len, lines)) <= width
    for row in rows:
        assert any(
            line.split()[:1] == [row.op] and row.case in line and line.split()[-2:] == ["31", "0/1"] for line in lines
        )
        assert f"{row.op} in layer 31 ({row.case}): error 1.50e-03, limit 1.00e-03" in " ".join(" ".join(lines).split())


@pytest.mark.skipif(INTERPRETED, reason="about the comparison, whichever way the operations go: run once, without")
@pytest.mark.parametrize("name", [name for name, one in ops._CHECKED.items() if one in vars(ops).values()])
def test_a_fault_in_any_operation_is_seen(name: str, spoil: Callable[[str], None]) -> None:
    spoil(name)
    report = verify(tiny(), torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(0)))
    assert not report.ok
    assert "WRONG" in report.verdict and name in str(report)
    assert any(row.op == name and not row.ok for row in report.rows)


def test_an_expert_that_the_text_does_not_take_is_exercised(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    model.layers[1].gate_up_proj[3, 0, 0] = float("nan")
    with torch.no_grad():
        model.layers[1].gate[3] = 0.0
    report = verify(model, torch.zeros((1, 2), dtype=torch.int64))
    assert not report.ok  # NaN in the result: never within a limit


@pytest.mark.parametrize(
    ("target", "ids", "message"),
    [
        (3, None, "needs a Mixtral, a checkpoint folder or transformers"),
        ("tiny", torch.zeros((1, 65), dtype=torch.int64), "max_position_embeddings"),
        ("tiny", torch.full((1, 4), 50), "token 50"),
        ("tiny", torch.zeros(4), "int64 tensor"),
    ],
)
def test_bad_input(target: Any, ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        verify(tiny() if target == "tiny" else target, ids)


def test_a_model_without_numbers() -> None:
    with pytest.raises(ValueError, match=r"verify: .*meta"):
        verify(tiny().to("meta"))


def test_the_report_as_a_dictionary() -> None:
    report = verify(tiny(), torch.zeros((1, 3), dtype=torch.int64))
    got = report.as_dict()
    assert got["ok"] is INTERPRETED and got["compared"] is INTERPRETED and len(got["rows"]) == len(report.rows)
    assert set(got["rows"][0]) == {"layer", "op", "case", "error", "limit", "ok"}
