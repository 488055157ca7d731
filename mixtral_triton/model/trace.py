"""The routes of a text: which experts each token took in each layer, and how they were weighted (Jiang et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .model import Model


class Routes(NamedTuple):
    """ids      int32 [L,T,K], a token's first choice first; of a batch [B,L,T,K]
    weights  fp32 of the same shape: the routing weights"""

    ids: Tensor
    weights: Tensor


class RouteRecorder(TorchDispatchMode):
    """Collects the routing weights and expert ids [N,K] of every layer's gate; calls `progress` after each."""

    def __init__(self, progress: Callable[[int], object]) -> None:
        super().__init__()
        self.routes: list[tuple[Tensor, Tensor]] = []
        self.progress = progress

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mixtral_triton.rms_norm_gate_route.default:
            self.routes.append(out[-2:])
            self.progress(1)
        return out


@torch.no_grad()
def trace(model: Model, input_ids: Tensor, progress: Callable[[int], object] = lambda layers: None) -> Routes:
    """Run a text, int64 [T] on the model's device, or a batch [B,T], and return the routes of its tokens in each layer.
    `progress` gets the number of layers just computed. Raises ValueError as the model's forward does."""
    is_text = isinstance(input_ids, Tensor) and input_ids.dim() == 1
    with RouteRecorder(progress) as recorder:
        model(input_ids[None] if is_text else input_ids)
    stacked = (torch.stack(parts) for parts in zip(*recorder.routes, strict=True))
    weights, ids = (x.unflatten(1, (-1, input_ids.shape[-1])) for x in stacked)
    return Routes(*(part[:, 0] if is_text else part.transpose(0, 1).contiguous() for part in (ids, weights)))
