"""Every operation of a layer on torch's activations, and every layer's own forward on torch's input.

Right operations may make a wrong model, by swapped norms or a window off by one, so the model's own forward runs, too.
What enters a layer is replaced, to show a fault in its layer: one flipped route does not hide the next layers.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..kernels.registry import dispatched
from ..kernels.weights.fp8 import with_fp8_activations
from ..model.cache import KVCache
from ..model.layer import Layer
from . import tolerance
from .calls import LayerCheck, SizedCalls
from .report import END_RATIO, FP32, TORCH, Row, worst_rows
from .tolerance import Fp64Reference, LayerReference, Tolerance, largest, to_fp64, with_perturbed_input

UNCACHED, CHUNKS, TOKENS, ALONE = "whole text", "in chunks", "token by token", "one sequence"
ROUTES, LAYER_PARTS = "routes", {"attn_output": "attention", "y": "experts"}  # rows of what a layer computes inside
PART_RATIO = 3.0  # of LAYER_PARTS in the place of RATIO: without the residual stream few values decide
RATIOS = {"attn_output": PART_RATIO, "y": PART_RATIO, "output": tolerance.RATIO}
NEAR_MISS, NEAR_INPUTS = 1.5, 4  # an error up to so many times its limit is judged by torch's on so many more inputs
ERROR_LENGTH = 200  # characters of a raised error in a row
SEPARATE_TOKENS = 2  # tokens that are read one at a time, after the chunks
PADDING = 3  # tokens of right padding behind all chunks but the first
WINDOW_FRACTION = 4  # a window as long as the text is reduced by this factor, so that the ring wraps around

Step = Callable[[], None]  # called after each layer of each forward
# A call of a forward: its case, the tokens of the text [R,n] (see `LayerProbe.start`), False for padding [R,n], the
# cache, other arguments.
ForwardCall = tuple[str, Tensor, Tensor, Any, dict[str, Tensor]]


class ModelUnderTest:
    """A Mixtral as `verify` uses it: the weights for torch's computation, and the model's own forward."""

    output, peer = "logits", TORCH  # what the model's head gives; what the model is compared with
    trains = False  # a model of transformers may, with our experts
    is_mixtral = True  # its forward takes chunks of unequal length, and it has `generate`
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
        # In transformers a cache with a window of one key does not fit its own masks.
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

    def logits(self, ids: Tensor, probe: LayerProbe) -> Tensor:
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

    def measure(self, layer: int | None, op: str, case: str, args: tolerance.Args) -> list[Row]:
        expected, rows = Tolerance(op, args), list[Row]()
        with self.catch_faults(lambda note: rows.append(Row.exact(layer, op, case, False, note))):
            rows.append(Row(layer, op, case, *expected.measure(dispatched(op, args))))
        return rows

    def make_cache(self, config: Any, batch: int, slots: int) -> Any:
        return KVCache(config, batch, slots, self.model.device, torch.int8 if self.quantized else self.model.dtype)

    @contextmanager
    def forward(self, config: Any, probe: LayerProbe, probe_layers: bool = False) -> Iterator[Callable[..., Tensor]]:
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


def single_layer_model(model: Any, layer: Any, x: Tensor) -> Any:
    """`model` with only this layer, its weights in fp32, and the rows of x [B,T,H] as the embedding."""
    config = replace(model.config, num_hidden_layers=1, vocab_size=x[..., 0].numel())
    fp32_model, frozen = copy.copy(model), partial(nn.Parameter, requires_grad=False)
    fp32_model._parameters, fp32_model._modules, fp32_model.config = {}, {}, config
    # Not by way of fp64, in which all experts of a layer would take twice the memory.
    fp32 = {name: frozen(weight.float()) for name, weight in layer.named_parameters(recurse=False)}
    fp32 |= {name: frozen(weight.dequantize()) for name, weight in layer.named_children()}
    fp32_model.layers, fp32_model.norm = nn.ModuleList([Layer(config, fp32)]), frozen(model.norm.float())
    fp32_model.embed_tokens = fp32_model.lm_head = frozen(x.float().flatten(0, 1))
    return fp32_model


class TextReference:
    """The reference of a text in `layers`, torch's residual stream `x` [B,T,H] after them, and the last layer's output
    on its input and the perturbed input, `exact` fp64 [2B,T,H]."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.exact = x, x.double().repeat(2, 1, 1)
        self.layers: list[LayerReference] = []

    def advance(self, check: LayerCheck, exact: reference.Values, near_limits: Callable[[], dict[str, float]]) -> None:
        """Append the layer of `check`, with what it computes in fp64 on its input `with_perturbed_input`."""
        values, norm = check.values, to_fp64(check.layer.input_layernorm)
        normed = reference.rms_norm(self.exact.to(values.x.device), norm, check.config.rms_norm_eps)
        # The norm of a layer behind the first is computed from what the layer before it adds.
        quantized = check.coarse and len(self.layers) > 0
        references = {"normed": Fp64Reference.from_baseline(normed, values.normed, quantized=quantized)}
        for name, ratio in RATIOS.items():
            parts = getattr(exact, name), getattr(values, name)
            references[name] = Fp64Reference.from_baseline(*parts, ratio, check.coarse)
        logits, perturbed = exact.logits.view(2, *values.x.shape[:2], -1)
        error = max(largest(x.view_as(logits) - logits) for x in (values.logits, perturbed))
        limit = tolerance.RATIO * error + tolerance.token_floor(values.x.dtype, check.coarse) * largest(logits)
        ids, weights = (x.view(*logits.shape[:2], -1) for x in (values.ids, values.weights))
        routes, renormalize = (ids, weights, logits.clone(), limit), check.config.renormalize
        self.layers.append(LayerReference(values.x, values.normed, *routes, references, renormalize, near_limits))
        self.x, self.exact = values.output, exact.output


