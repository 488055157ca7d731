"""What every `--plot FILE` asks of the file, before the work that it is to show."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def check_plot(file: Path) -> None:
    """ValueError where a picture could not be written there: its result would be lost."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {str(file)!r} needs a name that ends in .png, .svg or .pdf")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--plot {str(file)!r} needs a folder that is there: {file.absolute().parent} is not")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mixtral-triton[plot]'")
