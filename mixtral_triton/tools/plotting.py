"""What every `--plot FILE` asks of the file, before the work that it is to show, and how it gets there."""

from __future__ import annotations

import io
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from .files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def check_plot(file: Path) -> None:
    """ValueError or OSError where a picture could not be written there: its result would be lost."""
    if file.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"--plot {str(file)!r} needs a name that ends in .png, .svg or .pdf")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"--plot {str(file)!r} needs a folder that is there: {file.absolute().parent} is not")
    if find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'mixtral-triton[plot]'")
    new = not file.exists()
    with open(file, "ab"):  # may it be written?
        pass
    if new:
        file.unlink()


def save(figure: Figure, file: Path) -> None:
    """Draw it first, then write: a picture, or an error that names the file and leaves no part of one."""
    picture = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a prompt in a script that the font does not have
        figure.savefig(picture, format=file.suffix[1:], dpi=150)
    write(file, picture.getvalue())
