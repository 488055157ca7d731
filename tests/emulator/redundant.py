"""What nobody misses: by what stands before and after it, or of one kernel, and why it is redundant.

A trial shows more than that results stay: without it no two warps meet at one place of shared memory between two other
barriers, nothing is read in flight, no register of a product has changed. That is of one launch; why it holds of all
stands here. A new pair of neighbours is a failure until somebody has thought about it. Not listed, but told apart by
the trial itself: what has nothing to do (no copy in flight, nothing stored since the last fence, one warp).
"""

from __future__ import annotations

ONE_THREAD = "one thread makes, announces and copies in its own order; of the barriers before the copy one is enough"
ITSELF = "each warp has waited for the copy itself"
FIRST = "nothing in shared memory was touched before"
LAST = "nothing in shared memory is touched after"
EARLIER = "the place was last read before another barrier, or is none that another warp reads"

REDUNDANT: dict[tuple[str, ...], str] = {
    ("barrier", "-", "st.shared"): FIRST,
    ("barrier", "cp.async.wait_group", "mbarrier.init"): "mbarriers are made where nothing was before",
    ("barrier", "cp.async.wait_group", "-"): LAST,
    ("barrier", "mbarrier.init", "mbarrier.arrive"): ONE_THREAD,
    ("barrier", "mbarrier.arrive", "bulk copy"): ONE_THREAD,
    ("barrier", "bulk copy", "mbarrier.arrive"): ONE_THREAD,
    ("barrier", "bulk copy", "bulk copy"): ONE_THREAD,
    ("barrier", "fence.proxy.async", "bulk copy"): ONE_THREAD,
    ("barrier", "commit", "mbarrier.arrive"): ONE_THREAD,
    ("barrier", "wgmma.commit_group", "mbarrier.arrive"): ONE_THREAD,
    ("barrier", "wgmma.wait_group", "mbarrier.arrive"): ONE_THREAD,
    ("barrier", "mbarrier.inval", "mbarrier.inval"): "one thread ends them in its own order",
    ("barrier", "wgmma.wait_group", "mbarrier.inval"): "barriers of the loop stand behind the last wait for them",
    ("barrier", "mbarrier.try_wait", "wgmma.fence"): ITSELF,
    ("barrier", "wgmma.wait_group", "wgmma.fence"): "other barriers stand before the place is written again",
    ("barrier", "wgmma.commit_group", "copy"): EARLIER,
    ("barrier", "cp.async.wait_group", "copy"): EARLIER,
    ("barrier", "cp.async.wait_group", "st.shared"): EARLIER,
    ("barrier", "commit", "st.shared"): EARLIER,
    ("barrier", "cp.async.wait_group", "ldmatrix.sync"): "before the loop, and at its end, stands another one",
    ("swizzle", "gather_by_expert_kernel"): "it changes places of ids that are counted together",
    ("fence", "wgmma.commit_group", "wgmma.mma_async"): "no register of this product was written since the last fence",
    ("wait", "commit", "cp.async.wait_group"): "the same wait follows",
    ("wait", "wgmma.commit_group", "fence.proxy.async"): "a chain: who reads the sum waits for all of it",
    (
        "wait",
        "wgmma.commit_group",
        "copy",
    ): "the loop that follows waits before it writes there or reads the sum",
    ("wait", "bulk copy", "bar.sync"): "the loop that follows waits before it reads the sum or writes where they read",
}
