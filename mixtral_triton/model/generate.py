"""The decode loop: prefill in chunks, then one token a step; greedy, or sampled by temperature, top-k, top-p and min-p.

On a GPU the step is captured in a CUDA graph and replayed: its buffers keep their addresses, positions and routes are
read on the device, and the host waits for at most one value a token, whether every sequence has ended.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.arguments import (
    GENERATE_HINTS,
    check_ids,
    check_positions,
    check_vocabulary,
    describe,
    drop_padding,
    explain_out_of_memory,
    is_int,
    reject_unknown,
)
from ..kernels.launching.launch import launch_context, launches_dependently
from ..kernels.operation.call import untraced
from ..kernels.operation.checks import readable
from .cache import KVCache, select_dtype
from .cuda_graph import CapturedGraph, CaptureLost, capture, is_out_of_memory
from .model import Model
from .sampling import Logprobs, Sampling, measure, penalize, sample, stack_steps

Prompt = Tensor | Sequence[int] | str
GRAPH_MIN_TOKENS = 4  # remaining tokens that are worth a capture, which takes the host time of about two steps


@torch.no_grad()
def generate(
    model: Model,
    input_ids: Tensor | Sequence[Prompt],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    cache: KVCache | None = None,
    cache_dtype: torch.dtype | None = None,
    logprobs: int | None = None,
    attention_mask: Any = None,
    **unknown: Any,
) -> Any:
    """Continue prompts: int64 [B,T] -> [B,T+n], or a list of prompts, each int64 [T], a list of integers, or a text for
    `model.tokenizer` -> a list of prompts [T] with what follows them.

    temperature 0, the default whatever generation_config.json says, is greedy; else logits are divided by it, and of
    the top_k most likely tokens (None: of all) the smallest set with probability top_p is sampled from (Fan et al.
    2018, Holtzman et al. 2020), without those less likely than min_p times the likeliest (Nguyen et al. 2024).
    Before that, repetition_penalty divides the positive logits of a sequence's tokens, those of the prompt included,
    and multiplies the negative ones (Keskar et al. 2019).
    eos_token_id None: the config's, which are those of both files. A sequence ends with its EOS included; in a
    [B,T+n] result it is padded with it. cache_dtype None: the model's; torch.int8: keys and values in 8 bits (KVCache).

    cache     a KVCache of B sequences that goes on. Each prompt is the whole text: what the cache holds of it is not
              computed again, and where the two differ, the cache is set back, or, where its ring has moved on, filled
              again, with a warning. Afterwards it holds every token but the newest. A call that fails leaves it as a
              failed forward does
    logprobs  N: return a `Logprobs` (ids, logprobs [B,n], top_ids [B,n,N], top_logprobs [B,n,N]) of the new tokens,
              with lists in place of tensors for a list of prompts
    attention_mask  [B,T] or a list of lists: 0 is padding, on either side, which no token sees, as in
              `generate(**tokenizer(texts, return_tensors="pt", padding=True))`; a result [B,T+n] keeps it
    An argument of transformers' that there is not raises ValueError, which names the one that does it here.
    """
    options: Any = {"attention_mask": attention_mask, **unknown}
    options |= {"generator": generator, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty}
    options |= {"cache": cache, "cache_dtype": cache_dtype, "logprobs": logprobs}
    steps = [*stream(model, input_ids, max_new_tokens, temperature, top_p, eos_token_id, **options)]
    rows, eos = to_rows(model, input_ids, attention_mask), eos_ids(eos_token_id, model.config)
    new, *measured = stack_steps(steps, len(rows), max_new_tokens, logprobs or 0)
    if isinstance(input_ids, Tensor):
        device = rows[0].device
        results = [torch.cat((input_ids, new.to(device)), dim=1), *(tensor.to(device) for tensor in measured)]
    else:
        tails = [(row, b, _end_of(new[b, : len(steps)], eos)) for b, row in enumerate(rows)]
        results = [[torch.cat((row, new[b, :end].to(row.device))) for row, b, end in tails]]  # type: ignore[list-item]
        results += [[tensor[b, :end].to(row.device) for row, b, end in tails] for tensor in measured]  # type: ignore[misc]
    return results[0] if logprobs is None else Logprobs(*results)


def stream(
    model: Model,
    input_ids: Tensor | Sequence[Prompt],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    cache: KVCache | None = None,
    cache_dtype: torch.dtype | None = None,
    logprobs: int | None = None,
    attention_mask: Any = None,
    **unknown: Any,
) -> Iterator[Any]:
    """Check the arguments, those of `generate`, then return an iterator over the next tokens, int64 [B] on the model's
    device, or with `logprobs` over `Logprobs` of a step. A sequence that has ended repeats its EOS; the iterator ends
    once every sequence has. A cache is right wherever the caller stops."""
    reject_unknown("generate", unknown, GENERATE_HINTS)
    eos, rows = eos_ids(eos_token_id, model.config), to_rows(model, input_ids, attention_mask)
    vocabulary, penalty = model.config.vocab_size, repetition_penalty
    finite = _is_number(temperature) and 0.0 <= temperature <= sys.float_info.max
    penalizes = _is_number(penalty) and 0.0 < penalty <= torch.finfo(torch.float32).max
    is_generator = generator is None or isinstance(generator, torch.Generator)
    same_device = not isinstance(generator, torch.Generator) or generator.device.type == model.device.type
    measures = logprobs is None or (is_int(logprobs, 0) and logprobs <= vocabulary)
    for name, got, valid, need in (
        ("max_new_tokens", repr(max_new_tokens), is_int(max_new_tokens, 0), "an integer of at least 0"),
        ("temperature", repr(temperature), finite, "a finite number of at least 0"),
        ("top_p", repr(top_p), _is_number(top_p) and 0.0 < top_p <= 1.0, "a number above 0, at most 1"),
        ("top_k", repr(top_k), top_k is None or is_int(top_k, 1), "an integer of at least 1, or None"),
        ("min_p", repr(min_p), _is_number(min_p) and 0.0 <= min_p <= 1.0, "a number from 0 to 1"),
        ("repetition_penalty", repr(penalty), penalizes, "a finite number above 0"),
        ("logprobs", repr(logprobs), measures, f"an integer from 0 to {vocabulary}, the vocabulary, or None"),
        ("the model", "on the meta device, which holds no numbers", model.device.type != "meta", "a CPU or a GPU"),
        ("generator", f"a {type(generator).__name__}", is_generator, "a torch.Generator"),
        ("generator", f"on {getattr(generator, 'device', None)}", same_device, f"the model's device, {model.device}"),
    ):
        if not valid:
            raise ValueError(f"generate: {name} is {got}, needs {need}")
    check_rows(model, rows, "generate: prompt")
    longest = max(map(len, rows))
    got = f"generate: a prompt of {longest} tokens and {max_new_tokens} new ones"
    check_positions(got, longest + max_new_tokens, model.config)
    if cache is not None:
        model._check_cache(cache, len(rows))
        cache.check_intact()
        cache.check_length(longest + max(0, max_new_tokens - 1))
    dtype = select_dtype("generate", cache_dtype, model.dtype, cache)
    if generator is None and temperature > 0.0 and model.device.type == "cuda":
        # Not torch's own, in which another thread cannot draw during a capture: seeded by it, as a data loader is.
        generator = torch.Generator(model.device).manual_seed(int(torch.randint(1 << 62, (), device="cpu")))
    sampling = Sampling(temperature, top_p, generator, top_k, min_p, penalty)
    return _stream(model, rows, max_new_tokens, eos, sampling, cache or dtype, logprobs)


@torch.inference_mode(False)  # outermost: leaving inference mode turns gradients on
@torch.no_grad()
def _stream(
    model: Model,
    rows: list[Tensor],
    n: int,
    eos: frozenset[int],
    sampling: Sampling,
    cache: KVCache | torch.dtype,
    logprobs: int | None,
) -> Iterator[Any]:
    drawn, texts, context = None, rows, max(map(len, rows)) + n
    explain = partial(explain_out_of_memory, "generate", model.device, len(rows), context)
    if isinstance(cache, torch.dtype):
        if n == 0:
            return
        with explain():
            cache = KVCache(model.config, len(rows), context, model.device, cache)
    else:
        identity = model.identity()
        if cache.has_keys_of_another(identity):
            what = "the cache was filled by another model, or in another dtype"
            warnings.warn(f"generate: a text is computed from its start: {what}", RuntimeWarning, stacklevel=2)
            cache.lengths.zero_()
        kept = cache.set_back([row.tolist() for row in rows])
        texts = [row[start : len(row) - (n == 0)] for row, start in zip(rows, kept, strict=True)]
        cache.filled_by, drawn = identity, cache.drawn
        if n == 0:  # the newest token is the prompt's last
            with explain():
                prefill(model, cache, *pad(texts, model.device))
            return
    with explain():
        step = Step(model, cache, eos, sampling, logprobs)
        for seen, row in zip(step.seen, rows, strict=True) if step.penalizes else ():
            seen[row] = True
        replayed = cache.replayed
        step.pick(prefill(model, cache, *pad(texts, model.device)))
        cache.written = None  # every sequence has gone on by a token at least
    replay: CapturedGraph | None = None
    captures = 1 + (model.ranks is None and launches_dependently(model.device))
    try:
        for done in range(1, n + 1):
            if model.ranks is not None:
                model.ranks.synchronize(model.device)
            if drawn is not None:
                drawn.append(step.token.clone())
            result, last = step.result(), done == n or (bool(eos) and bool(step.ended.all()))
            if replay is not None and not last:  # here, so that the GPU computes while the caller prints a token
                with explain():
                    replay()
            yield result
            if drawn is not None and (cache.drawn is not drawn or cache.lengths_written):
                got = "cache has gone on in another call, or its lengths were written"
                raise ValueError(f"generate: {got}, needs a cache that only this one uses")
            if last:
                return
            if replay is not None:
                continue
            with explain():
                step()
            # A step that ran eagerly has its kernels compiled.
            to_capture = done <= captures and n - done > GRAPH_MIN_TOKENS
            if to_capture and not can_capture(model):
                captures = 0
            elif to_capture:
                try:
                    replay = capture(step, sampling.generator, model.device)
                except CaptureLost:
                    raise
                except RuntimeError as error:
                    captures = 0 if is_out_of_memory(error) else captures
                    step.no_pdl = done < captures
                    what = "capturing without dependent launches" if step.no_pdl else "decoding without a CUDA graph"
                    warnings.warn(f"generate: {what}, slower: {error}", RuntimeWarning, stacklevel=2)
    finally:
        cache.replayed = replayed  # no replay follows
        if replay is not None:  # `destroy_process_group` waits for a graph that holds collectives
            replay.reset()


class Step:
    """One token for each of B sequences, on buffers that keep their addresses.

    token     int64 [B]: the newest token; a sequence that has ended repeats its EOS, which `cache` does not hold
    ended     bool [B]
    new       int32 [B]: tokens that the step appends, none of a sequence that has ended
    seen      bool [B,V]: the tokens of each sequence, with a repetition penalty
    measured  the token's log probability [B], the likeliest tokens [B,N] and theirs, with `logprobs`
    no_pdl    whether no launch is dependent
    """

    def __init__(
        self, model: Model, cache: KVCache, eos: frozenset[int], sampling: Sampling, logprobs: int | None = None
    ) -> None:
        self.model, self.cache, self.sampling, self.no_pdl = model, cache, sampling, False
        self.penalizes = sampling.repetition_penalty != 1.0
        B, device = cache.batch, model.device
        self.stops = torch.tensor(sorted(eos), dtype=torch.int64, device=device)
        self.token = torch.zeros(B, dtype=torch.int64, device=device)
        self.ended = torch.zeros(B, dtype=torch.bool, device=device)
        self.new = torch.ones(B, dtype=torch.int32, device=device)
        self.measured: tuple[Tensor, ...] = ()
        self.seen = torch.zeros((B, model.config.vocab_size), dtype=torch.bool, device=device)
        if logprobs is not None:
            no_steps = Logprobs(*(tensor[:, 0] for tensor in stack_steps([], B, 1, logprobs)))
            self.measured = tuple(tensor.to(device, copy=True) for tensor in no_steps[1:])

    def __call__(self) -> None:
        with launch_context(no_pdl=self.no_pdl):
            torch.logical_not(self.ended, out=self.new)
            self.pick(self.model.hidden(self.token[:, None], self.cache, self.new)[:, 0])

    def pick(self, h: Tensor) -> None:
        """Pick the next tokens from the hidden states h [B,H]."""
        logits = self.model.head(h)
        scores = penalize(logits, self.seen, self.sampling.repetition_penalty) if self.penalizes else logits
        token = sample(scores, *self.sampling[:5])
        if self.model.ranks is not None:
            token = self.model.ranks.broadcast(token)
        self.token.copy_(torch.where(self.ended, self.token, token))
        if self.measured:
            N = self.measured[1].shape[1]
            for buffer, value in zip(self.measured, measure(logits, self.token, self.ended, N), strict=True):
                buffer.copy_(value)
        self.ended |= (self.token[:, None] == self.stops).any(-1)
        if self.penalizes:
            self.seen.scatter_(1, self.token[:, None], True)

    def result(self) -> Any:
        """Return what `stream` yields, in memory of its own."""
        token, *measured = (tensor.clone() for tensor in (self.token, *self.measured))
        return Logprobs(token, *measured) if measured else token


def can_capture(model: Model) -> bool:
    """Whether a replay does what the model's step does, with a warning where it would not call a caller's code."""
    if model.device.type != "cuda" or not untraced():
        return False
    if change := model.find_change():
        text = f"generate: decoding without a CUDA graph, slower: {change}, and a replay would not run that code"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return change is None


def prefill(model: Model, cache: KVCache, ids: Tensor, lengths: Tensor) -> Tensor:
    """Run the right-padded prompts ids [B,T] in chunks -> the hidden state of each one's last token, [B,H]."""
    last = torch.empty(0)
    for start, h, new in run_chunks(model, cache, ids, lengths):
        end = h[torch.arange(len(h), device=h.device), (new - 1).clamp(min=0).long()]
        last = torch.where((new > 0)[:, None], end, last) if start else end
    return last


