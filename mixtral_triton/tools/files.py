"""Files that are written whole, or not at all."""

from __future__ import annotations

from pathlib import Path


def write(path: Path, content: bytes) -> None:
    """The file at `path`, with this content. OSError names it, and nothing of it is left behind."""
    file = open(path, "wb")  # noqa: SIM115
    # What that raises names the file by itself, and leaves none.
    try:
        with file:
            file.write(content)
    except OSError as error:
        if path.is_file():  # and no device
            path.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
