"""The one list of operations. Tests, compile, benchmarks and verify iterate over it."""

from __future__ import annotations

from . import attention, dispatch, embed, experts, linear, norm, ring, rope, router
from .op import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        norm.OP,
        norm.ADD_OP,
        embed.OP,
        linear.OP,
        router.OP,
        router.GATE_OP,
        dispatch.OP,
        experts.OP,
        experts.NORM_OP,
        rope.OP,
        ring.OP,
        rope.ROPE_APPEND_OP,
        attention.OP,
        attention.CACHED_OP,
    )
}
