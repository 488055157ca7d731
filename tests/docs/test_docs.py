"""Documents: links, kernels and files that they name exist, quoted code is the reference's, and README's code runs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mixtral_triton.cli import parser
from mixtral_triton.kernels.launch import INTERPRETED
from tests.support.models import random_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about documents: runs once, without the interpreter")
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MIXTRAL = (ROOT / "docs" / "mixtral.md").read_text(encoding="utf-8")
DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
OUTPUT = {  # of the examples
    "drop_in.py": ["The return statement", "the same text before, with and after apply: True"],
    "batch.py": ["A list is", "the same from both: True"],
}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_named_files_exist(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = [path.parent / link for link in re.findall(r"\]\(([^)#:]+)\)", text)]
    names = re.findall(r"\b((?:benchmarks|tests|kernels|mixtral_triton)/[\w/]+\.py)\b", text)
    assert not [each for each in (*links, *(ROOT / name for name in names)) if not each.exists()]


def test_named_kernels_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py"))
    assert all(f"def {kernel}(" in source for kernel in re.findall(r"`(\w+_kernel)`", MIXTRAL))


def test_quoted_code_is_in_the_reference() -> None:
    reference = {line.strip() for line in (ROOT / "kernels" / "reference.py").read_text(encoding="utf-8").splitlines()}
    quoted = [line for block in re.findall(r"```python\n(.*?)```", MIXTRAL, re.S) for line in block.splitlines()]
    assert len(quoted) > 7 and set(quoted) <= reference


def test_readme_is_short_and_its_commands_are_those_of_the_command_line() -> None:
    first, second = re.findall(r"```bash\n(.*?)```", README, re.S)[:2]
    assert len(README.splitlines()) <= 120
    assert "mixtral-triton verify\n" in first
    assert "pytest" in second and "TRITON_INTERPRET=1" in second
    lines = re.findall(r"^mixtral-triton (.*)$", README, re.MULTILINE)
    assert len(lines) == 5
    for line in lines:
        parser().parse_args(shlex.split(line, comments=True))


def test_drop_in_block_of_readme_prints_the_same_text_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    monkeypatch.chdir(ROOT)
    block = next(code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "apply(" in code)
    exec(compile(block, "README.md", "exec"), {})
    before, after = capsys.readouterr().out.split("<s>")[1:]
    assert before == after[: len(before)] and before.startswith("The return statement")
    assert "RIGHT" in after[len(before) :]


@pytest.mark.parametrize("name", OUTPUT)
def test_example_runs(name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(sys, "argv", [name])
    try:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    except SystemExit as done:
        assert not done.code
    out = capsys.readouterr().out
    assert all(text in out for text in OUTPUT[name]) and "False" not in out
    # The tests of `bench --peer` run `my_experts.py`, test_commands.py runs `verify_folder.py`.
    assert {*OUTPUT, "my_experts.py", "verify_folder.py", "__init__.py"} == {
        path.name for path in (ROOT / "examples").glob("*.py")
    }


def test_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import figures

    figures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert figures.visible(5, 2).int().tolist()[3] == [0, 0, 1, 1, 0]


def test_window_reach() -> None:
    """Through L layers a token changes the logits L (W - 1) places later, and no further."""
    L, W, T = 3, 4, 14
    sizes = {"vocab_size": 20, "num_hidden_layers": L, "max_position_embeddings": T, "sliding_window": W}
    model, generator = random_model(deterministic=True, **sizes), torch.Generator().manual_seed(0)
    ids = torch.randint(20, (1, T), generator=generator)

    def changes(back: int) -> bool:
        other = ids.clone()
        other[0, T - 1 - back] = (other[0, T - 1 - back] + 1) % 20
        return not torch.equal(model(other)[0, -1], model(ids)[0, -1])

    assert changes(0) and changes(L * (W - 1))
    assert not changes(L * (W - 1) + 1)


def test_recipe_for_a_kernel_runs_and_finds_a_wrong_one(tmp_path: Path) -> None:
    """In processes of their own, as it selects the interpreter."""
    (recipe,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "bench.md").read_text(encoding="utf-8"), re.S)
    assert "TRITON_INTERPRET" in recipe and len(recipe.splitlines()) < 16
    wrong = recipe.replace("swiglu(*args.values())", "1.01 * swiglu(*args.values())")
    for code, word in ((recipe, "right"), (wrong, "WRONG")):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        assert len(lines) == 3 and all(line.endswith(f" {word}") for line in lines), done.stdout


def test_figures_without_matplotlib_are_one_line() -> None:
    code = "import sys, runpy; sys.modules['matplotlib'] = None; runpy.run_path('docs/figures.py', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr == 'docs/figures.py needs matplotlib: pip install "mixtral-triton[plot]"\n'
