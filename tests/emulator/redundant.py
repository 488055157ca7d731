"""Mutations that no test catches because the removed instruction is redundant: by neighbours or by kernel, and why.

A trial shows that the launch's results stay and that no race is detected; the reasons below hold for every launch. A
pair of neighbours that is not listed fails the test until it has a reason. Instructions that have nothing to do (no
copy in flight, nothing stored since the last fence, one warp) are not listed, because the trial itself finds them.
"""

from __future__ import annotations

_BY_REASON: dict[str, tuple[tuple[str, ...], ...]] = {
    "nothing in shared memory was accessed before": (("barrier", "-", "st.shared"),),
    "nothing in shared memory is accessed after": (("barrier", "cp.async.wait_group", "-"),),
    "mbarriers are initialized in unused memory": (("barrier", "cp.async.wait_group", "mbarrier.init"),),
    "one thread initializes, announces and copies in program order; one barrier before the copy is enough": (
        ("barrier", "mbarrier.init", "mbarrier.arrive"),
        ("barrier", "mbarrier.arrive", "bulk copy"),
        ("barrier", "bulk copy", "mbarrier.arrive"),
        ("barrier", "bulk copy", "bulk copy"),
        ("barrier", "fence.proxy.async", "bulk copy"),
        ("barrier", "commit", "mbarrier.arrive"),
        ("barrier", "wgmma.commit_group", "mbarrier.arrive"),
        ("barrier", "wgmma.wait_group", "mbarrier.arrive"),
    ),
    "one thread invalidates them in program order": (("barrier", "mbarrier.inval", "mbarrier.inval"),),
    "the loop's barriers follow the last wait": (("barrier", "wgmma.wait_group", "mbarrier.inval"),),
    "each warp has waited for the copy itself": (("barrier", "mbarrier.try_wait", "wgmma.fence"),),
    "other barriers precede the next write": (("barrier", "wgmma.wait_group", "wgmma.fence"),),
    "the memory was last read before another barrier, or no other warp reads it": (
        ("barrier", "wgmma.commit_group", "copy"),
        ("barrier", "cp.async.wait_group", "copy"),
        ("barrier", "cp.async.wait_group", "st.shared"),
        ("barrier", "commit", "st.shared"),
    ),
    "another barrier precedes the loop and ends it": (("barrier", "cp.async.wait_group", "ldmatrix.sync"),),
    "it permutes ids that are counted together": (("swizzle", "gather_by_expert_kernel"),),
    "no register of this product was written since the last fence": (
        ("fence", "wgmma.commit_group", "wgmma.mma_async"),
    ),
    "the same wait follows": (("wait", "commit", "cp.async.wait_group"),),
    "the reader of the sum waits for all products": (("wait", "wgmma.commit_group", "fence.proxy.async"),),
    "the loop that follows waits before it overwrites the operands or reads the sum": (
        ("wait", "wgmma.commit_group", "copy"),
        ("wait", "bulk copy", "bar.sync"),
    ),
}
REDUNDANT = {key: reason for reason, keys in _BY_REASON.items() for key in keys}
