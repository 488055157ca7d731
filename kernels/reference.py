"""Each operation in plain torch, short enough to check by eye against the papers. Read this file first.

B batch, T query tokens (or rows), S key positions, H hidden, I intermediate, E experts, K experts per token,
Hq query heads, Hkv key/value heads, D head size, P rows of the rotary tables, C slots of the ring cache
"""

import math
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """Widen to fp32, the papers' precision; fp64 stays."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None, offset: float = 0.0) -> Any:
    """Root mean square norm (Zhang & Sennrich 2019, eq. 4), after adding `residual` where there is one.

    x [..., H], weight [H] -> y, or (y, x + residual). Computed in fp32, cast to x's dtype, then times weight; with an
    offset (Gemma) times offset + weight in fp32, then cast.
    """
    values = _wide(total := x if residual is None else x + residual)
    normed = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + eps)
    y = ((offset + _wide(weight)) * normed).to(x.dtype) if offset else weight * normed.to(x.dtype)
    return y if residual is None else (y, total)


def embed_rms_norm(input_ids: Tensor, table: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Rows x [B,T,H] of the embedding table [V,H] for input_ids [B,T], and their norm y -> y, x."""
    x = F.embedding(input_ids, table)
    return rms_norm(x, weight, eps), x


def linear(x: Tensor, weight: Any) -> Tensor:
    """x [..., H], weight [N, H] -> [..., N].

    A quantized weight is dequantized and rounded to x's dtype. A CPU without kernels may multiply by the codes instead
    (`QuantizedWeight.product`); 16 bits then have one more rounding.
    """
    return F.linear(x, weight) if isinstance(weight, Tensor) else weight.product(x)


