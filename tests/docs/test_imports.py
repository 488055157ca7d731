"""Imports go one way: kernels never import the package, the runtime never imports tools, and there are no cycles."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mixtral_triton
from mixtral_triton.kernels.registry import OPERATIONS

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).parents[2]
FORBIDDEN = {  # folder or file: what it must not import, directly or through others
    "kernels": ("model", "ops", "weights", "quantize", "hf", "verification", "tools", "cli"),
    "model": ("tools", "verification", "cli", "hf"),
    "generate": ("tools", "verification", "cli", "hf"),
    "hf": ("tools", "verification", "cli"),
    "quantize": ("model", "tools", "verification", "cli"),
    "weights": ("quantize", "tools", "verification", "cli"),
    "tools": ("verification", "cli"),
    "verification": ("cli",),
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without "mixtral_triton."."""
    files = {("kernels", *path.relative_to(ROOT / "kernels").parts): path for path in (ROOT / "kernels").rglob("*.py")}
    for path in (ROOT / "mixtral_triton").rglob("*.py"):
        if "kernels" not in path.parts:
            files[path.relative_to(ROOT / "mixtral_triton").parts] = path
    return {".".join(parts).removesuffix(".py").removesuffix(".__init__"): path for parts, path in files.items()}


MODULES = modules()


def imported(name: str) -> set[str]:
    """The package's modules that a module imports, inside functions too, except for type checkers."""
    path, tree = MODULES[name], ast.parse(MODULES[name].read_text())
    typing = {id(node) for found in ast.walk(tree) if is_for_types(found) for node in ast.walk(found)}
    package = ["", *name.split(".")][: None if path.stem == "__init__" else -1]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level and id(node) not in typing:
            base = [*package[: len(package) + 1 - node.level], *((node.module or "").split("."))]
            prefix = ".".join(filter(None, base))
            for alias in node.names:
                full = f"{prefix}.{alias.name}".strip(".")
                found.add(full if full in MODULES else prefix)
    return found & MODULES.keys()


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def reachable(names: set[str], graph: dict[str, set[str]]) -> set[str]:
    found: set[str] = set()
    while names:
        found |= names
        names = {other for name in names for other in graph[name]} - found
    return found


GRAPH = {name: imported(name) for name in MODULES}


def test_no_cycle_of_files() -> None:
    assert len(GRAPH) > 50 and "ops" in GRAPH["model"] and "kernels.registry" in GRAPH["kernels.record"]
    TopologicalSorter(GRAPH).prepare()  # CycleError names a cycle


def test_no_cycle_of_folders() -> None:
    graph: dict[str, set[str]] = {}
    for name, imports in GRAPH.items():
        graph.setdefault(top(name), set()).update({top(other) for other in imports} - {top(name)})
    TopologicalSorter(graph).prepare()


def top(name: str) -> str:
    """The top folder, or the file, that a module belongs to."""
    return name.partition(".")[0]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_import_direction(name: str) -> None:
    start = {module for module in MODULES if module == name or module.startswith(f"{name}.")}
    found = reachable(start, GRAPH)
    assert not [other for other in sorted(found) if top(other) in FORBIDDEN[name]]


def test_reference_imports_torch_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse((ROOT / "kernels" / "reference.py").read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    assert names == {"__future__", "itertools", "math", "typing", "torch", "torch.nn.functional"}


@pytest.mark.parametrize("name", [name for name in MODULES if top(name) not in ("kernels", "tools", "verification")])
def test_operations_are_reached_through_ops_alone(name: str) -> None:
    """The runtime imports helpers from the file of `kernels` that defines them, and operations from `ops`."""
    nodes = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.ImportFrom)]
    of_kernels = [
        node for node in nodes if (node.module or "").startswith("kernels") and node.module != "kernels.reference"
    ]
    assert not {alias.name for node in of_kernels for alias in node.names} & OPERATIONS.keys()


def test_types_alone_go_both_ways_between_model_load_and_generate() -> None:
    """`load` makes a model and `generate` is its method: both name its type, under TYPE_CHECKING."""
    assert {"load", "generate"} <= GRAPH["model"] and not {"model"} & (GRAPH["load"] | GRAPH["generate"])


def test_importing_the_model_loads_no_tools() -> None:
    code = "import sys; from mixtral_triton import Mixtral; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    loaded = done.stdout.split()
    assert "mixtral_triton.model" in loaded
    assert not [name for name in loaded if name.startswith(("rich", "mixtral_triton.tools", "mixtral_triton.verif"))]


@pytest.mark.parametrize("name", sorted(mixtral_triton.__all__))
def test_no_submodule_hides_a_public_name(name: str) -> None:
    assert not (ROOT / "mixtral_triton" / f"{name}.py").exists()
    assert getattr(mixtral_triton, name) is not None


TOOLS = [path for folder in ("tests/emulator", "tests/support/stub") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_emulator_and_simulated_gpu_know_the_project_by_an_adapter_alone(path: Path) -> None:
    names = [node.module or "" for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    knows = any(name.startswith("mixtral_triton") for name in names)
    assert not knows or path.name == "adapter.py" or path.name.startswith("test_")


@pytest.mark.slow
@pytest.mark.parametrize(("folder", "result"), [("emulator", "10.])"), ("support/stub", "['fill_kernel']")])
def test_their_readmes_run_any_kernel(folder: str, result: str, tmp_path: Path) -> None:
    text = (ROOT / "tests" / folder / "README.md").read_text()
    (tmp_path / "block.py").write_text(text.partition("```python\n")[2].partition("```")[0])
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {**kept, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "block.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and done.stdout.strip().endswith(result), done.stdout + done.stderr
