"""The cost of quantization, in fp64: logits, routes and the perplexity of a text; and the perplexity of a model."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checkpoint.arguments import check_ids, check_vocabulary
from ..checkpoint.config import read_json_object
from ..quantize import QUANTIZED_PARTS
from .tolerance import fp64_block, to_fp64

HELD_OUT = "heldout.json"  # in a checkpoint's folder: {"ids": tokens of a text that it was not trained on}
WINDOW_TOKENS = 2048  # the most tokens of a window
LOGIT_ROWS = 256  # tokens whose logits are in memory at once


@dataclass(frozen=True)
class QuantizationCost:
    """Both models in fp64: on the dequantized weights, and on the weights of the files; or over both caches, or with
    activations of 8 bits and without."""

    formats: dict[str, str]  # of the quantized parts by their names in QUANTIZED_PARTS, of the cache or the activations
    cosine: float  # between the logits of a token in both, the mean over all tokens
    min_cosine: float  # that of the worst token
    flips: int  # of `routed` routes (a token in a layer), those that differ
    routed: int
    perplexity: float | None = None  # of the folder's held-out text; None where it has none
    stored_perplexity: float | None = None

    def __str__(self) -> str:
        kinds, perplexity = ", ".join(f"{part} {format}" for part, format in self.formats.items()), ""
        against, short = "the weights as stored", "as stored"
        if kind := {"cache": "keys and values", "activations": "activations"}.get(next(iter(self.formats))):
            against, short = f"{kind} that are not quantized", "without"
        if self.perplexity is not None and self.stored_perplexity is not None:
            percent = 100 * (self.perplexity / self.stored_perplexity - 1)
            perplexity = f"; perplexity {self.perplexity:.3f}, {short} {self.stored_perplexity:.3f} ({percent:+.2f} %)"
        else:
            perplexity = "; no perplexity, which `verify --text FILE` gives, or heldout.json in the folder"
        return (
            f"Quantized: {kinds}. Cost against {against}, in fp64: cosine of the logits {self.cosine:.5f}, of the "
            f"worst token {self.min_cosine:.5f}; routes that differ: {self.flips} of {self.routed}{perplexity}."
        )


def perplexity(model: Any, ids: Tensor) -> float:
    """exp of the mean loss of a text, int64 [N] of at least two tokens, by the model's forward, summed in fp64. Each
    token is predicted from those before it in its window of the model's positions, at most WINDOW_TOKENS."""
    if not isinstance(ids, Tensor) or ids.dim() != 1 or len(ids) < 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"perplexity: argument 'ids' is {got}, needs a tensor [N] of at least two tokens")
    check_ids(ids[None], model.config.vocab_size, model.device)
    check_vocabulary(ids, model.config.vocab_size)
    with torch.no_grad():
        return _perplexity(((model.hidden(x[None])[0], y) for x, y in _windows(ids, model.config)), model.head)


def _windows(ids: Tensor, config: Any) -> Iterable[tuple[Tensor, Tensor]]:
    """The inputs and targets [T] of each window of a text [N]."""
    length = min(config.max_position_embeddings, WINDOW_TOKENS)
    return zip(ids[:-1].split(length), ids[1:].split(length), strict=True)


def _perplexity(windows: Iterable[tuple[Tensor, Tensor]], head: Callable[[Tensor], Tensor]) -> float:
    """exp of the mean loss of targets [T], predicted from hidden states [T,H]; `head` gives logits [...,V]."""
    losses, count = [], 0
    for hidden, targets in windows:
        count += len(targets)
        for h, ids in zip(hidden.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True):
            losses.append(float(F.cross_entropy(head(h).double(), ids, reduction="sum")))
    mean = math.fsum(losses) / count
    return math.exp(mean) if mean < 700 else math.inf


