"""Processes that are ranks of meshes on this CPU, over gloo: started once, then given one piece of work after another.

All of them do each piece: with a mesh of fewer there are several meshes side by side, as a server has replicas.
"""

from __future__ import annotations

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.utils.flop_counter import FlopCounterMode

from mixtral_triton import KVCache, Mixtral, parallel, verify, weights
from mixtral_triton.quantize import QuantizedWeight
from mixtral_triton.verification.mesh import MeshTarget
from mixtral_triton.verification.report import Report

Work = Callable[..., Any]
COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "all_gather_object", "isend")


class Ranks:
    """So many processes. `ranks(work, tp=2, ep=1, ...)` -> what `work(mesh, ...)` gave in each process.

    After PIECES pieces of work, and after one of them that did not answer, there are new processes: each group that
    somebody makes has threads, and hundreds of them slow everything.
    """

    PIECES = 12

    def __init__(self, count: int, store: Path) -> None:
        self.count, self.store, self.done = count, store, 0
        self.pipes: list[Connection] = []
        self.started: list[Any] = []

    def _begin(self) -> None:
        self.end()
        start = processes.get_context("spawn")
        pipes = [start.Pipe() for _ in range(self.count)]
        self.pipes = [ours for ours, _ in pipes]
        store = f"{self.store}-{self.done}"
        self.started = [
            start.Process(target=_serve, args=(rank, self.count, store, theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for one in self.started:
            one.start()

    def __call__(self, work: Work, *args: Any, tp: int = 1, ep: int = 1, **options: Any) -> list[Any]:
        if self.done % self.PIECES == 0 or not self.started:
            self._begin()
        self.done += 1
        for pipe in self.pipes:
            pipe.send((work, args, tp, ep, options))
        results = []
        for pipe in self.pipes:
            if not pipe.poll(60):
                self.end()
                raise AssertionError("a rank does not answer")
            results.append(pipe.recv())
        failed = [result for good, result in results if not good]
        assert not failed, failed[0]
        return [result for _, result in results]

    def end(self) -> None:
        for one in self.started:
            one.kill()
        self.started = []


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        work, args, tp, ep, options = pipe.recv()
        try:
            pipe.send((True, work(mesh_of(count, tp, ep), *args, **options)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


@cache  # each dimension's group has threads, and hundreds of them slow everything
def mesh_of(count: int, tp: int, ep: int) -> Any:
    """This process's, one of count / (tp * ep); without a dimension of one."""
    from torch.distributed.device_mesh import DeviceMesh

    sizes = {"replica": count // (tp * ep), "ep": ep, "tp": tp}
    names = tuple(name for name, size in sizes.items() if size > 1)
    mesh = DeviceMesh("cpu", torch.arange(count).view(*(sizes[name] for name in names)), mesh_dim_names=names)
    return mesh[tuple(name for name in names if name != "replica")]


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Calls of collectives within the block."""
    calls: Counter[str] = Counter()
    true = {name: getattr(dist, name) for name in COLLECTIVES}

    def counting(name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return true[name](*args, **options)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counting(name))
    try:
        yield calls
    finally:
        for name, function in true.items():
            setattr(dist, name, function)


class _Counting:
    """An opened file, or a slice of it, that adds up the bytes which are read."""

    def __init__(self, inner: Any, read: list[int]) -> None:
        self.inner, self.read = inner, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_slice(self, name: str) -> Any:
        return _Counting(self.inner.get_slice(name), self.read)

    def get_tensor(self, name: str) -> Any:
        return self._record(self.inner.get_tensor(name))

    def __getitem__(self, index: Any) -> Any:
        return self._record(self.inner[index])

    def _record(self, tensor: Any) -> Any:
        self.read.append(tensor.nbytes)
        return tensor


def load_counted(mesh: Any, folder: Path, **options: Any) -> tuple[Mixtral, int]:
    """The model, and the bytes of tensors that were read."""
    opened_file, read = weights.opened_file, [0]

    @contextmanager
    def counting(file: Path) -> Iterator[Any]:
        with opened_file(file) as opened:
            yield _Counting(opened, read)

    weights.opened_file = counting  # type: ignore[assignment]
    try:
        return Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options), sum(read)
    finally:
        weights.opened_file = opened_file


def everything(mesh: Any, folder: Path, ids: torch.Tensor, **options: Any) -> dict[str, Any]:
    """What a model on the mesh computes, holds, reads and sends."""
    model, read = load_counted(mesh, folder, **options)
    found: dict[str, Any] = {"first": int(mesh.mesh.min()), "read": read}
    found |= {"logits": model(ids), "greedy": model.generate(ids[:, :4], max_new_tokens=8)}
    torch.manual_seed(dist.get_rank())  # each rank would draw another token
    found["drawn"] = model.generate(ids[:, :4], max_new_tokens=8, temperature=1.0)
    cache = KVCache(model.config, batch=len(ids), max_len=ids.shape[1], device="cpu", dtype=model.dtype)
    steps = [model(ids[:, :5], cache=cache)]
    with counted_calls() as found["calls"]:
        steps.append(model(ids[:, 5:6], cache=cache))
    steps += [model(ids[:, t : t + 1], cache=cache) for t in range(6, ids.shape[1])]
    found["cached"], found["cache"] = torch.cat(steps, dim=1), sum(keys.nbytes for keys in cache.keys)
    found["bytes"] = kept_bytes(model)
    found["alone"] = model(ids[1:])
    return found


def kept_bytes(model: Mixtral) -> dict[str, int]:
    return {
        name: place.nbytes if isinstance(place, QuantizedWeight) else place.untyped_storage().nbytes()
        for name, place in model.named_weights().items()
    }


def unflatten_args(mesh: Any, folder: Path, **options: Any) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each quantized weight its values and its scales, made of all ranks' parts."""
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    assert model.ranks is not None
    whole = MeshTarget(model, model.ranks)
    quantized = {name: part for name, part in model.named_weights().items() if isinstance(part, QuantizedWeight)}
    gathered = {name: whole.gather(name, part) for name, part in quantized.items()}
    return {name: (weight.dequantize(), weight.scales) for name, weight in gathered.items()}


def read_and_kept(mesh: Any, folder: Path) -> tuple[int, int]:
    """Bytes that loading reads, and that the weights then take."""
    model, read = load_counted(mesh, folder)
    return read, sum(kept_bytes(model).values())


def logits(mesh: Any, folder: Path, texts: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Of each text, ids [B,T]."""
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    return [model(ids) for ids in texts]


def refusal(mesh: Any, folder: Any, **options: Any) -> str:
    """What loading is refused with. given: in the mesh's place; bad: another folder, by the number of a process."""
    folder = options.pop("bad", {}).get(dist.get_rank(), folder)
    try:
        Mixtral.from_pretrained(folder, mesh=options.pop("given", mesh), **{"device": "cpu"} | options)
    except ValueError as error:
        return str(error)
    return ""


def renamed(mesh: Any, folder: Path) -> str:
    """The refusal of a mesh that has another dimension, too."""
    return refusal(mesh._get_root_mesh(), folder)


@contextmanager
def patience(seconds: float) -> Iterator[None]:
    """Within the block, groups that are made, and waits, have so much time."""
    before = parallel.TIMEOUT
    parallel.TIMEOUT = timedelta(seconds=seconds)
    try:
        yield
    finally:
        parallel.TIMEOUT = before


def silent(mesh: Any, folder: Path, ids: torch.Tensor) -> str:
    """What becomes of a forward that the last process does not run."""
    with patience(2):
        model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh)
    try:
        return "" if dist.get_rank() == dist.get_world_size() - 1 else str(model(ids))
    except ConnectionError as error:
        return str(error)


def replayed(mesh: Any, folder: Path, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int, Counter[str]]:
    """Greedy text on GPUs that are not there, how many of its steps were replays, and what the host itself sent."""
    from tests.support.stub.gpu import gpu

    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    with gpu() as simulated, counted_calls() as calls, on_memory():
        text = model.to("cuda").generate(ids.to("cuda"), max_new_tokens=8)
        return text.cpu(), simulated.replays, calls


@contextmanager
def on_memory() -> Iterator[None]:
    """NCCL's part: what is sent is the memory behind a GPU's tensors, and in a capture it waits for the replay."""
    from tests.support.stub.tensors import FakeGPUTensor, stage

    true = {name: getattr(dist, name) for name in COLLECTIVES[:3]}

    def held(x: Any) -> Any:
        return [one.held for one in x] if isinstance(x, list) else x.held if isinstance(x, FakeGPUTensor) else x

    def acting(name: str) -> Any:
        def call(*args: Any, **options: Any) -> None:
            behind = [held(x) for x in args]
            stage.run(lambda: true[name](*behind, **options))

        return call

    for name in true:
        setattr(dist, name, acting(name))
    try:
        yield
    finally:
        for name, function in true.items():
            setattr(dist, name, function)


def stuck(mesh: Any, folder: Path) -> str:
    """What ends the wait for a GPU that is never done, where the last process has left the mesh, and where not."""
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh)
    try:
        with patience(2):
            model.ranks.wait(lambda: False)  # type: ignore[union-attr]
    except ConnectionError as error:
        return str(error)
    return ""


def verified(mesh: Any, folder: Path, ids: torch.Tensor, fault: Any = None, **options: Any) -> Report:
    """Return what `verify` finds after `fault(model)` has changed the weights of the last process."""
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    if fault is not None and dist.get_rank() == dist.get_world_size() - 1:
        fault(model)
    return verify(model, ids, folder=folder)


def halves_swapped(model: Mixtral) -> None:
    """Gate and up, in one expert: a loader's fault."""
    weight = model.layers[1].gate_up_proj[0]
    weight.copy_(weight.roll(len(weight) // 2, 0))


def another_rank_s_heads(model: Mixtral) -> None:
    """Rows of q in other heads' places: the ranks no longer add up to the whole."""
    width = model.config.num_attention_heads * model.config.head_dim
    weight = model.layers[0].qkv_proj[:width]
    weight.copy_(weight.roll(model.config.head_dim, 0))


def counted_wrong(model: Mixtral) -> None:
    """Its experts are another rank's: the routes of nobody's are lost."""
    ranks: Any = model.ranks
    ranks.local_ids = lambda ids, experts: ids - (ranks.shard.ep_rank - 1) * experts


def halved(model: Mixtral) -> None:
    """Its part of a sum comes with half its weight."""
    ranks: Any = model.ranks
    true = ranks.all_reduce
    ranks.all_reduce = lambda part, in_order: true(part / 2, in_order)


def timed(mesh: Any, sizes: dict[str, int]) -> tuple[float, int]:
    """Seconds of a decode step on GPUs that are not there, and how many were replays."""
    from mixtral_triton.tools.bench.cases import cases
    from mixtral_triton.tools.bench.command import measure_on_mesh
    from tests.support.stub.gpu import gpu

    (case,) = cases(
        ["decode_step"], False, [], [",".join(f"{name}={size}" for name, size in sizes.items())], None, None
    )
    ranks = parallel.Ranks(mesh)
    with gpu() as simulated, on_memory():
        return measure_on_mesh(case, ranks), simulated.replays


def watched(mesh: Any, folder: Path, ids: torch.Tensor) -> list[str]:
    """What a peer of verify, and a dispatch mode, are refused with."""
    model, said = Mixtral.from_pretrained(folder, "cpu", mesh=mesh), []
    for call in (lambda: verify(model, ids, folder=folder, peer="transformers"), lambda: _in_a_mode(model, ids)):
        try:
            call()
        except ValueError as error:
            said.append(str(error))
    return said


def _in_a_mode(model: Mixtral, ids: torch.Tensor) -> None:
    with FlopCounterMode(display=False):
        model(ids)
