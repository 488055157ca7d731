"""How much memory a piece of work takes at most: anonymous, in a process of its own that a thread watches; or on a GPU,
by the bytes of meta tensors that are alive at one time."""

import os
import sys
import weakref
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixtral_triton.kernels.operation.torch_operator import unflatten_args
from mixtral_triton.kernels.registry import OPS
from tests.cli.commands import python

STATUS = "/proc/self/status"
needs_proc = pytest.mark.skipif(not os.path.exists(STATUS), reason=f"reads anonymous memory from {STATUS}")
WATCH = """
import sys, threading, torch

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

def sample():
    while not done.wait(0.001):
        peak[0] = max(peak[0], anonymous())

{setup}
torch.ones(100).to(torch.bfloat16).sum()
base, peak, done = anonymous(), [0], threading.Event()
thread = threading.Thread(target=sample)
thread.start()
{work}
done.set(), thread.join()
print(max(peak[0], anonymous()) - base, size)
"""


def anonymous_peak(setup: str, work: str, *args: str) -> tuple[int, int]:
    """Bytes that the lines of `work` take at most after those of `setup`, and the `size` that they set.

    Both find `args` in sys.argv[1:].
    """
    code = WATCH.replace("{setup}", setup).replace("{work}", work)
    result = python("-c", code, *args, PYTHONPATH=os.pathsep.join(sys.path))
    assert result.returncode == 0, result.stderr
    peak, size = map(int, result.stdout.split())
    return peak, size


class LiveBytes(TorchDispatchMode):
    """`now` and `peak` count the memory that operations allocate within the block and have not freed.

    One of ours holds all that it allocates until it returns, as a cached launch plan does.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.alive: dict[int, int] = {}
        self.of_call: list[Any] | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mixtral_triton":  # run the launcher, whose buffers count
            op = OPS[func._opname]
            self.of_call = []
            with self:
                out = op.run(*unflatten_args(op.arguments, args))
            self.of_call = None
            return out
        out = func(*args, **(kwargs or {}))
        if self.of_call is not None:
            self.of_call.append(out)
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.is_meta:
                self._record(x.untyped_storage(), known)
        self.peak = max(self.peak, self.now)
        return out

    def _record(self, storage: Any, known: set[int]) -> None:
        key = storage._cdata
        if key in known or key in self.alive:
            return
        self.alive[key] = storage.nbytes()
        self.now += self.alive[key]
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.now -= self.alive.pop(key)
