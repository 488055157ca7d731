"""Check and time one operation, its peers and their results; without a GPU, collect what is known about a case."""

import gc
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ...kernels.launch import target_arch
from ...kernels.op import Cost
from ...kernels.record import record_launches
from ...kernels.registry import dispatched
from ..gpus import GPU, MIB, data_sheet, floor
from ..terminal import print_message
from . import decode_step
from .cases import Case, Check, check_of, stricter_oracles
from .peers import Function, Peer, Unsupported

Call = Callable[[], Any]
Timer = Callable[[Call], float]

NOT_CHECKED = "not checked"
NO_DRIVER = "0 active drivers"  # in Triton's error of a launch on a machine without a GPU
RUNS_LEAST, RUNS_MOST = 5, 100
SWEEP_BYTES = 256 << 20  # read at least, and four times the size of L2, to evict it


def _runs(estimate: float, budget: float) -> int:
    return max(RUNS_LEAST, min(RUNS_MOST, int(budget / max(estimate, 1e-9))))


def wall_seconds(call: Call, device: str = "cpu") -> float:
    """Return the seconds of one call; with a CUDA device, until it has finished its work."""
    synchronize = partial(torch.get_device_module(device).synchronize, device)
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


class DeviceTimer:
    """Median seconds of a call's device kernels between two events, from a cold L2. Reads evict it (dirty lines would
    be written back while the call is timed) until the host has enqueued the whole call: launches are not timed."""

    def __init__(self, device: torch.device, budget: float = 0.2) -> None:
        self.device, self.budget = device, budget
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self.buffer = torch.ones(max(4 * cache, SWEEP_BYTES) // 4, device=device)
        self.sweep_seconds = min(self._elapsed(self.buffer.amax, 1) for _ in range(3))

    def _elapsed(self, call: Call, sweeps: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(self.device)
        for _ in range(sweeps):
            self.buffer.amax()
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3

    def __call__(self, call: Call) -> float:
        for _ in range(3):
            call()
        torch.cuda.synchronize(self.device)
        sweeps = min(50, 1 + int(1.5 * wall_seconds(call) / self.sweep_seconds))
        runs = _runs(self._elapsed(call, sweeps) + sweeps * self.sweep_seconds, self.budget)
        return statistics.median(self._elapsed(call, sweeps) for _ in range(runs))


def step_timer(call: Call, budget: float = 0.5) -> float:
    """Return the mean seconds of a call in a row of them, host time included, as a decode loop runs it."""

    def mean_of(runs: int) -> float:
        return wall_seconds(lambda: [call() for _ in range(runs)], "cuda") / runs

    mean_of(3)
    runs = _runs(mean_of(3), budget / 3)
    return statistics.median(mean_of(runs) for _ in range(3))


@dataclass(frozen=True)
class Outcome:
    """The time of one implementation of a case, or a note in its place. `right` is None where nothing was checked."""

    seconds: float | None = None
    note: str | None = None
    right: bool | None = None

    @property
    def verdict(self) -> str:
        """The text of a cell without a time."""
        if self.right is None:
            return NOT_CHECKED if str(self.note).startswith(NOT_CHECKED) else "-"
        return "right" if self.right else str(self.note).split(":")[0]

    def as_dict(self) -> dict[str, Any]:
        return {"time_us": self.seconds and self.seconds * 1e6, "note": self.note, "right": self.right}


@dataclass(frozen=True)
class Row:
    """One case on one GPU."""

    case: Case
    cost: Cost
    floor_s: float
    bound: str
    launches: tuple[str, ...]
    ours: Outcome = Outcome()
    peers: Mapping[str, Outcome] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """The floor over our time: 1.0 reaches the floor."""
        return None if self.ours.seconds is None else self.floor_s / self.ours.seconds

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours: above 1, ours is faster."""
        seconds = self.peers[peer].seconds
        return None if seconds is None or self.ours.seconds is None else seconds / self.ours.seconds

    def as_dict(self) -> dict[str, Any]:
        case = {"op": self.case.op.name, "sizes": self.case.as_dict(), "dtype": self.case.dtype_name}
        work = {**vars(self.cost), "bound": self.bound, "launches": list(self.launches)}
        times = {"floor_us": self.floor_s * 1e6, "of_floor": self.share, **self.ours.as_dict()}
        peers = {name: {**outcome.as_dict(), "ratio": self.ratio(name)} for name, outcome in self.peers.items()}
        return {**case, **work, **times, "peers": peers}


def our_call(case: Case, args: dict[str, Any]) -> Function:
    """Return the registered operator, as a user's tensors reach it; for a decode step, its replay."""
    return decode_step.replayed_step(args) if case.op is decode_step.STEP else dispatched(case.op.name, args)


def untimed_row(case: Case, gpu: GPU, args: dict[str, Any] | None = None) -> Row:
    """Return the row without times, from the sizes (with `args`, from their routing) and recorded launches."""
    cost, shapes = case.cost(args), case.inputs(torch.device("meta"))
    with record_launches(gpu.arch) as launches, torch.no_grad():
        case.op.run(**shapes)
    names = tuple(launch.kernel for launch in launches)
    return Row(case, cost, *floor(case.costs(args), gpu), names)


def attempt(build: Callable[[], Function], args: dict[str, Any], check: Check, timer: Timer | str) -> Outcome:
    """Build a function, check it, then time it, unless `timer` is a reason not to. A failure becomes the note."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers and other libraries
            function = build()
            if wrong := check(function):
                return Outcome(note=wrong, right=False)
            if isinstance(timer, str):
                return Outcome(note=f"right, not timed: {timer}", right=True)
            return Outcome(timer(partial(function, **args)), right=True)
    except Exception as error:  # another library may raise anything
        return _failure(error)


def _failure(error: Exception) -> Outcome:
    if isinstance(error, (Unsupported, torch.OutOfMemoryError)):
        return Outcome(note=str(error) if isinstance(error, Unsupported) else "out of memory")
    if NO_DRIVER in str(error):
        return Outcome(note=f"{NOT_CHECKED}: its Triton kernels need a GPU, or TRITON_INTERPRET=1")
    return Outcome(note=f"fails: {summary(error)}", right=False)


def summary(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _attempt_peer(case: Case, args: dict[str, Any], timer: Timer | str, check: Check, peer: Peer) -> Outcome:
    """`attempt` a peer. A `strict` one must also pass `stricter_oracles`; a note names those that it does not take."""
    notes: list[str] = []

    def check_all(function: Function) -> str | None:
        wrong = check(function)
        for name, oracle in stricter_oracles(case, args) if peer.strict and wrong is None else ():
            try:
                if fault := oracle.fault(peer.build(case.op, oracle.args)):
                    return f"{fault} ({name})"
            except Exception as error:  # many kernels take 16 bits only
                notes.append(f"{NOT_CHECKED} {name}: {summary(error)}")
        return wrong

    outcome = attempt(partial(peer.build, case.op, args), args, check_all, timer)
    gc.collect()  # frees what it held before the next one is measured: some fill a GPU
    torch.cuda.empty_cache()
    return replace(outcome, note="; ".join([outcome.note or "right", *notes])) if outcome.right and notes else outcome


@torch.no_grad()
def timed_row(case: Case, gpu: GPU, device: torch.device, timer: Timer | str, peers: Sequence[Peer]) -> Row:
    """Time `case` and its peers on `device`; where `timer` is a reason not to, the peers are checked alone."""
    args = case.inputs(device)
    row, check = untimed_row(case, gpu, None if isinstance(timer, str) else args), check_of(case.op, args)
    ours = Outcome() if isinstance(timer, str) else attempt(lambda: our_call(case, args), args, check, timer)
    return replace(row, ours=ours, peers={peer.name: _attempt_peer(case, args, timer, check, peer) for peer in peers})


def checked_row(case: Case, gpu: GPU, peers: Sequence[Peer], reason: str) -> Row:
    """Return the row without times, for a `reason`, with the user's `peers` checked on the CPU."""
    if peers and not (large := case.too_large_for_cpu()):
        return timed_row(case, gpu, torch.device("cpu"), reason, peers)
    return replace(untimed_row(case, gpu), peers={p.name: Outcome(note=f"{NOT_CHECKED}: {large}") for p in peers})


def measure_gpu(name: str, arch: str, device: Any, timer: Timer, memory: int = 1 << 30, n: int = 8192) -> GPU:
    """Measure the current GPU by torch: a copy and a read of `memory` bytes, and a bf16 product of n x n."""
    source, copy = (torch.ones(memory // 4, device=device) for _ in range(2))
    bandwidth = max(2 * memory / timer(lambda: copy.copy_(source)), memory / timer(source.amax))
    a, b, out = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(3))
    matmul = 2 * n**3 / timer(lambda: torch.mm(a, b, out=out))
    return GPU("", name, arch=arch, bandwidth=bandwidth, matmul=matmul, source="measured")


def current_gpu() -> tuple[torch.device, GPU, Timer]:
    device, properties = torch.device("cuda"), torch.cuda.get_device_properties("cuda")
    timer, sheet = DeviceTimer(device), data_sheet(properties.name)
    gpu = measure_gpu(properties.name, target_arch(device), device, timer)
    return device, replace(gpu, mib=properties.total_memory // MIB, link=(sheet or gpu).link), timer


def timed_rows(cases: list[Case], peers: list[Peer], device: torch.device, gpu: GPU, timer: Timer) -> Iterator[Row]:
    """Yield a row per case with the `peers` that do its operation, up to a case that leaves the device in an error."""
    for case in cases:
        able = [peer for peer in peers if peer.does(case.op.name)]
        try:
            yield timed_row(case, gpu, device, step_timer if case.op is decode_step.STEP else timer, able)
        except Exception as error:  # before anything was timed: the next case may work
            yield replace(untimed_row(case, gpu), ours=_failure(error))
        try:
            torch.get_device_module(device).synchronize(device)
        except RuntimeError as error:
            print_message(f"mixtral-triton bench: {device} is lost to this process: {summary(error)}")
            return
