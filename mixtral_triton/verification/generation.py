"""`generate` itself: its greedy tokens, a captured step, and the bits of rows that are computed again.

B batch, T tokens of a text, V vocabulary, n new tokens
"""

import copy
import math
import warnings
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..model.cache import KVCache
from ..model.generate import GRAPH_MIN_TOKENS, can_capture
from .probe import TextReference
from .report import BITS, END_RATIO, REPEATED, Row
from .tolerance import largest, token_floor

BATCH, REPEATED_TOKENS = 33, 4  # sequences, and tokens of a chunk, that are computed again
NEW_TOKENS = 3  # and on a GPU as many as make `generate` capture its step
TEMPERATURE = 0.8  # of the sampled text whose captured step is compared with the eager one


def check_generate(model: Any, ids: Tensor, text: TextReference, cache_dtype: torch.dtype | None) -> list[Row]:
    """Rows for greedy tokens of two prompts of unequal length, cut from ids [B,T]. How far the logit of a right token
    may be below the greatest of the model's forward, which has rows of its own, is set by the errors of the logits of
    `text`."""
    given, model, T = model, copy.copy(model), ids.shape[1]
    prompts = [ids[0, : max(1, T // 4)], ids[-1, : max(1, T // 8)]]
    model.prefill_chunk = max(1, 2 * len(prompts[0]) // 3)  # the longer prompt takes two chunks
    most = NEW_TOKENS + GRAPH_MIN_TOKENS * (captures := can_capture(model))
    new = min(most, model.config.max_position_embeddings - len(prompts[0]))
    logits, perturbed = text.exact_logits.chunk(2)
    limit = 2 * END_RATIO * max(largest(x.double() - logits) for x in (text.torch_logits, perturbed))
    if text.coarse:
        limit = max(limit, token_floor(model.dtype, True) * largest(logits))
    options: Any = {"eos_token_id": [], "cache_dtype": cache_dtype}
    if new < 1 or not math.isfinite(limit):  # where torch overflows, the row of the logits says so
        return []
    texts, parts = model.generate(prompts, new, **options), list[Tensor]()
    for tokens_of_text in texts:
        cache = KVCache(model.config, 1, len(tokens_of_text), model.device, cache_dtype or model.dtype)
        parts.append(given(tokens_of_text[None, :-1], cache)[0, -new:])
    next_logits, tokens = torch.stack(parts), torch.stack([tokens[-new:] for tokens in texts])
    shortfall = largest(next_logits.amax(-1) - next_logits.gather(-1, tokens[..., None])[..., 0])
    scale = max(largest(logits), 1e-30)
    rows = [Row(None, "generate", "greedy", shortfall / scale, limit / scale)]
    if captures:
        rows.append(Row.exact(None, "generate", "captured step", captures_the_step(model, prompts, new, options)))
    return rows + repeated_rows(model, ids)


def captures_the_step(model: Any, prompts: list[Tensor], new: int, options: Any) -> bool:
    """Whether a replay gives the tokens of the eager step, greedy and sampled: a graph draws in its own way."""
    eager = copy.copy(model)
    eager.head = model.head  # as a caller's code, which a graph would not run
    texts = list[Tensor]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slower
        for variant, temperature in product((model, eager), (0.0, TEMPERATURE)):
            generator = torch.Generator(model.device).manual_seed(1)
            texts += variant.generate(prompts, new, temperature, generator=generator, **options)
    return all(map(torch.equal, texts, texts[2 * len(prompts) :]))


def repeated_rows(model: Any, ids: Tensor) -> list[Row]:
    """Whether a ragged chunk and a step have the same bits: repeated on a GPU, or alone in deterministic mode."""
    if not (model.deterministic or model.device.type == "cuda"):
        return []
    T = max(1, min(REPEATED_TOKENS, model.config.max_position_embeddings - 1))
    b = torch.arange(BATCH, device=ids.device)
    ids = ids.flatten()[(b[:, None] * 2 + b[:T]) % ids.numel()]
    lengths = (T - b % T).int()

    def run(rows: slice = slice(None), ids: Tensor = ids) -> list[Tensor]:
        new = lengths[rows]
        cache = KVCache(model.config, len(new), T + 1, model.device, model.dtype)
        chunk, step = model(ids[rows, : int(new.max())], cache, new), model(ids[rows, :1], cache)
        return [torch.cat((logits[:n], last)) for logits, last, n in zip(chunk, step, new.tolist(), strict=True)]

    whole, same = run(), dict[str, bool]()
    if model.device.type == "cuda":
        again = [part for _ in range(2) if run(ids=ids.flip(0)) for part in run()]  # another text lies between
        same[REPEATED] = all(map(torch.equal, again, whole * 2))
    if model.deterministic:
        # Each length alone, in a chunk of its own: one token shall not take the path of a decode step.
        parts = *(slice(row, row + 1) for row in range(T)), slice(-1, None), slice(2), slice(1, 6)
        same[BITS] = all(torch.equal(*pair) for part in parts for pair in zip(run(part), whole[part], strict=True))
    return [Row.exact(None, "generate", case, right) for case, right in same.items()]
