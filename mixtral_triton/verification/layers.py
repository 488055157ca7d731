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
from torch import Tensor

from .. import ops, reference
from ..cache import KVCache
from ..config import MixtralConfig
from ..kernels import reference as kernel_reference
from ..kernels.experts.tiles import DECODE_TOKENS
from ..kernels.linear import SKINNY_M
from ..model import Layer
from ..reference import Values
from ..tools.tolerance import Args, Tolerance, to_fp64
from .fp64 import Expected, wide_block, with_perturbed_input
from .report import Row


def norm_args(config: Any, x: Tensor, weight: Tensor) -> Args:
    return {"x": x, "weight": weight, "eps": config.rms_norm_eps}


class LayerCheck:
    """The calls in a block that the runtime has to equal, on what plain torch computes in it.

    layer, tables  its weights by the names of `Layer`; cos and sin fp32
    plain          what sets an operation's limit, where that is not its reference
    """

    def __init__(
        self,
        values: Values,
        layer: Any,
        config: Any,
        tables: dict[str, Tensor],
        plain: Mapping[str, Callable[..., Any]] | None = None,
    ) -> None:
        self.values, self.layer, self.config, self.tables, self.plain = values, layer, config, tables, plain or {}
        self.routes: Callable[[Tensor], Tensor] = lambda ids: ids  # as this layer's experts are counted
        B, T, _ = values.x.shape
        self.positions = torch.arange(T, device=values.x.device).expand(B, T)
        rotate = self.plain.get("rope", reference.rope)
        self.rq, self.rk = rotate(values.q, values.k, **tables, positions=self.positions)

    @classmethod
    def of_model(cls, model: Any, layer: Layer, x: Tensor, config: MixtralConfig) -> LayerCheck:
        attend = reference.uncached_attention(config.sliding_window, model.cos, model.sin)
        return cls(reference.block(layer, config, x, attend), layer, config, {"cos": model.cos, "sin": model.sin})

    def calls(self) -> Iterator[tuple[str, str, Args]]:
        """(op, case, arguments), every operation of the registry at least once."""
        window, layer, values = self.config.sliding_window, self.layer, self.values
        yield "rms_norm", "input", norm_args(self.config, values.x, layer.input_layernorm)
        norm = norm_args(self.config, values.attended, layer.post_attention_layernorm)
        yield "add_rms_norm", "with residual", norm | {"residual": values.x}
        gate = {"gate": layer.gate, "top_k": values.ids.shape[1]}
        total = {key: value.flatten(0, 1) for key, value in (("x", norm["x"]), ("residual", values.x))}
        yield "rms_norm_gate_route", "all tokens", {**norm, **total, **gate}
        rows = norm_args(self.config, values.x, layer.input_layernorm)
        rows["table"] = rows.pop("x").flatten(0, 1)  # the layer's input in the place of the embedding
        rows["input_ids"] = torch.arange(len(rows["table"]), device=values.x.device).view(self.positions.shape)
        yield "embed_rms_norm", "rows of the input", rows
        yield "rope", "all tokens", {"q": values.q, "k": values.k, **self.tables, "positions": self.positions}
        keys = {"k": self.rk, "v": values.v, "window": window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        yield from self._cached()
        yield "linear", "o, few tokens", {"x": values.heads[0, :SKINNY_M], "weight": layer.o_proj}
        yield "linear", "o, deterministic", {"x": values.heads, "weight": layer.o_proj, "deterministic": True}
        yield "route", "all tokens", {"logits": values.logits, "top_k": values.ids.shape[1]}
        yield "gate_route", "all tokens", {"x": values.h, **gate}
        yield "sort_by_expert", "all tokens", {"ids": values.ids, "num_experts": len(layer.gate)}
        yield from self._experts()

    def _cached(self) -> Iterator[tuple[str, str, Args]]:
        """The ring, filled with the first half of the text: a chunk after it, and one token after it."""
        values, (B, T) = self.values, self.positions.shape
        past = torch.full((B,), T // 2, dtype=torch.int32, device=values.x.device)
        cache = KVCache(self.config, B, T, values.x.device, values.x.dtype)
        ring = {"k_cache": cache.keys[0], "v_cache": cache.values[0]}
        half = slice(0, T // 2)
        first = {"k": self.rk[:, half], "v": values.v[:, half], **ring, "past": past * 0, "new": past}
        yield "append", "first half", first
        kernel_reference.append(**first)
        rest = slice(T // 2, T)
        chunk = {"q": self.rq[:, rest], "k": self.rk[:, rest], "v": values.v[:, rest]}
        where = {"past": past, "window": self.config.sliding_window}
        yield "cached_attention", "chunk", {**chunk, **ring, **where, "new": T - past}
        one, new = slice(T // 2, T // 2 + 1), torch.ones_like(past)
        token = {"q": values.q[:, one], "k": values.k[:, one], "v": values.v[:, one]}
        yield "rope_append_attention", "one token", {**token, **self.tables, **ring, **where, "new": new}
        kernel_reference.append(self.rk[:, one], values.v[:, one], **ring, past=past, new=new)
        yield "cached_attention", "one token", {"q": self.rq[:, one], "k": None, "v": None, **ring, **where, "new": new}

    def _experts(self) -> Iterator[tuple[str, str, Args]]:
        """The routing that happened, and one that takes every expert; few tokens (decode) and all (prefill)."""
        values = self.values
        proj = {"gate_up_proj": self.layer.gate_up_proj, "down_proj": self.layer.down_proj}
        routed = {"x": values.h, **proj, "ids": self.routes(values.ids), "weights": values.weights}
        yield "expert_swiglu", "as routed", routed
        norm = {"norm_weight": self.layer.post_attention_layernorm}
        norm["residual"] = (values.x + values.attended).view_as(values.h)
        yield "experts_add_rms_norm", "as routed", routed | norm | {"eps": self.config.rms_norm_eps}
        N, K = values.ids.shape
        E = len(self.layer.gate)
        for case, rows in (("every expert, decode", DECODE_TOKENS), ("every expert, prefill", DECODE_TOKENS + 1)):
            rows = max(rows, -(-E // K)) if rows > DECODE_TOKENS else min(rows, max(16, -(-E // K)))
            take = torch.arange(rows, device=values.h.device)
            ids = ((take[:, None] * K + torch.arange(K, device=values.h.device)) % E).int()
            x, weights = values.h[take % N], values.weights[take % N]
            yield "expert_swiglu", case, {"x": x, **proj, "ids": self.routes(ids), "weights": weights}

    def reached(self, name: str, args: Args) -> Callable[..., Any]:
        """The runtime's operation `name` as it is called."""
        return ops.dispatched(name, args)


class Chain:
    """A text in plain torch, layer after layer: its residual stream x [B,T,H], and what is expected of each layer.

    before  the truth of x, fp64 [2B,T,H]: the last layer's output, of plain torch's input of that layer `with_perturbed_input`
    """

    def __init__(self, x: Tensor) -> None:
        self.x, self.before = x, x.double().repeat(2, 1, 1)
        self.expected: list[Expected] = []

    def go(self, check: LayerCheck, logits: Tensor, output: Tensor) -> None:
        """On through the layer of `check`, whose gate logits and output in fp64 these are."""
        norm, eps = to_fp64(check.layer.input_layernorm), check.config.rms_norm_eps
        normed = reference.rms_norm(self.before.to(check.values.x.device), norm, eps)
        self.expected.append(Expected.of(check.values, normed, logits, output))
        self.x, self.before = check.values.output, output


@dataclass
class Checked:
    """What became of a text [B,T] in all layers.

    rows   the operations, layer after layer
    chain  with the model's config, and `tried` with that which the shell is tried with
    wide   the last layer's output [2B,T,H] by fp64 all the way from the text `with_perturbed_input`, with plain torch's routes
    """

    chain: Chain
    with_small_window: Chain
    wide: Tensor
    rows: list[Row] = field(default_factory=list)


def check_layers(
    make: Callable[[Any, Tensor, Any], LayerCheck],
    layers: Sequence[Any],
    x: Tensor,
    config: MixtralConfig,
    with_small_window: MixtralConfig,
    said: Callable[[], None],
) -> Checked:
    """Every operation of every `make(layer, its input, a config)` measured; `said` is called after each layer."""
    chain = Chain(x)
    found = Checked(chain, chain if with_small_window == config else Chain(x), with_perturbed_input(x))
    for index, layer in enumerate(layers):
        check = make(layer, chain.x, config)
        for op, case, args in check.calls():
            yardstick = Tolerance(op, args, check.plain.get(op))
            found.rows.append(Row(index, op, case, *yardstick.measure(check.reached(op, args))))
        both, values = 2 * len(x), check.values
        # The layer in fp64 on its input here, and on that of fp64 all the way: in one pass over its weights.
        inputs = torch.cat((with_perturbed_input(values.x), found.wide.to(values.x.device)))
        logits, output = wide_block(check.layer, config, check.tables, inputs, values.ids.repeat(4, 1))
        chain.go(check, logits[:both], output[:both])
        found.wide = output[both:]
        if found.with_small_window is not chain:
            other = make(layer, found.with_small_window.x, with_small_window)
            own = with_perturbed_input(other.values.x), other.values.ids.repeat(2, 1)
            found.with_small_window.go(other, *wide_block(other.layer, with_small_window, other.tables, *own))
        said()
    return found
