"""mypy sees every argument of an operation, checked and unchecked, where users and the model call it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RIGHT = """
import torch
from mixtral_triton import ops
from mixtral_triton.model import Layer, State

x = torch.ones(2, 4)
total: tuple[torch.Tensor, torch.Tensor] = ops.rms_norm(x, x[0], 1e-5, residual=x)
y: torch.Tensor = ops.linear.unchecked(x, weight=x, deterministic=True)
def step(layer: Layer, state: State) -> None:
"""
WRONG = """
    ops.linear(x, 1)
    ops.linear(x, x, deterministic="yes")
    ops.linear.unchecked(1, 2, 3, 4, 5, bogus=6)
    ops.linear.unchecked(x, weights=x)
    ops.route(x)
    ops.rms_norm(x, x, 1e-5, residuals=x)
    ops.attention.unchecked(x, x, x, True, True, None, x, x, False, x)
    ops.rope_append_attention.unchecked(x, x, x, x, x, x, x, x, x, window=2.5)
    layer.route(x, x)
    state.attend(x, x, x, x)
""".strip("\n")


@pytest.mark.slow
@pytest.mark.compiled
def test_ten_wrong_calls_are_ten_errors(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(RIGHT + WRONG + "\n")
    config = ("--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache"))
    command = [sys.executable, "-m", "mypy", *config, str(file)]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout
    lines = {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line}
    first = RIGHT.count("\n") + 1
    assert lines == set(range(first, first + 10)), out
