"""What quantizing a model's weights cost: the same files beside it without, both in fp64, layer after layer.

B sequences, T tokens, H hidden, K experts per token, V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference, weights
from ..kernels.quantized import QuantizedWeight
from ..quantize import hub
from ..quantize.spec import PARTS
from ..tools.tolerance import to_fp64
from .fp64 import wide_values
from .quality import CONTEXT, Window, held_out, loss, of_losses, windows


@dataclass(frozen=True)
class Quantization:
    """Everything in fp64: on the dequantized weights, and on those of the files.

    formats  of the parts of a model that are quantized, by their names in PARTS
    cosine   between the logits of a token and those without, the mean of all tokens; `least`: of the worst one
    moved    of `routed` routes (a token in a layer), those that go to other experts than without
    perplexity, without   of the folder's held-out text; None where it has none
    """

    formats: dict[str, str]
    cosine: float
    least: float
    moved: int
    routed: int
    perplexity: float | None = None
    without: float | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{part} {format}" for part, format in self.formats.items())
        text = (
            f"Quantized: {kinds}. What that cost, beside the same files without, in fp64: cosine of the logits "
            f"{self.cosine:.5f}, of the worst token {self.least:.5f}; routes that moved: {self.moved} of {self.routed}"
        )
        if self.perplexity is None or self.without is None:
            return f"{text}."
        more = 100 * (self.perplexity / self.without - 1)
        return f"{text}; perplexity {self.perplexity:.3f}, without {self.without:.3f} ({more:+.2f} %)."


def formats(model: Any) -> dict[str, str]:
    """Of a model's quantized parts, by their names in PARTS."""
    found: dict[str, set[str]] = {}
    for name, weight in model.places().items():
        if isinstance(weight, QuantizedWeight):
            part = next(part for part, names in PARTS.items() if name.rpartition(".")[2] in names)
            found.setdefault(part, set()).add(weight.format)
    return {part: " and ".join(sorted(kinds)) for part, kinds in found.items()}


def cost(model: Any, folder: Any, ids: Tensor, said: Callable[[], None]) -> Quantization | None:
    """On ids [B,T], and on the folder's held-out text; None where no weight is quantized, or the files themselves are.

    A layer of the files is loaded when its turn comes, and `said` is called after it. On a mesh every rank does it all.
    """
    kinds, headers = formats(model), hub.read_headers(folder)
    if not kinds or headers.scheme is not None:
        return None
    text = held_out(folder, model.config)
    read = [] if text is None else windows(text.to(model.device), min(model.config.max_position_embeddings, CONTEXT))
    behind = [wanted for _, wanted in read]
    ours, theirs, moved = _Side(model, ids, read), _Side(model, ids, read), 0
    for index, layer in enumerate(model.layers):
        pair = ours.go(layer), theirs.go(_stored(model, headers, f"layers.{index}."))
        moved += int((pair[0] != pair[1]).any(-1).sum())
        said()
    if isinstance(model.lm_head, QuantizedWeight):
        theirs.head = _stored(model, headers, "lm_head").lm_head
    cosines = F.cosine_similarity(ours.logits(), theirs.logits(), dim=-1)
    scores = [] if text is None else [side.perplexity(behind) for side in (ours, theirs)]
    routed = len(model.layers) * ids.numel()
    return Quantization(kinds, float(cosines.mean()), float(cosines.min()), moved, routed, *scores)


class _Side:
    """One of two models on the same texts: what stands before its next layer, fp64.

    x  of ids [B,T,H]; then of a text in windows [n,T,H]: those of the same length together, and the last one
    """

    def __init__(self, model: Any, ids: Tensor, read: list[Window]) -> None:
        self.model, self.head = model, model.lm_head
        inputs = [tokens for tokens, _ in read]
        batches = [ids, *(torch.stack(part) for part in (inputs[:-1], inputs[-1:]) if part)]
        self.x = [F.embedding(batch, model.embed_tokens).double() for batch in batches]

    def go(self, layer: Any) -> Tensor:
        """Through a layer -> the experts of every token of ids, in order of their numbers [B*T,K]."""
        tables = {"cos": self.model.cos, "sin": self.model.sin}
        found = [wide_values(layer, self.model.config, tables, x) for x in self.x]
        self.x = [values.output for values in found]
        return found[0].ids.sort(-1).values

    def logits(self) -> Tensor:
        """Of ids, fp64 [B,T,V]."""
        return self._head()(self.x[0])

    def perplexity(self, behind: list[Tensor]) -> float:
        """Of the text, the tokens behind those of each window given."""
        head, windows = self._head(), [one for batch in self.x[1:] for one in batch]
        losses = (loss(x, head, wanted) for x, wanted in zip(windows, behind, strict=True))
        return of_losses(losses, 1 + sum(map(len, behind)))

    def _head(self) -> Callable[[Tensor], Tensor]:
        norm, head = to_fp64(self.model.norm), to_fp64(self.head)
        return lambda x: reference.linear(reference.rms_norm(x, norm, self.model.config.rms_norm_eps), head)


def _stored(model: Any, headers: weights.Headers, prefix: str) -> Any:
    """The parameters with this prefix as they stand in the files, by the last part of their names."""
    shapes = {name: shape for name, shape in weights.parameter_shapes(model.config).items() if name.startswith(prefix)}
    own = {name: torch.empty(shape, dtype=model.dtype, device=model.device) for name, shape in shapes.items()}
    targets = {name: target for name, target in weights.check(headers, model.config).items() if target.parameter in own}
    weights.fill({name: headers.tensors[name] for name in targets}, targets, own, None)
    return SimpleNamespace(**{name.rpartition(".")[2]: weight for name, weight in own.items()})
