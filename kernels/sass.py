"""What the main loops of a kernel for NVIDIA are made of, counted in its machine code (SASS).

The figure is FLOP per instruction: FLOP that a warp's tensor-core instructions do in one turn of the loop, by the other
instructions the warp issues in that turn. A warpgroup's instruction (HGMMA 64xNxK) is issued by each of its four warps,
which do a quarter of its FLOP each. More is better: the tensor cores wait less for everything else.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass

import triton

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
# A call may come back: to the code after it, that is one more condition.
_JUMP = re.compile(r"^(@\S+\s+)?(?:BRA|(CALL)\.REL)\S*\s+(!?U?P\w+,\s*)?(0x[0-9a-f]+)")
_END = re.compile(r"^(?:EXIT|RET)\b")
_TENSOR = re.compile(r"^(?:@\S+\s+)?(?:UTC)?\w{1,2}G?MMA\.?")
_WARPGROUP = re.compile(r"GMMA\.64x(\d+)x(\d+)")
_WARP = re.compile(r"MMA\.168(\d+)")
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


def _flops(instruction: str) -> float | None:
    """FLOP of one warp."""
    if found := _WARPGROUP.search(instruction):
        return 2 * 64 * int(found[1]) * int(found[2]) / 4
    if found := _WARP.search(instruction):
        return 2 * 16 * 8 * int(found[1])
    return None


def _disassemble(cubin: bytes) -> list[tuple[int, str]]:
    """Address and text of each instruction."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-sass", file.name]
        text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    return [(int(address, 16), instruction) for address, instruction in _LINE.findall(text)]


def _blocks(code: list[tuple[int, str]]) -> tuple[list[list[str]], list[set[int]]]:
    """Straight pieces of code, and which pieces may come before each."""
    jumps = {at: (int(found[4], 16), any(found.groups()[:3])) for at, text in code if (found := _JUMP.match(text))}
    ends = {at for at, text in code if _END.match(text)}
    step = code[1][0] - code[0][0]
    starts = {code[0][0], *(to for to, _ in jumps.values()), *(at + step for at in (*jumps, *ends))}
    blocks: list[list[str]] = []
    number: dict[int, int] = {}
    last: list[int] = []
    for at, text in code:
        if at in starts:
            number[at] = len(blocks)
            blocks.append([])
            last.append(at)
        blocks[-1].append(text)
        last[-1] = at
    before: list[set[int]] = [set() for _ in blocks]
    for index, at in enumerate(last):
        to, falls_through = jumps.get(at, (None, at not in ends))
        if to in number:
            before[number[to]].add(index)
        if falls_through and index + 1 < len(blocks):
            before[index + 1].add(index)
    return blocks, before


def _natural_loops(before: list[set[int]]) -> list[set[int]]:
    """The blocks of each loop: from a block that jumps back to one it cannot be reached without, up to that one."""
    unreached = (1 << len(before) + 1) - 1  # one bit more than there are blocks: stays where no way leads
    dominators = [1] + [unreached] * (len(before) - 1)  # bit b: every way to the block leads through block b
    changed = True
    while changed:
        changed = False
        for index in range(1, len(before)):
            met = unreached
            for other in before[index]:
                met &= dominators[other]
            if dominators[index] != (met | 1 << index):
                dominators[index], changed = met | 1 << index, True
    loops = []
    for head, earlier in enumerate(before):
        ahead = [index for index in earlier if dominators[index] != unreached and dominators[index] >> head & 1]
        if not ahead:
            continue
        body = {head}
        while ahead:
            index = ahead.pop()
            if index not in body:
                body.add(index)
                ahead.extend(before[index])
        loops.append(body)
    return loops


def main_loops(cubin: bytes) -> list[Loop]:
    """The innermost loops that use the tensor cores; where none does, the innermost loops."""
    blocks, before = _blocks(_disassemble(cubin))
    tensor = {index for index, block in enumerate(blocks) if any(map(_TENSOR.match, block))}
    every = _natural_loops(before)
    working = [loop for loop in every if loop & tensor] or every
    return [
        _count([text for index in sorted(loop) for text in blocks[index]])
        for loop in working
        if not any(other < loop for other in working)
    ]


def _count(body: list[str]) -> Loop:
    work = [_flops(text) for text in body if _TENSOR.match(text)]
    flops = None if None in work else sum(map(float, work))  # type: ignore[arg-type]
    return Loop(len(work), len(body) - len(work), sum(bool(_SPILL.match(text)) for text in body), flops)
