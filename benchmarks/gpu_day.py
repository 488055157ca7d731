"""Measure everything that needs a GPU in under ten minutes: tests, operations and their peers, rates, models, decode.

    python benchmarks/gpu_day.py [--out benchmarks/results/NAME] [--parts tests experts ...] [--budget-s 550] [--dry]

A part that exceeds its share of the budget is killed, and its output so far is kept. The same command again runs what
is not done. OUT/gpu_day.json and OUT/gpu_day.md hold the results.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton import cli, ops
from mixtral_triton.generate import capture
from mixtral_triton.kernels import launch
from mixtral_triton.kernels.arch import ARCHS
from mixtral_triton.kernels.launch import Launch, LaunchConfig, launches_dependently, multiprocessors, target_arch
from mixtral_triton.kernels.op import runs_on
from mixtral_triton.kernels.pdl import pdl_wait
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.load import usable_cores
from mixtral_triton.tools import predict
from mixtral_triton.tools.bench import decode_step
from mixtral_triton.tools.bench.cases import BENCHED, Case, cases
from mixtral_triton.tools.bench.command import number, sizes_text
from mixtral_triton.tools.bench.measure import DeviceTimer, untimed_row
from mixtral_triton.tools.bench.peers import PEERS
from mixtral_triton.tools.gpus import GPU, GPUS, data_sheet
from mixtral_triton.tools.offline import compile_launches
from mixtral_triton.tools.terminal import QUANTIZED, toolchain_fault

ROOT, BUDGET_S = Path(__file__).resolve().parents[1], 550.0
NOW = "clocks.sm,clocks.mem,power.draw,temperature.gpu"  # of a GPU under load
QUERY = f"name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,memory.total,{NOW}"
PACKAGES = {"mixtral-triton", "torch", "triton", "transformers", "liger_kernel", "flash_attn", "vllm"}
GPU_TESTS = re.compile(r"mark\.gpu|def test_[^)]*device: torch\.device")  # in files with tests for a GPU
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)?[^\S\n]*(?:\(.*|\[.*)?$", re.MULTILINE)
HEAD = """# A GPU day