def limits_near(target: ModelUnderTest, layer: Any, x: Tensor, config: Any) -> dict[str, float]:
    """Return limits by the errors of torch on inputs next to x [B,T,H]. Of a text of few tokens the error of the worst
    one, in the two roundings of a Fp64Reference, may be small by chance."""
    limits = dict.fromkeys(RATIOS, 0.0)
    for seed in range(1, NEAR_INPUTS + 1):
        check = target.check(layer, tolerance.perturb(x, seed), config)
        exact = check.fp64(check.values.x.double())
        for name, ratio in RATIOS.items():
            part = getattr(exact, name)
            error, _ = Fp64Reference(part, 0.0, float(part.norm(dim=-1).median())).measure(getattr(check.values, name))
            limits[name] = max(limits[name], ratio * (tolerance.CODE_RATIO if check.coarse else 1.0) * error)
    return limits


def compare_layers(
    target: ModelUnderTest,
    ids: Tensor,
    calls: SizedCalls | None = None,
    steps: Callable[[str, int], Step] = lambda *part: lambda: None,
) -> tuple[list[Row], TextReference, Tensor]:
    """Measure the `calls` of every layer (None: each operation once), and the layers' forwards with `probe_config`, on
    ids [B,T] -> rows, references, and the last layer's fp64 output [2B,T,H] of the text `with_perturbed_input`."""
    calls = SizedCalls(target) if calls is None else calls
    x, probe_config, rows = F.embedding(ids, target.embed_tokens), target.probe_config(ids.shape[1]), list[Row]()
    expected, exact = TextReference(x), with_perturbed_input(x)
    probe_expected = expected if probe_config == target.config else TextReference(x)
    step = steps("operations of the first layer", 1)
    for index, layer in enumerate(target.layers):
        check = target.check(layer, expected.x, target.config)
        for call in calls(check, index):
            rows += target.measure(index, *call)
        # One pass over the layer's weights in fp64, for torch's input of the layer and for fp64's.
        inputs, size = with_perturbed_input(check.values.x), 2 * len(x)
        both = check.fp64(torch.cat((inputs, exact.to(inputs.device))))
        near = functools.cache(partial(limits_near, target, layer, check.values.x, target.config))
        expected.advance(check, reference.Values(*(part[: len(part) // 2] for part in both)), near)
        exact = both.output[size:].clone()  # a view would keep the rest alive
        if probe_expected is not expected:
            check = target.check(layer, probe_expected.x, probe_config)
            near = functools.cache(partial(limits_near, target, layer, check.values.x, probe_config))
            probe_expected.advance(check, check.fp64(with_perturbed_input(check.values.x)), near)
        step()
        if index == 0:  # it has all sizes
            step = steps("operations of other layers", len(target.layers) - 1)
    logits, count = None, len(list(target.forward_calls(probe_config, *ids.shape)))
    probe = LayerProbe(probe_expected.layers, steps("layers of forwards", count * len(target.layers)))
    if target.is_mixtral:
        pair = target.head(probe_expected.exact, to_fp64), target.head(probe_expected.x)
        logits = Fp64Reference.from_baseline(*pair, END_RATIO, target.coarse)
    with target.forward(probe_config, probe, probe_layers=True) as forward:
        for case, tokens, valid, cache, kwargs in target.forward_calls(probe_config, *ids.shape):
            probe.start(case, tokens, valid)
            with target.catch_faults(probe.fail):
                out = forward(ids[probe.where], cache, **{name: x.to(ids.device) for name, x in kwargs.items()})
                if logits is not None:
                    measured = probe.measure(logits, out) if out.dtype == torch.float32 else (math.inf, logits.limit)
                    probe.rows.append(Row(None, "logits", case, *measured))
    return rows + probe.as_rows(), expected, exact


def compare_in_fp32(target: ModelUnderTest, expected: TextReference, step: Step) -> list[Row]:
    """The rows of each layer alone with its weights widened to fp32, on torch's input of that layer."""
    rows = []
    for index, layer in enumerate(expected.layers):
        fp32_model = ModelUnderTest(single_layer_model(target.model, target.layers[index], layer.x))
        B, T, _ = layer.x.shape
        layer_rows = compare_layers(fp32_model, torch.arange(B * T, device=layer.x.device).view(B, T))[0]
        for row in layer_rows:  # all have the model's head: once is enough
            if row.layer is not None or index == 0:
                rows.append(replace(row, layer=None if row.layer is None else index, case=row.case + FP32))
        fp32_model.layers[0]._parameters.clear()  # the probe's copies are cycles of references, and would keep it
        step()
    return rows


class LayerProbe:
    """Compares what enters and leaves each layer with the references, and what attention and experts add, which a large
    residual stream hides. Replaces what enters, and routes, of which `flips` counts those that differ."""

    def __init__(self, layers: list[LayerReference], step: Step = lambda: None) -> None:
        self.layers, self.step, self.flips = layers, step, 0
        self.rows: list[Row] = []

    def start(self, case: str, tokens: Tensor | None = None, valid: Tensor | None = None) -> None:
        """Begin a forward of `tokens` [R,n], row r of sequence r mod B, and from T on of the next sequence (None: the
        text); valid: no padding."""
        B, T, _ = self.layers[0].x.shape
        tokens = torch.arange(T).expand(B, T) if tokens is None else tokens
        self.where = (torch.arange(len(tokens))[:, None] + tokens // T) % B, tokens % T
        self.valid = torch.ones_like(tokens, dtype=torch.bool) if valid is None else valid
        self.where_valid = tuple(index[self.valid] for index in self.where)
        self.case, self.layer = case, 0

    def fail(self, note: str) -> None:
        """Record that the forward raised, in the layer that it had reached."""
        self.rows.append(Row.exact(min(self.layer, len(self.layers) - 1), "layer", self.case, False, note))

    def replace_routes(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """weights, ids [BT,K] of the gate -> torch's for tokens that torch routes to other experts, else unchanged."""
        expected, shape = self.layers[self.layer], self.valid.shape
        got, want = ids.view(*shape, -1), expected.ids[self.where].to(ids.dtype)
        pair = expected.route_error(got[self.valid], self.where_valid, weights.view_as(got)[self.valid])
        self.rows.append(Row(self.layer, "layer", f"{ROUTES}, {self.case}", *pair))
        self.layer += 1
        if got.shape != want.shape:
            return expected.weights[self.where].to(weights.dtype).flatten(0, 1), want.flatten(0, 1)
        flipped = (got.sort(-1).values != want.sort(-1).values).any(-1, keepdim=True)
        self.flips += int(flipped[self.valid].sum())
        weights = weights.view_as(got).where(~flipped, expected.weights[self.where].to(weights.dtype))
        return weights.flatten(0, 1), torch.where(flipped, want, got).view_as(ids)

    def measure(self, expected: Fp64Reference, got: Tensor) -> tuple[float, float]:
        """The largest error of a token of `got` [R,n,...] that is no padding, and its limit."""
        fits = got.shape[:2] == self.valid.shape
        return expected.measure(got[self.valid], self.where_valid) if fits else (math.inf, expected.limit)

    def record(self, index: int, name: str, got: Tensor) -> Tensor:
        """Record the error of `name` of a LayerReference -> `got`."""
        values = got.view(*self.valid.shape, -1) if got.dim() == 2 else got
        case = f"{LAYER_PARTS[name]}, {self.case}" if name in LAYER_PARTS else self.case
        error, limit = self.measure(self.layers[index].references[name], values)
        if name in RATIOS and limit < error <= NEAR_MISS * limit:
            limit = max(limit, self.layers[index].near_limits()[name])
        self.rows.append(Row(index, "layer", case, error, limit))
        return got

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Record the input of a layer, which must equal the reference's, as the probe put it there -> the latter."""
        expected = self.layers[index].x[self.where]
        same = x.shape == expected.shape and torch.allclose(x[self.valid], expected[self.valid], 0.0, 0.0, True)
        self.rows.append(Row.exact(index, "layer", self.case, same))
        return expected

    def leave(self, index: int, x: Tensor) -> Tensor:
        """Record the output of a layer -> the reference's input of the next layer."""
        self.record(index, "output", x)
        self.step()
        return self.layers[index + 1].x[self.where] if index + 1 < len(self.layers) else x

    # In the place of the methods of `layer.Layer`.
    def forward(self, index: int, forward: Callable[..., Any], h: Tensor, x: Tensor, *args: Any) -> Any:
        x = self.enter(index, x)
        self.record(index, "normed", h)
        h, x = forward(self.layers[index].h[self.where], x, *args)
        return h, self.leave(index, x)

    def attention(self, index: int, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        return self.record(index, "attn_output", forward(*args))

    def experts(self, index: int, forward: Callable[..., Any], h: Tensor, x: Tensor, *args: Any) -> Any:
        # Without the residual stream. How a text is split changes its number of rows alone: many and few are enough.
        if self.case in (UNCACHED, ALONE):
            self.record(index, "y", forward(h, torch.zeros_like(x), *args)[1])
        return forward(h, x, *args)

    def as_rows(self) -> list[Row]:
        """A row for each layer and case: attention, routes, experts, the whole layer."""
        order = {LAYER_PARTS["attn_output"]: 0, ROUTES: 1, LAYER_PARTS["y"]: 2}
        return sorted(worst_rows(self.rows), key=lambda row: order.get(row.case.partition(",")[0], 3))
