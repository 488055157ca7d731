"""Which arguments a kernel accesses before and after its wait for earlier launches, according to its PTX.

Instructions are taken in the order of the text. An address belongs to the pointer parameters that it is computed from;
a loaded value belongs to none.
"""

import re
from dataclasses import dataclass

from mixtral_triton.tools.offline import Compiled

_PARAMETER = re.compile(r"ld\.param\.\w+\s+(%\w+), \[\w+_param_(\d+)\]")
_GLOBAL = re.compile(r"(ld|st|red|atom|prefetch)\.(?:\w+\.)*global|(cp\.async)\.\w+\.shared\S*\.global")
_ADDRESSES = re.compile(r"\[\s*(%\w+)")
_REGISTER = re.compile(r"%\w+")
_PREDICATE = re.compile(r"^@!?%\w+\s+")


@dataclass(frozen=True)
class Order:
    """Names of tensors accessed `before` and `after` the first of `waits` waits; `stores`: those stored before it;
    `prefetched`: those that go into L2 before it; `releases_first`: the next launch may start before it."""

    waits: int
    before: frozenset[str]
    after: frozenset[str]
    stores: frozenset[str]
    prefetched: frozenset[str]
    releases_first: bool


def order(compiled: Compiled) -> Order:
    """Return the accesses of a kernel whose tensors are pointer arguments."""
    runtime = [(name, kind) for name, kind in compiled.signature.items() if kind != "constexpr"]
    names = {at: name.removesuffix("_ptr") for at, (name, kind) in enumerate(runtime) if kind.startswith("*")}
    pointers: dict[str, frozenset[str]] = {}  # by register
    touched: list[set[str]] = [set(), set()]
    stores: set[str] = set()
    prefetched: set[str] = set()
    waits, releases_first = 0, False
    for line in compiled.stages["ptx"].read_text().splitlines():
        text = _PREDICATE.sub("", line.strip().split("//")[0])
        if found := _PARAMETER.search(text):
            pointers[found[1]] = frozenset({names[int(found[2])]} if int(found[2]) in names else ())
        elif text.startswith("griddepcontrol.wait"):
            waits += 1
        elif text.startswith("griddepcontrol.launch_dependents"):
            releases_first |= not waits
        elif found := _GLOBAL.search(text):
            accessed = pointers.get(_ADDRESSES.findall(text)[-1 if found[2] else 0], frozenset())
            if found[1] == "prefetch":
                prefetched |= accessed if not waits else set()
                continue
            touched[waits > 0] |= accessed
            stores |= accessed if found[1] not in (None, "ld") and not waits else set()
            # The destinations of a load precede its address.
            pointers |= {register: frozenset() for register in _REGISTER.findall(text.partition("[")[0])}
        elif registers := _REGISTER.findall(text):
            pointers[registers[0]] = frozenset().union(*(pointers.get(source, ()) for source in registers[1:]))
    names_of = map(frozenset, (*touched, stores, prefetched))
    return Order(waits, *names_of, releases_first)
