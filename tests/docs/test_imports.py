"""Imports go one way: kernels/ never imports the package around it; the model knows `ops`, never a kernel."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import mixtral_triton

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))
PACKAGE = [path for path in sorted((ROOT / "mixtral_triton").rglob("*.py")) if "kernels" not in path.parts]


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


@pytest.mark.parametrize("path", KERNELS, ids=str)
def test_kernels_never_import_the_package(path: Path) -> None:
    up = "." * (2 + len(path.relative_to(ROOT / "kernels").parts) - 1)
    assert not [name for name in imports(path) if name.startswith((up, "mixtral_triton"))]


def test_reference_imports_torch_alone() -> None:
    standard = {"__future__", "itertools", "math", "typing"}
    assert imports(ROOT / "kernels" / "reference.py") - standard == {"torch", "torch.nn.functional"}


@pytest.mark.parametrize("name", ["model.py", "cache.py", "generate.py", "config.py", "weights.py"])
def test_the_shell_knows_no_kernel(name: str) -> None:
    assert not [found for found in imports(ROOT / "mixtral_triton" / name) if "kernels" in found or found == "triton"]


@pytest.mark.parametrize("path", [*KERNELS, *PACKAGE, *sorted((ROOT / "tests").glob("*.py"))], ids=str)
def test_no_file_is_over_400_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def modules() -> dict[str, Path]:
    """Every module of the package, kernels among them, by the name that it is imported by."""
    files = {("mixtral_triton", *path.relative_to(ROOT).parts): path for path in KERNELS}
    files |= {path.relative_to(ROOT).parts: path for path in PACKAGE}
    return {".".join(parts).removesuffix(".py").removesuffix(".__init__"): path for parts, path in files.items()}


def test_generation_knows_no_model() -> None:
    """Not even for its types: what it asks of one stands there as a protocol."""
    assert not [found for found in imports(ROOT / "mixtral_triton" / "generate.py") if found.endswith("model")]


def edges(name: str, known: dict[str, Path]) -> set[str]:
    """What a module imports of the package, inside functions too, but for what only a type checker reads."""
    tree = ast.parse(known[name].read_text())
    typing = {id(node) for found in ast.walk(tree) if is_for_types(found) for node in ast.walk(found)}
    package = name.split(".")[: None if known[name].stem == "__init__" else -1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing:
            base = [*package[: len(package) + 1 - node.level], *((node.module or "").split("."))]
            path = ".".join(filter(None, base))
            for alias in node.names:
                found.add(full if (full := f"{path}.{alias.name}") in known else path)
    return found & known.keys()


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that are left when those that import nothing of the rest are taken away, again and again."""
    left = dict(graph)
    while free := [name for name, wanted in left.items() if not wanted & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_no_module_imports_itself_by_way_of_others() -> None:
    known = modules()
    graph = {name: edges(name, known) for name in known}
    assert len(graph) > 50 and "mixtral_triton.ops" in graph["mixtral_triton.model"]
    assert "mixtral_triton.kernels.registry" in graph["mixtral_triton.kernels.record"]
    assert not circle(graph)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}, "e": set()}) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("name", sorted(mixtral_triton.__all__))
def test_no_submodule_takes_the_place_of_a_public_name(name: str) -> None:
    assert not (ROOT / "mixtral_triton" / f"{name}.py").exists()
    assert callable(getattr(mixtral_triton, name))
