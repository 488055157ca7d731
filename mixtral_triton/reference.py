"""The plain torch reference: every operation (from kernels/reference.py), a block, and the forward without a cache."""

from collections import namedtuple
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels.ops.experts import activations as activations  # whose formulas the reference takes by name
from .kernels.reference import attention, expert_swiglu, linear, rms_norm, rope, route
from .kernels.reference import sort_by_expert as sort_by_expert
from .kernels.weights.fp8 import with_fp8_activations
from .kernels.weights.quantized_cache import as_stored

Attend = Callable[..., Tensor]  # q, k, v, not rotated, and the norms of heads in `rope`, if any -> [B,T,Hq,D]


# A block's intermediate values for B sequences of T tokens, N = B T rows:
# x, normed, attn_output, output  [B,T,H]: the residual stream, its norm, the output of attention, the stream after it
# y                               [B,T,H]: the experts' output
# q, k, v, heads                  [B,T,heads,D], not rotated, without the norm of each head; and [B,T,Hq D]
# h, logits, weights, ids         [N,H] input of the experts; [N,E] logits; [N,K] routing weights and expert ids
Values = namedtuple("Values", "x normed q k v heads attn_output h logits weights ids y output")


def block(
    layer: Any,
    config: Any,
    x: Tensor,
    attend: Attend,
    ids: Tensor | None = None,
    convert: Callable[[Any], Any] = lambda weight: weight,
) -> Values:
    """Compute one block on x [B,T,H] (Jiang et al. 2024): attention, then experts, each after a norm and added to x.

    ids [N,K] replaces the router's choice. `convert` applies to each weight: for arithmetic in another dtype.
    """
    B, T, H = x.shape
    Hq, Hkv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    normed = rms_norm(x, convert(layer.input_layernorm), config.rms_norm_eps)
    q, k, v = linear(normed, convert(layer.qkv_proj)).split((Hq * D, Hkv * D, Hkv * D), dim=2)
    if config.family.norms == "row":  # a launch of its own, which rounds; a norm of each head rounds with the rotation
        q, k = (
            rms_norm(x, convert(weight), config.rms_norm_eps) for x, weight in ((q, layer.q_norm), (k, layer.k_norm))
        )
    q, k, v = (x.unflatten(2, (-1, D)) for x in (q, k, v))
    heads = attend(q, k, v, *head_norms(layer, config, convert)).reshape(B, T, Hq * D)
    attn_output = linear(heads, convert(layer.o_proj))
    h = rms_norm(x + attn_output, convert(layer.post_attention_layernorm), config.rms_norm_eps).view(B * T, H)
    logits = linear(h, convert(layer.gate))
    if ids is None:
        weights, ids = route(logits, config.num_experts_per_tok, config.renormalize)
    elif config.renormalize:
        weights = logits.gather(1, ids.long()).softmax(-1)
    else:
        weights = logits.softmax(-1).gather(1, ids.long())
    y = expert_swiglu(h, convert(layer.gate_up_proj), convert(layer.down_proj), ids, weights).view_as(x)
    return Values(x, normed, q, k, v, heads, attn_output, h, logits, weights, ids, y, x + attn_output + y)


def head_norms(layer: Any, config: Any, convert: Callable[[Any], Any] = lambda weight: weight) -> tuple[Any, ...]:
    """Return the norms of each head of q and k, and their eps, as `rope` takes them; () where there are none."""
    if config.family.norms != "head":
        return ()
    return convert(layer.q_norm), convert(layer.k_norm), config.rms_norm_eps


def uncached_attention(window: int | None, cos: Tensor, sin: Tensor, quantized: bool = False) -> Attend:
    """Return attention without a cache: token t is at position t. quantized: as over a cache of 8 bits."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *norms: Any) -> Tensor:
        positions = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
        q, k = rope(q, k, cos, sin, positions, *norms)
        return attention(q, *map(as_stored, (k, v)) if quantized else (k, v), window=window)

    return attend


def forward(model: Any, input_ids: Tensor) -> Tensor:
    """Run a whole `Mixtral` on input_ids [B,T] -> logits fp32 [B,T,V] (transformers' MixtralForCausalLM)."""
    x, attend = model.embed_tokens[input_ids], uncached_attention(model.config.sliding_window, model.cos, model.sin)
    convert = with_fp8_activations if model.quantizes_activations(input_ids.numel()) else lambda weight: weight
    for layer in model.layers:
        x = block(layer, model.config, x, attend, convert=convert).output
    return linear(rms_norm(x, model.norm, model.config.rms_norm_eps), model.lm_head).float()
