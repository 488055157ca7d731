"""The decode loop: prefill in chunks, then one token a step; greedy, or sampled by temperature, top-k and top-p.

On a GPU the step is captured in a CUDA graph and replayed: its buffers stay where they are, positions and routes are
read on the device, and the host waits for one value a token at most, to see whether every sequence has ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .cache import KVCache
from .config import MixtralConfig
from .graph import CaptureLost, captured
from .inputs import check_ids, check_vocabulary
from .ops import readable, untraced
from .parallel import Ranks

Sampling = tuple[float, float, torch.Generator | None, int | None]  # what `sample` takes behind the logits
TEMPERATURE_LEAST = 1e-30
PREFILL_CHUNK = 2048  # tokens: bounds the activations of a long prompt
GRAPH_LEAST = 4  # tokens still to come that are worth a capture, which costs about as much host time as two steps


class LanguageModel(Protocol):
    """What generation asks of a model."""

    config: MixtralConfig
    ranks: Ranks | None

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def hidden(self, input_ids: Tensor, cache: KVCache, lengths: Tensor | None = None) -> Tensor:
        """[B,T] -> [B,T,H], behind what the cache holds; the cache goes on."""

    def head(self, h: Tensor) -> Tensor:
        """[..., H] -> logits fp32 [..., V]."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Tensor | Sequence[Tensor],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
) -> Tensor | list[Tensor]:
    """Continue prompts: int64 [B,T] -> [B,T+n], or a list of 1-D prompts -> a list of prompts with what follows them.

    temperature 0 is greedy; else logits are divided by it, and of the top_k most likely tokens (None: of all) the
    smallest set with probability top_p is sampled from (Fan et al. 2018, Holtzman et al. 2020). eos_token_id None: the
    config's. A sequence ends with its EOS included; in a [B,T+n] result it is padded with it.
    """
    ragged = not isinstance(input_ids, Tensor)
    if isinstance(input_ids, Tensor) and input_ids.dim() == 0:
        raise ValueError("generate: input_ids is one number, needs a tensor [B, T] or a list of tensors [T]")
    if ragged and not isinstance(input_ids, (list, tuple)):
        raise ValueError(f"generate: input_ids is a {type(input_ids).__name__}, needs a tensor or a list of tensors")
    rows = list(input_ids)
    eos = eos_ids(eos_token_id, model.config)
    steps = stream(model, rows, max_new_tokens, temperature, top_p, eos, generator, top_k)
    new = torch.stack(list(steps), dim=1).cpu() if max_new_tokens else torch.empty((len(rows), 0), dtype=torch.int64)
    if not ragged:
        return torch.cat((torch.stack(rows), _pad(new, max_new_tokens).to(rows[0].device)), dim=1)
    return [torch.cat((row, _cut(tail, eos).to(row.device))) for row, tail in zip(rows, new, strict=True)]


def stream(
    model: LanguageModel,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos: frozenset[int] = frozenset(),
    generator: torch.Generator | None = None,
    top_k: int | None = None,
) -> Iterator[Tensor]:
    """Check everything, then give an iterator over the next tokens [B]; it ends early once every sequence has ended."""
    _check_sampling(max_new_tokens, temperature, top_p, top_k, generator, model.device)
    ids, lengths = _pad_prompts(model, prompts)
    longest = ids.shape[1]
    limit = model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones go beyond "
            f"max_position_embeddings, {limit}"
        )
    return _stream(model, ids, lengths, max_new_tokens, eos, (temperature, top_p, generator, top_k))


def _stream(
    model: LanguageModel,
    ids: Tensor,
    lengths: Tensor,
    max_new_tokens: int,
    eos: frozenset[int],
    sampling: Sampling,
) -> Iterator[Tensor]:
    if max_new_tokens == 0:
        return
    capacity = ids.shape[1] + max_new_tokens
    cache = KVCache(model.config, len(ids), capacity, device=model.device, dtype=model.dtype)
    step = Step(model, cache, eos, sampling)
    step.choose(prefill(model, cache, ids, lengths))
    run: Callable[[], None] = step
    for done in range(1, max_new_tokens + 1):
        if model.ranks is not None:
            model.ranks.synchronize(model.device)
        yield step.token.clone()
        if done == max_new_tokens or (eos and bool(step.ended.all())):
            return
        run()
        # The first step ran as it is: every kernel is compiled now.
        if done == 1 and max_new_tokens - done > GRAPH_LEAST and can_capture(model):
            run = replayed(step)


class Step:
    """One token for each of B sequences, on buffers that stay where they are.

    token  int64 [B]: the newest; a sequence that has ended repeats its EOS
    ended  bool [B]
    """

    def __init__(self, model: LanguageModel, cache: KVCache, eos: frozenset[int], sampling: Sampling) -> None:
        self.model, self.cache, self.sampling = model, cache, sampling
        self.stops = torch.tensor(sorted(eos), dtype=torch.int64, device=model.device)
        self.token = torch.zeros(cache.batch, dtype=torch.int64, device=model.device)
        self.ended = torch.zeros(cache.batch, dtype=torch.bool, device=model.device)

    def __call__(self) -> None:
        self.choose(self.model.hidden(self.token[:, None], self.cache)[:, 0])

    def choose(self, h: Tensor) -> None:
        """The next tokens after the hidden states h [B,H]."""
        chosen = sample(self.model.head(h), *self.sampling)
        if self.model.ranks is not None:
            chosen = self.model.ranks.broadcast(chosen)
        self.token.copy_(torch.where(self.ended, self.token, chosen))
        self.ended |= (self.token[:, None] == self.stops).any(-1)


