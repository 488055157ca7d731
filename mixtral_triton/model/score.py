"""The log probability of each token of given texts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.arguments import check_positions
from .cache import KVCache, select_dtype
from .generate import Prompt, check_rows, pad, run_chunks, to_rows
from .memory_plan import explain_out_of_memory
from .model import Model

LOGITS = 1 << 26  # numbers of logits that are held at once


@torch.inference_mode(False)  # outermost: leaving inference mode turns gradients on
@torch.no_grad()
def score(model: Model, texts: Tensor | Sequence[Prompt], *, cache_dtype: torch.dtype | None = None) -> list[Tensor]:
    """Return fp32 [T - 1] of each text: the log probability of each token but the first after those before it.

    A text is int64 [T], a list of integers, or a str for `model.tokenizer`. Texts may differ in length and run in
    chunks, as prompts of `generate` do; `cache_dtype` as there. Raises ValueError for no text, one without a token, an
    id outside the vocabulary, and one beyond max_position_embeddings.
    """
    rows = to_rows(model, texts, argument="score: texts")
    check_rows(model, rows, "score", "text")
    ids, lengths = pad(rows, model.device)
    dtype = select_dtype("score", cache_dtype, model.dtype)
    check_positions(f"score: the {ids.shape[1]} tokens of a text", ids.shape[1], model.config)
    with explain_out_of_memory("score", model.device, len(rows), ids.shape[1]):
        cache = KVCache(model.config, len(rows), ids.shape[1], model.device, dtype)
        targets, chunk_scores, at_once = F.pad(ids[:, 1:], (0, 1)), [], max(1, LOGITS // model.config.vocab_size)
        for start, h, _ in run_chunks(model, cache, ids, lengths):
            chunk = h.flatten(0, 1), targets[:, start : start + h.shape[1]].flatten()
            parts = zip(*(tensor.split(at_once) for tensor in chunk), strict=True)
            losses = [F.cross_entropy(model.head(x), token, reduction="none") for x, token in parts]
            chunk_scores.append(-torch.cat(losses).view(h.shape[:2]))
        return [
            scores[: len(row) - 1].clone() for scores, row in zip(torch.cat(chunk_scores, dim=1), rows, strict=True)
        ]
