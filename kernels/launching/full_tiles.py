"""The tiles of a kernel that must cover a whole dimension: declared where it is defined, read by the tuner."""

from collections.abc import Callable
from typing import Any


def full_tiles(*names: str) -> Callable[[Any], Any]:
    """Declare which tiles of the kernel below must cover a whole dimension: a smaller one is wrong."""

    def declare(kernel: Any) -> Any:
        kernel.full_tiles = frozenset(names)
        return kernel

    return declare
