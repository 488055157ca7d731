"""Measure everything that needs a GPU in under ten minutes: tests, operations and their peers, rates, models, decode.

    python benchmarks/gpu_day.py [--out benchmarks/results/NAME] [--parts tests experts ...] [--budget-s 570]
    python benchmarks/gpu_day.py --dry     # all parts on a simulated GPU, at small sizes

Each part has a share of the budget. One that exceeds it is killed, and its output so far is kept. Each operation has a
process: one that leaves the GPU in an error ends no other. The same command again runs what is not done.
OUT/gpu_day.json and OUT/gpu_day.md hold the results. No network is needed.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton.cli import Parser
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import BENCHED, QUANTIZED, Case
from mixtral_triton.tools.bench.peers import PEERS
from mixtral_triton.tools.bench.report import number, sizes_text
from mixtral_triton.tools.terminal import toolchain_fault

ROOT, BUDGET_S = Path(__file__).resolve().parents[1], 570.0
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
PACKAGES = {"mixtral-triton", "torch", "triton", "transformers", "liger_kernel", "flash_attn", "vllm"}
GPU_TESTS = re.compile(r"mark\.gpu|def test_[^)]*device: torch\.device")  # in files with tests for a GPU
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)?[^\S\n]*(?:\(.*|\[.*)?$", re.MULTILINE)
HEAD = """# A GPU day

A ratio above 1 means that ours is faster. Predictions follow from the GPU's data sheet and are no measurements.
Two depths of one decode step give the time of a layer.
"""
Part = tuple[float, dict[str, str]]  # seconds of BUDGET_S, and commands for Python by name, which share them


def parts(dry: bool = False, breaks: str = "") -> dict[str, Part]:
    """Return the parts in order of importance; every operation of the registry is in one of the benchmarks.

    dry: on a simulated GPU, small sizes and few tests; `breaks`: a kernel that fails on it.
    """
    experts = [name for name in OPS if name.startswith("expert")]
    cache = [name for name in OPS if "attention" in name or name == "append"]
    rest = [name for name in OPS if name not in (*experts, *cache)]
    two_depths, no_compile = "--at B=1 --at S=1024 --at H=4096", "--without torch.compile"
    eager = f"{no_compile} --without 'HF static cache'"
    prefix = f"-m tests.support.stub {breaks and f'--breaks {breaks}'} " if dry else ""
    computes = f"{prefix}--executes " if dry else ""  # results are checked; kernels take long on a simulated GPU

    def bench(names: Sequence[str], options: str, more: str = "") -> dict[str, str]:
        command = f"{computes}-m mixtral_triton bench --json"
        return {name: f"{command} {name} {_smallest(name) if dry else options} {more}" for name in names}

    small = "--small" if dry else ""
    launcher = "-m torch.distributed.run --nproc-per-node 2 -m mixtral_triton"
    on_two = {"verify": f"{launcher} verify --tp 2", "generate": f"{launcher} generate --tp 2 --prompt The"}
    layer = "".join(f" --sizes T={T},H=4096,I=14336,E=8,K=2" for T in (1, 8, 64, 512, 1024, 1536, 2048, 4096))
    return {
        # Nothing is timed while another core compiles.
        "compile": (80, {"compile": f"{prefix}-m benchmarks.gpu_checks compile {small}"}),
        "experts in bf16": (40, bench(["expert_swiglu"], f"{layer} {no_compile}")),
        "rates": (15, {"rates": f"{computes}-m benchmarks.gpu_checks rates {small}"}),
        "tests": (90, _tests(computes, first=dry)),
        "experts": (45, bench(experts, f"--quick {no_compile}")),
        "attention": (55, bench(cache, f"--quick {no_compile}")),
        # torch.compile may leave a GPU in a state that disturbs timing: ours and eager transformers run before it.
        "decode": (70, bench(["decode_step"], f"{two_depths} {eager}")),
        "prefetch": (10, {"prefetch": f"{computes}-m benchmarks.gpu_checks prefetch {small}"}),
        "decode batches": (40, bench(["decode_step"], f"--quick --at L=4 {eager}")),
        "decode offloaded": (15, bench(["decode_step"], f"{two_depths} {eager}", "--offload 2")),
        "decode compiled": (35, bench(["decode_step"], f"{two_depths} {no_compile}")),
        "one token": (20, bench(rest, "--quick --at T=1")),
        "many tokens": (20, bench(rest[: 1 if dry else None], "--quick --at T=4096")),
        "sanitizer": (30, {"sanitizer": f"{prefix}-m benchmarks.gpu_checks sanitizer {small}"}),
        "host": (15, {"host_time": f"benchmarks/host_time.py --json --rounds {1 if dry else 40}"}),
        **({"two GPUs": (25, on_two)} if torch.cuda.device_count() > 1 and not dry else {}),
    }


def _smallest(name: str) -> str:
    """Return options for the smallest dense sizes that the tests run, with plain torch as the only peer."""
    op = BENCHED[name]
    dense = [shape for shape in op.test_shapes if not QUANTIZED & shape.keys()]
    sizes = Case(op, min(dense, key=lambda sizes: op.cost(sizes, op.dtypes[0]).flops)).as_dict()
    without = [f"--without '{name}'" for name in {peer.name for peer in PEERS} - {"torch"}]
    return " ".join(["--sizes", ",".join(f"{letter}={size}" for letter, size in sizes.items()), *without])


def _tests(computes: str, first: bool) -> dict[str, str]:
    """Return a command per operation of the registry's tests, and one per other file with tests for a GPU; `first`:
    one test of each function, on a simulated GPU."""
    command, registry = f"{computes}-m pytest -v -m gpu -p no:cacheprovider --maxfail 3", "tests/ops/test_registry.py"
    command += " --first" * first
    found = {name: f"{command} {registry} -k=-{name}-" for name in OPS}
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        if file.stem != "test_registry" and GPU_TESTS.search(file.read_text()):
            found[file.stem] = f"{command} {file.relative_to(ROOT)}"
    return found


def read_events(file: Path) -> list[dict[str, Any]]:
    """Return the JSON objects in a command's output; the last line may be incomplete."""
    events = []
    for line in file.read_text(errors="replace").splitlines():
        with suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return [event for event in events if isinstance(event, dict)]


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill the process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_command(command: str, file: Path, deadline: float, processes: list[Any]) -> int | None:
    """Run until the command ends and return its exit status, or None where its time was up; its output is in `file`."""
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    args = [sys.executable, *shlex.split(command)]
    with file.open("wb") as out, file.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(args, stdout=out, stderr=err, cwd=ROOT, env=variables, start_new_session=True)
    processes.append(process)
    try:
        return process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return None
    finally:
        kill(process)


