"""A model on a mesh: every rank gathers one layer at a time for torch, and runs operations on its own shard."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MixtralConfig
from ..kernels.call import call_unchecked
from ..kernels.quantized import QuantizedWeight, unpack
from ..kernels.registry import OPS
from ..model import Layer
from ..parallel import Shard
from ..quantize.spec import put
from ..weights import parameter_shapes, qkv_rows
from .layers import LayerCheck, Target

ALL = slice(None)


class MeshTarget(Target):
    """A `Mixtral` on a mesh, gathered. Every rank must make the same calls."""

    catches_faults, widens = False, False

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        ranks = self.ranks = model.ranks
        self.shards: list[Shard] = ranks.all_gather_object(ranks.shard)
        self.shapes, self.local_config = parameter_shapes(self.config), ranks.shard.config
        self.layers = _GatheredLayers(self)
        tied = self.config.tie_word_embeddings
        self.lm_head = self.embed_tokens if tied else self.gather("lm_head", model.lm_head)

    def check(self, layer: Any, x: Tensor, config: MixtralConfig) -> LayerCheck:
        """The whole layer in torch; the calls of operations on this rank's shard."""
        check, shard = super().check(layer, x, config), self.ranks.shard
        values, queries, keys = check.values, shard.queries(config), shard.keys(config)
        heads = values.heads[..., shard.qkv_rows(config)["q"]]
        qkv = {"q": values.q[:, :, queries], "k": values.k[:, :, keys], "v": values.v[:, :, keys]}
        local = LayerCheck(replace(values, heads=heads, **qkv), layer.local, shard.config(config), check.tables)
        local.local_ids = partial(self.ranks.local_ids, experts=len(layer.local.down_proj))
        for name in ("calls", "sized_calls"):
            setattr(check, name, getattr(local, name))
        # Checks on a CPU would reject another rank's experts.
        check.operation = lambda name, args: lambda **kwargs: call_unchecked(OPS[name], OPS[name].bind(**kwargs))
        return check

    def gather(self, name: str, weight: Any) -> Any:
        """The whole parameter `name` (see `weights.parameter_shapes`), of which this rank has `weight`."""
        shape = self.shapes[name]
        if tuple(weight.shape) == shape:
            return weight
        if isinstance(weight, Tensor):
            return self._gather_plane(name, weight, 1)
        size = weight.format, shape, weight.group, weight.scales.dtype, weight.zeros is not None, weight.device
        whole, codes = _GatheredWeight.empty(*size), unpack(weight.data, weight.format, weight.shape[-1], weight.group)
        zeros = None if weight.zeros is None else self._gather_plane(name, weight.zeros, weight.group) - 128
        put(whole, self._gather_plane(name, codes, 1), self._gather_plane(name, weight.scales, weight.group), zeros)
        return whole

    def _gather_plane(self, name: str, local: Tensor, group: int) -> Tensor:
        """One tensor of a parameter, with a value for each of its columns or for each `group` of them."""
        *lead, columns = self.shapes[name]
        whole = torch.empty(*lead, columns // group, dtype=local.dtype, device=local.device)
        if local.is_floating_point():
            whole.fill_(float("nan"))  # where no rank has a part
        rows = -(-self.config.vocab_size // len(self.shards)) if name == "lm_head" else local.shape[-2]
        parts = self.ranks.gather(F.pad(local, (0, 0, 0, rows - local.shape[-2])))
        for shard, part in zip(self.shards, parts, strict=True):
            index = _indices(name, self.config, shard, group)
            whole[index] = part[: index.stop - index.start] if name == "lm_head" else part
        return whole


class _GatheredWeight(QuantizedWeight):
    """A weight whose rows have each rank's scale for its part of their columns. No kernel reads it."""

    def _check(self) -> None: ...


class _GatheredLayers:
    """The layers, each gathered when it is read. The last one is kept."""

    def __init__(self, target: MeshTarget) -> None:
        self.target = target
        self.last: tuple[int, Layer] | None = None

    def __len__(self) -> int:
        return len(self.target.model.layers)

    def __getitem__(self, index: int) -> Layer:
        if self.last is None or self.last[0] != index:
            self.last = None  # frees its memory first
            local = self.target.model.layers[index]  # IndexError ends an iteration
            weights: dict[str, Any] = {}
            for name, weight in (*local.named_parameters(recurse=False), *local.named_children()):
                whole = self.target.gather(f"layers.{index}.{name}", weight)
                weights[name] = nn.Parameter(whole, requires_grad=False) if isinstance(whole, Tensor) else whole
            layer = Layer(self.target.config, weights)
            object.__setattr__(layer, "local", local)  # not as a submodule, whose weights would be the layer's
            self.last = index, layer
        return self.last[1]


def _indices(name: str, config: MixtralConfig, shard: Shard, group: int) -> Any:
    """Where a rank's part of a parameter is in the whole."""
    short, inner, experts = name.rpartition(".")[2], shard.inner(config), shard.experts(config)
    if short == "lm_head":
        return shard.vocabulary(config)
    if short == "qkv_proj":
        runs = zip(qkv_rows(config).values(), shard.qkv_rows(config).values(), strict=True)
        return torch.cat([torch.arange(run.start, run.stop) + rows.start for rows, run in runs])
    if short == "gate_up_proj":
        return experts, torch.cat([torch.arange(inner.start, inner.stop) + at for at in (0, config.intermediate_size)])
    run = shard.qkv_rows(config)["q"] if short == "o_proj" else inner
    columns = slice(run.start // group, run.stop // group)
    return (ALL, columns) if short == "o_proj" else (experts, ALL, columns)
