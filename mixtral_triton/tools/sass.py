"""Count the instructions of the main loops of a kernel for NVIDIA in its machine code (SASS).

The figure is FLOP per instruction: FLOP that a warp's tensor-core instructions do in one turn of the loop, by the other
instructions the warp issues in that turn. A warpgroup's instruction (HGMMA 64xNxK) is issued by each of its four warps,
which do a quarter of its FLOP each. More is better: the tensor cores wait less for everything else.
"""

from __future__ import annotations

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path

import triton

Code = list[tuple[int, str]]  # address and text of each instruction

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
# A call may come back: to the code after it, that is one more condition.
_JUMP = re.compile(r"^(@\S+\s+)?(?:BRA|(CALL)\.REL)\S*\s+(!?U?P\w+,\s*)?(0x[0-9a-f]+)")
_END = re.compile(r"^(?:EXIT|RET)\b")
_TENSOR = re.compile(r"^(?:@\S+\s+)?(?:UTC)?\w{1,2}G?MMA\.?")
_SHAPE = re.compile(r"GMMA\.64x(\d+)x(\d+)|MMA\.168(\d+)")
_SPILL = re.compile(r"^(?:@\S+\s+)?(?:STL|LDL)\b")


@dataclass(frozen=True)
class Loop:
    """One loop of a kernel: instructions of a turn.

    tensor  those of the tensor cores; other: all the rest; spills: those of the rest that store or load a spill
    flops   that a warp's tensor-core instructions do; None where the shape is not in the instruction (sm_100)
    """

    tensor: int
    other: int
    spills: int
    flops: float | None

    @property
    def flop_per_instruction(self) -> float | None:
        return self.flops / self.other if self.flops else None


def _sections(cubin: bytes) -> list[bytes]:
    """The machine code of an ELF file, a section a function."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * index) for index in range(count)]
    names = headers[of_names][4]
    texts = (header for header in headers if cubin.startswith(b".text.", names + header[0]))
    return [cubin[offset : offset + length] for *_, offset, length in texts]


def _disassemble(sections: Sequence[bytes], arch: str) -> list[Code]:
    """The instructions of each section. All in one go: the disassembler takes most of a second to start."""
    number = int(arch.removeprefix("sm_"))
    # Those of one generation since sm_100 have the same encodings, and an older disassembler knows the first alone.
    target = f"SM{number // 10 * 10}a" if number >= 90 else f"SM{number}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(sections))
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "--no-dataflow", "--binary", target, file.name]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    lines = [(int(address, 16), instruction) for address, instruction in _LINE.findall(text)]
    ends = [bisect_left(lines, (address,)) for address in accumulate(map(len, sections), initial=0)]
    return [lines[begin:end] for begin, end in pairwise(ends)]


def _successors(code: Code) -> list[list[int]]:
    """Which instructions may come after each, by number."""
    number = {address: index for index, (address, _) in enumerate(code)}
    after: list[list[int]] = []
    for index, (_, text) in enumerate(code):
        jump = _JUMP.match(text)
        falls_through = any(jump.groups()[:3]) if jump else not _END.match(text)
        successors = (index + 1 if falls_through else None, number.get(int(jump[4], 16)) if jump else None)
        after.append([successor for successor in successors if successor is not None and successor < len(code)])
    return after


def _reachable(graph: list[list[int]], successors: list[int], without: int) -> set[int]:
    """Return the instructions reachable from `successors`, these included, without passing `without`."""
    found, pending = {without}, list(successors)
    while pending:
        if (index := pending.pop()) not in found:
            found.add(index)
            pending.extend(graph[index])
    return found - {without}


def _natural_loops(after: list[list[int]]) -> list[set[int]]:
    """Return the natural loops: for each back edge to an instruction that dominates it, the instructions between."""
    before: list[list[int]] = [[] for _ in after]
    for index, successors in enumerate(after):
        for successor in successors:
            before[successor].append(index)
    loops, every = [], _reachable(after, [0], -1)
    for head in sorted(
        {successor for index, successors in enumerate(after) for successor in successors if successor <= index}
    ):
        ends = [index for index in before[head] if index in every - _reachable(after, [0], head)]
        if ends:
            loops.append(_reachable(before, ends, head) | {head})
    return loops


def main_loops(cubins: Sequence[Path], arch: str) -> list[tuple[Loop, ...]]:
    """Return each kernel's innermost loops that use the tensor cores; where none does, its innermost loops."""
    sections = [_sections(cubin.read_bytes()) for cubin in cubins]
    code = iter(_disassemble(list(chain.from_iterable(sections)), arch) if sections else ())
    return [tuple(loop for _ in each for loop in _loops(next(code))) for each in sections]


def _loops(code: Code) -> list[Loop]:
    tensor = {index for index, (_, text) in enumerate(code) if _TENSOR.match(text)}
    every = _natural_loops(_successors(code))
    working = [loop for loop in every if loop & tensor] or every
    innermost = [loop for loop in working if not any(other < loop for other in working)]
    return [_count([code[index][1] for index in sorted(loop)]) for loop in innermost]


def _count(body: list[str]) -> Loop:
    """Count a loop; the FLOP of a warp are those of 64xNxK by four warps, or of 16x8xK by one."""
    tensor = [text for text in body if _TENSOR.match(text)]
    flops: float | None = 0.0
    for text in tensor:
        shape = _SHAPE.search(text)
        size = 0 if not shape else 64 / 4 * int(shape[1]) * int(shape[2]) if shape[1] else 16 * 8 * int(shape[3])
        flops = flops + 2 * size if size and flops is not None else None
    return Loop(len(tensor), len(body) - len(tensor), sum(bool(_SPILL.match(text)) for text in body), flops)
