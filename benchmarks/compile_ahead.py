"""Compile every kernel that a GPU day's benchmarks and registry tests launch into Triton's cache, on all cores.

python -m benchmarks.compile_ahead [--most N]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

import torch

from benchmarks.gpu_day import parts
from mixtral_triton.cli import parser
from mixtral_triton.kernels.launch import multiprocessors, target_arch
from mixtral_triton.kernels.op import Launch
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import Case, cases
from mixtral_triton.tools.offline import compile_launches


def launches(arch: str, sms: int | None) -> Iterator[Launch]:
    """Yield the launches of a call per case, on a GPU of that architecture with so many multiprocessors."""
    found = [Case(op, sizes, dtype) for op in OPS.values() for sizes in op.test_shapes for dtype in op.dtypes]
    for args in (command.args for part in parts() for command in part.commands if "bench" in command.args):
        options = parser().parse_args(args[2:])
        found += cases(options.ops, options.quick, options.at, options.sizes)
    for case in found:
        args = case.inputs(torch.device("meta"))
        with record_launches(arch, sms) as recorded, torch.no_grad():
            case.op.run(**args)
        yield from (launch for launch in recorded if launch.fn is not None)


def main() -> int:
    """Return the exit status: 1 where a kernel does not compile."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--most", type=int, metavar="N", help="at most so many launches; none: all")
    gpu = torch.device("cuda", torch.cuda.current_device())
    arch = target_arch(gpu)
    wanted = list(islice(launches(arch, multiprocessors(gpu)), options.parse_args().most))
    compiled = list(compile_launches(wanted, arch))
    print(f"{len(compiled)} kernels of {len(wanted)} launches compiled for {arch}")
    faults = [f"{each.kernel}: {each.error}" for each in compiled if each.error]
    print("\n".join(faults), file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
