"""A decoder block of Mixtral (Jiang et al. 2024), and what all blocks of a forward share. `ops` do the work.

B batch, T tokens, N = B T rows, H hidden, I intermediate, E experts, K experts a token, Hq query heads,
Hkv key/value heads, D head size, C ring slots
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..checkpoint.config import MixtralConfig
from ..kernels.weights.fp8 import with_fp8_activations
from ..quantize import QuantizedWeight
from .cache import KVCache, Slots
from .parallel import Ranks

LayerCache = tuple[Slots, Slots]  # a layer's cached keys and values, [B, Hkv, C, D] each
WeightTensor = Tensor | QuantizedWeight  # dense or quantized; experts may lie in host memory (OffloadedWeight)


class Layer(nn.Module):
    """A decoder block: attention and sparse experts. Each output is added to the residual stream by the next norm."""

    input_layernorm: Tensor  # [H]
    q_norm: Tensor  # [D] of each head, or [Hq D] of all heads, in families with norms of queries and keys
    k_norm: Tensor
    qkv_proj: WeightTensor  # [(Hq + 2 Hkv) D, H]
    o_proj: WeightTensor  # [H, Hq D]
    post_attention_layernorm: Tensor  # [H]
    gate: Tensor  # [E, H]
    gate_up_proj: WeightTensor  # [E, 2I, H]
    down_proj: WeightTensor  # [E, H, I]

    def __init__(self, config: MixtralConfig, weights: dict[str, Any]) -> None:
        super().__init__()
        self.config, self.norms = config, config.family.norms
        for name, weight in weights.items():
            setattr(self, name, weight)

    def forward(
        self, h: Tensor, x: Tensor, next_norm: Tensor, kv_cache: LayerCache | None, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """h [B,T,H], the norm of the residual stream x [B,T,H] -> the same two for the next layer.

        next_norm  [H] weight of the next layer's norm, which the experts' combine applies
        kv_cache   the layer's keys and values
        """
        attn_output = self.attention(h, kv_cache, context).flatten(0, 1)
        h, x, routing_weights, ids = self.route(attn_output, x.flatten(0, 1), context)
        h, x = self.experts(h, x, routing_weights, ids, next_norm, context)
        return h.view(context.shape), x.view(context.shape)

    def attention(self, h: Tensor, kv_cache: LayerCache | None, context: ForwardContext) -> Tensor:
        """h [B,T,H] -> the attention block's output [B,T,H]."""
        B, T, _ = h.shape
        Hq, Hkv, D = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        qkv_proj, o_proj = self.qkv_proj, self.o_proj
        if context.quantizes:
            qkv_proj, o_proj = map(with_fp8_activations, (qkv_proj, o_proj))
        qkv = ops.linear.unchecked(h, qkv_proj, deterministic=context.deterministic)
        norms: tuple[Any, ...] = ()
        if self.norms == "row":
            eps, (q, k, v) = self.config.rms_norm_eps, qkv.split_with_sizes((Hq * D, Hkv * D, Hkv * D), dim=2)
            rows = ops.rms_norm.unchecked(q, self.q_norm, eps), ops.rms_norm.unchecked(k, self.k_norm, eps), v
            q, k, v = (x.unflatten(2, (-1, D)) for x in rows)
        else:
            q, k, v = qkv.view(B, T, Hq + 2 * Hkv, D).split_with_sizes((Hq, Hkv, Hkv), dim=2)
            if self.norms == "head":
                norms = self.q_norm, self.k_norm, self.config.rms_norm_eps
        heads = context.attend(q, k, v, kv_cache, norms).reshape(B, T, Hq * D)
        return context.all_reduce(ops.linear.unchecked(heads, o_proj, deterministic=context.deterministic))

    def route(self, attn_output: Tensor, x: Tensor, context: ForwardContext) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """attn_output and x [N,H] -> the norm h of their sum, the sum, routing weights and expert ids [N,K]."""
        h, x, _, routing_weights, ids = ops.rms_norm_gate_route.unchecked(
            attn_output,
            residual=x,
            weight=self.post_attention_layernorm,
            eps=self.config.rms_norm_eps,
            gate=self.gate,
            top_k=self.config.num_experts_per_tok,
            deterministic=context.deterministic,
            renormalize=self.config.renormalize,
        )
        return h, x, routing_weights, ids

    def experts(
        self, h: Tensor, x: Tensor, routing_weights: Tensor, ids: Tensor, next_norm: Tensor, context: ForwardContext
    ) -> tuple[Tensor, Tensor]:
        """h and the residual stream x [N,H], routes [N,K] -> the next layer's h, and x with the experts' output."""
        eps, proj, deterministic = self.config.rms_norm_eps, (self.gate_up_proj, self.down_proj), context.deterministic
        if context.quantizes:
            gate_up_proj, down_proj = map(with_fp8_activations, proj)
            proj = gate_up_proj, down_proj
        if context.ranks is not None:  # the all-reduce comes between the experts and the norm: they cannot fuse
            ids = context.ranks.local_ids(ids, len(self.down_proj))
            part = ops.expert_swiglu.unchecked(h, *proj, ids, routing_weights, deterministic=deterministic)
            return ops.rms_norm.unchecked(context.all_reduce(part), next_norm, eps, residual=x)
        return ops.experts_add_rms_norm.unchecked(
            h, *proj, ids, routing_weights, residual=x, norm_weight=next_norm, eps=eps, deterministic=deterministic
        )


