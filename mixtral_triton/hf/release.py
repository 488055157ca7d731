"""What differs between releases of transformers."""

from __future__ import annotations

import re
from typing import Any


def release(transformers: Any) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])


def cache_keyword() -> str:
    """What the installed transformers calls a forward's cache: it was renamed in 5.24."""
    import transformers

    return "cache" if release(transformers) >= (5, 24) else "past_key_values"
