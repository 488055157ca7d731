"""Plain torch: every operation (written out in kernels/reference.py), and the whole forward without a cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .kernels.reference import attention, expert_swiglu, rms_norm, rope, route, sort_by_expert

__all__ = ["attention", "expert_swiglu", "forward", "rms_norm", "rope", "route", "sort_by_expert"]


def forward(model: Any, input_ids: Tensor) -> Tensor:
    """All of a `Mixtral` on input_ids [B,T] -> logits fp32 [B,T,V] (Jiang et al. 2024; HF's MixtralForCausalLM)."""
    config = model.config
    B, T = input_ids.shape
    Hq, Hkv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    positions = torch.arange(T, device=input_ids.device).expand(B, T)
    x = model.embed_tokens[input_ids]
    for layer in model.layers:
        h = rms_norm(x, layer.input_layernorm, config.rms_norm_eps)
        q, k, v = F.linear(h, layer.qkv_proj).view(B, T, Hq + 2 * Hkv, D).split((Hq, Hkv, Hkv), dim=2)
        q, k = rope(q, k, model.cos, model.sin, positions)
        a = attention(q, k, v, window=config.sliding_window)
        x = x + F.linear(a.reshape(B, T, Hq * D), layer.o_proj)
        h = rms_norm(x, layer.post_attention_layernorm, config.rms_norm_eps).view(B * T, -1)
        weights, ids = route(F.linear(h, layer.gate), config.num_experts_per_tok)
        x = x + expert_swiglu(h, layer.gate_up_proj, layer.down_proj, ids, weights).view_as(x)
    return F.linear(rms_norm(x, model.norm, config.rms_norm_eps), model.lm_head).float()
