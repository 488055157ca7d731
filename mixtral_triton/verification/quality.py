"""How well a model predicts a text.

N tokens of a text, T tokens of a window, H hidden, V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import parse_json_object
from ..inputs import check_ids, check_vocabulary

HELD_OUT = "heldout.json"  # of a checkpoint's folder: {"ids": tokens of a text that it was not trained on}
CONTEXT = 2048  # tokens of a window at most
ROWS = 256  # tokens whose logits are there at once

Window = tuple[Tensor, Tensor]  # tokens to read, and those behind each of them, int64 [T] both


def perplexity(model: Any, ids: Tensor, context: int | None = None) -> float:
    """exp of the mean loss of a text, int64 [N], by the model's own forward.

    Each token but the first is predicted once, from at most `context` tokens before it; None: the model's positions, or
    CONTEXT where they are more. The loss is summed in fp64. ValueError for less than two tokens, for what is no text.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1 or len(ids) < 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"perplexity: argument 'ids' is {got}, needs a tensor [N] of at least two tokens")
    check_ids(ids[None], model.config.vocab_size, model.device)
    check_vocabulary(ids, model.config.vocab_size)
    limit = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= limit:
        raise ValueError(f"perplexity: context is {context}, needs 1 to {limit}, the model's positions")
    with torch.no_grad():
        read = windows(ids, context or min(limit, CONTEXT))
        return of_losses((loss(model.hidden(inputs[None])[0], model.head, wanted) for inputs, wanted in read), len(ids))


def windows(ids: Tensor, context: int) -> list[Window]:
    """A text int64 [N] in pieces of `context` tokens, the last one shorter."""
    return list(zip(ids[:-1].split(context), ids[1:].split(context), strict=True))


def loss(h: Tensor, head: Callable[[Tensor], Tensor], wanted: Tensor) -> float:
    """Of tokens `wanted` [T] behind hidden states h [T,H], summed; `head` gives logits [..., V]."""
    pieces = zip(h.split(ROWS), wanted.split(ROWS), strict=True)
    return sum(float(F.cross_entropy(head(rows).double(), tokens, reduction="sum")) for rows, tokens in pieces)


def of_losses(losses: Iterable[float], tokens: int) -> float:
    """The perplexity of a text of so many tokens, the first of which nothing predicts."""
    mean = math.fsum(losses) / (tokens - 1)
    return math.exp(mean) if mean < 700 else math.inf


def held_out(folder: Any, config: Any) -> Tensor | None:
    """The text int64 [N] that a checkpoint's folder brings to be measured on; None: it brings none."""
    file = Path(folder) / HELD_OUT
    if not file.is_file():
        return None
    ids = parse_json_object(file.read_bytes(), str(file)).get("ids")
    good = isinstance(ids, list) and len(ids) > 1 and all(type(token) is int for token in ids)
    if not good or not 0 <= min(ids) <= max(ids) < config.vocab_size:  # type: ignore[type-var,arg-type]
        raise ValueError(f"{file}: ids has to be a list of at least two token ids, below {config.vocab_size}")
    return torch.tensor(ids)
