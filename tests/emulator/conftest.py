"""The fixture that runs compiled kernels in the PTX emulator, as on a machine with such a GPU."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from ..support.stub.adapter import INTERPRETED
from ..support.stub.gpu import gpu
from .launch import Executor
from .machine import SCHEDULES, Schedule

A100 = {"name": "NVIDIA A100-SXM4-80GB (stub)", "major": 8, "minor": 0, "multi_processor_count": 108}
A100 |= {"L2_cache_size": 40 << 20, "shared_memory_per_block_optin": 166912}
PROPERTIES: dict[str, dict[str, Any]] = {"sm_90": {}, "sm_80": A100}


@contextmanager
def emulate(arch: str = "sm_90", schedules: Sequence[Schedule] = SCHEDULES) -> Iterator[Any]:
    cache = os.path.join(triton.knobs.cache.dir, "ptx")  # the driver loads PTX in place of a cubin
    with (
        mock.patch.object(CUDABackend, "make_cubin", lambda self, ptx, *rest: ptx.encode()),
        mock.patch.dict(os.environ, TRITON_CACHE_DIR=cache),
        gpu(1, **PROPERTIES[arch]) as machine,
    ):
        machine.driver.execute = Executor(schedules)
        yield machine


@pytest.fixture
def ptx_emulator() -> Callable[..., AbstractContextManager[Any]]:
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("simulates a GPU in a compiling process on a machine without one")
    return emulate
