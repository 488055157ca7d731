"""Every kernel that a GPU day's benchmarks and registry tests launch, into Triton's cache, by all cores.

    python -m benchmarks.compile_ahead [--most N]

Afterwards nobody waits for a compiler, and nothing is timed while another core compiles.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from itertools import islice

import torch

from benchmarks.day_parts import parts
from mixtral_triton.cli import parser
from mixtral_triton.kernels.launch import multiprocessors, target_arch
from mixtral_triton.kernels.op import Launch
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import Case, cases
from mixtral_triton.tools.offline import compile_launches


def day_cases() -> Iterator[Case]:
    """What the tests of the registry run, and what the benchmarks of the day ask for."""
    for op in OPS.values():
        yield from (Case(op, sizes, dtype) for sizes in op.test_shapes for dtype in op.dtypes)
    for command in (command for part in parts() for command in part.commands):
        if "bench" in command.args:
            asked = parser().parse_args(command.args[2:])
            yield from cases(asked.ops, asked.quick, asked.at, asked.sizes)


def launches(arch: str, sms: int | None) -> Iterator[Launch]:
    """Of one call a case, on the GPU of that architecture and so many multiprocessors."""
    for case in day_cases():
        args = case.inputs(torch.device("meta"))
        with record_launches(arch, sms) as recorded, torch.no_grad():
            case.op.run(**args)
        yield from (launch for launch in recorded if launch.fn is not None)


def main() -> int:
    """-> exit status: 1 where a kernel does not compile."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--most", type=int, metavar="N", help="at most so many launches; none: all")
    gpu = torch.device("cuda", torch.cuda.current_device())
    arch = target_arch(gpu)
    wanted = list(islice(launches(arch, multiprocessors(gpu)), options.parse_args().most))
    found = list(compile_launches(wanted, arch))
    print(f"{len(found)} kernels of {len(wanted)} launches compiled for {arch}")
    faults = [f"{each.kernel}: {each.error}" for each in found if each.error]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
