"""The PTX emulator for a test, and what the test covered of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED


@pytest.fixture
def ptx_emulator(covers: Any) -> Callable[..., AbstractContextManager[Any]]:
    """ptx_emulator(arch="sm_90", schedules=all): within the block, this machine has that GPU."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("stands in for a GPU in a compiling process that has none")
    from .emulated import emulated
    from .report import noted

    @contextmanager
    def on_it(arch: str = "sm_90", **options: Any) -> Iterator[Any]:
        with emulated(arch, **options) as gpu:
            yield gpu
            for kind, line in noted(gpu.driver.execute):
                covers(kind, line)

    return on_it
