"""More than one GPU: what each rank of a mesh keeps of the weights, and what the ranks send each other.

n ranks, tp x ep of them; H hidden, I intermediate, E experts, Hq query heads, Hkv key/value heads, D head size, V
vocabulary

Every rank has every token. Attention is split by heads and the head by vocabulary over all n ranks, the experts over
"ep" and the intermediate size of each over "tp"; embedding, norms and gate are everywhere. What a rank's attention, or
its experts, give is a part of a sum (Megatron-LM, Shoeybi et al. 2019, section 3): an all-reduce behind each.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .config import MixtralConfig
from .quantize.spec import QuantSpec

DIMENSIONS = ("tp", "ep")
TIMEOUT = timedelta(seconds=30)  # of what runs at the same pace everywhere: a sum, the logits, a token
LOADING = timedelta(minutes=10)  # for a rank whose disk is slower; one that has died is seen at once
LOOKING = 1.0  # seconds between two looks at who is still there
SETTLING = 0.2  # seconds until the connections of a dead rank are seen to be closed

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Shard:
    """What one rank keeps of the weights; as it comes, all of them.

    tp, ep            ranks along each dimension of the mesh
    tp_rank, ep_rank  this one's place along each
    rank              its place among all of them
    """

    tp: int = 1
    ep: int = 1
    tp_rank: int = 0
    ep_rank: int = 0
    rank: int = 0

    @property
    def ranks(self) -> int:
        return self.tp * self.ep

    def check(self, config: MixtralConfig) -> None:
        """ValueError where the ranks do not divide a size of the model."""
        n, queries, keys = self.ranks, config.num_attention_heads, config.num_key_value_heads
        needs = {
            f"num_attention_heads is {queries}, needs a multiple of {n}": queries % n,
            f"num_key_value_heads is {keys}, needs a multiple or a divisor of {n}": keys % n and n % keys,
            f"num_local_experts is {config.num_local_experts}, needs a multiple of {self.ep}": (
                config.num_local_experts % self.ep
            ),
            f"intermediate_size is {config.intermediate_size}, needs a multiple of {self.tp}": (
                config.intermediate_size % self.tp
            ),
            f"vocab_size is {config.vocab_size}, needs at least {n}": config.vocab_size < n,
        }
        for need, unmet in needs.items():
            if unmet:
                raise ValueError(f"Mixtral.from_pretrained: mesh has tp {self.tp} x ep {self.ep} = {n} ranks: {need}")

    def config(self, config: MixtralConfig) -> MixtralConfig:
        """The model's, with the heads that this rank keeps."""
        queries, keys = self.queries(config), self.keys(config)
        own = {"num_attention_heads": queries.stop - queries.start, "num_key_value_heads": keys.stop - keys.start}
        return replace(config, **own) if self.ranks > 1 else config

    def queries(self, config: MixtralConfig) -> slice:
        """Query heads."""
        return even(config.num_attention_heads, self.rank, self.ranks)

    def keys(self, config: MixtralConfig) -> slice:
        """Key/value heads: those that its query heads read. Where there are fewer than ranks, several keep the same."""
        heads = config.num_key_value_heads
        start = heads * self.rank // self.ranks
        return slice(start, start + max(1, heads // self.ranks))

    def qkv_rows(self, config: MixtralConfig) -> dict[str, slice]:
        """The rows of its heads in each of the three projections, as they are stored."""
        D, queries, keys = config.head_dim, self.queries(config), self.keys(config)
        own = slice(keys.start * D, keys.stop * D)
        return {"q": slice(queries.start * D, queries.stop * D), "k": own, "v": own}

    def experts(self, config: MixtralConfig) -> slice:
        return even(config.num_local_experts, self.ep_rank, self.ep)

    def inner(self, config: MixtralConfig) -> slice:
        """Of each expert's intermediate size."""
        return even(config.intermediate_size, self.tp_rank, self.tp)

    def vocabulary(self, config: MixtralConfig) -> slice:
        """Rows of the head."""
        return even(config.vocab_size, self.rank, self.ranks)

    def specs(
        self, specs: Mapping[str, QuantSpec], whole: Mapping[str, Shape], own: Mapping[str, Shape]
    ) -> dict[str, QuantSpec]:
        """The forms of this rank's parts, of shapes `own`, of parameters that have `forms` and shapes `whole`.

        Where a row has one scale, each part of it keeps that. ValueError where a group of columns would be cut.
        """
        found = {}
        for name, spec in specs.items():
            K, columns = whole[name][-1], own[name][-1]
            if spec.group != K and columns % spec.group:
                cut = f"mesh cuts the {K} columns of {name} into {columns} a rank"
                raise ValueError(f"Mixtral.from_pretrained: {cut}, needs a multiple of the group, {spec.group}")
            found[name] = replace(spec, group=columns) if spec.group == K else spec
        return found


UNSHARDED = Shard()


def even(size: int, part: int, parts: int) -> slice:
    """One of several parts, which differ by one at most."""
    return slice(size * part // parts, size * (part + 1) // parts)


class Ranks:
    """The ranks of a DeviceMesh, as one of them sees it: its Shard, and what they send each other.

    name         of this rank, for messages
    device_type  the mesh's
    """

    def __init__(self, mesh: Any) -> None:
        """Every rank of the mesh has to call this. ValueError for what is no mesh of DIMENSIONS, with this rank."""
        _check(mesh)
        ranks = sorted(mesh.mesh.flatten().tolist())
        sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
        places = {f"{name}_rank": mesh.get_local_rank(name) for name in sizes}
        self.shard = Shard(**sizes, **places, rank=ranks.index(dist.get_rank()))
        self.name = f"rank {self.shard.rank} of {self.shard.ranks}"
        self.device_type: str = mesh.device_type
        self._global = ranks
        try:
            # Groups of our own: with our timeouts, over both dimensions at once, and on CPUs for what the hosts say.
            # That one first: the ranks may come here at very different times.
            self._hosts: Any = dist.new_group(ranks, timeout=LOADING, backend="gloo", use_local_synchronization=True)
            self._group: Any = dist.new_group(ranks, timeout=TIMEOUT, use_local_synchronization=True)
        except RuntimeError as error:
            raise ConnectionError(f"{self.name}: the ranks do not find each other: {_line(error)}") from error

    def check_device(self, device: torch.device) -> None:
        if device.type not in (self.device_type, "meta"):
            raise ValueError(f"Mixtral.from_pretrained: device is {device}, needs the mesh's type, {self.device_type}")

    def local_ids(self, ids: Tensor, experts: int) -> Tensor:
        """Routes ids int32 [T,K] as this rank counts its `experts`; another rank's are out of range, and drop out."""
        return ids - self.shard.ep_rank * experts if self.shard.ep > 1 else ids

    def all_reduce(self, part: Tensor, in_order: bool) -> Tensor:
        """The sum of all ranks' `part`, in its memory or elsewhere.

        in_order: rank by rank. An all-reduce chooses its order by the size of the whole, so by the batch.
        """
        if in_order:
            return reduce(torch.add, self.gathered(part))
        with self._watched():
            dist.all_reduce(part, group=self._group)
        return part

    def all_gather(self, part: Tensor, size: int) -> Tensor:
        """The parts [..., n] of a last dimension of `size`, cut by `even` -> [..., size]."""
        runs = [even(size, rank, self.shard.ranks) for rank in range(self.shard.ranks)]
        widths = [run.stop - run.start for run in runs]
        parts = self.gathered(F.pad(part, (0, max(widths) - part.shape[-1])))
        return torch.cat([one[..., :width] for one, width in zip(parts, widths, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """The first rank's x, on all."""
        with self._watched():
            dist.broadcast(x, self._global[0], group=self._group)
        return x

    def synchronize(self, device: torch.device) -> None:
        """Wait for what `device` has to do. ConnectionError where another rank is gone or does not answer meanwhile:
        of what a replayed graph sends, torch's own watchdog knows nothing."""
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.wait(event.query)

    def wait(self, done: Callable[[], bool]) -> None:
        """Until `done()`; as `synchronize`."""
        start = looked = time.monotonic()
        while not done():
            now = time.monotonic()
            late = now - start > TIMEOUT.total_seconds()
            if late or now - looked > LOOKING:
                self._refuse_gone(late)
                looked = time.monotonic()

    def _refuse_gone(self, late: bool) -> None:
        if (gone := self._gone()) or late:
            raise ConnectionError(f"{self.name}: {_missing(gone)}: its part of a sum did not come")

    def gathered(self, part: Tensor) -> list[Tensor]:
        """Every rank's, all of one shape."""
        parts = [torch.empty_like(part) for _ in self._global]
        with self._watched():
            dist.all_gather(parts, part, group=self._group)
        return parts

    def all_gather_object(self, what: Any) -> list[Any]:
        """What each rank's host says."""
        said: list[Any] = [None] * self.shard.ranks
        with self._watched():
            dist.all_gather_object(said, what, group=self._hosts)
        return said

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """What fails on one rank fails on all, each with a ValueError that says where and why: nobody waits in vain."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        messages = self.all_gather_object(None if error is None else _line(error))
        if error is not None and (
            messages.count(messages[0]) == len(messages) or not isinstance(error, (ValueError, OSError))
        ):
            raise error
        failed = [f"rank {rank} of {len(messages)}: {text}" for rank, text in enumerate(messages) if text is not None]
        if failed:
            raise ValueError("; ".join(failed)) from error

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """A ConnectionError that names this rank, and the ranks that are gone, where they do not answer."""
        try:
            yield
        except RuntimeError as error:
            time.sleep(SETTLING)
            why = _line(error).partition(". ")[0]  # gloo goes on with advice
            raise ConnectionError(f"{self.name}: {_missing(self._gone())}: {why}") from error

    def _gone(self) -> list[int]:
        """The other ranks whose connections are closed."""
        places = enumerate(self._global)
        return [rank for rank, place in places if rank != self.shard.rank and self._closed(place)]

    def _closed(self, place: int) -> bool:
        """Whether the connection to the rank of this place in the world is."""
        try:
            dist.isend(torch.zeros(1, device="cpu"), place, group=self._hosts)
        except RuntimeError:
            return True
        return False


def _missing(gone: list[int]) -> str:
    return f"rank {' and '.join(map(str, gone))} is gone" if gone else "another rank does not answer"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check(mesh: Any) -> None:
    from torch.distributed.device_mesh import DeviceMesh  # it takes a while to import

    need = "needs a torch.distributed.device_mesh.DeviceMesh whose dimensions are named 'tp' or 'ep', or both"
    if not isinstance(mesh, DeviceMesh):
        raise ValueError(f"Mixtral.from_pretrained: mesh is {mesh!r:.80}, {need}")
    names = mesh.mesh_dim_names
    if not names or not set(names) <= set(DIMENSIONS):
        raise ValueError(f"Mixtral.from_pretrained: mesh has dimensions named {names}, {need}")
    if mesh.get_coordinate() is None:
        raise ValueError(
            f"Mixtral.from_pretrained: mesh is of ranks {mesh.mesh.tolist()}, needs {dist.get_rank()}, too"
        )


@dataclass(frozen=True)
class Traffic:
    """Bytes that a rank sends for one token of a decode step, by a ring's algorithm.

    layer  both all-reduces of one layer: each sends 2 (n - 1) / n of H numbers
    head   the logits: n - 1 times this rank's part of the vocabulary
    """

    layer: int
    head: int


def traffic(config: MixtralConfig, tp: int = 1, ep: int = 1, itemsize: int = 2) -> Traffic:
    """`itemsize`: bytes of a number of the activations. A `deterministic` model sends n / 2 times as much a layer."""
    n = tp * ep
    part = -(-config.vocab_size // n)
    tied = config.tie_word_embeddings
    return Traffic(2 * 2 * (n - 1) * config.hidden_size * itemsize // n, 0 if tied else (n - 1) * part * itemsize)
