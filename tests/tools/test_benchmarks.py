"""The GPU day: stand-ins for its commands run, die, resume or exceed a budget; the real ones use a simulated GPU. And
`pytest benchmarks/` collects its cases, and without a GPU runs them with the torch backend and says so."""

import json
import os
import re
import shlex
import subprocess
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu_day import day, parts
from mixtral_triton.kernels.op import Cost
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools import terminal
from mixtral_triton.tools.bench.cases import BENCHED, Case, cases
from mixtral_triton.tools.bench.measure import Outcome, Row
from tests.cli.commands import ROOT
from tests.cli.commands import python as start

pytestmark = pytest.mark.compiled


def python(*codes: str) -> gpu_day.Part:
    return 9, {f"c{n}": f"{gpu_day.PYTHON} -c {shlex.quote(code)} bench " for n, code in enumerate(codes)}


def row(time_us: float, **sizes: int) -> dict[str, Any]:
    case = Case(BENCHED["decode_step"], replace(BENCHED["decode_step"].bench_shapes[0], **sizes))
    peers = {"HF eager": Outcome(4e-6 * time_us), "HF static cache": Outcome(note="fails: RuntimeError: no")}
    line = Row(case, Cost(10, 20), time_us * 5e-7, "memory", ("k",), Outcome(time_us * 1e-6), peers).as_dict()
    return {"kind": "row", **line}


ROWS = [row(400.0, L=1), row(1000.0, L=4)]
HOST = {"rows": [{"layer": "ours", "us": 1.0, "of eager": 0.25}], "plain_launch_us": 5.0}
TESTS = """print('''t.py::a PASSED [ 25%]
t.py::b[x y] FAILED [ 50%]
t.py::c SKIPPED (needs more) [ 75%]
t.py::d ''', end="", flush=True)
import os; os.abort()"""


def read(folder: Path) -> tuple[dict[str, Any], str]:
    return json.loads((folder / "gpu_day.json").read_text()), (folder / "gpu_day.md").read_text()


def test_results_and_report(tmp_path: Path) -> None:
    rows = "\n".join(map(json.dumps, ROWS))
    codes = {"tests": TESTS, "decode": f"print({rows!r})", "host": f"print({json.dumps(HOST)!r})"}
    state = day({name: python(code) for name, code in codes.items()}, tmp_path, budget_s=600)
    assert [part["status"] for part in state.values()] == ["failed", "done", "done"]
    found, page = read(tmp_path)
    outcomes = {"t.py::a": "passed", "t.py::b[x y]": "failed", "t.py::c": "skipped", "t.py::d": "died"}
    assert found["tests"] == outcomes and found["rows"] == ROWS
    assert f"torch {metadata.version('torch')}" in found["setup"][0]
    for text in ("| t.py::d | died |", "| tests | failed |", "| ours | 1 | 0.25 |"):
        assert text in page
    assert "| 1,000 | 500 | 0.5 | - | HF eager 4.00 | HF static cache: fails: RuntimeError: no |" in page
    lines = page.splitlines()
    for at, line in enumerate(lines):  # a row has as many cells as the head
        if line.startswith("| ---"):
            assert lines[at - 1].count("|") == line.count("|") == lines[at + 1].count("|")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.slow
