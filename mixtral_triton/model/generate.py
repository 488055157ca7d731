"""The decode loop: prefill in chunks, then one token a step; greedy, or sampled by temperature, top-k, top-p and min-p.

On a GPU the step is captured in a CUDA graph and replayed: its buffers keep their addresses, positions and routes are
read on the device, and the host waits for at most one value a token, whether every sequence has ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.arguments import (
    check_ids,
    check_positions,
    check_vocabulary,
    describe,
    drop_padding,
    is_id,
)
from ..kernels.launching.launch import launch_context, launches_dependently
from ..kernels.operation.call import untraced
from ..kernels.operation.checks import readable
from .cache import KVCache, select_dtype
from .conversation import Conversation
from .cuda_graph import CapturedGraph, CaptureLost, capture, is_out_of_memory
from .memory_plan import explain_out_of_memory
from .model import Model
from .sampling import Logprobs, SamplingOptions, measure, penalize, sample, stack_steps

Prompt = Tensor | Sequence[int] | str
Explain = Callable[[], AbstractContextManager[None]]  # ValueError where no memory is left
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
    named = {"top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty, "cache_dtype": cache_dtype}
    args = max_new_tokens, temperature, top_p, eos_token_id, generator
    options = SamplingOptions.of(*args, **named, logprobs=logprobs, **unknown)
    rows, stops = to_rows(model, input_ids, attention_mask), options.stops(model.config)
    steps = [*_checked_stream(model, rows, options, cache)]
    new, *measured = stack_steps(steps, len(rows), max_new_tokens, logprobs or 0)
    if isinstance(input_ids, Tensor):
        device = rows[0].device
        results = [torch.cat((input_ids, new.to(device)), dim=1), *(tensor.to(device) for tensor in measured)]
    else:
        tails = [(row, b, _end_of(new[b, : len(steps)], stops)) for b, row in enumerate(rows)]
        results = [[torch.cat((row, new[b, :end].to(row.device))) for row, b, end in tails]]  # type: ignore[list-item]
        results += [[tensor[b, :end].to(row.device) for row, b, end in tails] for tensor in measured]  # type: ignore[misc]
    return results[0] if logprobs is None else Logprobs(*results)


def stream(
    model: Model,
    input_ids: Tensor | Sequence[Prompt],
    *args: Any,
    cache: KVCache | None = None,
    attention_mask: Any = None,
    **options: Any,
) -> Iterator[Any]:
    """Check the arguments, those of `generate` in its order, then return an iterator over the next tokens, int64 [B] on
    the model's device, or with `logprobs` over `Logprobs` of a step. A sequence that has ended repeats its EOS; the
    iterator ends once every sequence has. A cache is right wherever the caller stops."""
    sampling = SamplingOptions.of(*args, **options)
    return _checked_stream(model, to_rows(model, input_ids, attention_mask), sampling, cache)


def _checked_stream(model: Model, rows: list[Tensor], options: SamplingOptions, cache: KVCache | None) -> Iterator[Any]:
    """Check what takes a model -> `_stream`, of which nothing has run."""
    vocabulary, n, drawn = model.config.vocab_size, options.max_new_tokens, options.generator
    place, same = getattr(drawn, "device", model.device), f"the model's device, {model.device}"
    for name, got, valid, need in (
        ("logprobs", options.logprobs, (options.logprobs or 0) <= vocabulary, f"at most the vocabulary, {vocabulary}"),
        ("the model", "on the meta device, which holds no numbers", model.device.type != "meta", "a CPU or a GPU"),
        ("generator", f"on {place}", place.type == model.device.type, same),
    ):
        if not valid:
            raise ValueError(f"generate: {name} is {got}, needs {need}")
    check_rows(model, rows, "generate", "prompt")
    longest = max(map(len, rows))
    check_positions(f"generate: a prompt of {longest} tokens and {n} new ones", longest + n, model.config)
    if cache is not None:
        model._check_cache(cache, len(rows))
        cache.check_intact()
        cache.check_length(longest + max(0, n - 1))
    dtype = select_dtype("generate", options.cache_dtype, model.dtype, cache)
    if drawn is None and options.temperature > 0.0 and model.device.type == "cuda":
        # Not torch's own, in which another thread cannot draw during a capture: seeded by it, as a data loader is.
        drawn = torch.Generator(model.device).manual_seed(int(torch.randint(1 << 62, (), device="cpu")))
    return _stream(model, rows, replace(options, generator=drawn, cache_dtype=dtype), cache)


@torch.inference_mode(False)  # outermost: leaving inference mode turns gradients on
@torch.no_grad()
def _stream(model: Model, rows: list[Tensor], options: SamplingOptions, cache: KVCache | None) -> Iterator[Any]:
    """Read the prompts, then decode: by launches, and once there is a graph of the step, by its replays."""
    n = options.max_new_tokens
    if n == 0 and cache is None:
        return
    explain = partial(explain_out_of_memory, "generate", model.device, len(rows), max(map(len, rows)) + n)
    with explain():
        step = _read_prompts(model, rows, options, cache)
    if step is None:
        return
    graph, replayed = None, step.cache.replayed
    try:
        graph = yield from _decode_eagerly(step, explain)
        if graph is not None:
            yield from _replay(step, graph, explain)
    finally:
        step.cache.replayed = replayed  # no replay follows
        if graph is not None:  # `destroy_process_group` waits for a graph that holds collectives
            graph.reset()


def _read_prompts(model: Model, rows: list[Tensor], options: SamplingOptions, cache: KVCache | None) -> Step | None:
    """Run what a cache does not hold of the prompts -> the step with the first new tokens; None where there are none to
    be: the cache then holds all but each prompt's last token."""
    n, texts, conversation = options.max_new_tokens, rows, None
    if cache is None:
        cache = KVCache(model.config, len(rows), max(map(len, rows)) + n, model.device, options.cache_dtype)
    else:
        conversation = Conversation.of(cache)
        kept = conversation.begin(cache, model.identity(), [row.tolist() for row in rows])
        texts = [row[start : len(row) - (n == 0)] for row, start in zip(rows, kept, strict=True)]
    step = Step(model, cache, options, conversation) if n else None
    h = prefill(model, cache, *pad(texts, model.device))
    if step is not None:
        for seen, row in zip(step.seen, rows, strict=True) if step.penalizes else ():
            seen[row] = True
        step.pick(h)
        cache.valid_from = [0] * cache.batch  # every sequence has gone on by a token at least
    return step


