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

from ..kernels.launching.interpret import every_launch_corrected
from ..kernels.launching.launch import target_arch
from ..kernels.operation.cases import Cost
from ..kernels.operation.declaration import Op
from ..kernels.record import record_launches
from ..kernels.registry import OPS, dispatched
from ..terminal import print_message
from ..verification.tolerance import Tolerance
from .cases import Case
from .decode_step import STEP, replayed_step
from .gpus import GPU, MIB, find_gpu, floor
from .peers import Args, Function, Peer, Unsupported

Call = Callable[[], Any]
Timer = Callable[[Call], float]
DEVICE = torch.device("cuda")
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


def measure_gpu(memory: int = 1 << 30, n: int = 8192) -> GPU:
    """Measure the current GPU by torch: a copy and a read of `memory` bytes, and a bf16 product of n x n."""
    properties = torch.cuda.get_device_properties(DEVICE)
    source, copy = (torch.ones(memory // 4, device=DEVICE) for _ in range(2))
    bandwidth = max(2 * memory / time_call(lambda: copy.copy_(source)), memory / time_call(source.amax))
    a, b, out = (torch.randn(n, n, device=DEVICE, dtype=torch.bfloat16) for _ in range(3))
    matmul = 2 * n**3 / time_call(lambda: torch.mm(a, b, out=out))
    gpu, mib = find_gpu(properties.name) or GPU("", ""), properties.total_memory // MIB
    gpu = replace(gpu, name=properties.name, mib=mib, arch=target_arch(DEVICE))
    return replace(gpu, bandwidth=bandwidth, matmul=matmul, source="measured")


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


def our_call(case: Case, args: Args) -> Function:
    """Return the registered operator, as a user's tensors reach it; for a decode step, its replay."""
    return replayed_step(args) if case.op is STEP else dispatched(case.op.name, args)


def check(build: Callable[[Args], Function], op: Op, args: Args, launched: Sequence[Any]) -> Outcome:
    """Judge a function's results by the limits of `verify`. Those of kernels that the interpreter `launched` on bf16,
    whose arithmetic it has wrong, are judged in fp32, by the limit of bf16, where they seem wrong."""
    error, limit = Tolerance(op.name, args).measure(build(args))
    wide = {name: x.float() if getattr(x, "dtype", None) is torch.bfloat16 else x for name, x in args.items()}
    if error > limit and launched and any(wide[name] is not x for name, x in args.items()):
        error, *_ = Tolerance(op.name, wide).measure(build(wide))
        if error <= limit:
            return Outcome(note="right in fp32; Triton's interpreter computes bf16 wrong", right=True)
    note = f"wrong: an error of {error:.1e}, where {limit:.1e} would be right"
    return Outcome(note=note, right=False) if error > limit else Outcome(right=True)


def attempt(build: Callable[[Args], Function], op: Op, args: Args, timer: Timer | str) -> Outcome:
    """Build a function of arguments, check it, then time it, unless `timer` is a reason not to. A failure becomes the
    note."""
    try:
        with warnings.catch_warnings(), every_launch_corrected() as launched:
            warnings.simplefilter("ignore")  # of compilers and other libraries
            checked = check(build, op, args, launched) if op.name in OPS else Outcome()
            if checked.note:
                return checked
            if isinstance(timer, str):
                return Outcome(note=f"right, not timed: {timer}", right=checked.right)
            return Outcome(timer(partial(build(args), **args)), right=checked.right)
    except Exception as error:  # another library may raise anything
        return failure(error)


def failure(error: Exception) -> Outcome:
    if isinstance(error, (Unsupported, torch.OutOfMemoryError)):
        return Outcome(note=str(error) if isinstance(error, Unsupported) else "out of memory")
    if NO_DRIVER in str(error):
        return Outcome(note=f"{NOT_CHECKED}: its Triton kernels need a GPU, or TRITON_INTERPRET=1")
    return Outcome(note=f"fails: {summary(error)}", right=False)


def summary(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def untimed_row(case: Case, gpu: GPU, args: Args | None = None) -> Row:
    """Return the row without times, from the sizes (with `args`, from their routing) and recorded launches."""
    shapes, costs = case.inputs(torch.device("meta")), case.costs(args)
    with record_launches(gpu.arch) as launches, torch.no_grad():
        case.op.run(**shapes)
    return Row(case, sum(costs, Cost(0, 0)), *floor(costs, gpu), tuple(launch.kernel for launch in launches))


@torch.no_grad()
def measure_row(case: Case, gpu: GPU, peers: Mapping[str, Peer], timer: Timer | str) -> Row:
    """Time `case` and its peers on the current GPU. Where `timer` is a reason not to, check the peers on a CPU."""
    timed, peers = not isinstance(timer, str), {} if case.op is STEP else peers
    if not timed and not peers:
        return untimed_row(case, gpu)
    if not timed and (large := case.too_large_for_cpu()):
        return replace(untimed_row(case, gpu), peers={name: Outcome(note=f"{NOT_CHECKED}: {large}") for name in peers})
    args = case.inputs(DEVICE if timed else torch.device("cpu"))
    row = untimed_row(case, gpu, args if timed else None)
    if timed:
        row = replace(row, ours=attempt(partial(our_call, case), case.op, args, timer))
    outcomes = {}
    for name, peer in peers.items():
        outcomes[name] = attempt(partial(peer, case.op), case.op, args, timer)
        if timed:  # some peers fill a GPU
            gc.collect()
            torch.cuda.empty_cache()
    return replace(row, peers=outcomes)


def measure_rows(cases: Sequence[Case], gpu: GPU, peers: Mapping[str, Peer], timer: Timer | str) -> Iterator[Row]:
    """Yield a row per case, up to a case that leaves the GPU in an error."""
    for case in cases:
        try:
            yield measure_row(case, gpu, peers, timer)
        except Exception as error:  # before anything was timed: the next case may work
            yield replace(untimed_row(case, gpu), ours=failure(error))
        try:
            if not isinstance(timer, str):
                torch.get_device_module(DEVICE).synchronize(DEVICE)
        except RuntimeError as error:
            print_message(f"mixtral-triton bench: {DEVICE} is lost to this process: {summary(error)}")
            return
