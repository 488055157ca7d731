"""Which arguments a kernel for NVIDIA touches before it waits for earlier launches, and which after: read in its PTX.

The order is that of the text, which for what stands before a loop is that of the instructions. An address belongs to
the pointers among the kernel's parameters that it was reckoned from; a number that was loaded belongs to none.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from mixtral_triton.tools.compiled import Compiled

_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")
_GLOBAL = re.compile(r"(ld|st|red|atom)\.(?:\w+\.)*global|(cp\.async)\.\w+\.shared\S*\.global")
_ADDRESSES = re.compile(r"\[\s*(%\w+)")
_REGISTER = re.compile(r"%\w+")
_PREDICATE = re.compile(r"^@!?%\w+\s+")


@dataclass(frozen=True)
class Order:
    """Names of tensors that a kernel loads or stores: before it waits for earlier launches, and from there on.

    waits   how many instructions wait
    stores  those of `before` that are stored
    """

    waits: int
    before: frozenset[str]
    after: frozenset[str]
    stores: frozenset[str]


def order(compiled: Compiled) -> Order:
    """Of a kernel whose tensors come by pointers."""
    runtime = [(name, kind) for name, kind in compiled.signature.items() if kind != "constexpr"]
    names = {at: name.removesuffix("_ptr") for at, (name, kind) in enumerate(runtime) if kind.startswith("*")}
    of: dict[str, frozenset[str]] = {}
    touched: list[set[str]] = [set(), set()]
    stores: set[str] = set()
    waits = 0
    for line in compiled.asm["ptx"].splitlines():
        text = _PREDICATE.sub("", line.strip().split("//")[0])
        if found := _PARAMETER.search(text):
            of[found[1]] = frozenset({names[int(found[2])]} if int(found[2]) in names else ())
        elif text.startswith("griddepcontrol.wait"):
            waits += 1
        elif found := _GLOBAL.search(text):
            pointers = of.get(_ADDRESSES.findall(text)[-1 if found[2] else 0], frozenset())
            touched[waits > 0] |= pointers
            stores |= pointers if found[1] not in (None, "ld") and not waits else set()
            # What a load fills stands in front of its address.
            of |= {register: frozenset() for register in _REGISTER.findall(text.partition("[")[0])}
        elif registers := _REGISTER.findall(text):
            of[registers[0]] = frozenset().union(*(of.get(source, frozenset()) for source in registers[1:]))
    return Order(waits, frozenset(touched[0]), frozenset(touched[1]), frozenset(stores))
