"""A kernel compiled for a GPU that need not be there: its resources, its faults, and the table of `compile`."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.tools.disasm import get_sass

from ..kernels.arch import family
from .sass import Loop, main_loops
from .terminal import Column, Table

# Bytes of spills that a kernel may have outside its main loops: harmless, a few instructions a program. AMD: none.
_HARMLESS = {"sm_80": 64, "sm_90": 16, "sm_100": 64}


class Assembly(Mapping[str, Any]):
    """A kernel's stages by kind, read from Triton's cache on access; "sass" is disassembled from the cubin."""

    def __init__(self, files: Iterable[str]) -> None:
        self.paths = {Path(file).suffix[1:]: Path(file) for file in files}

    def __getitem__(self, kind: str) -> Any:
        if kind == "sass" and "cubin" in self.paths:
            return get_sass(self["cubin"])
        path = self.paths[kind]
        return path.read_bytes() if kind in ("cubin", "hsaco") else path.read_text()

    def __iter__(self) -> Iterator[str]:
        return iter(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def usage(self) -> tuple[int, int]:
        """Registers and bytes of spills, see `Compiled`."""
        if "cubin" in self.paths:
            command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(self.paths["cubin"])]
            text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        else:
            text = self["amdgcn"]
        found = {name: int(number) for name, number in re.findall(r"(\w+): *(\d+)", text)}
        if "cubin" in self.paths:
            return found["REG"], found["STACK"] + found["LOCAL"]
        return found["vgpr_count"], 4 * (found["vgpr_spill_count"] + found["sgpr_spill_count"])


@dataclass(frozen=True)
class Compiled:
    """One kernel as it would run on `arch`.

    file          path of the .cubin or .hsaco; None where no files were asked for
    signature     Triton's type by argument: "*bf16", "i32", "constexpr" (also what the JIT makes constant: None, 1)
    dtype         the narrowest type behind a pointer, a floating-point one where there is one
    registers     of a thread; on AMD the vector registers of a lane, those for accumulation included
    spills        bytes a thread keeps in memory for want of registers. NVIDIA: its stack frame, for which a Triton
                  kernel has no other use; AMD: 4 for each spilled vector register, and for each scalar one
    shared_bytes  of a block; limit_bytes: what a block can have on `arch`
    asm           "ptx", "cubin" and "sass", or "amdgcn" and "hsaco"; Triton's own stages beside them
    error         why it does not compile; its figures are 0 then
    """

    op: str
    kernel: str
    arch: str
    file: str | None
    num_warps: int
    num_stages: int
    constexprs: Mapping[str, Any]
    signature: Mapping[str, str]
    dtype: str
    registers: int
    spills: int
    shared_bytes: int
    limit_bytes: int
    asm: Assembly = field(repr=False, compare=False)
    error: str | None = None

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The main loops; none for AMD, whose code is not counted."""
        return main_loops([self.asm.paths["cubin"]], self.arch)[0] if "cubin" in self.asm else ()

    @cached_property
    def uses_tensor_cores(self) -> bool:
        """NVIDIA's."""
        return "mma" in self.asm.get("ptx", "")

    @property
    def needs_loops(self) -> bool:
        """Whether anything below depends on the main loops."""
        return "cubin" in self.asm and (self.spills > 0 or self.uses_tensor_cores)

    @property
    def loop_spills(self) -> int:
        """Instructions in main loops that store or load a spill."""
        return sum(loop.spills for loop in self.loops) if self.spills else 0

    @property
    def loop_flop_per_instruction(self) -> float | None:
        """Of the best main loop (attention: the one without a mask); None without tensor cores whose FLOP are known."""
        loops = self.loops if self.uses_tensor_cores else ()
        return max((loop.flop_per_instruction for loop in loops if loop.flop_per_instruction), default=None)

    @property
    def fault(self) -> str | None:
        """Why this kernel should not run, or None."""
        if self.error:
            return f"does not compile: {self.error}"
        if self.loop_spills or self.spills > _HARMLESS.get(family(self.arch), 0):
            return f"spills {self.spills} bytes, by {self.loop_spills} instructions in main loops"
        if self.shared_bytes > self.limit_bytes:
            return f"needs {self.shared_bytes} of {self.limit_bytes} bytes of shared memory"
        return None


