"""The one list of operations. Tests, compile, benchmarks and verify iterate over it."""

from __future__ import annotations

from . import dispatch, linear, norm, rope, router
from .attention import op as attention
from .experts import op as experts
from .op import Op

OPS: dict[str, Op] = {
    op.name: op
    for op in (
        norm.OP,
        norm.ADD_OP,
        norm.EMBED_OP,
        linear.OP,
        router.OP,
        router.GATE_OP,
        router.NORM_OP,
        dispatch.OP,
        experts.OP,
        experts.NORM_OP,
        rope.OP,
        rope.APPEND_OP,
        attention.OP,
        attention.CACHED_OP,
        attention.STEP_OP,
    )
}
