"""Measure everything that needs a GPU in about ten minutes: a list of commands, each with a time limit, and a summary.

    python benchmarks/gpu_day.py [--out benchmarks/results/NAME]

OUT holds the output of each command and the summary, gpu_day.json. A command that exceeds its limit is killed, and its
output so far is kept.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton.bench.cases import BENCHED
from mixtral_triton.cli import commands as cli
from mixtral_triton.kernels.launching.arch import multiplies_fp8
from mixtral_triton.kernels.launching.launch import target_arch

ROOT, BUDGET_S = Path(__file__).resolve().parents[1], 600.0
PYTHON = shlex.quote(sys.executable)
LAYER = "T={},H=4096,I=14336,E=8,K=2"
GPU_TESTS = re.compile(r"mark\.gpu|def test_[^)]*device: torch\.device")  # in files with tests for a GPU
Commands = dict[str, tuple[float, str]]  # the limit in seconds and the command, by name


def commands(arch: str) -> Commands:
    """Return the commands in order of importance."""
    layer = "".join(f" --sizes {LAYER.format(T)}" for T in (1, 8, 64, 512, 1024, 1536, 2048, 4096))
    tuned = "".join(f" --sizes {LAYER.format(T)}" for T in (1, 24, 48, 512, 2048))
    tuned += f" --sizes {LAYER.format(2048)},gate_up=fp8_w8a8,down=fp8_w8a8" * multiplies_fp8(arch)
    tuned += "".join(f" --kernel experts_{name}" for name in ("up", "down", "up_decode", "down_decode"))

    def bench(name: str, options: str = "") -> str:
        return f"{PYTHON} -m mixtral_triton bench --json {name} {options}"

    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if GPU_TESTS.search(file.read_text())]
    tests = f"{PYTHON} -m pytest -m gpu -p no:cacheprovider --maxfail 3 -n 4"
    return {  # nothing is timed while another core compiles
        "compile": (80, f"{PYTHON} -m mixtral_triton compile expert_swiglu --arch {arch}"),
        "tune": (150, f"{PYTHON} benchmarks/tune.py expert_swiglu{tuned}"),
        "bench experts": (40, bench("expert_swiglu", layer)),
        **{f"test {file.stem}": (60, f"{tests} {file.relative_to(ROOT)}") for file in files},
        "bench decode": (60, bench("decode_step")),
        "bench decode offloaded": (20, bench("decode_step", "--sizes offload=2")),
        **{f"bench {name}": (20, bench(name)) for name in BENCHED if name != "decode_step"},
        "host": (20, f"{PYTHON} benchmarks/host_time.py"),
    }


def run(name: str, command: str, out: Path, limit_s: float) -> tuple[str, float]:
    """Run one command, and kill it with all that it started after its limit -> how it ended, and seconds."""
    file, start = out / f"{re.sub(r'[^a-z0-9]+', '_', name.lower())}.out", time.monotonic()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    with file.open("wb") as stdout, file.with_suffix(".err").open("wb") as stderr:
        output: dict[str, Any] = {"stdout": stdout, "stderr": stderr}
        process = subprocess.Popen(shlex.split(command), env=variables, cwd=ROOT, start_new_session=True, **output)
        try:
            status = process.wait(limit_s)
            return "done" if status == 0 else f"failed: {status}", time.monotonic() - start
        except subprocess.TimeoutExpired:
            return "over its limit", time.monotonic() - start
        finally:  # also after Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def day(selected: Commands, out: Path, budget_s: float = BUDGET_S) -> dict[str, Any]:
    """Run the commands within `budget_s`, write the summary after each, and return how each ended."""
    out.mkdir(parents=True, exist_ok=True)
    start, done = time.monotonic(), dict[str, Any]()
    gpus = subprocess.getoutput("nvidia-smi -L || rocm-smi --showproductname")
    for name, (limit_s, command) in selected.items():
        remaining_s = budget_s - (time.monotonic() - start)
        started = remaining_s >= 1
        status, seconds = run(name, command, out, min(limit_s, remaining_s)) if started else ("not started", 0.0)
        done[name] = {"status": status, "seconds": round(seconds, 1), "command": command}
        print(f"{name}: {status} after {seconds:.0f} s", flush=True)
        summary = {"torch": torch.__version__, "gpus": gpus, "commands": done}
        (out / "gpu_day.json").write_text(json.dumps(summary, indent=1))
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 if a command failed, 2 for bad input, else 0, even if one was over its limit."""
    parser = cli.Parser(prog="gpu_day", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; none: one in benchmarks/results")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("there is no GPU: nothing was measured")
    out = args.out or ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", torch.cuda.get_device_name().lower())
    done = day(commands(target_arch(torch.device("cuda"))), out)
    print(f"results: {out / 'gpu_day.json'}")
    return int(any(outcome["status"].startswith("failed") for outcome in done.values()))


if __name__ == "__main__":
    sys.exit(main())
