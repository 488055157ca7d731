"""Conversation: the texts whose keys a cache holds, by which `generate` knows what it need not compute again."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch

from ..kernels.operation.checks import readable
from .cache import KVCache

Identity = tuple[weakref.ref[Any], torch.dtype]  # of a model, and its dtype: `Model.identity`


class Conversation:
    """What a cache's tokens are, and the model that computed their keys.

    filled_by  the model, and its dtype then; None: not known
    texts      the tokens of each sequence, `drawn` behind them: the first `KVCache.lengths` of these are held. None: a
               forward on a GPU, where the host reads no value, or in a graph has appended others
    drawn      int64 [B] each: what `generate` has drawn
    reused     of each sequence: the tokens that the last `generate` did not compute again
    """

    def __init__(self, cache: KVCache) -> None:
        self.filled_by: Identity | None = None
        self.texts: list[list[int]] | None = [[] for _ in range(cache.batch)]
        self.drawn: list[torch.Tensor] = []
        self.reused = [0] * cache.batch
        cache.conversation = self

    @classmethod
    def of(cls, cache: KVCache) -> Conversation:
        """Return the conversation that a cache holds, or a new one."""
        return cls(cache) if cache.conversation is None else cache.conversation

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"filled_by": None}  # a weak reference cannot be pickled

    def is_of_another(self, cache: KVCache, identity: Identity) -> bool:
        """Return whether tokens in the cache are not those of the model of `identity`, as far as is known."""
        return self.filled_by not in (None, identity) and bool(cache.lengths.any())

    def held_tokens(self, cache: KVCache) -> list[list[int]] | None:
        """Return the tokens of each sequence that are held; None where the host does not know them."""
        lengths = cache.lengths.tolist()
        if not any(lengths):
            return [[] for _ in lengths]
        if self.texts is None or cache.replayed:
            return None
        drawn = torch.stack(self.drawn, dim=1).tolist() if self.drawn else [[]] * len(lengths)
        texts = [(text + ids)[:length] for text, ids, length in zip(self.texts, drawn, lengths, strict=True)]
        return texts if [*map(len, texts)] == lengths else None  # else a caller wrote a larger length

    def note_forward(self, cache: KVCache, identity: Identity, ids: torch.Tensor, new: torch.Tensor | None) -> None:
        """Note the tokens of a caller's forward, ids [B,T] and the `new` [B] of them that exist; None: all."""
        texts = self.held_tokens(cache) if readable(ids) and readable(cache.lengths) else None
        if texts is not None:
            counts = [ids.shape[1]] * len(texts) if new is None else new.tolist()
            texts = [text + row[:count] for text, row, count in zip(texts, ids.tolist(), counts, strict=True)]
        self.texts, self.drawn, self.filled_by = texts, [], identity

    def begin(self, cache: KVCache, identity: Identity, texts: list[list[int]]) -> list[int]:
        """Set the cache back to what it holds of each text, for the model of `identity` -> the numbers of these tokens,
        at most all but the last of a text, whose logits are wanted. Warns where none can stay: the tokens are another
        model's or unknown, or a ring has lost keys."""
        other, reasons, reused = self.is_of_another(cache, identity), set[str](), list[int]()
        held = None if other else self.held_tokens(cache)
        if other:
            reasons.add("the cache was filled by another model, or in another dtype")
        elif held is None:
            reasons.add("a forward on a GPU or a graph has appended tokens that the host does not know")
        for text, old, least in zip(texts, held or [[]] * len(texts), cache.least_lengths(), strict=True):
            pairs = enumerate(zip(old, text[:-1], strict=False))
            same = next((i for i, (a, b) in pairs if a != b), min(len(old), len(text) - 1))
            if 0 < same < least:
                reasons.add(f"other tokens are in the cache from {same} on, and its ring has moved on")
                same = 0
            reused.append(same)
        if reasons:
            message = f"generate: a text is computed from its start: {'; '.join(sorted(reasons))}"
            warnings.warn(message, RuntimeWarning, stacklevel=2)
        cache.set_back(reused)
        self.texts, self.drawn, self.reused, self.filled_by = texts, [], reused, identity
        return reused