def run_part(part: str, commands: dict[str, str], out: Path, limit_s: float, done: dict[str, int]) -> dict[str, Any]:
    """Run the commands without an exit status in `done` for at most `limit_s`, and return the part's entry."""
    start, exits, processes = time.monotonic(), dict(done), list[Any]()

    def run(name: str) -> None:
        if time.monotonic() < start + limit_s:
            file = out / f"{part}-{name}.out".replace(" ", "_")
            code = run_command(commands[name], file, start + limit_s, processes)
            exits.update({} if code is None else {name: code})

    workers = max(1, min(8, (os.cpu_count() or 2) // 2)) if part == "tests" else 1  # what is timed runs alone
    with ThreadPoolExecutor(workers) as pool:
        try:
            list(pool.map(run, [name for name in commands if name not in exits]))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in (process for process in processes if process.poll() is None):
                kill(process)
    status = "over budget" if len(exits) < len(commands) else "failed" if any(exits.values()) else "done"
    return {"status": status, "seconds": time.monotonic() - start, "limit_s": limit_s, "exit": exits}


def environment() -> list[str]:
    """Return versions and commit, then the GPU and its clocks."""
    versions = sorted({f"{dist.name} {dist.version}" for dist in metadata.distributions() if dist.name in PACKAGES})
    commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse HEAD")
    gpu = subprocess.getoutput(f"timeout 20 nvidia-smi --query-gpu={QUERY} --format=csv,noheader")
    return [f"{', '.join(versions)}, commit {commit}", gpu]


def day(selected: dict[str, Part], out: Path, budget_s: float) -> dict[str, Any]:
    """Run what is not done of the parts within `budget_s`, write the results after each, and return their entries."""
    out.mkdir(parents=True, exist_ok=True)
    file, start, setup = out / "gpu_day.json", time.monotonic(), environment()
    done: dict[str, Any] = json.loads(file.read_text())["parts"] if file.is_file() else {}
    print(f"parts: {', '.join(selected)}", flush=True)
    for part, (share_s, commands) in selected.items():
        entry = done.get(part, {"status": "not started", "seconds": 0.0, "limit_s": 0.0, "exit": {}})
        left = budget_s - (time.monotonic() - start)
        if len(entry["exit"]) < len(commands) and left >= 1:
            entry = run_part(part, commands, out, min(share_s * budget_s / BUDGET_S, left), entry["exit"])
        print(f"{part}: {entry['status']} after {entry['seconds']:.0f} s", flush=True)
        done[part] = entry
        found = {"setup": [*setup, environment()[1]], "parts": done, **results(done, out)}
        (out / "gpu_day.md").write_text(markdown(found))
        half = file.with_suffix(".part")  # the next run reads a whole file, whenever the session ends
        half.write_text(json.dumps(found, indent=1))
        half.replace(file)
    return done


def results(done: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return tests by outcome, rows of the benchmarks, and what the scripts and checks print."""
    found: dict[str, Any] = {"tests": {}, "rows": [], "host": [], "checks": []}
    for part in done:
        for file in sorted(out.glob(f"{part}-*.out".replace(" ", "_"))):
            if part == "tests":
                matches = OUTCOME.finditer(file.read_text(errors="replace"))
                found["tests"] |= {match[1]: (match[2] or "died").lower() for match in matches}
            for event in read_events(file):
                if event.get("kind") == "row":
                    found["rows"].append(event)
                elif event.get("kind") == "check":
                    figures = [(name, value) for name, value in event.items() if name not in ("kind", "check")]
                    found["checks"] += [{"check": event["check"], "": name, "value": value} for name, value in figures]
                elif "plain_launch_us" in event:
                    found["host"] = event["rows"]
    return found


def _section(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Return a heading and a Markdown table whose columns are the keys; nothing without rows."""

    def cell(value: Any) -> str:
        return sizes_text(value) if isinstance(value, dict) else value if isinstance(value, str) else number(value)

    if not rows:
        return ""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(cell, row.values()) for row in rows)]
    return f"\n## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _operation(row: dict[str, Any]) -> dict[str, Any]:
    notes = [f"{name}: {one['note']}" for name, one in {"ours": row, **row["peers"]}.items() if one["note"]]
    ratios = [f"{name} {one['ratio']:.2f}" for name, one in row["peers"].items() if one["ratio"] is not None]
    cells = {name: row[name] for name in ("op", "sizes", "time_us", "floor_us", "of_floor")}
    cells |= {"predicted_us": (row["predicted"] or {}).get("time_us"), "peers / ours": ", ".join(ratios)}
    return {**cells, "notes": "; ".join(notes)}


def markdown(found: dict[str, Any]) -> str:
    """Return the page: GPU and versions, then parts, tests, operations."""
    tests = found["tests"]
    sections: dict[str, list[dict[str, Any]]] = {
        "Parts, and exit status by command": [{"part": name, **part} for name, part in found["parts"].items()],
        "Compiled tests": [dict(Counter(tests.values()))] if tests else [],
        "Failed tests": [{"test": test, "": end} for test, end in tests.items() if end not in ("passed", "skipped")],
        "Checks, and what the cost model estimates": found["checks"],
        "The host's part of a decode layer": found["host"],
        "Operations": list(map(_operation, found["rows"])),
    }
    page = HEAD + "\n".join(["", *found["setup"], f"({QUERY}: before and after)", ""])
    return page + "".join(_section(title, rows) for title, rows in sections.items())


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0 if every part is done, 1 if one failed or exceeded its budget, 2 for bad input."""
    names = list(parts())
    parser = Parser(prog="gpu_day", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; none: one in benchmarks/results")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help="none: all")
    parser.add_argument("--budget-s", type=float, default=BUDGET_S, help="seconds for everything together")
    text = "on a simulated GPU, which measures nothing; KERNEL: one that leaves it in an error"
    parser.add_argument("--dry", nargs="?", const="", metavar="KERNEL", help=text)
    args = parser.parse_args(argv)
    fault = toolchain_fault() if torch.cuda.is_available() else "there is no GPU: nothing was measured"
    if fault and args.dry is None:
        parser.error(fault)
    every = parts(args.dry is not None, args.dry or "")
    name = "dry" if args.dry is not None else torch.cuda.get_device_name().lower().replace(" ", "-")
    out = args.out or ROOT / "benchmarks" / "results" / name
    done = day({name: every[name] for name in names if name in args.parts}, out, args.budget_s)
    print(f"results: {out / 'gpu_day.md'}")
    return 0 if all(done[name]["status"] == "done" for name in args.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
