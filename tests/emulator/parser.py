"""The parser of Triton's PTX: instructions with whole opcodes, numbered registers, labels as instruction indices.

Grammar: PTX ISA 8.x, sections 4 and 5. Any other statement raises Unmodelled with its text.
"""

import re
from collections import ChainMap, namedtuple
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


class Unmodelled(RuntimeError):
    """PTX that the emulator does not model."""


# Operands
Reg = namedtuple("Reg", "slot width")  # bits; 1: a predicate
Imm = namedtuple("Imm", "value")  # the bits of an integer, or of a float written as 0f or 0d and its bits
Symbol = namedtuple("Symbol", "name")  # of a parameter, shared memory, a label, or a special register
Sink = namedtuple("Sink", "")  # `_`
Vector = namedtuple("Vector", "items")
Pair = namedtuple("Pair", "items")  # `d|p`
Address = namedtuple("Address", "base offset coordinates", defaults=(0, ()))
Param = namedtuple("Param", "name size align")
Instruction = namedtuple("Instruction", "opcode operands guard negated text", defaults=(None, False, ""))


@dataclass(frozen=True)
class Program:
    name: str
    threads: int
    params: tuple[Param, ...]
    shared: tuple[str, ...]  # names
    widths: tuple[int, ...]  # bits of each register
    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(repr=False)

    @cached_property
    def starts(self) -> list[int]:
        """Return where basic blocks begin: at labels, after control instructions, and at waits, which may run again."""
        starts = {0, *self.labels.values()}
        for at, inst in enumerate(self.instructions):
            if inst.opcode.startswith("mbarrier.try_wait"):
                starts |= {at, at + 1}
            elif inst.opcode in ("bra", "bra.uni", "ret", "exit", "bar.sync"):
                starts.add(at + 1)
        return sorted(start for start in starts if start < len(self.instructions))


_NUMBER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_TOKEN = re.compile(r"\s*(?:([{}])|([A-Za-z_$%][\w$]*)\s*:(?!:)|([^;]*);)")


class _Parser:
    def __init__(self) -> None:
        self.widths: list[int] = []
        self.scope = ChainMap[str, Any]()  # the registers and labels of the open braces
        self.labels: dict[str, int] = {}
        self.raw: list[tuple[str, ChainMap[str, Any]]] = []
        self.local: set[str] = set()

    def body(self, text: str) -> None:
        """Parse up to the brace that ends the kernel. A brace at the start of a statement opens a scope."""
        at = 0
        while token := _TOKEN.match(text, at):
            at = token.end()
            brace, label, statement = token.groups()
            if brace == "{":
                self.scope = self.scope.new_child()
            elif brace and len(self.scope.maps) == 1:
                return
            elif brace:
                self.scope = self.scope.parents
            elif label:
                unique = f"{label}#{len(self.labels)}"
                self.scope[label] = Symbol(unique)
                self.labels[unique] = len(self.raw)
            else:
                self._statement(" ".join(statement.split()))
        raise Unmodelled("a kernel without an end")

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif found := re.fullmatch(r"\.local \.align \d+ \.b8 (\w+)\[\d+\]", text):
            self.local.add(found[1])  # Triton 3.6 declares some that nothing uses
        elif text.startswith(".") and not text.startswith(".pragma "):
            raise Unmodelled(f"directive: {text}")
        elif not text.startswith("."):
            self.raw.append((text, self.scope))

    def _registers(self, text: str) -> None:
        found = re.fullmatch(r"\.reg\s+\.(pred|[bsu]8|[bsuf](?:16|32|64))\s+(.*)", text, re.S)
        if found is None:
            raise Unmodelled(f"registers: {text}")
        width = 1 if found[1] == "pred" else int(found[1][1:])
        for name in found[2].split(","):
            array = re.fullmatch(r"\s*([\w%$]+)<(\d+)>\s*", name)
            for register in [f"{array[1]}{i}" for i in range(int(array[2]))] if array else [name.strip()]:
                self.scope[register] = Reg(len(self.widths), width)
                self.widths.append(width)

    def instruction(self, text: str, scope: ChainMap[str, Any]) -> Instruction:
        guard, negated, rest = None, False, text
        if found := re.match(r"@(!?)([\w%$]+)\s+", text):
            guard, negated, rest = self._name(found[2], scope), bool(found[1]), text[found.end() :]
        opcode, _, operands = rest.partition(" ")
        parts = tuple(self._operand(part, scope) for part in split(operands))
        return Instruction(opcode, parts, guard, negated, text)

    def _name(self, name: str, scope: ChainMap[str, Any]) -> Any:
        if name in self.local and name not in scope:
            raise Unmodelled(f"local memory: {name}")
        return scope.get(name, Symbol(name))

    def _operand(self, text: str, scope: ChainMap[str, Any]) -> Any:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, scope) for part in split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), scope)
        if _NUMBER.match(text):
            return Imm(int(text.rstrip("U"), 0))
        if re.fullmatch(r"0[fd][0-9a-fA-F]+", text):
            return Imm(int(text[2:], 16))
        if "|" in text:
            return Pair(tuple(self._operand(part.strip(), scope) for part in text.split("|")))
        if re.fullmatch(r"[\w%$.]+", text):
            return self._name(text, scope)
        raise Unmodelled(f"operand: {text}")

    def _address(self, text: str, scope: ChainMap[str, Any]) -> Address:
        first, *rest = split(text)
        coordinates = self._operand(rest[0], scope).items if rest else ()
        found = re.fullmatch(r"([\w%$]+)\s*(?:\+\s*(-?\w+))?", first)
        if found is None or len(rest) > 1:
            raise Unmodelled(f"address: [{text}]")
        return Address(self._name(found[1], scope), int(found[2] or "0", 0), coordinates)


def split(text: str) -> list[str]:
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    parts.append(text[begin:].strip())
    return [part for part in parts if part]


def parse(ptx: str) -> Program:
    """Parse the one kernel of `ptx`, without comments, `.loc` lines and debug sections."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.M)
    text = re.split(r"^\s*\.section", text, maxsplit=1, flags=re.M)[0]
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+\s+[\d, ]+\s*)*)\{", text, re.S))
    if len(entries) != 1 or re.search(r"\.func\b", text):
        raise Unmodelled(f"{len(entries)} kernels, or functions beside them")
    name, params, directives = entries[0].groups()
    parser = _Parser()
    parser.body(text[entries[0].end() :])
    instructions = tuple(parser.instruction(raw, scope) for raw, scope in parser.raw)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*$", directives.strip())
    if threads is None:
        raise Unmodelled(f"threads of a block: {directives.strip()}")
    shared = tuple(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]\s*;", text))
    if len(re.findall(r"\.shared\b[^;]*\[\d*\]\s*;", text)) != len(shared):
        raise Unmodelled("shared memory of a fixed size")
    widths, params = tuple(parser.widths), tuple(_params(params))
    return Program(name, int(threads[1]), params, shared, widths, instructions, parser.labels)


_PARAM = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](8|16|32|64)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"(\w+)(?:\[(\d+)\])?"
)


def _params(text: str) -> Iterator[Param]:
    for param in split(text):
        found = _PARAM.fullmatch(param)
        if found is None:
            raise Unmodelled(f"parameter: {param}")
        size = int(found[2]) // 8 * int(found[4] or 1)
        yield Param(found[3], size, int(found[1] or size))
