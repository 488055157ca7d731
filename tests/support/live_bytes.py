"""How many bytes of meta tensors are alive at one time: what the same calls would take of a GPU."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Within the block, `now` and `most` count the memory that torch's operations give, until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self._note(x.untyped_storage(), known)
        self.most = max(self.most, self.now)
        return out

    def _note(self, storage: Any, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.alive.pop(key)
