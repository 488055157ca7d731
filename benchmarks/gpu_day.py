"""Everything that needs a GPU, in one command, in under ten minutes: the compiled tests, every operation beside its
peers, an applied model, and the whole decode step beside transformers'. No network is needed.

    python benchmarks/gpu_day.py [--out benchmarks/results/NAME] [--parts tests,experts,...] [--budget-s 570]
    python benchmarks/gpu_day.py --dry     # the same road on a simulated GPU, at small sizes

Each part has a share of the budget: what overruns is killed, and what it printed until then is kept. An operation is a
process of its own: one that leaves the GPU in an error is started anew behind the case or the test that did it, and no
other operation knows. The same command again runs what is not done yet; `--again` forgets what is. OUT/gpu_day.json and
OUT/gpu_day.md hold the results so far, with GPU, clocks, driver and versions.
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
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # a script's own path holds only its folder

from benchmarks.day_parts import Command, Part, parts  # noqa: E402
from benchmarks.day_report import markdown, results, stem  # noqa: E402
from benchmarks.progress import begun, died, events  # noqa: E402

QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu,memory.total"
PACKAGES = ("mixtral-triton", "torch", "triton", "transformers", "liger-kernel", "flash-attn", "vllm")
POLL_S = 0.05


class Running:
    """A command's process, and those that follow it where it died of what it was doing."""

    def __init__(self, part: Part, command: Command, out: Path) -> None:
        self.command, self.stem = command, out / stem(part.name, command.name)
        self.exit: int | None = None
        self.lost = False
        self._start()

    def _events(self) -> list[dict[str, Any]]:
        return events(self.stem.with_suffix(".out"), self.stem.with_suffix(".jsonl"))

    def _start(self) -> None:
        self.begun = len(begun(self._events()))
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
        args = [sys.executable, *self.command.args]
        if self.command.resumes == "tests":
            args += ["--progress", str(self.stem.with_suffix(".jsonl"))]
        elif self.command.resumes == "cases":
            args += ["--first", str(self.begun)]
        with self.stem.with_suffix(".out").open("ab") as out, self.stem.with_suffix(".err").open("ab") as err:
            # A session of its own, so that what the command starts can be killed with it.
            self.process = subprocess.Popen(
                args, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True
            )

    def ended(self) -> bool:
        """Whether it is over. One that died of something that it had begun is followed by one that goes on."""
        code = self.process.poll()
        if code is None:
            return False
        self.kill()  # what it started and left
        found = self._events()
        if self.command.resumes and not finished(found) and len(begun(found)) > self.begun:
            self.lost = True
            self._start()
            return False
        self.exit = code or int(self.lost or bool(died(found)))
        return True

    def cut(self) -> None:
        """Out of time: what it is at is to be tried again."""
        self.kill()
        if self.command.resumes:
            with self.stem.with_suffix(".jsonl" if self.command.resumes == "tests" else ".out").open("a") as out:
                print("\n" + json.dumps({"kind": "cut"}), file=out)

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:  # it and all it started have ended
            return
        finally:
            self.process.wait()


def finished(found: Sequence[dict[str, Any]]) -> bool:
    return any(event.get("kind") == "end" for event in found)


def run_part(part: Part, out: Path, limit_s: float, before: dict[str, int]) -> dict[str, Any]:
    """Run the part's commands for at most `limit_s` -> its entry in the state; their output goes to files in `out`.

    `before`: exit statuses by name of the commands that came to their end in an earlier run.
    """
    start, exits = time.monotonic(), dict(before)
    waiting = [command for command in part.commands if command.name not in exits]
    running: list[Running] = []
    try:
        while (waiting or running) and time.monotonic() < start + limit_s:
            while waiting and len(running) < part.at_once:
                running.append(Running(part, waiting.pop(0), out))
            for each in [each for each in running if each.ended()]:
                running.remove(each)
                exits[each.command.name] = each.exit or 0
            time.sleep(POLL_S)
    finally:
        for each in running:
            each.cut()
    status = "over budget" if waiting or running else "failed" if any(exits.values()) else "done"
    return {"status": status, "exit": exits, "seconds": time.monotonic() - start, "limit_s": limit_s}


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


