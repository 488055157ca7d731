"""One layer of a model in plain torch, and every operation of the runtime on its activations.

The reference's activations go into every operation, so that one flipped route cannot hide the next layer. The error of
an operation is measured against wider arithmetic, next to the error of plain torch in the weights' dtype, which sets
the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cache import KVCache
from ..config import MixtralConfig
from ..kernels import reference as kernel_reference
from ..kernels.experts.tiles import DECODE_TOKENS
from ..kernels.linear import FEW
from ..model import Layer, Mixtral
from .report import Row
from .truth import Expected, wide_layer
from .yardstick import Args, measure, widen


def norm_args(config: Any, x: Tensor, weight: Tensor) -> Args:
    return {"x": x, "weight": weight, "eps": config.rms_norm_eps}


class LayerCheck:
    """One layer in plain torch on x [B,T,H], and the calls in it that the runtime has to equal."""

    plain: Mapping[str, Callable[..., Any]] = {}  # what sets an operation's limit, where not its reference

    def __init__(self, model: Mixtral, layer: Layer, x: Tensor, config: MixtralConfig) -> None:
        self.config, self.layer, self.x = config, layer, x
        B, T, H = x.shape
        Hq, Hkv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.normed = reference.rms_norm(x, layer.input_layernorm, config.rms_norm_eps)
        qkv = F.linear(self.normed, layer.qkv_proj).view(B, T, Hq + 2 * Hkv, D)
        self.q, self.k, self.v = qkv.split((Hq, Hkv, Hkv), dim=2)
        self.positions = torch.arange(T, device=x.device).expand(B, T)
        self.tables = {"cos": model.cos, "sin": model.sin}
        self.rq, self.rk = reference.rope(self.q, self.k, **self.tables, positions=self.positions)
        a = reference.attention(self.rq, self.rk, self.v, window=config.sliding_window)
        self.heads = a.reshape(B, T, Hq * D)
        self.a = F.linear(self.heads, layer.o_proj)
        self.h = reference.rms_norm(x + self.a, layer.post_attention_layernorm, config.rms_norm_eps).view(B * T, H)
        self.gate_logits = F.linear(self.h, layer.gate)
        self.weights, self.ids = reference.route(self.gate_logits, config.num_experts_per_tok)
        experts = reference.expert_swiglu(self.h, layer.gate_up_proj, layer.down_proj, self.ids, self.weights)
        self.output = x + self.a + experts.view_as(x)

    def calls(self) -> Iterator[tuple[str, str, Args]]:
        """(op, case, arguments), every operation of the registry at least once."""
        window, layer = self.config.sliding_window, self.layer
        yield "rms_norm", "input", norm_args(self.config, self.x, layer.input_layernorm)
        norm = norm_args(self.config, self.a, layer.post_attention_layernorm)
        yield "add_rms_norm", "with residual", norm | {"residual": self.x}
        rows = norm_args(self.config, self.x, layer.input_layernorm)
        rows["table"] = rows.pop("x").flatten(0, 1)  # the layer's input in the place of the embedding
        rows["input_ids"] = torch.arange(len(rows["table"]), device=self.x.device).view(self.positions.shape)
        yield "embed_rms_norm", "rows of the input", rows
        yield "rope", "all tokens", {"q": self.q, "k": self.k, **self.tables, "positions": self.positions}
        keys = {"k": self.rk, "v": self.v, "window": window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        yield from self._cached()
        yield "linear", "o, few tokens", {"x": self.heads[0, :FEW], "weight": layer.o_proj}
        yield "linear", "o, deterministic", {"x": self.heads, "weight": layer.o_proj, "deterministic": True}
        yield "route", "all tokens", {"logits": self.gate_logits, "top_k": self.ids.shape[1]}
        yield "gate_route", "all tokens", {"x": self.h, "gate": layer.gate, "top_k": self.ids.shape[1]}
        yield "sort_by_expert", "all tokens", {"ids": self.ids, "num_experts": len(layer.gate)}
        yield from self._experts()

    def _cached(self) -> Iterator[tuple[str, str, Args]]:
        """The ring, filled with the first half of the text: a chunk after it, and one token after it."""
        B, T = self.positions.shape
        past = torch.full((B,), T // 2, dtype=torch.int32, device=self.x.device)
        cache = KVCache(self.config, B, T, self.x.device, self.x.dtype)
        ring = {"k_cache": cache.keys[0], "v_cache": cache.values[0]}
        half = slice(0, T // 2)
        first = {"k": self.rk[:, half], "v": self.v[:, half], **ring, "past": past * 0, "new": past}
        yield "append", "first half", first
        kernel_reference.append(**first)
        rest = slice(T // 2, T)
        chunk = {"q": self.rq[:, rest], "k": self.rk[:, rest], "v": self.v[:, rest]}
        where = {"past": past, "window": self.config.sliding_window}
        yield "cached_attention", "chunk", {**chunk, **ring, **where, "new": T - past}
        one, new = slice(T // 2, T // 2 + 1), torch.ones_like(past)
        token = {"q": self.q[:, one], "k": self.k[:, one], "v": self.v[:, one]}
        yield "rope_append", "one token", {**token, **self.tables, **ring, "past": past, "new": new}
        kernel_reference.append(self.rk[:, one], self.v[:, one], **ring, past=past, new=new)
        yield "cached_attention", "one token", {"q": self.rq[:, one], "k": None, "v": None, **ring, **where, "new": new}

    def _experts(self) -> Iterator[tuple[str, str, Args]]:
        """The routing that happened, and one that takes every expert; few tokens (decode) and all (prefill)."""
        proj = {"gate_up_proj": self.layer.gate_up_proj, "down_proj": self.layer.down_proj}
        routed = {"x": self.h, **proj, "ids": self.ids, "weights": self.weights}
        yield "expert_swiglu", "as routed", routed
        norm = {"residual": (self.x + self.a).view_as(self.h), "norm_weight": self.layer.post_attention_layernorm}
        yield "experts_add_rms_norm", "as routed", routed | norm | {"eps": self.config.rms_norm_eps}
        N, K = self.ids.shape
        E = len(self.layer.gate)
        for case, rows in (("every expert, decode", DECODE_TOKENS), ("every expert, prefill", DECODE_TOKENS + 1)):
            rows = max(rows, -(-E // K)) if rows > DECODE_TOKENS else min(rows, max(16, -(-E // K)))
            take = torch.arange(rows, device=self.h.device)
            ids = ((take[:, None] * K + torch.arange(K, device=self.h.device)) % E).int()
            x, weights = self.h[take % N], self.weights[take % N]
            yield "expert_swiglu", case, {"x": x, **proj, "ids": ids, "weights": weights}


class Chain:
    """A text in plain torch, layer after layer: its residual stream x [B,T,H], and what is expected of each layer.

    before  the truth of x, fp64: the last layer's output, computed from plain torch's input of that layer
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.before = x, x.double()
        self.expected: list[Expected] = []

    def go(self, check: LayerCheck, logits: Tensor, output: Tensor) -> None:
        """On through the layer of `check`, whose gate logits and output in fp64 these are."""
        norm, eps = widen(check.layer.input_layernorm), check.config.rms_norm_eps
        normed = reference.rms_norm(self.before.to(check.x.device), norm, eps)
        self.expected.append(Expected.of(check, normed, logits, output))
        self.x, self.before = check.output, output


