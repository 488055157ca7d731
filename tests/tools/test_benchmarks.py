"""The GPU day: stand-ins for its commands run, fail or exceed a limit; the bench times on a simulated GPU. And
`pytest benchmarks/` collects its cases, and without a GPU runs them with the torch backend and says so."""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu_day import commands, day
from mixtral_triton.bench.cases import BENCHED, Case
from mixtral_triton.cli.commands import parser
from mixtral_triton.kernels.registry import OPS
from tests.cli.commands import ROOT
from tests.cli.commands import python as start

pytestmark = pytest.mark.compiled


def python(code: str, limit_s: float = 60) -> tuple[float, str]:
    return limit_s, f"{gpu_day.PYTHON} -c {shlex.quote(code)}"


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_summary_of_what_ran(tmp_path: Path) -> None:
    found = day({"a": python("exit(3)"), "b": python("print('seen')")}, tmp_path, budget_s=60)
    assert [each["status"] for each in found.values()] == ["failed: 3", "done"]
    assert (tmp_path / "b.out").read_text() == "seen\n"
    assert json.loads((tmp_path / "gpu_day.json").read_text())["commands"] == found
    assert day({"late": python("print(1)")}, tmp_path, budget_s=0)["late"]["status"] == "not started"


@pytest.mark.slow
def test_a_command_over_its_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"""
import subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(p.pid))
print("so far", flush=True)
time.sleep(60)"""
    found = day({"decode": python(child, 3)}, tmp_path, budget_s=60)
    assert found["decode"]["status"] == "over its limit" and (tmp_path / "decode.out").read_text() == "so far\n"
    deadline = time.monotonic() + 5
    while is_alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(pid.read_text()))


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_commands_cover_every_operation_and_begin_with_the_tuner(arch: str) -> None:
    found = commands(arch)
    assert [*found][:3] == ["compile", "tune", "bench experts"]
    assert {name.removeprefix("bench ") for name in found} >= set(OPS) and "bench decode" in found
    for _, text in found.values():
        words = shlex.split(text)
        if words[1:3] == ["-m", "mixtral_triton"]:
            parser().parse_args(words[3:])
        assert "pytest" not in words or (ROOT / words[-1]).is_file()
    assert found["tune"][1].count("--sizes") == (6 if arch == "sm_90" else 5)
    assert found["tune"][1].count("--kernel") == 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "shape"), [("append", 0), ("decode_step", -2)])
def test_the_bench_times_on_a_simulated_gpu(name: str, shape: int) -> None:
    sizes = Case(BENCHED[name], BENCHED[name].test_shapes[shape]).as_dict()
    text = ",".join(f"{letter}={size}" for letter, size in sizes.items())
    stub = ("-m", "tests.support.stub", "--executes", "-m", "mixtral_triton")
    done = start(*stub, "bench", "--json", name, "--sizes", text, "--peer", "torch")
    assert done.returncode == 0, done.stdout + done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["time_us"] and row["sizes"] == sizes and (row["host_bytes"] > 0) == ("offload" in sizes)


LAYERS = [f"Mixtral, {name}" for name in ("ours", "applied", "eager")]
LAYERS += [f"Qwen3-MoE, {name}" for name in ("by name", "sdpa, our experts", "sdpa, grouped_mm", "eager")]


@pytest.mark.slow
def test_host_times_of_layers() -> None:
    done = start("benchmarks/host_time.py", "--rounds", 1)
    assert done.returncode == 0 and "a plain launch takes" in done.stdout, done.stderr
    assert all(re.search(rf"^{layer} +\d+\.\d\d", done.stdout, re.M) for layer in LAYERS)


def test_a_machine_without_a_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as error:
        gpu_day.main([])
    printed = capsys.readouterr().err
    assert error.value.code == 2 and "there is no GPU" in printed and len(printed.splitlines()) == 1


without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")


def run(*args: Any, plugins: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run pytest as a user does, from the root."""
    pytest.importorskip("pytest_benchmark")
    paths = os.pathsep.join([str(plugins), str(ROOT)])
    return start("-m", "pytest", "benchmarks/", "-p", "no:cacheprovider", "-p", "no:xdist", *args, PYTHONPATH=paths)


@pytest.mark.slow
@without_gpu
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
from mixtral_triton.bench import measure as bench
correct = bench.our_call
bench.our_call = lambda case, args: lambda **kwargs: correct(case, args)(**kwargs) * 1.1
"""


@without_gpu
@pytest.mark.slow
def test_wrong_operation_fails(tmp_path: Path) -> None:
    (tmp_path / "off_for_benchmarks.py").write_text(OFF)
    done = run("-q", "-p", "off_for_benchmarks", "-k", "test_op and rms_norm-T", plugins=tmp_path)
    assert done.returncode == 1 and "wrong: an error of" in done.stdout, done.stdout
