"""verify for a model of transformers: its own modules are the reference, on the user's own weights.

B batch, T tokens, H hidden, Hq query heads, Hkv key/value heads, D head size
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding

from .. import hf, reference
from ..config import SIZES, MixtralConfig
from ..hf.release import cache_keyword
from ..reference import Values
from ..tools.tolerance import measure, to_fp64
from .fp64 import Expected, Fp64Reference
from .layers import LayerCheck, check_layers
from .model import UNCACHED, ExpectedRoutes, LayerProbe, cuts, forwards
from .report import Report, Row
from .verdict import END_RATIO, Progress, Steps, by_layer, end_row, finish, text_or_default


def verify_hf(model: Any, input_ids: Tensor | None, progress: Progress) -> Report:
    """`verify` for a Mixtral of transformers, which is left as it was: applied or not."""
    theirs = hf.mixtral_modules("verify", model)
    backbone = next(module for module in model.modules() if isinstance(module, theirs.MixtralModel))
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("verify: some weights are not in memory (offloaded); load the model without offloading")
    table, layers, norm = backbone.embed_tokens.weight, backbone.layers, backbone.norm
    ids = text_or_default(input_ids, model.config, table.device)
    steps = Steps(len(layers) * (1 + forwards(ids.shape[1])), progress)
    config = _config(layers[0].self_attn.config, layers[0].self_attn.head_dim)
    with torch.no_grad():
        make = partial(_check, theirs, backbone)
        found = check_layers(make, layers, embedding(ids, table), config, config, steps.one_more)
        chain = found.chain
        with _running_applied(model):
            watch = _watched(theirs, backbone, ids, chain.expected, steps.one_more)
            hidden, flips = _end_to_end(theirs, backbone, ids, chain.expected)
        args = {"x": chain.x, "weight": norm.weight, "eps": norm.variance_epsilon}
        plain = partial(_norm, theirs, norm)
        rows = by_layer(found.rows, watch.rows())
        rows.append(Row(None, "rms_norm", "final", *measure("rms_norm", args, plain)))
        name, head = ("logits", model.lm_head) if hasattr(model, "lm_head") else ("hidden", torch.nn.Identity())
        wide = reference.rms_norm(found.wide, to_fp64(norm.weight), norm.variance_epsilon)
        wide = wide @ to_fp64(head.weight).T if name == "logits" else wide
        rows.append(
            end_row(name, "end to end", head(hidden), Fp64Reference.beside(wide, head(plain(**args)), END_RATIO))
        )
    return finish(rows, flips, table.device, table.dtype, len(layers) * ids.numel(), "transformers' own modules")


@contextmanager
def _running_applied(model: Any) -> Iterator[None]:
    """Within the block the model is applied."""
    was_applied = hf.applied(model)
    if not was_applied:
        hf.apply(model)
    try:
        yield
    finally:
        if not was_applied:
            hf.revert(model)


@contextmanager
def routed(theirs: Any, backbone: Any, routes: ExpectedRoutes) -> Iterator[None]:
    """Within the block the gates' choices are overruled."""

    def overruled(gate: Any, args: Any, out: Any) -> Any:
        return out[0], *routes.overrule(out[1], out[2])

    gates = [module for module in backbone.modules() if isinstance(module, theirs.MixtralTopKRouter)]
    hooks = [gate.register_forward_hook(overruled) for gate in gates]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _watched(
    theirs: Any, backbone: Any, ids: Tensor, expected: Sequence[Expected], said: Callable[[], None]
) -> LayerProbe:
    """The layers' own forward on ids [B,T]: without a cache, and over transformers' cache."""
    from transformers import DynamicCache

    watch = LayerProbe(expected, said)
    hooks = []
    for index, layer in enumerate(backbone.layers):
        hooks.append(layer.register_forward_pre_hook(partial(_enter, watch, index), with_kwargs=True))
        hooks.append(layer.register_forward_hook(partial(_leave, watch, index)))
    try:
        with routed(theirs, backbone, watch.routes):
            T = ids.shape[1]
            watch.start(UNCACHED, torch.arange(T), T)
            backbone(ids, use_cache=False)
            cache = DynamicCache(config=backbone.config)
            for case, first, count, _ in cuts(T):
                at = torch.arange(first, first + count)
                watch.start(case, at, count)
                backbone(ids[:, at], use_cache=True, **{cache_keyword(): cache})
    finally:
        for hook in hooks:
            hook.remove()
    return watch


def _enter(watch: LayerProbe, index: int, layer: Any, args: Any, kwargs: Any) -> Any:
    return (watch.enter(index, args[0]), *args[1:]), kwargs


def _leave(watch: LayerProbe, index: int, layer: Any, args: Any, out: Tensor) -> Tensor:
    return watch.leave(index, out)


def _end_to_end(theirs: Any, backbone: Any, ids: Tensor, expected: Sequence[Expected]) -> tuple[Tensor, int]:
    """The backbone's own forward with plain torch's routes -> [B,T,H], tokens that it would route elsewhere."""
    routes = ExpectedRoutes.of_whole(expected, ids.shape[1])
    with routed(theirs, backbone, routes):
        return backbone(ids, use_cache=False).last_hidden_state, routes.flips


def transformers_logits(folder: Any, model: Any, ids: Tensor, expected: Sequence[Expected]) -> Tensor:
    """The logits [B,T,V] of transformers' own model, loaded from the folder, with the routes that are expected."""
    from transformers import MixtralForCausalLM
    from transformers.models.mixtral import modeling_mixtral

    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = MixtralForCausalLM.from_pretrained(folder, dtype=model.dtype, **eager).eval().to(model.device)
    routes = ExpectedRoutes.of_whole(expected, ids.shape[1])
    with routed(modeling_mixtral, loaded.model, routes):
        return loaded(ids).logits


