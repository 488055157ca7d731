"""The next token from the logits: repetition penalty, then greedy or sampled; and log probabilities."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoint.arguments import is_id, is_int, reject_unknown
from ..checkpoint.config import MixtralConfig

MIN_TEMPERATURE = 1e-30
TINY = torch.finfo(torch.float32).tiny  # in fp32 a smaller number may be 0
GENERATE_HINTS = {  # what does here what an argument of transformers does there
    "do_sample": "temperature: 0 is greedy, above 0 samples",
    "max_length": "max_new_tokens",
    "streamer": "model.stream(...), an iterator over tokens",
    "stopping_criteria": "model.stream(...), which a caller leaves",
    "output_scores": "logprobs=N",
    "output_logits": "logprobs=N",
    "return_dict_in_generate": "logprobs=N, which returns a NamedTuple",
    "past_key_values": "cache, a KVCache",
    "use_cache": "cache, a KVCache that goes on; there is one in any case",
    "pad_token_id": "nothing: a sequence is padded with its EOS",
    "generation_config": "its fields as arguments: temperature, top_k, top_p, ...",
    "num_return_sequences": "the prompt as often in a list",
}


@dataclass(frozen=True)
class SamplingOptions:
    """How texts go on: the arguments of `generate`, which explains them. ValueError for a wrong one."""

    max_new_tokens: int = 32
    temperature: float = 0.0
    top_p: float = 1.0
    eos_token_id: int | Sequence[int] | None = None
    generator: torch.Generator | None = None
    top_k: int | None = None
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    cache_dtype: torch.dtype | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        temperature, penalty, largest = self.temperature, self.repetition_penalty, torch.finfo(torch.float32).max
        finite = _is_number(temperature) and 0 <= temperature <= sys.float_info.max
        eos = () if self.eos_token_id is None else self.eos_token_id
        stops = eos if isinstance(eos, (list, tuple)) else [eos]
        for name, valid, need in (
            ("max_new_tokens", is_int(self.max_new_tokens, 0), "an integer of at least 0"),
            ("temperature", finite, "a finite number of at least 0"),
            ("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, "a number above 0, at most 1"),
            ("top_k", self.top_k is None or is_int(self.top_k, 1), "an integer of at least 1, or None"),
            ("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, "a number from 0 to 1"),
            ("repetition_penalty", _is_number(penalty) and 0 < penalty <= largest, "a finite number above 0"),
            ("logprobs", self.logprobs is None or is_int(self.logprobs, 0), "an integer of at least 0, or None"),
            ("eos_token_id", all(map(is_id, stops)), "a token id or a list of them"),
            ("generator", isinstance(self.generator, (torch.Generator, type(None))), "a torch.Generator, or None"),
        ):
            if not valid:
                raise ValueError(f"generate: {name} is {getattr(self, name)!r}, needs {need}")

    @classmethod
    def of(cls, *args: Any, **named: Any) -> SamplingOptions:
        """Return the options of these arguments; ValueError for one that there is not, with what does the same here."""
        known = {field.name for field in fields(cls)}
        reject_unknown("generate", {name: named[name] for name in named if name not in known}, GENERATE_HINTS)
        return cls(*args, **named)

    def stops(self, config: MixtralConfig) -> frozenset[int]:
        """Return the ids that end a sequence, by default the config's."""
        ids = config.eos_token_id if self.eos_token_id is None else self.eos_token_id
        return frozenset(() if ids is None else [ids] if isinstance(ids, int) else ids)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


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
