"""Where pickles of earlier versions look for an applied model's modules: refused, with what would do."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    from .hf.modules import other_version

    raise other_version()
