"""One operation beside its peers and its floor: times on the device at hand, and what is known without one."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from ...config import MixtralConfig
from ...kernels.launch import target_arch
from ...kernels.op import Cost, Launch, Sizes
from ...kernels.record import record_launches
from ...ops import dispatched
from ..gpus import GPU, RATED, data_sheet
from ..predict import Prediction, bound, floor, measure_gpu, predict
from . import decode_step
from .cases import Case, Oracle, StepOracle, cases, oracle
from .own_peer import own_peer
from .peers import Function, Peer, Unfit, peers_of
from .timing import Call, DeviceTimer, StepTimer, Timer, host_timer

OUT_OF_MEMORY = "out of memory"
NOT_CHECKED = "not checked"
DEFAULT_GPU = "h100"  # of the floors, where there is no GPU
NO_GPU = "there is no GPU"


class DeviceLost(RuntimeError):
    """The device answers every call with an earlier one's error."""


class Untimed(Exception):
    """Why no time is taken."""


@dataclass(frozen=True)
class Outcome:
    """One way to do a case: its time, or what is said instead of one. `right`: as checked; None where it was not."""

    seconds: float | None = None
    note: str | None = None
    right: bool | None = None

    @property
    def verdict(self) -> str:
        """What stands in a cell without a time."""
        if self.right is None:
            return NOT_CHECKED if str(self.note).startswith(NOT_CHECKED) else "-"
        return "right" if self.right else str(self.note).split(":")[0]

    def as_dict(self) -> dict[str, Any]:
        seconds = self.seconds
        return {"time_us": None if seconds is None else seconds * 1e6, "note": self.note, "right": self.right}


@dataclass(frozen=True)
class Row:
    """One case on one GPU. `launches`: names of the device kernels of a call, in order; times only where measured.

    `predicted`: by the data sheet of a GPU of which enough is known (predict.py), measured or not.
    """

    case: Case
    flops: int
    bytes: int
    floor_s: float
    bound: str
    launches: tuple[str, ...]
    ours: Outcome = Outcome()
    peers: Mapping[str, Outcome] = field(default_factory=dict)
    predicted: Prediction | None = None

    @property
    def share(self) -> float | None:
        """How near to the floor: 1.0 is on it."""
        return None if self.ours.seconds is None else self.floor_s / self.ours.seconds

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours: above 1, we are faster."""
        theirs = self.peers[peer].seconds
        return None if theirs is None or self.ours.seconds is None else theirs / self.ours.seconds

    def as_dict(self) -> dict[str, Any]:
        return {
            "op": self.case.op.name,
            "sizes": self.case.as_dict(),
            "dtype": self.case.dtype_name,
            "flops": self.flops,
            "bytes": self.bytes,
            "bound": self.bound,
            "floor_us": self.floor_s * 1e6,
            "of_floor": self.share,
            **self.ours.as_dict(),
            "predicted": None if self.predicted is None else self.predicted.as_dict(),
            "launches": list(self.launches),
            "peers": {name: {**outcome.as_dict(), "ratio": self.ratio(name)} for name, outcome in self.peers.items()},
        }


def our_call(case: Case, args: dict[str, Any]) -> Function:
    """The registered operator, as a user's tensors reach it; the decode step is no operator."""
    if case.op is decode_step.STEP:
        return decode_step.replayed_step(args)
    return dispatched(case.op.name, args)


def untimed_row(case: Case, gpu: GPU, args: dict[str, Any] | None = None) -> Row:
    """The row without times: what follows from the sizes (with `args`, from their routing), recorded, nothing run."""
    cost, shapes = case.cost(args), case.inputs(torch.device("meta"))
    with record_launches(gpu.arch) as launches, torch.no_grad():
        case.op.run(**shapes)
    names = tuple(launch.kernel for launch in launches)
    said = _predicted(launches, gpu, cost)
    return Row(case, cost.flops, cost.bytes, floor(cost, gpu), bound(cost, gpu), names, predicted=said)


def _predicted(launches: Sequence[Launch], gpu: GPU, cost: Cost) -> Prediction | None:
    """On the GPU, or where it was measured on the GPU of that name; None where too little is known of it."""
    known = gpu if gpu.chip is not None else data_sheet(gpu.name)
    return None if known is None or known.chip is None else predict(launches, known, cost)


