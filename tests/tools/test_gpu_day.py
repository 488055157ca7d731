"""The GPU day: stand-ins for its commands run, die, resume or exceed a budget; the real ones use a simulated GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.gpu_day import Command, Part, day, markdown, parts, whole_models
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools import terminal
from mixtral_triton.tools.bench.cases import BENCHED, Case, cases
from mixtral_triton.tools.bench.measure import Outcome, Row, untimed_row
from mixtral_triton.tools.gpus import GPUS

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel: once, without TRITON_INTERPRET")


def python(name: str, *codes: str, resumes: bool = False) -> Part:
    commands = [Command(f"c{number}", ("-c", code), resumes) for number, code in enumerate(codes)]
    return Part(name, 9, tuple(commands), at_once=9)


def row(time_us: float, **sizes: int) -> dict[str, Any]:
    case = Case(BENCHED["decode_step"], {**BENCHED["decode_step"].bench_shapes[0], **sizes})
    peers = {"HF eager": Outcome(4e-6 * time_us), "HF static cache": Outcome(note="fails: RuntimeError: no")}
    line = Row(case, 10, 20, time_us * 5e-7, "memory", ("k",), Outcome(time_us * 1e-6), peers).as_dict()
    return {"kind": "row", **line}


def prints(*lines: dict[str, Any]) -> str:
    return f"import json\nfor line in {list(lines)!r}: print(json.dumps(line), flush=True)\n"


GPU = {"kind": "gpu", "name": "GPU X", "source": "measured", "bandwidth": 3.0e12, "matmul": 7e14, "data_sheet": None}
ROWS = [row(400.0, L=1), row(1000.0, L=4)]
BENCH = prints(GPU, *ROWS, {"kind": "end"})
APPLIED = {"rows": [{"model": "2 layers", "applied_ms": 1.0, "eager_ms": 3.0, "ratio": 3.0}], "kernels_a_layer": {}}
TESTS = """print('''t.py::a PASSED [ 25%]
t.py::b[x y] FAILED [ 50%]
t.py::c SKIPPED (needs more) [ 75%]
t.py::d ''', end="", flush=True)
import os; os.abort()"""
# Begins the cases of ROWS from --first; `{dies}` is what it does in the second one.
CASES = """
import json, os, sys, time
first = int(sys.argv[sys.argv.index("--first") + 1])
for number, line in enumerate({rows!r}):
    if number >= first:
        print(json.dumps({{"kind": "begin", "number": number, "op": line["op"], "sizes": line["sizes"]}}), flush=True)
        if number == 1:
            {dies}
        print(json.dumps(line), flush=True)