def test_a_part_over_budget_is_killed_with_its_children_and_a_second_run_continues(tmp_path: Path) -> None:
    pid, log = tmp_path / "pid", tmp_path / "log"
    child = f"""
import os, subprocess, sys, time
print({json.dumps(ROWS[0])!r}, flush=True)
if os.path.exists({str(pid)!r}):
    sys.exit()
p = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open({str(pid)!r}, "w").write(str(p.pid))
print('{{"kind": "ro', flush=True)
time.sleep(60)"""
    selected = {"decode": python(child), "next": python(f"open({str(log)!r}, 'a').write('n')")}
    start = time.monotonic()
    state = day(selected, tmp_path, budget_s=16)
    assert time.monotonic() - start < 30 and [part["status"] for part in state.values()] == ["over budget", "done"]
    deadline = time.monotonic() + 5
    while is_alive(int(pid.read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int(pid.read_text()))
    found, page = read(tmp_path)
    assert found["rows"] == ROWS[:1] and "over budget" in page
    assert {part["status"] for part in day(selected, tmp_path, budget_s=600).values()} == {"done"}
    assert read(tmp_path)[0]["rows"] == ROWS[:1] and log.read_text() == "n", "what was done is not repeated"


def test_no_part_starts_without_budget(tmp_path: Path) -> None:
    state = day({"slow": (570, python("import time; time.sleep(60)")[1]), "late": python("print(1)")}, tmp_path, 1.5)
    assert [part["status"] for part in state.values()] == ["over budget", "not started"]


def test_every_part_starts_within_the_budget_and_takes_what_others_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, limits = [0.0], dict[str, float]()

    def run_part(part: str, commands: Any, entry: Any, out: Path, limit_s: float, *args: Any) -> None:
        limits[part] = limit_s
        clock[0] += limit_s if part != "compile" else 0.0

    monkeypatch.setattr(gpu_day, "run_part", run_part)
    monkeypatch.setattr(gpu_day, "environment", lambda: ["", ""])
    monkeypatch.setattr(gpu_day, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    every = parts()
    possible = {part: share for part, (share, commands) in every.items() if commands}
    day(every, tmp_path, budget_s=570)
    assert limits.keys() == possible.keys() and clock[0] == pytest.approx(570)
    left, rest = limits.pop("compile"), sum(possible.values()) - possible["compile"]
    assert all(limit == pytest.approx(570 * possible[part] / rest) for part, limit in limits.items()) and left > 50


ENDS = {"exit(0)": (0, "done"), "exit(3)": (1, "failed"), "import time; time.sleep(60)": (0, "over budget")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("code", ENDS)
def test_the_exit_status_says_what_failed_and_not_what_took_long(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(gpu_day, "parts", lambda *args: {"tests": python("print(1)", code), "none": (9, {})})
    status, state = ENDS[code]
    assert gpu_day.main(["--dry", "--budget-s", "6", "--out", str(tmp_path)]) == status
    printed, (found, page) = capsys.readouterr().out, read(tmp_path)
    assert re.search(f"tests: {state} after [0-9]+ s{' c1' * status}\nnone: not possible here", printed), printed
    assert found["parts"]["tests"]["exit"]["c0"] == 0 and f"| tests | {state} |" in page


def test_the_sanitizer_runs_a_test_of_each_function_for_each_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not parts("sm_90")["sanitizer"][1]
    monkeypatch.setattr(gpu_day.shutil, "which", lambda name: name)
    commands = parts()["sanitizer"][1]
    assert commands.keys() == {f"{tool} {name}" for tool in ("memcheck", "initcheck") for name in OPS}
    assert all("--error-exitcode 9" in command and " --first " in command for command in commands.values())


def test_vllm_is_timed_with_both_experts_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for installed, names in ((None, set()), (object(), {"its experts", "ours", "ours in int4"})):
        monkeypatch.setattr(gpu_day, "find_spec", lambda name, installed=installed: installed)
        commands = parts()["in vLLM"][1]
        assert commands.keys() == names and not parts("sm_90")["in vLLM"][1]
    quantization = ["--quantization mixtral_triton" in command for command in commands.values()]
    assert quantization == [False, True, True] and all(
        (ROOT / command.split()[1]).is_file() for command in commands.values()
    )


def test_parts_cover_every_operation() -> None:
    every = parts()
    commands = [shlex.split(command) for _, commands in every.values() for command in commands.values()]
    assert set(BENCHED) == {args[5] for args in commands if "bench" in args}
    tests = [args for args in commands if "pytest" in args]
    simulated = parts("gfx942")["tests"][1]
    assert simulated.keys() == every["tests"][1].keys()
    assert all(" --first" in command and "--arch gfx942 --executes" in command for command in simulated.values())
    assert {f"-k=-{name}-" for name in OPS} == {args[-1] for args in tests if args[-1].startswith("-k")}
    files = {args[-1] for args in tests if not args[-1].startswith("-k")}
    assert "tests/model/test_model.py" in files and all((ROOT / file).is_file() for file in files)
    decode = shlex.split(every["decode"][1]["decode_step"])
    at = [decode[place + 1] for place, word in enumerate(decode) if word == "--at"]
    assert {case.sizes.L for case in cases(["decode_step"], at=at)} == {1, 4}, "two depths give the time of a layer"
    # Ours and eager transformers are timed before torch.compile runs.
    order = list(every)
    for part in order[: order.index("decode compiled")]:
        for command in (command for command in every[part][1].values() if " bench " in command):
            assert "torch.compile" in command and ("decode_step" not in command or "HF static cache" in command)
    (layer,) = every["experts in bf16"][1].values()
    sizes = {int(text) for text in re.findall(r"T=(\d+),", layer)}
    assert order[1] == "experts in bf16" and sizes == {1, 8, 64, 512, 1024, 1536, 2048, 4096}
    assert order[0] == "compile"


def run_dry(out: Path, *options: str) -> tuple[int, dict[str, Any], str]:
    run = start("benchmarks/gpu_day.py", "--dry", *options, "--out", out, "--budget-s", "20000")
    return run.returncode, *read(out)


@pytest.mark.slow
def test_a_kernel_that_breaks_the_simulated_gpu_ends_only_its_commands(tmp_path: Path) -> None:
    share, commands = parts("sm_90", "append_kernel")["tests"]
    day({"tests": (share, {name: commands[name] for name in ("append", "route")})}, tmp_path, budget_s=20000)
    status, found, _ = run_dry(tmp_path, "append_kernel", "--parts", "compile", "attention", "decode")
    codes = {(name, command): code for name, part in found["parts"].items() for command, code in part["exit"].items()}
    failed = {name for name, code in codes.items() if code}
    assert status == 1 and failed == {("attention", "append"), ("tests", "append")}
    notes = {each["op"]: each["note"] for each in found["rows"]}
    assert "illegal memory access" in notes.pop("append")
    assert notes == dict.fromkeys(("attention", "cached_attention", "rope_append_attention", "decode_step"))
    ends = {(re.search("append|route", test)[0], end) for test, end in found["tests"].items()}  # type: ignore[index]
    assert ends == {("append", "failed"), ("route", "passed")}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
def test_rates_host_time_and_offloaded_experts_run_on_the_simulated_gpu(arch: str, tmp_path: Path) -> None:
    selected = ["experts in bf16", "rates", "decode offloaded", "host"]
    status, found, page = run_dry(tmp_path, "--arch", arch, "--parts", *selected)
    assert status == 0 and list(found["parts"]) == selected
    assert len(found["host"]) == 3
    assert [(each["op"], each["right"]) for each in found["rows"]] == [("expert_swiglu", True), ("decode_step", True)]
    assert found["rows"][1]["sizes"]["offload"] == 2 and found["rows"][1]["host_bytes"] > 0
    figures = {each[""]: each["value"] for each in found["checks"] if each["check"] == "rates"}
    predicted = {f"expert_swiglu T{T}, predicted, us" for T in (512, 1024, 1536, 4096)}
    assert (figures["pdl_gap"] is None) == (arch == "gfx942"), "dependent launches"
    assert figures.keys() >= {"l2", "launch_gap", "pdl_gap", "tile", "clocks under load"} | predicted
    assert "| rates | l2 |" in page


SMALL_SIZES = ("--hidden", 256, "--intermediate", 128)


@pytest.mark.parametrize(("sizes", "least"), [(SMALL_SIZES, 0), pytest.param((), 40, marks=pytest.mark.slow)])
def test_int4_on_a_cpu_is_paired_with_dequantized_weights(sizes: tuple[Any, ...], least: int) -> None:
    command = ("benchmarks/cpu_int4.py", "--rounds", 3, *sizes)
    assert re.search(r"dequantized .* packed .* times, needs 40", start(*command).stdout)
    runs = (json.loads(start(*command, "--json").stdout) for _ in range(3))  # other processes may take the CPU in one
    assert any(found["packed"] < found["first"] and found["ratio"] > least for found in runs)


BAD_INPUT = {"--parts tests lunch": "lunch", "--check lunch": "lunch"}
BAD_INPUT |= dict.fromkeys(("", "--check rates --dry"), "there is no GPU: nothing was measured")
BAD_INPUT |= {"no compiler": "no gcc or clang", "no header": "Python.h is not there: install python3-dev"}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case: str, monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    on_gpu = case.startswith("no ")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None if case == "no compiler" else "/bin/gcc")
    monkeypatch.setattr(terminal.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit) as error:
        gpu_day.main([] if on_gpu else case.split())
    printed = capsys.readouterr().err
    assert error.value.code == 2 and BAD_INPUT[case] in printed and len(printed.splitlines()) == 1


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
from mixtral_triton.tools.bench import measure as bench
correct = bench.our_call
bench.our_call = lambda case, args: lambda **kwargs: correct(case, args)(**kwargs) * 1.1
"""


@without_gpu
@pytest.mark.slow
def test_wrong_operation_fails(tmp_path: Path) -> None:
    (tmp_path / "off_for_benchmarks.py").write_text(OFF)
    done = run("-q", "-p", "off_for_benchmarks", "-k", "test_op and rms_norm-T", plugins=tmp_path)
    assert done.returncode == 1 and "wrong: an error of" in done.stdout, done.stdout
