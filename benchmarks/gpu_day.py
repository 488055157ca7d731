"""Measure what needs a GPU, in the order of what is learned: steps with a time limit each, a summary, and a page.

    python benchmarks/gpu_day.py [--minutes 10 | 30 | 60] [--out benchmarks/results/NAME] [--dry]

OUT holds the output of each step and the summary, gpu_day.json, which is written after each. A step that fails or
exceeds its limit does not stop the next, and its output so far is kept. docs/measured has the page at the end.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from benchmarks.measured import write_page
from mixtral_triton.bench.cases import BENCHED, Case, cases
from mixtral_triton.bench.command import sizes_text
from mixtral_triton.cli import commands as cli
from mixtral_triton.kernels.launching.arch import multiplies_fp8
from mixtral_triton.kernels.launching.launch import target_arch
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.model.precompile import compile_launches
from mixtral_triton.terminal import Bar

ROOT, MINUTES = Path(__file__).resolve().parents[1], (10, 30, 60)
PYTHON = shlex.quote(sys.executable)
BENCH = "-m mixtral_triton bench --json"
TUNE = f"{PYTHON} benchmarks/tune.py"
TESTS = f"{PYTHON} -m pytest -q -m gpu -p no:cacheprovider --maxfail 3 -n 4"
STORED, SMALLER = "", " --weights experts=int4,linear=int8"
# Sizes of an expert layer, and the formats of its weights.
MIXTRAL, QWEN3 = "H=4096,I=14336,E=8,K=2", "H=2048,I=768,E=128,K=8"
INT4 = ",gate_up=int4,down=int4"
TOKENS = 1, 8, 64, 512, 4096
GRAPHS = "tests/model/test_graph.py tests/model/test_on_gpu.py tests/model/test_offload_on_gpu.py tests/ops/test_pdl.py"
GRAPHS += " tests/ops/test_offload.py"
OTHER_TESTS = {"ops": 600, "model": 240, "compile": 120, "verify": 240, "tools": 60, "parallel": 60}  # and seconds
# A checkpoint of random weights as transformers writes it.
QWEN3_FOLDER = """
import sys, torch
from transformers import AutoModelForCausalLM
from examples.qwen3 import TINY
AutoModelForCausalLM.from_config(TINY, dtype=torch.bfloat16).save_pretrained(sys.argv[1])
from mixtral_triton.cli.commands import main
sys.exit(main(["verify", sys.argv[1]]))"""


@dataclass(frozen=True)
class Step:
    """question  what the step decides
    limit_s   seconds after which it is killed
    least     the fewest --minutes with which it runs
    """

    name: str
    question: str
    limit_s: float
    command: str
    least: int = 30


def bench_step(name: str, question: str, limit_s: float, options: str, least: int = 30) -> Step:
    return Step(f"bench {name}", question, limit_s, f"{PYTHON} {BENCH} {options}", least)


def sizes_of(names: Sequence[str], *formats: str) -> str:
    """Return the options of an operation on a layer of Mixtral and of Qwen3-30B-A3B: its letters beside T."""
    options = []
    for layer in (MIXTRAL, QWEN3):
        kept = ",".join(size for size in layer.split(",") if size[0] in names)
        options += [f"--sizes T={T},{kept}{format}" for format in ("", *formats) for T in TOKENS]
    return " ".join(options)


def steps(arch: str, out: Path, minutes: int) -> list[Step]:
    """Return the steps of so many minutes in their order. Nothing is timed while another core compiles."""
    tuned = "".join(f" --sizes T={T},{MIXTRAL}" for T in (1, 24, 48, 512, 2048))
    tuned += f" --sizes T=2048,{MIXTRAL},gate_up=fp8_w8a8,down=fp8_w8a8" * multiplies_fp8(arch)
    tuned += "".join(f" --kernel experts_{name}" for name in ("up", "down", "up_decode", "down_decode"))
    ignored = " ".join(f"--ignore {file}" for file in GRAPHS.split())
    qwen3 = f"{PYTHON} -c {shlex.quote(QWEN3_FOLDER)} {shlex.quote(str(out / 'qwen3'))}"
    ours, layer = "whether every operation and layer is right on this GPU", "on a layer of Mixtral and of Qwen3-30B-A3B"
    all_steps = [
        Step("verify", ours, 120, f"{PYTHON} -m mixtral_triton verify", 10),
        Step("verify Qwen3-MoE", "the same of a checkpoint that transformers writes", 60, qwen3, 10),
        Step("test graphs", "graphs, dependent launches and pinned memory", 120, f"{TESTS} {GRAPHS}"),
        Step("test transformers", "apply, names, quantizers, training", 240, f"{TESTS} tests/hf tests/quantize"),
        *(
            bench_step(
                f"decode {model}{', int4' if weights else ''}",
                "a decode step beside its floor",
                40,
                f"decode_step --model {model}{weights}",
                10 if model != "olmoe-1b-7b" and (weights or model == "qwen3-30b-a3b") else 30,
            )
            for model in ("mixtral-8x7b", "qwen3-30b-a3b", "olmoe-1b-7b")
            for weights in (STORED, SMALLER)
        ),
        bench_step("experts", f"experts {layer}", 90, f"expert_swiglu {sizes_of('HIEK', INT4)}", 10),
        bench_step("gate", f"norm and router {layer}", 30, f"rms_norm_gate_route {sizes_of('HEK')}", 10),
        bench_step("backward", f"the backward pass {layer}", 60, f"expert_swiglu_backward {sizes_of('HIEK', INT4)}"),
        bench_step("gather", f"the sort of slots {layer}", 20, f"sort_by_expert {sizes_of('EK')}"),
        Step("host", "what a layer costs outside a graph", 60, f"{PYTHON} benchmarks/host_time.py"),
        Step("tune", "which neighbours of the tiles are faster", 300, f"{TUNE} expert_swiglu{tuned}"),
        bench_step("decode offloaded", "what the link costs", 20, "decode_step --sizes offload=2", 60),
        *(bench_step(name, "its sizes of other models", 20, name, 60) for name in BENCHED if name != "decode_step"),
        *(
            Step(f"test {folder}", "its tests for a GPU", limit_s, f"{TESTS} {ignored} tests/{folder}", 60)
            for folder, limit_s in OTHER_TESTS.items()
        ),
    ]
    selected = [step for step in all_steps if step.least <= minutes]
    compiling = f"{PYTHON} benchmarks/gpu_day.py --compile --minutes {minutes}"
    return [Step("compile", "whether every kernel of the steps compiles", 180, compiling, 10), *selected]


def benched(selected: Sequence[Step]) -> list[Case]:
    """Return the cases of the steps that time operations."""
    texts = [step.command.partition(BENCH)[2] for step in selected if BENCH in step.command]
    options = [cli.parser().parse_args(["bench", *shlex.split(text)]) for text in texts]
    return [case for args in options for case in cases(args.ops, args.sizes, None, args.model, args.weights)]


def compile_kernels(selected: Sequence[Step], arch: str) -> int:
    """Compile what the steps will time into Triton's cache, on all cores -> exit status: 1 where a kernel does not."""
    found = benched(selected)
    with Bar("recording launches", len(found)) as progress, torch.no_grad(), record_launches(arch) as launches:
        for case in found:
            case.op.run(**case.inputs(torch.device("meta")))
            progress.update(1)
    with Bar("compiling") as progress:
        results = compile_launches((x for x in launches if x.fn is not None), arch, progress.set)
    faults = [result for result in results if isinstance(result, Exception)]
    print(f"{len(results)} kernels for {arch}, {len(faults)} do not compile{''.join(f'; {x}' for x in faults[:3])}")
    return int(bool(faults))