A ratio above 1 means that ours is faster. Predictions follow from the GPU's data sheet. Two depths of one decode step
give the time of a layer.
"""
PYTHON = shlex.quote(sys.executable)
TESTS = "-m pytest -v -m gpu -p no:cacheprovider --maxfail 3"
UNTIMED = ("tests", "sanitizer")  # parts whose commands run beside each other, as all do on a simulated GPU
Figures = dict[str, Any]
Part = tuple[float, dict[str, str]]  # the share of the time, and the commands by name, which have it together


def parts(simulated: str = "", breaks: str = "") -> dict[str, Part]:
    """Return the parts in order of importance. `simulated`: the architecture of a simulated GPU, where the kernel
    `breaks` fails. The share is in seconds: at least ten a command, which the simulated GPU needs to start it."""
    experts = [name for name in OPS if name.startswith("expert")]
    cache = [name for name in OPS if "attention" in name or name == "append"]
    rest = [name for name in OPS if name not in (*experts, *cache)]
    python, small = PYTHON, "--dry" if simulated else ""
    if simulated:  # results are checked; kernels take long there
        python += f" -m tests.support.stub --arch {simulated} --executes" + (breaks and f" --breaks {breaks}")
    layer = "".join(f" --sizes T={T},H=4096,I=14336,E=8,K=2" for T in (1, 8, 64, 512, 1024, 1536, 2048, 4096))
    two_depths, no_compile = "--at B=1 --at S=1024 --at H=4096", "--without torch.compile"
    eager, first = f"{no_compile} --without 'HF static cache'", " --first" if simulated else ""

    def bench(names: Sequence[str], options: str, more: str = "") -> dict[str, str]:
        command = f"{python} -m mixtral_triton bench --json"
        return {name: f"{command} {name} {_smallest(name) if simulated else options} {more}" for name in names}

    def check(name: str) -> dict[str, str]:
        return {name: f"{python} -m benchmarks.gpu_day --check {name} {small}"}

    of_ops = {name: f"tests/ops/test_registry.py -k=-{name}-" for name in OPS}
    files = [file for file in sorted((ROOT / "tests").rglob("test_*.py")) if GPU_TESTS.search(file.read_text())]
    of_files = {file.stem: file.relative_to(ROOT) for file in files if file.stem != "test_registry"}
    sanitizer = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 --tool"
    tools = ("memcheck", "initcheck") if shutil.which("compute-sanitizer") and not simulated else ()
    on_two = f"{PYTHON} -m torch.distributed.run --nproc-per-node 2 -m mixtral_triton"
    ranked = ("verify --quick", "generate --prompt The") if torch.cuda.device_count() > 1 and not simulated else ()
    engine = f"{PYTHON} benchmarks/in_vllm.py"
    ours = f"{engine} --quantization mixtral_triton"
    in_vllm = {"its experts": engine, "ours": ours, "ours in int4": f"{ours} --weights int4"}
    found: dict[str, Part] = {
        # Nothing is timed while another core compiles.
        "compile": (80, check("compile")),
        "experts in bf16": (40, bench(["expert_swiglu"], f"{layer} {no_compile}")),
        "rates": (20, check("rates")),
        "tests": (120, {name: f"{python} {TESTS}{first} {where}" for name, where in (of_files | of_ops).items()}),
        "experts": (40, bench(experts, f"--quick {no_compile}")),
        "attention": (60, bench(cache, f"--quick {no_compile}")),
        # torch.compile may leave a GPU in a state that disturbs timing: ours and eager transformers run before it.
        "decode": (60, bench(["decode_step"], f"{two_depths} {eager}")),
        "prefetch": (20, check("prefetch")),
        "decode batches": (40, bench(["decode_step"], f"--quick --at L=4 {eager}")),
        "decode offloaded": (20, bench(["decode_step"], f"{two_depths} {eager}", "--offload 2")),
        "decode compiled": (40, bench(["decode_step"], f"{two_depths} {no_compile}")),
        "one token and many": (90, bench(rest, "--quick --at T=1 --at T=4096")),
        "host": (20, {"host_time": f"{PYTHON} benchmarks/host_time.py --json --rounds {1 if simulated else 40}"}),
        "in vLLM": (240, in_vllm if find_spec("vllm") and not simulated else {}),
        "two GPUs": (60, {each.split()[0]: f"{on_two} {each} --tp 2" for each in ranked}),
        "sanitizer": (60, {
            f"{tool} {name}": f"{sanitizer} {tool} {PYTHON} {TESTS} --first {where}"
            for tool in tools for name, where in of_ops.items()
        }),
    }  # fmt: skip
    if simulated:  # a command takes about ten seconds on two cores, one of the tests twice as long
        found = {part: (10 * (1 + (part == "tests")) * len(each), each) for part, (_, each) in found.items()}
    return found


def _smallest(name: str) -> str:
    """Return options for the smallest dense sizes that the tests run, with plain torch as the only peer."""
    op = BENCHED[name]
    dense = [shape for shape in op.test_shapes if not QUANTIZED & Case(op, shape).as_dict().keys()]
    sizes = Case(op, min(dense, key=lambda sizes: op.cost(sizes, op.dtypes[0]).flops)).as_dict()
    without = "".join(f" --without '{name}'" for name in {peer.name for peer in PEERS} - {"torch"})
    return "--sizes " + ",".join(f"{letter}={size}" for letter, size in sizes.items()) + without


@triton.jit
def read_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, n, BLOCK):
        total += tl.load(x_ptr + start + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def wait_kernel(x_ptr, PDL: tl.constexpr):
    pdl_wait(PDL)
    tl.store(x_ptr, 1.0)


def rates(small: bool) -> Figures:
    """Measure what the cost model estimates, and predict an expert layer by it."""
    device, n = torch.device("cuda"), 1 << (12 if small else 22)
    timer, sms, arch = DeviceTimer(device), 2 if small else multiprocessors(device), target_arch(device)
    x, out = torch.zeros(n, device=device), torch.zeros(4 * sms, device=device)
    l2 = 4 * sms * x.nbytes / timer(lambda: read_kernel[(4 * sms,)](x, out, n, BLOCK=2048))

    def gap(dependent: bool) -> float:
        option = {"launch_pdl": True} if dependent else {}  # AMD's backend does not know the option

        def launches(times: int) -> None:
            for _ in range(times):
                wait_kernel[(1,)](x, PDL=dependent, **option)

        launches(1)
        one, two = (timer(capture(partial(launches, times), None, x.device)) for times in (100, 200))
        return (two - one) / 100

    def product(H: int) -> float:
        a, b = (torch.zeros(rows, H, device=device, dtype=torch.bfloat16) for rows in (128, 256 * sms))
        return timer(lambda: ops.linear(a, b, True))

    tiles = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}
    stages = 3 if arch in ARCHS and ARCHS[arch].shared_bytes > 3 * 49152 else 2  # of 49,152 bytes; AMD: one fewer
    with launch.override_configs({"linear_kernel": LaunchConfig(tiles, 8, stages)}):  # a program an SM: twice the depth
        ends = 2 * product(128 if small else 2048) - product(256 if small else 4096)
    dependent_gap = gap(True) if launches_dependently(device) else None
    figures: Figures = {"l2": l2, "launch_gap": gap(False), "pdl_gap": dependent_gap}
    figures["tile"] = max(0.0, 3 * ends / (1 + 2 * 128 * 256 / predict.TILE))
    figures |= _predict_experts(figures)
    a = torch.ones(16 if small else 8192, 16 if small else 8192, device=device)
    with subprocess.Popen(["sh", "-c", f"sleep 1; {smi(NOW)}"], stdout=-1, stderr=-1, text=True) as run:
        while run.poll() is None:
            torch.mm(a, a)
            torch.cuda.synchronize()
        figures["clocks under load"] = run.communicate()[0].strip()
    return {"ok": True, **figures}


def _predict_experts(rates: Figures) -> Figures:
    """Return the predicted microseconds of an expert layer on this GPU, whose estimated rates are the measured ones."""
    gpu = replace(data_sheet(torch.cuda.get_device_name()) or GPUS["h100"], l2=rates["l2"])
    efficiency = replace(predict.OPTIMISTIC, l2=1.0, tile=rates["tile"])
    gaps = {False: rates["launch_gap"], True: rates["pdl_gap"] or rates["launch_gap"]}
    figures: Figures = {}
    for T in (512, 1024, 1536, 4096):
        case = Case(op := OPS["expert_swiglu"], op.case(T=T, H=4096, I=14336, E=8, K=2))
        gap = mock.patch.object(GPU, "gap", lambda _, dependent: gaps[dependent])
        with mock.patch.object(predict, "OPTIMISTIC", efficiency), gap:
            predicted = untimed_row(case, gpu).predicted
        figures[f"expert_swiglu T{T}, predicted, us"] = predicted and predicted.seconds * 1e6
    return figures


def compile_ahead(small: bool) -> Figures:
    """Compile the kernels that the GPU day's benchmarks and registry tests launch into Triton's cache, on all cores."""
    arch, sms = target_arch(torch.device("cuda")), multiprocessors(torch.device("cuda"))
    found = [Case(op, sizes, dtype) for op in OPS.values() for sizes in op.test_shapes for dtype in op.dtypes]
    found = [case for case in found if runs_on(case.sizes, arch)]
    for command in (command for _, commands in parts().values() for command in commands.values()):
        if " bench " in command:
            options = cli.parser().parse_args(shlex.split(command)[3:])
            selected = cases(options.ops, options.quick, options.at, options.sizes)
            found += [case.offloaded(options.offload) if options.offload else case for case in selected]
    launches: list[Launch] = []
    for case in found[: 2 if small else None]:
        with record_launches(arch, sms) as recorded:
            case.op.run(**case.inputs(torch.device("meta")))
        launches += [launch for launch in recorded if launch.fn is not None]
    faults = [f"{one.kernel}: {one.error}" for one in compile_launches(launches, arch) if one.error]
    return {"ok": not faults, "launches": len(launches), "faults": "; ".join(faults)}


def prefetch(small: bool) -> Figures:
    """Time a decode step of two layers with prefetches into L2 and without (pdl.py)."""
    sizes = decode_step.SMALL if small else replace(decode_step.MIXTRAL, L=2)
    args, timer, figures = decode_step.inputs(sizes, torch.bfloat16, "cuda"), DeviceTimer(torch.device("cuda")), {}
    for name, on in (("with", True), ("without", False)):
        with mock.patch.object(launch, "PREFETCH", on):
            figures[f"decode step {name} prefetches, us"] = 1e6 * timer(decode_step.replayed_step(args))
    return {"ok": True, **figures}


# Parts of the day that run in this process, given whether the GPU is a simulated one, and return their figures.
CHECKS = {"compile": compile_ahead, "rates": rates, "prefetch": prefetch}


def run_part(part: str, commands: dict[str, str], entry: Figures, out: Path, limit_s: float, jobs: int = 1) -> None:
    """Run the commands without a status in `entry`, `jobs` at a time, for so long, and write there how they end."""
    start, exits, running = time.monotonic(), entry["exit"], dict[str, subprocess.Popen[bytes]]()
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
    waiting = [name for name in commands if name not in exits]
    try:
        while (waiting or running) and time.monotonic() < start + limit_s:
            while waiting and len(running) < jobs:
                file = out / f"{part}-{(name := waiting.pop(0))}.out".replace(" ", "_")
                with file.open("wb") as stdout, file.with_suffix(".err").open("wb") as stderr:
                    output: dict[str, Any] = {"stdout": stdout, "stderr": stderr, "env": variables, "cwd": ROOT}
                    running[name] = subprocess.Popen(shlex.split(commands[name]), start_new_session=True, **output)
            time.sleep(0.05)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                exits[name] = kill(running.pop(name))
    finally:  # also after Ctrl-C
        for process in running.values():
            kill(process)
    entry["status"] = "failed" if any(exits.values()) else "over budget" if len(exits) < len(commands) else "done"
    entry["seconds"] = time.monotonic() - start


def kill(process: subprocess.Popen[bytes]) -> int:
    """Kill a process, if it runs, and all that it started -> its exit status."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def smi(query: str) -> str:
    return "rocm-smi" if torch.version.hip else f"nvidia-smi --query-gpu={query} --format=csv,noheader"


