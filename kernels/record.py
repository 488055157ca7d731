"""Recording what a call launches on meta tensors, for a GPU that need not be there."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .launching import launch
from .launching.arch import ARCHS
from .launching.launch import Launch
from .operation.plan import MEMORY
from .operation.torch_operator import unflatten_args
from .registry import OPS

# torch operations that allocate memory or make a view, and compute nothing.
_FREE = {*MEMORY, "_unsafe_view", "lift_fresh"}


def _share_storage(x: torch.Tensor, out: Any) -> bool:
    """Return whether the results of an operation that may return views of x do: `reshape`, `contiguous` and `to` arrive
    whole within an operation and in inference mode, and may have copied."""
    storages = {tensor.untyped_storage()._cdata for tensor in (x, *(out if isinstance(out, (list, tuple)) else (out,)))}
    return len(storages) == 1  # their addresses on the meta device are 0


class _Recorder(TorchDispatchMode):
    """Records each torch operation that computes; runs the launchers of our own operators, whose kernels then show."""

    def __init__(self, records: list[Launch]) -> None:
        super().__init__()
        self.records = records

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mixtral_triton":
            op = OPS[func._opname]
            if not launch.INTERPRETED and args[0].device.type == "cpu":
                raise ValueError(f"record_launches: {op.name} got a CPU tensor, needs meta tensors")
            with self:
                args = unflatten_args(op.arguments, args)
                op.check(*args)
                return op.run(*args)
        out = func(*args, **(kwargs or {}))
        if func._opname not in _FREE and not (func.is_view and _share_storage(args[0], out)):
            name = f"aten::{func._opname}" if func.namespace == "aten" else str(func)
            tensors = {**{f"in_{index}": arg for index, arg in enumerate(args)}, "out": out}
            # Meta tensors only: a record keeps no memory alive.
            metas = {name: x for name, x in tensors.items() if isinstance(x, torch.Tensor) and x.is_meta}
            self.records.append(Launch(name, args=metas))
        return out


@contextmanager
def record_launches(arch: str = launch.DEFAULT_ARCH, sms: int | None = None) -> Iterator[list[Launch]]:
    """Record every device kernel within the block, in order: meta tensors in, meta tensors out, nothing runs.

    A Triton launch is one entry, and so is each torch operation that is not a view (`aten::mm`, its grid None; its
    meta tensors are `args` in_0, in_1, ... and out).
    """
    if not re.fullmatch(r"sm_\d+|gfx[0-9a-f]+", str(arch)):
        raise ValueError(f"record_launches: arch is {arch!r}, needs one of {', '.join(ARCHS)}")
    records: list[Launch] = []
    everywhere = (*launch._context.get().records, records)  # a block around this one records these launches, too
    with launch.launch_context(arch=arch, sms=sms, records=everywhere), _Recorder(records):
        yield records
