"""A few instructions by themselves: registers in, registers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .machine import SCHEDULES, Code, Machine, Schedule
from .memory import Global, Params, Span
from .text import read
from .values import UNSIGNED, Array


def source(body: str, registers: Mapping[str, int], threads: int = 32, params: str = "") -> str:
    """PTX of a kernel that is `body`, with registers of so many bits."""
    declared = "\n".join(f".reg .{'pred' if bits == 1 else f'b{bits}'} {name};" for name, bits in registers.items())
    return f"""
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry unit({params})
.reqntid {threads}
{{
{declared}
{body}
ret;
}}
"""


def run(
    body: str,
    given: Mapping[str, Array],
    wanted: Mapping[str, int] | None = None,
    *,
    threads: int = 32,
    blocks: int = 1,
    arrays: Sequence[Array] = (),
    shared: int = 0,
    schedule: Schedule = SCHEDULES[2],
    descriptors: Sequence[Any] = (),
) -> dict[str, Array]:
    """`given` registers by name, a value a lane; `wanted` ones by width -> all of them as they are in the end.

    `arrays`: memory that may be reached; `descriptors`: tensor maps, parameters by the names map0, map1, ...
    """
    widths = {name: 1 if value.dtype == bool else 8 * value.itemsize for name, value in given.items()}
    widths |= {name: bits for name, bits in (wanted or {}).items() if name not in widths}
    maps = ", ".join(f".param .align 64 .b8 map{i}[128]" for i in range(len(descriptors)))
    program = read(source(body, widths, threads, maps))
    params = Params(program.params, [bytes(128)] * len(descriptors))
    params.descriptors = {f"map{i}": one for i, one in enumerate(descriptors)}
    memory = Global([Span(f"array {i}", x.ctypes.data, x.nbytes) for i, x in enumerate(arrays)])
    order = np.arange(blocks)[:, None] * np.array([[1, 0, 0]])
    order = order[::-1] if schedule.backwards else order
    machine = Machine(Code(program), schedule, memory, params, shared, (blocks, 1, 1), order, threads // 32)
    found: dict[str, list[tuple[Array, Array]]] = {name: [] for name in widths}
    for frame in machine.frames:
        at = frame.x.astype(int) * threads + frame.tid
        for slot, (name, bits) in enumerate(widths.items()):
            if name in given:
                frame.R[slot] = np.broadcast_to(given[name], threads * blocks)[at].view(UNSIGNED[bits])
    machine.run()
    for frame in machine.frames:
        at = frame.x.astype(int) * threads + frame.tid
        for slot, name in enumerate(widths):
            found[name].append((at, frame.R[slot]))
    out = {}
    for name, parts in found.items():
        out[name] = np.empty(threads * blocks, parts[0][1].dtype)
        for at, values in parts:
            out[name][at] = values
    return out


def bits(x: Any, dtype: str) -> Array:
    """`x` as `dtype`, and its bits."""
    array = np.asarray(x, dtype)
    return array.view(f"u{array.itemsize}")


def samples(width: int, n: int, seed: int = 0) -> Array:
    """Random bits, and those where something happens."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 2**width, n, dtype=np.uint64).astype(UNSIGNED[width])
    edges = [0, 1, 2, 2**width - 1, 2**width - 2, 2 ** (width - 1), 2 ** (width - 1) - 1, 2 ** (width - 1) + 1]
    small = rng.integers(0, 40, n // 4, dtype=np.uint64).astype(UNSIGNED[width])
    out[: len(edges)] = np.array(edges, np.uint64).astype(UNSIGNED[width])
    out[len(edges) : len(edges) + len(small)] = small
    return rng.permutation(out)
