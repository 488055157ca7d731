"""What the README shows works: its Python runs, its two commands are where the CI looks for them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mixtral_triton.kernels.launch import INTERPRETED

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()


@pytest.mark.skipif(INTERPRETED, reason="verifies a model: run once, without the interpreter")
def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    code = re.search(r"```python\n(.*?)```", TEXT, re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {})
    assert "RIGHT" in capsys.readouterr().out


def test_the_first_two_shell_blocks_are_the_two_commands() -> None:
    first, second = re.findall(r"```bash\n(.*?)```", TEXT, re.S)[:2]
    assert "mixtral-triton verify\n" in first
    assert "pytest" in second and "TRITON_INTERPRET=1" in second


def test_every_file_it_names_is_there() -> None:
    for name in re.findall(r"(?:python|pytest) ((?:benchmarks|tests)/\w+\.py)", TEXT):
        assert (ROOT / name).is_file(), name
