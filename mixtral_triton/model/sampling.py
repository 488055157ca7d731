"""The next token from the logits: repetition penalty, then greedy or sampled; and log probabilities."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

MIN_TEMPERATURE = 1e-30
TINY = torch.finfo(torch.float32).tiny  # in fp32 a smaller number may be 0


class Sampling(NamedTuple):
    """The arguments of `generate` that select the next token."""

    temperature: float = 0.0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0


class Logprobs(NamedTuple):
    """Tokens with their log probabilities, of the model's distribution before penalty and temperature.

    ids           what is returned without `logprobs`: of `generate` the whole texts, of `stream` a step's tokens [B]
    logprobs      fp32 [B,n] of the new tokens; 0 behind a sequence's EOS. Of a step [B]
    top_ids       int64 [B,n,N] the likeliest tokens, the likeliest first; EOS behind a sequence's EOS. Of a step [B,N]
    top_logprobs  fp32 [B,n,N] of these; 0 behind a sequence's EOS. Of a step [B,N]
    """

    ids: Any
    logprobs: Any
    top_ids: Any
    top_logprobs: Any


def stack_steps(steps: list[Any], B: int, n: int, N: int) -> Logprobs:
    """Stack what `stream` yields to a `Logprobs` of the new tokens, [B,n] and [B,n,N], on the CPU. Where the steps are
    fewer, each sequence has ended: the rest is padded with its EOS and 0."""
    ids, values = (torch.zeros((B, n, N + 1), dtype=dtype, device="cpu") for dtype in (torch.int64, torch.float32))
    stacked = Logprobs(ids[..., 0], values[..., 0], ids[..., 1:], values[..., 1:])
    columns = zip(*(step if isinstance(step, Logprobs) else (step,) for step in steps), strict=True)
    for result, column in zip(stacked, columns, strict=False):
        result[:, : len(steps)] = torch.stack(column, dim=1)
    if steps:
        ids[:, len(steps) :] = ids[:, len(steps) - 1 : len(steps), :1]
    return stacked


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of the `seen` tokens, a mask [B,V], by `penalty` and multiply the others (Keskar et al.
    2019, section 4.1, as transformers has it)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def measure(logits: Tensor, token: Tensor, ended: Tensor, N: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log probability of token [B] by logits fp32 [B,V], the N likeliest ids and theirs [B,N]. Of equal ones
    the lowest id is first, as in argmax. Of a sequence that has `ended` [B]: 0, its token and 0."""
    logprobs, over = logits.log_softmax(-1), ended[:, None]
    top, ids = (tensor[:, :N] for tensor in logprobs.sort(dim=-1, descending=True, stable=True))
    logprob = logprobs.gather(1, token[:, None]).masked_fill(over, 0.0)[:, 0]
    return logprob, torch.where(over, token[:, None], ids), top.masked_fill(over, 0.0)


def sample(
    logits: Tensor, temperature: float, top_p: float, generator: Any = None, top_k: int | None = None, min_p: float = 0
) -> Tensor:
    """Sample token ids [B] from logits fp32 [B,V]; greedy at temperature 0."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    # Relative to the maximum all logits are at most 0: no temperature, however small, gives +inf.
    shifted = (logits - logits.amax(-1, keepdim=True)).double()
    if top_k is not None and top_k < logits.shape[-1]:
        # As in transformers: ties with the k-th logit stay, and top_p applies to what stays.
        least = shifted.topk(top_k, dim=-1).values[..., -1:]
        shifted = shifted.masked_fill(shifted < least, -torch.inf)
    p = torch.softmax(shifted / float(max(temperature, MIN_TEMPERATURE)), dim=-1).float()
    if top_p < 1.0:
        sorted_p, order = p.sort(dim=-1, descending=True)
        # A token stays while the sum before it is below top_p; the first always stays.
        sorted_p = sorted_p.masked_fill(sorted_p.cumsum(-1) - sorted_p >= max(top_p, TINY), 0.0)
        p = torch.zeros_like(p).scatter(-1, order, sorted_p)
    if min_p > 0.0:
        p = p.masked_fill(p < min_p * p.amax(-1, keepdim=True), 0.0)
    # Exponential race, the token with rate p wins: torch.multinomial's draw without its synchronization.
    clock = torch.empty_like(p).exponential_(generator=generator).clamp_(min=TINY)
    return (p / clock).argmax(dim=-1)
