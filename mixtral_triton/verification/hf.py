"""verify for a transformers model: transformers' own modules are the reference, on the user's own weights.

B batch, T tokens, H hidden, Hq query heads, Hkv key/value heads, D head size
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import hf, reference
from ..config import SIZES, MixtralConfig
from ..hf.release import cache_keyword
from .layers import UNCACHED, LayerCheck, LayerProbe, Target, split_text


class TransformersTarget(Target):
    """A transformers Mixtral, applied or not, which is left as it was. Torch's computation is that of its classes."""

    peer = "transformers' own modules"

    def __init__(self, model: Any) -> None:
        self.theirs = hf.mixtral_modules("verify", model)
        self.backbone = next(module for module in model.modules() if isinstance(module, self.theirs.MixtralModel))
        if any(parameter.is_meta for parameter in model.parameters()):
            raise ValueError("verify: some weights are not in memory (offloaded); load the model without offloading")
        self.model, self.layers = model, self.backbone.layers
        self.embed_tokens, self.norm = self.backbone.embed_tokens.weight, self.backbone.norm.weight
        self.lm_head = model.lm_head.weight if hasattr(model, "lm_head") else None
        self.output = "hidden" if self.lm_head is None else "logits"
        attn = self.layers[0].self_attn
        config = attn.config
        self.config = MixtralConfig(
            **{name: getattr(config, name) for name in SIZES},
            head_dim=attn.head_dim,
            rms_norm_eps=self.backbone.norm.variance_epsilon,
            rope_theta=config.rope_parameters["rope_theta"],
            sliding_window=getattr(config, "sliding_window", None),
        )

    def check(self, block: Any, x: Tensor, config: MixtralConfig) -> LayerCheck:
        """What transformers' eager functions compute in a decoder layer on x [B,T,H]."""
        theirs, attn, moe, (B, T, H) = self.theirs, block.self_attn, block.mlp, x.shape
        x = x.to(block.input_layernorm.weight.device)
        positions, norm = torch.arange(T, device=x.device), theirs.MixtralRMSNorm.forward
        rotary = partial(theirs.MixtralRotaryEmbedding.forward, self.backbone.rotary_emb, position_ids=positions[None])
        normed = norm(block.input_layernorm, x)
        projections = attn.q_proj, attn.k_proj, attn.v_proj
        q, k, v = (project(normed).view(B, T, -1, attn.head_dim) for project in projections)
        rq, rk = theirs.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary(x))
        hidden = (positions > positions[:, None]) | (positions <= positions[:, None] - (config.sliding_window or T))
        mask = torch.zeros(T, T, dtype=x.dtype, device=x.device).masked_fill_(hidden, torch.finfo(x.dtype).min)
        heads = theirs.eager_attention_forward(attn, rq, rk, v.transpose(1, 2), mask, attn.scaling)[0].reshape(B, T, -1)
        attended = attn.o_proj(heads)
        h = norm(block.post_attention_layernorm, x + attended).view(B * T, H)
        logits, weights, ids = theirs.MixtralTopKRouter.forward(moe.gate, h)
        loop_over_experts = inspect.unwrap(theirs.MixtralExperts.forward)  # without the dispatch to implementations
        y = loop_over_experts(moe.experts, h, ids, weights).view_as(x)
        output = x + attended + y
        values = reference.Values(x, normed, q, k, v, heads, attended, h, logits, weights, ids.int(), output)
        layer = SimpleNamespace(
            input_layernorm=block.input_layernorm.weight,
            qkv_proj=torch.cat([project.weight for project in projections]),
            o_proj=attn.o_proj.weight,
            post_attention_layernorm=block.post_attention_layernorm.weight,
            gate=moe.gate.weight,
            gate_up_proj=moe.experts.gate_up_proj,
            down_proj=moe.experts.down_proj,
        )
        tables = (part[0, :, : attn.head_dim // 2].contiguous() for part in rotary(x.float()))
        return LayerCheck(values, layer, config, dict(zip(("cos", "sin"), tables, strict=True)))

    def probe_config(self, tokens: int) -> MixtralConfig:
        return self.config

    def probe(self, config: MixtralConfig, ids: Tensor, probe: LayerProbe) -> None:
        """The layers' own forwards on ids [B,T] in the applied model, without a cache and over transformers' cache."""
        from transformers import DynamicCache

        T = ids.shape[1]
        with self._applied(probe, probe_layers=True):
            probe.start(UNCACHED, torch.arange(T), T)
            self.backbone(ids, use_cache=False)
            cache = DynamicCache(config=self.backbone.config)
            for case, first, count, _ in split_text(T):
                tokens = torch.arange(first, first + count)
                probe.start(case, tokens, count)
                self.backbone(ids[:, tokens], use_cache=True, **{cache_keyword(): cache})

    def end_to_end(self, ids: Tensor, probe: LayerProbe) -> Tensor:
        """The applied model's forward with transformers' routes -> logits [B,T,V], or hidden states [B,T,H]."""
        probe.start("end to end", torch.arange(ids.shape[1]), ids.shape[1])
        with self._applied(probe):
            hidden: Tensor = self.backbone(ids, use_cache=False).last_hidden_state
            return hidden if self.lm_head is None else self.model.lm_head(hidden)

    def head(self, convert: Callable[[Any], Any] = lambda weight: weight, lm_head: Any = None) -> Any:
        if self.lm_head is not None:
            return super().head(convert)
        norm = convert(self.norm)
        return lambda x: reference.rms_norm(x, norm, self.config.rms_norm_eps)

    @contextmanager
    def _applied(self, probe: LayerProbe, probe_layers: bool = False) -> Iterator[None]:
        """Within the block the model is applied, and `probe` replaces its routes, and the layers' inputs."""

        def enter(index: int, layer: Any, args: Any, kwargs: Any) -> Any:
            return (probe.enter(index, args[0]), *args[1:]), kwargs

        def leave(index: int, layer: Any, args: Any, out: Tensor) -> Tensor:
            return probe.leave(index, out)

        with ExitStack() as stack:
            if not hf.applied(self.model):
                hf.apply(self.model)
                stack.callback(hf.revert, self.model)
            stack.enter_context(replaced_routes(self.theirs, self.backbone, probe))
            for index, layer in enumerate(self.layers if probe_layers else ()):
                stack.enter_context(layer.register_forward_pre_hook(partial(enter, index), with_kwargs=True))
                stack.enter_context(layer.register_forward_hook(partial(leave, index)))
            yield


@contextmanager
def replaced_routes(theirs: Any, backbone: Any, probe: LayerProbe) -> Iterator[None]:
    """Within the block `probe` replaces the routes of transformers' gates."""

    def replace(gate: Any, args: Any, out: Any) -> Any:
        return out[0], *probe.replace_routes(out[1], out[2])

    with ExitStack() as stack:
        for module in backbone.modules():
            if isinstance(module, theirs.MixtralTopKRouter):
                stack.enter_context(module.register_forward_hook(replace))
        yield


def transformers_logits(folder: Any, model: Any, ids: Tensor, probe: LayerProbe) -> Tensor:
    """The logits [B,T,V] of transformers' model of the folder, with the routes that `probe` expects."""
    from transformers import MixtralForCausalLM
    from transformers.models.mixtral import modeling_mixtral

    eager: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    loaded = MixtralForCausalLM.from_pretrained(folder, dtype=model.dtype, **eager).eval().to(model.device)
    probe.start("end to end", torch.arange(ids.shape[1]), ids.shape[1])
    with replaced_routes(modeling_mixtral, loaded.model, probe):
        return loaded(ids).logits