def route(
    logits: Tensor, top_k: int, renormalize: bool = True, scoring: str = "softmax", bias: Tensor | None = None,
    groups: tuple[int, int] | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Mixtral's gate, Softmax(TopK(logits)) (Jiang et al. 2024, section 2.1): weights fp32 [T,K], ids int32 [T,K].

    The softmax over the top k equals the softmax over all, renormalized; without `renormalize` it is the latter (OLMoE,
    Muennighoff et al. 2024, section 2). Larger first, ties to the lower index. "sigmoid" scores, a bias [E] that
    selects and does not weigh, the k best of n groups=(n, k) and a scale: DeepSeek-V3 (2024, section 2.1.2).
    """
    if not 1 <= top_k <= logits.shape[-1]:  # a slice would be shorter
        raise ValueError(f"route: argument 'top_k' is {top_k}, needs an integer in 1..{logits.shape[-1]}")
    values = _ordered(_wide(logits))
    if scoring == "softmax" and bias is None and groups is None:
        values, ids = values.sort(dim=-1, descending=True, stable=True)
        values = values[:, :top_k] if renormalize else values
        return _softmax(values)[:, :top_k] * scale, ids[:, :top_k].int()
    scores = values.sigmoid() if scoring == "sigmoid" else _softmax(values)
    choice = scores if bias is None else _ordered(scores + bias)
    if groups is not None:
        best = choice.unflatten(-1, (groups[0], -1)).topk(2).values.sum(-1).sort(dim=-1, descending=True, stable=True)
        outside = torch.ones_like(best.values, dtype=torch.bool).scatter(-1, best.indices[:, : groups[1]], False)
        choice = choice.masked_fill(outside.repeat_interleave(choice.shape[-1] // groups[0], dim=-1), -math.inf)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, ids)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-20) if renormalize else weights
    return weights * scale, ids.int()


def _ordered(values: Tensor) -> Tensor:
    """NaN as -inf, and one zero: -0.0 + 0.0 is 0.0."""
    return (values + 0.0).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _softmax(values: Tensor) -> Tensor:
    """An infinite maximum has no softmax (inf - inf is NaN): the experts that share it share the weight."""
    return (values - values.amax(-1, keepdim=True)).nan_to_num(nan=0.0, neginf=-math.inf).softmax(-1)


def gate_route(
    x: Tensor, gate: Tensor, top_k: int, renormalize: bool = True, scoring: str = "softmax", bias: Tensor | None = None,
    groups: tuple[int, int] | None = None, scale: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x [T,H], gate [E,H] -> logits [T,E] in x's dtype, and their `route`: weights fp32 [T,K], ids int32 [T,K]."""
    logits = linear(x, gate)
    return logits, *route(logits, top_k, renormalize, scoring, bias, groups, scale)


def rms_norm_gate_route(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, gate: Tensor, top_k: int, renormalize: bool = True
) -> tuple[Tensor, ...]:
    """Norm y of x + residual [T,H], and `gate_route` of y -> y, sum, logits, weights, ids."""
    y, total = rms_norm(x, weight, eps, residual)
    return y, total, *gate_route(y, gate, top_k, renormalize)


def sort_by_expert(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Stable counting sort. ids [T,K] -> order int32 [T*K] (flat slots t*K + k, expert by expert), offsets int32 [E+1].

    Expert e's slots are order[offsets[e] : offsets[e + 1]]; ids out of range come last.
    """
    flat = ids.flatten().long()
    flat = torch.where((flat < 0) | (flat > num_experts), num_experts, flat)
    counts = torch.bincount(flat, minlength=num_experts + 1)[:num_experts]
    return flat.argsort(stable=True).int(), F.pad(counts.cumsum(0), (1, 0)).int()


ACTIVATIONS: dict[str, Any] = {}  # by name: ops/experts/activations.py has an entry each, with the kernel


def activate(gate: Tensor, up: Tensor, activation: str, derivatives: bool = False) -> Any:
    """Return the activation of a name and its numbers, or its derivatives in gate and in up."""
    name, *numbers = activation.split(":")
    entry = ACTIVATIONS[name]
    return (entry.slopes if derivatives else entry.formula)(gate, up, *map(float, numbers))


def expert_swiglu(
    x: Tensor, gate_up_proj: Any, down_proj: Any, ids: Tensor, weights: Tensor, activation: str = "silu"
) -> Tensor:
    """Sum weight * down(silu(gate(x)) * up(x)) over a token's experts (Shazeer 2020; Mixtral, section 2.1).

    x [T,H], gate_up_proj [E,2I,H] (gate rows, then up rows), down_proj [E,H,I], ids [T,K], weights [T,K] (fp32 or x's
    dtype) -> [T,H]. Either projection may be quantized (`linear`). An expert out of range contributes nothing.
    activation: a name and its numbers, as in ops/experts/activations.py.
    """
    if x.is_meta:  # routes have no values there
        return torch.empty_like(x)
    if len(x) == 1:  # one token needs no sort
        routes = [(e, w) for e, w in zip(ids[0].tolist(), weights[0].tolist(), strict=True) if 0 <= e < len(down_proj)]
        parts = [_wide(_expert(x, gate_up_proj[e], down_proj[e], activation)) * weight for e, weight in routes]
        return sum(parts[1:], parts[0]).to(x.dtype) if parts else torch.zeros_like(x)
    order, offsets = sort_by_expert(ids, len(down_proj))
    bounds = offsets.tolist()
    order = order[: bounds[-1]]
    token = order // ids.shape[1]
    rows = x.index_select(0, token)
    parts = [rows[:0]]
    for expert, (begin, end) in enumerate(pairwise(bounds)):
        if begin < end:
            parts.append(_expert(rows[begin:end], gate_up_proj[expert], down_proj[expert], activation))
    scaled = torch.cat(parts) * _wide(weights).flatten().index_select(0, order)[:, None]
    return torch.zeros_like(_wide(x)).index_add_(0, token, scaled.to(_wide(x).dtype)).to(x.dtype)


def _expert(x: Tensor, gate_up: Any, down: Any, activation: str) -> Tensor:
    """down(silu(gate(x)) * up(x)) of one expert, or another activation."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    h = F.silu(gate) * up if activation == "silu" else activate(gate, up, activation)
    return linear(h, down)


def expert_swiglu_backward(
    grad: Tensor, x: Tensor, gate_up_proj: Any, down_proj: Any, ids: Tensor, weights: Tensor, activation: str = "silu"
) -> tuple[Tensor, Tensor]:
    """Gradients of `expert_swiglu` in x [T,H] and in weights [T,K] (fp32), given that of its result, grad [T,H].

    A quantized projection is dequantized and rounded to x's dtype. An expert out of range contributes nothing.
    """
    weights = _wide(weights)
    if x.is_meta:  # routes have no values there
        return torch.empty_like(x), torch.empty_like(weights)
    order, offsets = sort_by_expert(ids, len(down_proj))
    grad_x, grad_weights = torch.zeros_like(_wide(x)), torch.zeros_like(weights).flatten()
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if begin < end:
            slots = order[begin:end].long()
            token = slots // ids.shape[1]
            gate_up, down = (_dequantized(weight[expert], x.dtype) for weight in (gate_up_proj, down_proj))
            gate, up = _wide(F.linear(x[token], gate_up)).chunk(2, dim=-1)
            grad_h = _wide(grad[token] @ down)  # for a routing weight of 1
            grad_weights[slots] = (grad_h * activate(gate, up, activation)).sum(-1)
            both = torch.cat([grad_h * part for part in activate(gate, up, activation, True)], dim=-1).to(x.dtype)
            grad_x.index_add_(0, token, _wide(both @ gate_up) * weights.flatten()[slots, None])
    return grad_x.to(x.dtype), grad_weights.view_as(weights)


def _dequantized(x: Any, dtype: torch.dtype) -> Tensor:
    return x if isinstance(x, Tensor) else x.dequantize().to(dtype)


def experts_add_rms_norm(
    x: Tensor, gate_up_proj: Any, down_proj: Any, ids: Tensor, weights: Tensor, residual: Tensor, norm_weight: Tensor,
    eps: float, activation: str = "silu",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Norm y of residual [T,H] + `expert_swiglu` -> y, sum."""
    experts = expert_swiglu(x, gate_up_proj, down_proj, ids, weights, activation)
    return rms_norm(experts, norm_weight, eps, residual)


def rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, eq. 34), halves rotated against each other; in fp32, rounded once.

    q [B,T,Hq,D], k [B,T,Hkv,D], cos and sin fp32 [P,D/2], positions [B,T] -> q, k. With q_norm and k_norm [D] each head
    is normalized before that (Qwen3, section 2).
    """
    angles = F.embedding(positions, cos).unsqueeze(2), F.embedding(positions, sin).unsqueeze(2)
    heads = _rotate(_normed_heads(q, k, q_norm, k_norm, eps, cos.dtype), *angles).to(q.dtype)
    q, k = torch.split_with_sizes_copy(heads, (q.shape[2], k.shape[2]), dim=2)  # type: ignore[func-returns-value,misc]
    return q, k


def _normed_heads(q: Tensor, k: Tensor, q_norm: Any, k_norm: Any, eps: float, dtype: torch.dtype) -> Tensor:
    """Return the heads of q and k in one tensor [B,T,Hq + Hkv,D], with norms normalized in `dtype`."""
    if q_norm is None:
        return torch.cat((q, k), dim=2)
    pairs = (q.to(dtype), q_norm), (k.to(dtype), k_norm)
    return torch.cat([F.rms_norm(x, x.shape[-1:], weight.to(dtype), eps) for x, weight in pairs], dim=2)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x [B,T,heads,D] by the angles of its tokens, [B or none,T,1,D/2], in their dtype -> x's."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _common_value(numbers: Tensor) -> int | None:
    """Return the value that all numbers have; None where they differ."""
    values = set(numbers.tolist())
    return values.pop() if len(values) == 1 else None


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None = None,
    causal: bool = True,
    scale: float | None = None,
    starts: Tensor | None = None,
    lengths: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Sliding-window attention (Mistral, section 2; Longformer, section 3.1 for causal=False) with grouped queries.

    q [B,T,Hq,D], k and v [B,S,Hkv,D] -> [B,T,Hq,D]. Query t is at position lengths - T + t; keys are valid
    in [starts, lengths). Query i sees key j iff i - window < j <= i, without `causal` iff |i - j| <= window // 2.
    sinks [Hq]: exp(sinks) is added to the denominator of each softmax of a head (gpt-oss).
    """
    if lengths is not None and (length := _common_value(lengths)) is not None:
        k, v, lengths = k[:, :length], v[:, :length], None
    T, S = q.shape[1], k.shape[1]
    if causal and starts is None and lengths is None:
        reach = S if window is None or window <= 0 else window
        if reach < S - T + 1:  # no query sees a key before the first query's window
            k, v = k[:, S - T + 1 - reach :], v[:, S - T + 1 - reach :]
            S = k.shape[1]
        if T == 1 or T == S <= reach:
            return _attend(q, k.transpose(1, 2), v.transpose(1, 2), None, scale, T > 1, sinks)
    end = S if lengths is None else lengths[:, None, None]
    i, j = torch.arange(T, device=q.device)[:, None] + (end - T), torch.arange(S, device=q.device)
    visible = _visible(i, j, window, causal)
    if lengths is not None:
        visible = visible & (j < end)
    if starts is not None:
        visible = visible & (j >= starts[:, None, None])
    return _attend(q, k.transpose(1, 2), v.transpose(1, 2), visible.expand(len(q), T, S), scale, False, sinks)


def _visible(i: Tensor, j: Tensor, window: int | None, causal: bool) -> Tensor:
    """Return whether the query at position i sees the key at position j, the tensors broadcast."""
    if window is None or window <= 0:
        return j <= i if causal else torch.ones_like(i == j)
    return (j <= i) & (j > i - window) if causal else (i - j).abs() <= window // 2


def with_sinks(k: Tensor, v: Tensor, mask: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return k and v [B,Hkv,S,D] with a key and a value of zeros, and a mask to add to the scores [B,Hq,T,S + 1] in
    which the score of that key is its head's sink. mask [B,1 or Hq,T,S]: bool (True: visible), or to be added."""
    added = (
        torch.zeros_like(mask, dtype=_wide(k).dtype).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask
    )
    B, _, T, S = mask.shape
    columns = added.expand(B, len(sinks), T, S), sinks.to(added.dtype)[:, None, None].expand(B, -1, T, 1)
    return F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), torch.cat(columns, -1)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: Any, causal: bool = False, sinks: Any = None
) -> Tensor:
    """Softmax attention of q [B,T,Hq,D] over k and v [B,Hkv,S,D] with the mask `visible` [B,T,S].

    visible None: every key, or with `causal` those up to the query's own. A key that no query sees may be NaN; a query
    that sees no key returns zeros.
    """
    B, T, Hq, D = q.shape
    sees_no_key = None
    if sinks is not None and visible is None:
        seen = torch.ones(T, k.shape[2], dtype=torch.bool, device=q.device)
        visible, causal = (seen.tril() if causal else seen).expand(B, -1, -1), False
    if visible is not None:
        is_unused, sees_no_key = ~visible.any(1)[:, None, :, None], ~visible.any(2)[:, :, None, None]
        if is_unused.is_meta or is_unused.any():
            k, v = k.masked_fill(is_unused, 0.0), v.masked_fill(is_unused, 0.0)  # 0 * NaN is NaN
        visible = visible[:, None]
        if sinks is not None:
            k, v, visible = with_sinks(k, v, visible, sinks)
    if T == 1:  # the heads of a group share their keys
        q = q.view(B, k.shape[1], Hq // k.shape[1], D)
        visible = visible if sinks is None or visible is None else visible.view(*q.shape[:3], -1)
        out = F.scaled_dot_product_attention(q, k, v, visible, scale=scale).view(B, 1, Hq, D)
    else:
        q = q.transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, visible, is_causal=causal, scale=scale, enable_gqa=True)
        out = out.transpose(1, 2)
    return (out if sees_no_key is None else out.masked_fill(sees_no_key, 0.0)).contiguous()


def append(k: Tensor, v: Tensor, k_cache: Any, v_cache: Any, past: Tensor, new: Tensor) -> None:
    """Write the first new[b] tokens of k and v [B,T,Hkv,D] into the ring caches [B,Hkv,C,D], slot = position mod C.

    A cache of 8 bits quantizes what it is assigned, one vector [D] at a time.
    """
    C = k_cache.shape[2]
    for b, (begin, n) in enumerate(zip(past.tolist(), new.tolist(), strict=True)):
        t = max(0, n - C)  # later tokens overwrite earlier ones
        while t < n:
            slot = (begin + t) % C
            run = min(n - t, C - slot)
            for x, cache in ((k, k_cache), (v, v_cache)):
                cache[b, :, slot : slot + run] = x[b, t : t + run].transpose(0, 1)
            t += run


def cached_attention(
    q: Tensor, k: Tensor | None, v: Tensor | None, k_cache: Any, v_cache: Any, past: Tensor, new: Tensor,
    window: int | None = None, sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Causal attention of queries at past[b] + t over the ring caches [B,Hkv,C,D] and the fresh k, v [B,T,Hkv,D].

    With k and v the caches hold the positions before this chunk, up to `past`; without, they also hold the chunk.
    window, sinks: as in `attention`.
    """
    T, C = q.shape[1], k_cache.shape[2]
    fresh, begin, n = None if k is None or v is None else (k, v), _common_value(past), _common_value(new)
    if fresh is not None and n is not None and 0 < n < T:  # the rest of the chunk is padding
        q, k, v = (x[:, :n] for x in (q, *fresh))
        return F.pad(cached_attention(q, k, v, k_cache, v_cache, past, new, window, sinks), (0, 0, 0, 0, 0, T - n))
    if fresh is not None and not isinstance(k_cache, Tensor):  # a chunk takes part as it will be read later
        fresh = tuple(map(k_cache.as_stored, fresh))
    if fresh is not None and begin == 0 and n == T:
        return attention(q, *fresh, window=window, sinks=sinks)  # the caches are empty
    cached = past + new if fresh is None else past
    written = [min(C, length) for length in cached.tolist()]  # slots of each sequence
    used = max(written, default=0)
    keys, values = (_dequantized(cache[:, :, :used], q.dtype) for cache in (k_cache, v_cache))
    if fresh is None and T == n == 1 and min(written) == used <= (window or used):
        return _attend(q, keys, values, None, None, False, sinks)  # the newest token sees every slot
    t, slot = torch.arange(T, device=q.device), torch.arange(used, device=q.device)
    # The newest position below `cached` that this slot can hold; negative where nothing was written yet.
    newest = cached[:, None] - 1
    j = newest - (newest - slot) % C
    i = past[:, None] + t
    valid = j >= 0
    if fresh is not None:
        j, valid = torch.cat((j, i), 1), torch.cat((valid, t < new[:, None]), 1)
        keys, values = (torch.cat((a, b.transpose(1, 2)), 2) for a, b in zip((keys, values), fresh, strict=True))
    visible = _visible(i[:, :, None], j[:, None], window, True) & valid[:, None]
    return _attend(q, keys, values, visible, None, False, sinks)


def rope_append_attention(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, k_cache: Any, v_cache: Any, past: Tensor, new: Tensor,
    window: int | None = None, q_norm: Tensor | None = None, k_norm: Tensor | None = None, eps: float = 1e-6,
    sinks: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Rotate q and k of one token a sequence at past[b], append k and v to the caches, and attend over them.

    A new token beyond the tables cos and sin is NaN. q_norm, k_norm, eps: as in `rope`, sinks as in
    `attention`.
    """
    begin = _common_value(past)
    if begin is not None and begin < len(cos):
        heads = _normed_heads(q, k, q_norm, k_norm, eps, cos.dtype)
        q, k = _rotate(heads, cos[begin], sin[begin]).to(q.dtype).split((q.shape[2], k.shape[2]), dim=2)
    else:
        q, k = rope(q, k, cos, sin, past[:, None].clamp(max=len(cos) - 1), q_norm, k_norm, eps)
        beyond = ((past >= len(cos)) & (new > 0))[:, None, None, None]  # padding may lie there, but must not be NaN
        q, k = q.masked_fill(beyond, math.nan), k.masked_fill(beyond, math.nan)
    append(k, v, k_cache, v_cache, past, new)
    return cached_attention(q, None, None, k_cache, v_cache, past, new, window, sinks)
