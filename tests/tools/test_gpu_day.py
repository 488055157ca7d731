"""The GPU day without a GPU: stand-ins for its commands run, die, resume, overrun and are reported as real ones are.
And the real ones, on a simulated GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_day
from benchmarks.day_parts import Command, Part, parts
from benchmarks.day_report import whole_models
from benchmarks.gpu_day import day
from benchmarks.progress import events
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools import terminal
from mixtral_triton.tools.bench.cases import BENCHED, Case, cases
from mixtral_triton.tools.bench.measure import Outcome, Row

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel: once, without TRITON_INTERPRET")


def python(name: str, budget_s: float, *codes: str, resumes: str | None = None, at_once: int = 9) -> Part:
    commands = (Command(f"c{number}", ("-c", code), resumes) for number, code in enumerate(codes))
    return Part(name, budget_s, tuple(commands), at_once)


def row(time_us: float, **sizes: int) -> dict[str, Any]:
    case = Case(BENCHED["decode_step"], {**BENCHED["decode_step"].bench_shapes[0], **sizes})
    peers = {"HF eager": Outcome(4e-6 * time_us), "HF static cache": Outcome(note="fails: RuntimeError: no")}
    return Row(case, 10, 20, time_us * 5e-7, "memory", ("k",), Outcome(time_us * 1e-6), peers).as_dict()


def begin(line: dict[str, Any]) -> dict[str, Any]:
    return {"kind": "begin", "op": line["op"], "sizes": line["sizes"]}


def says(*lines: dict[str, Any]) -> str:
    return f"import json\nfor line in {list(lines)!r}: print(json.dumps(line), flush=True)\n"


GPU_DEVICE = {
    "kind": "gpu",
    "name": "GPU X",
    "source": "measured",
    "bandwidth": 3.0e12,
    "matmul": 7e14,
    "data_sheet": None,
}
ROWS = [{"kind": "row", **row(400.0, L=1)}, {"kind": "row", **row(1000.0, L=4)}]
BENCH = says(GPU_DEVICE, *ROWS, {"kind": "end"})
APPLIED = {"rows": [{"model": "2 layers", "applied_ms": 1.0, "eager_ms": 3.0, "ratio": 3.0}], "kernels_a_layer": {}}
# A test's process: FILE is the last of its arguments.
TESTS = """
import json, sys
with open(sys.argv[-1], "a") as out:
    for name, how in {outcomes!r}:
        print(json.dumps({{"kind": "begin", "test": name}}), file=out)
        if how == "dies":
            raise SystemExit(3)
        print(json.dumps({{"kind": "outcome", "test": name, "outcome": how}}), file=out)
    print(json.dumps({{"kind": "end"}}), file=out)
raise SystemExit({code})
"""


def pytests(code: int, **outcomes: str) -> str:
    return TESTS.format(outcomes=list(outcomes.items()), code=code)


def test_a_day_is_written_down(tmp_path: Path) -> None:
    chosen = [
        python("tests", 9, pytests(1, a="passed", b="failed", c="skipped"), pytests(0, d="passed"), resumes="tests"),
        python("decode", 9, BENCH, resumes="cases"),
        python("applied", 9, says(APPLIED)),
    ]
    state = day(chosen, tmp_path, budget_s=60, whole_s=27)
    assert [part["status"] for part in state["parts"].values()] == ["failed", "done", "done"]
    assert state["parts"]["tests"]["exit"] == {"c0": 1, "c1": 0}
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert found["tests"] == {"counts": {"passed": 2, "failed": 1, "skipped": 1}, "failed": ["b"]}
    assert found["gpu"] == GPU_DEVICE and len(found["rows"]) == 2 and found["before"]["versions"]["torch"]
    page = (tmp_path / "gpu_day.md").read_text()
    for text in (
        "GPU X",
        "| bandwidth, TB/s | 3 | - |",
        "2 passed",
        "- b",
        "| tests | failed |",
        "| 2 layers | 1 | 3 | 3.00 |",
    ):
        assert text in page
    assert "| 1,000 | 500 | 50 % | 4.00 | - |" in page and "HF static cache, B1 S1024 L4" in page
    # A row of a table has as many cells as its head.
    lines = page.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("| --- |"):
            assert lines[at - 1].count("|") == line.count("|") == lines[at + 1].count("|")


DYING = """
import json, os, sys
first = int(sys.argv[sys.argv.index("--first") + 1])
for number, line in enumerate({rows!r}):
    if number >= first:
        print(json.dumps({{"kind": "begin", "number": number, "op": line["op"], "sizes": line["sizes"]}}), flush=True)
        if number == {dies}:
            os.abort()
        print(json.dumps(line), flush=True)
