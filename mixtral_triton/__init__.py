"""Mixtral 8x7B and its family on fused Triton kernels, each checked against plain torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint.config import SMALL, MixtralConfig
    from .hf import ExpertsConfig, apply, register, revert, stored_config
    from .model.cache import KVCache
    from .model.mixtral import Mixtral
    from .verification import verify

__version__ = "0.1.0"  # pyproject.toml reads it here

__all__ = ["SMALL", "ExpertsConfig", "KVCache", "Mixtral", "MixtralConfig", "apply", "register", "revert"]
__all__ += ["stored_config", "verify"]

_HOME = {"KVCache": "model.cache", "Mixtral": "model.mixtral"}
_HOME |= dict.fromkeys(("MixtralConfig", "SMALL"), "checkpoint.config")
_HOME |= dict.fromkeys(("ExpertsConfig", "apply", "register", "revert", "stored_config"), "hf") | {
    "verify": "verification"
}


def __getattr__(name: str) -> Any:
    """Import on first use: the command line has to choose the interpreter before any kernel is decorated."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
