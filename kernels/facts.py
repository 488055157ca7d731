"""The tiles of a kernel that must cover a whole dimension: declared where it is defined, read by the tuner."""

from collections.abc import Callable
from typing import Any

_full_tiles: dict[str, frozenset[str]] = {}


def full_tiles(*names: str) -> Callable[[Any], Any]:
    """Declare which tiles of the kernel below must cover a whole dimension: a smaller one is wrong."""

    def declare(kernel: Any) -> Any:
        _full_tiles[kernel.__name__] = frozenset(names)
        return kernel

    return declare


def full_tiles_of(kernel: str) -> frozenset[str]:
    """Return those of a kernel by its name; none where none were declared."""
    return _full_tiles.get(kernel, frozenset())