def _decode_eagerly(step: Step, explain: Explain) -> Generator[Any, None, CapturedGraph | None]:
    """Yield tokens, and launch a step behind each -> the graph of the step once it is captured; None at the end."""
    model, captures = step.model, 1 + (step.model.ranks is None and launches_dependently(step.model.device))
    for done in range(1, step.options.max_new_tokens + 1):
        result, last = step.take()
        yield result
        step.check_cache()
        if last:
            return None
        with explain():
            step()
        # A step that ran eagerly has its kernels compiled.
        to_capture = done <= captures and step.options.max_new_tokens - done > GRAPH_MIN_TOKENS
        if to_capture and not can_capture(model):
            captures = 0
        elif to_capture:
            try:
                return capture(step, step.options.generator, model.device)
            except CaptureLost:
                raise
            except RuntimeError as error:
                captures = 0 if is_out_of_memory(error) else captures
                step.no_pdl = done < captures
                what = "capturing without dependent launches" if step.no_pdl else "decoding without a CUDA graph"
                warnings.warn(f"generate: {what}, slower: {error}", RuntimeWarning, stacklevel=2)
    return None


def _replay(step: Step, graph: CapturedGraph, explain: Explain) -> Iterator[Any]:
    """Yield the other tokens, whose steps are replays."""
    last = False
    while not last:
        result, last = step.take()
        if not last:  # here, so that the GPU computes while the caller prints a token
            with explain():
                graph()
        yield result
        step.check_cache()


