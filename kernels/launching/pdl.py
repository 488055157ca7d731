"""Programmatic dependent launch (PDL): a kernel starts while the one before it ends, and waits for what it writes.

NVIDIA, CUDA programming guide, "Programmatic Dependent Launch and Synchronization". A kernel that takes the constexpr
PDL calls `pdl_wait` in every program, before it stores anything and before it loads anything but weights.
`launch.pdl_region` decides which launches are dependent.

A kernel may also prefetch weights into L2 before its wait (`prefetch_rows`), while the kernels before it leave device
memory idle. The experts' down projection selects its weights by the ids that the router's launch wrote. It may read
them before its wait, because the launch before it, the up projection, lets it start only after its own wait
(`pdl_wait_first`): the router's launch has then ended, and what it wrote is in L2. The down projection reads the ids
from L2 (.cg), since the L1 cache of its SM may hold an earlier step's until the wait.
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def pdl_wait(PDL: tl.constexpr):
    """Let the next launch start, and wait until everything that earlier launches wrote is visible."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def pdl_wait_first(PDL: tl.constexpr):
    """Wait until everything that earlier launches wrote is visible, and then let the next launch start."""
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def prefetch_rows(rows, BYTES: tl.constexpr):
    """Load the first BYTES of each of these rows, pointers [rows], into L2: a request for each line of 128 bytes."""
    LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
    lines = (rows[:, None] + tl.arange(0, BYTES // 128)[None, :] * LINE).to(tl.int64)
    tl.inline_asm_elementwise("prefetch.global.L2 [$1];", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1)