def _norm(theirs: Any, module: Any, x: Tensor, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """transformers' norm, which has its own weight and eps: those of the operation's call are the same."""
    return theirs.MixtralRMSNorm.forward(module, x)


def _config(config: Any, head_dim: int) -> MixtralConfig:
    sizes = {name: getattr(config, name) for name in SIZES}
    theta = config.rope_parameters["rope_theta"]
    window = getattr(config, "sliding_window", None)
    return MixtralConfig(**sizes, head_dim=head_dim, rope_theta=theta, sliding_window=window)


class Eager:
    """One decoder layer of transformers, by the functions of transformers' own classes, applied or not."""

    def __init__(self, theirs: Any, backbone: Any, block: Any, positions: Tensor, x: Tensor) -> None:
        self.theirs, self.attn, self.moe = theirs, block.self_attn, block.mlp
        self.norms = block.input_layernorm, block.post_attention_layernorm
        rotary = partial(theirs.MixtralRotaryEmbedding.forward, backbone.rotary_emb, position_ids=positions)
        self.angles = rotary(x)
        self.tables = [part[0, :, : self.attn.head_dim // 2].contiguous() for part in rotary(x.float())]

    def values(self, x: Tensor, window: int | None) -> Values:
        """What the layer computes on x [B,T,H]."""
        B, T, H = x.shape
        attn = self.attn
        normed = _norm(self.theirs, self.norms[0], x)
        q, k, v = (project(normed).view(B, T, -1, attn.head_dim) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
        heads = self.attention(*self.rope(q, k), v, window).reshape(B, T, -1)
        attended = attn.o_proj(heads)
        h = _norm(self.theirs, self.norms[1], x + attended).view(B * T, H)
        logits, weights, ids = self.gate(h)
        output = x + attended + self.experts(h, None, None, ids, weights).view_as(x)
        return Values(x, normed, q, k, v, heads, attended, h, logits, weights, ids, output)

    def instead(self, h: Tensor) -> dict[str, Callable[..., Any]]:
        """What stands in the place of the operations' references; `h`: what the experts read."""
        return {
            "rms_norm": partial(_norm, self.theirs, self.norms[0]),
            "add_rms_norm": self.add_norm,
            "rope": self.rope,
            "attention": self.attention,
            "route": lambda logits, top_k: self.gate(h)[1:],
            "gate_route": self.gate,
            "rms_norm_gate_route": self.norm_gate,
            "expert_swiglu": self.experts,
            "experts_add_rms_norm": self.experts_norm,
        }

    def weights(self) -> Any:
        """By the names of this package's `Layer`."""
        attn, moe = self.attn, self.moe
        return SimpleNamespace(
            input_layernorm=self.norms[0].weight,
            qkv_proj=torch.cat([project.weight for project in (attn.q_proj, attn.k_proj, attn.v_proj)]),
            o_proj=attn.o_proj.weight,
            post_attention_layernorm=self.norms[1].weight,
            gate=moe.gate.weight,
            gate_up_proj=moe.experts.gate_up_proj,
            down_proj=moe.experts.down_proj,
        )

    def add_norm(self, x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = residual + x
        return _norm(self.theirs, self.norms[1], total), total

    def norm_gate(self, gate: Tensor, top_k: int, **norm: Any) -> tuple[Tensor, ...]:
        y, total = self.add_norm(**norm)
        return y, total, *self.gate(y)

    def rope(self, q: Tensor, k: Tensor, **tables: Tensor) -> tuple[Tensor, Tensor]:
        q, k = self.theirs.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *self.angles)
        return q.transpose(1, 2), k.transpose(1, 2)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
        S, T = k.shape[1], q.shape[1]
        i, j = torch.arange(S - T, S, device=q.device)[:, None], torch.arange(S, device=q.device)
        hidden = (j > i) | (j <= i - (window or S))
        mask = torch.zeros(T, S, dtype=q.dtype, device=q.device).masked_fill_(hidden, torch.finfo(q.dtype).min)
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return self.theirs.eager_attention_forward(self.attn, *heads, mask, self.attn.scaling)[0]

    def gate(self, x: Tensor, **same: Any) -> tuple[Tensor, Tensor, Tensor]:
        logits, weights, ids = self.theirs.MixtralTopKRouter.forward(self.moe.gate, x)
        return logits, weights, ids.int()

    def experts(self, x: Tensor, gate_up_proj: Any, down_proj: Any, ids: Tensor, weights: Tensor) -> Tensor:
        """transformers' loop over the experts, which the implementations stand in for."""
        eager = inspect.unwrap(self.theirs.MixtralExperts.forward)
        return eager(self.moe.experts, x, ids.long(), weights)

    def experts_norm(
        self, residual: Tensor, norm_weight: Tensor, eps: float, **experts: Tensor
    ) -> tuple[Tensor, Tensor]:
        return self.add_norm(self.experts(**experts), residual, norm_weight, eps)


def _check(theirs: Any, backbone: Any, block: Any, x: Tensor, config: MixtralConfig) -> LayerCheck:
    """The check of one decoder layer on x [B,T,H]."""
    x = x.to(block.input_layernorm.weight.device)
    eager = Eager(theirs, backbone, block, torch.arange(x.shape[1], device=x.device)[None], x)
    values = eager.values(x, config.sliding_window)
    tables = dict(zip(("cos", "sin"), eager.tables, strict=True))
    return LayerCheck(values, eager.weights(), config, tables, eager.instead(values.h))
