"""Wheel and sdist hold what they should, and the package lives beside Hugging Face's `kernels`."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.compiled


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a wheel that was built from the sdist, and the sdist."""
    source, out = tmp_path_factory.mktemp("source") / "tree", tmp_path_factory.mktemp("dist")
    ignore = shutil.ignore_patterns(".git", ".venv", "*.egg-info", "build", "dist", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


SHIPPED = ("config.json", "heldout.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def needed() -> set[str]:
    kernels = {f"mixtral_triton/{path.relative_to(ROOT)}" for path in (ROOT / "kernels").rglob("*.py")}
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "mixtral_triton").rglob("*.py")}
    assert "mixtral_triton/kernels/attention/op.py" in kernels
    small = {f"mixtral_triton/small/{name}" for name in SHIPPED}
    return kernels | package | small | {"mixtral_triton/py.typed"}


def test_wheel(built: Path) -> None:
    names = set(zipfile.ZipFile(next(built.glob("*.whl"))).namelist())
    assert needed() <= names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "benchmarks/"))]


def test_sdist(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    assert {"kernels/op.py", "mixtral_triton/model.py", "mixtral_triton/small/model.safetensors", "LICENSE"} <= names
    folders = ("tests", "tests/support/stub", "benchmarks", "docs", "docs/figures", "examples")
    wanted = {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob("*.*")}
    assert "tests/conftest.py" in wanted and wanted <= names, sorted(wanted - names)
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_installed_wheel_imports_from_anywhere(built: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(next(built.glob("*.whl"))).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r})\n"
        "import mixtral_triton, mixtral_triton.kernels.registry as registry\n"
        "assert mixtral_triton.__file__.startswith(sys.path[0]), mixtral_triton.__file__\n"
        "assert registry.__file__.startswith(sys.path[0]), registry.__file__\n"
        "mixtral_triton.Mixtral, mixtral_triton.KVCache, mixtral_triton.verify\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_kernels_package_of_hugging_face_is_not_shadowed() -> None:
    """From the repository's root, where a folder `kernels` stands: theirs is imported, and transformers too."""
    code = "import kernels, transformers, mixtral_triton.ops; print(kernels.__file__); kernels.get_kernel"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout
