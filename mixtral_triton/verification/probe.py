"""Each layer's own forward against its reference, in the model's dtype and in fp64.

Right operations may make a wrong model, by swapped norms or a window off by one. Operations are computed by their
references, so that in fp64 a layer equals its reference but for the order of sums, and a fault that 16 bits hide shows.
What enters and leaves a layer is replaced, to show a fault in its layer.

B batch, T tokens, H hidden, K experts a token, E experts
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..kernels.weights.fp8 import with_fp8_activations
from .report import END_RATIO, Row, worst_rows
from .tolerance import (
    FLOOR,
    RATIO,
    ConvertedExperts,
    Fp64Reference,
    largest,
    perturb,
    to_fp64,
    token_floor,
    with_perturbed_input,
    worst,
)

ROUTES, PARTS = "routes", {"attn_output": "attention", "y": "experts"}  # rows of what a layer computes inside
ROUNDED = FLOOR[torch.float32]  # the limit in fp64, where logits, rotary tables and scales of a cache are fp32
Step = Callable[[], object]  # called after each layer


@dataclass(frozen=True)
class LayerReference:
    """What a layer gets and gives, in the model's dtype or in fp64, and the limits of errors."""

    inputs: tuple[Tensor, Tensor]  # h, the norm of the residual stream, and x, the stream, [B,T,H] each
    outputs: tuple[Tensor, Tensor]
    ids: Tensor  # the experts of every token [B,T,K], and their weights
    weights: Tensor
    logits: Tensor  # the gate's, fp64 [B,T,E]
    logits_limit: float  # the absolute limit of a logit's error
    parts: dict[str, Fp64Reference]  # of h and x, of the outputs ("next h", "output"), and of PARTS
    renormalize: bool  # as in `route`

    def route_error(self, ids: Tensor, where: Any, weights: Tensor) -> tuple[float, float]:
        """The worse of two errors of routes [M,K] at `where` in [B,T], with its limit: of `weights`, and how far an
        expert's logit is below one left out, by the largest; infinite where ids are not K distinct experts, or weights
        of another dtype."""
        # The limit allows two wrong logits, one too large and one too small.
        scale = max(largest(self.logits), 1e-30)
        limit, logits = 2 * self.logits_limit / scale, self.logits[where]
        ordered = ids.long().sort(-1).values
        out_of_range = ordered.numel() and (ordered.amin() < 0 or ordered.amax() >= logits.shape[-1])
        same = ids.shape[-1] == self.ids.shape[-1] and self.weights.dtype in (weights.dtype, torch.float64)
        if not same or out_of_range or (ordered[..., 1:] == ordered[..., :-1]).any():
            return math.inf, limit
        left_out = logits.scatter(-1, ordered, -math.inf).amax(-1)
        shortfall = largest((left_out - logits.gather(-1, ordered).amin(-1)).clamp(min=0.0)) / scale
        # An error d of each logit changes a weight of a softmax by at most d / 2.
        chosen = ids.long()
        exact = logits.gather(-1, chosen).softmax(-1) if self.renormalize else logits.softmax(-1).gather(-1, chosen)
        rounding = FLOOR.get(weights.dtype, 0.0)
        return worst([(shortfall, limit), (largest(weights.double() - exact), self.logits_limit / 2 + rounding)])


