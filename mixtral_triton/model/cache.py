"""KVCache: cached keys and values, a ring where the model has a window (Mistral 7B, section 2)."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any

import torch

from ..checkpoint.arguments import check_dtype, default_dtype, is_int, usable_device
from ..checkpoint.config import MixtralConfig
from ..kernels.operation.checks import check_values, readable
from ..kernels.weights.quantized_cache import QuantizedCache, vector_bytes

Slots = torch.Tensor | QuantizedCache  # of one layer, keys or values [B, Hkv, C, D]


def _version(x: torch.Tensor) -> int | None:
    """Return torch's count of writes into `x`; None for a tensor made in inference mode, which has none."""
    return None if x.is_inference() else x._version


def cache_shape(config: MixtralConfig, batch: int, max_len: int) -> tuple[int, ...]:
    """Return the shape of all layers' keys and values: [L, 2, B, Hkv, C, D], C the window where there is one."""
    slots = config.window or min(max_len, config.max_position_embeddings)
    return config.num_hidden_layers, 2, batch, config.num_key_value_heads, slots, config.head_dim


def cache_bytes(config: MixtralConfig, batch: int, max_len: int, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a KVCache's keys and values. dtype None: the config's."""
    dtype = dtype or default_dtype(config)
    *vectors, D = cache_shape(config, batch, max_len)
    return math.prod(vectors) * vector_bytes(D, dtype.itemsize, dtype is torch.int8)


def select_dtype(caller: str, cache_dtype: Any, model_dtype: torch.dtype, cache: KVCache | None = None) -> torch.dtype:
    """Return the dtype of a cache that a caller asks for, or of the one that it has; ValueError for another."""
    allowed = (None, model_dtype, torch.int8) if cache is None else (None, cache.dtype)
    if cache_dtype not in allowed:
        raise ValueError(f"{caller}: cache_dtype is {cache_dtype!r}, needs {' or '.join(map(str, allowed))}")
    return cache_dtype or model_dtype


class KVCache:
    """Ring caches of every layer, and the length of each sequence.

    keys, values  per layer [B, Hkv, C, D], or a QuantizedCache; position p is in slot p mod C, C = sliding_window where
                  a position can leave it, else max_len
    dtype         of the keys; int8: they are quantized as they are appended
    lengths       int32 [B]: tokens appended so far, which is the next position. A lower number written here drops the
                  tokens behind it; where a ring has wrapped only 0 does, since they took the slots of earlier ones. A
                  higher one adds tokens whose keys and values are what the slots hold: zeros, where nothing wrote them
    max_len       tokens that a sequence can reach: the slots, or with a window the model's positions
    conversation  what the tokens are, by which `generate` goes on: conversation.py
    """

    def __init__(
        self,
        config: MixtralConfig,
        batch: int,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`max_len`: tokens that a sequence may reach; unused where a sliding window sizes the ring.

        device None: as in `Mixtral.from_pretrained`. dtype None: the config's, else bfloat16; torch.int8: 8 bits, with
        a scale for each token and head, for a model of any dtype.
        """
        if not isinstance(config, MixtralConfig):
            raise ValueError(f"KVCache: config is a {type(config).__name__}, needs a MixtralConfig: model.config")
        if not is_int(batch, 1):
            raise ValueError(f"KVCache: batch is {batch!r}, needs an integer of at least 1")
        required = config.sliding_window is None or (config.window is None and max_len is not None)
        if required and not is_int(max_len, 1):
            need = "an integer of at least 1: this model has no sliding window that a position can leave"
            raise ValueError(f"KVCache: max_len is {max_len!r}, needs {need}")
        device = usable_device(device)
        dtype = default_dtype(config) if dtype is None else dtype
        check_dtype("KVCache: dtype", dtype, torch.int8)
        self.config, self.dtype = config, dtype
        self.window, limit = config.window, config.max_position_embeddings
        shape = cache_shape(config, batch, max_len or limit)
        self.slots = shape[4]
        self.max_len = limit if self.window else self.slots
        # Memory of their own: `ops.append` says why.
        self.keys, self.values = (tuple(self._zeros(shape[2:], device) for _ in range(shape[0])) for _ in range(2))
        with torch.inference_mode(False):  # outside of it, torch refuses to write into what was made within
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._known, self._version = 0, _version(self.lengths)
        self.replayed = False  # whether a captured graph, which a caller may replay, appends
        self.conversation: Any = None
        self.appending: torch.Tensor | None = None  # int [B]: the tokens of a forward that may have written some
        # Of each sequence, the least length but 0 with which no key is overwritten that its next token sees, where what
        # was written beyond `lengths`, by a forward that failed or by tokens that were dropped, may have taken one.
        self.valid_from = [0] * batch

    def _zeros(self, shape: tuple[int, ...], device: torch.device) -> Slots:
        """Return the slots of a layer's keys or values [B, Hkv, C, D]: zeros, so that none holds uninitialized bits."""
        try:
            with torch.inference_mode(False):  # as in `__init__`
                if self.dtype is torch.int8:
                    return QuantizedCache.empty(*shape, device=device).zero_()
                return torch.zeros(shape, dtype=self.dtype, device=device)
        except torch.OutOfMemoryError:  # a smaller batch may fit, and a caller may try
            raise
        except (RuntimeError, OverflowError, TypeError) as error:
            got = f"batch {shape[0]} with {shape[2]} slots"
            raise ValueError(f"KVCache: {got} is more than torch can allocate, needs a smaller batch") from error

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def reused(self) -> list[int]:
        """Of each sequence, the tokens that the last `generate` with this cache did not compute again."""
        return [0] * self.batch if self.conversation is None else list(self.conversation.reused)

    def reserve(self, new: torch.Tensor | int) -> None:
        """Raise ValueError where a sequence has no room for `new` more tokens, int [B] or one number for all.

        Nothing is read back from a GPU. There the host knows only what it appended to all sequences alike. What it
        cannot know (ragged chunks, lengths written by hand, replays of a graph) the kernels check: a sequence beyond
        `max_len` becomes NaN, and its slots of the ring are overwritten.
        """
        self.check_intact()
        check_values("KVCache", "lengths", self.lengths, 0, self.max_len)
        if readable(self.lengths):
            reached = int((self.lengths.long() + new).max())
        else:
            reached = 0 if isinstance(new, torch.Tensor) else self._min_length() + new
        self.check_length(reached)

    def check_intact(self) -> None:
        """Raise ValueError where a forward failed after it had overwritten keys of the ring that its tokens see."""
        self.note_failure()
        if not any(self.valid_from):  # then nothing is read
            return
        lengths = self.lengths.tolist()
        # A sequence that starts anew needs no key, and one that has gone on since has its own.
        self.valid_from = [least if 0 < n <= least else 0 for least, n in zip(self.valid_from, lengths, strict=True)]
        if any(n < least for least, n in zip(self.valid_from, lengths, strict=True)):
            got = "a forward failed after it had overwritten keys of the ring that its tokens see"
            raise ValueError(f"KVCache: {got}: needs a new cache, or lengths of 0")

    def note_failure(self) -> None:
        """Move `valid_from` by what a forward that failed may have written, before anyone changes its tensors."""
        if self.appending is None:
            return
        capturing = self.lengths.is_cuda and torch.cuda.is_current_stream_capturing()  # then nothing has run
        if self.window and not capturing:
            with suppress(RuntimeError):  # of a GPU that no longer answers; the caller has its first error
                self.valid_from = self._least_behind((self.lengths + self.appending).tolist())
        self.appending = None

    def least_lengths(self) -> list[int]:
        """Return of each sequence the least length, but 0, that it can be set back to."""
        self.note_failure()
        return self._least_behind(self.lengths.tolist())

    def _least_behind(self, written: list[int]) -> list[int]:
        """Return `least_lengths` where slots were written up to these positions. One token may go: it took the slot of
        a key that its own query does not see either."""
        least = [n - 1 if self.window and n > self.slots else 0 for n in written]
        return [*map(max, least, self.valid_from)]

    def set_back(self, lengths: list[int]) -> None:
        """Drop the tokens behind these lengths, each 0 or at least its `least_lengths`."""
        least = self.least_lengths()
        if lengths != self.lengths.tolist():
            self.lengths.copy_(torch.tensor(lengths))
        self.valid_from = [least if n else 0 for least, n in zip(least, lengths, strict=True)]

    def check_length(self, reached: int) -> None:
        """Raise ValueError where `reached` tokens of a sequence are more than the cache can hold."""
        if reached > self.max_len:
            what, advice = "cache's slots", "a larger max_len or fewer tokens"
            if self.max_len == self.config.max_position_embeddings:
                what, advice = "max_position_embeddings", "fewer tokens"
            got = f"a sequence would reach {reached} tokens, beyond the {what}, {self.max_len}"
            raise ValueError(f"KVCache: {got}: needs {advice}")

    def advance(self, new: torch.Tensor, common: int) -> None:
        """Count the `new` [B] tokens that every layer appended; `common`: the least number of any sequence."""
        if torch.compiler.is_compiling():  # a host counter would compile a graph for each count
            self.lengths += new
            return
        known = self._min_length() + common
        self.lengths += new
        self.appending = None  # last: what has failed is not counted
        if self.lengths.is_cuda and torch.cuda.is_current_stream_capturing():
            self.replayed = True
        self._known, self._version = known, _version(self.lengths)

    def _min_length(self) -> int:
        """Return the tokens that each sequence holds at least, as far as the host knows."""
        unknown = self._version is None or self.lengths_written or self.replayed
        return 0 if unknown else self._known

    @property
    def lengths_written(self) -> bool:
        """Whether a caller has written `lengths` since the last forward, as far as torch counts writes."""
        return _version(self.lengths) != self._version

    def grow(self, max_len: int) -> None:
        """Make room for `max_len` tokens, at most the model's positions, layer by layer: beside the new slots are the
        old ones of one layer. Not of a ring. Where it fails, the cache cannot be used any more."""
        shape = cache_shape(self.config, self.batch, max_len)[2:]
        layers, self.keys, self.values = [*self.keys, *self.values], (), ()
        for index, old in enumerate(layers):
            layers[index] = new = self._zeros(shape, self.lengths.device)
            new[:, :, : self.slots].copy_(old)  # type: ignore[arg-type]
        self.keys, self.values = tuple(layers[: len(layers) // 2]), tuple(layers[len(layers) // 2 :])
        self.slots = self.max_len = shape[2]
