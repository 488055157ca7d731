"""Measure everything that needs a GPU in under ten minutes: tests, operations and their peers, applied models, decode.

    python benchmarks/gpu_day.py [--out benchmarks/results/NAME] [--parts tests,experts,...] [--budget-s 570]
    python benchmarks/gpu_day.py --dry     # all parts on a simulated GPU, at small sizes

Each part has a share of the budget. One that exceeds it is killed, and its output so far is kept. Each operation has a
process: one that leaves the GPU in an error is followed by another that continues after the failed case. The same
command again runs what is not done. OUT/gpu_day.json and OUT/gpu_day.md hold the results. No network is needed.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
PACKAGES = ("mixtral-triton", "torch", "triton", "transformers", "liger-kernel", "flash-attn", "vllm")
HEAD = """# A GPU day

A ratio above 1 means that ours is faster. Predictions follow from the GPU's data sheet and are no measurements.
Whole models are scaled: what one more layer adds, times the model's layers.
"""
FULL_LAYERS = {4096: 32, 6144: 56}  # of Mixtral 8x7B and 8x22B, by hidden size
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)?[^\S\n]*(?:\(.*|\[.*)?$", re.MULTILINE)
sys.path.insert(0, str(ROOT))  # a script's own path holds only its folder

from mixtral_triton.cli import Parser  # noqa: E402
from mixtral_triton.kernels.op import Shape  # noqa: E402
from mixtral_triton.kernels.registry import OPS  # noqa: E402
from mixtral_triton.tools.bench.cases import BENCHED  # noqa: E402
from mixtral_triton.tools.bench.peers import PEERS  # noqa: E402
from mixtral_triton.tools.terminal import toolchain_fault  # noqa: E402


class Command(NamedTuple):
    """Arguments for Python. `resumes`: a new process continues after the case that ended one."""

    name: str
    args: tuple[str, ...]
    resumes: bool = False


class Part(NamedTuple):
    """Commands that share `budget_s` seconds of the default whole, `at_once` of them side by side."""

    name: str
    budget_s: float
    commands: tuple[Command, ...]
    at_once: int = 1


def parts(dry: bool = False, breaks: str = "") -> tuple[Part, ...]:
    """Return the parts in order of importance; every operation of the registry is in one of the benchmarks.

    dry: on a simulated GPU, small sizes and few tests; `breaks`: a kernel that fails on it.
    """
    experts = [name for name in OPS if name.startswith("expert")]
    cache = [name for name in OPS if "attention" in name or name == "append"]
    rest = [name for name in OPS if name not in (*experts, *cache)]
    step = ("--at", "B=1", "--at", "S=1024", "--at", "H=4096")
    no_compile = ("--without", "torch.compile")
    slow, quick = (*no_compile, "--without", "HF static cache"), ("--quick", *no_compile)
    compile_ahead = ("-m", "benchmarks.compile_ahead", *(("--most", "4") if dry else ()))
    drop_in = (
        "benchmarks/drop_in.py",
        "--json",
        "--device",
        "cuda",
        "--rounds",
        *(("1", "--small") if dry else ("100",)),
    )

    def bench(names: Sequence[str], *options: str) -> tuple[Command, ...]:
        args = ("-m", "mixtral_triton", "bench", "--json")
        return tuple(Command(name, (*args, name, *(_smallest(name) if dry else options)), True) for name in names)

    found = (
        Part("compile", 90, (Command("all", compile_ahead),)),  # nothing is timed while another core compiles
        Part("tests", 110, _tests(dry), max(1, min(8, (os.cpu_count() or 2) // 2))),
        Part("experts", 90, bench(experts, *quick)),
        Part("attention", 70, bench(cache, *quick)),
        # torch.compile may leave a GPU in a state that disturbs timing: ours and eager transformers run before it.
        Part("decode", 60, bench(["decode_step"], *step, *slow)),
        Part("decode batches", 30, bench(["decode_step"], "--quick", "--at", "L=4", *slow)),
        Part("applied", 40, (Command("drop_in", drop_in),)),
        Part("decode compiled", 40, bench(["decode_step"], *step, *no_compile)),
        Part("one token", 30, bench(rest, "--quick", "--at", "T=1")),
        Part("many tokens", 30, bench(rest, "--quick", "--at", "T=4096")),
    )
    return tuple(_on_stub(part, breaks) for part in found) if dry else found


def _smallest(name: str) -> tuple[str, ...]:
    """Return options for the smallest sizes that the tests run, with plain torch as the only peer."""
    op = BENCHED[name]
    shape = Shape(min(op.test_shapes, key=lambda sizes: op.cost(sizes, op.dtypes[0]).bytes))
    text = ",".join(f"{letter}={size}" for letter, size in shape.as_dict().items())
    without = [word for name in {peer.name for peer in PEERS} - {"torch"} for word in ("--without", name)]
    return ("--sizes", text, *without)


def _on_stub(part: Part, breaks: str) -> Part:
    """Return the part on a simulated GPU, where kernels compute only if results are checked, since that takes long."""
    stub = ("-m", "tests.support.stub", *(("--breaks", breaks) if breaks else ()))
    executes = {one: ("--executes",) if {"bench", "pytest"} & {*one.args} else () for one in part.commands}
    commands = (one._replace(args=(*stub, *executes[one], *one.args)) for one in part.commands)
    return part._replace(commands=tuple(commands))


def _tests(dry: bool) -> tuple[Command, ...]:
    """Return a command per operation of the registry's tests, and one per other file with tests for a GPU."""
    shared = ("-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.gpu_day", "--maxfail", "3")
    shared += ("--most", "1") if dry else ()
    registry = ROOT / "tests" / "ops" / "test_registry.py"
    found = [Command(name, (*shared, "--operation", name, str(registry))) for name in OPS]
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        text = file.read_text()
        if file != registry and ("mark.gpu" in text or "device: torch.device" in text):
            found.append(Command(file.stem, (*shared, str(file))))
    return tuple(found)


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--operation", metavar="OP", help="only the tests of this operation of the registry")
    parser.addoption("--most", type=int, metavar="N", help="at most so many tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    if name := config.getoption("--operation"):
        items[:] = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("op") is OPS[name]]
    items[:] = items[: config.getoption("--most")]


