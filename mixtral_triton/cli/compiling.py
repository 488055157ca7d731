"""Compiling what a command launches, before it does, and showing the progress."""

from collections.abc import Callable
from typing import Any

from ..terminal import Bar


def compile_shown(launch: Callable[..., object], model: Any, *args: Any) -> None:
    """Compile on a GPU what `launch(model, *args)` launches on the meta device; show the progress."""
    from ..model.precompile import precompile  # the backend is set before kernels are imported

    with Bar("compiling") as progress:
        precompile(model, lambda: launch(model, *args), progress.set)
