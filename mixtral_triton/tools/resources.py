"""Compiled kernels as a table: what tells those of one kernel apart is shown, and equal ones are one row."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from .tables import Column, Table

Kernel = Mapping[str, Any]  # as `offline.as_json` gives it
FIGURES = ("registers", "spills", "shared_bytes", "loop_flop_per_instruction", "fault")


def _tile(kernel: Kernel) -> str:
    return "x".join(str(size) for name, size in kernel["constexprs"].items() if name.startswith("BLOCK_"))


def _told(kernel: Kernel) -> dict[str, str]:
    """What a kernel may differ in beside its tile and dtype, as words: constants first, then sizes, then tensors."""
    constants = {name: value for name, value in kernel["constexprs"].items() if not name.startswith("BLOCK_")}
    found = {name: f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in constants.items()}
    for name, kind in sorted(kernel["arguments"].items(), key=lambda item: item[0].endswith("_ptr")):
        tensor = name.removesuffix("_ptr")
        if name.endswith("_ptr"):
            found[name] = f"no {tensor}" if kind == "constexpr" else f"{tensor} {kind.lstrip('*')}"
        else:
            found[name] = f"{name}=1" if kind == "constexpr" else f"{name}>1"
    return found


def _apart(kernels: Sequence[Kernel]) -> list[dict[str, str]]:
    """Of each kernel the words that tell it from the others: no more of them than it takes."""
    told = [_told(kernel) for kernel in kernels]
    kept: list[str] = []
    for name in dict.fromkeys(name for words in told for name in words):
        if _kinds(told, [*kept, name]) > _kinds(told, kept):
            kept.append(name)
    return [{name: words[name] for name in kept if name in words} for words in told]


def _kinds(told: Sequence[Mapping[str, str]], names: Sequence[str]) -> int:
    return len({tuple(words.get(name) for name in names) for words in told})


def _all_of(members: Sequence[Mapping[str, str]], others: Sequence[Mapping[str, str]]) -> str:
    """Kernels of one row in words: nothing where they are all there are, a list of each thing where those combine."""
    if len(members) == len(others):
        return ""
    values = {name: list(dict.fromkeys(words[name] for words in members)) for name in members[0]}
    combined = 1
    for found in values.values():
        combined *= len(found)
    if combined == len(members):
        return " ".join("|".join(found) for found in values.values())
    return "; ".join(" ".join(words.values()) for words in members)


def _figures(kernel: Kernel) -> tuple[Any, ...]:
    return tuple(kernel[name] for name in FIGURES)


def _key(kernel: Kernel) -> tuple[Any, ...]:
    return (kernel["kernel"], _tile(kernel), kernel["num_warps"], kernel["num_stages"])


def folded(kernels: Sequence[Kernel]) -> list[tuple[Kernel, str, str]]:
    """A row for each kernel, tile and set of figures: one kernel of it, the dtypes, and what tells it from others."""
    rows: dict[tuple[Any, ...], list[str]] = {}
    first: dict[tuple[Any, ...], Kernel] = {}
    order = {key: at for at, key in reversed(list(enumerate(map(_key, kernels))))}
    alike = sorted(kernels, key=lambda kernel: (order[_key(kernel)], kernel["dtype"]))
    for _, group in groupby(alike, key=lambda kernel: (_key(kernel), kernel["dtype"])):
        for kernel, words in _merged(list(group)):
            key = (_key(kernel), words, _figures(kernel))
            first.setdefault(key, kernel)
            rows.setdefault(key, []).append(kernel["dtype"])
    return [(first[key], " ".join(dtypes), key[1]) for key, dtypes in rows.items()]


def _merged(group: Sequence[Kernel]) -> Iterator[tuple[Kernel, str]]:
    """Kernels of one tile and dtype, those of the same figures once, in words."""
    words = _apart(group)
    for figures in dict.fromkeys(map(_figures, group)):
        members = [at for at, kernel in enumerate(group) if _figures(kernel) == figures]
        yield group[members[0]], _all_of([words[at] for at in members], words)


def resources_table(arch: str, kernels: Sequence[Kernel]) -> Table:
    left = [Column(name, right=False) for name in ("kernel", "dtype", "tile")]
    right = [Column(name) for name in ("w/s", "regs", "spills", "shared", "FLOP/i")]
    table = Table(
        f"Compiled for {arch}",
        [*left, *right, Column("where", level=1, right=False)],
        "w/s: warps and stages; regs: registers of a thread; FLOP/i: of the tensor cores, for each other instruction "
        "of the main loop; where: what tells apart kernels of one tile",
    )
    for kernel, dtypes, words in folded(kernels):
        cells = ("" if kernel[name] is None else f"{kernel[name]:,.0f}" for name in FIGURES[:-1])
        left_cells = (kernel["kernel"].removesuffix("_kernel"), dtypes, _tile(kernel))
        ways = f"{kernel['num_warps']}/{kernel['num_stages']}"
        table.add(*left_cells, ways, *cells, words, style="bold red" if kernel["fault"] else "")
    return table
