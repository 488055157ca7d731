"""The whole decode step as an operation, so that it goes the same way through the benchmark: one token for B sequences
of S positions each, the new one included, through L layers and the head of a model with random weights.

Its peers run the same weights on copies of the same cache. Letters as in `kernels.reference`; V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache import KVCache
from ...config import MixtralConfig
from ...generate import can_capture
from ...graph import captured
from ...kernels import reference
from ...kernels.op import Cost, Op, Sizes
from ...kernels.registry import OPS
from ...model import Mixtral
from ...parallel import Ranks
from ...reference import block

Args = dict[str, Any]
STEPS_MOST = 4096  # positions beyond S that a benchmark's repeated steps may reach
NEAR = 0.05  # of the norm of a row of logits: how far it may be from plain torch in the same dtype


def config(sizes: Sizes) -> MixtralConfig:
    return MixtralConfig(
        vocab_size=sizes["V"],
        hidden_size=sizes["H"],
        intermediate_size=sizes["I"],
        num_hidden_layers=sizes["L"],
        num_attention_heads=sizes["Hq"],
        num_key_value_heads=sizes["Hkv"],
        head_dim=sizes["D"],
        num_local_experts=sizes["E"],
        num_experts_per_tok=sizes["K"],
        rope_theta=1e6,
        max_position_embeddings=sizes["S"] + STEPS_MOST,
    )


def inputs(sizes: Sizes, dtype: torch.dtype, device: Any, generator: Any = None, ranks: Ranks | None = None) -> Args:
    """The model, or the part of it of one of `ranks`; a cache that holds S - 1 positions; the next tokens [B,1].

    A layer's experts hold the same values, each in memory of its own: a near tie in a 16-bit router, which sends a row
    to another expert, and rightly, then changes no logits.
    """
    model = Mixtral(config(sizes), device, dtype, ranks=ranks)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.fill_(1.0)
        else:
            weight.normal_(std=1.0 if name == "embed_tokens" else weight.shape[-1] ** -0.5, generator=generator)
        if weight.dim() == 3:
            weight[1:] = weight[:1]
    cache = KVCache(model.config, sizes["B"], sizes["S"], device, dtype)
    cache.max_len = model.config.max_position_embeddings  # repeated steps turn round in the ring
    for kept in (*cache.keys, *cache.values):
        kept.normal_(generator=generator)
    rewind(cache)
    return {"model": model, "cache": cache, "token": torch.arange(sizes["B"], device=device)[:, None] % sizes["V"]}


def rewind(cache: KVCache) -> None:
    """All slots but the last are held. Steps beyond the last slot turn round in the ring: S positions stay held."""
    cache.lengths.fill_(cache.slots - 1)


def decode_step(model: Mixtral, cache: KVCache, token: Tensor) -> Tensor:
    """-> logits fp32 [B,V]."""
    return model.head(model.hidden(token, cache)[:, 0])


def replayed_step(args: Args) -> Callable[..., Tensor]:
    """It as a decode loop runs it: in a CUDA graph on a GPU, where each call overwrites the logits of the last."""
    once = partial(decode_step, **args)
    if not can_capture(args["model"]):
        return lambda **_: once()
    once()  # every kernel is compiled before the capture
    logits: list[Tensor] = []
    replay = captured(lambda: logits.append(once()), None, args["model"].device)

    def run(**_: Any) -> Tensor:
        replay()
        return logits[0]

    return run


def plain_step(model: Mixtral, cache: KVCache, token: Tensor) -> Tensor:
    """`decode_step` in plain torch."""
    past, new = cache.lengths, torch.ones_like(cache.lengths)
    x = F.embedding(token, model.embed_tokens)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        attend = partial(_attend, model, keys, values, past, new)
        x = block(layer, model.config, x, attend).output
    cache.advance(new, 1)
    return model.head(reference.rms_norm(x, model.norm, model.config.rms_norm_eps)[:, 0])


def _attend(
    model: Mixtral, keys: Tensor, values: Tensor, past: Tensor, new: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> Tensor:
    """Attention of one token a sequence, over the layer's ring."""
    where = keys, values, past, new, model.config.sliding_window
    return reference.rope_append_attention(q, k, v, model.cos, model.sin, *where)


def fault(function: Callable[..., Any], args: Args) -> str | None:
    """What is wrong with the logits of `function`'s first step, beside plain torch in the same dtype."""
    cache = args["cache"]
    rewind(cache)
    want = plain_step(**args)
    rewind(cache)
    got = function(**args)
    rewind(cache)
    if got.shape != want.shape:
        return f"wrong: logits of shape {list(got.shape)}, where {list(want.shape)} would be right"
    far = ((got - want).norm(dim=-1) / want.norm(dim=-1)).nan_to_num(nan=float("inf")) > NEAR
    if not far.any():
        return None
    return (
        f"wrong: {int(far.sum())} of {len(far)} rows of logits are farther than {NEAR} of their norm from plain torch"
    )


