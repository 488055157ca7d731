"""The fixture that runs compiled kernels in the PTX emulator, as on a machine with such a GPU.

The emulator cannot see: ptxas and its spills, time, bank conflicts, memory order between blocks, clusters, tcgen05,
the last bits of approximate instructions and of a tensor core's sum, and reads outside a tensor's rows but inside its
extent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED

A100 = {
    "name": "NVIDIA A100-SXM4-80GB (stub)",
    "major": 8,
    "minor": 0,
    "multi_processor_count": 108,
    "L2_cache_size": 40 << 20,
    "shared_memory_per_block_optin": 166912,
}
PROPERTIES: dict[str, dict[str, Any]] = {"sm_90": {}, "sm_80": A100}


@contextmanager
def emulated(arch: str, schedules: Sequence[Any] | None) -> Iterator[Any]:
    """Simulate a GPU whose driver loads PTX, with a kernel cache of its own."""
    import triton
    from triton.backends.nvidia.compiler import CUDABackend

    from ..support.stub.gpu import gpu
    from .launch import Executor
    from .machine import SCHEDULES

    def make_cubin(self: Any, ptx: str, *rest: Any) -> bytes:
        return ptx.encode()

    cache = os.path.join(triton.knobs.cache.dir, "ptx")
    with (
        mock.patch.object(CUDABackend, "make_cubin", make_cubin),
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        gpu(1, **PROPERTIES[arch]) as device,
    ):
        # PTX's memory model requires a fence between cp.async and wgmma: Triton 3.9 emits it, 3.6 does not.
        fenced = tuple(map(int, triton.__version__.split(".")[:2])) > (3, 6)
        device.driver.execute = Executor(schedules or SCHEDULES, fenced_copies=fenced)
        yield device


@pytest.fixture
def ptx_emulator(covers: Any) -> Callable[..., AbstractContextManager[Any]]:
    """ptx_emulator(arch="sm_90", schedules=None): within the block, a simulated GPU; its coverage is reported."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("simulates a GPU in a compiling process on a machine without one")
    from .report import coverage

    @contextmanager
    def run_emulated(arch: str = "sm_90", schedules: Sequence[Any] | None = None) -> Iterator[Any]:
        with emulated(arch, schedules) as gpu:
            yield gpu
            for kind, line in coverage(gpu.driver.execute):
                covers(kind, line)

    return run_emulated
