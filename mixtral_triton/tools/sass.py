"""Count the instructions of the main loops of a kernel for NVIDIA in its machine code (SASS).

The figure is FLOP per instruction: FLOP that a warp's tensor-core instructions do in one turn of the loop, by the other
instructions the warp issues in that turn. A warpgroup's instruction (HGMMA 64xNxK) is issued by each of its four warps,
which do a quarter of its FLOP each. More is better: the tensor cores wait less for everything else.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple, dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import triton
from triton.runtime.cache import get_cache_manager

Code = list[tuple[int, str]]  # address and text of each instruction

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
# A call may come back: to the code after it, that is one more condition.
_JUMP = re.compile(r"^(@\S+\s+)?(?:BRA|(CALL)\.REL)\S*\s+(!?U?P\w+,\s*)?(0x[0-9a-f]+)")
_END = re.compile(r"^(?:EXIT|RET)\b")
_TENSOR = re.compile(r"^(?:@\S+\s+)?(?:UTC)?\w{1,2}G?MMA\.?")
_SHAPE = re.compile(r"GMMA\.64x(\d+)x(\d+)|MMA\.168(\d+)")
_VERSION = Path(__file__).read_bytes() + triton.__version__.encode()
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

    def instructions_a_byte(self, warps: int, size: int) -> float:
        """Return the thread instructions a byte of a turn in which `warps` warps load `size` bytes."""
        return 32 * warps * (self.tensor + self.other) / size


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


def _blocks(code: Code) -> tuple[list[list[str]], list[set[int]]]:
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


def main_loops(cubins: Sequence[Path], arch: str) -> list[tuple[Loop, ...]]:
    """Return each kernel's innermost loops that use the tensor cores; where none does, its innermost loops.

    Triton's cache keeps the counts, by the machine code and this file. The rest is disassembled in one go.
    """
    code = [cubin.read_bytes() for cubin in cubins]
    caches = [get_cache_manager(hashlib.sha256(b"\0".join((_VERSION, each))).hexdigest()) for each in code]
    found = list(map(_cached, caches))
    sections = [_sections(each) if loops is None else [] for each, loops in zip(code, found, strict=True)]
    every = list(chain.from_iterable(sections))
    disassembled = iter(_disassemble(every, arch) if every else ())
    for index, cache in enumerate(caches):
        if found[index] is None:
            loops = tuple(loop for _ in sections[index] for loop in _loops(next(disassembled)))
            found[index] = loops
            with suppress(OSError):  # a full disk: they are counted again next time
                cache.put(json.dumps([astuple(loop) for loop in loops]), "loops.json", False)
    return [loops or () for loops in found]


def _cached(cache: Any) -> tuple[Loop, ...] | None:
    with suppress(OSError, ValueError, TypeError):  # a damaged file counts as none
        if file := cache.get_file("loops.json"):
            return tuple(Loop(*loop) for loop in json.loads(Path(file).read_text()))
    return None


def _loops(code: Code) -> list[Loop]:
    blocks, before = _blocks(code)
    tensor = {index for index, block in enumerate(blocks) if any(map(_TENSOR.match, block))}
    every = _natural_loops(before)
    working = [loop for loop in every if loop & tensor] or every
    return [
        _count([text for index in sorted(loop) for text in blocks[index]])
        for loop in working
        if not any(other < loop for other in working)
    ]


def _count(body: list[str]) -> Loop:
    """Count a loop; the FLOP of a warp are those of 64xNxK by four warps, or of 16x8xK by one."""
    tensor = [text for text in body if _TENSOR.match(text)]
    flops: float | None = 0.0
    for text in tensor:
        shape = _SHAPE.search(text)
        size = 0 if not shape else 64 / 4 * int(shape[1]) * int(shape[2]) if shape[1] else 16 * 8 * int(shape[3])
        flops = flops + 2 * size if size and flops is not None else None
    return Loop(len(tensor), len(body) - len(tensor), sum(bool(_SPILL.match(text)) for text in body), flops)
