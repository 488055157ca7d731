"""The other target of verify: a transformers model, whose own modules are the reference."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..checkpoint.config import SIZES, MixtralConfig
from .layers import CHUNKS, PADDING, TOKENS, UNCACHED, ForwardCall, LayerCheck, LayerProbe, ModelUnderTest

STATIC = "left padding, static cache"
MIN_TOKENS = 24  # of a text whose rounding errors set a limit for attention and experts alone


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Take a model's modules out of training mode, and afterwards back."""
    trains = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in trains:
            module.training = True


class TransformersUnderTest(ModelUnderTest):
    """A transformers Mixtral, applied or not, which is left as it was. Its own forward is that of `apply`."""

    peer, is_mixtral = "transformers' own modules", False

    def __init__(self, model: Any) -> None:
        from transformers.models.mixtral import modeling_mixtral

        from ..hf import applied, check_mixtral

        check_mixtral("verify", model)
        self.modeling = modeling_mixtral
        self.backbone: Any = next(
            module for module in model.modules() if isinstance(module, self.modeling.MixtralModel)
        )
        self.trains = model.training
        if self.trains and not applied(model):
            raise ValueError("verify: the model is in training mode, needs inference, model.eval(), or apply(model)")
        self.model, self.layers = model, self.backbone.layers
        wrapped = {type(part).__name__ for layer in self.layers for part in (layer.mlp.experts, layer.mlp.gate)}
        if "ParamWrapper" in wrapped:  # the adapted parameters exist only during its forward
            raise ValueError("verify: model has PEFT's target_parameters, needs them merged: model.merge_and_unload()")
        self.embed_tokens, self.norm = self.backbone.embed_tokens.weight, self.backbone.norm.weight
        self.lm_head = model.lm_head.weight if hasattr(model, "lm_head") else None
        self.model_head = getattr(model, "lm_head", nn.Identity())
        self.output = "hidden" if self.lm_head is None else "logits"
        attn, eps = self.layers[0].self_attn, self.backbone.norm.variance_epsilon
        config = {name: getattr(attn.config, name) for name in SIZES} | {"head_dim": attn.head_dim, "rms_norm_eps": eps}
        config["rope_theta"] = attn.config.rope_parameters["rope_theta"]
        self.config = MixtralConfig(**config, sliding_window=getattr(attn.config, "sliding_window", None))

    def first_layer_in_fp32(self) -> ModelUnderTest:
        """The model with its first layer alone, in fp32, which shows what 16 bits hide: a call hands all the same."""
        backbone = copy.copy(self.backbone)
        backbone._modules = {**backbone._modules, "layers": nn.ModuleList(self.layers[:1])}
        return TransformersUnderTest(copy.deepcopy(backbone).float())

    def check(self, block: Any, x: Tensor, config: MixtralConfig) -> LayerCheck:
        """Compute a decoder layer with transformers' eager functions on x [B,T,H]."""
        modeling, attn, moe, (B, T, H) = self.modeling, block.self_attn, block.mlp, x.shape
        x = x.to(block.input_layernorm.weight.device)
        positions, norm = torch.arange(T, device=x.device), modeling.MixtralRMSNorm.forward
        rotary = partial(
            modeling.MixtralRotaryEmbedding.forward, self.backbone.rotary_emb, position_ids=positions[None]
        )
        normed, projections = norm(block.input_layernorm, x), (attn.q_proj, attn.k_proj, attn.v_proj)
        q, k, v = (project(normed).view(B, T, -1, attn.head_dim) for project in projections)
        rq, rk = modeling.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), *rotary(x))
        hidden = (positions > positions[:, None]) | (positions <= positions[:, None] - (config.sliding_window or T))
        mask = torch.zeros(T, T, dtype=x.dtype, device=x.device).masked_fill_(hidden, torch.finfo(x.dtype).min)
        heads = modeling.eager_attention_forward(attn, rq, rk, v.transpose(1, 2), mask, attn.scaling)[0].flatten(2)
        attn_output = attn.o_proj(heads)
        h = norm(block.post_attention_layernorm, x + attn_output).view(B * T, H)
        logits, weights, ids = modeling.MixtralTopKRouter.forward(moe.gate, h)
        loop_over_experts = inspect.unwrap(modeling.MixtralExperts.forward)  # without the dispatch to implementations
        y = loop_over_experts(moe.experts, h, ids, weights).view_as(x)
        output = x + attn_output + y
        values = reference.Values(x, normed, q, k, v, heads, attn_output, h, logits, weights, ids.int(), y, output)
        norms = {name: getattr(block, name).weight for name in ("input_layernorm", "post_attention_layernorm")}
        experts = {name: getattr(moe.experts, name) for name in ("gate_up_proj", "down_proj")}
        qkv_proj = torch.cat([project.weight for project in projections])
        layer = SimpleNamespace(**norms, qkv_proj=qkv_proj, o_proj=attn.o_proj.weight, gate=moe.gate.weight, **experts)
        cos, sin = (part[0, :, : attn.head_dim // 2].contiguous() for part in rotary(x.float()))
        return LayerCheck(values, layer, config, {"cos": cos, "sin": sin})

    def logits(self, ids: Tensor, probe: LayerProbe) -> Tensor:
        with self.forward(self.config, probe) as forward:
            return self.model_head(forward(ids))  # type: ignore[no-any-return]

    def forward_calls(self, config: Any, B: int, T: int) -> Iterator[ForwardCall]:
        """The forwards that read a text [B,T], whole, two sequences packed in one row, and in chunks over a dynamic
        cache; and two rows of it, the second shorter and padded on the left, whole and in chunks over a static cache:
        the masks are those that the user's version of transformers makes."""
        from transformers import DynamicCache, StaticCache

        text, both = torch.arange(T).expand(B, T), torch.arange(2 * T)[None]
        yield UNCACHED, text, text >= 0, None, {}
        yield "packed", both, both >= 0, None, {"position_ids": both % T}
        tokens = torch.arange(T) - torch.tensor([[0], [min(PADDING, T - 1)]])
        valid, tokens = tokens >= 0, tokens.clamp(min=0)
        yield "left padding", tokens, valid, None, {"attention_mask": valid.long(), "position_ids": tokens}
        dynamic = DynamicCache(config=self.backbone.config)
        static = StaticCache(config=self.backbone.config, max_cache_len=T + PADDING)
        for begin, end in pairwise(sorted({0, T // 2, T - 1, T})):
            part, case = slice(begin, end), CHUNKS if end < T else TOKENS
            yield case, text[:, part], text[:, part] >= 0, dynamic, {}
            read = {"attention_mask": valid[:, :end].long(), "position_ids": tokens[:, part]}
            yield STATIC, tokens[:, part], valid[:, part], static, read

    @contextmanager
    def forward(self, config: Any, probe: LayerProbe, probe_layers: bool = False) -> Iterator[Callable[..., Tensor]]:
        from .. import hf
        from ..hf.attention import CACHE
        from .families import short_windows

        def enter(index: int, layer: Any, args: Any) -> Any:
            return probe.enter(index, args[0]), *args[1:]

        def leave(index: int, layer: Any, args: Any, out: Tensor) -> Tensor:
            return probe.leave(index, out)

        def record(index: int, name: str, module: Any, args: Any, out: Any) -> None:
            probe.record(index, name, out[0] if isinstance(out, tuple) else out)

        def route(gate: Any, args: Any, out: Any) -> Any:
            return out[0], *probe.replace_routes(*out[1:])

        def forward(ids: Tensor, cache: Any = None, **kwargs: Any) -> Tensor:
            return self.backbone(ids, use_cache=cache is not None, **{CACHE: cache}, **kwargs).last_hidden_state

        with ExitStack() as stack:
            if not hf.applied(self.model):
                hf.apply(self.model)
                stack.callback(hf.revert, self.model)
            if config.sliding_window is not None:
                stack.enter_context(short_windows(self.model, config.sliding_window))
            for index, layer in enumerate(self.layers):
                stack.enter_context(layer.mlp.gate.register_forward_hook(route))
                if not probe_layers:
                    continue
                stack.enter_context(layer.register_forward_pre_hook(partial(enter, index)))
                stack.enter_context(layer.register_forward_hook(partial(leave, index)))
                enough = probe.layers[index].x[..., 0].numel() >= MIN_TOKENS
                for name, module in (("attn_output", layer.self_attn), ("y", layer.mlp)) if enough else ():
                    stack.enter_context(module.register_forward_hook(partial(record, index, name)))
            yield forward
