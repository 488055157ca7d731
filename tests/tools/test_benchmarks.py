"""`pytest benchmarks/` collects its cases, and without a GPU runs them with the torch backend and says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("pytest_benchmark")
pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says"),
]


def run(*args: str, plugins: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run pytest as a user does, from the root and not as a worker of another pytest."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(plugins), str(ROOT)])
    command = [sys.executable, "-m", "pytest", "benchmarks/", "-p", "no:cacheprovider", "-p", "no:xdist", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)


def test_cases_of_every_kind_run_and_name_the_device(tmp_path: Path) -> None:
    file, kinds = tmp_path / "times.json", {"rms_norm", "expert_swiglu", "linear", "decode_step"}
    done = run("-q", "-k", " or ".join(kinds), f"--benchmark-json={file}")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(file.read_text())["benchmarks"]
    assert kinds <= {one["group"].split()[0] for one in found}
    for one in found:
        assert one["group"].endswith("(CPU, plain torch)") and one["extra_info"]["device"] == "CPU, plain torch"
        assert one["extra_info"]["bytes"] > 0 and one["stats"]["median"] > 0 and one["stats"]["rounds"] == 20


OFF = """
from mixtral_triton.tools.bench import measure as bench
correct = bench.our_call
bench.our_call = lambda case, args: lambda **kwargs: correct(case, args)(**kwargs) * 1.1
"""


@pytest.mark.slow
def test_wrong_operation_fails(tmp_path: Path) -> None:
    (tmp_path / "off_for_benchmarks.py").write_text(OFF)
    done = run("-q", "-p", "off_for_benchmarks", "-k", "test_op and rms_norm-T", plugins=tmp_path)
    assert done.returncode == 1 and "wrong: an error of" in done.stdout, done.stdout