def environment() -> list[str]:
    versions = sorted({f"{dist.name} {dist.version}" for dist in metadata.distributions() if dist.name in PACKAGES})
    commit = subprocess.getoutput(f"git -C '{ROOT}' rev-parse HEAD")
    return [f"{', '.join(versions)}, commit {commit}", subprocess.getoutput(f"timeout 20 {smi(QUERY)}")]


def day(selected: dict[str, Part], out: Path, budget_s: float, simulated: bool = False) -> dict[str, Any]:
    """Run what is not done of the parts within `budget_s`, write the results after each, and return their entries.
    What a part leaves of its share goes to those after it."""
    out.mkdir(parents=True, exist_ok=True)
    file, start, setup, cores = out / "gpu_day.json", time.monotonic(), environment(), usable_cores()
    done: dict[str, Any] = json.loads(file.read_text())["parts"] if file.is_file() else {}
    for part, (_, commands) in selected.items():
        status = "not started" if commands else "not possible here"
        done.setdefault(part, {"status": status, "seconds": 0.0, "exit": {}})
    shares = {part: share for part, (share, each) in selected.items() if len(done[part]["exit"]) < len(each)}
    print(f"parts: {', '.join(selected)}", flush=True)
    for part, (_, commands) in selected.items():
        remaining_s, entry = budget_s - (time.monotonic() - start), done[part]
        if part in shares and remaining_s >= 1:
            jobs = cores if simulated else max(1, min(8, cores // 2)) if part in UNTIMED else 1
            run_part(part, commands, entry, out, remaining_s * shares[part] / sum(shares.values()), jobs)
        shares.pop(part, None)
        failed = ", ".join(name for name, status in entry["exit"].items() if status)
        print(f"{part}: {entry['status']} after {entry['seconds']:.0f} s {failed}".rstrip(), flush=True)
        found = {"setup": [*setup, environment()[1]], "parts": done, **results(done, out)}
        (out / "gpu_day.md").write_text(markdown(found))
        half = file.with_suffix(".part")  # the next run reads a whole file, whenever the session ends
        half.write_text(json.dumps(found, indent=1))
        half.replace(file)
    return {part: done[part] for part in selected}


def results(done: dict[str, Any], out: Path) -> dict[str, Any]:
    """Return tests by outcome, rows of the benchmarks, and what the scripts and checks print."""
    tests, events = dict[str, str](), list[dict[str, Any]]()
    for file in (file for part in done for file in sorted(out.glob(f"{part}-*.out".replace(" ", "_")))):
        text = file.read_text(errors="replace")
        if file.name.startswith("tests-"):
            tests |= {match[1]: (match[2] or "died").lower() for match in OUTCOME.finditer(text)}
        for line in (line for line in text.splitlines() if line.startswith("{")):
            with suppress(json.JSONDecodeError):  # the last line may be incomplete
                events.append(json.loads(line))
    rows, checks = ([each for each in events if each.get("kind") == kind] for kind in ("row", "check"))
    host = [row for each in events if "plain_launch_us" in each for row in each["rows"]]
    figures = [{"check": each["check"], "": name, "value": each[name]} for each in checks for name in [*each][2:]]
    return {"tests": tests, "rows": rows, "host": host, "checks": figures}


def _cell(value: Any) -> str:
    return sizes_text(value) if isinstance(value, dict) else value if isinstance(value, str) else number(value)


def _operation(row: dict[str, Any]) -> dict[str, Any]:
    notes = [f"{name}: {one['note']}" for name, one in {"ours": row, **row["peers"]}.items() if one["note"]]
    ratios = [f"{name} {one['ratio']:.2f}" for name, one in row["peers"].items() if one["ratio"] is not None]
    cells = {name: row[name] for name in ("op", "sizes", "time_us", "floor_us", "of_floor")}
    cells |= {"predicted_us": (row["predicted"] or {}).get("time_us"), "peers / ours": ", ".join(ratios)}
    return {**cells, "notes": "; ".join(notes)}


def markdown(found: dict[str, Any]) -> str:
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
    for title, rows in sections.items():
        if rows:
            lines = [[*rows[0]], ["---"] * len(rows[0]), *(map(_cell, row.values()) for row in rows)]
            page += f"\n## {title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return page


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 1 if a command failed, 2 for bad input, else 0, even if a part was over its budget."""
    names = list(parts())
    parser = cli.Parser(prog="gpu_day", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results; none: one in benchmarks/results")
    parser.add_argument("--check", choices=CHECKS, help="run this check alone, here, and print its figures as JSON")
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART", help="none: all")
    text = f"seconds for everything together; none: {BUDGET_S:.0f}, or twice as many with --dry"
    parser.add_argument("--budget-s", type=float, help=text)
    text = "on a simulated GPU, which measures nothing; KERNEL: one that leaves it in an error"
    parser.add_argument("--dry", nargs="?", const="", metavar="KERNEL", help=text)
    parser.add_argument("--arch", choices=("sm_90", "gfx942"), default="sm_90", help="of the simulated GPU")
    args = parser.parse_args(argv)
    fault = toolchain_fault() if torch.cuda.is_available() else "there is no GPU: nothing was measured"
    if fault and (args.dry is None or args.check):
        parser.error(fault)
    if args.check:
        with torch.no_grad():
            found = CHECKS[args.check](args.dry is not None)
        print(json.dumps({"kind": "check", "check": args.check, **found}), flush=True)
        return int(not found["ok"])
    simulated = "" if args.dry is None else args.arch
    every, gpu = parts(simulated, args.dry or ""), f"dry-{simulated}" if simulated else torch.cuda.get_device_name()
    out = args.out or ROOT / "benchmarks" / "results" / gpu.lower().replace(" ", "-")
    budget_s = (2 if simulated else 1) * BUDGET_S if args.budget_s is None else args.budget_s
    done = day({name: every[name] for name in names if name in args.parts}, out, budget_s, bool(simulated))
    print(f"results: {out / 'gpu_day.md'}")
    return int(any(entry["status"] == "failed" for entry in done.values()))


if __name__ == "__main__":
    sys.exit(main())
