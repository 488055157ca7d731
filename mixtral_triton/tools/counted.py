"""What was counted in a kernel's machine code, remembered beside it in Triton's cache: a disassembler is slow."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import triton

from . import sass

_CODE = b"".join(Path(file).read_bytes() for file in (__file__, sass.__file__)) + triton.__version__.encode()


@dataclass(frozen=True)
class Figures:
    """Of one cubin. spills: bytes of a thread's stack frame; loops: the main loops, None where not counted yet."""

    registers: int
    spills: int
    loops: tuple[sass.Loop, ...] | None = None


def _digest(cubin: Path, body: str) -> str:
    """Of what is remembered, of the machine code it is about, and of the code that counted."""
    return hashlib.sha256(b"\0".join((_CODE, cubin.read_bytes(), body.encode()))).hexdigest()


def _file(cubin: Path) -> Path:
    return cubin.with_suffix(".counted")


def _recall(cubin: Path) -> Figures | None:
    """None where nothing is remembered, or what is there is damaged, of another cubin or counted by other code."""
    try:
        digest, body = _file(cubin).read_text().split("\n", 1)
    except (OSError, ValueError):
        return None
    if digest != _digest(cubin, body):
        return None
    registers, spills, loops = json.loads(body)
    return Figures(registers, spills, None if loops is None else tuple(sass.Loop(*loop) for loop in loops))


def _remember(cubin: Path, figures: Figures) -> None:
    body = json.dumps(astuple(figures))
    own = _file(cubin).with_suffix(f".{os.getpid()}")
    try:
        own.write_text(f"{_digest(cubin, body)}\n{body}")
        own.replace(_file(cubin))
    except OSError:  # a full disk, a cache of somebody else's: it is counted again next time
        own.unlink(missing_ok=True)


def figures(cubin: Path) -> Figures:
    """Registers and spills, and the main loops where they have been counted."""
    if known := _recall(cubin):
        return known
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    usage = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", text)}
    found = Figures(usage["REG"], usage["STACK"] + usage["LOCAL"])
    _remember(cubin, found)
    return found


def loops(cubins: Sequence[Path], arch: str) -> list[tuple[sass.Loop, ...]]:
    """The main loops of each kernel. Those not remembered are disassembled together, which is far quicker."""
    known = [figures(cubin) for cubin in cubins]
    missing = [index for index, each in enumerate(known) if each.loops is None]
    if missing:
        counted = sass.main_loops([cubins[index].read_bytes() for index in missing], arch)
        for index, found in zip(missing, counted, strict=True):
            known[index] = replace(known[index], loops=found)
            _remember(cubins[index], known[index])
    return [each.loops or () for each in known]
