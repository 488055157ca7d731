"""Imports are those of docs/structure.md, without a cycle. Wheel and sdist hold what they should, the package lives
beside Hugging Face's `kernels`, and mypy sees every argument of an operation, checked and unchecked."""

import ast
import re
import shutil
import zipfile
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from mixtral_triton.kernels.registry import OPERATIONS
from tests.cli.commands import ROOT, python

pytestmark = pytest.mark.compiled
TOOLS = [path for folder in ("tests/emulator", "tests/support/stub") for path in sorted((ROOT / folder).glob("*.py"))]


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name without "mixtral_triton."."""
    files = {("kernels", *path.relative_to(ROOT / "kernels").parts): path for path in (ROOT / "kernels").rglob("*.py")}
    for path in (ROOT / "mixtral_triton").rglob("*.py"):
        if "kernels" not in path.parts:
            files[path.relative_to(ROOT / "mixtral_triton").parts] = path
    return {".".join(parts).removesuffix(".py").removesuffix(".__init__"): path for parts, path in files.items()}


MODULES = modules()
IMPORTED = "print(*(name for name in ('torch', 'transformers') if name in sys.modules), file=sys.stderr)"


def test_help_and_a_typo_import_no_torch_and_the_library_no_transformers() -> None:
    for words in ("--help", "generate --help", "verfy", "generate --promt x", "fit --memory x"):
        call = f"from mixtral_triton.cli import main\ntry:\n  main({words.split()})\nexcept SystemExit: {IMPORTED}"
        assert python("-c", f"import sys\n{call}").stderr.splitlines()[-1] == "", words
    code = "import sys, mixtral_triton as m; m.Mixtral.from_pretrained('small', 'cpu').generate([[1]], 1); "
    loaded = python("-c", f"{code}{IMPORTED}; print(*sys.modules)")
    assert loaded.stderr == "torch\n"
    other = ("rich", "mixtral_triton.bench", "mixtral_triton.cli", "mixtral_triton.verif")
    assert not [name for name in loaded.stdout.split() if name.startswith(other)]


def imported(name: str) -> set[str]:
    """The package's modules that a module imports, inside functions and for type checkers, too."""
    path = MODULES[name]
    package = ["", *name.split(".")][: None if path.stem == "__init__" else -1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = [*package[: len(package) + 1 - node.level], *((node.module or "").split("."))]
            prefix = ".".join(filter(None, base))
            for alias in node.names:
                full = f"{prefix}.{alias.name}".strip(".")
                found.add(full if full in MODULES else prefix)
    return (found & MODULES.keys()) - {name}


GRAPH = {name: imported(name) for name in MODULES}


def test_a_call_does_not_import_cases() -> None:
    """What tests, compile and bench draw of an operation is no part of its call."""
    reached = {"kernels.operation.call"}
    while more := {other for name in reached for other in GRAPH[name]} - reached:
        reached |= more
    assert "kernels.operation.plan" in reached and "kernels.operation.cases" not in reached


def place(name: str) -> str:
    """The folder or file of docs/structure.md that a module belongs to."""
    parts = name.split(".")
    depth = 2 if parts[0] == "kernels" else 1
    is_folder = len(parts) > depth or MODULES[name].stem == "__init__"
    return "/".join(parts[:depth]) + ("/" if is_folder else ".py")


def allowed() -> dict[str, set[str]]:
    """The rows of docs/structure.md: a folder or file, and what it may import."""
    kernels, package = (ROOT / "docs" / "structure.md").read_text().split("\n## ")[1:3]
    rows: dict[str, set[str]] = {}
    for section, prefix in ((kernels, "kernels/"), (package, "")):
        for name, imports in re.findall(r"^\| `(\S+)` \|[^|]*\|([^|]*)\|$", section, re.MULTILINE):
            rows[prefix + name] = {prefix + other for other in re.findall(r"`(\S+)`", imports)}
    return rows


def arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """From and to of each import between two places, the package's own two files apart."""
    pairs = {(place(name), place(other)) for name, imports in graph.items() for other in imports}
    return {(a, b) for a, b in pairs if a != b and not {a, b} & {"__init__/", "__main__.py"}}


def wrong_arrows(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    rows = allowed()
    return {(a, b) for a, b in arrows(graph) if not any(b.startswith(other) for other in rows[a])}


def test_imports_are_those_of_the_structure() -> None:
    """Files form no cycle, annotations included, and neither do folders; a folder imports what its row names."""
    assert len(GRAPH) > 50 and "kernels.registry" in GRAPH["kernels.record"]
    assert {place(name) for name in MODULES} - {"__init__/", "__main__.py"} == allowed().keys()
    TopologicalSorter(GRAPH).prepare()  # CycleError names a cycle
    folders: dict[str, set[str]] = {}
    for a, b in arrows(GRAPH):
        folders.setdefault(a, set()).add(b)
    TopologicalSorter(folders).prepare()
    assert not wrong_arrows(GRAPH)


@pytest.mark.parametrize(
    ("name", "other"), [("kernels.ops.linear", "model.layer"), ("model.layer", "cli.chat"), ("quantize", "hf.experts")]
)
def test_an_arrow_put_wrong_is_found(name: str, other: str) -> None:
    assert wrong_arrows(GRAPH | {name: GRAPH[name] | {other}}) == {(place(name), place(other))}


def test_a_cycle_of_annotations_is_found() -> None:
    with pytest.raises(CycleError, match=r"model\.model"):
        TopologicalSorter(GRAPH | {"model.layer": GRAPH["model.layer"] | {"model.model"}}).prepare()


def test_reference_imports_torch_alone() -> None:
    names = set()
    for node in ast.walk(ast.parse((ROOT / "kernels" / "reference.py").read_text())):
        names |= {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
        names |= {str(node.module)} if isinstance(node, ast.ImportFrom) else set()
    assert names == {"itertools", "math", "typing", "torch", "torch.nn.functional"}


@pytest.mark.parametrize("name", [name for name in MODULES if place(name) in ("model/", "hf/", "vllm.py")])
def test_operations_are_reached_through_ops_alone(name: str) -> None:
    """The runtime imports helpers from the file of `kernels` that defines them, and operations from `ops`."""
    nodes = [node for node in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(node, ast.ImportFrom)]
    helpers = [node for node in nodes if str(node.module).startswith("kernels") and node.module != "kernels.reference"]
    assert not {alias.name for node in helpers for alias in node.names} & OPERATIONS.keys()


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
    done = python(tmp_path / "block.py")
    assert done.returncode == 0 and done.stdout.strip().endswith(result), done.stdout + done.stderr


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel that was built from the sdist, and the sdist."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    done = python("-m", "build", "--no-isolation", "--outdir", out, source, cwd=out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.mark.slow
def test_wheel(built: Path) -> None:
    shipped = ("config.json", "heldout.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    kernels = {f"mixtral_triton/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "mixtral_triton").rglob("*.py")}
    small = {f"mixtral_triton/small/{name}" for name in shipped}
    assert "mixtral_triton/kernels/ops/attention/op.py" in kernels
    assert kernels | package | small | {"mixtral_triton/py.typed"} <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]


@pytest.mark.slow
def test_the_kernels_package_of_hugging_face_is_not_shadowed() -> None:
    """From the repository's root, where a folder `kernels` stands: theirs is imported, and transformers too."""
    code = "import kernels, transformers, mixtral_triton.ops; print(kernels.__file__); kernels.get_kernel"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout


CALLS = """
import torch
from mixtral_triton import ops

x = torch.ones(2, 4)
total: tuple[torch.Tensor, torch.Tensor] = ops.rms_norm(x, x[0], 1e-5, residual=x)
y: torch.Tensor = ops.linear.unchecked(x, weight=x, deterministic=True)
ops.linear(x, x, deterministic="yes")
ops.linear.unchecked(x, weights=x)
ops.route(x)
ops.attention.unchecked(x, x, x, True, True, None, x, x, False, x)
"""


@pytest.mark.slow
def test_each_wrong_call_is_an_error_for_mypy(tmp_path: Path) -> None:
    file = tmp_path / "calls.py"
    file.write_text(CALLS)
    config = ("--config-file", ROOT / "pyproject.toml", "--cache-dir", ROOT / ".mypy_cache")
    out = python("-m", "mypy", *config, file).stdout
    assert {int(line.split(":")[1]) for line in out.splitlines() if ": error:" in line} == {8, 9, 10, 11}, out
