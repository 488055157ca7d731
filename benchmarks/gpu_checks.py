"""Parts of the GPU day, a line of JSON each: compile ahead, and measure what the cost model estimates.

python -m benchmarks.gpu_checks CHECK [--small]
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

from benchmarks import gpu_day
from mixtral_triton import cli, ops
from mixtral_triton.generate import capture
from mixtral_triton.kernels import launch
from mixtral_triton.kernels.launch import Launch, LaunchConfig, multiprocessors, override_configs, target_arch
from mixtral_triton.kernels.pdl import pdl_wait
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools import predict
from mixtral_triton.tools.bench import decode_step
from mixtral_triton.tools.bench.cases import Case, cases
from mixtral_triton.tools.bench.measure import DeviceTimer, untimed_row
from mixtral_triton.tools.gpus import GPUS, data_sheet
from mixtral_triton.tools.offline import compile_launches

Figures = dict[str, Any]
CLOCKS = "nvidia-smi --query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu --format=csv,noheader"


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
    """What the cost model estimates, measured, and an expert layer predicted by it."""
    device, properties = torch.device("cuda"), torch.cuda.get_device_properties("cuda")
    timer, sms, n = DeviceTimer(device), 2 if small else properties.multi_processor_count, 1 << (12 if small else 22)
    x, out = torch.zeros(n, device=device), torch.zeros(4 * sms, device=device)
    l2 = 4 * sms * x.nbytes / timer(lambda: read_kernel[(4 * sms,)](x, out, n, BLOCK=2048))

    def gap(dependent: bool) -> float:
        def launches(times: int) -> None:
            for _ in range(times):
                wait_kernel[(1,)](x, PDL=dependent, launch_pdl=dependent)

        launches(1)
        one, two = (timer(capture(partial(launches, times), None, x.device)) for times in (100, 200))
        return (two - one) / 100

    def product(H: int) -> float:
        a, b = (torch.zeros(rows, H, device=device, dtype=torch.bfloat16) for rows in (128, 256 * sms))
        return timer(lambda: ops.linear(a, b, True))

    tiles = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "GROUP_M": 8}
    with override_configs({"linear_kernel": LaunchConfig(tiles, 8, 3)}):  # a program an SM: twice the depth, one end
        ends = 2 * product(128 if small else 2048) - product(256 if small else 4096)
    figures: Figures = {"l2": l2, "launch_gap": gap(False), "pdl_gap": gap(True) if properties.major >= 9 else None}
    tile = max(0.0, 3 * ends / (1 + 2 * 128 * 256 / predict.TILE))
    gpu = data_sheet(torch.cuda.get_device_name()) or GPUS["h100"]
    assert gpu.chip is not None
    measured = replace(gpu, chip=replace(gpu.chip, **{name: value for name, value in figures.items() if value}))
    for T in (512, 1024, 1536, 4096):
        case = Case(OPS["expert_swiglu"], {"T": T, "H": 4096, "I": 14336, "E": 8, "K": 2})
        with mock.patch.object(predict, "OPTIMISTIC", replace(predict.OPTIMISTIC, l2=1.0, tile=tile)):
            predicted = untimed_row(case, measured).predicted
        figures[f"expert_swiglu T{T}, predicted, us"] = predicted and predicted.seconds * 1e6
    a = torch.ones(16 if small else 8192, 16 if small else 8192, device=device)
    with subprocess.Popen(["sh", "-c", f"sleep 1; {CLOCKS}"], stdout=-1, stderr=-1, text=True) as run:
        while run.poll() is None:
            torch.mm(a, a)
            torch.cuda.synchronize()
        figures["clocks under load"] = run.communicate()[0].strip()
    return {"ok": True, "tile": tile, **figures}


def compile_ahead(small: bool) -> Figures:
    """Compile the kernels that the GPU day's benchmarks and registry tests launch into Triton's cache, on all cores."""
    arch, sms = target_arch(torch.device("cuda")), multiprocessors(torch.device("cuda"))
    found = [Case(op, sizes, dtype) for op in OPS.values() for sizes in op.test_shapes for dtype in op.dtypes]
    for command in (command for _, commands in gpu_day.parts().values() for command in commands.values()):
        if " bench " in command:
            options = cli.parser().parse_args(shlex.split(command)[2:])
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
    step = decode_step.STEP
    sizes = step.test_shapes[0] if small else {**step.bench_shapes[0], "L": 2, "B": 1, "S": 1024}
    args, timer, figures = decode_step.inputs(sizes, torch.bfloat16, "cuda"), DeviceTimer(torch.device("cuda")), {}
    for name, on in (("with", True), ("without", False)):
        with mock.patch.object(launch, "PREFETCH", on):
            figures[f"decode step {name} prefetches, us"] = 1e6 * timer(decode_step.replayed_step(args))
    return {"ok": True, **figures}


def sanitizer(small: bool) -> Figures:
    """Run compute-sanitizer over the registry's tests, where it is installed."""
    if small or shutil.which("compute-sanitizer") is None:
        return {"ok": True, "note": "compute-sanitizer is not installed"}
    tests = [sys.executable, *["-m", "pytest", "-q", "-m", "gpu", "tests/ops/test_registry.py"]]
    command = ["compute-sanitizer", "--error-exitcode", "9", "--tool"]
    run = partial(subprocess.run, stdout=sys.stderr, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    return {"ok": not any(run([*command, tool, *tests]).returncode for tool in ("memcheck", "initcheck"))}


CHECKS = {"compile": compile_ahead, "rates": rates, "prefetch": prefetch, "sanitizer": sanitizer}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("check", choices=CHECKS)
    parser.add_argument("--small", action="store_true", help="small sizes, for a simulated GPU")
    args = parser.parse_args()
    with torch.no_grad():
        found = CHECKS[args.check](args.small)
    print(json.dumps({"kind": "check", "check": args.check, **found}), flush=True)
    sys.exit(not found["ok"])
