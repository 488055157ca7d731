"""Every operation of a layer on torch's activations, and every layer's own forward on torch's input.

One flipped route then does not hide later layers. Right operations may make a wrong model, by swapped norms or a window
off by one, so the model's own forward runs, too. Only what enters a layer is replaced, to show a fault in its layer.

B batch, T tokens, H hidden, E experts, K experts per token, V vocabulary
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops, reference
from ..cache import KVCache
from ..kernels import reference as kernel_reference
from ..kernels.experts.tiles import DECODE_TOKENS
from ..kernels.linear import SKINNY_M
from ..tools import tolerance
from ..tools.tolerance import Args, LayerReference, Tolerance, largest, to_fp64, with_perturbed_input
from .report import TORCH, Row

UNCACHED, CHUNKS, TOKENS = "whole text", "in chunks", "token by token"
SINGLE_TOKENS = 3  # tokens that are read one at a time, after the chunks
PADDING = 3  # tokens of right padding behind one of the chunks
WINDOW_FRACTION = 4  # a window as long as the text is reduced by this factor, so that the ring wraps around

Step = Callable[[], None]  # called after each layer of each forward


class LayerCheck:
    """The calls of operations in a layer, on what torch computes in it.

    layer, tables  weights by the names of `model.Layer`; cos and sin fp32
    operation      the runtime's function for (operation, arguments)
    local_ids      routes [N,K] -> routes as this layer numbers its experts
    """

    operation: Callable[[str, Args], Callable[..., Any]] = staticmethod(ops.dispatched)
    local_ids: Callable[[Tensor], Tensor] = staticmethod(lambda ids: ids)

    def __init__(self, values: reference.Values, layer: Any, config: Any, tables: dict[str, Tensor]) -> None:
        self.values, self.layer, self.config, self.tables = values, layer, config, tables
        B, T, _ = values.x.shape
        self.positions = torch.arange(T, device=values.x.device).expand(B, T)
        self.rq, self.rk = reference.rope(values.q, values.k, **tables, positions=self.positions)

    def calls(self) -> Iterator[tuple[str, str, Args]]:
        """(operation, case, arguments). An operation of the registry that no call here names is not verified."""
        window, layer, values = self.config.sliding_window, self.layer, self.values
        eps = {"eps": self.config.rms_norm_eps}
        yield "rms_norm", "input", {"x": values.x, "weight": layer.input_layernorm, **eps}
        norm = {"x": values.attended, "weight": layer.post_attention_layernorm, **eps}
        yield "add_rms_norm", "with residual", norm | {"residual": values.x}
        gate = {"gate": layer.gate, "top_k": values.ids.shape[1]}
        rows = {"x": values.attended.flatten(0, 1), "residual": values.x.flatten(0, 1)}
        yield "rms_norm_gate_route", "all tokens", norm | rows | gate
        table = values.x.flatten(0, 1)  # the layer's input in the place of the embedding
        ids = torch.arange(len(table), device=table.device).view(self.positions.shape)
        rows = {"input_ids": ids, "table": table, "weight": layer.input_layernorm, **eps}
        yield "embed_rms_norm", "rows of the input", rows
        yield "rope", "all tokens", {"q": values.q, "k": values.k, **self.tables, "positions": self.positions}
        keys = {"k": self.rk, "v": values.v, "window": window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        yield from self._cached_calls()
        yield "linear", "o, few tokens", {"x": values.heads[0, :SKINNY_M], "weight": layer.o_proj}
        yield "linear", "o, deterministic", {"x": values.heads, "weight": layer.o_proj, "deterministic": True}
        yield "route", "all tokens", {"logits": values.logits, "top_k": values.ids.shape[1]}
        yield "gate_route", "all tokens", {"x": values.h, **gate}
        yield "sort_by_expert", "all tokens", {"ids": values.ids, "num_experts": len(layer.gate)}
        yield from self._expert_calls()

    def _cached_calls(self) -> Iterator[tuple[str, str, Args]]:
        """A ring cache that holds the first half of the text: a chunk after it, and one token after it."""
        values, (B, T) = self.values, self.positions.shape
        past = torch.full((B,), T // 2, dtype=torch.int32, device=values.x.device)
        cache = KVCache(self.config, B, T, values.x.device, values.x.dtype)
        ring = {"k_cache": cache.keys[0], "v_cache": cache.values[0]}
        half, rest, one = slice(0, T // 2), slice(T // 2, T), slice(T // 2, T // 2 + 1)
        first = {"k": self.rk[:, half], "v": values.v[:, half], **ring, "past": past * 0, "new": past}
        yield "append", "first half", first
        kernel_reference.append(**first)
        where = {**ring, "past": past, "window": self.config.sliding_window}
        chunk = {"q": self.rq[:, rest], "k": self.rk[:, rest], "v": values.v[:, rest]}
        yield "cached_attention", "chunk", {**chunk, **where, "new": T - past}
        where["new"] = new = torch.ones_like(past)
        token = {"q": values.q[:, one], "k": values.k[:, one], "v": values.v[:, one]}
        yield "rope_append_attention", "one token", {**token, **self.tables, **where}
        kernel_reference.append(self.rk[:, one], values.v[:, one], **ring, past=past, new=new)
        yield "cached_attention", "one token", {"q": self.rq[:, one], "k": None, "v": None, **where}

    def _expert_calls(self) -> Iterator[tuple[str, str, Args]]:
        """The routes of the text, and routes that take every expert: few tokens (decode), and more (prefill)."""
        values, E = self.values, len(self.layer.gate)
        (N, K), device = values.ids.shape, values.h.device
        proj = {"gate_up_proj": self.layer.gate_up_proj, "down_proj": self.layer.down_proj}
        routed = {"x": values.h, **proj, "ids": self.local_ids(values.ids), "weights": values.weights}
        yield "expert_swiglu", "as routed", routed
        norm = {"norm_weight": self.layer.post_attention_layernorm, "eps": self.config.rms_norm_eps}
        residual = (values.x + values.attended).view_as(values.h)
        yield "experts_add_rms_norm", "as routed", routed | norm | {"residual": residual}
        needed = -(-E // K)
        sizes = {"decode": min(DECODE_TOKENS, max(16, needed)), "prefill": max(DECODE_TOKENS + 1, needed)}
        for case, size in sizes.items():
            rows = torch.arange(size, device=device)
            ids = self.local_ids(((rows[:, None] * K + torch.arange(K, device=device)) % E).int())
            args = {"x": values.h[rows % N], **proj, "ids": ids, "weights": values.weights[rows % N]}
            yield "expert_swiglu", f"every expert, {case}", args

    def fp64(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The gate's logits and the layer's output on x fp64 [nB,T,H], in fp64 with torch's routes."""
        ids = self.values.ids.repeat(len(x) // len(self.values.x), 1)
        exact = tolerance.fp64_block(self.layer, self.config, self.tables, x, ids)
        return exact.logits.view(*x.shape[:2], -1), exact.output


class Target:
    """A Mixtral as `verify` uses it: the weights for torch's computation, and the model's own forward."""

    output, peer = "logits", TORCH  # what `end_to_end` gives; what the model is compared with
    padding = PADDING

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.layers = model, model.full_config, model.layers
        self.embed_tokens, self.norm, self.lm_head = model.embed_tokens, model.norm, model.lm_head
        self.tables, self.model_head = {"cos": model.cos, "sin": model.sin}, model.head

    def check(self, layer: Any, x: Tensor, config: Any) -> LayerCheck:
        """What torch computes in a layer on x [B,T,H]."""
        attend = reference.uncached_attention(config.sliding_window, **self.tables)
        return LayerCheck(reference.block(layer, config, x, attend), layer, config, self.tables)

    def probe_config(self, tokens: int) -> Any:
        """The config with a window that is shorter than the text."""
        window = self.config.sliding_window
        if window is None or window < tokens:
            return self.config
        return replace(self.config, sliding_window=max(1, tokens // WINDOW_FRACTION))

    def probe(self, config: Any, ids: Tensor, probe: LayerProbe) -> None:
        """The layers' own forwards on ids [B,T], without a cache and over one."""
        B, T = ids.shape
        with self.forward(config, probe, probe_layers=True) as forward:
            probe.start(UNCACHED, torch.arange(T))
            forward(ids)
            cache = self.make_cache(config, B, T + PADDING)
            for case, first, valid, padding in split_text(T, self.padding):
                tokens = torch.cat((torch.arange(first, first + valid), torch.zeros(padding, dtype=torch.int64)))
                probe.start(case, tokens, torch.arange(len(tokens)) < valid)
                lengths = torch.full((B,), valid, dtype=torch.int32, device=ids.device) if padding else None
                forward(ids[:, tokens], cache, lengths)

    def end_to_end(self, ids: Tensor, probe: LayerProbe) -> Tensor:
        """The model's own forward with torch's routes -> [B,T,V], or without a head [B,T,H]."""
        probe.start("end to end", torch.arange(ids.shape[1]))
        with self.forward(self.model.config, probe) as forward:
            return self.model_head(forward(ids))

    def make_cache(self, config: Any, batch: int, slots: int) -> Any:
        return KVCache(config, batch, slots, self.model.device, self.model.dtype)

    @contextmanager
    def forward(self, config: Any, probe: LayerProbe, probe_layers: bool = False) -> Iterator[Callable[..., Tensor]]:
        """The model's forward without the head, of (ids, cache, lengths), with routes and layers' inputs replaced."""
        yield shallow_copy(self.model, config, probe, probe_layers).hidden

    def head(self, convert: Callable[[Any], Any] = lambda weight: weight, lm_head: Any = None) -> Any:
        """The final norm and the head in torch, a function of x [...,H]; `convert` is applied to the weights."""
        norm, lm_head = convert(self.norm), convert(self.lm_head if lm_head is None else lm_head)

        def logits(x: Tensor) -> Tensor:
            h = reference.rms_norm(x, norm, self.config.rms_norm_eps)
            return h if lm_head is None else reference.linear(h, lm_head)

        return logits


class TextReference:
    """References of `layers`, torch's residual stream x [B,T,H] after them, and the last layer's output on its input
    `with_perturbed_input`, exact fp64 [2B,T,H]."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.exact = x, x.double().repeat(2, 1, 1)
        self.layers: list[LayerReference] = []

    def advance(self, check: LayerCheck, logits: Tensor, output: Tensor) -> None:
        """Append the layer of `check`, with its gate logits and output in fp64 [2B,T,...]."""
        values, norm = check.values, to_fp64(check.layer.input_layernorm)
        normed = reference.rms_norm(self.exact.to(values.x.device), norm, check.config.rms_norm_eps)
        references = (
            tolerance.Fp64Reference.from_baseline(normed, values.normed),
            tolerance.Fp64Reference.from_baseline(output, values.output),
        )
        logits, perturbed = logits.chunk(2)
        error = max(largest(x.view_as(logits) - logits) for x in (values.logits, perturbed))
        limit = tolerance.RATIO * error + tolerance.TOKEN_FLOOR[values.x.dtype] * largest(logits)
        ids, weights = (x.view(*logits.shape[:2], -1) for x in (values.ids, values.weights))
        self.layers.append(LayerReference(values.x, values.normed, ids, weights, *references, logits, limit))
        self.x, self.exact = values.output, output


def check_layers(
    target: Target, ids: Tensor, probe_config: Any, step: Step
) -> tuple[list[Row], TextReference, TextReference, Tensor]:
    """Measure every call of every layer on ids [B,T] -> rows, references with the model's config and `probe_config`,
    and the last layer's output [2B,T,H] in fp64 from the text `with_perturbed_input` on, with torch's routes."""
    x, rows = F.embedding(ids, target.embed_tokens), []
    expected, exact = TextReference(x), with_perturbed_input(x)
    probe_expected = expected if probe_config == target.config else TextReference(x)
    for index, layer in enumerate(target.layers):
        check = target.check(layer, expected.x, target.config)
        for op, case, args in check.calls():
            rows.append(Row(index, op, case, *Tolerance(op, args).measure(check.operation(op, args))))
        # One pass over the layer's weights in fp64, for torch's input of the layer and for fp64's.
        inputs, size = with_perturbed_input(check.values.x), 2 * len(x)
        logits, output = check.fp64(torch.cat((inputs, exact.to(inputs.device))))
        expected.advance(check, logits[:size], output[:size])
        exact = output[size:]
        if probe_expected is not expected:
            check = target.check(layer, probe_expected.x, probe_config)
            probe_expected.advance(check, *check.fp64(with_perturbed_input(check.values.x)))
        step()
    return rows, expected, probe_expected, exact


class LayerProbe:
    """Compares what enters and leaves each layer of a forward with the references, and replaces what enters it.

    The gate's routes are compared with torch's and replaced, too. `flips` counts those that differ.
    """

    def __init__(self, layers: list[LayerReference], step: Step = lambda: None) -> None:
        self.layers, self.step, self.flips = layers, step, 0
        self.errors: dict[tuple[int, str], list[tuple[float, float]]] = {}

    def start(self, case: str, tokens: Tensor, valid: Tensor | None = None, rows: Tensor | None = None) -> None:
        """Begin a forward of `tokens` [n] or [R,n] of the text's sequences `rows` [R]; None: of each sequence.

        valid bool [n] or [R,n]: False for padding. All are on the CPU, as the layers may be on several GPUs.
        """
        rows = torch.arange(len(self.layers[0].x)) if rows is None else rows
        self.where = torch.broadcast_tensors(rows[:, None], tokens)
        self.valid = (torch.tensor(True) if valid is None else valid).expand_as(self.where[1])
        self.where_valid = tuple(index[self.valid] for index in self.where)
        self.case, self.layer = case, 0

    def replace_routes(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """weights, ids [BT,K] of the gate -> torch's for tokens that torch routes to other experts, else unchanged."""
        index, expected = self.layer, self.layers[self.layer]
        self.layer += 1
        shape = *self.valid.shape, -1
        got, want = ids.view(shape), expected.ids[self.where].to(ids.dtype)
        pair = expected.route_error(got[self.valid], self.where_valid)
        self.errors.setdefault((index, "routes"), []).append(pair)
        flipped = (got.sort(-1).values != want.sort(-1).values).any(-1, keepdim=True)
        self.flips += int(flipped[self.valid].sum())
        weights = weights.view(shape).where(~flipped, expected.weights[self.where].to(weights.dtype))
        return weights.flatten(0, 1), torch.where(flipped, want, got).view_as(ids)

    def record(self, index: int, name: str, got: Tensor) -> None:
        """The error of `name` of a LayerReference. x must equal the reference's, as the probe put it there."""
        expected = getattr(self.layers[index], name)
        expected = tolerance.Fp64Reference(expected.double(), 0.0) if name == "x" else expected
        self.errors.setdefault((index, self.case), []).append(expected.measure(got[self.valid], self.where_valid))

    def enter(self, index: int, x: Tensor) -> Tensor:
        """Record the input of a layer -> the reference's input."""
        self.record(index, "x", x)
        return self.layers[index].x[self.where]

    def leave(self, index: int, x: Tensor) -> Tensor:
        """Record the output of a layer -> the reference's input of the next layer."""
        self.record(index, "output", x)
        self.step()
        return self.layers[index + 1].x[self.where] if index + 1 < len(self.layers) else x

    def forward(self, index: int, forward: Callable[..., Any], h: Tensor, x: Tensor, *args: Any) -> Any:
        """`model.Layer.forward` on the reference's input, in the place of what the model passes."""
        x = self.enter(index, x)
        self.record(index, "normed", h)
        h, x = forward(self.layers[index].h[self.where], x, *args)
        return h, self.leave(index, x)

    def rows(self) -> list[Row]:
        """A row for each layer and case, then the routes of each layer."""
        items = sorted(self.errors.items(), key=lambda item: item[0][1] == "routes")
        return [Row(index, "layer", case, *tolerance.worst(pairs)) for (index, case), pairs in items]


def shallow_copy(model: Any, config: Any, probe: LayerProbe, probe_layers: bool = False) -> Any:
    """`model` with another config, on the same weights; `probe` replaces its routes, and the layers' inputs."""

    def route(forward: Callable[..., Any], *args: Any) -> tuple[Tensor, ...]:
        h, x, weights, ids = forward(*args)
        return h, x, *probe.replace_routes(weights, ids)

    model = copy.copy(model)
    model._modules, model.config = dict(model._modules), config
    layers = [copy.copy(layer) for layer in model.layers]
    for index, layer in enumerate(layers):
        layer.config, layer.route = config, partial(route, layer.route)
        if probe_layers:
            layer.forward = partial(probe.forward, index, layer.forward)
    model.layers = nn.ModuleList(layers)
    return model


def split_text(tokens: int, padding: int = 0) -> list[tuple[str, int, int, int]]:
    """The calls that read a text over a cache: (case, first token, number of tokens, tokens of padding)."""
    single = min(SINGLE_TOKENS, tokens - 1) or 1
    rest = tokens - single
    bounds = sorted({0, -(-2 * rest // 5), -(-3 * rest // 4), rest})
    chunks = [(CHUNKS, a, b - a, padding if at == 1 else 0) for at, (a, b) in enumerate(pairwise(bounds))]
    return chunks + [(TOKENS, at, 1, 0) for at in range(rest, tokens)]