def file_of(step: Step, out: Path) -> Path:
    return out / f"{re.sub(r'[^a-z0-9]+', '_', step.name.lower())}.out"


def run(step: Step, out: Path, limit_s: float) -> tuple[str, float]:
    """Run one step, and kill it with all that it started after its limit -> how it ended, and seconds."""
    file, start = file_of(step, out), time.monotonic()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    with file.open("wb") as stdout, file.with_suffix(".err").open("wb") as stderr:
        streams: dict[str, Any] = {"stdout": stdout, "stderr": None if step.name == "compile" else stderr}  # its bar
        process = subprocess.Popen(
            shlex.split(step.command), env=variables, cwd=ROOT, start_new_session=True, **streams
        )
        try:
            status = process.wait(limit_s)
            return "done" if status == 0 else f"failed: {status}", time.monotonic() - start
        except subprocess.TimeoutExpired:
            return "over its limit", time.monotonic() - start
        finally:  # also after Ctrl-C
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finding(output: str) -> str:
    """Return what a step's output decides: of a bench the case farthest from its floor, else the last line."""
    lines = [line for line in output.splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines if line.startswith('{"kind": "row"') and line.endswith("}")]
    timed = [row for row in rows if row["time_us"]]
    if not timed:
        wrong = [row for row in rows if row["right"] is False]
        return f"nothing was timed: {wrong[0]['note']}" if wrong else lines[-1].strip() if lines else "no output"
    worst = max(timed, key=lambda row: row["time_us"] / row["floor_us"])
    at, times = sizes_text(worst["sizes"]), worst["time_us"] / worst["floor_us"]
    return f"{worst['op']} at {at} takes {times:.1f} times its floor, the most of {len(timed)} of {len(rows)} cases"


