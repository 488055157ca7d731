"""A model on a mesh, seen whole: each layer is put together on every rank while the reference computes with it.

The reference is plain torch on the whole of a layer. The loaded tensors that are held against the files are these, too;
a rank's operations run on its own part, its layers' forwards with what the ranks really send each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import MixtralConfig
from ..kernels.call import call_unchecked
from ..kernels.quantized import QuantizedWeight, unpack
from ..kernels.registry import OPS
from ..model import Layer, Mixtral
from ..parallel import Ranks, Shard
from ..quantize.spec import put
from ..weights import parameter_shapes, qkv_rows
from .layers import LayerCheck
from .report import Row

Index = tuple[slice, ...]


class Whole:
    """A `Mixtral` of a mesh, put together as it is asked for: every rank has to ask for the same.

    What has to stand in `Mixtral` for check_loaded, check_layers, cost and the head of the reference is here.
    """

    def __init__(self, model: Mixtral, ranks: Ranks) -> None:
        self.model, self.ranks, self.config = model, ranks, model.whole_config
        self.embed_tokens, self.norm, self.cos, self.sin = model.embed_tokens, model.norm, model.cos, model.sin
        self.device, self.dtype, self.places = model.device, model.dtype, model.places
        self.shards: list[Shard] = ranks.all_gather_object(ranks.shard)
        self.shapes = parameter_shapes(self.config)
        self.layers = _Layers(self)

    @cached_property
    def lm_head(self) -> Any:
        if self.config.tie_word_embeddings:
            return self.embed_tokens
        return self.together("lm_head", self.model.lm_head)

    def parameters(self, recurse: bool = False) -> Iterator[Tensor]:
        """As of a module: the dense ones outside the layers, each once."""
        head = () if self.config.tie_word_embeddings else (self.lm_head,)
        return (one for one in (self.embed_tokens, self.norm, *head) if isinstance(one, Tensor))

    def children(self) -> Iterator[QuantizedWeight]:
        return (one for one in (self.lm_head,) if isinstance(one, QuantizedWeight))

    def together(self, name: str, own: Any) -> Any:
        """The parameter `name` (see `weights.parameter_shapes`), of which this rank has `own`."""
        shape = self.shapes[name]
        if tuple(own.shape) == shape:
            return own  # every rank has all of it
        if isinstance(own, Tensor):
            return self._plane(name, own, shape, 1)
        whole = _Parts.empty(own.format, shape, own.group, own.scales.dtype, own.zeros is not None, own.device)
        codes = self._plane(name, unpack(own.data, own.format, own.shape[-1], own.group), shape, 1)
        groups = *shape[:-1], shape[-1] // own.group
        scales = self._plane(name, own.scales, groups, own.group)
        put(whole, codes, scales, None if own.zeros is None else self._plane(name, own.zeros, groups, own.group) - 128)
        return whole

    def _plane(self, name: str, own: Tensor, shape: tuple[int, ...], group: int) -> Tensor:
        """One tensor of a parameter: a number for each of its columns, or for each `group` of them."""
        whole = torch.empty(shape, dtype=own.dtype, device=own.device)
        if own.is_floating_point():
            whole.fill_(float("nan"))  # what no rank has
        rows = -(-self.config.vocab_size // len(self.shards)) if name == "lm_head" else own.shape[-2]
        parts = self.ranks.gathered(F.pad(own, (0, 0, 0, rows - own.shape[-2])))
        for shard, part in zip(self.shards, parts, strict=True):
            for here, there in _pieces(name, self.config, shard, group):
                whole[there] = part[here]
        return whole


class _Parts(QuantizedWeight):
    """One whose rows have each rank's scale for its part of their columns: no kernel reads it."""

    def _check(self) -> None:
        """Parts are as long as they are."""


class _Layers:
    """The layers, each put together when it is asked for; the last one is kept."""

    def __init__(self, whole: Whole) -> None:
        self.whole = whole
        self.kept: tuple[int, Layer] | None = None

    def __len__(self) -> int:
        return len(self.whole.model.layers)

    def __iter__(self) -> Iterator[Layer]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Layer:
        if self.kept is None or self.kept[0] != index:
            self.kept = None  # before the next one takes its memory
            own: Any = self.whole.model.layers[index]
            names = [name for name, _ in (*own.named_parameters(recurse=False), *own.named_children())]
            found = {name: self.whole.together(f"layers.{index}.{name}", getattr(own, name)) for name in names}
            layer = Layer(self.whole.config, {name: _parameter(weight) for name, weight in found.items()})
            object.__setattr__(layer, "own", own)  # no child: its weights are not this layer's
            self.kept = index, layer
        return self.kept[1]


def _parameter(weight: Any) -> Any:
    return nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight


def _pieces(name: str, config: MixtralConfig, shard: Shard, group: int) -> Iterator[tuple[Index, Index]]:
    """Where a rank's part of a parameter lies in the whole: (in its own, in the whole)."""
    short, everything, I = name.rpartition(".")[2], slice(None), config.intermediate_size
    rows, inner, experts = shard.qkv_rows(config), shard.inner(config), shard.experts(config)
    if short == "qkv_proj":
        whole = qkv_rows(config)
        for projection, here in qkv_rows(shard.config(config)).items():
            start, run = whole[projection].start, rows[projection]
            yield (here,), (slice(start + run.start, start + run.stop),)
    elif short == "o_proj":
        yield (everything,), (everything, _grouped(rows["q"], group))
    elif short == "gate_up_proj":
        size = inner.stop - inner.start
        for half in (0, 1):
            there = slice(half * I + inner.start, half * I + inner.stop)
            yield (everything, slice(half * size, (half + 1) * size)), (experts, there)
    elif short == "down_proj":
        yield (everything,), (experts, everything, _grouped(inner, group))
    elif short == "lm_head":
        run = shard.vocabulary(config)
        yield (slice(0, run.stop - run.start),), (run,)
    else:
        raise ValueError(f"verify: {name} is no parameter that ranks have parts of")


def _grouped(run: slice, group: int) -> slice:
    return slice(run.start // group, run.stop // group)


class MeshCheck(LayerCheck):
    """A layer of the whole model for the chain, and of this rank's part the calls of operations."""

    @classmethod
    def of_model(cls, whole: Any, layer: Any, x: Tensor, config: MixtralConfig) -> LayerCheck:
        check = super().of_model(whole, layer, x, config)
        shard, seen = whole.ranks.shard, check.values
        queries, keys, rows = shard.queries(config), shard.keys(config), shard.qkv_rows(config)["q"]
        heads = {"q": seen.q[:, :, queries], "k": seen.k[:, :, keys], "v": seen.v[:, :, keys]}
        part = replace(seen, heads=seen.heads[..., rows], **heads)
        own = LayerCheck(part, layer.own, shard.config(config), check.tables)
        own.routes = partial(whole.ranks.own, experts=len(layer.own.down_proj))
        check.calls = own.calls  # type: ignore[method-assign]
        return check

    def reached(self, name: str, args: Any) -> Any:
        """As the model calls it: other ranks' experts are out of range, which a check on a CPU would refuse."""
        return lambda **given: call_unchecked(OPS[name], OPS[name].bind(**given))


def worst_of_all(ranks: Ranks, rows: list[Row]) -> list[Row]:
    """Of each comparison, which all ranks made, the one nearest to its limit, or farthest beyond it."""
    return [max(same, key=lambda row: row.share) for same in zip(*ranks.all_gather_object(rows), strict=True)]
