"""The shell, watched: each layer's own forward on the reference's input, in every way that a text may be cut.

Every operation may be right and the model wrong: by a norm in another's place, a window or a position off by one. Here
the model's own forward runs, and only what enters a layer is replaced by the reference's, so that a fault shows in the
layer that has it. Where a token goes to other experts than in plain torch it is sent where plain torch sends it, after
asking whether the two were too close to call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from ..cache import KVCache
from ..tools.tolerance import worst
from .fp64 import Expected, distance
from .report import Row

UNCACHED, CHUNKS, TOKENS = "whole text", "in chunks", "token by token"
ALONE = 3  # tokens read one at a time, after the chunks
PADDING = 3  # tokens behind one of the chunks that are not there
RING = 4  # a window as long as the text is tried at this fraction of it, so that the ring turns


class ExpectedRoutes:
    """The gate's choices, compared with plain torch's and overruled by them, layer after layer of one forward.

    at, behind  the tokens of the forward, indices on the CPU: layers may be on several GPUs; by how much of the
                largest logit each layer's worst choice was wrong
    """

    def __init__(self, expected: Sequence[Expected]) -> None:
        self.expected = expected
        self.flips, self.layer = 0, 0
        self.behind = [0.0] * len(expected)
        self.at = torch.zeros(0, dtype=torch.long)
        self.real = 0

    @classmethod
    def of_whole(cls, expected: Sequence[Expected], tokens: int) -> ExpectedRoutes:
        """For one forward of all `tokens` of a text."""
        routes = cls(expected)
        routes.start(torch.arange(tokens), tokens)
        return routes

    def start(self, at: Tensor, real: int) -> None:
        """A forward begins: of the tokens `at` [T] of each sequence, the first `real` of them in earnest."""
        self.layer, self.at, self.real = 0, at, real

    def overrule(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """weights, ids [B*T,K] as the gate has them -> as they shall be."""
        index, want = self.layer, self.expected[self.layer]
        self.layer += 1
        B, T = len(want.x), len(self.at)
        chosen, right = ids.view(B, T, -1), want.ids[:, self.at].to(ids.dtype)
        self.behind[index] = max(self.behind[index], want.misrouted(chosen[:, : self.real], self.at[: self.real]))
        other = (chosen.sort(-1).values != right.sort(-1).values).any(-1, keepdim=True)
        self.flips += int(other[:, : self.real].sum())
        scores = torch.where(other, want.weights[:, self.at].to(weights.dtype), weights.view(B, T, -1))
        return scores.view_as(weights), torch.where(other, right, chosen).view_as(ids)

    def rows(self) -> list[Row]:
        """One a layer."""
        pairs = zip(self.behind, self.expected, strict=True)
        return [Row(at, "layer", "routes", behind, want.route_limit) for at, (behind, want) in enumerate(pairs)]


class LayerProbe:
    """What the layers of a forward get and give, beside what they should; `said` is called after each layer."""

    def __init__(self, expected: Sequence[Expected], said: Callable[[], None]) -> None:
        self.expected, self.said = expected, said
        self.routes = ExpectedRoutes(expected)
        self.found: dict[tuple[int, str], list[tuple[float, float]]] = {}
        self.case = ""

    def start(self, case: str, at: Tensor, real: int) -> None:
        self.case = case
        self.routes.start(at, real)

    def note(self, layer: int, name: str, got: Tensor) -> None:
        """`name` of an `Expected`: x has to be the reference's own, the others near the truth."""
        real = self.routes.real
        want, at, got = getattr(self.expected[layer], name), self.routes.at[:real], got[:, :real]
        exact = name == "x"
        pair = (float(distance(got, want[:, at].double()).max()), 0.0) if exact else want.measure(got, at)
        self.found.setdefault((layer, self.case), []).append(pair)

    def enter(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` is given -> the reference's input, in its place."""
        self.note(index, "x", x)
        return self.expected[index].x[:, self.routes.at]

    def leave(self, index: int, x: Tensor) -> Tensor:
        """What layer `index` made of it -> what goes on: the reference's input of the next one."""
        self.note(index, "output", x)
        self.said()
        return self.expected[index + 1].x[:, self.routes.at] if index + 1 < len(self.expected) else x

    def layer(self, index: int, forward: Callable[..., Any], h: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """`forward` of layer `index` on the reference's input, in the place of what the shell gives it."""
        x = self.enter(index, x)
        self.note(index, "normed", h)
        h, x = forward(self.expected[index].h[:, self.routes.at], x, *rest)
        return h, self.leave(index, x)

    def rows(self) -> list[Row]:
        """A row a layer and way to cut the text, and one for its routes."""
        forwards = [Row(layer, "layer", case, *worst(pairs)) for (layer, case), pairs in self.found.items()]
        return forwards + self.routes.rows()


def shallow_copy(model: Any, config: Any, routes: ExpectedRoutes, watch: LayerProbe | None = None) -> Any:
    """`model` with another config and the routes overruled, on the same weights; its layers watched, if asked for."""

    def route(gate: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        h, x, weights, ids = gate(*args)
        return h, x, *routes.overrule(weights, ids)

    own = copy.copy(model)
    own._modules = dict(model._modules)
    own.config = config
    layers = [copy.copy(layer) for layer in model.layers]
    for index, layer in enumerate(layers):
        layer.config, layer.route = config, partial(route, layer.route)
        if watch is not None:
            layer.forward = partial(watch.layer, index, layer.forward)
    own.layers = nn.ModuleList(layers)
    return own


def with_small_window(config: Any, tokens: int) -> Any:
    """`config` with a window that the text is long enough to leave."""
    window = config.sliding_window
    long = window is not None and window >= tokens
    return replace(config, sliding_window=max(1, tokens // RING)) if long else config


def cuts(tokens: int) -> list[tuple[str, int, int, int]]:
    """(case, first token, tokens, padding behind them): the calls that read a text over a cache."""
    alone = min(ALONE, tokens - 1) or 1
    rest = tokens - alone
    bounds = sorted({0, -(-2 * rest // 5), -(-3 * rest // 4), rest})
    spans = enumerate(pairwise(bounds))
    chunks = [(CHUNKS, a, b - a, PADDING if index == 1 else 0) for index, (a, b) in spans]
    return chunks + [(TOKENS, at, 1, 0) for at in range(rest, tokens)]


def forwards(tokens: int) -> int:
    """How many forwards `watched` makes."""
    return 1 + len(cuts(tokens))


def watched(model: Any, config: Any, ids: Tensor, expected: Sequence[Expected], said: Callable[[], None]) -> LayerProbe:
    """The layers of `model` on ids [B,T]: without a cache, and over one."""
    watch = LayerProbe(expected, said)
    own = shallow_copy(model, config, watch.routes, watch)
    B, T = ids.shape
    everything = torch.arange(T)
    watch.start(UNCACHED, everything, T)
    own.hidden(ids)
    cache = KVCache(config, B, T + PADDING, model.device, model.dtype)
    for case, first, real, padding in cuts(T):
        at = torch.cat((everything[first : first + real], everything.new_zeros(padding)))
        watch.start(case, at, real)
        lengths = torch.full((B,), real, dtype=torch.int32, device=ids.device) if padding else None
        own.hidden(ids[:, at], cache, lengths)
    return watch


def end_to_end(model: Any, ids: Tensor, expected: Sequence[Expected]) -> tuple[Tensor, int]:
    """The model's own forward, with plain torch's routes -> logits fp32 [B,T,V], tokens it would route elsewhere."""
    routes = ExpectedRoutes.of_whole(expected, ids.shape[1])
    return shallow_copy(model, model.config, routes)(ids), routes.flips
