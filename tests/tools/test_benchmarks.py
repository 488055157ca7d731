"""The GPU day: stand-ins for its steps run, fail or exceed a limit; its page from invented times; the bench times on a
simulated GPU. And `pytest benchmarks/` collects its cases, and without a GPU runs them in plain torch and says so."""

import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu_day import MINUTES, Step, benched, day, finding, steps
from benchmarks.measured import write_page
from mixtral_triton.bench.cases import BENCHED, Case, cases
from mixtral_triton.bench.gpus import GPUS
from mixtral_triton.bench.measure import Outcome, untimed_row
from mixtral_triton.cli.commands import parser
from mixtral_triton.kernels.registry import OPS
from tests.cli.commands import ROOT
from tests.cli.commands import python as start

pytestmark = pytest.mark.compiled


def python(name: str, code: str, limit_s: float = 60) -> Step:
    return Step(name, "", limit_s, f"{gpu_day.PYTHON} -c {shlex.quote(code)}")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_step_that_fails_does_not_stop_the_next(tmp_path: Path) -> None:
    found = day([python("a", "exit(3)"), python("b", "print('seen')")], tmp_path, 60)
    assert [each["status"] for each in found.values()] == ["failed: 3", "done"] and found["b"]["finding"] == "seen"
    assert (tmp_path / "b.out").read_text() == "seen\n"
    assert json.loads((tmp_path / "gpu_day.json").read_text())["steps"] == found
    assert day([python("late", "print(1)")], tmp_path, 0)["late"]["status"] == "not started"


@pytest.mark.slow
def test_a_command_over_its_limit_is_killed_with_its_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    child = f"""
import subprocess, sys, time
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(p.pid))
print("so far", flush=True)
time.sleep(60)"""
    found = day([python("decode", child, 3)], tmp_path, 60)
    assert found["decode"]["status"] == "over its limit" and (tmp_path / "decode.out").read_text() == "so far\n"
    deadline = time.monotonic() + 5
    while is_alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(pid.read_text()))


LEARNED = (
    "verify",
    "verify Qwen3-MoE",
    "test graphs",
    "test transformers",
    "bench decode",
    "bench experts",
    "host",
    "tune",
)


@pytest.mark.parametrize("minutes", MINUTES)
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_steps_parse_fit_their_minutes_and_come_in_the_order_of_what_is_learned(arch: str, minutes: int) -> None:
    found = steps(arch, ROOT / "out", minutes)
    assert sum(step.limit_s for step in found) <= 60 * minutes and len({step.name for step in found}) == len(found)
    places = [next((i for i, step in enumerate(found) if step.name.startswith(name)), -1) for name in LEARNED]
    assert found[0].name == "compile" and places == sorted(places) if minutes >= 30 else places[:2] == [1, 2]
    for step in found:
        words = shlex.split(step.command)
        if words[1:3] == ["-m", "mixtral_triton"]:
            parser().parse_args(words[3:])
        assert "pytest" not in words or (ROOT / words[-1]).exists()
    formats = {case.sizes.weights for case in benched(found) if case.op.name == "decode_step"}
    assert len(formats) == 2, "kernels of one format are not compiled first"
    sizes = {case.op.name for case in benched(found)}
    assert sizes >= {"decode_step", "expert_swiglu", "rms_norm_gate_route"} and (minutes < 60 or sizes >= {*OPS})


@pytest.mark.slow
def test_every_file_with_a_test_for_a_gpu_belongs_to_a_step() -> None:
    collect = ("-m", "pytest", "-q", "-m", "gpu", "--collect-only", "-p", "tests.support.stub.plugin", "tests")
    listed = start(*collect).stdout.splitlines()
    files = {line.partition("::")[0] for line in listed if "::" in line}
    named = [
        word for step in steps("sm_90", ROOT, 60) for word in shlex.split(step.command) if word.startswith("tests/")
    ]
    assert len(files) > 10 and not [file for file in files if not any(file.startswith(place) for place in named)]


def test_the_page_of_a_card_has_each_operation_beside_floor_and_peers(tmp_path: Path) -> None:
    """Rehearsed with invented times: twice each floor, and a peer that takes twice as long."""
    pytest.importorskip("matplotlib")
    rows = [untimed_row(case, GPUS["h100"]) for case in cases(["rms_norm", "linear"])[:40]]
    peer = {"torch": Outcome(1e-3, right=True)}
    timed = [replace(row, ours=Outcome(2 * row.floor_s, right=True), peers=peer) for row in rows]
    gpu = {"kind": "gpu"} | {
        key: getattr(GPUS["h100"], key) for key in ("name", "source", "bandwidth", "matmul", "arch")
    }
    lines = "\n".join(map(json.dumps, [gpu, *({"kind": "row", **row.as_dict()} for row in timed)]))
    (tmp_path / "bench_all.out").write_text(f"{lines}\n{lines[-50:-9]}")  # and half a line of a step that was killed
    assert "takes 2.0 times its floor, the most of 40 of 40 cases" in finding(lines)
    summary = {"torch": "2.11", "steps": {"bench all": {"status": "done", "seconds": 1.0, "finding": finding(lines)}}}
    (tmp_path / "gpu_day.json").write_text(json.dumps(summary))
    page = write_page(tmp_path, tmp_path / "measured", "An Invented Card").read_text()
    assert "# An Invented Card" in page and page.count("50 %") == 40 and "| bench all | done | 1.0 |" in page
    assert "torch / ours" in page and (tmp_path / "measured" / "an-invented-card.png").stat().st_size > 1000


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