def as_json(compiled: Compiled) -> dict[str, Any]:
    """What `compile --json` prints of one kernel: all but its assembly. `arguments`: types of what is not `constexprs`,
    "constexpr" where the JIT makes it constant (a size of 1, a tensor that is not there)."""
    hidden = ("signature", "asm", "error")
    known = {f.name: getattr(compiled, f.name) for f in fields(compiled) if f.name not in hidden}
    known["arguments"] = {name: kind for name, kind in compiled.signature.items() if name not in compiled.constexprs}
    return known | {name: getattr(compiled, name) for name in ("loop_flop_per_instruction", "loop_spills", "fault")}


Row = Mapping[str, Any]  # of `as_json`
FIGURES = ("registers", "spills", "shared_bytes", "loop_flop_per_instruction", "fault")


def _settings(row: Row) -> dict[str, str]:
    """How kernels of one tile and dtype may differ: constants, sizes of 1, and which tensors there are."""
    found = {name: str(int(value)) for name, value in row["constexprs"].items() if isinstance(value, int)}
    for name, kind in row["arguments"].items():
        if name.endswith("_ptr"):
            found[name.removesuffix("_ptr")] = "none" if kind == "constexpr" else kind.lstrip("*")
        else:
            found[name] = "1" if kind == "constexpr" else ">1"
    return found


def _differences(rows: Sequence[Row], peers: Sequence[Row]) -> str:
    """The settings of `rows` that not all of `peers` have."""
    settings, every = ([_settings(row) for row in some] for some in (rows, peers))
    words = []
    for name in settings[0]:
        values = list(dict.fromkeys(one[name] for one in settings if name in one))
        if {one.get(name) for one in every} - set(values):
            words.append(f"{name}={'|'.join(values)}")
    return " ".join(words)


def fold_rows(rows: Sequence[Row]) -> list[tuple[Row, str, str]]:
    """A line for each kernel, tile and set of figures: one of its rows, the dtypes, and its settings among peers."""

    def key(row: Row) -> tuple[Any, ...]:
        return row["kernel"], _tile(row), row["num_warps"], row["num_stages"]

    lines: dict[tuple[Any, ...], list[Row]] = {}
    for one in rows:
        peers = [row for row in rows if key(row) == key(one) and row["dtype"] == one["dtype"]]
        same = [row for row in peers if all(row[name] == one[name] for name in FIGURES)]
        lines.setdefault((key(one), *(one[name] for name in FIGURES), _differences(same, peers)), []).append(one)
    places = {place: at for at, place in reversed([*enumerate(map(key, rows))])}
    ordered = sorted(lines.items(), key=lambda item: places[item[0][0]])
    return [(line[0], " ".join(sorted({row["dtype"] for row in line})), words[-1]) for words, line in ordered]


def _tile(row: Row) -> str:
    return "x".join(str(size) for name, size in row["constexprs"].items() if name.startswith("BLOCK_"))


def resources_table(arch: str, rows: Sequence[Row]) -> Table:
    names = ("w/s", "regs", "spills", "shared", "FLOP/i")
    columns = [*(Column(name, number=False) for name in ("kernel", "dtype", "tile")), *map(Column, names)]
    caption = "w/s: warps and stages; regs: registers of a thread; FLOP/i: of the tensor cores, for each other "
    caption += "instruction of the main loop; settings: what differs between kernels of one tile"
    table = Table(f"Compiled for {arch}", [*columns, Column("settings", number=False)], caption, keys=3)
    for row, dtypes, words in fold_rows(rows):
        figures = ("" if row[name] is None else f"{row[name]:,.0f}" for name in FIGURES[:-1])
        launch = f"{row['num_warps']}/{row['num_stages']}"
        name, style = row["kernel"].removesuffix("_kernel"), "bold red" if row["fault"] else ""
        table.add(name, dtypes, _tile(row), launch, *figures, words, style=style)
    return table
