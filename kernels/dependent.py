"""Programmatic dependent launch: a kernel begins while the one before it ends, and waits within for what that writes.

NVIDIA, CUDA programming guide, "Programmatic Dependent Launch and Synchronization". A kernel that takes the constexpr
PDL calls `await_earlier` in every program, before it stores anything and before it loads anything but weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

_chained: ContextVar[bool] = ContextVar("chained", default=False)


@triton.jit
def await_earlier(PDL: tl.constexpr):
    """From here on all that earlier launches wrote is there. The next launch may begin, and wait in its turn."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def chained() -> bool:
    return _chained.get()


@contextmanager
def chain() -> Iterator[None]:
    """Within the block, launches that can begin before the one in front of them has ended.

    All are of one stream, and nobody writes a weight: it may be read before what is in front has ended. An ordinary
    launch goes in front of the block, and all that was launched before that one has ended by then.
    """
    token = _chained.set(True)
    try:
        yield
    finally:
        _chained.reset(token)