def can_capture(model: LanguageModel) -> bool:
    return model.device.type == "cuda" and untraced()


def replayed(step: Step) -> Callable[[], None]:
    """The replay of `step` captured in a CUDA graph; where that is impossible `step` itself, and a warning says why."""
    try:
        return captured(step, step.sampling[2], step.model.device)
    except CaptureLost:
        raise
    except RuntimeError as error:
        warnings.warn(f"generate: decoding without a CUDA graph, slower: {error}", RuntimeWarning, stacklevel=2)
        return step


def prefill(model: LanguageModel, cache: KVCache, ids: Tensor, lengths: Tensor) -> Tensor:
    """Read the right-padded prompts ids [B,T] chunk by chunk -> the hidden state after each one's last token, [B,H]."""
    last: Tensor | None = None
    for start in range(0, ids.shape[1], PREFILL_CHUNK):
        chunk = ids[:, start : start + PREFILL_CHUNK]
        new = (lengths - start).clamp(0, chunk.shape[1]).to(torch.int32)
        h = model.hidden(chunk, cache, new)
        end = h[torch.arange(len(h), device=h.device), (new - 1).clamp(min=0).long()]
        last = end if last is None else torch.where((new > 0)[:, None], end, last)
    if last is None:
        raise ValueError("generate: the prompt is empty")
    return last


def sample(
    logits: Tensor,
    temperature: float,
    top_p: float,
    generator: torch.Generator | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Logits fp32 [B,V] -> token ids [B]."""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    # Below the maximum everything is negative: no temperature, however small, makes an inf of it that softmax minds.
    below = (logits - logits.amax(-1, keepdim=True)).double()
    if top_k is not None and top_k < logits.shape[-1]:
        # As in transformers: what ties with the last of them stays, too, and top_p is a share of what stays.
        least = below.topk(top_k, dim=-1).values[..., -1:]
        below = below.masked_fill(below < least, -torch.inf)
    p = torch.softmax(below / max(temperature, TEMPERATURE_LEAST), dim=-1).float()
    if top_p < 1.0:
        sorted_p, order = p.sort(dim=-1, descending=True)
        # A token stays while those before it do not reach top_p yet; the first always does.
        sorted_p = sorted_p.masked_fill(sorted_p.cumsum(-1) - sorted_p >= top_p, 0.0)
        p = torch.zeros_like(p).scatter(-1, order, sorted_p)
    # A race of exponential clocks, the token with rate p first: torch.multinomial's draw, without its look at p.
    clock = torch.empty_like(p).exponential_(generator=generator).clamp_(min=torch.finfo(p.dtype).tiny)
    return (p / clock).argmax(dim=-1)


def _pad_prompts(model: LanguageModel, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """1-D prompts -> ids [B,T] padded on the right with token 0, lengths int64 [B], both on the model's device."""
    if not prompts:
        raise ValueError("generate: there is no prompt, needs at least one")
    for number, row in enumerate(prompts):
        if not isinstance(row, Tensor) or row.dim() != 1 or len(row) == 0:
            got = f"of shape {list(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
            raise ValueError(f"generate: prompt {number} is {got}, needs a tensor [T] of at least one token")
        check_ids(row[None], model.config.vocab_size, model.device)
    lengths = torch.tensor([len(row) for row in prompts], device=model.device)
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    if not readable(ids):
        check_vocabulary(ids, model.config.vocab_size)  # the one look at a prompt on a GPU
    return ids, lengths


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_sampling(
    max_new_tokens: Any, temperature: Any, top_p: Any, top_k: Any, generator: Any, device: torch.device
) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 0:
        raise ValueError(f"generate: max_new_tokens is {max_new_tokens!r}, needs an integer of at least 0")
    if not _number(temperature) or not 0.0 <= temperature < float("inf"):
        raise ValueError(f"generate: temperature is {temperature!r}, needs a finite number of at least 0")
    if not _number(top_p) or not 0.0 < top_p <= 1.0:
        raise ValueError(f"generate: top_p is {top_p!r}, needs a number above 0, at most 1")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"generate: top_k is {top_k!r}, needs an integer of at least 1, or None")
    if device.type == "meta":
        raise ValueError("generate: the model is on the meta device, which holds no numbers, needs a CPU or a GPU")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise ValueError(f"generate: generator is a {type(generator).__name__}, needs a torch.Generator")
    if generator is not None and generator.device.type != device.type:
        raise ValueError(f"generate: generator is on {generator.device}, needs the model's device, {device}")


def eos_ids(given: int | Sequence[int] | None, config: Any) -> frozenset[int]:
    """The ids that end a sequence: those given, else the config's; ValueError for what is no id."""
    chosen = config.eos_token_id if given is None else given
    if chosen is None:
        return frozenset()
    ids = [chosen] if isinstance(chosen, int) else list(chosen) if isinstance(chosen, (list, tuple)) else [None]
    if any(isinstance(token, bool) or not isinstance(token, int) or token < 0 for token in ids):
        raise ValueError(f"generate: eos_token_id is {given!r}, needs a token id or a list of them")
    return frozenset(ids)


def _pad(new: Tensor, columns: int) -> Tensor:
    """Repeat the last token, an EOS where the loop ended early, up to `columns`."""
    return torch.cat((new, new[:, -1:].expand(-1, columns - new.shape[1])), dim=1) if columns > new.shape[1] else new


def _cut(tail: Tensor, eos: frozenset[int]) -> Tensor:
    """Up to and with the first EOS."""
    for place, token in enumerate(tail.tolist()):
        if token in eos:
            return tail[: place + 1]
    return tail
