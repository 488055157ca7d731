"""The decode loop: prefill in chunks, then one token a step; greedy, or sampled by temperature, top-k, top-p and min-p.

On a GPU the step is captured in a CUDA graph and replayed: its buffers keep their addresses, positions and routes are
read on the device, and the host waits for at most one value a token, whether every sequence has ended.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .cache import KVCache
from .inputs import check_ids, check_vocabulary, is_int
from .kernels.call import untraced
from .kernels.checks import readable
from .kernels.launch import launch_context, launches_dependently
from .kernels.offload import call_runtime as _call_runtime

if TYPE_CHECKING:
    from .model import Mixtral

Sampling = tuple[float, float, torch.Generator | None, int | None, float]  # the arguments of `sample` after the logits
MIN_TEMPERATURE = 1e-30
TINY = torch.finfo(torch.float32).tiny  # in fp32 a smaller number may be 0
PREFILL_CHUNK = 2048  # tokens: bounds the activations of a long prompt
GRAPH_MIN_TOKENS = 4  # remaining tokens that are worth a capture, which takes the host time of about two steps
_lock = threading.Lock()  # captures take turns, as they share a stream
_streams: dict[int, torch.cuda.Stream] = {}  # by device: torch draws streams from a pool, where others get the same
_lost: list[Any] = []  # graphs whose capture did not end: torch's allocators still call them
_INVALIDATED, _THREAD_LOCAL = 2, 1  # cudaStreamCaptureStatus, cudaStreamCaptureMode


@torch.no_grad()
def generate(
    model: Mixtral,
    input_ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    min_p: float = 0.0,
    cache_dtype: torch.dtype | None = None,
) -> Tensor | list[Tensor]:
    """Continue prompts: int64 [B,T] -> [B,T+n], or a list of prompts, each int64 [T] or a list of integers -> a list of
    prompts [T] with what follows them.

    temperature 0, the default whatever generation_config.json says, is greedy; else logits are divided by it, and of
    the top_k most likely tokens (None: of all) the smallest set with probability top_p is sampled from (Fan et al.
    2018, Holtzman et al. 2020), without those less likely than min_p times the likeliest (Nguyen et al. 2024).
    eos_token_id None: the config's, which are those of both files. A sequence ends with its EOS included; in a
    [B,T+n] result it is padded with it. cache_dtype None: the model's; torch.int8: keys and values in 8 bits (KVCache).
    """
    sampling: Any = {"generator": generator, "top_k": top_k, "min_p": min_p, "cache_dtype": cache_dtype}
    steps = stream(model, input_ids, max_new_tokens, temperature, top_p, eos_token_id, **sampling)
    rows, eos = _prompts(model, input_ids), eos_ids(eos_token_id, model.config)
    none = torch.empty((len(rows), 0), dtype=torch.int64, device="cpu")  # whatever a caller's default device is
    new = torch.stack(list(steps), dim=1).cpu() if max_new_tokens else none
    if isinstance(input_ids, Tensor):
        padding = new[:, -1:].expand(-1, max_new_tokens - new.shape[1])  # EOS, where the loop stopped early
        return torch.cat((torch.stack(rows), torch.cat((new, padding), dim=1).to(rows[0].device)), dim=1)
    return [torch.cat((row, _cut(tail, eos).to(row.device))) for row, tail in zip(rows, new, strict=True)]


def stream(
    model: Mixtral,
    input_ids: Tensor | Sequence[Tensor | Sequence[int]],
    max_new_tokens: int = 32,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    *,
    top_k: int | None = None,
    min_p: float = 0.0,
    cache_dtype: torch.dtype | None = None,
) -> Iterator[Tensor]:
    """Check the arguments, those of `generate`, then return an iterator over the next tokens, int64 [B] on the model's
    device. A sequence that has ended repeats its EOS; the iterator ends once every sequence has."""
    if not isinstance(input_ids, (list, tuple)) and not (isinstance(input_ids, Tensor) and input_ids.dim()):
        got = "one number" if isinstance(input_ids, Tensor) else f"a {type(input_ids).__name__}"
        raise ValueError(f"generate: input_ids is {got}, needs a tensor [B, T] or a list of prompts [T]")
    eos = eos_ids(eos_token_id, model.config)
    dtypes = None, model.dtype, torch.int8
    finite = _is_number(temperature) and 0.0 <= temperature <= sys.float_info.max
    is_generator = generator is None or isinstance(generator, torch.Generator)
    same_device = not isinstance(generator, torch.Generator) or generator.device.type == model.device.type
    for name, got, valid, need in (
        ("max_new_tokens", repr(max_new_tokens), is_int(max_new_tokens, 0), "an integer of at least 0"),
        ("temperature", repr(temperature), finite, "a finite number of at least 0"),
        ("top_p", repr(top_p), _is_number(top_p) and 0.0 < top_p <= 1.0, "a number above 0, at most 1"),
        ("top_k", repr(top_k), top_k is None or is_int(top_k, 1), "an integer of at least 1, or None"),
        ("min_p", repr(min_p), _is_number(min_p) and 0.0 <= min_p <= 1.0, "a number from 0 to 1"),
        ("cache_dtype", repr(cache_dtype), cache_dtype in dtypes, f"None, {model.dtype}, the model's, or torch.int8"),
        ("the model", "on the meta device, which holds no numbers", model.device.type != "meta", "a CPU or a GPU"),
        ("generator", f"a {type(generator).__name__}", is_generator, "a torch.Generator"),
        ("generator", f"on {getattr(generator, 'device', None)}", same_device, f"the model's device, {model.device}"),
    ):
        if not valid:
            raise ValueError(f"generate: {name} is {got}, needs {need}")
    ids, lengths = _pad_prompts(model, _prompts(model, input_ids))
    limit = model.config.max_position_embeddings
    if ids.shape[1] + max_new_tokens > limit:
        got = f"a prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones"
        raise ValueError(f"generate: {got} go beyond max_position_embeddings, {limit}")
    if generator is None and temperature > 0.0 and model.device.type == "cuda":
        # Not torch's own, in which another thread cannot draw during a capture: seeded by it, as a data loader is.
        generator = torch.Generator(model.device).manual_seed(int(torch.randint(1 << 62, (), device="cpu")))
    dtype = model.dtype if cache_dtype is None else cache_dtype
    return _stream(model, ids, lengths, max_new_tokens, eos, (temperature, top_p, generator, top_k, min_p), dtype)


@torch.inference_mode(False)  # outermost: leaving inference mode turns gradients on
@torch.no_grad()
def _stream(
    model: Mixtral, ids: Tensor, lengths: Tensor, n: int, eos: frozenset[int], sampling: Sampling, dtype: torch.dtype
) -> Iterator[Tensor]:
    if n == 0:
        return
    cache = KVCache(model.config, len(ids), ids.shape[1] + n, device=model.device, dtype=dtype)
    step = Step(model, cache, eos, sampling)
    step.pick(prefill(model, cache, ids, lengths))
    replay: Any = None
    captures = 1 + (model.ranks is None and launches_dependently(model.device))
    try:
        for done in range(1, n + 1):
            if model.ranks is not None:
                model.ranks.synchronize(model.device)
            yield step.token.clone()
            if done == n or (eos and bool(step.ended.all())):
                return
            (replay or step)()
            # A step that ran eagerly has its kernels compiled.
            to_capture = replay is None and done <= captures and n - done > GRAPH_MIN_TOKENS
            if to_capture and not can_capture(model):
                captures = 0
            elif to_capture:
                try:
                    replay = capture(step, sampling[2], model.device)
                except CaptureLost:
                    raise
                except RuntimeError as error:
                    step.no_pdl = done < captures
                    what = "capturing without dependent launches" if step.no_pdl else "decoding without a CUDA graph"
                    warnings.warn(f"generate: {what}, slower: {error}", RuntimeWarning, stacklevel=2)
    finally:
        if replay is not None:  # `destroy_process_group` waits for a graph that holds collectives
            replay.__self__.reset()


class Step:
    """One token for each of B sequences, on buffers that keep their addresses.

    token  int64 [B]: the newest token; a sequence that has ended repeats its EOS
    ended  bool [B]
    no_pdl: whether no launch is dependent
    """

    def __init__(self, model: Mixtral, cache: KVCache, eos: frozenset[int], sampling: Sampling) -> None:
        self.model, self.cache, self.sampling, self.no_pdl = model, cache, sampling, False
        self.stops = torch.tensor(sorted(eos), dtype=torch.int64, device=model.device)
        self.token = torch.zeros(cache.batch, dtype=torch.int64, device=model.device)
        self.ended = torch.zeros(cache.batch, dtype=torch.bool, device=model.device)

    def __call__(self) -> None:
        with launch_context(no_pdl=self.no_pdl):
            self.pick(self.model.hidden(self.token[:, None], self.cache)[:, 0])

    def pick(self, h: Tensor) -> None:
        """Pick the next tokens from the hidden states h [B,H]."""
        token = sample(self.model.head(h), *self.sampling)
        if self.model.ranks is not None:
            token = self.model.ranks.broadcast(token)
        self.token.copy_(torch.where(self.ended, self.token, token))
        self.ended |= (self.token[:, None] == self.stops).any(-1)


def can_capture(model: Mixtral) -> bool:
    """Whether a replay does what the model's step does, with a warning where it would not call a caller's code."""
    if model.device.type != "cuda" or not untraced():
        return False
    if change := model.find_change():
        text = f"generate: decoding without a CUDA graph, slower: {change}, and a replay would not run that code"
        warnings.warn(text, RuntimeWarning, stacklevel=3)
    return change is None


def prefill(model: Mixtral, cache: KVCache, ids: Tensor, lengths: Tensor) -> Tensor:
    """Run the right-padded prompts ids [B,T] in chunks -> the hidden state of each one's last token, [B,H]."""
    last, size = torch.empty(0), model.prefill_chunk
    for start in range(0, ids.shape[1], size):
        chunk = ids[:, start : start + size]
        new = (lengths - start).clamp(0, chunk.shape[1]).to(torch.int32)
        h = model.hidden(chunk, cache, new)
        end = h[torch.arange(len(h), device=h.device), (new - 1).clamp(min=0).long()]
        last = torch.where((new > 0)[:, None], end, last) if start else end
    return last


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