def theirs(model: Mixtral) -> Any:
    """transformers' model on the very weights of ours."""
    from transformers import MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    own = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("num_key_value_heads", "head_dim", "num_local_experts", "num_experts_per_tok", "max_position_embeddings")
    rope = {"rope_type": "default", "rope_theta": own.rope_theta}
    sized = {name: getattr(own, name) for name in (*names, *more)}
    settings = MixtralConfig(**sized, rms_norm_eps=own.rms_norm_eps, rope_parameters=rope, sliding_window=None)
    with torch.device("meta"):
        hf = MixtralForCausalLM(settings)
    Hq, Hkv, D = own.num_attention_heads, own.num_key_value_heads, own.head_dim
    weights = {"model.embed_tokens.weight": model.embed_tokens, "model.norm.weight": model.norm}
    weights["lm_head.weight"] = model.lm_head
    for index, layer in enumerate(model.layers):
        q, k, v = layer.qkv_proj.split((Hq * D, Hkv * D, Hkv * D))
        kept = {"self_attn.q_proj.weight": q, "self_attn.k_proj.weight": k, "self_attn.v_proj.weight": v}
        kept |= {"self_attn.o_proj.weight": layer.o_proj, "mlp.gate.weight": layer.gate}
        kept |= {f"mlp.experts.{name}": getattr(layer, name) for name in ("gate_up_proj", "down_proj")}
        norms = ("input_layernorm", "post_attention_layernorm")
        kept |= {f"{name}.weight": getattr(layer, name) for name in norms}
        weights |= {f"model.layers.{index}.{name}": weight for name, weight in kept.items()}
    hf.load_state_dict(weights, assign=True)
    hf.model.rotary_emb = MixtralRotaryEmbedding(settings).to(model.device)
    return hf.eval()


def _hf(args: Args, kept: Callable[[Any], Any], compile: bool) -> Callable[..., Any]:
    """A step of transformers' model on a copy of our cache, in `kept`, its own. Experts run as they do by default."""
    from ...hf.mask import CACHE

    cache, hf = args["cache"], theirs(args["model"])
    held = kept(hf.config)
    for index, layer in enumerate(zip(cache.keys, cache.values, strict=True)):
        held.update(*(x[:, :, : cache.slots - 1].clone() for x in layer), index)
    forward = torch.compile(hf.forward, mode="reduce-overhead") if compile else hf.forward
    return lambda token, **_: forward(token, use_cache=True, **{CACHE: held}).logits[:, -1].float()


def hf_eager(op: Op, args: Args) -> Callable[..., Any]:
    """transformers as it is, its cache growing."""
    from transformers import DynamicCache

    return _hf(args, lambda config: DynamicCache(), compile=False)


def hf_static(op: Op, args: Args) -> Callable[..., Any]:
    """transformers with a static cache and a compiled forward, in CUDA graphs."""
    from transformers import StaticCache

    return _hf(args, lambda config: StaticCache(config, args["cache"].slots + STEPS_MOST), compile=True)


def expected_distinct_experts(args: Args) -> float:
    """Distinct experts a layer that the next step's tokens choose, on average over the layers."""
    from ..trace import RouteRecorder

    rewind(args["cache"])
    with RouteRecorder() as routes:
        decode_step(**args)
    rewind(args["cache"])
    return sum(len(ids.unique()) for ids in routes.ids) / len(routes.ids)


def cost(sizes: Sizes, dtype: torch.dtype) -> Cost:
    """Every weight that the step needs once, and of each layer the cache and the chosen experts. Activations between
    the operations are a small part and no floor: fused further, they would not leave the chip."""
    B, H, E, D, L, V = (sizes[letter] for letter in "BHEDLV")
    heads = sizes["Hq"], sizes["Hkv"]
    rows = 2 * (heads[0] + heads[1]) * D + E  # of q, k, v, o and the gate, each H long
    attention = OPS["cached_attention"].cost({**sizes, "T": 1, "past": sizes["S"] - 1, "window": 0}, dtype)
    experts = OPS["expert_swiglu"].cost({**sizes, "T": B}, dtype)
    layer = (rows * H + 2 * H) * dtype.itemsize + attention.bytes + experts.bytes
    head = (V * H + H + B * H) * dtype.itemsize + 4 * B * V
    flops = L * (2 * B * rows * H + attention.flops + experts.flops) + 2 * B * V * H
    return Cost(flops=flops, bytes=L * layer + head)


STEP = Op(
    run=decode_step,
    reference=plain_step,
    inputs=inputs,
    configs=lambda sizes, dtype, arch: {},
    cost=cost,
    test_shapes=({"B": 3, "S": 12, "L": 2, "H": 64, "I": 96, "E": 4, "K": 2, "Hq": 4, "Hkv": 2, "D": 16, "V": 100},),
    bench_shapes=tuple(
        {"B": B, "S": S, "L": L, "H": 4096, "I": 14336, "E": 8, "K": 2, "Hq": 32, "Hkv": 8, "D": 128, "V": 32000}
        # Two depths of one step tell what a layer takes.
        for B, S, L in ((1, 1024, 1), *((B, S, 4) for B in (1, 8, 32) for S in (1024, 4096, 32768)))
    ),
    dtypes=(torch.bfloat16, torch.float16, torch.float32),
)
