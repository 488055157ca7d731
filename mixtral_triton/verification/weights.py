"""The loaded weights against the files, and the cost of quantizing them: logits, routes and perplexity without it.

`check_loaded` shares no table of names or places with the loader, so that a tensor in another's place is found.

N tokens of a text, B batch, T tokens of a window, H hidden, K experts per token, V vocabulary
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import weights
from ..config import parse_json_object
from ..inputs import check_ids, check_vocabulary
from ..quantize import QuantizedWeight, hub
from ..quantize.spec import PARTS, QuantSpec
from ..tools.tolerance import fp64_block, largest, to_fp64, worst
from .layers import Step, Target
from .report import Row

LAYER = re.compile(r"model\.layers\.(\d+)\.")
EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")
# Half a step of a format relative to the largest value, where the scale clips nothing; 2 % for the scale's rounding.
ROUNDING = {"int4": 1.02 / 14, "int8": 1.02 / 254, "fp8": 1.02 / 16}
HELD_OUT = "heldout.json"  # in a checkpoint's folder: {"ids": tokens of a text that it was not trained on}
CONTEXT = 2048  # the most tokens of a window
LOGIT_ROWS = 256  # tokens whose logits are in memory at once


def check_loaded(folder: Any, model: Any) -> list[Row]:
    """A row for the embedding, final norm and head, and one per layer: the largest difference from the files.

    A part of a parameter that no tensor or more than one fills is an infinite difference. Weights that were quantized
    while loading have a row of their own, with the error of `_rounding_error`. ValueError for another model's folder.
    """
    outside = {id(weight): weight for weight in (model.embed_tokens, model.norm, model.lm_head)}
    parameters = [outside.values(), *(chain(layer.parameters(False), layer.children()) for layer in model.layers)]
    unfilled = [sum(weight.shape.numel() for weight in group) for group in parameters]
    pairs: dict[tuple[int, str], list[tuple[float, float]]] = {
        (at, case): [] for at in range(len(unfilled)) for case in ("as stored", "quantized")
    }
    for name, stored in _stored_tensors(folder, model.config):
        at, place = _place(model, name)
        shape = list(stored.shape if isinstance(stored, QuantizedWeight) else stored.get_shape())
        if list(place.shape) != shape:
            raise ValueError(f"verify: {folder} is another model's: {name} has shape {shape} there")
        tied = name == "lm_head.weight" and model.lm_head is model.embed_tokens  # stored twice
        unfilled[at] -= 0 if tied else place.shape.numel()
        experts = range(len(place)) if len(place.shape) == 3 else ()  # one at a time, to save memory
        pieces = [(place[i], stored[i : i + 1][0]) for i in experts] or [(place, stored[:])]
        for ours, theirs in pieces:
            if isinstance(ours, QuantizedWeight) and isinstance(theirs, Tensor):
                pairs[at, "quantized"].append((_rounding_error(ours, theirs), ROUNDING[ours.format]))
            else:
                pairs[at, "as stored"].append((_difference(ours, theirs), 0.0))
    for at, count in enumerate(unfilled):
        pairs[at, "as stored"].append((math.inf if count else 0.0, 0.0))
    return [Row(at - 1 if at else None, "weights", case, *worst(each)) for (at, case), each in pairs.items() if each]


def check_finite(model: Any) -> list[Row]:
    """A row for the embedding, final norm and head, and one per layer: infinite where a weight is not finite, which a
    text may not show: of a token or an expert that it does not have."""

    def finite(weight: Any) -> bool:
        if not isinstance(weight, QuantizedWeight):
            return bool(weight.isfinite().all())
        parts = [weight[at] for at in range(len(weight))] if len(weight.shape) == 3 else [weight]
        return all(bool(part.dequantize().isfinite().all()) for part in parts)

    outside = (model.embed_tokens, model.norm, *([] if model.lm_head is None else [model.lm_head]))
    groups = [outside, *(_weights_of(layer) for layer in model.layers)]
    errors = (0.0 if all(map(finite, group)) else math.inf for group in groups)
    return [Row(at - 1 if at else None, "weights", "finite", error, 0.0) for at, error in enumerate(errors)]


def _weights_of(layer: Any) -> Iterator[Any]:
    return chain(layer.parameters(), (weight for weight in layer.modules() if isinstance(weight, QuantizedWeight)))


def _stored_tensors(folder: Any, config: Any) -> Iterator[tuple[str, Any]]:
    """Every tensor of the checkpoint by name, as a slice to read; quantized linears as QuantizedWeights."""
    headers = hub.read_headers(folder)
    plan = None if headers.scheme is None else hub.plan(headers, config)
    for file in sorted({stored.file for stored in headers.tensors.values()}):
        try:
            opened = safe_open(file, framework="pt", device="cpu")
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot be read again: {error}") from error
        with opened:
            for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                if plan is None or name in plan.dense:
                    yield name, opened.get_slice(name)
    if plan is not None:
        yield from ((f"{linear.name}.weight", hub.read(plan, linear)) for linear in plan.linears)


def _place(model: Any, name: str) -> tuple[int, Any]:
    """Where the tensor of this name belongs: 0 or a layer's number + 1, and a part of a weight there."""
    found, parameter = LAYER.match(name), name.removesuffix(".weight").rpartition(".")[2]
    try:
        if found is None:
            return 0, getattr(model, parameter)
        index = int(found[1])
        layer, config = model.layers[index], model.config
        if expert := EXPERT.search(name):
            number, I = int(expert[1]), config.intermediate_size
            if expert[2] == "2":
                return index + 1, layer.down_proj[number]
            gate_up = layer.gate_up_proj[number]
            return index + 1, gate_up[:I] if expert[2] == "1" else gate_up[I:]
        if parameter not in ("q_proj", "k_proj", "v_proj"):
            return index + 1, getattr(layer, parameter)
        queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        rows = {"q": slice(0, queries), "k": slice(queries, queries + keys), "v": slice(queries + keys, None)}
        return index + 1, layer.qkv_proj[rows[parameter[0]]]
    except (AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(f"verify: the files hold {name}, and this model has no place for it") from error


def _difference(ours: Any, theirs: Any) -> float:
    """The largest difference; infinite where one of the two is NaN."""
    ours, theirs = (x.dequantize() if isinstance(x, QuantizedWeight) else x for x in (ours, theirs))
    theirs = theirs.to(ours.device, ours.dtype)
    return 0.0 if torch.equal(ours, theirs) else largest(ours.double() - theirs.double())


def _rounding_error(ours: QuantizedWeight, theirs: Tensor) -> float:
    """The root mean square of the difference relative to the largest value, of the worst group of columns that loading
    gives one scale, however a mesh splits them."""
    group = QuantSpec.default_for(ours.format, theirs.shape[-1]).group
    groups = theirs.to(ours.device, torch.float32).unflatten(-1, (-1, group))
    error = (ours.dequantize().view_as(groups) - groups).square().mean(-1).sqrt()
    return largest(error / groups.abs().amax(-1).clamp(min=1e-30))


def perplexity(model: Any, ids: Tensor, context: int | None = None) -> float:
    """exp of the mean loss of a text, int64 [N] of at least two tokens, by the model's own forward, summed in fp64.

    Each token is predicted from at most `context` tokens before it; None: the model's positions, at most CONTEXT.
    """
    if not isinstance(ids, Tensor) or ids.dim() != 1 or len(ids) < 2:
        got = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"perplexity: argument 'ids' is {got}, needs a tensor [N] of at least two tokens")
    check_ids(ids[None], model.config.vocab_size, model.device)
    check_vocabulary(ids, model.config.vocab_size)
    limit = model.config.max_position_embeddings
    if context is not None and not 1 <= context <= limit:
        raise ValueError(f"perplexity: context is {context}, needs 1 to {limit}, the model's positions")
    context = context or min(limit, CONTEXT)
    pairs = zip(ids[:-1].split(context), ids[1:].split(context), strict=True)
    with torch.no_grad():
        losses = [loss(model.hidden(inputs[None])[0], model.head, targets) for inputs, targets in pairs]
    return perplexity_of(losses, len(ids))


