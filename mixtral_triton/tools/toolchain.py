"""What Triton needs when it first launches on a GPU: it builds a small C module, against Python's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path


def toolchain_fault() -> str | None:
    """What is missing, and what would do; None if nothing is."""
    if "CC" not in os.environ and not (shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler when it runs on a GPU, and there is no gcc or clang: install one, or set CC"
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        return f"Triton needs Python's headers when it runs on a GPU, and {header} is not there: install python3-dev"
    return None


def fault_behind(error: BaseException) -> str | None:
    """What is missing, where that is why Triton raised `error`: it names no compiler, or one that could not compile."""
    if isinstance(error, RuntimeError) and "C compiler" in str(error):
        return toolchain_fault() or str(error)
    return toolchain_fault() if isinstance(error, subprocess.CalledProcessError) else None
