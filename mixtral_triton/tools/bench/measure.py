"""Check and time one operation and its peers; without a GPU, collect what is known about a case."""

import gc
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from triton.testing import do_bench

from ...kernels.launch import target_arch
from ...kernels.op import Cost, Op
from ...kernels.record import record_launches
from ...kernels.registry import dispatched
from ...tolerance import Tolerance
from ..gpus import GPU, MIB, data_sheet, floor
from ..terminal import print_message
from . import decode_step
from .cases import Case
from .peers import Function, Peer, Unsupported

Call = Callable[[], Any]
Timer = Callable[[Call], float]
NOT_CHECKED = "not checked"
NO_DRIVER = "0 active drivers"  # in Triton's error of a launch on a machine without a GPU


def time_call(call: Call) -> float:
    """Return the median seconds of a call on the GPU, from a cold L2."""
    return float(do_bench(call, return_mode="median")) * 1e-3


def wall_seconds(call: Call, device: Any = "cpu") -> float:
    """Return the seconds of one call; with a CUDA device, until it has finished its work."""
    synchronize = partial(torch.get_device_module(device).synchronize, device)
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def measure_gpu(name: str, arch: str, device: Any, timer: Timer, memory: int = 1 << 30, n: int = 8192) -> GPU:
    """Measure the current GPU by torch: a copy and a read of `memory` bytes, and a bf16 product of n x n."""
    source, copy = (torch.ones(memory // 4, device=device) for _ in range(2))
    bandwidth = max(2 * memory / timer(lambda: copy.copy_(source)), memory / timer(source.amax))
    a, b, out = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(3))
    matmul = 2 * n**3 / timer(lambda: torch.mm(a, b, out=out))
    return GPU("", name, arch=arch, bandwidth=bandwidth, matmul=matmul, source="measured")


def current_gpu() -> tuple[torch.device, GPU, Timer]:
    device, properties = torch.device("cuda"), torch.cuda.get_device_properties("cuda")
    gpu = measure_gpu(properties.name, target_arch(device), device, time_call)
    sheet = data_sheet(properties.name) or gpu
    return device, replace(gpu, mib=properties.total_memory // MIB, link=sheet.link), time_call


@dataclass(frozen=True)
class Outcome:
    """The time of one implementation of a case, or a note in its place. `right` is None where nothing was checked."""

    seconds: float | None = None
    note: str | None = None
    right: bool | None = None

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


def fault(op: Op, args: dict[str, Any], function: Function) -> str | None:
    """Return what is wrong with a function's results beside the reference's, or None."""
    if op is decode_step.STEP:
        return decode_step.fault(function, args)
    before = {name: x.clone() for name, x in args.items() if isinstance(x, torch.Tensor) and name not in op.mutates}

    def results(**kwargs: Any) -> Any:
        out = function(**kwargs)
        written = [name for name, x in before.items() if not torch.allclose(x, args[name], 0, 0, equal_nan=True)]
        found = [x for x in (out if isinstance(out, (tuple, list)) else (out,)) if isinstance(x, torch.Tensor)]
        wanted = tolerance.exact[: len(tolerance.exact) - len(op.mutates)]
        shapes, needed = ([list(x.shape) for x in tensors] for tensors in (found, wanted))
        for name in written:
            args[name].copy_(before[name])
        if written:
            raise ValueError(f"it writes into {', '.join(written)}")
        if shapes != needed:
            raise ValueError(f"results of shape {shapes}, where {needed} would be right")
        pairs = zip(found, wanted, strict=True)  # ids may have any integer type
        return tuple(x if want.is_floating_point() else x.to(want.dtype) for x, want in pairs)

    tolerance = Tolerance(op.name, args)
    try:
        error, limit = tolerance.measure(results)
    except ValueError as wrong:
        return f"wrong: {wrong}"
    return None if error <= limit else f"wrong: an error of {error:.1e}, where {limit:.1e} would be right"


def untimed_row(case: Case, gpu: GPU, args: dict[str, Any] | None = None) -> Row:
    """Return the row without times, from the sizes (with `args`, from their routing) and recorded launches."""
    shapes = case.inputs(torch.device("meta"))
    with record_launches(gpu.arch) as launches, torch.no_grad():
        case.op.run(**shapes)
    names = tuple(launch.kernel for launch in launches)
    return Row(case, case.cost(args), *floor(case.costs(args), gpu), names)


def attempt(build: Callable[[], Function], op: Op, args: dict[str, Any], timer: Timer | str) -> Outcome:
    """Build a function, check it, then time it, unless `timer` is a reason not to. A failure becomes the note."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of compilers and other libraries
            function = build()
            if wrong := fault(op, args, function):
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


@torch.no_grad()
def timed_row(case: Case, gpu: GPU, device: torch.device, timer: Timer | str, peers: Mapping[str, Peer]) -> Row:
    """Time `case` and its peers on `device`; where `timer` is a reason not to, the peers are checked alone."""
    args, found = case.inputs(device), dict[str, Outcome]()
    row = untimed_row(case, gpu, None if isinstance(timer, str) else args)
    if not isinstance(timer, str):
        row = replace(row, ours=attempt(lambda: our_call(case, args), case.op, args, timer))
    for name, peer in peers.items():
        found[name] = attempt(partial(peer, case.op, args), case.op, args, timer)
        gc.collect()  # frees what it held before the next one is measured: some fill a GPU
        torch.cuda.empty_cache()
    return replace(row, peers=found)


def checked_row(case: Case, gpu: GPU, peers: Mapping[str, Peer], reason: str) -> Row:
    """Return the row without times, for a `reason`, with the named `peers` checked on the CPU."""
    if peers and not (large := case.too_large_for_cpu()):
        return timed_row(case, gpu, torch.device("cpu"), reason, peers)
    return replace(untimed_row(case, gpu), peers={name: Outcome(note=f"{NOT_CHECKED}: {large}") for name in peers})


def timed_rows(
    cases: Sequence[Case], peers: Mapping[str, Peer], device: torch.device, gpu: GPU, timer: Timer
) -> Iterator[Row]:
    """Yield a row per case, up to a case that leaves the device in an error."""
    for case in cases:
        try:
            yield timed_row(case, gpu, device, timer, peers)
        except Exception as error:  # before anything was timed: the next case may work
            yield replace(untimed_row(case, gpu), ours=_failure(error))
        try:
            torch.get_device_module(device).synchronize(device)
        except RuntimeError as error:
            print_message(f"mixtral-triton bench: {device} is lost to this process: {summary(error)}")
            return