def attempt(build: Callable[[], Function], args: dict[str, Any], judge: Oracle | StepOracle, timer: Timer) -> Outcome:
    """Build, check once on the actual inputs, then time: whatever fails on the way is what is said."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers and of other libraries: nothing that a reader can act on
            function = build()
            wrong = judge.fault(function)
            call: Call = partial(function, **args)
            return Outcome(note=wrong, right=False) if wrong else Outcome(timer(call), right=True)
    except Exception as error:  # another library's: it may raise anything
        return _failed(error)


def _failed(error: Exception) -> Outcome:
    if isinstance(error, Untimed):
        return Outcome(note=f"right, not timed: {error}", right=True)
    if isinstance(error, Unfit):
        return Outcome(note=str(error))
    if isinstance(error, torch.OutOfMemoryError):
        return Outcome(note=OUT_OF_MEMORY)
    return Outcome(note=f"fails: {_why(error)}", right=False)


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def timed_row(case: Case, gpu: GPU, device: torch.device, timer: Timer, peers: Sequence[Peer]) -> Row:
    """The row with the times of `case` and of its peers on `device`."""
    with torch.no_grad():
        args = case.inputs(device)
        row, judge = untimed_row(case, gpu, args), oracle(case.op, args)
        outcome = attempt(lambda: our_call(case, args), args, judge, timer)
        found: dict[str, Outcome] = {}
        for peer in peers:
            found[peer.name] = attempt(partial(peer.build, case.op, args), args, judge, timer)
            _free(device)
    return replace(row, ours=outcome, peers=found)


def checked_row(case: Case, gpu: GPU, peers: Sequence[Peer], untimed: str) -> Row:
    """The row without times: `peers`, somebody's own, are checked on the CPU; `untimed` is why no time is taken."""
    row = untimed_row(case, gpu)
    if not peers:
        return row
    if large := case.too_large_for_a_cpu():
        return replace(row, peers={peer.name: Outcome(note=f"{NOT_CHECKED}: {large}") for peer in peers})

    def timer(call: Call) -> float:
        raise Untimed(untimed)

    with torch.no_grad():
        args = case.inputs(torch.device("cpu"))
        judge = oracle(case.op, args)
        found = {peer.name: attempt(partial(peer.build, case.op, args), args, judge, timer) for peer in peers}
    return replace(row, peers=found)


def compare(
    op: str,
    *sizes: str | Sizes,
    peers: Mapping[str, Callable[..., Any]] | None = None,
    dtype: torch.dtype | None = None,
    model: MixtralConfig | None = None,
) -> list[Row]:
    """The operation `op` beside your functions by name, a row for each of `sizes`; none: for the sizes of the table.

    On a GPU installed peers stand beside them, and all are timed. Elsewhere floors are an H100's, and your functions
    are checked on the CPU. `model`: a checkpoint's sizes, as `cases` takes them.
    ValueError: an unknown operation, sizes or a dtype that it has not, a peer that is no function.
    """
    own = [own_peer(name, function) for name, function in (peers or {}).items()]
    chosen = cases([op], sizes=sizes, dtype=dtype, model=model)
    if torch.cuda.is_available():
        return list(Bench.of(torch.device("cuda")).rows(chosen, own=own))
    return [checked_row(case, RATED[DEFAULT_GPU], own, NO_GPU) for case in chosen]


def _free(device: torch.device) -> None:
    """What a peer held is gone before the next one measures: some fill a GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


@dataclass(frozen=True)
class Bench:
    """The device at hand: its timers, what it was measured to do, and what its data sheet says."""

    device: torch.device
    gpu: GPU
    sheet: GPU | None
    timer: Timer
    step_timer: Timer

    @classmethod
    def of(cls, device: torch.device, **small: int) -> Bench:
        """`small`: the sizes that `measure_gpu` runs, where its own are too large."""
        if device.type != "cuda":
            gpu = measure_gpu("CPU", target_arch(), device, host_timer, **small)
            return cls(device, gpu, None, host_timer, host_timer)
        name, timer = torch.cuda.get_device_name(device), DeviceTimer(device)
        gpu = measure_gpu(name, target_arch(device), device, timer, **small)
        return cls(device, gpu, data_sheet(name), timer, StepTimer(device))

    def rows(
        self,
        cases: Sequence[Case],
        without: Sequence[str] = (),
        begins: Callable[[int], None] = lambda number: None,
        own: Sequence[Peer] = (),
    ) -> Iterator[Row]:
        """A row a case, `begins` told before it; `DeviceLost` after that of a case that leaves the device in an error.

        own  peers beside the installed ones
        """
        for number, case in enumerate(cases):
            begins(number)
            peers = [peer for peer in peers_of(case.op.name) if peer.name not in without]
            peers += own
            timer = self.step_timer if case.op is decode_step.STEP else self.timer
            try:
                yield timed_row(case, self.gpu, self.device, timer, peers)
            except Exception as error:  # before anything was timed: one case's trouble is not the next one's
                yield replace(untimed_row(case, self.gpu), ours=_failed(error))
            self._check_alive()
            _free(self.device)

    def _check_alive(self) -> None:
        """An illegal access, in whosever kernel, makes every later call of this process fail."""
        if self.device.type == "cuda":
            try:
                torch.cuda.synchronize(self.device)
            except RuntimeError as error:
                raise DeviceLost(f"{self.device} is lost to this process: {_why(error)}") from error
