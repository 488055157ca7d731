"""Runs a few instructions: registers in, registers out."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from .machine import SCHEDULES, Code, Machine, Schedule
from .memory import SHARED_BASE, Fault, Global, Params, Span
from .parser import parse
from .values import UNSIGNED, Array

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule.name)

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
SOURCE = """.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry unit({maps})
.reqntid {threads}
{{ {registers} {body} ret; }}
"""


def run(
    body: str, inputs: Mapping[str, Array], outputs: Mapping[str, int] | None = None, *,
    threads: int = 32, blocks: int = 1, arrays: Sequence[Array] = (), shared: int = 0,
    schedule: Schedule = SCHEDULES[2], descriptors: Sequence[Any] = (),
) -> dict[str, Array]:  # fmt: skip
    """Run `body` and return the final values of all registers by name.

    inputs: initial values by name, one a lane; outputs: widths of further registers; arrays: accessible memory;
    descriptors: tensor maps, the parameters map0, map1, ...
    """
    widths = {name: 1 if value.dtype == bool else 8 * value.itemsize for name, value in inputs.items()}
    widths |= {name: bits for name, bits in (outputs or {}).items() if name not in widths}
    maps = ", ".join(f".param .align 64 .b8 map{i}[128]" for i in range(len(descriptors)))
    registers = " ".join(f".reg .{'pred' if bits == 1 else f'b{bits}'} {name};" for name, bits in widths.items())
    program = parse(SOURCE.format(maps=maps, threads=threads, registers=registers, body=body))
    params = Params(program.params, [bytes(128)] * len(descriptors), {f"map{i}": x for i, x in enumerate(descriptors)})
    memory = Global([Span(f"array {i}", x.ctypes.data, x.nbytes) for i, x in enumerate(arrays)])
    order = np.arange(blocks)[:, None] * np.array([[1, 0, 0]])
    order = order[::-1] if schedule.late else order
    machine = Machine(Code(program), schedule, memory, params, shared, (blocks, 1, 1), order)
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
    with pytest.raises(Fault, match=message) if message else nullcontext():
        run(body, inputs, outputs, **options)


def as_bits(x: Array, kind: str) -> Array:
    rounded = torch.from_numpy(x).to(DTYPES[kind])
    return rounded.view(torch.int32 if kind == "f32" else torch.int16).numpy().view(f"u{rounded.itemsize}")


def as_floats(bits: Array, kind: str) -> Array:
    return torch.from_numpy(bits.view(f"i{bits.itemsize}")).view(DTYPES[kind]).float().numpy()


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
    return (SHARED_BASE + size * np.arange(n)).astype(np.uint32)