def loss(h: Tensor, head: Callable[[Tensor], Tensor], targets: Tensor) -> float:
    """The summed loss of `targets` [T], predicted from hidden states h [T,H]; `head` gives logits [..., V]."""
    pieces = zip(h.split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True)
    return math.fsum(float(F.cross_entropy(head(rows).double(), ids, reduction="sum")) for rows, ids in pieces)


def perplexity_of(losses: Iterable[float], tokens: int) -> float:
    """The perplexity of a text of so many tokens, the first of which is not predicted."""
    mean = math.fsum(losses) / (tokens - 1)
    return math.exp(mean) if mean < 700 else math.inf


def held_out(folder: Any, config: Any) -> Tensor | None:
    """The held-out text int64 [N] in a checkpoint's folder; None where there is none."""
    file = Path(folder) / HELD_OUT
    if not file.is_file():
        return None
    ids = parse_json_object(file.read_bytes(), str(file)).get("ids")
    integers = isinstance(ids, list) and len(ids) > 1 and all(type(token) is int for token in ids)
    if not integers or not 0 <= min(ids) <= max(ids) < config.vocab_size:  # type: ignore[type-var,arg-type]
        raise ValueError(f"{file}: ids needs to be a list of at least two token ids below {config.vocab_size}")
    return torch.tensor(ids)


