"""A machine whose GPU is the one in numpy: kernels are compiled by Triton's JIT and executed from their PTX.

What it cannot see: the assembler and its spills, time, bank conflicts, memory order between blocks, clusters, tcgen05,
the last bits of approximate instructions and of a tensor core's sum, a read outside of a tensor's rows but inside of
its extent.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.nvidia.compiler import CUDABackend

from ..support.stub.gpu import gpu
from .launch import Executor
from .machine import SCHEDULES, Schedule

A100 = {
    "name": "NVIDIA A100-SXM4-80GB (stub)",
    "major": 8,
    "minor": 0,
    "multi_processor_count": 108,
    "L2_cache_size": 40 << 20,
    "shared_memory_per_block_optin": 166912,
}
PROPERTIES: dict[str, dict[str, Any]] = {"sm_90": {}, "sm_80": A100}


def as_text(self: Any, ptx: str, *rest: Any) -> bytes:
    """In the place of the assembler: what the driver loads is the PTX."""
    return ptx.encode()


@contextmanager
def emulated(arch: str = "sm_90", schedules: Sequence[Schedule] = SCHEDULES) -> Iterator[Any]:
    """Within the block, this machine has such a GPU -> it. Its kernels have a cache of their own."""
    cache = os.path.join(triton.knobs.cache.dir, "ptx")
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(CUDABackend, "make_cubin", as_text))
        stack.enter_context(mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache))
        made = stack.enter_context(gpu(1, **PROPERTIES[arch]))
        # PTX's memory model asks for a fence between cp.async and wgmma: Triton 3.9 emits it, 3.6 does not.
        fenced = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
        made.driver.execute = Executor(schedules, fenced_copies=fenced)
        yield made
