"""What `apply` puts in the place of transformers' blocks: subclasses that keep parameters, names, hooks and signatures.

Only `hf.apply` imports this file: transformers is an optional dependency.

B batch, T tokens, H hidden, Hq query heads, Hkv key/value heads, D head size, S keys
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral import modeling_mixtral as theirs

from . import ops
from .hf_mask import interval_bounds

NAME = "mixtral_triton"  # in transformers' registries of attention, masks and experts


def _ops() -> Any:
    """The operations, without their checks where nothing watches and every dtype is the weights' own."""
    watched = not ops.untraced() or torch.is_grad_enabled() or torch.is_autocast_enabled()
    return ops if watched else ops.DIRECT


class RMSNorm(theirs.MixtralRMSNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        return _ops().rms_norm(hidden_states, self.weight, self.variance_epsilon)


class Router(theirs.MixtralTopKRouter):
    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = hidden_states.reshape(-1, self.hidden_dim)
        logits, weights, ids = _ops().gate_route(rows, self.weight, self.top_k)
        return logits, weights, ids.long()  # int64, as whoever hooks the gate expects


class Rotary(theirs.MixtralRotaryEmbedding):
    """Whatever kind of rotary embedding the config asks for, in the form that `ops.rope` reads."""

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> cos and sin fp32 [P, D/2], a row for each token of `position_ids`, and the rows' numbers [B, T]."""
        cos, sin = super().forward(x.new_empty(0, dtype=torch.float32), position_ids)  # of x it takes the dtype only
        rows, half = position_ids.numel(), cos.shape[-1] // 2
        numbers = torch.arange(rows, device=cos.device).view(position_ids.shape)
        numbers = numbers.expand(x.shape[0], position_ids.shape[1])
        return cos[..., :half].reshape(rows, half), sin[..., :half].reshape(rows, half), numbers


class Attention(theirs.MixtralAttention):
    """transformers' attention with `ops.rope`, on the tables of `Rotary`."""

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,  # the cache's name before 5.24
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        cache = past_key_values if cache is None else cache
        tokens = hidden_states.shape[:-1]
        shape = (*tokens, -1, self.head_dim)
        q, k = self.q_proj(hidden_states).view(shape), self.k_proj(hidden_states).view(shape)
        q, k = _ops().rope(q, k, *position_embeddings)
        q, k = q.transpose(1, 2), k.transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, kwargs=kwargs)
        config = self.config
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, theirs.eager_attention_forward)
        window = getattr(config, "sliding_window", None)
        settings = {"scaling": self.scaling, "dropout": 0.0, "sliding_window": window}
        out, weights = attend(self, q, k, v, attention_mask, **settings, **kwargs)
        return self.o_proj(out.reshape(*tokens, -1)), weights


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What `AttentionInterface` calls: query [B,Hq,T,D], key and value [B,Hkv,S,D] -> [B,T,Hq,D], no weights.

    The mask is one of `hf_mask.interval_mask`: packed sequences, which no cache holds, go one after the other, a dense
    one to torch's attention. Or it is the user's own 4-D one.
    """
    kind = attention_mask.dtype if isinstance(attention_mask, Tensor) else None
    if attention_mask is None or (kind == torch.int32 and attention_mask.shape[-1] == 2):
        starts, lengths = interval_bounds(attention_mask)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        return _ops().attention(q, k, v, sliding_window, True, scaling, starts, lengths), None
    if kind == torch.int64 and attention_mask.dim() == 1:
        B, H, T, D = query.shape
        rows = [x.transpose(1, 2).flatten(0, 1)[None] for x in (query, key, value)]
        sequences = [slice(begin, end) for begin, end in pairwise(attention_mask.tolist())]
        outs = [_ops().attention(*(x[:, one] for x in rows), sliding_window, True, scaling) for one in sequences]
        return torch.cat(outs, dim=1).view(B, T, H, D), None
    mask = _dense(attention_mask, query, key)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=0.0, scaling=scaling)


def _dense(mask: Any, query: Tensor, key: Tensor) -> Tensor:
    """The user's own mask, if it is one that torch's attention takes."""
    B, H, T, _ = query.shape
    need = (B, H, T, key.shape[2])
    good = isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[3] == need[3]
    good = good and all(size in (1, whole) for size, whole in zip(mask.shape, need, strict=True))
    if not good or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
        tensor = isinstance(mask, Tensor)
        got = f"{mask.dtype} of shape {list(mask.shape)}" if tensor else f"a {type(mask).__name__}"
        raise ValueError(
            f"mixtral_triton: attention_mask is {got}, needs bool (True: seen) or float (added to the scores) that "
            f"broadcasts to {list(need)}, or one value a token [{B}, tokens]"
        )
    return mask if mask.dtype == torch.bool else mask.to(query.dtype)


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `ExpertsInterface` calls: hidden_states [T,H], top_k_index and top_k_weights [T,K] -> [T,H]."""
    args = (module.gate_up_proj, module.down_proj, top_k_index, top_k_weights.float())
    return _ops().expert_swiglu(hidden_states, *args)


def before_forward(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the backbone: refuses what could not be honoured, before anything runs."""
    names = ("input_ids", "attention_mask", "position_ids", "cache", "inputs_embeds")
    given = dict(zip(names, args, strict=False)) | kwargs
    if model.training:
        raise ValueError("mixtral_triton.apply is for inference only: call model.eval(), or revert(model) to train")
    wanted = given.get("output_attentions")
    wanted = getattr(model.config, "output_attentions", False) if wanted is None else wanted
    if wanted and model.config._attn_implementation == NAME:
        raise ValueError("output_attentions: fused attention keeps no weights; apply(model, attention=False) does")
    mask, cache = given.get("attention_mask"), given.get("cache", given.get("past_key_values"))
    if isinstance(mask, Tensor) and mask.dim() == 2 and cache is None:
        text = given.get("input_ids")
        need = (given["inputs_embeds"] if text is None else text).shape[:2]
        if mask.shape != need:
            raise ValueError(
                f"mixtral_triton: attention_mask is of shape {list(mask.shape)}, needs {list(need)}, one value a token"
            )
