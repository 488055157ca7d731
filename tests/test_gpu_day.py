"""The GPU day without a GPU: stand-ins for its parts run, resume, overrun and are reported as the real ones are."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu_day
from benchmarks.day_report import whole_models
from benchmarks.gpu_day import Part, day, parts
from mixtral_triton.bench import Outcome, Row
from mixtral_triton.bench_cases import BENCHED, Case, cases
from mixtral_triton.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="runs no kernel: once, without TRITON_INTERPRET")


def python(name: str, budget_s: float, *codes: str) -> Part:
    return Part(name, budget_s, tuple((sys.executable, "-c", code) for code in codes))


def row(time_us: float, **sizes: int) -> dict[str, Any]:
    case = Case(BENCHED["decode_step"], {**BENCHED["decode_step"].bench_shapes[0], **sizes})
    peers = {"HF eager": Outcome(4e-6 * time_us), "HF static cache": Outcome(said="fails: RuntimeError: no")}
    return Row(case, 10, 20, time_us * 5e-7, "memory", ("k",), Outcome(time_us * 1e-6), peers).as_dict()


CARD = {"kind": "card", "name": "Card X", "source": "measured", "bandwidth": 3.0e12, "matmul": 7e14, "data_sheet": None}
LINES = [CARD, {"kind": "row", **row(400.0, L=1)}, {"kind": "row", **row(1000.0, L=4)}]
BENCH = f"import json\nfor line in {LINES!r}: print(json.dumps(line))"
TESTS = "print('..F\\nFAILED tests/test_a.py::test_b - assert 1 == 2\\n1 failed, 20 passed, 3 skipped in 2.00s')"


def test_a_day_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [
        python("tests", 9, TESTS + "; raise SystemExit(1)", "print('5 passed in 1s')"),
        python("decode", 9, BENCH),
    ]
    state = day(chosen, tmp_path, budget_s=60, whole_s=18)
    assert [part["status"] for part in state["parts"].values()] == ["failed", "done"]
    assert state["parts"]["tests"]["exit"] == [1, 0]
    found = json.loads((tmp_path / "gpu_day.json").read_text())
    assert found["tests"] == {
        "counts": {"failed": 1, "passed": 25, "skipped": 3},
        "failed": ["tests/test_a.py::test_b"],
    }
    assert found["card"] == CARD and len(found["rows"]) == 2 and found["before"]["versions"]["torch"]
    page = (tmp_path / "gpu_day.md").read_text()
    for text in ("Card X", "| bandwidth, TB/s | 3 | - |", "25 passed", "tests/test_a.py::test_b", "| tests | failed |"):
        assert text in page
    assert "| 1,000 | 500 | 50 % | 4.00 | - |" in page and "HF static cache, B1 S1024 L4" in page
    # A row of a table has as many cells as its head.
    lines = page.splitlines()
    for at, line in enumerate(lines):
        if line.startswith("| --- |"):
            assert lines[at - 1].count("|") == line.count("|") == lines[at + 1].count("|")


def test_whole_models_are_scaled_by_what_a_layer_adds() -> None:
    other = row(900.0, L=4, S=4096)  # another context: no second depth
    found = {each["way"]: each for each in whole_models([row(400.0, L=1), row(1000.0, L=4), other])}
    assert set(found) == {"ours", "floor", "HF eager"}
    assert (found["ours"]["layer_us"], found["ours"]["step_us"]) == (200.0, 400.0 + 31 * 200.0)
    assert found["ours"]["tokens_per_second"] == pytest.approx(1e6 / 6600.0)
    assert found["HF eager"]["step_us"] == pytest.approx(4 * 6600.0) and found["floor"]["step_us"] == pytest.approx(
        3300.0
    )


def test_what_is_done_is_not_run_again_and_what_is_not_is(tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    count = f"open({str(tmp_path / 'runs')!r}, 'a').write('x')"
    flaky = f"import os; raise SystemExit(0 if os.path.exists({str(flag)!r}) else 3)"
    chosen = [python("steady", 5, count), python("flaky", 5, flaky)]
    assert day(chosen, tmp_path, 60, 10)["parts"]["flaky"]["status"] == "failed"
    flag.touch()
    state = day(chosen, tmp_path, 60, 10)
    assert {part["status"] for part in state["parts"].values()} == {"done"}
    assert (tmp_path / "runs").read_text() == "x"


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
    state = day([python("decode", 2, child), python("next", 2, "print(1)")], tmp_path, budget_s=4, whole_s=4)
    assert time.monotonic() - start < 30
    assert state["parts"]["decode"]["status"] == "over budget" and state["parts"]["decode"]["exit"] == [None]
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
    benched = [command for command in commands if "bench" in command]
    assert {name for name in BENCHED if any(name in command for command in benched)} == set(BENCHED)
    shards = [command[-1] for command in commands if "pytest" in command]
    assert shards == [f"{index}/{len(shards)}" for index in range(len(shards))]
    decode = next(part for part in every if part.name == "decode").commands[0]
    at = [decode[place + 1] for place, word in enumerate(decode) if word == "--at"]
    assert {case.sizes["L"] for case in cases(["decode_step"], at=at)} == {1, 4}, "two depths, to scale by"


def test_shards_share_out_the_tests() -> None:
    import benchmarks.shard as shard

    class Config:
        def __init__(self, value: str) -> None:
            self.getoption = lambda name: value

    found = []
    for index in range(3):
        items: list[Any] = list(range(10))
        shard.pytest_collection_modifyitems(Config(f"{index}/3"), items)  # type: ignore[arg-type]
        found += items
    assert sorted(found) == list(range(10))


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--parts", "tests,lunch"], "lunch"),
        (["--budget-s", "-1"], "--budget-s"),
        (["--budget-s", "nan"], "--budget-s"),
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
