"""A kernel compiled for a GPU that need not be there: its resources, its faults, and the table of `compile`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from ..kernels.arch import family
from .sass import Loop, main_loops
from .terminal import Column, Table

# Bytes of spills that a kernel may have outside its main loops: harmless, a few instructions a program. AMD: none.
_HARMLESS = {"sm_80": 64, "sm_90": 16, "sm_100": 64}


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
    stages        files in Triton's cache by kind: "ptx" and "cubin", or "amdgcn" and "hsaco", and Triton's own
    error         why it does not compile; its figures are 0 then
    """

    op: str
    kernel: str
    arch: str
    num_warps: int
    num_stages: int
    constexprs: Mapping[str, Any]
    signature: Mapping[str, str]
    dtype: str
    limit_bytes: int
    registers: int = 0
    spills: int = 0
    shared_bytes: int = 0
    file: str | None = None
    stages: Mapping[str, Path] = field(default_factory=dict, repr=False, compare=False)
    error: str | None = None

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """The main loops; none for AMD, whose code is not counted."""
        return main_loops([self.stages["cubin"]], self.arch)[0] if "cubin" in self.stages else ()

    @property
    def loop_spills(self) -> int:
        """Instructions in main loops that store or load a spill."""
        return sum(loop.spills for loop in self.loops) if self.spills else 0

    @property
    def loop_flop_per_instruction(self) -> float | None:
        """Of the best main loop (attention: the one without a mask); None without tensor cores whose FLOP are known."""
        return max((loop.flop_per_instruction for loop in self.loops if loop.flop_per_instruction), default=None)

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
    """Return what `compile --json` prints of one kernel."""
    hidden = ("signature", "stages", "error")
    known = {f.name: getattr(compiled, f.name) for f in fields(compiled) if f.name not in hidden}
    return known | {name: getattr(compiled, name) for name in ("loop_flop_per_instruction", "loop_spills", "fault")}


FIGURES = ("registers", "spills", "shared_bytes", "loop_flop_per_instruction")


def resources_table(arch: str, rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate rows of `as_json`: a line for all kernels of the same name, dtype, tile and figures."""
    names = ("w/s", "regs", "spills", "shared", "FLOP/i", "kernels")
    columns = [*(Column(name, number=False) for name in ("kernel", "dtype", "tile")), *map(Column, names)]
    caption = "w/s: warps and stages; regs: registers of a thread; FLOP/i: of the tensor cores, for each other "
    caption += "instruction of the main loop; kernels: how many have these figures"
    table, lines = Table(f"Compiled for {arch}", columns, caption, keys=3), Counter[tuple[str, ...]]()
    for row in rows:
        tile = "x".join(str(size) for name, size in row["constexprs"].items() if name.startswith("BLOCK_"))
        figures = ("" if row[name] is None else f"{row[name]:,.0f}" for name in FIGURES)
        launch = f"{row['num_warps']}/{row['num_stages']}"
        style, name = "bold red" if row["fault"] else "", row["kernel"].removesuffix("_kernel")
        line = (style, name, row["dtype"], tile, launch, *figures)
        lines[line] += 1
    for (style, *cells), count in lines.items():
        table.add(*cells, str(count), style=style)
    return table
