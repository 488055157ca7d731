"""Imports go one way: kernels/ never imports the package around it; the model knows `ops`, never a kernel."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mixtral_triton

ROOT = Path(__file__).parents[1]
KERNELS = sorted((ROOT / "kernels").glob("*.py"))
PACKAGE = sorted((ROOT / "mixtral_triton").glob("*.py"))


def imports(path: Path) -> set[str]:
    """What a file imports, with leading dots where relative; `from . import x` counts as ".x"."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {base} if node.module else {base + alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_kernels_never_import_the_package(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith(("..", "mixtral_triton"))]


def test_reference_imports_torch_alone() -> None:
    standard = {"__future__", "itertools", "math", "typing"}
    assert imports(ROOT / "kernels" / "reference.py") - standard == {"torch", "torch.nn.functional"}


@pytest.mark.parametrize("name", ["model.py", "cache.py", "generate.py", "config.py", "weights.py"])
def test_the_shell_knows_no_kernel(name: str) -> None:
    assert not [found for found in imports(ROOT / "mixtral_triton" / name) if "kernels" in found or found == "triton"]


@pytest.mark.parametrize("path", [*KERNELS, *PACKAGE, *sorted((ROOT / "tests").glob("*.py"))], ids=lambda p: p.name)
def test_no_file_is_over_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", sorted(mixtral_triton.__all__))
def test_no_submodule_takes_the_place_of_a_public_name(name: str) -> None:
    assert not (ROOT / "mixtral_triton" / f"{name}.py").exists()
    assert callable(getattr(mixtral_triton, name))
