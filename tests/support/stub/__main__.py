"""Run a program as if this machine had GPUs: `python -m tests.support.stub [OPTIONS] (-m MODULE | FILE) ARGUMENTS`."""

import argparse
import runpy
import sys
from unittest import mock

from .adapter import measure, small_benchmarks
from .gpu import MI300X, gpu


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.support.stub", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--arch", choices=("sm_90", "gfx942"), default="sm_90", help="of an H100 or an MI300X")
    parser.add_argument("--executes", action="store_true", help="run the kernels in Triton's interpreter")
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, help="a module and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, help="a file and its arguments")
    args = parser.parse_args()
    sys.argv = target = args.module or args.script
    if not target:
        parser.error("name a module (-m) or a file to run")
    properties = (MI300X if args.arch == "gfx942" else {}) | {"L2_cache_size": 1 << 10}
    with gpu(args.gpus, **properties) as machine, mock.patch.multiple(measure, **small_benchmarks()):
        machine.driver.executes = args.executes
        if args.module:
            runpy.run_module(target[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(target[0], run_name="__main__")


main()
