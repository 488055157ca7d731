"""Timers: how long one call takes, the median of several, from cold caches on a GPU."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

Call = Callable[[], Any]
Timer = Callable[[Call], float]

RUNS_LEAST, RUNS_MOST = 5, 100
SWEPT_LEAST = 256 << 20  # bytes that are read to sweep a cache, four times its size at least


def _runs(estimate: float, budget: float) -> int:
    return max(RUNS_LEAST, min(RUNS_MOST, int(budget / max(estimate, 1e-9))))


def _clock(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def host_timer(call: Call, budget: float = 0.2) -> float:
    """Median wall-clock seconds of `call` on the CPU; about `budget` seconds are spent."""
    call()
    return statistics.median(_clock(call) for _ in range(_runs(_clock(call), budget)))


def paired(ours: Call, theirs: Call, clock: Callable[[Call], float], rounds: Iterable[Any]) -> tuple[float, ...]:
    """Median `clock` of each, and of theirs over ours. They take turns, so that a change of speed hits both."""
    times = [(clock(ours), clock(theirs)) for _ in rounds]
    mine, peer = map(statistics.median, zip(*times, strict=True))
    return mine, peer, statistics.median(b / a for a, b in times)


class DeviceTimer:
    """Median seconds of the device kernels of a call, between two events, from a cold L2.

    The cache is swept before each run by reading a buffer larger than it: reading, since dirty lines would have to be
    written back at the expense of what is timed. Sweeps also keep the device busy until the host has enqueued the whole
    call, so that launches cost nothing here; what a call makes the device wait for (a look from the host) does count.
    """

    def __init__(self, device: torch.device, budget: float = 0.2) -> None:
        self.device, self.budget = device, budget
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.buffer = torch.ones(max(4 * cache, SWEPT_LEAST) // 4, device=device)
        self.sweep_seconds = min(self._between(lambda: None, 1, whole=True) for _ in range(3))

    def _between(self, call: Call, sweeps: int, whole: bool = False) -> float:
        """Seconds between the events around `call`; `whole`: around the sweeps before it, too."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        if whole:
            start.record()
        for _ in range(sweeps):
            self.buffer.amax()
        if not whole:
            start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def __call__(self, call: Call) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize(self.device)
        host = _clock(call)
        sweeps = min(50, 1 + int(1.5 * host / self.sweep_seconds))
        runs = _runs(self._between(call, sweeps, whole=True), self.budget)
        return statistics.median(self._between(call, sweeps) for _ in range(runs))


class StepTimer:
    """Mean seconds of a call in a row of calls, the host's share included: what a decode loop sees."""

    def __init__(self, device: torch.device, budget: float = 0.5) -> None:
        self.device, self.budget = device, budget

    def row(self, call: Call, runs: int) -> float:
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(runs):
            call()
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / runs

    def __call__(self, call: Call) -> float:
        self.row(call, 3)
        runs = _runs(self.row(call, 3), self.budget / 3)
        return statistics.median(self.row(call, runs) for _ in range(3))
