"""Run a program as if this machine had GPUs: `python -m tests.support.stub [--gpus N] (-m MODULE | FILE) ARGUMENTS`.

Kernels are compiled by Triton's JIT and checked as CUDA would check them (driver.py). They do their work only with
`--executes`, by Triton's interpreter: without it results are whatever was in memory.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from functools import partial
from unittest import mock

from mixtral_triton.tools.bench import measure as bench

from .gpu import gpu

# What a benchmark makes large or often for the sake of a real GPU's clocks.
SMALL = {"SWEEP_BYTES": 1 << 10, "RUNS_LEAST": 1, "RUNS_MOST": 1}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.stub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--breaks", default="", metavar="KERNEL", help="its launch reads outside of memory")
    parser.add_argument("--executes", action="store_true", help="kernels do their work, interpreted")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a file and its arguments")
    args = parser.parse_args()
    target = args.module or args.script
    if not target:
        parser.error("name a module (-m) or a file to run")
    measured = partial(bench.measure_gpu, memory=1 << 12, n=16)
    with (
        gpu(args.gpus, L2_cache_size=1 << 10) as made,
        mock.patch.multiple(bench, **SMALL),
        mock.patch.object(bench, "measure_gpu", measured),
    ):
        made.driver.executes, made.driver.breaks = args.executes, args.breaks
        sys.argv = target
        if args.module:
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target[0], run_name="__main__")


main()
