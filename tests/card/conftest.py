"""The card in numpy for a test, and what the test covered of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED


@pytest.fixture
def numpy_card(covers: Any) -> Callable[..., AbstractContextManager[Any]]:
    """numpy_card(arch="sm_90", schedules=all): within the block, this machine has that card."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("stands in for a card in a compiling process that has none")
    from .emulated import emulated
    from .report import noted

    @contextmanager
    def on_it(arch: str = "sm_90", **options: Any) -> Iterator[Any]:
        with emulated(arch, **options) as card:
            yield card
            for kind, line in noted(card.driver.execute):
                covers(kind, line)

    return on_it
