"""Runs a few instructions: registers in, registers out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest

from mixtral_triton.kernels.launch import INTERPRETED

from .machine import SCHEDULES, Code, Machine, Schedule
from .memory import SHARED_BASE, Fault, Global, Params, Span
from .parser import parse
from .values import UNSIGNED, Array

compiled_only = pytest.mark.skipif(INTERPRETED, reason="tests the emulator, which no kernel of this process uses")
every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)


def source(body: str, registers: Mapping[str, int], threads: int = 32, params: str = "") -> str:
    """Return the PTX of a kernel with registers of these widths."""
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
    inputs: Mapping[str, Array],
    outputs: Mapping[str, int] | None = None,
    *,
    threads: int = 32,
    blocks: int = 1,
    arrays: Sequence[Array] = (),
    shared: int = 0,
    schedule: Schedule = SCHEDULES[2],
    descriptors: Sequence[Any] = (),
) -> dict[str, Array]:
    """Run `body` and return the final values of all registers by name.

    inputs: initial values by name, one a lane; outputs: widths of further registers; arrays: accessible memory;
    descriptors: tensor maps, the parameters map0, map1, ...
    """
    widths = {name: 1 if value.dtype == bool else 8 * value.itemsize for name, value in inputs.items()}
    widths |= {name: bits for name, bits in (outputs or {}).items() if name not in widths}
    maps = ", ".join(f".param .align 64 .b8 map{i}[128]" for i in range(len(descriptors)))
    program = parse(source(body, widths, threads, maps))
    params = Params(program.params, [bytes(128)] * len(descriptors))
    params.descriptors = {f"map{i}": descriptor for i, descriptor in enumerate(descriptors)}
    memory = Global([Span(f"array {i}", x.ctypes.data, x.nbytes) for i, x in enumerate(arrays)])
    order = np.arange(blocks)[:, None] * np.array([[1, 0, 0]])
    order = order[::-1] if schedule.backwards else order
    machine = Machine(Code(program), schedule, memory, params, shared, (blocks, 1, 1), order, threads // 32)
    for frame in machine.frames:
        at = frame.x.astype(int) * threads + frame.tid
        for slot, (name, bits) in enumerate(widths.items()):
            if name in inputs:
                frame.R[slot] = np.broadcast_to(inputs[name], threads * blocks)[at].view(UNSIGNED[bits])
    machine.run()
    out = {name: np.empty(threads * blocks, UNSIGNED[bits]) for name, bits in widths.items()}
    for frame in machine.frames:
        at = frame.x.astype(int) * threads + frame.tid
        for slot, name in enumerate(widths):
            out[name][at] = frame.R[slot]
    return out


def check_fault(message: str, body: str, inputs: Mapping[str, Array], outputs: Any = None, **options: Any) -> None:
    """Check that `body` raises a fault with this message; "": that it runs."""
    if message:
        with pytest.raises(Fault, match=message):
            run(body, inputs, outputs, **options)
    else:
        run(body, inputs, outputs, **options)


def bits(x: Any, dtype: str) -> Array:
    """Return the bits of `x` as `dtype`."""
    array = np.asarray(x, dtype)
    return array.view(f"u{array.itemsize}")


def samples(width: int, n: int, seed: int = 0) -> Array:
    """Return random bits, small numbers, and the numbers where overflows and signs change."""
    rng = np.random.default_rng(seed)
    out = rng.integers(0, 2**width, n, dtype=np.uint64).astype(UNSIGNED[width])
    edges = [0, 1, 2, 2**width - 1, 2**width - 2, 2 ** (width - 1), 2 ** (width - 1) - 1, 2 ** (width - 1) + 1]
    small = rng.integers(0, 40, n // 4, dtype=np.uint64).astype(UNSIGNED[width])
    out[: len(edges)] = np.array(edges, np.uint64).astype(UNSIGNED[width])
    out[len(edges) : len(edges) + len(small)] = small
    return rng.permutation(out)


def shared_addresses(n: int, size: int) -> Array:
    """Return the shared address of each of `n` lanes' elements of `size` bytes."""
    return (SHARED_BASE + size * np.arange(n)).astype(np.uint32)
