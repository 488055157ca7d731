"""What a call launches, noted and not run: on meta tensors, for a GPU that need not be there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import launch
from .op import Launch
from .plan import MEMORY
from .registry import OPS
from .signature import unflatten_args

# torch operations that give memory or a name for it, and compute nothing.
_FREE = {*MEMORY, "_unsafe_view", "lift_fresh"}


class _Recorder(TorchDispatchMode):
    """Notes each torch operation that computes; our own operators run their launchers, so that their kernels show."""

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
        if func._opname not in _FREE and not func.is_view:
            name = f"aten::{func._opname}" if func.namespace == "aten" else str(func)
            self.records.append(Launch(name, args=_meta_tensors({**_numbered(args), "out": out})))
        return out


def _numbered(args: Any) -> dict[str, Any]:
    return {f"in_{at}": arg for at, arg in enumerate(args)}


def _meta_tensors(args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Those alone: a record keeps no memory alive."""
    return {name: arg for name, arg in args.items() if isinstance(arg, torch.Tensor) and arg.is_meta}


@contextmanager
def record_launches(arch: str = launch.DEFAULT_ARCH, sms: int | None = None) -> Iterator[list[Launch]]:
    """Within the block, note every device kernel in order; meta tensors in, meta tensors out, nothing runs.

    A Triton launch is one entry, and so is each torch operation that is not a view (`aten::mm`, its grid None; its
    tensors on the meta device are `args` in_0, in_1, ... and out).
    """
    records: list[Launch] = []
    token = launch.records.set(records)
    try:
        with launch.using_arch(arch, sms), _Recorder(records):
            yield records
    finally:
        launch.records.reset(token)
