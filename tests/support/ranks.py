"""Processes that are the ranks of meshes on this CPU, over gloo, and the functions that tests call in them.

All of the processes run each function. A mesh of fewer ranks stands there several times, as a server has replicas.
"""

import os
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache, partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from mixtral_triton import KVCache, Mixtral, verify
from mixtral_triton.checkpoint import tensors as checkpoint
from mixtral_triton.model import parallel
from mixtral_triton.quantize import QuantizedWeight

COLLECTIVES = ("all_reduce", "all_gather", "broadcast", "all_gather_object", "isend")
SHORT_TIMEOUT = mock.patch.object(parallel, "TIMEOUT", timedelta(seconds=2))


class Ranks:
    """`ranks(function, *args, tp=2, ep=1, **options)` returns what `function(mesh, ...)` returns in each process.

    After CALLS calls, and after one without an answer, there are new processes: each group of a mesh has threads, and
    hundreds of them slow everything.
    """

    CALLS = 12

    def __init__(self, count: int, store: Path) -> None:
        self.count, self.store, self.calls = count, store, 0
        self.pipes: list[Connection] = []
        self.processes: list[Any] = []

    def _start(self) -> None:
        self.end()
        spawn = processes.get_context("spawn")
        for rank in range(self.count):
            ours, theirs = spawn.Pipe()
            args = rank, self.count, f"{self.store}-{self.calls}", theirs
            self.pipes.append(ours)
            self.processes.append(spawn.Process(target=_serve, args=args, daemon=True))
            self.processes[-1].start()

    def __call__(self, function: Callable[..., Any], *args: Any, tp: int = 1, ep: int = 1, **options: Any) -> list[Any]:
        if self.calls % self.CALLS == 0 or not self.processes:
            self._start()
        self.calls += 1
        for pipe in self.pipes:
            pipe.send((function, args, tp, ep, options))
        results = []
        for pipe in self.pipes:
            if not pipe.poll(480):
                self.end()
                raise AssertionError("a rank does not answer")
            results.append(pipe.recv())
        for succeeded, result in results:
            assert succeeded, result
        return [result for _, result in results]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
        self.pipes, self.processes = [], []


def _serve(rank: int, count: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    while True:
        function, args, tp, ep, options = pipe.recv()
        try:
            pipe.send((True, function(mesh_of(count, tp, ep), *args, **options)))
        except Exception:
            pipe.send((False, traceback.format_exc()))


@cache  # because each group has threads
def mesh_of(count: int, tp: int, ep: int) -> Any:
    """Return this process's mesh, one of count / (tp * ep), without dimensions of one rank."""
    from torch.distributed.device_mesh import DeviceMesh

    sizes = {"replica": count // (tp * ep), "ep": ep, "tp": tp}
    names = tuple(name for name, size in sizes.items() if size > 1)
    mesh = DeviceMesh("cpu", torch.arange(count).view(*(sizes[name] for name in names)), mesh_dim_names=names)
    return mesh[tuple(name for name in names if name != "replica")]


@contextmanager
def counted_calls() -> Iterator[Counter[str]]:
    """Count calls of the collectives; the counts are there when the block has ended."""
    calls, counted = Counter[str](), {name: mock.Mock(wraps=getattr(dist, name)) for name in COLLECTIVES}
    with mock.patch.multiple(dist, **counted):
        yield calls
    calls.update({name: function.call_count for name, function in counted.items() if function.called})


class _Counting:
    """An opened file, or a slice of it, that records how many bytes are read."""

    def __init__(self, inner: Any, read: list[int]) -> None:
        self.inner, self.read = inner, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def get_slice(self, name: str) -> Any:
        return _Counting(self.inner.get_slice(name), self.read)

    def get_tensor(self, name: str) -> Any:
        return self[name]

    def __getitem__(self, index: Any) -> Any:
        tensor = self.inner.get_tensor(index) if isinstance(index, str) else self.inner[index]
        self.read.append(tensor.nbytes)
        return tensor


def load_counted(mesh: Any, folder: Path, **options: Any) -> tuple[Mixtral, int]:
    opened_file, read = checkpoint.opened_file, [0]

    @contextmanager
    def counting(file: Path) -> Iterator[Any]:
        with opened_file(file) as opened:
            yield _Counting(opened, read)

    with mock.patch.object(checkpoint, "opened_file", counting):
        return Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options), sum(read)


def two_turns(model: Mixtral, ids: torch.Tensor, cached: bool = True) -> torch.Tensor:
    """Return the text of two turns, drawn with a penalty from the likeliest token alone, in one cache or in none."""
    cache = KVCache(model.config, len(ids), 30, "cpu", model.dtype) if cached else None
    options: dict[str, Any] = {"temperature": 1.0, "top_k": 1, "repetition_penalty": 1.2, "cache": cache}
    text = model.generate(ids[:, :4], 4, **options)
    return model.generate(torch.cat((text, ids[:, 4:7]), 1), 6, logprobs=2, **options).ids


def drawn(mesh: Any, folder: Path, ids: torch.Tensor, fault: Any = None) -> torch.Tensor:
    """Return a text that is drawn where each rank would draw other tokens."""
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh)
    if fault is not None:
        fault(model)
    torch.manual_seed(dist.get_rank())
    return model.generate(ids[:, :4], max_new_tokens=8, temperature=1.0)


