"""KVCache: keys and values of what was read so far, a ring where the model has a window (Mistral, section 2)."""

from __future__ import annotations

import torch

from .config import MixtralConfig


def _version(x: torch.Tensor) -> int | None:
    """Changes with every write into `x`; None where torch does not count them, for a tensor made in inference mode."""
    return None if x.is_inference() else x._version


class KVCache:
    """Ring caches of every layer, and where each sequence stands.

    keys, values  per layer [B, Hkv, C, D]; position p lies in slot p mod C, C = sliding_window, else max_len
    lengths       int32 [B]: tokens appended so far, which is the position of the next one
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
        if batch < 1:
            raise ValueError(f"KVCache: batch is {batch}, needs at least 1")
        if config.sliding_window is None and (max_len is None or max_len < 1):
            raise ValueError(f"KVCache: max_len is {max_len}, needs at least 1: this model has no sliding window")
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or getattr(torch, config.dtype or "bfloat16")
        self.config = config
        self.window = config.sliding_window
        self.slots: int = config.sliding_window or max_len or 1
        shape = (config.num_hidden_layers, 2, batch, config.num_key_value_heads, self.slots, config.head_dim)
        # Zeros, so that no slot ever holds bits that nobody wrote.
        storage = torch.zeros(shape, dtype=dtype, device=device)
        self.keys, self.values = zip(*(layer.unbind(0) for layer in storage.unbind(0)), strict=True)
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self._longest, self._version = 0, _version(self.lengths)

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def max_len(self) -> int:
        """Tokens a sequence can reach: the slots, or with a window the model's positions."""
        limit = self.config.max_position_embeddings
        return limit if self.window else min(self.slots, limit)

    def reserve(self, new: torch.Tensor | int, at_most: int) -> None:
        """Make sure that every sequence has room for `new` more (int [B] or one for all, none more than `at_most`).

        The host keeps an upper bound of the lengths, so that the device is asked only where the bound says "full".
        """
        if self.lengths.is_meta or torch.compiler.is_compiling():
            return
        version = _version(self.lengths)
        foreign = version is None or version != self._version  # somebody else may have written into them
        if foreign or self._longest + at_most > self.max_len:
            self._longest = int(self.lengths.max())
        if self._longest + at_most > self.max_len:
            reached = int((self.lengths + new).max())
            if reached > self.max_len:
                limit = self.config.max_position_embeddings
                what = "max_position_embeddings" if self.max_len == limit else "cache's slots"
                raise ValueError(
                    f"KVCache: a sequence would reach {reached} tokens, beyond the {what}, {self.max_len}: "
                    "give a larger max_len or fewer tokens"
                )
        self._version = _version(self.lengths)

    def advance(self, new: torch.Tensor, at_most: int) -> None:
        """Count the `new` [B] tokens that every layer has appended, none of them more than `at_most`."""
        self.lengths += new
        self._longest, self._version = self._longest + at_most, _version(self.lengths)
