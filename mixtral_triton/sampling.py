"""The next token from the logits: repetition penalty, then greedy or sampled; and log probabilities."""

import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .inputs import is_int

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

    def checks(self, device: torch.device) -> Iterator[tuple[str, str, bool, str]]:
        """Yield (argument, what it got, whether it is valid, what it needs) for each argument."""
        temperature, top_p, generator, top_k, min_p, penalty = self
        below_inf = _is_number(temperature) and 0.0 <= temperature <= sys.float_info.max
        is_generator = generator is None or isinstance(generator, torch.Generator)
        same_device = not isinstance(generator, torch.Generator) or generator.device.type == device.type
        penalizes = _is_number(penalty) and 0.0 < penalty <= torch.finfo(torch.float32).max
        yield "temperature", repr(temperature), below_inf, "a finite number of at least 0"
        yield "top_p", repr(top_p), _is_number(top_p) and 0.0 < top_p <= 1.0, "a number above 0, at most 1"
        yield "top_k", repr(top_k), top_k is None or is_int(top_k, 1), "an integer of at least 1, or None"
        yield "min_p", repr(min_p), _is_number(min_p) and 0.0 <= min_p <= 1.0, "a number from 0 to 1"
        yield "repetition_penalty", repr(penalty), penalizes, "a finite number above 0"
        yield "generator", f"a {type(generator).__name__}", is_generator, "a torch.Generator"
        yield "generator", f"on {getattr(generator, 'device', None)}", same_device, f"the model's device, {device}"


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
    shapes = ((B, n), torch.int64), ((B, n), torch.float32), ((B, n, N), torch.int64), ((B, n, N), torch.float32)
    stacked = Logprobs(*(torch.zeros(shape, dtype=dtype, device="cpu") for shape, dtype in shapes))
    columns = zip(*(step if isinstance(step, Logprobs) else (step,) for step in steps), strict=True)
    for result, column in zip(stacked, columns, strict=False):
        result[:, : len(steps)] = torch.stack(column, dim=1)
    if steps:
        stacked.ids[:, len(steps) :] = stacked.ids[:, len(steps) - 1 : len(steps)]
        stacked.top_ids[:, len(steps) :] = stacked.ids[:, len(steps) :, None]
    return stacked


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide positive logits of the `seen` tokens, a mask [B,V], by `penalty` and multiply the others (Keskar et al.
    2019, section 4.1, as transformers has it)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def measure(logits: Tensor, token: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the log probability of token [B] by logits fp32 [B,V], and the `count` likeliest ids and theirs [B,count].
    Of equal ones the lowest id is first, as in argmax."""
    logprobs = logits.log_softmax(-1)
    top, ids = (each[:, :count] for each in logprobs.sort(dim=-1, descending=True, stable=True))
    return logprobs.gather(1, token[:, None])[:, 0], ids, top


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