def held_out(folder: Any, config: Any) -> Tensor | None:
    """The held-out text int64 [N] in a checkpoint's folder; None where there is none."""
    file = Path(folder) / HELD_OUT
    if not file.is_file():
        return None
    ids = read_json_object(file).get("ids")
    integers = isinstance(ids, list) and len(ids) > 1 and all(type(token) is int for token in ids)
    if not integers or not 0 <= min(ids) <= max(ids) < config.vocab_size:  # type: ignore[type-var,arg-type]
        raise ValueError(f"{file}: ids needs to be a list of at least two token ids below {config.vocab_size}")
    return torch.tensor(ids)


def quantized_formats(model: Any) -> dict[str, str]:
    """The formats of a model's quantized parts, by their names in QUANTIZED_PARTS."""
    formats = {name: getattr(weight, "format", "dense") for name, weight in model.named_weights().items()}
    by_part = {}
    for part, names in QUANTIZED_PARTS.items():
        if kinds := {format for name, format in formats.items() if name.endswith(names)} - {"dense"}:
            by_part[part] = " and ".join(sorted(kinds))
    return by_part


class LayerByLayer:
    """The computation of a QuantizationCost, which gets the files' weights one layer after another. `target` and
    `source` are those of `verify`: layers.py and stored_tensors.py."""

    def __init__(self, target: Any, source: Any, ids: Tensor, text: Tensor | None) -> None:
        self.target, self.ids, self.flips, self.stored_head = target, ids, 0, None
        # fp32 holds what a quantized file means.
        self.dtype = target.model.dtype if source is None or source.quantization is None else torch.float32
        text = held_out(source.folder, target.config) if text is None and source is not None else text
        self.windows = [] if text is None else list(_windows(text.to(ids.device), target.config))
        inputs = [ids, *(window[None] for window, _ in self.windows)]
        self.texts = [[F.embedding(tokens, target.embed_tokens).double() for tokens in inputs]] * 2

    def empty(self, index: int | None, like: dict[str, Any]) -> Any:
        """Unset tensors for what the files hold for a layer, or None, of the shapes of these weights by name."""
        unset = partial(torch.empty, dtype=self.dtype, device=self.target.model.device)
        weights: dict[Any, Any] = {name: unset(x.shape) for name, x in like.items()}
        weights = weights if index is None else {"layers": {index: SimpleNamespace(**weights)}}
        return SimpleNamespace(config=self.target.config, **weights)

    def compare(self, *sides: tuple[Any, bool]) -> None:
        """Run a layer of both models, each with whether it has 8-bit keys and values, and count routes that differ."""
        routes, config, tables = [], self.target.config, self.target.tables
        for side, (layer, quantized) in enumerate(sides):
            values = [fp64_block(layer, config, tables, x, quantized=quantized) for x in self.texts[side]]
            self.texts[side] = [layer_values.output for layer_values in values]
            routes.append(values[0].ids.sort(-1).values)
        self.flips += int((routes[0] != routes[1]).any(-1).sum())

    def result(self, formats: dict[str, str]) -> QuantizationCost:
        logits, scores = [], []
        for lm_head, (x, *texts) in zip((None, self.stored_head), self.texts, strict=True):
            head = partial(self.target.head, convert=to_fp64, lm_head=lm_head)
            logits.append(head(x))
            if texts:
                scores.append(_perplexity([(x[0], y) for x, (_, y) in zip(texts, self.windows, strict=True)], head))
        cosines = F.cosine_similarity(logits[0], logits[1], dim=-1)
        routed = self.target.config.num_hidden_layers * self.ids.numel()
        return QuantizationCost(formats, float(cosines.mean()), float(cosines.min()), self.flips, routed, *scores)


def measure_cost(target: Any, source: Any, ids: Tensor, text: Tensor | None, part: str) -> QuantizationCost:
    """The cost of 8 bits for `part`, "cache" (keys and values) or "activations" (of products), beside the same weights
    without, on ids [B,T], and on `text` [N], or the held-out one of the source."""
    cost, of_cache = LayerByLayer(target, source, ids, text), part == "cache"
    for layer in target.layers:
        cost.compare((layer if of_cache else target.reference_layer(layer), of_cache), (layer, False))
    return cost.result({part: "int8" if of_cache else target.activations})