def everything(mesh: Any, folder: Path, ids: torch.Tensor, fault: Any = None) -> dict[str, Any]:
    """Return what a model on the mesh computes, holds, reads and sends, on the last process with `fault(model)`."""
    model, read = load_counted(mesh, folder)
    if fault is not None and is_last_rank():
        fault(model)
    found: dict[str, Any] = {"first": int(mesh.mesh.min()), "read": read}
    found |= {"logits": model(ids), "greedy": model.generate(ids[:, :4], max_new_tokens=8)}
    found |= {"turn": two_turns(model, ids), "scores": torch.stack(model.score(ids))}
    cache = KVCache(model.config, batch=len(ids), max_len=ids.shape[1], device="cpu", dtype=model.dtype)
    steps = [model(ids[:, :5], cache=cache)]
    with counted_calls() as found["calls"]:
        steps.append(model(ids[:, 5:6], cache=cache))
    steps += [model(ids[:, t : t + 1], cache=cache) for t in range(6, ids.shape[1])]
    found["cached"], found["cache"] = torch.cat(steps, dim=1), sum(keys.nbytes for keys in cache.keys)
    found["bytes"] = kept_bytes(model)
    found["one token"] = model(ids[:1, :1])
    return found


def kept_bytes(model: Mixtral) -> dict[str, int]:
    return {
        name: place.nbytes if isinstance(place, QuantizedWeight) else place.untyped_storage().nbytes()
        for name, place in model.named_weights().items()
    }


def values_and_scales(model: Mixtral) -> dict[str, torch.Tensor]:
    """Return the values of each quantized weight, and each one's scale, [2,...]."""
    quantized = {name: part for name, part in model.named_weights().items() if isinstance(part, QuantizedWeight)}
    return {
        name: torch.stack((weight.dequantize(), weight.scales.repeat_interleave(weight.group, -1).float()))
        for name, weight in quantized.items()
    }


def quantized_parts(mesh: Any, folder: Path, ids: torch.Tensor, **options: Any) -> tuple[Any, ...]:
    """Return this rank's shard, values and scales, bytes and logits."""
    model: Any = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    return model.ranks.shard, values_and_scales(model), kept_bytes(model), model(ids)


def read_and_kept(mesh: Any, folder: Path) -> tuple[int, int]:
    model, read = load_counted(mesh, folder)
    return read, sum(kept_bytes(model).values())