print(json.dumps({{"kind": "end"}}))
"""


def test_what_a_process_died_of_is_left_behind_and_the_rest_is_done(tmp_path: Path) -> None:
    """A sticky error of one case: a new process goes on behind it; other operations, and a second run, never know."""
    rows = [{"kind": "row", **row(100.0 * n, L=n)} for n in (1, 2, 3)]
    chosen = [
        python("decode", 9, DYING.format(rows=rows, dies=1), BENCH, resumes="cases", at_once=1),
        python("tests", 9, pytests(0, a="passed", b="dies", c="passed"), resumes="tests"),
    ]
    chosen[1] = Part("tests", 9, (Command("c0", ("-c", SKIPPING), "tests"),))
    state = day(chosen, tmp_path, 60, 18)
    assert state["parts"]["decode"] | {"seconds": 0} == {
        "status": "failed", "exit": {"c0": 1, "c1": 0}, "seconds": 0, "limit_s": 30.0
    }  # fmt: skip
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert found["died"] == [{"op": "decode_step", "sizes": rows[1]["sizes"]}]
    assert [each["sizes"]["L"] for each in found["rows"]] == [1, 3, 4]
    assert found["tests"] == {"counts": {"passed": 2, "died": 1}, "failed": ["b"]}
    page = (tmp_path / "gpu_day.md").read_text()
    assert "## What a process died of" in page and "- decode_step, B1 S1024 L2" in page
    written = (tmp_path / "decode-c0.out").read_text()
    day(chosen, tmp_path, 60, 18)
    assert (tmp_path / "decode-c0.out").read_text() == written, "a second run does not die there again"


# A pytest that obeys its file, as benchmarks/progress.py does.
SKIPPING = """
import json, os, sys
file = sys.argv[-1]
done = [json.loads(line)["test"] for line in open(file)] if os.path.exists(file) else []
for name in "abc":
    if name not in done:
        with open(file, "a") as out:
            print(json.dumps({"kind": "begin", "test": name}), file=out)
        if name == "b":
            os.abort()
        with open(file, "a") as out:
            print(json.dumps({"kind": "outcome", "test": name, "outcome": "passed"}), file=out)
with open(file, "a") as out:
    print(json.dumps({"kind": "end", "test": ""}), file=out)