@dataclass(frozen=True)
class QuantizationCost:
    """Both models in fp64: on the dequantized weights, and on the weights of the files.

    formats  of the quantized parts of the model, by their names in PARTS
    cosine   between the logits of a token in both, the mean over all tokens; `min_cosine`: the smallest
    flips    of `routed` routes (a token in a layer), those that differ
    perplexity, stored_perplexity  of the folder's held-out text; None where it has none
    """

    formats: dict[str, str]
    cosine: float
    min_cosine: float
    flips: int
    routed: int
    perplexity: float | None = None
    stored_perplexity: float | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{part} {format}" for part, format in self.formats.items())
        text = (
            f"Quantized: {kinds}. Cost against the weights as stored, in fp64: cosine of the logits {self.cosine:.5f}, "
            f"of the worst token {self.min_cosine:.5f}; routes that differ: {self.flips} of {self.routed}"
        )
        if self.perplexity is None or self.stored_perplexity is None:
            return f"{text}."
        percent = 100 * (self.perplexity / self.stored_perplexity - 1)
        return f"{text}; perplexity {self.perplexity:.3f}, as stored {self.stored_perplexity:.3f} ({percent:+.2f} %)."


def quantized_formats(model: Any) -> dict[str, str]:
    """The formats of a model's quantized parts, by their names in PARTS."""
    found: dict[str, set[str]] = {}
    for name, weight in model.named_weights().items():
        if isinstance(weight, QuantizedWeight):
            part = next(part for part, names in PARTS.items() if name.rpartition(".")[2] in names)
            found.setdefault(part, set()).add(weight.format)
    return {part: " and ".join(sorted(kinds)) for part, kinds in found.items()}


def quantization_cost(target: Target, folder: Any, ids: Tensor, step: Step) -> QuantizationCost | None:
    """On ids [B,T] and the folder's held-out text; None where no weight is quantized, or where the files' are.

    One layer of the files is in memory at a time. On a mesh every rank computes all of it.
    """
    model, config = target.model, target.config
    formats, headers = quantized_formats(model), hub.read_headers(folder)
    if not formats or headers.scheme is not None:
        return None
    text, context = held_out(folder, config), min(config.max_position_embeddings, CONTEXT)
    windows = [] if text is None else [*text[:-1].to(model.device).split(context)]
    batches = [ids, *(torch.stack(same) for same in (windows[:-1], windows[-1:]) if same)]
    texts, flips = [[F.embedding(batch, target.embed_tokens).double() for batch in batches]] * 2, 0
    for index, layer in enumerate(target.layers):
        stored, routes = _stored(model, config, headers, f"layers.{index}."), []
        for side, weights_of_side in enumerate((layer, stored)):
            values = [fp64_block(weights_of_side, config, target.tables, x) for x in texts[side]]
            texts[side] = [each.output for each in values]
            routes.append(values[0].ids.sort(-1).values)
        flips += int((routes[0] != routes[1]).any(-1).sum())
        step()
    stored_head = target.lm_head
    if isinstance(stored_head, QuantizedWeight):
        stored_head = _stored(model, config, headers, "lm_head").lm_head
    heads = target.head(to_fp64), target.head(to_fp64, stored_head)
    logits, stored_logits = (head(x[0]) for head, x in zip(heads, texts, strict=True))
    cosines = F.cosine_similarity(logits, stored_logits, dim=-1)
    scores = []
    if text is not None:
        targets = text[1:].to(model.device).split(context)
        for head, x in zip(heads, texts, strict=True):
            pairs = zip(chain.from_iterable(x[1:]), targets, strict=True)
            scores.append(perplexity_of((loss(hidden, head, ids) for hidden, ids in pairs), len(text)))
    routed = config.num_hidden_layers * ids.numel()
    return QuantizationCost(formats, float(cosines.mean()), float(cosines.min()), flips, routed, *scores)


def _stored(model: Any, config: Any, headers: weights.Headers, prefix: str) -> Any:
    """The files' parameters with this prefix, by the last part of their names."""
    shapes = {name: shape for name, shape in weights.parameter_shapes(config).items() if name.startswith(prefix)}
    places = {name: torch.empty(shape, dtype=model.dtype, device=model.device) for name, shape in shapes.items()}
    targets = {name: place for name, place in weights.check(headers, config).items() if place.parameter in places}
    weights.fill({name: headers.tensors[name] for name in targets}, targets, places, None)
    return SimpleNamespace(**{name.rpartition(".")[2]: weight for name, weight in places.items()})
