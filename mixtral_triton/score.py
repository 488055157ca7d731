"""The log probability of each token of given texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import KVCache
from .generate import check_texts, pad, run_chunks

if TYPE_CHECKING:
    from .model import Mixtral

LOGITS = 1 << 26  # numbers of logits that are held at once


@torch.inference_mode(False)  # outermost: leaving inference mode turns gradients on
@torch.no_grad()
def score(model: Mixtral, texts: Tensor | Sequence[Tensor], *, cache_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return fp32 [T - 1] of each text, int64 [T]: the log probability of each token but the first after those before.

    Texts may differ in length and run in chunks, as prompts of `generate` do; `cache_dtype` as there. Raises ValueError
    for no text, one without a token, an id outside the vocabulary, and one beyond max_position_embeddings.
    """
    if not isinstance(texts, (list, tuple, Tensor)) or (isinstance(texts, Tensor) and not texts.dim()):
        raise ValueError(f"score: texts is a {type(texts).__name__}, needs a list of tensors [T]")
    rows = list(texts)
    check_texts(model, rows, "score: text")
    ids, lengths = pad(rows, model.device)
    if ids.shape[1] > (limit := model.config.max_position_embeddings):
        raise ValueError(f"score: a text of {ids.shape[1]} tokens is beyond max_position_embeddings, {limit}")
    if cache_dtype not in (None, model.dtype, torch.int8):
        raise ValueError(
            f"score: cache_dtype is {cache_dtype!r}, needs None, {model.dtype}, the model's, or torch.int8"
        )
    cache = KVCache(model.config, len(rows), ids.shape[1], model.device, cache_dtype or model.dtype)
    targets, found = F.pad(ids[:, 1:], (0, 1)), []
    for start, h, _ in run_chunks(model, cache, ids, lengths):
        chunk = h.flatten(0, 1), targets[:, start : start + h.shape[1]].flatten()
        parts = zip(*(each.split(max(1, LOGITS // model.full_config.vocab_size)) for each in chunk), strict=True)
        found.append(
            torch.cat([-F.cross_entropy(model.head(x), y, reduction="none") for x, y in parts]).view(h.shape[:2])
        )
    return [scores[: len(row) - 1].clone() for scores, row in zip(torch.cat(found, dim=1), rows, strict=True)]
