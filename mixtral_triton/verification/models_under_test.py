"""The target of verify: a Mixtral, whose reference is plain torch.

B batch, T tokens, V vocabulary, H hidden
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .. import reference
from ..kernels.registry import dispatched
from ..kernels.weights.fp8 import with_fp8_activations
from ..model.cache import KVCache
from .calls import LayerCheck, single_layer_model
from .report import Row
from .tolerance import Args, Tolerance

UNCACHED, CHUNKS, TOKENS, ALONE = "whole text", "in chunks", "token by token", "one sequence"
ERROR_LENGTH = 200  # characters of a raised error in a row
SEPARATE_TOKENS = 2  # tokens that are read one at a time, after the chunks
PADDING = 3  # tokens of right padding behind all chunks but the first
WINDOW_FRACTION = 4  # a window as long as the text is reduced by this factor, so that the ring wraps around
# A call of a forward: its case, the tokens of the text [R,n] (see `LayerProbe.start`), False for padding [R,n], the
# cache, other arguments.
ForwardCall = tuple[str, Tensor, Tensor, Any, dict[str, Tensor]]


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Take a model's modules out of training mode, and afterwards back."""
    trains = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in trains:
            module.training = True


class ModelUnderTest:
    """A Mixtral as `verify` uses it: the weights for torch's computation, and the model's own forward."""

    quantized = False  # keys and values: every forward reads them from a cache of 8 bits, and so does torch
    activations: str | None = None  # of the layers' products, in every forward: `Mixtral.activations`

    def __init__(self, model: Any, cache_dtype: torch.dtype | None = None) -> None:
        self.model, self.config, self.layers = model, model.config, model.layers
        self.quantized, self.generate_options = cache_dtype is torch.int8, dict[str, Any](cache_dtype=cache_dtype)
        self.activations = model.activations
        if self.activations is not None:  # one reference for forwards of any number of rows
            self.model = copy.copy(model)
            self.model.sixteen_bit_rows = 0
        self.embed_tokens, self.norm, self.lm_head = model.embed_tokens, model.norm, model.lm_head
        self.tables = {"cos": model.cos, "sin": model.sin}

    @property
    def coarse(self) -> bool:
        """Whether a rounding of fp32 may change a code of the cache or of activations."""
        return self.quantized or self.activations is not None

    def reference_layer(self, layer: Any) -> Any:
        """The weights of a layer as torch multiplies with them: those that quantize activations where the model's do.
        `local`: the layer."""
        if self.activations is None:
            return layer
        weights = {**dict(layer.named_parameters(recurse=False)), **dict(layer.named_children())}
        return SimpleNamespace(local=layer, **{name: with_fp8_activations(weight) for name, weight in weights.items()})

    def check(self, layer: Any, x: Tensor, config: Any) -> LayerCheck:
        """Compute a layer with torch on x [B,T,H]."""
        attend = reference.uncached_attention(config.sliding_window, **self.tables, quantized=self.quantized)
        layer = self.reference_layer(layer)
        check = LayerCheck(reference.block(layer, config, x, attend), layer, config, self.tables, self.quantized)
        check.coarse = self.coarse
        return check

    def probe_config(self, tokens: int) -> Any:
        """The config with a window that is shorter than the text."""
        window = self.config.sliding_window
        if window is None or window < tokens:
            return self.config
        return replace(self.config, sliding_window=max(2, tokens // WINDOW_FRACTION))

    def forward_calls(self, config: Any, B: int, T: int) -> Iterator[ForwardCall]:
        """The forwards that read a text [B,T], whole and in chunks over a cache, of unequal lengths."""
        whole = self.make_cache(config, B, T) if self.quantized else None
        yield UNCACHED, (text := torch.arange(T).expand(B, T)), text >= 0, whole, {}
        cache, behind = self.make_cache(config, B, T + PADDING), torch.arange(B)
        num_separate = min(SEPARATE_TOKENS, T - 1) or 1
        bounds = sorted({0, -(-2 * (T - num_separate) // 5), T - num_separate})
        ends = [(bound - behind * (index % 2)).clamp(min=0) for index, bound in enumerate(bounds)]
        ends += [ends[-1] + index for index in range(1, num_separate + 1)]
        for index, (begin, end) in enumerate(pairwise(ends)):
            is_chunk, counts = index + num_separate < len(ends) - 1, end - begin
            columns = torch.arange(int(counts.max()) + (PADDING if begin[0] and is_chunk else 0))
            valid = columns < counts[:, None]
            tokens = torch.where(valid, begin[:, None] + columns, 0)
            if counts.any():
                lengths = {} if valid.all() else {"lengths": counts.int()}
                yield CHUNKS if is_chunk else TOKENS, tokens, valid, cache, lengths
        cache = self.make_cache(config, 1, T + PADDING)  # alone, where a step has one row
        for part in (text[:1, : min(2, T - 1)], text[:1, min(2, T - 1) : 3]):
            if part.numel():
                yield ALONE, part, part >= 0, cache, {}

    def logits(self, ids: Tensor, probe: Any) -> Tensor:
        """The logits [B,T,V] of a text [B,T] over a cache."""
        with self.forward(self.config, probe) as forward:
            return forward(ids, self.make_cache(self.config, *ids.shape))

    @contextmanager
    def catch_faults(self, record: Callable[[str], None]) -> Iterator[None]:
        """Pass the message of an error that the runtime raises to `record`, but not that of a lack of memory."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            record(f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_LENGTH])

    def measure(self, layer: int | None, op: str, case: str, args: Args) -> list[Row]:
        expected, rows = Tolerance(op, args), list[Row]()
        with self.catch_faults(lambda note: rows.append(Row.exact(layer, op, case, False, note))):
            rows.append(Row(layer, op, case, *expected.measure(dispatched(op, args))))
        return rows

    def make_cache(self, config: Any, batch: int, slots: int) -> Any:
        return KVCache(config, batch, slots, self.model.device, torch.int8 if self.quantized else self.model.dtype)

    @contextmanager
    def forward(self, config: Any, probe: Any, probe_layers: bool = False) -> Iterator[Callable[..., Tensor]]:
        """A copy of the model on the same weights, whose routes, or also layers' inputs, `probe` replaces."""

        def route(forward: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
            h, x, weights, ids = forward(*args)
            return h, x, *probe.replace_routes(weights, ids)

        model, layers = copy.copy(self.model), [copy.copy(layer) for layer in self.model.layers]
        for index, layer in enumerate(layers):
            layer.config, layer.route = config, partial(route, layer.route)
            for name in ("forward", "attention", "experts") if probe_layers else ():
                setattr(layer, name, partial(getattr(probe, name), index, getattr(layer, name)))
        model._modules, model.config = {**model._modules, "layers": nn.ModuleList(layers)}, config
        yield model

    def head(self, x: Tensor, convert: Callable[[Any], Any] = lambda weight: weight) -> Tensor:
        """The final norm and the head in torch on x [...,H]; `convert` is applied to the weights."""
        h = reference.rms_norm(x, convert(self.norm), self.config.rms_norm_eps)
        return h if self.lm_head is None else reference.linear(h, convert(self.lm_head))


def model_in_fp32(model: Any, layer: Any, x: Tensor) -> Any:
    """`model` with only this layer, its weights in fp32, and the rows of x [B,T,H] as the embedding."""
    config = replace(model.config, num_hidden_layers=1, vocab_size=x[..., 0].numel())
    frozen = partial(nn.Parameter, requires_grad=False)
    # Not by way of fp64, in which all experts of a layer would take twice the memory.
    fp32 = {name: frozen(weight.float()) for name, weight in layer.named_parameters(recurse=False)}
    fp32 |= {name: frozen(weight.dequantize()) for name, weight in layer.named_children()}
    outer = {"embed_tokens": (rows := frozen(x.float().flatten(0, 1))), "lm_head": rows}
    outer |= {"norm": frozen(model.norm.float()), "cos": model.cos, "sin": model.sin}
    return single_layer_model(model, config, fp32, outer)
