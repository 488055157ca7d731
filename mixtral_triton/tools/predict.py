"""How long a call takes on a GPU that is not at hand: a prediction from its recorded launches, not a measurement.

A launch takes as long as the slowest of three: its bytes across device memory; the bytes of its tiles from L2 to the
SMs; its products. The last two go by whole waves of programs. Between launches lies a gap, a shorter one where the
second begins before the first has ended. Not counted: what an instruction waits for, so that a kernel of few bytes
takes longer than predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ..kernels.arch import multiprocessors
from ..kernels.op import Cost, Launch
from .roofline import GPU, Chip, floor
from .work import Work, work

MEMORY_REACHED = 0.92  # of a data sheet's bandwidth, by long copies: an estimate from published ones on an H100
MATMUL_REACHED = 0.75  # of a data sheet's tensor-core peak, by libraries at the clocks of a busy GPU: an estimate
WARPS, THREADS = 64, 32  # that an SM holds at most, and of each
REGISTERS, OTHERS = 65536, 64  # that an SM has (AMD: more), and that a thread takes beside its part of the tiles


@dataclass(frozen=True)
class Part:
    """One launch: its seconds without the gap, and what takes them: "memory", "L2" or "tensor cores"."""

    kernel: str
    seconds: float
    limit: str


@dataclass(frozen=True)
class Prediction:
    """`limit`: what takes most of the seconds: "memory", "L2", "tensor cores", or "launches" (the gaps)."""

    seconds: float
    limit: str
    parts: tuple[Part, ...]
    floor_s: float

    @property
    def share(self) -> float:
        """How near to the floor: 1.0 is on it."""
        return self.floor_s / self.seconds if self.seconds else 1.0

    def as_dict(self) -> dict[str, Any]:
        return {"time_us": self.seconds * 1e6, "limit": self.limit, "of_floor": self.share}


def predicted(launches: Iterable[Launch], gpu: GPU, cost: Cost) -> Prediction:
    """Of a call that launches these, with the compulsory work `cost`; never below its floor.

    ValueError for a GPU of which no more than its rates are known, and for a kernel without a formula.
    """
    if gpu.chip is None:
        raise ValueError(f"predicted: GPU is {gpu.name}, needs one whose L2 bandwidth and shared memory are known")
    chip = gpu.chip
    launches = tuple(launches)
    parts = tuple(_part(launch, gpu, chip) for launch in launches)
    by_limit = {"launches": sum(_gap(launch, chip) for launch in launches)}
    for part in parts:
        by_limit[part.limit] = by_limit.get(part.limit, 0.0) + part.seconds
    least = floor(cost, gpu)
    return Prediction(max(sum(by_limit.values()), least), max(by_limit, key=lambda name: by_limit[name]), parts, least)


def _gap(launch: Launch, chip: Chip) -> float:
    return chip.begun if launch.dependent and chip.begun is not None else chip.gap


def _part(launch: Launch, gpu: GPU, chip: Chip) -> Part:
    asked, sms = work(launch), multiprocessors(gpu.arch)
    held = _held(asked, launch.num_warps or 4, sms, chip)
    turns = max(math.ceil(asked.programs / (sms * held)) * held, asked.longest)
    rate = chip.vector if asked.single else gpu.matmul * MATMUL_REACHED
    products, vector = asked.flops / rate, asked.vector / chip.vector
    takes = {
        "memory": asked.memory / (gpu.bandwidth * MEMORY_REACHED),
        "L2": turns * asked.loaded * sms / chip.l2,
        # One program computes while another multiplies.
        "tensor cores": turns * (max(products, vector) if held > 1 else products + vector) * sms,
    }
    limit = max(takes, key=lambda name: takes[name])
    return Part(launch.kernel, takes[limit], limit)


def _held(asked: Work, warps: int, sms: int, chip: Chip) -> int:
    """How many programs an SM holds at once; the busiest one runs whole waves of them.

    An SM shares its bandwidth and its tensor cores out among those it holds: more of them are no quicker together.
    """
    room = min(WARPS // warps, int(REGISTERS // (asked.values + OTHERS * THREADS * warps)))
    room = min(room, chip.shared // asked.shared) if asked.shared else room
    return max(1, min(room, math.ceil(asked.programs / sms)))
