"""The experts that a forward chose, seen from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Routes(TorchDispatchMode):
    """Collects the experts that every layer's gate chose."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mixtral_triton.rms_norm_gate_route.default:
            self.ids.append(out[-1])
        return out
