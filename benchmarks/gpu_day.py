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
import shlex
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own path holds only its folder
from mixtral_triton.cli import Parser
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import BENCHED
from mixtral_triton.tools.bench.peers import PEERS
from mixtral_triton.tools.bench.report import number, sizes_text
from mixtral_triton.tools.terminal import toolchain_fault

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
PACKAGES = {"mixtral-triton", "torch", "triton", "transformers", "liger_kernel", "flash_attn", "vllm"}
HEAD = """# A GPU day

A ratio above 1 means that ours is faster. Predictions follow from the GPU's data sheet and are no measurements.
Whole models are scaled: what one more layer adds, times the model's layers.
"""
FULL_LAYERS = {4096: 32, 6144: 56}  # of Mixtral 8x7B and 8x22B, by hidden size
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)?[^\S\n]*(?:\(.*|\[.*)?$", re.MULTILINE)


class Part(NamedTuple):
    """Commands for Python by name, which share `budget_s` seconds of the default whole."""

    name: str
    budget_s: float
    commands: Mapping[str, str]


def parts(dry: bool = False, breaks: str = "") -> list[Part]:
    """Return the parts in order of importance; every operation of the registry is in one of the benchmarks.

    dry: on a simulated GPU, small sizes and few tests; `breaks`: a kernel that fails on it.
    """
    experts = [name for name in OPS if name.startswith("expert")]
    cache = [name for name in OPS if "attention" in name or name == "append"]
    rest = [name for name in OPS if name not in (*experts, *cache)]
    two_depths, no_compile = "--at B=1 --at S=1024 --at H=4096", "--without torch.compile"
    eager = f"{no_compile} --without 'HF static cache'"

    def bench(names: Sequence[str], options: str) -> dict[str, str]:
        return {name: f"-m mixtral_triton bench --json {name} {_smallest(name) if dry else options}" for name in names}

    drop_in = f"benchmarks/drop_in.py --json --device cuda --rounds {'1 --small' if dry else '100'}"
    table = {
        # Nothing is timed while another core compiles.
        "compile": (90, {"all": f"-m benchmarks.compile_ahead {'--most 4' if dry else ''}"}),
        "tests": (110, _tests("--most 1" if dry else "")),
        "experts": (90, bench(experts, f"--quick {no_compile}")),
        "attention": (70, bench(cache, f"--quick {no_compile}")),
        # torch.compile may leave a GPU in a state that disturbs timing: ours and eager transformers run before it.
        "decode": (60, bench(["decode_step"], f"{two_depths} {eager}")),
        "decode batches": (30, bench(["decode_step"], f"--quick --at L=4 {eager}")),
        "applied": (40, {"drop_in": drop_in}),
        "decode compiled": (40, bench(["decode_step"], f"{two_depths} {no_compile}")),
        "one token": (30, bench(rest, "--quick --at T=1")),
        "many tokens": (30, bench(rest, "--quick --at T=4096")),
    }
    found = [Part(name, budget_s, commands) for name, (budget_s, commands) in table.items()]
    if not dry:
        return found
    stub = "-m tests.support.stub" + (f" --breaks {breaks}" if breaks else "")

    def on_stub(command: str) -> str:  # kernels compute only where results are checked, since that takes long
        return f"{stub} {'--executes' if re.search(' bench | pytest ', command) else ''} {command}"

    return [part._replace(commands={name: on_stub(text) for name, text in part.commands.items()}) for part in found]


def _smallest(name: str) -> str:
    """Return options for the smallest sizes that the tests run, with plain torch as the only peer."""
    op = BENCHED[name]
    shape = Shape(min(op.test_shapes, key=lambda sizes: op.cost(sizes, op.dtypes[0]).bytes))
    without = (f"--without {shlex.quote(name)}" for name in {peer.name for peer in PEERS} - {"torch"})
    return f"--sizes {','.join(f'{letter}={size}' for letter, size in shape.as_dict().items())} {' '.join(without)}"


def _tests(options: str) -> dict[str, str]:
    """Return a command per operation of the registry's tests, and one per other file with tests for a GPU."""
    pytest = f"-m pytest -v -m gpu -p no:cacheprovider -p benchmarks.gpu_day --maxfail 3 {options}"
    registry = "tests/ops/test_registry.py"
    found = {name: f"{pytest} --operation {name} {registry}" for name in OPS}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        path, text = str(file.relative_to(ROOT)), file.read_text()
        if path != registry and ("mark.gpu" in text or "device: torch.device" in text):
            found[file.stem] = f"{pytest} {path}"
    return found


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


def progress(events: Sequence[dict[str, Any]]) -> tuple[int, dict[int, dict[str, Any]]]:
    """Return the number of the last case that began (-1: none did) and, by number, those that have no row."""
    last, unfinished = -1, {}
    for event in events:
        if event.get("kind") == "begin":
            last = event["number"]
            unfinished[last] = event
        elif event.get("kind") == "row":
            unfinished.pop(last, None)
    return last, unfinished


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_command(command: str, file: Path, deadline: float, processes: list[Any]) -> int | None:
    """Run until the command ends and return its exit status, or None where its time was up; append output to `file`.

    A benchmark that died in a case is followed by one that continues after it, as long as that begins further cases.
    """
    last, unfinished = progress(read_events(file))
    first, died = last + (last not in unfinished), False
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    resumes = " bench " in command
    while True:
        args = [sys.executable, *shlex.split(command), *(("--first", str(first)) if resumes else ())]
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
        last, _ = progress(events)
        if not resumes or last < first or any(event.get("kind") == "end" for event in events):
            return code or int(died)
        first, died = last + 1, True


def output_file(out: Path, part: str, command: str) -> Path:
    return out / f"{part}-{command}.out".replace(" ", "_")


def run_part(part: Part, out: Path, limit_s: float, done: Mapping[str, int]) -> dict[str, Any]:
    """Run the commands without an exit status in `done` for at most `limit_s`; return the part's entry in the state."""
    start, exits, processes = time.monotonic(), dict(done), list[Any]()

    def run(name: str) -> None:
        if time.monotonic() < start + limit_s:
            file = output_file(out, part.name, name)
            code = run_command(part.commands[name], file, start + limit_s, processes)
            exits.update({} if code is None else {name: code})

    workers = max(1, min(8, (os.cpu_count() or 2) // 2)) if part.name == "tests" else 1  # what is timed runs alone
    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(run, [name for name in part.commands if name not in exits]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in (process for process in processes if process.poll() is None):
                kill(process)
    status = "over budget" if len(exits) < len(part.commands) else "failed" if any(exits.values()) else "done"
    return {"status": status, "exit": exits, "seconds": time.monotonic() - start, "limit_s": limit_s}


def environment() -> dict[str, str]:
    """Return GPU and clocks, versions and commit, as far as they are known."""
    failed, gpu = subprocess.getstatusoutput(f"timeout 20 nvidia-smi --query-gpu={QUERY} --format=csv,noheader")
    versions = [f"{dist.name} {dist.version}" for dist in metadata.distributions() if dist.name in PACKAGES]
    commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse HEAD")
    return {"gpu": "unknown" if failed else gpu, "versions": ", ".join(sorted(versions)), "commit": commit}


def day(selected: Sequence[Part], out: Path, budget_s: float) -> dict[str, Any]:
    """Run what is not done of the parts within `budget_s`, write the results after each part, and return them."""
    out.mkdir(parents=True, exist_ok=True)
    file, start = out / "gpu_day.json", time.monotonic()
    state = {"parts": json.loads(file.read_text())["parts"] if file.is_file() else {}, "before": environment()}
    for part in selected:
        entry = state["parts"].get(part.name, {"status": "not started", "exit": {}, "seconds": 0.0, "limit_s": 0.0})
        left = budget_s - (time.monotonic() - start)
        if len(entry["exit"]) < len(part.commands) and left >= 1:
            limit = min(part.budget_s, left)
            print(f"{part.name}: at most {limit:.0f} s ...", end=" ", flush=True)
            entry = run_part(part, out, limit, entry["exit"])
        print(f"{part.name}: {entry['status']} after {entry['seconds']:.0f} s", flush=True)
        state["parts"][part.name] = entry
        found = {**state, "after": environment(), **results(state["parts"], out)}
        for name, text in {"gpu_day.json": json.dumps(found, indent=1), "gpu_day.md": markdown(found)}.items():
            half = (out / name).with_suffix(".part")  # whole files only, whenever the session ends
            half.write_text(text)
            half.replace(out / name)
    return state


def results(done: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """Return tests by outcome, rows of the benchmarks, cases that ended their process, and what follows from them."""
    tests: dict[str, str] = {}
    rows: dict[str, Any] = {}
    died, applied = [], []
    for name, part in done.items():
        for file in sorted(out.glob(output_file(out, name, "*").name)):
            matches = OUTCOME.finditer(file.read_text(errors="replace")) if name == "tests" else ()
            tests |= {match[1]: (match[2] or "died").lower() for match in matches}
            events = read_events(file)
            if file.stem.removeprefix(output_file(out, name, "").stem) in part["exit"]:
                died += [{"op": one["op"], "sizes": one["sizes"]} for one in progress(events)[1].values()]
            for event in events:
                if event.get("kind") == "row":
                    rows.setdefault(f"{event['op']} {event['sizes']}", event)
                elif "kernels_a_layer" in event:
                    applied = event["rows"]
    failed = [test for test, outcome in tests.items() if outcome not in ("passed", "skipped")]
    found = {"tests": {"counts": Counter(tests.values()), "failed": failed}, "rows": list(rows.values())}
    return {**found, "died": died, "applied": applied, "whole_models": whole_models(found["rows"])}


def whole_models(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return decode steps of whole models, from two depths of the same step: what a layer adds, times the layers."""
    found, steps = [], [row for row in rows if row["op"] == "decode_step"]
    for shallow, deep in combinations(sorted(steps, key=lambda row: row["sizes"]["L"]), 2):
        first, sizes = shallow["sizes"], deep["sizes"]
        if first["L"] == sizes["L"] or {**first, "L": 0} != {**sizes, "L": 0}:
            continue
        layers = FULL_LAYERS.get(sizes["H"], sizes["L"])
        for name, after in {"ours": deep, **deep["peers"]}.items():
            before = {"ours": shallow, **shallow["peers"]}.get(name, {"time_us": None})
            if None not in (before["time_us"], after["time_us"]):
                layer = (after["time_us"] - before["time_us"]) / (sizes["L"] - first["L"])
                step = before["time_us"] + layer * (layers - first["L"])
                line = {**{letter: sizes[letter] for letter in "BSH"}, "layers": layers, "backend": name}
                found.append(line | {"layer_us": layer, "step_us": step, "tokens_per_second": sizes["B"] * 1e6 / step})
    return found


def _section(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a heading and a Markdown table whose columns are the keys; nothing without rows."""

    def cell(value: Any) -> str:
        return number(value) if isinstance(value, (float, type(None))) else str(value)

    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _operation(row: dict[str, Any]) -> dict[str, Any]:
    predicted = row.get("predicted") or {"time_us": None, "limit": None}
    notes = [f"{name}: {one['note']}" for name, one in {"ours": row, **row["peers"]}.items() if one["note"]]
    ratios = [f"{name} {one['ratio']:.2f}" for name, one in row["peers"].items() if one["ratio"] is not None]
    times = {"time, us": row["time_us"], "predicted, us": predicted["time_us"], "limit": predicted["limit"]}
    cells = {"operation": row["op"], "sizes": sizes_text(row["sizes"]), **times, "floor, us": row["floor_us"]}
    return {**cells, "floor / time": row["of_floor"], "peers / ours": ", ".join(ratios), "notes": "; ".join(notes)}


def markdown(found: dict[str, Any]) -> str:
    """Return the page: GPU and versions, then parts, tests, operations, whole models."""
    lines = {f"GPU, {when}": found[when]["gpu"] for when in ("before", "after")}
    lines |= {"versions": found["before"]["versions"], "commit": found["before"]["commit"]}
    keys = ("status", "seconds", "limit_s")
    sections: dict[str, list[dict[str, Any]]] = {
        "Setup": [{"": name, QUERY: text} for name, text in lines.items()],
        "Parts": [{"part": name, **{key: part[key] for key in keys}} for name, part in found["parts"].items()],
        "Compiled tests": [{"outcome": outcome, "tests": n} for outcome, n in found["tests"]["counts"].items()],
        "Failed tests": [{"test": name} for name in found["tests"]["failed"]],
        "Cases that ended a process": [{**one, "sizes": sizes_text(one["sizes"])} for one in found["died"]],
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
    unknown = [name for name in wanted if name not in names]
    for fault, message in (
        (not 0 < args.budget_s < float("inf"), f"--budget-s is {args.budget_s}, needs a number of seconds above 0"),
        (args.breaks and not args.dry, "--breaks goes with --dry alone"),
        (unknown, f"--parts has {', '.join(unknown)}, needs some of {', '.join(names)}"),
        (not args.dry and not torch.cuda.is_available(), "there is no GPU: nothing was measured"),
        (not args.dry and toolchain_fault(), toolchain_fault()),
    ):
        if fault:
            parser.error(str(message))
    scale = args.budget_s / sum(part.budget_s for part in every)
    selected = [part._replace(budget_s=scale * part.budget_s) for part in every if part.name in wanted]
    name = "dry" if args.dry else torch.cuda.get_device_name().lower().replace(" ", "-")
    out = args.out or ROOT / "benchmarks" / "results" / name
    done = day(selected, out, args.budget_s)["parts"]
    print(f"results: {out / 'gpu_day.md'}")
    return 0 if all(done[part.name]["status"] == "done" for part in selected) else 1


if __name__ == "__main__":
    sys.exit(main())
