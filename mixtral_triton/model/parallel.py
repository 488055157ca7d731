"""Tensor and expert parallelism: the ranks of a mesh, which store a part each (shard.py), and their collectives.

Tokens are replicated. An all-reduce follows attention and the experts (Megatron-LM, Shoeybi et al. 2019, section 3).
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial, reduce
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.shard import Shard, even

TIMEOUT = timedelta(seconds=30)  # of collectives while the model runs
LOADING_TIMEOUT = timedelta(minutes=10)  # while loading: disks differ; a dead rank is detected at once
NO_ANSWER = "another rank is gone or does not answer"


class Ranks:
    """The ranks of a DeviceMesh as one of them sees it: its Shard, its name in messages, and the collectives."""

    def __init__(self, mesh: Any) -> None:
        """Every rank of the mesh must call this. Raises ValueError unless the mesh has "tp" or "ep", and this rank."""
        from torch.distributed.device_mesh import DeviceMesh  # a slow import

        need = "a torch.distributed.device_mesh.DeviceMesh with this rank, of dimensions named 'tp' or 'ep', or both"
        names = mesh.mesh_dim_names if isinstance(mesh, DeviceMesh) else None
        if not names or not set(names) <= {"tp", "ep"} or mesh.get_coordinate() is None:
            raise ValueError(f"Mixtral.from_pretrained: mesh is {mesh!r:.200}, needs {need}")
        ranks = sorted(mesh.mesh.flatten().tolist())
        sizes = dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
        local_ranks = {f"{name}_rank": mesh.get_local_rank(name) for name in sizes}
        self.shard = Shard(**sizes, **local_ranks, rank=ranks.index(dist.get_rank()))
        self.name = f"rank {self.shard.rank} of {self.shard.ranks}"
        self.device_type: str = mesh.device_type
        self._global = ranks
        try:
            # Separate groups: with our timeouts, over both dimensions, and on CPUs for host objects. The CPU group is
            # first, since ranks may arrive at very different times.
            new_group = partial(dist.new_group, ranks, use_local_synchronization=True)
            self._groups: list[Any] = [new_group(timeout=LOADING_TIMEOUT, backend="gloo"), new_group(timeout=TIMEOUT)]
        except RuntimeError as error:
            raise ConnectionError(f"{self.name}: the ranks cannot connect: {_line(error)}") from error
        # A group's end waits for its threads. One that frees a tensor while Python shuts down would abort the process.
        weakref.finalize(self, self._groups.clear)

    def local_ids(self, ids: Tensor, experts: int) -> Tensor:
        """Convert expert ids int32 [T,K] to this rank's indices; other ranks' ids become out of range: no-ops."""
        return ids - self.shard.ep_rank * experts if self.shard.ep > 1 else ids

    def all_reduce(self, part: Tensor, in_order: bool) -> Tensor:
        """Sum `part` over all ranks, possibly in place. in_order: rank by rank; else the order depends on the batch."""
        if in_order:
            return reduce(torch.add, self.gather(part))
        self._collect(dist.all_reduce, part)
        return part

    def all_gather(self, part: Tensor, size: int) -> Tensor:
        """Join the ranks' parts [..., n] of a last dimension of `size`, split by `even` -> [..., size]."""
        spans = [even(size, rank, self.shard.ranks) for rank in range(self.shard.ranks)]
        widths = [span.stop - span.start for span in spans]
        parts = self.gather(F.pad(part, (0, max(widths) - part.shape[-1])))
        return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], dim=-1)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return the first rank's x on all ranks."""
        self._collect(dist.broadcast, x, self._global[0])
        return x

    def synchronize(self, device: torch.device) -> None:
        """Wait for the device; raise ConnectionError after TIMEOUT. torch's watchdog does not see the collectives of a
        replayed CUDA graph."""
        if device.type == "cuda":
            event, start = torch.cuda.Event(), time.monotonic()
            event.record()
            while not event.query():
                if time.monotonic() - start > TIMEOUT.total_seconds():
                    raise ConnectionError(f"{self.name}: {NO_ANSWER}: its part of an all-reduce did not arrive")

    def gather(self, part: Tensor) -> list[Tensor]:
        """Return every rank's part; all have one shape."""
        parts = [torch.empty_like(part) for _ in self._global]
        self._collect(dist.all_gather, parts, part)
        return parts

    @contextmanager
    def raise_on_any_rank(self) -> Iterator[None]:
        """Raise a failure of one rank on all ranks as a ValueError with its reason, so that none waits for it."""
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
        messages: list[Any] = [None] * self.shard.ranks
        self._collect(dist.all_gather_object, messages, None if error is None else _line(error), group=self._groups[0])
        same = messages.count(messages[0]) == len(messages)
        if error is not None and (same or not isinstance(error, (ValueError, OSError))):
            raise error
        failed = [f"rank {rank} of {len(messages)}: {text}" for rank, text in enumerate(messages) if text is not None]
        if failed:
            raise ValueError("; ".join(failed)) from error

    def _collect(self, collective: Callable[..., Any], *args: Any, group: Any = None) -> None:
        """Call one of torch's collectives; a failure is a ConnectionError that names this rank."""
        try:
            collective(*args, group=group or self._groups[1])
        except RuntimeError as error:
            reason = _line(error).partition(". ")[0]  # gloo appends advice
            raise ConnectionError(f"{self.name}: {NO_ANSWER}: {reason}") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
