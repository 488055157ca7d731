"""`generate` against torch's logits of what it generated, and `sample` against its formula, with the same draws.

B sequences, T tokens of a text, n new tokens, V vocabulary
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..cache import KVCache
from ..generate import GRAPH_MIN_TOKENS, Step, can_capture, prefill, sample
from ..tools.tolerance import largest
from .report import END_RATIO, Row

NEW_TOKENS = 3  # and on a GPU as many as make `generate` capture its step
TEMPERATURE, TOP_P, TOP_K = 0.8, 0.9, 50
EDGE = 1e-5  # how much fp32 sums of probabilities may differ
RACE_LIMIT = 1e-3  # how much less than the winner's the race of a sampled token may be, for fp32 arithmetic


def check_generate(target: Any, ids: Tensor, exact: Tensor, baseline: Tensor) -> list[Row]:
    """Rows for greedy and sampled tokens of two prompts of unequal length, cut from ids [B,T].

    exact fp64 [2B,T,V]: logits of ids `with_perturbed_input`; baseline [B,T,V]: torch's, in the weights' dtype. Their
    errors set the limit: how far the logit of a right token may be below the greatest.
    """
    model, T = target.model, ids.shape[1]
    prompts = [ids[0, : max(1, T // 2)], ids[-1, : max(1, T // 3)]]
    most = NEW_TOKENS + (GRAPH_MIN_TOKENS if can_capture(model) else 0)
    new = min(most, target.config.max_position_embeddings - len(prompts[0]))
    logits, perturbed = exact.chunk(2)
    least = 2 * END_RATIO * max(largest(x.double() - logits) for x in (baseline, perturbed))
    if new < 1 or not math.isfinite(least):  # where torch overflows, the row of the logits says so
        return []
    scale, draws = max(largest(logits), 1e-30), [torch.Generator(model.device).manual_seed(1) for _ in range(2)]
    following, tokens = _following(target, model.generate(prompts, new, eos_token_id=[]), new)
    below = largest(following.amax(-1) - following.gather(-1, tokens[..., None])[..., 0])
    rows = [Row(None, "generate", "greedy", below / scale, least / scale)]
    if can_capture(model):
        same = torch.equal(tokens, _without_graph(model, prompts, new))
        rows.append(Row(None, "generate", "captured step", 0.0 if same else math.inf, 0.0))
    sampled = model.generate(prompts, new, TEMPERATURE, generator=draws[0], eos_token_id=[])
    following, tokens = _following(target, sampled, new)
    error = max(_race_error(following[:, at], tokens[:, at], draws[1]) for at in range(new))
    # A logit's error e changes a probability by a factor of at most exp(2 e).
    rows.append(Row(None, "generate", "sampled", error, 1 - math.exp(-least / TEMPERATURE) + RACE_LIMIT))
    return [*rows, _check_sample(baseline.flatten(0, 1).float(), draws)]


def _check_sample(logits: Tensor, draws: list[torch.Generator]) -> Row:
    """The row of `sample` with all its limits on logits [N,V]."""
    for generator in draws:
        generator.manual_seed(2)
    sampled_ids = sample(logits, TEMPERATURE, TOP_P, draws[0], TOP_K)
    return Row(None, "generate", "sample", _race_error(logits, sampled_ids, draws[1], TOP_P, TOP_K), RACE_LIMIT)


def _race_error(
    logits: Tensor, sampled_ids: Tensor, generator: Any, top_p: float = 1.0, top_k: int | None = None
) -> float:
    """How far the tokens `sampled_ids` [N] are from winning the exponential race of logits [N,V]: 0 for a winner, 1 for
    a token that does not take part (Holtzman et al. 2020)."""
    clock = torch.empty_like(logits, dtype=torch.float32).exponential_(generator=generator).double()
    p = (logits.double() / TEMPERATURE).softmax(-1)
    if top_k is not None:
        p = p.where(logits >= logits.topk(min(top_k, logits.shape[-1])).values[:, -1:], 0.0)
    p = p / p.sum(-1, keepdim=True)
    # What is before a token in the order of p must have less than top_p. Ties have any order, and fp32 sums may differ
    # at the edge: a token there may take part, and need not.
    ascending = p.sort(-1).values
    sums = F.pad(ascending.cumsum(-1), (1, 0))
    least, most = (
        sums[:, -1:] - sums.gather(-1, torch.searchsorted(ascending, p, right=right)) for right in (True, False)
    )
    race = p / clock
    allowed = race.where((least < top_p + EDGE) | (top_p == 1), 0.0).gather(-1, sampled_ids[:, None])[:, 0]
    certain = race.where((most - p < top_p - EDGE) | (top_p == 1), 0.0).amax(-1)
    return largest((1 - allowed / certain.clamp(min=1e-30)).clamp(min=0.0))


def _following(target: Any, texts: list[Tensor], new: int) -> tuple[Tensor, Tensor]:
    """torch's logits [B,n,V] of the last `new` tokens of texts [T], each from those before it, and the tokens [B,n]."""
    logits, attend = [], reference.uncached_attention(target.config.sliding_window, **target.tables)
    for text in texts:
        x = F.embedding(text[None, :-1], target.embed_tokens)
        for index in range(len(target.layers)):  # a mesh gathers a layer when it is read: keep none
            x = reference.block(target.layers[index], target.config, x, attend).output
        logits.append(target.head(x[0, -new:]).float())
    return torch.stack(logits), torch.stack([text[-new:] for text in texts])


def _without_graph(model: Any, prompts: list[Tensor], new: int) -> Tensor:
    """Greedy tokens [B,n] of `generate` without its CUDA graph."""
    lengths = torch.tensor([len(row) for row in prompts], device=model.device)
    ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    cache = KVCache(model.config, len(ids), ids.shape[1] + new, model.device, model.dtype)
    step = Step(model, cache, frozenset(), (0.0, 1.0, None, None))
    step.pick(prefill(model, cache, ids, lengths))
    tokens = [step.token.clone()]
    for _ in range(new - 1):
        step()
        tokens.append(step.token.clone())
    return torch.stack(tokens, 1)
