"""Count the instructions of the main loops of a kernel for NVIDIA in its machine code (SASS).

The figures are the FLOP of a warp's tensor-core instructions in an iteration of the loop by its other instructions, and
the clocks that shared memory takes for it beside those of the tensor cores: where shared memory takes more, it is what
the loop waits for.
"""

import re
import struct
import subprocess
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Sequence
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
_SHARED = re.compile(r"^(?:@(?!!PT)\S+\s+)?(LDSM|LDS|STS|LDGSTS)((?:\.\w+)*)")
_WIDTH = re.compile(r"\.(4|2|128|64)(?=\.|$)")  # matrices of LDSM; bits a thread of the others, else 32
_MMA = re.compile(r"\b([HQ])MMA\.168(\d+)")
# Products of 16 bits with fp32 sums that an SM adds up a clock (NVIDIA's white papers of GA100, GA102, Ada and RTX
# Blackwell). wgmma reads shared memory by itself, which no instruction shows.
_MMA_RATES = {"sm_80": 1024, "sm_86": 512, "sm_89": 512, "sm_120": 512}
_SHARED_BYTES = 128  # that an SM's shared memory moves a clock


@dataclass(frozen=True)
class Loop:
    """Numbers of instructions in an iteration of a loop."""

    tensor: int  # of the tensor cores
    other: int
    spills: int  # among the others, those that store or load a spill
    flops: float | None  # of a warp's tensor-core instructions; None where no instruction has its shape (sm_100)
    shared_bytes: int  # that a warp writes to shared memory and reads from it
    products: int  # 16-bit products of a warp's HMMA and QMMA; one of 8 bits counts half

    @property
    def flop_per_instruction(self) -> float | None:
        return self.flops / self.other if self.flops else None

    def clocks(self, arch: str, num_warps: int) -> tuple[float, float] | None:
        """Return the clocks that shared memory and the tensor cores of an SM take for an iteration of a program,
        without conflicts of banks; None where the instructions do not show both."""
        if not (self.products and arch in _MMA_RATES):
            return None
        return num_warps * self.shared_bytes / _SHARED_BYTES, num_warps * self.products / _MMA_RATES[arch]


def _sections(cubin: bytes) -> list[bytes]:
    """Return the machine code of an ELF file, a section a function."""
    (start,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, of_names = struct.unpack_from("<HHH", cubin, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", cubin, start + size * index) for index in range(count)]
    names = headers[of_names][4]
    texts = (header for header in headers if cubin.startswith(b".text.", names + header[0]))
    return [cubin[offset : offset + length] for *_, offset, length in texts]


def _disassemble(sections: Sequence[bytes], arch: str) -> list[Code]:
    """Return the instructions of each section, in one go: the disassembler takes most of a second to start."""
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


def _reachable(graph: list[list[int]], successors: list[int], without: int) -> set[int]:
    """Return the instructions reachable from `successors`, these included, without passing `without`."""
    reachable, pending = {without}, list(successors)
    while pending:
        if (index := pending.pop()) not in reachable:
            reachable.add(index)
            pending.extend(graph[index])
    return reachable - {without}


def _natural_loops(code: Code) -> list[set[int]]:
    """Return the natural loops: for each back edge to an instruction that dominates it, the instructions between."""
    number = {address: index for index, (address, _) in enumerate(code)}
    before: list[list[int]] = [[] for _ in code]
    after: list[list[int]] = [[] for _ in code]
    for index, (_, text) in enumerate(code):
        jump = _JUMP.match(text)
        falls_through = any(jump.groups()[:3]) if jump else not _END.match(text)
        for successor in (index + 1 if falls_through else None, number.get(int(jump[4], 16)) if jump else None):
            if successor is not None and successor < len(code):
                after[index].append(successor)
                before[successor].append(index)
    loops, every = [], _reachable(after, [0], -1)
    for head in (head for head, jumps in enumerate(before) if max(jumps, default=-1) >= head):
        if ends := [index for index in before[head] if index in every - _reachable(after, [0], head)]:
            loops.append(_reachable(before, ends, head) | {head})
    return loops


def main_loops(cubins: Sequence[Path], arch: str) -> list[tuple[Loop, ...]]:
    """Return each kernel's innermost loops that use the tensor cores; where none does, its innermost loops."""
    sections = [_sections(cubin.read_bytes()) for cubin in cubins]
    code = iter(_disassemble(list(chain.from_iterable(sections)), arch) if sections else ())
    return [tuple(loop for _ in of_cubin for loop in _loops(next(code))) for of_cubin in sections]


def _loops(code: Code) -> Iterator[Loop]:
    """Count the loops; the FLOP of a warp are those of 64xNxK by four warps, or of 16x8xK by one."""
    tensor, every = {index for index, (_, text) in enumerate(code) if _TENSOR.match(text)}, _natural_loops(code)
    working = [loop for loop in every if loop & tensor] or every
    for loop in (loop for loop in working if not any(other < loop for other in working)):
        shapes = [_SHAPE.search(code[index][1]) for index in loop & tensor]
        sizes = [64 / 4 * int(x[1]) * int(x[2]) if x[1] else 16.0 * 8 * int(x[3]) for x in shapes if x]
        flops = 2 * sum(sizes) if all(shapes) else None
        spills = sum(bool(_SPILL.match(code[index][1])) for index in loop)
        moved = sum(_moved_bytes(code[index][1]) for index in loop)
        units = [_MMA.search(code[index][1]) for index in loop & tensor]
        products = sum(16 * 8 * int(unit[2]) // (2 if unit[1] == "Q" else 1) for unit in units if unit)
        yield Loop(len(shapes), len(loop - tensor), spills, flops, moved, products)


def _moved_bytes(text: str) -> int:
    """Return the bytes of shared memory that an instruction of a warp moves."""
    if not (match := _SHARED.match(text)):
        return 0
    width = _WIDTH.search(match[2])
    if match[1] == "LDSM":
        return 128 * int(width[1] if width else 1)  # a matrix of 8 x 8 elements of 16 bits
    return 4 * int(width[1] if width else 32)
