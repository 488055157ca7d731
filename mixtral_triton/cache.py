"""KVCache: keys and values of what was read so far, a ring where the model has a window (Mistral, section 2)."""

from __future__ import annotations

from typing import Any

import torch

from .config import MixtralConfig
from .inputs import check_dtype, usable_device
from .ops import readable


def _version(x: torch.Tensor) -> int | None:
    """Changes with every write into `x`; None where torch does not count them, for a tensor made in inference mode."""
    return None if x.is_inference() else x._version


def _capturing(x: torch.Tensor) -> bool:
    """Whether what is written into `x` is written when a CUDA graph is replayed, not now."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _counts(value: Any) -> bool:
    """Whether it is a number of things, at least one; a compiler's, too."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and bool(value >= 1)


class KVCache:
    """Ring caches of every layer, and where each sequence stands.

    keys, values  per layer [B, Hkv, C, D]; position p lies in slot p mod C, C = sliding_window, else max_len
    lengths       int32 [B]: tokens appended so far, which is the position of the next one
    max_len       tokens a sequence can reach: the slots, or with a window the model's positions
    """

    def __init__(
        self,
        config: MixtralConfig,
        batch: int,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`max_len`: tokens a sequence may reach; a sliding window sizes the ring itself and needs none.

        device None: the GPU if there is one, else the CPU. dtype None: the config's, else bfloat16.
        """
        if not isinstance(config, MixtralConfig):
            raise ValueError(f"KVCache: config is a {type(config).__name__}, needs a MixtralConfig: model.config")
        if not _counts(batch):
            raise ValueError(f"KVCache: batch is {batch!r}, needs an integer of at least 1")
        if config.sliding_window is None and not _counts(max_len):
            need = "an integer of at least 1: this model has no sliding window"
            raise ValueError(f"KVCache: max_len is {max_len!r}, needs {need}")
        device = usable_device(device)
        dtype = getattr(torch, config.dtype or "bfloat16") if dtype is None else dtype
        check_dtype("KVCache", dtype)
        self.config = config
        self.window = config.sliding_window
        self.slots: int = config.sliding_window or max_len or 1
        limit = config.max_position_embeddings
        self.max_len = limit if self.window else min(self.slots, limit)
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, self.slots, config.head_dim)
        # Zeros, so that no slot ever holds bits that nobody wrote.
        storage = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = zip(*(layer.unbind(0) for layer in storage.unbind(0)), strict=True)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._known, self._version, self._replayed = 0, _version(self.lengths), False

    @property
    def batch(self) -> int:
        return len(self.lengths)

    def reserve(self, new: torch.Tensor | int) -> None:
        """ValueError where a sequence has no room for `new` more tokens, int [B] or one number for all.

        Nothing is read back from a GPU. There the host only knows what it gave to every sequence alike; what it cannot
        know (ragged chunks, lengths written by hand, replays of a graph) the device sees itself: a sequence beyond
        `max_len` is NaN, and its slots of the ring take what it writes.
        """
        if torch.compiler.is_compiling():
            return
        if readable(self.lengths):
            if int(self.lengths.min()) < 0:
                raise ValueError(f"KVCache: lengths holds {int(self.lengths.min())}, needs numbers of at least 0")
            reached = int((self.lengths.long() + new).max())
        else:
            reached = 0 if isinstance(new, torch.Tensor) else self._certain() + new
        if reached > self.max_len:
            limit = self.config.max_position_embeddings
            what, less = "cache's slots", "a larger max_len or fewer tokens"
            if self.max_len == limit:
                what, less = "max_position_embeddings", "fewer tokens"
            raise ValueError(
                f"KVCache: a sequence would reach {reached} tokens, beyond the {what}, {self.max_len}: give {less}"
            )

    def advance(self, new: torch.Tensor, alike: int) -> None:
        """Count the `new` [B] tokens that every layer has appended; `alike`: how many of them each sequence has."""
        if torch.compiler.is_compiling():  # what is counted here would be another graph for each count
            self.lengths += new
            return
        known = self._certain() + alike
        self.lengths += new
        self._replayed = self._replayed or _capturing(self.lengths)
        self._known, self._version = known, _version(self.lengths)

    def _certain(self) -> int:
        """Tokens that each sequence holds for certain, as far as the host knows."""
        written = self._version is None or _version(self.lengths) != self._version  # by somebody else, maybe
        return 0 if written or self._replayed else self._known