def logits(mesh: Any, folder: Path, texts: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    return [model(ids) for ids in texts]


def message(call: Callable[[], Any]) -> str:
    """Return the message of the call's error, "" without one."""
    try:
        call()
    except (ValueError, ConnectionError) as error:
        return str(error)
    return ""


def refusal(mesh: Any, folder: Any, **options: Any) -> str:
    """Return loading's error. given: replaces the mesh; root: adds the replicas to it; bad: folders by rank."""
    folder = options.pop("bad", {}).get(dist.get_rank(), folder)
    mesh = mesh._get_root_mesh() if options.pop("root", False) else options.pop("given", mesh)
    return message(lambda: Mixtral.from_pretrained(folder, mesh=mesh, **{"device": "cpu"} | options))


def is_last_rank() -> bool:
    return dist.get_rank() == dist.get_world_size() - 1


def silent(mesh: Any, folder: Path, ids: torch.Tensor) -> str:
    """Return the error of a forward that the last process does not run."""
    with SHORT_TIMEOUT:
        model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh)
    return "" if is_last_rank() else message(lambda: model(ids))


def stuck(mesh: Any, folder: Path) -> str:
    """Return the error that ends the wait for a GPU that is never done."""
    ranks: Any = Mixtral.from_pretrained(folder, "cpu", mesh=mesh).ranks
    never = mock.Mock(query=lambda: False)
    with SHORT_TIMEOUT, mock.patch.object(torch.cuda, "Event", return_value=never):
        return message(lambda: ranks.synchronize(torch.device("cuda")))


def replayed(mesh: Any, folder: Path, ids: torch.Tensor, **options: Any) -> tuple[torch.Tensor, int, Counter[str]]:
    """Return greedy text of simulated GPUs, how many of its steps were replays, and what the host itself sent."""
    from tests.support.stub.gpu import gpu

    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh, **options)
    with gpu() as simulated, counted_calls() as calls, on_memory():
        text = model.to("cuda").generate(ids.to("cuda"), max_new_tokens=8)
        return text.cpu(), simulated.replays, calls


@contextmanager
def on_memory() -> Iterator[None]:
    """Do NCCL's part: send the memory behind a GPU's tensors, in a capture when it is replayed."""
    from tests.support.stub.tensors import stage

    def act(function: Any, *args: Any, **options: Any) -> None:
        memory = tree_map(lambda x: getattr(x, "held", x), args)
        stage.run(lambda: function(*memory, **options))

    with mock.patch.multiple(dist, **{name: partial(act, getattr(dist, name)) for name in COLLECTIVES[:3]}):
        yield


def keep_single_rows(model: Mixtral) -> None:
    """The sum over all ranks is not used where a rank has one token."""
    all_reduce = model.ranks.all_reduce
    model.ranks.all_reduce = lambda part, in_order: (  # type: ignore[method-assign,union-attr]
        part if all_reduce(x := part.clone(), in_order) is not None and part[..., 0].numel() == 1 else x
    )


def skip_broadcast(model: Mixtral) -> None:
    broadcast = model.ranks.broadcast
    model.ranks.broadcast = lambda x: (broadcast(x.clone()), x)[1]  # type: ignore[method-assign,union-attr]


def swap_gate_and_up(model: Mixtral) -> None:
    """Inject a loader's fault in one expert."""
    weight = model.layers[1].gate_up_proj[0]
    weight.copy_(weight.roll(len(weight) // 2, 0))


def shift_heads(model: Mixtral) -> None:
    """Move rows of q to other heads, so that the ranks do not add up to the complete projection."""
    width = model.config.num_attention_heads * model.config.head_dim
    weight = model.layers[0].qkv_proj[:width]
    weight.copy_(weight.roll(model.config.head_dim, 0))


def verified(mesh: Any, folder: Path) -> str:
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh)
    return message(lambda: verify(model))


def shift_experts(model: Mixtral) -> None:
    """Give the experts another rank's numbers, so that some routes have no expert."""
    ranks: Any = model.ranks
    ranks.local_ids = lambda ids, experts: ids - (ranks.shard.ep_rank - 1) * experts


def halve_sums(model: Mixtral) -> None:
    ranks: Any = model.ranks
    all_reduce = ranks.all_reduce
    ranks.all_reduce = lambda part, in_order: all_reduce(part / 2, in_order)


def watched(mesh: Any, folder: Path, ids: torch.Tensor) -> str:
    model = Mixtral.from_pretrained(folder, "cpu", mesh=mesh)
    with FlopCounterMode(display=False):
        return message(lambda: model(ids))
