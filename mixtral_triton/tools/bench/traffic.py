"""Traffic of the operations at reduced sizes, counted in interpreted kernels: JSON lines for `bench`.

    TRITON_INTERPRET=1 python -m mixtral_triton.tools.bench.traffic ARCH '[["route", {"T": 64, "E": 8, "K": 2}, "bfloat16"]]'

A process of its own, since Triton either interprets or compiles. The tiles are those that `ARCH` gets at these sizes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from ...kernels.experts.tiles import DECODE_TOKENS
from ...kernels.launch import using_arch
from ...kernels.op import Shape, Sizes
from ..traffic import count_traffic
from .cases import BENCHED, Case

MOST = {"H": 512, "I": 512, "N": 1024, "T": 128, "B": 2, "S": 1024, "C": 1024, "Hkv": 2}


def reduced(sizes: Sizes) -> Shape:
    """Few heads, tokens and keys; query heads a group, the share of a window and a full ring stay what they are."""
    small = Shape(sizes) | {letter: min(size, MOST.get(letter, size)) for letter, size in sizes.items()}
    if sizes["T"] > DECODE_TOKENS:  # the deep tiles of the sort-free experts need no less than that; prefill's do not
        small |= {letter: min(small[letter], 256) for letter in ("H", "I") if letter in small}
    if "Hq" in sizes:
        small["Hq"] = small["Hkv"] * sizes["Hq"] // sizes["Hkv"]
    if sizes.get("S") == sizes["T"]:
        small["S"] = small["T"] = min(sizes["T"], 512)
    held = "C" if "C" in sizes else "S"
    if sizes.get("window"):
        small["window"] = max(1, sizes["window"] * small[held] // sizes[held])
    if "C" in sizes and "past" in sizes:
        small["past"] = small["C"] - 1
    return small


def counted(chosen: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Bytes and FLOP of a call by those that are compulsory; `issued` is None where nothing is multiplied in tiles."""
    seen = set()
    for case in chosen:
        small = Case(case.op, reduced(case.sizes), case.dtype)
        key = (case.op.name, *small.as_dict().items())
        if key in seen:
            continue
        seen.add(key)
        args = small.inputs(torch.device("cpu"))
        with count_traffic() as traffic:
            case.op.run(**args)
        if not traffic.kernels:  # a library does the work
            continue
        cost = small.cost(args)
        touched = sum(argument.distinct for kernel in traffic.kernels for argument in kernel.arguments.values())
        yield {
            "kind": "traffic",
            "op": case.op.name,
            "sizes": small.as_dict(),
            "touched": touched / cost.bytes,
            "moved": traffic.moved() / cost.bytes,
            "issued": traffic.flops / cost.flops if traffic.flops else None,
        }


if __name__ == "__main__":
    told = json.loads(sys.argv[2])
    cases = [Case(BENCHED[name], sizes, getattr(torch, dtype)) for name, sizes, dtype in told]
    with using_arch(sys.argv[1]):
        for line in counted(cases):
            print(json.dumps(line), flush=True)
