"""Programmatic dependent launch (PDL): a kernel starts while the one before it ends, and waits for what it writes.

NVIDIA, CUDA programming guide, "Programmatic Dependent Launch and Synchronization". A kernel that takes the constexpr
PDL calls `pdl_wait` in every program, before it stores anything and before it loads anything but weights.
`launch.pdl_region` decides which launches are dependent.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Let the next launch start, and wait until everything that earlier launches wrote is visible."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
