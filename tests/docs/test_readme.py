"""What the README shows works: its Python runs, its two commands are where the CI looks for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixtral_triton.kernels.launch import INTERPRETED

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.skipif(INTERPRETED, reason="verifies a model: run once, without the interpreter")
def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert ("RIGHT" if INTERPRETED else "NOTHING WAS COMPARED") in capsys.readouterr().out


@pytest.mark.skipif(INTERPRETED, reason="runs a whole model: once, without the interpreter")
def test_the_drop_in_prints_the_same_text_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    code = next(code for code in re.findall(r"```python\n(.*?)```", TEXT, re.S) if "apply(" in code)
    exec(compile(code, "README.md", "exec"), {})
    before, after = capsys.readouterr().out.split("<s>")[1:]
    after, report = after[: len(before)], after[len(before) :]
    assert before == after and before.startswith("The return statement")
    assert "compared with transformers' own modules" in report and "RIGHT" in report


def test_it_is_short() -> None:
    assert len(TEXT.splitlines()) < 120


def test_the_first_two_shell_blocks_are_the_two_commands() -> None:
    first, second = re.findall(r"```bash\n(.*?)```", TEXT, re.S)[:2]
    assert "mixtral-triton verify\n" in first
    assert "pytest" in second and "TRITON_INTERPRET=1" in second


def test_every_file_it_names_is_there() -> None:
    for name in re.findall(r"(?:python|pytest) ((?:benchmarks|tests)/\w+\.py)", TEXT):
        assert (ROOT / name).is_file(), name