def day(selected: Sequence[Step], out: Path, budget_s: float) -> dict[str, Any]:
    """Run the steps within `budget_s`, write the summary after each, and return how each ended."""
    out.mkdir(parents=True, exist_ok=True)
    start, done = time.monotonic(), dict[str, Any]()
    gpus = subprocess.getoutput("nvidia-smi -L || rocm-smi --showproductname")
    for step in selected:
        remaining_s = budget_s - (time.monotonic() - start)
        started = remaining_s >= 1
        status, seconds = run(step, out, min(step.limit_s, remaining_s)) if started else ("not started", 0.0)
        found = finding(file_of(step, out).read_text(errors="replace")) if started else ""
        done[step.name] = {"status": status, "seconds": round(seconds, 1), "finding": found, "command": step.command}
        print(f"{step.name}: {status} after {seconds:.0f} s. {found}", flush=True)
        summary = {"torch": torch.__version__, "gpus": gpus, "steps": done}
        (out / "gpu_day.json").write_text(json.dumps(summary, indent=1))
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 if a step failed, 2 for bad input, else 0, even if one was over its limit."""
    parser = cli.Parser(prog="gpu_day", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; none: one in benchmarks/results")
    parser.add_argument("--minutes", type=int, choices=MINUTES, default=30, help="how much to measure; default: 30")
    parser.add_argument("--dry", action="store_true", help="list the steps, and run none")
    parser.add_argument("--compile", action="store_true", help="compile what the steps time, and run none")
    args = parser.parse_args(argv)
    gpu = torch.cuda.is_available()
    if not (gpu or args.dry or args.compile):
        parser.error("there is no GPU: nothing was measured")
    arch, name = (target_arch(torch.device("cuda")), torch.cuda.get_device_name()) if gpu else ("sm_90", "none")
    out = args.out or ROOT / "benchmarks" / "results" / re.sub(r"\W+", "-", name.lower())
    selected = steps(arch, out, args.minutes)
    if args.compile:
        return compile_kernels(selected, arch)
    if args.dry:
        for step in selected:
            print(f"{step.limit_s:4.0f} s  {step.name}: {step.question}\n        {' '.join(step.command.split())}")
        print(f"{sum(step.limit_s for step in selected) / 60:.1f} of {args.minutes} minutes, by the limits")
        return 0
    done = day(selected, out, 60 * args.minutes)
    print(f"results: {out / 'gpu_day.json'}; page: {write_page(out, ROOT / 'docs' / 'measured', name)}")
    return int(any(outcome["status"].startswith("failed") for outcome in done.values()))


if __name__ == "__main__":
    sys.exit(main())
