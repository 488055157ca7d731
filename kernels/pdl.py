"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits within for what that writes.

NVIDIA, CUDA programming guide, "Programmatic Dependent Launch and Synchronization". A kernel that takes the constexpr
PDL calls `pdl_wait` in every program, before it stores anything and before it loads anything but weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_in_pdl_region: ContextVar[bool] = ContextVar("chained", default=False)


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """From here on all that earlier launches wrote is there. The next launch may begin, and wait in its turn."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def in_pdl_region() -> bool:
    return _in_pdl_region.get()


@contextmanager
def pdl_region() -> Iterator[None]:
    """Within the block, launches that can begin before the one in front of them has ended.

    All are of one stream, and nobody writes a weight: it may be read before what is in front has ended. An ordinary
    launch goes in front of the block, and all that was launched before that one has ended by then.
    """
    token = _in_pdl_region.set(True)
    try:
        yield
    finally:
        _in_pdl_region.reset(token)