def launch_context_key() -> dict[str, Any]:
    """GPU, driver, clocks and versions, as far as the machine tells."""
    told = _asked("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader")
    gpu = None if told is None else dict(zip(QUERY.split(","), told.splitlines()[0].split(", "), strict=True))
    versions = {name: version for name in PACKAGES if (version := _version(name))}
    versions["python"] = sys.version.split()[0]
    return {"gpu": gpu, "versions": versions, "commit": _asked("git", "rev-parse", "HEAD")}


def day(chosen: Sequence[Part], out: Path, budget_s: float, whole_s: float) -> dict[str, Any]:
    """Run what of the parts is not done yet within `budget_s`, writing state and report after each -> the state.

    `whole_s`: what the parts of a full day are budgeted to take; the shares are scaled by it.
    """
    out.mkdir(parents=True, exist_ok=True)
    file, start = out / "state.json", time.monotonic()
    state: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    state["before"] = launch_context_key()
    for part in chosen:
        known = state["parts"].get(part.name, {"status": "not started", "exit": {}, "seconds": 0.0, "limit_s": 0.0})
        if len(known["exit"]) == len(part.commands):
            print(f"{part.name}: {known['status']} before", flush=True)
            continue
        left = budget_s - (time.monotonic() - start)
        share = part.budget_s * budget_s / whole_s
        if left < 1:
            state["parts"][part.name] = known
        else:
            print(f"{part.name}: at most {min(share, left):.0f} s ...", end=" ", flush=True)
            ran = run_part(part, out, min(share, left), known["exit"])
            state["parts"][part.name] = ran
            print(f"{ran['status']} after {ran['seconds']:.0f} s", flush=True)
        state["after"] = launch_context_key()
        _write(file, json.dumps(state, indent=1))
        found = results(state, out)
        _write(out / "gpu_day.json", json.dumps(found, indent=1))
        _write(out / "gpu_day.md", markdown(found))
    return state


def forget(chosen: Sequence[Part], out: Path) -> None:
    """As if the parts had never run."""
    file = out / "state.json"
    state = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
    for part in chosen:
        state["parts"].pop(part.name, None)
        for command in part.commands:
            for kind in (".out", ".err", ".jsonl"):
                (out / stem(part.name, command.name)).with_suffix(kind).unlink(missing_ok=True)
    if file.is_file():
        _write(file, json.dumps(state, indent=1))


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
    parser.add_argument("--out", type=Path, help="folder of the results; none: benchmarks/results/ and the GPU's name")
    parser.add_argument("--parts", help="comma-separated; none: all")
    parser.add_argument("--budget-s", type=float, default=570.0, help="seconds for everything together (570)")
    parser.add_argument("--again", action="store_true", help="run the parts anew, done or not")
    parser.add_argument("--dry", action="store_true", help="on a simulated GPU: the road, no measurement")
    parser.add_argument("--breaks", default="", metavar="KERNEL", help="with --dry: it leaves the GPU in an error")
    args = parser.parse_args(argv)
    if not 0 < args.budget_s < float("inf"):
        _refuse(f"--budget-s is {args.budget_s}, needs a number of seconds above 0")
    if args.breaks and not args.dry:
        _refuse("--breaks goes with --dry alone")
    every = parts(args.dry, args.breaks)
    names = [part.name for part in every] if args.parts is None else args.parts.split(",")
    if unknown := [name for name in names if name not in [part.name for part in every]]:
        _refuse(f"--parts has {unknown[0]!r}, needs some of {', '.join(part.name for part in every)}")
    chosen = [part for part in every if part.name in names]
    out = _checked_out(args)
    if args.again:
        forget(chosen, out)
    state = day(chosen, out, args.budget_s, sum(part.budget_s for part in every))
    print(f"results: {out / 'gpu_day.md'}")
    return 0 if all(state["parts"][part.name]["status"] == "done" for part in chosen) else 1


def _checked_out(args: argparse.Namespace) -> Path:
    """The folder of the results, once it is clear that there is something to run on."""
    import torch

    from mixtral_triton.tools.terminal import toolchain_fault

    results = ROOT / "benchmarks" / "results"
    if args.dry:
        return args.out or results / "dry"
    if not torch.cuda.is_available():
        _refuse("there is no GPU: nothing was measured. `mixtral-triton bench` shows what is known without one")
    if fault := toolchain_fault():
        _refuse(fault)
    gpu = (launch_context_key()["gpu"] or {}).get("name", "gpu")
    return args.out or results / gpu.lower().replace(" ", "-")


if __name__ == "__main__":
    sys.exit(main())
