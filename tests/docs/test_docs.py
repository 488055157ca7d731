"""What the documents say of the code is so: quoted lines, files, kernels, figures, and how far a window reaches."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from tests.support.models import random_model

ROOT = Path(__file__).parents[2]
MIXTRAL = (ROOT / "docs" / "mixtral.md").read_text(encoding="utf-8")
once = pytest.mark.skipif(INTERPRETED, reason="about documents and the plain way: run once, without the interpreter")


@once
def test_quoted_lines_stand_in_the_reference() -> None:
    reference = {line.strip() for line in (ROOT / "kernels" / "reference.py").read_text(encoding="utf-8").splitlines()}
    quoted = [line for block in re.findall(r"```python\n(.*?)```", MIXTRAL, re.S) for line in block.splitlines()]
    assert len(quoted) > 7 and set(quoted) <= reference


@once
def test_named_kernels_and_files_are_there() -> None:
    kernels = {path: path.read_text(encoding="utf-8") for path in (ROOT / "kernels").rglob("*.py")}
    for kernel in re.findall(r"`(\w+_kernel)`", MIXTRAL):
        assert any(f"def {kernel}(" in text for text in kernels.values()), kernel
    for document in ROOT.glob("*.md"), ROOT.glob("docs/*.md"):
        for path in document:
            for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
                assert (path.parent / link).exists(), f"{path.name}: {link}"


@once
def test_named_tests_are_there_and_none_is_left_out() -> None:
    named = set(re.findall(r"`(test_[\w*]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    files = {path.name for path in (ROOT / "tests").glob("test_*.py")}
    assert all(any(fnmatch(name, one) for name in files) for one in named)
    assert {name for name in files if not any(fnmatch(name, one) for one in named)} == set()


@once
def test_the_layout_names_every_file_and_no_other() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    layout = re.search(r"```\nkernels/ .*?```", readme, re.S)
    assert layout is not None
    kernels, package = layout[0].split("mixtral_triton/  ")
    # A new operation is a file and a line of the registry: "an operation each" stands for it, too.
    operations = {op.run.__module__.rpartition(".")[2] + ".py" for op in OPS.values()}
    for folder, section in (("kernels", kernels), ("mixtral_triton", package)):
        tree = {path.name for path in (ROOT / folder).glob("*.py") if not path.name.startswith("__")}
        files = set(tree)
        indented = [name for line in section.splitlines() if line.startswith("  ") for name in line.split()]
        folders = {path.parent.name for path in (ROOT / folder).glob("*/*.py")} - {"kernels"}
        assert folders <= {name.rstrip("/") for name in indented if name.endswith("/")}
        patterns = [name for name in indented if name.endswith(".py")]
        files -= operations if folder == "kernels" else set()
        assert {name for name in files if not any(fnmatch(name, one) for one in patterns)} == set()
        assert [one for one in patterns if not any(fnmatch(name, one) for name in tree)] == []


@once
def test_the_figures_are_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import figures

    figures.main(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (ROOT / "docs" / "figures").iterdir()}
    assert figures.seen(5, 2).int().tolist()[3] == [0, 0, 1, 1, 0]


@once
def test_how_far_a_window_reaches() -> None:
    """Through L layers a token moves the logits L (W - 1) places on, and no further."""
    L, W, T = 3, 4, 14
    sizes = {"vocab_size": 20, "num_hidden_layers": L, "max_position_embeddings": T, "sliding_window": W}
    model, generator = random_model(deterministic=True, **sizes), torch.Generator().manual_seed(0)
    ids = torch.randint(20, (1, T), generator=generator)

    def moved(back: int) -> bool:
        other = ids.clone()
        other[0, T - 1 - back] = (other[0, T - 1 - back] + 1) % 20
        return not torch.equal(model(other)[0, -1], model(ids)[0, -1])

    assert moved(0) and moved(L * (W - 1))
    assert not moved(L * (W - 1) + 1)