print(json.dumps({{"kind": "end"}}))
"""


def read(folder: Path) -> tuple[dict[str, Any], str]:
    return json.loads((folder / "gpu_day.json").read_text()), (folder / "gpu_day.md").read_text()


def test_results_and_report(tmp_path: Path) -> None:
    selected = [
        python("tests", TESTS, "pass"),
        python("decode", BENCH, resumes=True),
        python("applied", prints(APPLIED)),
    ]
    state = day(selected, tmp_path, budget_s=60, whole_s=27)
    assert [part["status"] for part in state["parts"].values()] == ["failed", "done", "done"]
    found, page = read(tmp_path)
    assert found["tests"]["counts"] == {"passed": 1, "failed": 1, "skipped": 1, "died": 1}
    assert found["tests"]["failed"] == ["t.py::b[x y]", "t.py::d"]
    assert found["gpu"]["name"] == "GPU X" and found["rows"] == ROWS and found["before"]["versions"]["torch"]
    for text in (
        "| passed | 1 |",
        "| t.py::d |",
        "| tests | failed |",
        "| 2 layers | 1 | 3 | 3 |",
    ):
        assert text in page
    assert "| 1,000 | - | - | 500 | 0.5 | HF eager 4.00 | HF static cache: fails: RuntimeError: no |" in page
    lines = page.splitlines()
    for at, line in enumerate(lines):  # a row has as many cells as the head
        if line.startswith("| ---"):
            assert lines[at - 1].count("|") == line.count("|") == lines[at + 1].count("|")


def test_a_process_that_dies_is_followed_by_one_behind_its_case(tmp_path: Path) -> None:
    rows = [row(100.0 * n, L=n) for n in (1, 2, 3)]
    selected = [python("decode", CASES.format(rows=rows, dies="os.abort()"), BENCH, resumes=True)]
    state = day(selected, tmp_path, 60, 18)
    assert (state["parts"]["decode"]["status"], state["parts"]["decode"]["exit"]) == ("failed", {"c0": 1, "c1": 0})
    found, page = read(tmp_path)
    assert found["died"] == [{"op": "decode_step", "sizes": rows[1]["sizes"]}]
    assert sorted(each["sizes"]["L"] for each in found["rows"]) == [1, 3, 4]
    assert "## Cases that ended a process" in page and "| decode_step | B1 S1024 L2" in page
    written = (tmp_path / "decode-c0.out").read_text()
    day(selected, tmp_path, 60, 18)
    assert (tmp_path / "decode-c0.out").read_text() == written, "a second run does not repeat it"


def test_a_command_that_dies_before_its_first_case_is_not_repeated(tmp_path: Path) -> None:
    state = day([python("decode", "raise SystemExit(7)", resumes=True)], tmp_path, 60, 9)
    assert state["parts"]["decode"]["status"] == "failed" and state["parts"]["decode"]["exit"] == {"c0": 7}


def test_a_second_run_retries_the_case_that_was_cut_off(tmp_path: Path) -> None:
    flag, log = tmp_path / "flag", tmp_path / "log"
    wait = f"open({str(log)!r}, 'a').write(str(first)); os.path.exists({str(flag)!r}) or time.sleep(60)"
    selected = [
        python("steady", f"open({str(log)!r}, 'a').write('s')"),
        python("decode", CASES.format(rows=ROWS, dies=wait), resumes=True),
    ]
    assert day(selected, tmp_path, 8, 18)["parts"]["decode"]["status"] == "over budget"
    flag.touch()
    state = day(selected, tmp_path, 60, 18)
    assert {part["status"] for part in state["parts"].values()} == {"done"}
    assert log.read_text() == "s01", "what was done is not repeated"
    assert read(tmp_path)[0]["rows"] == ROWS and not read(tmp_path)[0]["died"]


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_part_over_budget_is_killed_with_its_children_and_keeps_its_rows(tmp_path: Path) -> None:
    child = "import subprocess, sys, time\n" + BENCH
    child += "\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child += f"\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))"
    child += '\nprint(\'{"kind": "ro\', flush=True)\ntime.sleep(60)'
    start = time.monotonic()
    state = day([python("decode", child), python("next", "print(1)")], tmp_path, budget_s=8, whole_s=18)
    assert time.monotonic() - start < 30
    assert [part["status"] for part in state["parts"].values()] == ["over budget", "done"]
    deadline = time.monotonic() + 5
    while is_alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not is_alive(int((tmp_path / "pid").read_text()))
    found, page = read(tmp_path)
    assert len(found["rows"]) == 2 and "over budget" in page


def test_no_part_starts_without_budget(tmp_path: Path) -> None:
    state = day([python("slow", "import time; time.sleep(60)"), python("late", "print(1)")], tmp_path, 1.5, 1.5)
    assert [part["status"] for part in state["parts"].values()] == ["over budget", "not started"]
    assert "not started" in read(tmp_path)[1]


def test_whole_models_are_scaled_by_the_time_of_a_layer() -> None:
    other = row(900.0, L=4, S=4096)  # another context: no second depth
    found = {each["backend"]: each for each in whole_models([row(400.0, L=1), row(1000.0, L=4), other])}
    assert set(found) == {"ours", "floor", "HF eager"}
    assert (found["ours"]["layer_us"], found["ours"]["step_us"]) == (200.0, 400.0 + 31 * 200.0)
    assert found["ours"]["tokens_per_second"] == pytest.approx(1e6 / 6600.0)
    assert [found[name]["step_us"] for name in ("HF eager", "floor")] == pytest.approx([4 * 6600.0, 3300.0])


def test_report_shows_predictions_beside_measurements() -> None:
    steps = [case for case in cases(["decode_step"]) if case.sizes["B"] == 1 and case.sizes["S"] == 1024]
    timed = [replace(untimed_row(case, GPUS["h100"]), ours=Outcome(1e-3, right=True)).as_dict() for case in steps]
    unknown = {"gpu": None, "versions": {}, "commit": None}
    found = {"before": unknown, "after": unknown, "gpu": None, "parts": {}, "died": [], "applied": []}
    found |= {"tests": {"counts": {}, "failed": []}}
    page = markdown({**found, "rows": timed, "whole_models": whole_models(timed)})
    assert "and are no measurements" in page and "| memory |" in page and "| predicted |" in page


def test_parts_cover_every_operation_within_ten_minutes() -> None:
    every = parts()
    assert sum(part.budget_s for part in every) < 600
    commands = [command for part in every for command in part.commands]
    assert {name for name in BENCHED if any("bench" in one.args and name in one.args for one in commands)} == set(
        BENCHED
    )
    assert all(len({command.name for command in part.commands}) == len(part.commands) for part in every)
    tests = [command.args for command in commands if "pytest" in command.args]
    assert {args[args.index("--operation") + 1] for args in tests if "--operation" in args} == set(OPS)
    assert any(args[-1].endswith("test_model.py") for args in tests)
    assert all(Path(args[-1]).is_file() for args in tests)
    decode = next(part for part in every if part.name == "decode").commands[0].args
    at = [decode[place + 1] for place, word in enumerate(decode) if word == "--at"]
    assert {case.sizes["L"] for case in cases(["decode_step"], at=at)} == {1, 4}, "two depths, to scale by"


def test_ours_and_eager_are_timed_before_torch_compile_runs() -> None:
    order = [part.name for part in parts()]
    for part in parts()[: order.index("decode compiled")]:
        for args in (command.args for command in part.commands if "bench" in command.args):
            assert "torch.compile" in args and ("decode_step" not in args or "HF static cache" in args)
    assert order[0] == "compile" and order.index("applied") < order.index("decode compiled")


def test_a_kernel_that_breaks_the_simulated_gpu_ends_only_its_operation(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_day.py", "--dry", "--breaks", "append_kernel", "--out", str(tmp_path)]
    command += ["--parts", "compile,attention,decode", "--budget-s", "2000"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 1, run.stderr
    found, _ = read(tmp_path)
    codes = {
        f"{name}: {command}": code for name, part in found["parts"].items() for command, code in part["exit"].items()
    }
    assert {name for name, code in codes.items() if code} == {"attention: append"}
    notes = {each["op"]: each["note"] for each in found["rows"]}
    assert "illegal memory access" in notes.pop("append")
    assert notes == dict.fromkeys(("attention", "cached_attention", "rope_append_attention", "decode_step"))


def test_tests_run_on_the_simulated_gpu() -> None:
    (tests,) = (part for part in parts(dry=True, breaks="append_kernel") if part.name == "tests")
    outcomes = {}
    for command in tests.commands:
        if command.name in ("append", "route"):
            run = subprocess.run([sys.executable, *command.args], cwd=ROOT, capture_output=True, text=True, timeout=600)
            matches = gpu_day.OUTCOME.finditer(run.stdout)
            outcomes[command.name] = {match[2] for match in matches if f"-{command.name}-" in match[1]}
    assert outcomes == {"append": {"FAILED"}, "route": {"PASSED"}}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--parts", "tests,lunch"], "lunch"),
        (["--budget-s", "-1"], "--budget-s"),
        (["--budget-s", "nan"], "--budget-s"),
        (["--breaks", "rope_kernel"], "--dry"),
        ([], "there is no GPU: nothing was measured"),
        (["no compiler"], "no gcc or clang"),
        (["no header"], "Python.h is not there: install python3-dev"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    missing = args.pop() if args and args[0].startswith("no ") else ""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(missing))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(terminal.shutil, "which", lambda name: None if missing == "no compiler" else "/bin/gcc")
    monkeypatch.setattr(terminal.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit) as error:
        gpu_day.main(list(args))
    printed = capsys.readouterr().err
    assert error.value.code == 2 and message in printed and len(printed.splitlines()) == 1