class ForwardContext:
    """What all layers of one forward share: positions, lengths, rotary tables, the window and the mesh.

    cache_lengths  int [B]: tokens of each sequence in the cache before this forward; zeros without a cache
    num_new        int32 [B]: tokens of each sequence that this forward appends
    positions      int [B,T] of the tokens; padding beyond the rotary tables is clamped, since it must be defined
    decodes        one token a sequence takes the path of a decode step
    quantizes      products of fp8 weights with one scale a row quantize their activations
    """

    def __init__(
        self,
        config: MixtralConfig,
        tables: tuple[Tensor, Tensor],
        shape: tuple[int, int],
        ranks: Ranks | None,
        deterministic: bool,
        quantizes: bool,
        cache: KVCache | None,
        num_new: Tensor | None,
    ) -> None:
        self.window, self.deterministic, self.quantizes = config.sliding_window, deterministic, quantizes
        (self.cos, self.sin), (B, T), self.ranks, self.cache = tables, shape, ranks, cache
        self.shape, device = (B, T, config.hidden_size), self.cos.device
        # A decode step's bits may depend on the rest of the batch; those of a chunk in deterministic mode do not.
        self.decodes = cache is not None and T == 1 and not deterministic
        self.num_new = torch.full((B,), T, dtype=torch.int32, device=device) if num_new is None else num_new
        if cache is None:
            self.positions = torch.arange(T, device=device).expand(B, T)
            self.cache_lengths = torch.zeros_like(self.num_new)
        else:
            self.cache_lengths = cache.lengths
            self.positions = self.cache_lengths[:, None]
            if self.decodes:  # here, and not in each layer: what it overwrites is out of the window
                self.note_append()
            else:
                t = torch.arange(T, device=device)
                self.positions = (self.positions + t).clamp_(max=len(self.cos) - 1)

    def all_reduce(self, part: Tensor) -> Tensor:
        """Sum a rank's part over the mesh."""
        return part if self.ranks is None else self.ranks.all_reduce(part, in_order=self.deterministic)

    def note_append(self) -> None:
        """Tell the cache that its slots are about to be written."""
        if self.cache is not None and not torch.compiler.is_compiling():
            self.cache.appending = self.num_new

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, kv_cache: LayerCache | None, norms: tuple[Any, ...] = ()
    ) -> Tensor:
        """q [B,T,Hq,D], k and v [B,T,Hkv,D], not yet rotated, nor normed by `norms` (those of heads, and eps)
        -> [B,T,Hq,D]."""
        if kv_cache is None:
            q, k = ops.rope.unchecked(q, k, self.cos, self.sin, self.positions, *norms)
            return ops.attention.unchecked(q, k, v, window=self.window, deterministic=self.deterministic)
        k_cache, v_cache = kv_cache
        lengths = self.cache_lengths, self.num_new
        if self.decodes:  # the new key takes the slot of the one that just left the window
            return ops.rope_append_attention.unchecked(
                q, k, v, self.cos, self.sin, k_cache, v_cache, *lengths, self.window, False, *norms
            )
        q, k = ops.rope.unchecked(q, k, self.cos, self.sin, self.positions, *norms)
        out = ops.cached_attention.unchecked(
            q, k, v, k_cache, v_cache, *lengths, window=self.window, deterministic=self.deterministic
        )
        self.note_append()
        ops.append.unchecked(k, v, k_cache, v_cache, *lengths)  # last: the chunk's first queries need the old keys
        return out
