"""The parser of Triton's PTX: instructions with whole opcodes, numbered registers, labels as instruction indices.

Grammar: PTX ISA 8.x, sections 4 and 5. Any other statement raises Unmodelled with its text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


class Unmodelled(RuntimeError):
    """PTX that the emulator does not model."""


@dataclass(frozen=True)
class Reg:
    slot: int
    width: int  # bits; 1: a predicate


@dataclass(frozen=True)
class Imm:
    """The bits of an integer, or of a float written as 0f or 0d and its bits."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A parameter, shared memory, a label, or a special register."""

    name: str


@dataclass(frozen=True)
class Sink:
    """The operand `_`."""


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """The operand `d|p`."""

    items: tuple[Any, ...]


@dataclass(frozen=True)
class Address:
    base: Any
    offset: int = 0
    coordinates: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Instruction:
    opcode: str
    operands: tuple[Any, ...]
    guard: Reg | None = None
    negated: bool = False
    text: str = ""


@dataclass(frozen=True)
class Param:
    name: str
    size: int
    align: int


@dataclass(frozen=True)
class Program:
    name: str
    target: str
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
            waits = inst.opcode.startswith("mbarrier.try_wait")
            if waits or inst.opcode in ("bra", "bra.uni", "ret", "exit", "bar.sync"):
                starts |= {at, at + 1} if waits else {at + 1}
        return sorted(start for start in starts if start < len(self.instructions))


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_NUMBER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")


Scope = dict[str, Any]  # the registers and labels of one pair of braces


class _Parser:
    def __init__(self) -> None:
        self.widths: list[int] = []
        self.scopes: list[Scope] = [Scope()]
        self.labels: dict[str, int] = {}
        self.raw: list[tuple[str, tuple[Scope, ...]]] = []
        self.local: set[str] = set()

    def statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith(".pragma "):
            return
        elif found := re.fullmatch(r"\.local \.align \d+ \.b8 (\w+)\[\d+\]", text):
            self.local.add(found[1])  # Triton 3.6 declares some that nothing uses
        elif text.startswith("."):
            raise Unmodelled(f"directive: {text}")
        else:
            self.raw.append((text, tuple(self.scopes)))

    def label(self, name: str) -> None:
        unique = f"{name}#{len(self.labels)}"
        self.scopes[-1][name] = Symbol(unique)
        self.labels[unique] = len(self.raw)

    def _registers(self, text: str) -> None:
        found = re.fullmatch(r"\.reg\s+\.(pred|[bsuf](?:16|32|64))\s+(.*)", text, re.S)
        if found is None:
            raise Unmodelled(f"registers: {text}")
        width = 1 if found[1] == "pred" else int(found[1][1:])
        for name in found[2].split(","):
            array = re.fullmatch(r"\s*([\w%$]+)<(\d+)>\s*", name)
            for register in [f"{array[1]}{i}" for i in range(int(array[2]))] if array else [name.strip()]:
                self.scopes[-1][register] = Reg(len(self.widths), width)
                self.widths.append(width)

    def instruction(self, text: str, scopes: tuple[Scope, ...]) -> Instruction:
        guard, negated, rest = None, False, text
        if found := re.match(r"@(!?)([\w%$]+)\s+", text):
            guard, negated, rest = self._name(found[2], scopes), bool(found[1]), text[found.end() :]
        opcode, _, operands = rest.partition(" ")
        parts = tuple(self._operand(part, scopes) for part in split(operands))
        return Instruction(opcode, parts, guard, negated, text)

    def _name(self, name: str, scopes: tuple[Scope, ...]) -> Any:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        if name in self.local:
            raise Unmodelled(f"local memory: {name}")
        return Symbol(name)

    def _operand(self, text: str, scopes: tuple[Scope, ...]) -> Any:
        if text == "_":
            return Sink()
        if text.startswith("{"):
            return Vector(tuple(self._operand(part, scopes) for part in split(text[1:-1])))
        if text.startswith("["):
            return self._address(text[1:-1].strip(), scopes)
        if _NUMBER.match(text):
            return Imm(int(text.rstrip("U"), 0))
        if re.fullmatch(r"0[fd][0-9a-fA-F]+", text):
            return Imm(int(text[2:], 16))
        if "|" in text:
            return Pair(tuple(self._operand(part.strip(), scopes) for part in text.split("|")))
        if re.fullmatch(r"[\w%$.]+", text):
            return self._name(text, scopes)
        raise Unmodelled(f"operand: {text}")

    def _address(self, text: str, scopes: tuple[Scope, ...]) -> Address:
        first, *rest = split(text)
        coordinates = self._operand(rest[0], scopes).items if rest else ()
        found = re.fullmatch(r"([\w%$]+)\s*(?:\+\s*(-?\w+))?", first)
        if found is None or len(rest) > 1:
            raise Unmodelled(f"address: [{text}]")
        return Address(self._name(found[1], scopes), int(found[2] or "0", 0), coordinates)


def split(text: str) -> list[str]:
    """Split at the commas outside brackets."""
    parts, depth, begin = [], 0, 0
    for at, character in enumerate(text):
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    parts.append(text[begin:].strip())
    return [part for part in parts if part]


def strip_comments(ptx: str) -> str:
    """Remove comments, `.loc` lines and debug sections."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.M)
    return re.split(r"^\s*\.section", text, maxsplit=1, flags=re.M)[0]


def parse(ptx: str) -> Program:
    """Parse the one kernel of `ptx`."""
    text = strip_comments(ptx)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+\s+[\d, ]+\s*)*)\{", text, re.S))
    target = re.search(r"\.target\s+(\w+)", text)
    if len(entries) != 1 or target is None or re.search(r"\.func\b", text):
        raise Unmodelled(f"{len(entries)} kernels, or functions beside them")
    name, params, directives = entries[0].groups()
    parser = _Parser()
    _body(text[entries[0].end() :], parser)
    instructions = tuple(parser.instruction(raw, scopes) for raw, scopes in parser.raw)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*$", directives.strip())
    if threads is None:
        raise Unmodelled(f"threads of a block: {directives.strip()}")
    shared = tuple(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]\s*;", text))
    if len(re.findall(r"\.shared\b[^;]*\[\d*\]\s*;", text)) != len(shared):
        raise Unmodelled("shared memory of a fixed size")
    widths = tuple(parser.widths)
    return Program(name, target[1], int(threads[1]), _params(params), shared, widths, instructions, parser.labels)


def _body(text: str, parser: _Parser) -> None:
    """Parse statements up to the brace that ends the kernel. A brace at the start of a statement opens a scope."""
    at, depth = 0, 0
    while True:
        while text[at].isspace():
            at += 1
        if text[at] == "{":
            parser.scopes.append(Scope())
            depth, at = depth + 1, at + 1
        elif text[at] == "}":
            if depth == 0:
                return
            parser.scopes.pop()
            depth, at = depth - 1, at + 1
        elif label := _LABEL.match(text, at):
            parser.label(label[1])
            at = label.end()
        else:
            end = text.index(";", at)
            parser.statement(" ".join(text[at:end].split()))
            at = end + 1


def _params(text: str) -> tuple[Param, ...]:
    params = []
    for param in split(text):
        found = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](8|16|32|64)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
            r"(\w+)(?:\[(\d+)\])?",
            param,
        )
        if found is None:
            raise Unmodelled(f"parameter: {param}")
        size = _SIZES[found[2]] * int(found[4] or 1)
        params.append(Param(found[3], size, int(found[1] or size)))
    return tuple(params)
