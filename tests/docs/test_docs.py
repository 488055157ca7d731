"""Documents: links, kernels and files that they name exist, quoted code is the reference's, and README's code runs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import SMALL, MixtralConfig
from mixtral_triton.cli import parser
from tests.support.models import random_model

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MIXTRAL = (ROOT / "docs" / "mixtral.md").read_text(encoding="utf-8")
DOCUMENTS = sorted((*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")))
OUTPUT = {  # of the examples
    "drop_in.py": ["The return statement", "the same text before, with and after apply: True"],
    "batch.py": ["A list is", "the same from both: True"],
    "verify_folder.py": ["RIGHT: all", "nearest to its limit"],
}
MACHINES = {  # how a program runs: what Python gets before its file
    "no GPU": (),
    "simulated GPU": ("-m", "tests.support.stub", "--executes"),
    "interpreted beside a GPU": ("-m", "tests.support.fake_gpu"),
}


def python_blocks(document: str | Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(encoding="utf-8"), re.S)


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
    quoted = [line for block in python_blocks("docs/mixtral.md") for line in block.splitlines()]
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


def run_program(how: str, program: Path, *args: Any) -> str:
    """Run a program on a machine of that kind -> what it prints."""
    switch = {"TRITON_INTERPRET": "1"} if how == "interpreted beside a GPU" else {}
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | switch
    command = [sys.executable, *MACHINES[how], str(program), *map(str, args)]
    paths = {"cwd": ROOT, "env": environment | {"PYTHONPATH": str(ROOT)}}
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, **paths)
    assert done.returncode == 0 and "False" not in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def checkpoint(make_hf: Any, tmp_path: Path) -> Path:
    """One small layer of random weights, with the tokenizer of the package's checkpoint."""
    config = MixtralConfig.from_pretrained(SMALL)
    sizes = {"vocab_size": config.vocab_size, "bos_token_id": config.bos_token_id}
    make_hf(num_hidden_layers=1, **sizes).save_pretrained(tmp_path / "checkpoint")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(SMALL / name, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


@pytest.mark.slow
@pytest.mark.parametrize("how", MACHINES)
def test_python_blocks_of_readme_print_right(how: str, checkpoint: Path, tmp_path: Path) -> None:
    """The first interprets where Triton is not imported yet; the second prints the same text twice."""
    out = []
    for number, block in enumerate(python_blocks("README.md")):
        changed = block.replace('"small"', repr(str(checkpoint))).replace("SMALL  #", f"{str(checkpoint)!r}  #")
        assert changed != block
        (tmp_path / f"{number}.py").write_text(re.sub(r"(max_new_tokens\W+)\d+", r"\g<1>4", changed))
        out.append(run_program(how, tmp_path / f"{number}.py"))
        assert out[-1].splitlines()[-1].startswith("RIGHT: all")
    assert ("Triton on NVIDIA H100" if how == "simulated GPU" else "Triton, interpreted") in out[0]
    before, after = out[1].split("<s>The return statement")[1:]
    assert before == after[: len(before)]


@pytest.mark.slow
@pytest.mark.parametrize("how", MACHINES)
def test_example_runs(how: str, checkpoint: Path) -> None:
    for name, texts in OUTPUT.items():
        out = run_program(how, ROOT / "examples" / name, checkpoint)
        assert all(text in out for text in texts)
    # The tests of `bench --peer` run `my_experts.py`.
    assert {*OUTPUT, "my_experts.py", "__init__.py"} == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.slow
@pytest.mark.parametrize("how", MACHINES)
def test_python_blocks_of_other_documents_run(how: str, tmp_path: Path) -> None:
    """Those of mixtral.md quote the reference, that of bench.md has a test of its own. NCCL has no simulation: a mesh
    is of one rank, on the CPU."""
    with_code = {path.name for path in DOCUMENTS if python_blocks(path.relative_to(ROOT))} - {
        "README.md",
        "mixtral.md",
        "bench.md",
    }
    assert with_code == {"weights.md", "scaling.md"}
    prelude = "import os, torch\nfolder, ids = 'mixtral_triton/small', torch.tensor([[0, 72]])\n"
    prelude += "os.environ |= {'MASTER_ADDR': 'localhost', 'MASTER_PORT': '0', 'RANK': '0', 'WORLD_SIZE': '1'}\n"
    for number, block in enumerate((*python_blocks("docs/weights.md"), *python_blocks("docs/scaling.md"))):
        (tmp_path / f"{number}.py").write_text(prelude + block.replace('"cuda", (2, 2)', '"cpu", (1, 1)'))
        run_program(how, tmp_path / f"{number}.py")


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


@pytest.mark.slow
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