"""


def test_a_command_that_dies_at_once_is_not_tried_for_ever(tmp_path: Path) -> None:
    state = day([python("decode", 9, "raise SystemExit(7)", resumes="cases")], tmp_path, 60, 9)
    assert state["parts"]["decode"]["status"] == "failed" and state["parts"]["decode"]["exit"] == {"c0": 7}


def test_whole_models_are_scaled_by_what_a_layer_adds() -> None:
    other = row(900.0, L=4, S=4096)  # another context: no second depth
    found = {each["way"]: each for each in whole_models([row(400.0, L=1), row(1000.0, L=4), other])}
    assert set(found) == {"ours", "floor", "HF eager"}
    assert (found["ours"]["layer_us"], found["ours"]["step_us"]) == (200.0, 400.0 + 31 * 200.0)
    assert found["ours"]["tokens_per_second"] == pytest.approx(1e6 / 6600.0)
    assert found["HF eager"]["step_us"] == pytest.approx(4 * 6600.0) and found["floor"]["step_us"] == pytest.approx(
        3300.0
    )


def test_what_is_done_is_not_run_again_and_what_was_cut_goes_on(tmp_path: Path) -> None:
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    flag = tmp_path / "flag"
    slow = says(GPU_DEVICE, begin(ROWS[0]), ROWS[0], begin(ROWS[1]))
    slow += f"import os, sys, time\nfirst = sys.argv[-1]\nopen({str(tmp_path / 'first')!r}, 'a').write(first)\n"
    slow += f"if not os.path.exists({str(flag)!r}): time.sleep(60)\n" + says(ROWS[1], {"kind": "end"})
    chosen = [python("steady", 5, count), python("decode", 5, slow, resumes="cases")]
    assert day(chosen, tmp_path, 8, 10)["parts"]["decode"]["status"] == "over budget"
    flag.touch()
    state = day(chosen, tmp_path, 60, 10)
    assert {part["status"] for part in state["parts"].values()} == {"done"}
    assert (tmp_path / "runs").read_text() == "x"
    assert (tmp_path / "first").read_text() == "01", "from the case that was cut off"
    gpu_day.forget(chosen, tmp_path)
    assert not list(tmp_path.glob("*.out"))
    day(chosen, tmp_path, 60, 10)
    assert (tmp_path / "runs").read_text() == "xx"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()


def test_a_part_over_its_budget_is_killed_with_all_it_started_and_kept_so_far(tmp_path: Path) -> None:
    child = "import subprocess, sys, time\n" + BENCH
    child += "\np = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])"
    child += f"\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(p.pid))"
    child += '\nprint(\'{"kind": "ro\', flush=True)\ntime.sleep(60)'
    start = time.monotonic()
    state = day([python("decode", 4, child), python("next", 4, "print(1)")], tmp_path, budget_s=8, whole_s=8)
    assert time.monotonic() - start < 30
    assert state["parts"]["decode"]["status"] == "over budget" and state["parts"]["decode"]["exit"] == {}
    assert state["parts"]["next"]["status"] == "done"
    deadline = time.monotonic() + 5
    while alive(int((tmp_path / "pid").read_text())) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(int((tmp_path / "pid").read_text()))
    assert len(json.loads((tmp_path / "gpu_day.json").read_text())["rows"]) == 2, "the whole lines before the cut"
    assert "over budget" in (tmp_path / "gpu_day.md").read_text()


def test_no_part_starts_once_the_whole_budget_is_spent(tmp_path: Path) -> None:
    state = day([python("slow", 9, "import time; time.sleep(60)"), python("late", 9, "print(1)")], tmp_path, 1.5, 1.5)
    assert [part["status"] for part in state["parts"].values()] == ["over budget", "not started"]
    assert "not started" in (tmp_path / "gpu_day.md").read_text()


def test_the_real_parts_cover_every_operation_within_ten_minutes() -> None:
    every = parts()
    assert sum(part.budget_s for part in every) < 600
    commands = [command for part in every for command in part.commands]
    benched = [command.args for command in commands if "bench" in command.args]
    assert {name for name in BENCHED if any(name in args for args in benched)} == set(BENCHED)
    for part in every:
        names = [command.name for command in part.commands]
        assert len(set(names)) == len(names)
    tests = [command.args for command in commands if command.resumes == "tests"]
    assert {args[args.index("--operation") + 1] for args in tests if "--operation" in args} == set(OPS)
    assert any(args[-1].endswith("test_model.py") for args in tests)
    decode = next(part for part in every if part.name == "decode").commands[0].args
    at = [decode[place + 1] for place, word in enumerate(decode) if word == "--at"]
    assert {case.sizes["L"] for case in cases(["decode_step"], at=at)} == {1, 4}, "two depths, to scale by"


def test_nothing_is_compiled_by_torch_before_ours_and_eager_are_timed() -> None:
    """torch.compile may leave a process, and a GPU, in a state that no timing should start from."""
    every = parts()
    order = [part.name for part in every]
    for part in every[: order.index("decode compiled")]:
        for command in part.commands:
            if "bench" in command.args:
                assert "torch.compile" in command.args
                assert "decode_step" not in command.args or "HF static cache" in command.args
    assert order[0] == "compile" and order.index("applied") < order.index("decode compiled")


@pytest.mark.parametrize(
    ("missing", "said"), [("compiler", "no gcc or clang"), ("header", "Python.h is not there: install python3-dev")]
)
def test_a_missing_compiler_or_header_is_said_first(
    missing: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    if missing == "compiler":
        monkeypatch.setattr(terminal.shutil, "which", lambda name: None)
    else:
        monkeypatch.setattr(terminal.shutil, "which", lambda name: "/bin/gcc")
        monkeypatch.setattr(terminal.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    with pytest.raises(SystemExit) as left:
        gpu_day.main([])
    error = capsys.readouterr().err
    assert left.value.code == 2 and said in error and len(error.splitlines()) == 1


def test_the_road_on_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    """Parts of each kind, with a kernel that leaves the GPU in an error: its operation ends there, the rest stands."""
    command = [sys.executable, "benchmarks/gpu_day.py", "--dry", "--breaks", "append_kernel", "--out", str(tmp_path)]
    command += ["--parts", "compile,attention,decode", "--budget-s", "2000"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert run.returncode == 1, run.stderr
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    failed = {
        f"{name}: {command}" for name, part in found["parts"].items() for command, code in part["exit"].items() if code
    }
    assert failed == {"attention: append"}
    said = {each["op"]: each["note"] for each in found["rows"]}
    assert "illegal memory access" in said.pop("append")
    assert said == dict.fromkeys(("attention", "cached_attention", "rope_append_attention", "decode_step"))


def test_a_test_that_loses_the_gpu_ends_its_process_and_the_next_one_goes_on(tmp_path: Path) -> None:
    """The plugin of the day's tests: what began is written down, and not begun again."""
    file = tmp_path / "append.jsonl"
    (tests,) = (part for part in parts(dry=True, breaks="append_kernel") if part.name == "tests")
    (command,) = (each for each in tests.commands if each.name == "append")
    args = [sys.executable, *command.args, "--most", "2", "--progress", str(file)]
    begun = []
    for _ in range(2):
        run = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert run.returncode != 0 and "the GPU is in an error" in run.stdout, run.stdout + run.stderr
        begun.append([event["test"] for event in events(file) if event["kind"] == "begin"])
    assert len(begun[0]) == 1 and len(begun[1]) == 2 and begun[1][0] != begun[1][1]
    assert {event["outcome"] for event in events(file) if event["kind"] == "outcome"} == {"failed"}


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--parts", "tests,lunch"], "lunch"),
        (["--budget-s", "-1"], "--budget-s"),
        (["--budget-s", "nan"], "--budget-s"),
        (["--breaks", "rope_kernel"], "--dry"),
    ],
)
def test_bad_input(args: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        gpu_day.main(args)
    error = capsys.readouterr().err
    assert left.value.code == 2 and named in error and len(error.splitlines()) == 1


def test_without_a_gpu_it_refuses(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as left:
        gpu_day.main([])
    assert left.value.code == 2 and "there is no GPU: nothing was measured" in capsys.readouterr().err
