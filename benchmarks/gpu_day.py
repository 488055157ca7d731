"""Everything that needs a GPU, in one command, in under ten minutes: the compiled tests, every operation beside its
peers, and the whole decode step beside transformers'. No network is needed.

    python benchmarks/gpu_day.py [--out benchmarks/results/NAME] [--parts tests,experts,...] [--budget-s 570]

Each part is a process group with a share of the budget: one that overruns is killed, and what it printed until then is
kept. The same command again runs what is not done yet. OUT/gpu_day.json and OUT/gpu_day.md hold the results so far,
with card, clocks, driver and versions.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own path holds only its folder

from benchmarks.day_report import markdown, results  # noqa: E402

PYTHON = sys.executable
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
PACKAGES = ("mixtral-triton", "torch", "triton", "transformers", "liger-kernel", "flash-attn", "vllm")


@dataclass(frozen=True)
class Part:
    """Commands that run side by side; `budget_s`: seconds for all of them together, of the default whole."""

    name: str
    budget_s: float
    commands: tuple[tuple[str, ...], ...]


def parts() -> tuple[Part, ...]:
    """The parts of a day, what matters most first; every operation of the registry is in one of the benchmarks."""
    from mixtral_triton.kernels.registry import OPS

    processes = max(1, min(8, (os.cpu_count() or 2) // 2))
    pytest = (PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.shard")
    shards = tuple((*pytest, "--shard", f"{index}/{processes}") for index in range(processes))
    bench = (PYTHON, "-m", "mixtral_triton", "bench", "--json")
    # torch.compile takes seconds a case, and for a whole step, attention or the experts the better part of a minute.
    brief = (*bench, "--quick", "--without", "torch.compile")
    experts = tuple(name for name in OPS if name.startswith("expert"))
    cache = tuple(name for name in OPS if "attention" in name or name == "append")
    others = tuple(name for name in OPS if name not in (*experts, *cache))
    two_depths = ("decode_step", "--at", "B=1", "--at", "S=1024", "--at", "H=4096", "--without", "torch.compile")
    return (
        Part("tests", 150, shards),
        Part("experts", 90, ((*brief, *experts),)),
        Part("attention", 80, ((*brief, *cache),)),
        Part("decode", 100, ((*bench, *two_depths),)),
        Part("decode batches", 40, ((*brief, "decode_step", "--at", "L=4", "--without", "HF static cache"),)),
        Part("one token", 50, ((*bench, "--quick", "--at", "T=1", *others),)),
        Part("many tokens", 50, ((*bench, "--quick", "--at", "T=4096", *others),)),
    )


def run_part(part: Part, out: Path, limit_s: float) -> dict[str, Any]:
    """Run the part's commands for at most `limit_s` -> its entry in the state; their output goes to files in `out`."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    running = []
    for index, command in enumerate(part.commands):
        stem = out / f"{part.name.replace(' ', '_')}.{index}"
        with open(f"{stem}.out", "wb") as stdout, open(f"{stem}.err", "wb") as stderr:
            # A session of its own, so that what the command starts can be killed with it.
            running.append(
                subprocess.Popen(
                    command, stdout=stdout, stderr=stderr, cwd=ROOT, env=environment, start_new_session=True
                )
            )
    codes: list[int | None] = []
    try:
        for process in running:
            try:
                codes.append(process.wait(max(0.0, start + limit_s - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
    finally:
        for process in running:
            _kill(process)
    status = "over budget" if None in codes else "failed" if any(codes) else "done"
    return {"status": status, "exit": codes, "seconds": time.monotonic() - start, "limit_s": limit_s}


def _kill(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:  # it and all it started have ended
        return
    finally:
        process.wait()


def _asked(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def surroundings() -> dict[str, Any]:
    """Card, driver, clocks and versions, as far as the machine tells."""
    told = _asked("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    card = None if told is None else dict(zip(QUERY.split(","), told.splitlines()[0].split(", "), strict=True))
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    versions["python"] = sys.version.split()[0]
    return {"card": card, "versions": versions, "commit": _asked("git", "rev-parse", "HEAD")}


def day(chosen: Sequence[Part], out: Path, budget_s: float, whole_s: float) -> dict[str, Any]:
    """Run the parts that are not done yet within `budget_s`, writing state and report after each -> the state.

    `whole_s`: what the parts of a full day are budgeted to take; the shares are scaled by it.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, start = out / "state.json", time.monotonic()
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    state["before"] = surroundings()
    for part in chosen:
        if state["parts"].get(part.name, {}).get("status") == "done":
            print(f"{part.name}: done before", flush=True)
            continue
        left = budget_s - (time.monotonic() - start)
        share = part.budget_s * budget_s / whole_s
        if left < 1:
            state["parts"].setdefault(part.name, {"status": "not started", "exit": [], "seconds": 0.0, "limit_s": 0.0})
        else:
            print(f"{part.name}: at most {min(share, left):.0f} s ...", end=" ", flush=True)
            state["parts"][part.name] = run_part(part, out, min(share, left))
            print(
                f"{state['parts'][part.name]['status']} after {state['parts'][part.name]['seconds']:.0f} s", flush=True
            )
        state["after"] = surroundings()
        _write(file, json.dumps(state, indent=1))
        found = results(state, out)
        _write(out / "gpu_day.json", json.dumps(found, indent=1))
        _write(out / "gpu_day.md", markdown(found))
    return state


def _write(file: Path, text: str) -> None:
    """Whole or not at all, whenever the session may be cut."""
    half = file.with_suffix(".part")
    half.write_text(text)
    half.replace(file)


def _refuse(message: str) -> NoReturn:
    print(f"gpu_day: {message}", file=sys.stderr)
    raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0 if every part is done, 1 if one failed or overran, 2 for bad input."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; none: benchmarks/results/ and the card's name")
    parser.add_argument("--parts", help="comma-separated; none: all")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for everything together")
    args = parser.parse_args(argv)
    if not 0 < args.budget_s < float("inf"):
        _refuse(f"--budget-s is {args.budget_s}, needs a number of seconds above 0")
    every = parts()
    names = [part.name for part in every] if args.parts is None else args.parts.split(",")
    if unknown := [name for name in names if name not in [part.name for part in every]]:
        _refuse(f"--parts has {unknown[0]!r}, needs some of {', '.join(part.name for part in every)}")
    import torch

    if not torch.cuda.is_available():
        _refuse("there is no GPU: nothing was measured. `mixtral-triton bench` shows what is known without one")
    card = (surroundings()["card"] or {}).get("name", "gpu")
    out = args.out or ROOT / "benchmarks" / "results" / card.lower().replace(" ", "-")
    chosen = [part for part in every if part.name in names]
    state = day(chosen, out, args.budget_s, sum(part.budget_s for part in every))
    print(f"results: {out / 'gpu_day.md'}")
    return 0 if all(state["parts"][part.name]["status"] == "done" for part in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
