"""The routes of a token in plain torch: `reference.route`.

T tokens, E experts, K experts per token
"""

import math

import torch
from torch import Tensor


def route(
    logits: Tensor,
    top_k: int,
    renormalize: bool = True,
    scoring: str = "softmax",
    bias: Tensor | None = None,
    groups: tuple[int, int] | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mixtral's gate, Softmax(TopK(logits)) (Jiang et al. 2024, section 2.1): weights fp32 [T,K], ids int32 [T,K].

    The softmax over the top k equals the softmax over all, renormalized; without `renormalize` it is the latter (OLMoE,
    Muennighoff et al. 2024, section 2). Larger first, ties to the lower index. "sigmoid" scores, a bias [E] that
    selects and does not weigh, the best k of n groups=(n, k) and a scale are DeepSeek-V3's (DeepSeek-AI 2024, section
    2.1.2, eq. 12 to 16; Wang et al. 2024 for the bias).
    """
    if not 1 <= top_k <= logits.shape[-1]:  # a slice would be shorter
        raise ValueError(f"route: argument 'top_k' is {top_k}, needs an integer in 1..{logits.shape[-1]}")
    values = _ordered(logits if logits.dtype == torch.float64 else logits.float())
    if scoring == "softmax" and bias is None and groups is None:
        values, ids = values.sort(dim=-1, descending=True, stable=True)
        scores = _softmax(values[:, :top_k] if renormalize else values)[:, :top_k]
        return scores * scale, ids[:, :top_k].int()
    scores = values.sigmoid() if scoring == "sigmoid" else _softmax(values)
    choice = scores if bias is None else _ordered(scores + bias)
    if groups is not None:
        best = choice.unflatten(-1, (groups[0], -1)).topk(2).values.sum(-1)
        kept = best.sort(dim=-1, descending=True, stable=True).indices[:, : groups[1]]
        outside = torch.ones_like(best, dtype=torch.bool).scatter(-1, kept, False)
        choice = choice.masked_fill(outside.repeat_interleave(choice.shape[-1] // groups[0], dim=-1), -math.inf)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = scores.gather(-1, ids)
    if renormalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, ids.int()


def _ordered(values: Tensor) -> Tensor:
    """NaN as -inf, and one zero: -0.0 + 0.0 is 0.0."""
    return (values + 0.0).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)


def _softmax(values: Tensor) -> Tensor:
    """An infinite maximum has no softmax (inf - inf is NaN): the experts that share it share the weight."""
    return (values - values.amax(-1, keepdim=True)).nan_to_num(nan=0.0, neginf=-math.inf).softmax(-1)
