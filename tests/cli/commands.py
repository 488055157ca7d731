"""The command line, called in this process as a program calls it, and Python in a process of its own."""

import io
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from rich.console import Console

from mixtral_triton.cli.commands import main

ROOT = Path(__file__).parents[2]


def heed_interrupts() -> None:
    """A process's `preexec_fn`: a run that was started with SIGINT ignored, as by `&` or nohup, would pass that on."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def run(command: str, *more: Any) -> tuple[int, str, str]:
    """Run the words of `command`, then those of `more` as they are -> exit status, stdout, stderr.

    No backend is selected, which later commands of this process would inherit.
    """
    out, error = (io.TextIOWrapper(io.BytesIO(), "utf-8", newline="\n", write_through=True) for _ in range(2))
    words = [*shlex.split(command), *map(str, more)]
    with mock.patch.dict(os.environ), redirect_stdout(out), redirect_stderr(error):
        os.environ.setdefault("TRITON_INTERPRET", "0")
        try:
            status: Any = main(words)
        except SystemExit as left:  # argparse
            status = left.code
    texts = [stream.buffer.getvalue().decode() for stream in (out, error)]  # type: ignore[attr-defined]
    return status, *texts


def output(command: str, *more: Any, status: int = 0) -> str:
    """Return what a command prints that ends with this status."""
    found, out, error = run(command, *more)
    assert found == status, (found, error)
    return out


def run_json(command: str, *more: Any, status: int = 0) -> Any:
    """Return the object that a command with `--json` prints, or the list of them."""
    found = [json.loads(line) for line in output(command, *more, "--json", status=status).splitlines()]
    return found[0] if len(found) == 1 else found


def error_line(command: str, *more: Any) -> str:
    """Return the one line with which a command refuses its input."""
    status, out, error = run(command, *more)
    assert status == 2 and not out and len(error.strip().splitlines()) == 1, (status, out, error)
    return error.strip()


def shown(renderable: Any, width: int = 120, color: Any = None) -> str:
    """Return what a terminal of that width shows."""
    out = Console(width=width, force_terminal=color is not None, color_system=color)
    with out.capture() as captured:
        out.print(renderable)
    return captured.get()


def python(*args: Any, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, without this process's backend and width, and not as a worker of its pytest."""
    left_out = ("TRITON_INTERPRET", "COLUMNS", "PYTEST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    kept |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, args)]
    return subprocess.run(command, cwd=cwd, env=kept, capture_output=True, text=True, timeout=1200)