@dataclass
class Checked:
    """What became of a text [B,T] in all layers.

    rows   the operations, layer after layer
    chain  with the model's config, and `tried` with that which the shell is tried with
    wide   the last layer's output [B,T,H] by fp64 all the way, with plain torch's routes
    """

    chain: Chain
    tried: Chain
    wide: Tensor
    rows: list[Row] = field(default_factory=list)


def check_layers(
    make: Callable[[Any, Tensor, Any], LayerCheck],
    layers: Sequence[Any],
    x: Tensor,
    config: MixtralConfig,
    tried: MixtralConfig,
    said: Callable[[], None],
) -> Checked:
    """Every operation of every `make(layer, its input, a config)` measured; `said` is called after each layer."""
    chain = Chain(x)
    found = Checked(chain, chain if tried == config else Chain(x), x.double())
    for index, layer in enumerate(layers):
        check = make(layer, chain.x, config)
        for op, case, args in check.calls():
            found.rows.append(Row(index, op, case, *measure(op, args, check.plain.get(op))))
        B, ids = len(x), check.ids
        # The layer in fp64 on its input here, and on that of fp64 all the way: in one pass over its weights.
        inputs = torch.cat((check.x.double(), found.wide.to(check.x.device)))
        logits, output = wide_layer(check.layer, config, check.tables, inputs, ids.repeat(2, 1))
        chain.go(check, logits[:B], output[:B])
        found.wide = output[B:]
        if found.tried is not chain:
            other = make(layer, found.tried.x, tried)
            found.tried.go(other, *wide_layer(other.layer, tried, other.tables, other.x.double(), other.ids))
        said()
    return found