def _prompts(model: Mixtral, input_ids: Any) -> list[Any]:
    """Return the prompts, a list of integers as int64 [T] on the model's device; what is wrong stays as it is."""
    of_integers = [
        isinstance(row, (list, tuple)) and all(is_int(x, 0) and x < 1 << 63 for x in row) for row in input_ids
    ]
    to_ids = partial(torch.tensor, dtype=torch.int64, device=model.device)
    return [to_ids(row) if right else row for row, right in zip(input_ids, of_integers, strict=True)]


def _pad_prompts(model: Mixtral, prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad 1-D prompts on the right with token 0 -> ids [B,T], lengths int64 [B], both on the model's device."""
    if not prompts:
        raise ValueError("generate: there is no prompt, needs at least one")
    for number, row in enumerate(prompts):
        if not isinstance(row, Tensor) or row.dim() != 1 or len(row) == 0:
            got = f"of shape {list(row.shape)}" if isinstance(row, Tensor) else f"a {type(row).__name__}"
            raise ValueError(
                f"generate: prompt {number} is {got}, needs int64 [T] or a list of token ids, at least one"
            )
        check_ids(row[None], model.config.vocab_size, model.device)
    lengths = torch.tensor([len(row) for row in prompts], device=model.device)
    ids = torch.nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)
    if not readable(ids):
        check_vocabulary(ids, model.config.vocab_size)  # the only synchronization of a prompt on a GPU
    return ids, lengths


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


