"""Every operation of a layer on torch's activations, and every layer's own forward on torch's input.

Right operations may make a wrong model, by swapped norms or a window off by one, so the model's own forward runs, too.
What enters a layer is replaced, to show a fault in its layer: one flipped route does not hide the next layers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from . import tolerance
from .calls import LayerCheck, SizedCalls
from .models_under_test import ALONE, UNCACHED, ModelUnderTest, model_in_fp32
from .report import END_RATIO, FP32, Row, worst_rows
from .tolerance import Fp64Reference, LayerReference, largest, to_fp64, with_perturbed_input

ROUTES, LAYER_PARTS = "routes", {"attn_output": "attention", "y": "experts"}  # rows of what a layer computes inside
PART_RATIO = 3.0  # of LAYER_PARTS in the place of RATIO: without the residual stream few values decide
RATIOS = {"attn_output": PART_RATIO, "y": PART_RATIO, "output": tolerance.RATIO}
NEAR_MISS, NEAR_INPUTS = 1.5, 4  # an error up to so many times its limit is judged by torch's on so many more inputs

Step = Callable[[], None]  # called after each layer of each forward


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
    count = len(list(target.forward_calls(probe_config, *ids.shape)))
    probe = LayerProbe(probe_expected.layers, steps("layers of forwards", count * len(target.layers)))
    pair = target.head(probe_expected.exact, to_fp64), target.head(probe_expected.x)
    logits = Fp64Reference.from_baseline(*pair, END_RATIO, target.coarse)
    with target.forward(probe_config, probe, probe_layers=True) as forward:
        for case, tokens, valid, cache, kwargs in target.forward_calls(probe_config, *ids.shape):
            probe.start(case, tokens, valid)
            with target.catch_faults(probe.fail):
                out = forward(ids[probe.where], cache, **{name: x.to(ids.device) for name, x in kwargs.items()})
                measured = probe.measure(logits, out) if out.dtype == torch.float32 else (math.inf, logits.limit)
                probe.rows.append(Row(None, "logits", case, *measured))
    return rows + probe.as_rows(), expected, exact


def compare_in_fp32(target: ModelUnderTest, expected: TextReference, step: Step) -> list[Row]:
    """The rows of each layer alone with its weights widened to fp32, on torch's input of that layer."""
    rows = []
    for index, layer in enumerate(expected.layers):
        fp32_model = ModelUnderTest(model_in_fp32(target.model, target.layers[index], layer.x))
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