def read_events(file: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in a command's output; a killed process's last line may be incomplete."""
    events = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
        with suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]


def unfinished(events: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """Return by number the cases that began and have no row."""
    found: dict[int, dict[str, Any]] = {}
    number = -1
    for event in events:
        if event.get("kind") == "begin":
            number = event["number"]
            found[number] = event
        elif event.get("kind") == "row":
            found.pop(number, None)
    return found


def next_case(events: Sequence[dict[str, Any]], retry: bool) -> int:
    """Return the number of the case to continue with; `retry`: the last one, if it has no row."""
    last = max((event["number"] for event in events if event.get("kind") == "begin"), default=-1)
    return last if retry and last in unfinished(events) else last + 1


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_command(command: Command, file: Path, deadline: float, processes: list[Any]) -> int | None:
    """Run until the command ends and return its exit status, or None where its time was up; append output to `file`.

    A process that died in a case is followed by one that continues after it, as long as that begins further cases.
    """
    first, died = next_case(read_events(file), retry=True), False
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    while True:
        args = [sys.executable, *command.args, *(("--first", str(first)) if command.resumes else ())]
        with file.open("ab") as out, file.with_suffix(".err").open("ab") as err:
            process = subprocess.Popen(args, stdout=out, stderr=err, cwd=ROOT, env=variables, start_new_session=True)
        processes.append(process)
        try:
            code = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None
        finally:
            kill(process)
        events = read_events(file)
        following = next_case(events, retry=False)
        if not command.resumes or following <= first or any(event.get("kind") == "end" for event in events):
            return code or int(died)
        first, died = following, True


def output_file(out: Path, part: str, command: str) -> Path:
    return out / f"{part}-{command}.out".replace(" ", "_")


def run_commands(part: Part, out: Path, limit_s: float, done: dict[str, int]) -> dict[str, Any]:
    """Run the commands without an exit status in `done` for at most `limit_s`; return the part's entry in the state."""
    start, exits, processes = time.monotonic(), dict(done), list[Any]()

    def run(command: Command) -> None:
        if time.monotonic() < start + limit_s:
            code = run_command(command, output_file(out, part.name, command.name), start + limit_s, processes)
            exits.update({} if code is None else {command.name: code})

    with ThreadPoolExecutor(part.at_once) as pool:
        try:
            list(pool.map(run, [command for command in part.commands if command.name not in exits]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in (process for process in processes if process.poll() is None):
                kill(process)
    status = "over budget" if len(exits) < len(part.commands) else "failed" if any(exits.values()) else "done"
    return {"status": status, "exit": exits, "seconds": time.monotonic() - start, "limit_s": limit_s}


def environment() -> dict[str, Any]:
    """Return GPU, driver, clocks and versions, as far as they are known."""
    failed, text = subprocess.getstatusoutput(f"timeout 20 nvidia-smi --query-gpu={QUERY} --format=csv,noheader")
    gpu = None if failed else dict(zip(QUERY.split(","), text.splitlines()[0].split(", "), strict=True))
    installed = {dist.metadata["Name"].lower(): dist.version for dist in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed} | {"python": sys.version.split()[0]}
    return {"gpu": gpu, "versions": versions, "commit": subprocess.getoutput(f"git -C '{ROOT}' rev-parse HEAD")}


def day(selected: Sequence[Part], out: Path, budget_s: float, whole_s: float) -> dict[str, Any]:
    """Run what is not done of the parts within `budget_s`, write state and report after each, and return the state.

    `whole_s`: the budgets of a full day, by which the shares are scaled.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, start = out / "state.json", time.monotonic()
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    state["before"] = environment()
    for part in selected:
        entry = state["parts"].get(part.name, {"status": "not started", "exit": {}, "seconds": 0.0, "limit_s": 0.0})
        left = budget_s - (time.monotonic() - start)
        if len(entry["exit"]) < len(part.commands) and left >= 1:
            limit = min(part.budget_s * budget_s / whole_s, left)
            print(f"{part.name}: at most {limit:.0f} s ...", end=" ", flush=True)
            entry = run_commands(part, out, limit, entry["exit"])
        print(f"{part.name}: {entry['status']} after {entry['seconds']:.0f} s", flush=True)
        state["parts"][part.name] = entry
        state["after"] = environment()
        found = results(state, out)
        texts = {"state.json": json.dumps(state, indent=1), "gpu_day.json": json.dumps(found, indent=1)}
        for name, text in {**texts, "gpu_day.md": markdown(found)}.items():
            half = (out / name).with_suffix(".part")  # whole files only, whenever the session ends
            half.write_text(text)
            half.replace(out / name)
    return state


def results(state: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return everything that is known so far."""
    found: dict[str, Any] = {**state, "tests": {"counts": {}, "failed": []}, "gpu": None, "died": [], "applied": []}
    rows: dict[str, Any] = {}
    for name, part in state["parts"].items():
        files = sorted(out.glob(output_file(out, name, "*").name))
        if name == "tests":
            found["tests"] = _test_outcomes(files)
            continue
        for file in files:
            events = read_events(file)
            ended = file.stem.removeprefix(output_file(out, name, "").stem) in part["exit"]
            found["died"] += [{"op": one["op"], "sizes": one["sizes"]} for one in unfinished(events).values() if ended]
            for event in events:
                if event.get("kind") == "gpu":
                    found["gpu"] = event
                elif event.get("kind") == "row":
                    rows.setdefault(f"{event['op']} {event['sizes']}", event)
                elif "kernels_a_layer" in event:
                    found["applied"] = event["rows"]
    return {**found, "rows": list(rows.values()), "whole_models": whole_models(list(rows.values()))}


def _test_outcomes(files: Sequence[Path]) -> dict[str, Any]:
    """Return counts of outcomes, and the names of the tests that failed or ended their process."""
    text = "\n".join(file.read_text(errors="replace") for file in files)
    outcomes = {match[1]: (match[2] or "died").lower() for match in OUTCOME.finditer(text)}
    failed = [test for test, outcome in outcomes.items() if outcome not in ("passed", "skipped")]
    return {"counts": dict(Counter(outcomes.values())), "failed": failed}


def whole_models(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return decode steps of whole models, from two depths of the same step: what a layer adds, times the layers."""
    found, steps = [], [row for row in rows if row["op"] == "decode_step"]
    for shallow, deep in combinations(sorted(steps, key=lambda row: row["sizes"]["L"]), 2):
        first, sizes = shallow["sizes"], deep["sizes"]
        if {**first, "L": 0} != {**sizes, "L": 0} or first["L"] == sizes["L"]:
            continue
        layers, before, after = FULL_LAYERS.get(sizes["H"], sizes["L"]), _step_times(shallow), _step_times(deep)
        for name in sorted(before.keys() & after.keys()):
            layer = (after[name] - before[name]) / (sizes["L"] - first["L"])
            step = before[name] + layer * (layers - first["L"])
            line = {**{letter: sizes[letter] for letter in "BSH"}, "layers": layers, "backend": name}
            found.append(line | {"layer_us": layer, "step_us": step, "tokens_per_second": sizes["B"] * 1e6 / step})
    return found


def _step_times(row: dict[str, Any]) -> dict[str, float]:
    times = {"ours": row["time_us"], "floor": row["floor_us"], "predicted": (row.get("predicted") or {}).get("time_us")}
    times |= {name: peer["time_us"] for name, peer in row["peers"].items()}
    return {name: time for name, time in times.items() if time is not None}


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    if isinstance(value, dict):  # sizes
        return " ".join(f"{name}{size}" for name, size in value.items())
    return "-" if value is None else str(value)


def _section(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a heading and a Markdown table whose columns are the keys; nothing without rows."""
    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_cell(row[key]) for key in rows[0]] for row in rows)]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _operation(row: dict[str, Any]) -> dict[str, Any]:
    predicted = row.get("predicted") or {"time_us": None, "limit": None}
    notes = [f"{name}: {one['note']}" for name, one in {"ours": row, **row["peers"]}.items() if one["note"]]
    ratios = [f"{name} {one['ratio']:.2f}" for name, one in row["peers"].items() if one["ratio"] is not None]
    times = {"time, us": row["time_us"], "predicted, us": predicted["time_us"], "limit": predicted["limit"]}
    cells = {"operation": row["op"], "sizes": row["sizes"], **times, "floor, us": row["floor_us"]}
    return {**cells, "floor / time": row["of_floor"], "peers / ours": ", ".join(ratios), "notes": "; ".join(notes)}


def markdown(found: dict[str, Any]) -> str:
    """Return the page: GPU and versions, then parts, tests, operations, whole models."""
    before, after, keys = found["before"], found["after"]["gpu"] or {}, ("status", "seconds", "limit_s")
    versions, tests = {**before["versions"], "commit": before["commit"]}, found["tests"]
    sections: dict[str, list[dict[str, Any]]] = {
        "GPU": [{"": key, "before": value, "after": after.get(key)} for key, value in (before["gpu"] or {}).items()],
        "Software": [{"package": name, "version": version} for name, version in versions.items()],
        "Parts": [{"part": name, **{key: part[key] for key in keys}} for name, part in found["parts"].items()],
        "Compiled tests": [{"outcome": outcome, "tests": count} for outcome, count in tests["counts"].items()],
        "Failed tests": [{"test": name} for name in tests["failed"]],
        "Cases that ended a process": found["died"],
        "transformers' model with `apply`": found["applied"],
        "Operations": list(map(_operation, found["rows"])),
        "Whole models": found["whole_models"],
    }
    return HEAD + "".join(_section(title, rows) for title, rows in sections.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if every part is done, 1 if one failed or exceeded its budget, 2 for bad input."""
    parser = Parser(prog="gpu_day", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; none: one in benchmarks/results")
    parser.add_argument("--parts", help="comma-separated; none: all")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for everything together")
    parser.add_argument("--dry", action="store_true", help="on a simulated GPU: measures nothing")
    parser.add_argument("--breaks", default="", metavar="KERNEL", help="with --dry: it leaves the GPU in an error")
    args = parser.parse_args(argv)
    every = parts(args.dry, args.breaks)
    names = [part.name for part in every]
    wanted = names if args.parts is None else args.parts.split(",")
    unknown, gpu = [name for name in wanted if name not in names], torch.cuda.is_available()
    for fault, message in (
        (not 0 < args.budget_s < float("inf"), f"--budget-s is {args.budget_s}, needs a number of seconds above 0"),
        (args.breaks and not args.dry, "--breaks goes with --dry alone"),
        (unknown, f"--parts has {', '.join(unknown)}, needs some of {', '.join(names)}"),
        (not args.dry and not gpu, "there is no GPU: nothing was measured; `mixtral-triton bench` needs none"),
        (not args.dry and toolchain_fault(), toolchain_fault()),
    ):
        if fault:
            parser.error(str(message))
    selected = [part for part in every if part.name in wanted]
    name = "dry" if args.dry else torch.cuda.get_device_name().lower().replace(" ", "-")
    out = args.out or ROOT / "benchmarks" / "results" / name
    state = day(selected, out, args.budget_s, sum(part.budget_s for part in every))
    print(f"results: {out / 'gpu_day.md'}")
    return 0 if all(state["parts"][part.name]["status"] == "done" for part in selected) else 1


if __name__ == "__main__":
    sys.exit(main())
