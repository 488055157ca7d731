"""The operations, each also a registered custom operator (`torch.ops.mixtral_triton.*`).

A GPU's tensor goes to the Triton kernel. A CPU's goes to the same kernel, interpreted, where TRITON_INTERPRET=1 was set
before the import, and to plain torch (`mixtral_triton.reference`) elsewhere.

Every operation raises ValueError, naming the argument, on a wrong shape, dtype or device, and on a backward pass (those
that write into a cache, where a gradient is needed). `ops.NAME.unchecked` is the same operation without the checks.
"""

from .kernels.registry import *  # noqa: F403
from .kernels.registry import OPS

__all__ = [*OPS]


def __dir__() -> list[str]:
    return __all__
