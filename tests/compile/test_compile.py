"""The command `compile`: its rows and exit status, its progress, its worker processes and how they end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.progress import DownloadColumn

from mixtral_triton.cli import main
from mixtral_triton.tools import offline, terminal

pytestmark = pytest.mark.compiled


def test_a_fault_is_printed_and_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(offline, "_attempt", lambda *kernel: offline._describe(*kernel[:3], error="killed"))
    assert main(["compile", "append", "--arch", "sm_89"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("append, append_kernel, bf16: does not compile: killed") == 2  # over 16 bits and over 8
    assert "6 of them must not run" in out and "101,376 bytes" in out and "sm_89 has no table" in out
    assert main(["compile", "append", "--arch", "sm_90", "--json"]) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) == 6 and all(row["fault"] and row["file"] is None for row in rows)


def test_out_that_is_a_file_is_exit_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "out"
    path.write_text("mine")
    for out, said in ((path, "File exists"), (path / "below", "Not a directory")):
        assert main(["compile", "append", "--arch", "sm_90", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert str(out) in error and said in error and error.count("\n") == 1
    assert path.read_text() == "mine"


def lines(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith("working")]


def test_progress_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "INTERVAL", 0.2)
    with terminal.bar("working", None) as bar:
        time.sleep(0.3)
        bar.update(40, 200)
        time.sleep(0.5)
    first, *_, last = lines(capsys.readouterr().err)
    assert first == "working: 0/?" and re.fullmatch(r"working: 40/200, about \d+ s left", last)
    with terminal.bar("working", 3_000_000, DownloadColumn()) as bar:
        bar.advance(1_000_000)
        time.sleep(0.3)
    assert lines(capsys.readouterr().err)[0].startswith("working: 1.0/3.0 MB, ")


def test_quick_work_prints_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    assert terminal.INTERVAL >= 10
    with pytest.raises(ValueError, match="injected"), terminal.bar("working", 2) as bar:
        bar.advance(1)
        raise ValueError("injected")
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_interrupt_leaves_no_process(tmp_path: Path) -> None:
    environment: dict[str, Any] = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "mixtral_triton", "compile", "--arch", "sm_90", "expert_swiglu"]
    pipe = subprocess.PIPE
    # A run that was started with SIGINT ignored, as by `&` or nohup, would pass that on.
    options = {"start_new_session": True, "preexec_fn": partial(signal.signal, signal.SIGINT, signal.SIG_DFL)}
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe, **options) as process:
        while not list(tmp_path.glob("*/*.ttgir")):  # a worker is at it
            assert process.poll() is None
            time.sleep(0.2)
        os.killpg(process.pid, signal.SIGINT)
        out, error = process.communicate(timeout=60)
        assert process.returncode == 130 and out == ""
        assert error.splitlines()[-1] == "mixtral-triton compile: interrupted" and "Traceback" not in error, error
        for _ in range(200):
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
        pytest.fail("a process is left")
