"""Compile every kernel that a GPU day's benchmarks and registry tests launch into Triton's cache, on all cores.

python -m benchmarks.compile_ahead [--most N]
"""

from __future__ import annotations

import argparse
import shlex
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
    for command in (command for _, commands in parts().values() for command in commands.values()):
        if " bench " in command:
            options = parser().parse_args(shlex.split(command)[2:])
            found += cases(options.ops, options.quick, options.at, options.sizes)
    for case in found:
        with record_launches(arch, sms) as recorded, torch.no_grad():
            case.op.run(**case.inputs(torch.device("meta")))
        yield from (launch for launch in recorded if launch.fn is not None)


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--most", type=int, metavar="N", help="at most so many launches; none: all")
    gpu = torch.device("cuda", torch.cuda.current_device())
    wanted = list(islice(launches(target_arch(gpu), multiprocessors(gpu)), options.parse_args().most))
    faults = [f"{one.kernel}: {one.error}" for one in compile_launches(wanted, target_arch(gpu)) if one.error]
    sys.exit("\n".join(faults) or 0)