def _cut(tail: Tensor, eos: frozenset[int]) -> Tensor:
    """Cut after the first EOS."""
    ends = (index + 1 for index, token in enumerate(tail.tolist()) if token in eos)
    return tail[: next(ends, len(tail))]


class CaptureLost(RuntimeError):
    """A capture failed, and its side effects could not be reverted."""


def capture(step: Callable[[], object], generator: torch.Generator | None, device: torch.device) -> Callable[[], None]:
    """Capture the launches of `step` on `device` and return the replay. Nothing runs; `step` must have run before.

    `generator`: the one that the step draws from, if any. Other threads may use the device, but not synchronize it as
    `torch.cuda.graph` does. Raises RuntimeError where the step cannot be captured, as one that reads a value, or the
    graph not instantiated: stream, allocators and generators are then as before. Raises CaptureLost where they are not.
    """
    with _lock, torch.cuda.device(device), _no_collection():
        graph = torch.cuda.CUDAGraph(keep_graph=True)  # the end of a capture then instantiates nothing, which may fail
        if generator is not None:  # here, because torch up to 2.12 allocates its seed on the current device
            graph.register_generator_state(generator)
        if (current := torch.cuda.current_device()) not in _streams:
            _streams[current] = torch.cuda.Stream()
        with torch.cuda.stream(stream := _streams[current]):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("another capture has the stream")
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                _end(graph, stream, device, failed=True)
                raise
            _end(graph, stream, device, failed=False)
        try:
            graph.instantiate()
        except RuntimeError:  # no memory is left, or the driver has no such edges: nothing is captured any more
            graph.reset()
            raise
    return graph.replay


@contextmanager
def _no_collection() -> Iterator[None]:
    """Collect no garbage within the block, because a finalizer that synchronizes would invalidate a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end(graph: Any, stream: torch.cuda.Stream, device: torch.device, failed: bool) -> None:
    """End a capture; raise RuntimeError where it was invalidated although the step did not fail.

    The end of an invalidated capture raises before torch has closed its pools of device and host memory and released
    the generators. An empty capture therefore takes its place, which torch ends completely.
    """
    handle, status, captured = ctypes.c_void_p(stream.cuda_stream), ctypes.c_int(), ctypes.c_void_p()
    with suppress(AttributeError, OSError):  # a valid capture needs none of these calls
        _call_runtime("StreamIsCapturing", handle, ctypes.byref(status))
    try:
        if invalid := failed or status.value == _INVALIDATED:
            _call_runtime("StreamEndCapture", handle, ctypes.byref(captured))
            _call_runtime("GetLastError")  # else torch raises it at its next launch
            if captured.value is not None:
                _call_runtime("GraphDestroy", captured)
            _call_runtime("StreamBeginCapture", handle, ctypes.c_int(_THREAD_LOCAL))
        graph.capture_end()
    except (AttributeError, OSError, RuntimeError) as error:
        _lost.append(graph)
        raise CaptureLost(
            f"the capture of a CUDA graph failed, and {device} is still in it: memory that it allocated is lost, and "
            f"random numbers cannot be drawn there. Restart the process without a graph. ({error})"
        ) from error
    if invalid:
        graph.reset()
    if invalid and not failed:
        raise RuntimeError("the capture was invalidated, perhaps by a synchronization in another thread")