def run_chunks(model: Model, cache: KVCache, ids: Tensor, lengths: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Run texts as `prefill` does -> each chunk's first token, hidden states [B,C,H], int32 [B] tokens that exist."""
    for start in range(0, ids.shape[1], model.prefill_chunk):
        chunk = ids[:, start : start + model.prefill_chunk]
        new = (lengths - start).clamp(0, chunk.shape[1]).to(torch.int32)
        yield start, model.hidden(chunk, cache, new), new


def to_rows(model: Model, ids: Any, mask: Any = None, argument: str = "generate: input_ids") -> list[Any]:
    """Return the rows of ids [B,T] or of a list, a text or a list of integers as int64 [T] on the model's device; what
    else is no tensor stays as it is, for `check_rows`. mask: as in `drop_padding`."""
    right = isinstance(ids, (list, tuple)) or (isinstance(ids, Tensor) and ids.dim() > 0)
    if not right or len(ids) == 0:
        raise ValueError(f"{argument} is {describe(ids)}, needs a tensor [B, T] or a list of texts [T], at least one")

    def is_ids(row: Any) -> bool:
        return isinstance(row, (list, tuple)) and all(is_int(token, 0) and token < 1 << 63 for token in row)

    with_tokenizer: Any = model  # a Mixtral
    ids = [with_tokenizer.tokenizer(row).input_ids if isinstance(row, str) else row for row in ids]
    rows = [torch.tensor(row, dtype=torch.int64, device=model.device) if is_ids(row) else row for row in ids]
    return rows if mask is None else drop_padding(rows, mask)


def check_rows(model: Model, rows: Sequence[Tensor], what: str) -> None:
    """Raise ValueError, which begins with `what`, unless these are rows [T], each with tokens of the vocabulary."""
    for number, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 1 or len(row) == 0:
            raise ValueError(f"{what} {number} is {describe(row)}, needs int64 [T] or a list of token ids, not empty")
        check_ids(row[None], model.config.vocab_size, model.device)
    if not readable(rows[0]):
        check_vocabulary(torch.cat([*rows]), model.config.vocab_size)  # the only synchronization of a prompt on a GPU


def pad(texts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad 1-D texts on the right with token 0 -> ids [B,T], lengths int64 [B], both on the device."""
    lengths = torch.tensor([len(row) for row in texts], device=device)
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), lengths


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def eos_ids(eos_token_id: int | Sequence[int] | None, config: Any) -> frozenset[int]:
    """Return the ids that end a sequence, by default the config's; raise ValueError for anything but ids."""
    value: Any = config.eos_token_id if eos_token_id is None else eos_token_id
    if value is None:
        return frozenset()
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(is_int(token, 0) and token < 1 << 63 for token in ids):
        raise ValueError(f"generate: eos_token_id is {eos_token_id!r}, needs a token id or a list of them")
    return frozenset(ids)


def _end_of(tail: Tensor, eos: frozenset[int]) -> int:
    """Return how many tokens there are up to the first EOS, which is counted."""
    ends = (index + 1 for index, token in enumerate(tail.tolist()) if token in eos)
    return next(ends, len(tail))