class TextReference:
    """What torch computes of a text ids [B,T]: each layer in the model's dtype on the residual stream of that, and in
    fp64 with the same routes."""

    def __init__(
        self, model: Any, config: Any, ids: Tensor, cache_dtype: torch.dtype | None = None, step: Step = lambda: None
    ) -> None:
        self.config, self.cache_dtype, quantized = config, cache_dtype, cache_dtype is not None
        # Whether a rounding of fp32 may change a code of the cache or of activations.
        self.coarse = quantized or model.activations is not None
        self.weight = with_fp8_activations if model.activations is not None else lambda weight: weight
        attend = partial(reference.uncached_attention, config.sliding_window, quantized=quantized)
        self.attend = attend(model.cos, model.sin), attend(model.cos.double(), model.sin.double())
        self.layers, self.fp64_layers = list[LayerReference](), list[LayerReference]()
        x, norms = F.embedding(ids, model.embed_tokens), [layer.input_layernorm for layer in model.layers]
        exact = with_perturbed_input(x)
        for layer, next_norm in zip(model.layers, [*norms, model.norm][1:], strict=True):
            x, exact = self._append(layer, next_norm, x, exact)
            step()
        h = torch.cat([part.double() for part in (self.layers[-1].outputs[0], perturb(self.layers[-1].outputs[0]))])
        logits = partial(reference.linear, weight=to_fp64(model.lm_head))
        end = reference.rms_norm(x, model.norm, config.rms_norm_eps), model.lm_head
        self.exact_logits = logits(reference.rms_norm(exact, to_fp64(model.norm), config.rms_norm_eps))
        self.torch_logits = reference.linear(*end)
        self.end_to_end = self._limited(self.exact_logits, self.torch_logits)
        self.logits = self._limited(logits(h), self.torch_logits)
        self.fp64_logits = _in_fp64(self.exact_logits[: len(ids)])

    def _limited(self, exact: Tensor, baseline: Tensor) -> Fp64Reference:
        return Fp64Reference.from_baseline(exact, baseline, END_RATIO, self.coarse)

    def _append(self, layer: Any, next_norm: Tensor, x: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
        """Compute a layer on x [B,T,H], the stream of torch, and on `exact` fp64 [2B,T,H] -> both after the layer."""
        config, (B, T, _) = self.config, x.shape
        values = reference.block(layer, config, x, self.attend[0], convert=self.weight)
        rows = torch.cat((with_perturbed_input(x), exact))
        wide = reference.block(layer, config, rows, self._attend_in_fp64, values.ids.repeat(4, 1), self._to_fp64)
        next_h = reference.rms_norm(values.output, next_norm, config.rms_norm_eps)
        next_wide = reference.rms_norm(wide.output, to_fp64(next_norm), config.rms_norm_eps)
        pairs = {"h": (values.normed, wide.normed), "next h": (next_h, next_wide)}
        pairs |= {name: (getattr(values, name), getattr(wide, name)) for name in ("attn_output", "output")}
        parts = {name: self._limited(exact[: 2 * B], baseline) for name, (baseline, exact) in pairs.items()}
        fp64 = {name: each[2 * B : 3 * B] for name, (_, each) in pairs.items()} | {"y": wide.y[2 * B : 3 * B]}
        logits, weights = (part.view(4, B, T, -1) for part in (wide.logits, wide.weights))
        error = max(largest(x.view_as(logits[0]) - logits[0]) for x in (values.logits, logits[1]))
        limit = RATIO * error + token_floor(x.dtype, self.coarse) * largest(logits[0])
        ids, routing_weights = (part.view(B, T, -1) for part in (values.ids, values.weights))
        routes = ids, routing_weights, logits[0].clone(), limit
        inputs, outputs = (values.normed, x), (next_h, values.output)
        self.layers.append(LayerReference(inputs, outputs, *routes, parts, config.renormalize))
        routes = ids, weights[2].clone(), logits[2].clone(), ROUNDED * largest(logits[2])
        parts = {name: _in_fp64(part) for name, part in fp64.items()}
        inputs, outputs = (parts["h"].exact, exact[:B].clone()), (parts["next h"].exact, parts["output"].exact)
        self.fp64_layers.append(LayerReference(inputs, outputs, *routes, parts, config.renormalize))
        return values.output, wide.output[2 * B :].clone()

    def _to_fp64(self, weight: Any) -> Any:
        weight = self.weight(weight)
        return ConvertedExperts(weight) if len(weight.shape) == 3 else to_fp64(weight)

    def _attend_in_fp64(self, q: Tensor, k: Tensor, v: Tensor, *norms: Any) -> Tensor:
        """One sequence at a time, to save memory."""
        sequences = zip(*(part.split(1) for part in (q, k, v)), strict=True)
        return torch.cat([self.attend[1](*sequence, *norms) for sequence in sequences])


def _in_fp64(exact: Tensor) -> Fp64Reference:
    return Fp64Reference(exact.clone(), ROUNDED, float(exact.norm(dim=-1).median()))


class Probe:
    """Compares what enters and leaves each layer with its reference, and replaces it; so it does routes, of which
    `flips` counts those that differ."""

    def __init__(self, layers: list[LayerReference], suffix: str = "", step: Step = lambda: None) -> None:
        self.layers, self.suffix, self.step, self.flips = layers, suffix, step, 0
        self.rows: list[Row] = []

    def start(self, case: str, tokens: Tensor, valid: Tensor) -> None:
        """Begin a forward of `tokens` [R,n], row r of sequence r; valid: no padding."""
        self.where, self.valid = (torch.arange(len(tokens))[:, None].expand_as(tokens), tokens), valid
        self.where_valid = tuple(index[valid] for index in self.where)
        self.case, self.layer = case + self.suffix, 0

    @contextmanager
    def attached(self, model: Any, routes_alone: bool = False) -> Iterator[None]:
        """Compare and replace within the model's own layers, beside whatever a caller changed there."""
        with ExitStack() as stack:
            for index, layer in enumerate(model.layers):
                if not routes_alone:
                    stack.enter_context(layer.register_forward_pre_hook(partial(self.enter, index), prepend=True))
                    stack.enter_context(layer.register_forward_hook(partial(self.leave, index)))
                for name in ("route",) if routes_alone else ("attention", "route", "experts"):
                    function = partial(getattr(self, name), index, getattr(layer, name))
                    stack.enter_context(mock.patch.object(layer, name, function))
            yield

    def fail(self, note: str) -> None:
        """Record that the forward raised, in the layer that it had reached."""
        self.rows.append(Row.exact(self.layer, "layer", self.case, False, note))

    def measure(self, expected: Fp64Reference, got: Tensor) -> tuple[float, float]:
        """The largest error of a token of `got` [R,n,...] that is no padding, and its limit."""
        fits = got.shape[:2] == self.valid.shape
        return expected.measure(got[self.valid], self.where_valid) if fits else (math.inf, expected.limit)

    def record(self, index: int, name: str, got: Tensor) -> None:
        values = got.view(*self.valid.shape, -1) if got.dim() == 2 else got
        case = f"{PARTS[name]}, {self.case}" if name in PARTS else self.case
        self.rows.append(Row(index, "layer", case, *self.measure(self.layers[index].parts[name], values)))

    def record_logits(self, expected: Fp64Reference, out: Tensor) -> None:
        pair = self.measure(expected, out) if out.dtype == torch.float32 else (math.inf, expected.limit)
        self.rows.append(Row(None, "logits", self.case, *pair))

    def enter(self, index: int, layer: Any, args: Any) -> Any:
        """Record the inputs of a layer, which are what the probe put there but for the first layer's."""
        (h, x), self.layer = args[:2], index
        self.record(index, "h", h)
        wanted_h, wanted_x = (each[self.where] for each in self.layers[index].inputs)
        same = x.shape == wanted_x.shape and torch.allclose(x[self.valid], wanted_x[self.valid], 0.0, 0.0, True)
        self.rows.append(Row.exact(index, "layer", self.case, same))
        return wanted_h, wanted_x, *args[2:]

    def leave(self, index: int, layer: Any, args: Any, outputs: Any) -> Any:
        """Record the outputs of a layer -> the reference's."""
        for name, got in zip(("next h", "output"), outputs, strict=True):
            self.record(index, name, got)
        self.step()
        return tuple(each[self.where] for each in self.layers[index].outputs)

    # In the place of the methods of `layer.Layer`.
    def attention(self, index: int, attention: Any, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = attention(*args, **kwargs)
        self.record(index, "attn_output", out)
        return out

    def experts(self, index: int, experts: Any, h: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = experts(h, x, *args, **kwargs)
        if "y" in self.layers[index].parts:  # what 16 bits add to a large residual stream shows little of it
            self.record(index, "y", outputs[1] - x)
        return outputs

    def route(self, index: int, route: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """Record the routes [N,K]; return torch's for tokens that torch routes to other experts."""
        h, x, weights, ids = route(*args, **kwargs)
        expected, shape = self.layers[index], self.valid.shape
        got, want = ids.view(*shape, -1), expected.ids[self.where].to(ids.dtype)
        pair = expected.route_error(got[self.valid], self.where_valid, weights.view_as(got)[self.valid])
        self.rows.append(Row(index, "layer", f"{ROUTES}, {self.case}", *pair))
        torch_weights = expected.weights[self.where].to(weights.dtype)
        if got.shape != want.shape:
            return h, x, torch_weights.flatten(0, 1), want.flatten(0, 1)
        flipped = (got.sort(-1).values != want.sort(-1).values).any(-1, keepdim=True)
        self.flips += int(flipped[self.valid].sum())
        weights = weights.view_as(got).where(~flipped, torch_weights)
        return h, x, weights.flatten(0, 1), torch.where(flipped, want, got).view_as(ids)


def in_order(rows: list[Row]) -> list[Row]:
    """A row for each layer and case: attention, routes, experts, the whole layer."""
    order = {PARTS["attn_output"]: 0, ROUTES: 1, PARTS["y"]: 2}
    return sorted(worst_rows(rows), key=lambda row: order.get(row.case.partition(",")[0], 3))
