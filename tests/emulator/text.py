"""PTX, as Triton emits it, read into a program: instructions with whole opcodes, registers by number, labels by place.

Grammar: PTX ISA 8.x, sections 4 and 5. What is not read here is an error that gives the statement.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


class Unmodelled(RuntimeError):
    """PTX that this executor does not know, named."""


@dataclass(frozen=True)
class Reg:
    slot: int
    width: int  # bits; 1: a predicate


@dataclass(frozen=True)
class Imm:
    """The bits of a number: of an integer, or of a float written as 0f or 0d and its bits."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """A parameter, shared memory, a label, or a special register."""

    name: str


@dataclass(frozen=True)
class Sink:
    """`_`"""


@dataclass(frozen=True)
class Vector:
    items: tuple[Any, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`"""

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
    shared: tuple[str, ...]  # names of shared memory
    widths: tuple[int, ...]  # bits of each register
    instructions: tuple[Instruction, ...]
    labels: dict[str, int] = field(repr=False)

    @cached_property
    def starts(self) -> list[int]:
        """Where straight pieces begin: at labels, and after what may send lanes elsewhere or make them wait."""
        places = {0, *self.labels.values()}
        places |= {at + 1 for at, one in enumerate(self.instructions) if ends_piece(one.opcode)}
        places |= {at for at, one in enumerate(self.instructions) if waits(one.opcode)}  # it may run again
        return sorted(place for place in places if place < len(self.instructions))


def ends_piece(opcode: str) -> bool:
    return opcode in ("bra", "bra.uni", "ret", "exit", "bar.sync") or waits(opcode)


def waits(opcode: str) -> bool:
    return opcode.startswith("mbarrier.try_wait")


_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}
_NUMBER = re.compile(r"[+-]?(0[xX][0-9a-fA-F]+|\d+)U?$")
_LABEL = re.compile(r"([A-Za-z_$%][\w$]*)\s*:(?!:)")


class _Scope(dict[str, Any]):
    """Names of one pair of braces: registers and labels."""


class _Reader:
    def __init__(self) -> None:
        self.widths: list[int] = []
        self.scopes: list[_Scope] = [_Scope()]
        self.labels: dict[str, int] = {}
        self.raw: list[tuple[str, tuple[_Scope, ...]]] = []
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
            many = re.fullmatch(r"\s*([\w%$]+)<(\d+)>\s*", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]
            for one in names:
                self.scopes[-1][one] = Reg(len(self.widths), width)
                self.widths.append(width)

    def instruction(self, text: str, scopes: tuple[_Scope, ...]) -> Instruction:
        guard, negated, rest = None, False, text
        if found := re.match(r"@(!?)([\w%$]+)\s+", text):
            guard, negated, rest = self._name(found[2], scopes), bool(found[1]), text[found.end() :]
        opcode, _, operands = rest.partition(" ")
        parts = tuple(self._operand(part, scopes) for part in split(operands))
        return Instruction(opcode, parts, guard, negated, text)

    def _name(self, name: str, scopes: tuple[_Scope, ...]) -> Any:
        for scope in reversed(scopes):
            if name in scope:
                return scope[name]
        if name in self.local:
            raise Unmodelled(f"local memory: {name}")
        return Symbol(name)

    def _operand(self, text: str, scopes: tuple[_Scope, ...]) -> Any:
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

    def _address(self, text: str, scopes: tuple[_Scope, ...]) -> Address:
        first, *rest = split(text)
        coordinates = self._operand(rest[0], scopes).items if rest else ()
        found = re.fullmatch(r"([\w%$]+)\s*(?:\+\s*(-?\w+))?", first)
        if found is None or len(rest) > 1:
            raise Unmodelled(f"address: [{text}]")
        return Address(self._name(found[1], scopes), int(found[2] or "0", 0), coordinates)


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, begin = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    parts.append(text[begin:].strip())
    return [part for part in parts if part]


def without_remarks(ptx: str) -> str:
    """Without comments, `.loc` lines and the debugger's sections."""
    text = re.sub(r"//[^\n]*", "", ptx)
    text = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", text, flags=re.M)
    return re.split(r"^\s*\.section", text, maxsplit=1, flags=re.M)[0]


def read(ptx: str) -> Program:
    """The one kernel of `ptx`."""
    text = without_remarks(ptx)
    entries = list(re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*((?:\.\w+\s+[\d, ]+\s*)*)\{", text, re.S))
    target = re.search(r"\.target\s+(\w+)", text)
    if len(entries) != 1 or target is None or re.search(r"\.func\b", text):
        raise Unmodelled(f"{len(entries)} kernels, or functions beside them")
    name, params, directives = entries[0].groups()
    reader = _Reader()
    _body(text[entries[0].end() :], reader)
    instructions = tuple(reader.instruction(raw, scopes) for raw, scopes in reader.raw)
    threads = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)(?:\s*,\s*1)*\s*$", directives.strip())
    if threads is None:
        raise Unmodelled(f"threads of a block: {directives.strip()}")
    shared = tuple(re.findall(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]\s*;", text))
    if len(re.findall(r"\.shared\b[^;]*\[\d*\]\s*;", text)) != len(shared):
        raise Unmodelled("shared memory of a fixed size")
    return Program(
        name, target[1], int(threads[1]), _params(params), shared, tuple(reader.widths), instructions, reader.labels
    )


def _body(text: str, reader: _Reader) -> None:
    """Statements up to the brace that ends the kernel. A brace where a statement begins opens a scope."""
    at, depth = 0, 0
    while True:
        while text[at].isspace():
            at += 1
        if text[at] == "{":
            reader.scopes.append(_Scope())
            depth, at = depth + 1, at + 1
        elif text[at] == "}":
            if depth == 0:
                return
            reader.scopes.pop()
            depth, at = depth - 1, at + 1
        elif label := _LABEL.match(text, at):
            reader.label(label[1])
            at = label.end()
        else:
            end = text.index(";", at)
            reader.statement(" ".join(text[at:end].split()))
            at = end + 1


def _params(text: str) -> tuple[Param, ...]:
    params = []
    for one in split(text):
        found = re.fullmatch(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[busf](8|16|32|64)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
            r"(\w+)(?:\[(\d+)\])?",
            one,
        )
        if found is None:
            raise Unmodelled(f"parameter: {one}")
        size = _SIZES[found[2]] * int(found[4] or 1)
        params.append(Param(found[3], size, int(found[1] or size)))
    return tuple(params)
