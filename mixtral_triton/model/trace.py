"""The routes of a text: which experts each token took in each layer, and how they were weighted (Jiang et al. 2024)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .model import Model


class Routes(NamedTuple):
    """ids      int32 [L,T,K], a token's first choice first; of a batch [B,L,T,K]
    weights  fp32 of the same shape: the routing weights"""

    ids: Tensor
    weights: Tensor


@torch.no_grad()
def trace(model: Model, input_ids: Tensor, progress: Callable[[int], object] = lambda layers: None) -> Routes:
    """Run a text, int64 [T] on the model's device, or a batch [B,T], and return the routes of its tokens in each layer.
    `progress` gets the number of layers just computed. Raises ValueError as the model's forward does."""
    is_text = isinstance(input_ids, Tensor) and input_ids.dim() == 1
    routes, traced = list[tuple[Tensor, Tensor]](), copy.copy(model)

    def record(route: Callable[..., Any], *args: Any) -> Any:
        out = route(*args)
        routes.append(out[2:])
        progress(1)
        return out

    layers: list[Any] = [*map(copy.copy, model.layers)]
    for layer in layers:
        layer.route = partial(record, layer.route)
    traced._modules = {**model._modules, "layers": nn.ModuleList(layers)}
    traced(input_ids[None] if is_text else input_ids)
    stacked = (torch.stack(parts) for parts in zip(*routes, strict=True))
    weights, ids = (x.unflatten(1, (-1, input_ids.shape[-1])) for x in stacked)
    return Routes(*(part[:, 0] if is_text else part.transpose(0, 1).contiguous() for part in (ids, weights)))
