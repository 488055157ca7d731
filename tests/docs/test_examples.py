"""The examples run on the small checkpoint, and say what they promise."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from mixtral_triton.kernels.launch import INTERPRETED

pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[2] / "examples"
SAYS = {
    "drop_in.py": ["The return statement", "the same text before, with and after apply: True"],
    "batch.py": ["A list is", "the same from both: True"],
    "verify_folder.py": [
        "NOTHING WAS COMPARED",
        "RIGHT: all",
        "compared with transformers' own modules",
        "nearest to its limit",
    ],
}


def test_each_example_is_listed_here() -> None:
    """`my_experts.py` is run by the tests of `bench --peer`."""
    assert sorted([*SAYS, "my_experts.py", "__init__.py"]) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.skipif(INTERPRETED, reason="runs a whole model: once, without the interpreter")
@pytest.mark.parametrize("name", SAYS)
def test_example(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name])
    try:
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    except SystemExit as done:
        assert not done.code
    out = capsys.readouterr().out
    assert all(text in out for text in SAYS[name])
    assert "False" not in out