class Step:
    """One token for each of B sequences, on buffers that keep their addresses.

    token     int64 [B]: the newest token; a sequence that has ended repeats its EOS, which `cache` does not hold
    ended     bool [B]
    new       int32 [B]: tokens that the step appends, none of a sequence that has ended
    seen      bool [B,V]: the tokens of each sequence, with a repetition penalty
    measured  the token's log probability [B], the likeliest tokens [B,N] and theirs, with `logprobs`
    taken     tokens of each sequence that the caller has
    no_pdl    whether no launch is dependent
    """

    def __init__(
        self, model: Model, cache: KVCache, options: SamplingOptions, conversation: Conversation | None = None
    ) -> None:
        """`conversation`: that of a cache of the caller, which keeps the tokens."""
        self.model, self.cache, self.options, self.conversation = model, cache, options, conversation
        self.drawn = None if conversation is None else conversation.drawn
        self.taken, self.no_pdl, self.penalizes = 0, False, options.repetition_penalty != 1.0
        B, device = cache.batch, model.device
        stops = sorted(options.stops(model.config))
        self.stops, self.may_end = torch.tensor(stops, dtype=torch.int64, device=device), bool(stops)
        self.token = torch.zeros(B, dtype=torch.int64, device=device)
        self.ended = torch.zeros(B, dtype=torch.bool, device=device)
        self.new = torch.ones(B, dtype=torch.int32, device=device)
        self.measured: tuple[Tensor, ...] = ()
        self.seen = torch.zeros((B, model.config.vocab_size), dtype=torch.bool, device=device)
        if options.logprobs is not None:
            no_steps = Logprobs(*(tensor[:, 0] for tensor in stack_steps([], B, 1, options.logprobs)))
            self.measured = tuple(tensor.to(device, copy=True) for tensor in no_steps[1:])

    def __call__(self) -> None:
        with launch_context(no_pdl=self.no_pdl):
            torch.logical_not(self.ended, out=self.new)
            self.pick(self.model.hidden(self.token[:, None], self.cache, self.new)[:, 0])

    def pick(self, h: Tensor) -> None:
        """Pick the next tokens from the hidden states h [B,H]."""
        logits, options = self.model.head(h), self.options
        scores = penalize(logits, self.seen, options.repetition_penalty) if self.penalizes else logits
        token = sample(scores, options.temperature, options.top_p, options.generator, options.top_k, options.min_p)
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

    def take(self) -> tuple[Any, bool]:
        """Return what `stream` yields, in memory of its own, and whether it is the last."""
        if self.model.ranks is not None:
            self.model.ranks.synchronize(self.model.device)
        if self.drawn is not None:
            self.drawn.append(self.token.clone())
        self.taken += 1
        token, *measured = (tensor.clone() for tensor in (self.token, *self.measured))
        last = self.taken == self.options.max_new_tokens or (self.may_end and bool(self.ended.all()))
        return Logprobs(token, *measured) if measured else token, last

    def check_cache(self) -> None:
        """Raise ValueError where the caller has used the cache since."""
        if self.conversation is not None and (self.conversation.drawn is not self.drawn or self.cache.lengths_written):
            got = "cache has gone on in another call, or its lengths were written"
            raise ValueError(f"generate: {got}, needs a cache that only this one uses")


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

    with_tokenizer: Any = model  # a Mixtral
    ids = [with_tokenizer.tokenizer(row).input_ids if isinstance(row, str) else row for row in ids]
    lists = [isinstance(row, (list, tuple)) and all(map(is_id, row)) for row in ids]
    make = partial(torch.tensor, dtype=torch.int64, device=model.device)
    rows = [make(row) if is_list else row for row, is_list in zip(ids, lists, strict=True)]
    return rows if mask is None else drop_padding(rows, mask)


def check_rows(model: Model, rows: Sequence[Tensor], caller: str, what: str) -> None:
    """Raise ValueError, which names the caller and what a row is, unless these are rows [T] of the vocabulary."""
    for number, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 1 or len(row) == 0:
            need = "int64 [T] or a list of token ids, not empty"
            raise ValueError(f"{caller}: {what} {number} is {describe(row)}, needs {need}")
        check_ids(caller, row[None], model.config.vocab_size, model.device)
    if not readable(rows[0]):
        # the only synchronization of a prompt on a GPU
        check_vocabulary(caller, torch.cat([*rows]), model.config.vocab_size)


def pad(texts: Sequence[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad 1-D texts on the right with token 0 -> ids [B,T], lengths int64 [B], both on the device."""
    lengths = torch.tensor([len(row) for row in texts], device=device)
    return torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True), lengths


def _end_of(tail: Tensor, eos: frozenset[int]) -> int:
    """Return how many tokens there are up to the first EOS, which is counted."""
    ends = (index + 1 for index, token in enumerate(tail.tolist()) if token in eos)
    return next(ends, len(tail))
