"""Every operation of a layer on torch's activations, and every layer's own forward on torch's input.

One flipped route then does not hide later layers. Right operations may make a wrong model, by swapped norms or a window
off by one, so the model's own forward runs, too. Only what enters a layer is replaced, to show a fault in its layer.

B batch, T tokens, H hidden, E experts, K experts per token, V vocabulary
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..cache import KVCache
from ..model import Layer
from ..tools import tolerance
from ..tools.tolerance import Fp64Reference, LayerReference, Tolerance, largest, to_fp64, with_perturbed_input
from .calls import Call, LayerCheck, text_calls
from .report import FP32, TORCH, Row

UNCACHED, CHUNKS, TOKENS = "whole text", "in chunks", "token by token"
ROUTES, PARTS = "routes", {"attended": "attention", "y": "experts"}  # rows of what a layer computes inside
PART_RATIO = 3.0  # of PARTS in the place of RATIO: without the residual stream few values decide
ERROR_LENGTH = 200  # characters of a raised error in a row
SINGLE_TOKENS = 3  # tokens that are read one at a time, after the chunks
PADDING = 3  # tokens of right padding behind one of the chunks
WINDOW_FRACTION = 4  # a window as long as the text is reduced by this factor, so that the ring wraps around

Step = Callable[[], None]  # called after each layer of each forward


class Target:
    """A Mixtral as `verify` uses it: the weights for torch's computation, and the model's own forward."""

    output, peer = "logits", TORCH  # what `end_to_end` gives; what the model is compared with
    uneven = True  # whether the forward takes chunks of unequal length
    catches_faults = True  # whether an error that an operation or a forward raises is a wrong row
    widens = True  # whether a layer can be taken out and compared in fp32
    generates = True  # whether the model has a `generate` of ours

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

    def forwards(self, batch: int, tokens: int) -> int:
        """The number of forwards in `probe`."""
        return 1 + len(split_text(tokens, batch if self.uneven else 1))

    def probe(self, config: Any, ids: Tensor, probe: LayerProbe) -> None:
        """The layers' own forwards on ids [B,T], without a cache and over one."""
        B, T = ids.shape
        with self.forward(config, probe, probe_layers=True) as forward:
            probe.start(UNCACHED, torch.arange(T))
            with self.catch_faults(probe.fail):
                forward(ids)
            cache = self.make_cache(config, B, T + PADDING)
            for case, first, counts in split_text(T, B if self.uneven else 1):
                # One chunk is padded even where all sequences are equally long.
                padding = PADDING if self.uneven and first[0] and case == CHUNKS else 0
                columns, lengths = torch.arange(max(counts) + padding), torch.tensor(counts, dtype=torch.int32)
                valid = columns < lengths[:, None]
                tokens = torch.where(valid, torch.tensor(first)[:, None] + columns, 0)
                probe.start(case, tokens, valid)
                with self.catch_faults(probe.fail):
                    forward(ids[probe.where], cache, None if valid.all() else lengths.to(ids.device))

    @contextmanager
    def catch_faults(self, record: Callable[[Exception], None]) -> Iterator[None]:
        """Pass an error that the runtime raises to `record`, as a fault. Without memory nothing can be said."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not self.catches_faults:
                raise
            record(error)

    def end_to_end(self, ids: Tensor, probe: LayerProbe) -> Tensor:
        """The model's own forward with torch's routes -> [B,T,V], or without a head [B,T,H]."""
        probe.start("end to end", torch.arange(ids.shape[1]))
        out = torch.empty(0)
        with self.catch_faults(probe.fail), self.forward(self.model.config, probe) as forward:
            out = self.model_head(forward(ids))
        return out

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


def single_layer_model(model: Any, index: int, x: Tensor) -> Any:
    """`model` with only the layer `index`, its weights in fp32, and the rows of x [B,T,H] as the embedding."""
    config = replace(model.config, num_hidden_layers=1, vocab_size=x[..., 0].numel())
    weights = {
        name.rpartition(".")[2]: weight for name, weight in model.named_weights().items() if f"s.{index}." in name
    }
    single = copy.copy(model)
    single._parameters, single._modules, single.config, single.full_config = {}, {}, config, config
    frozen = partial(nn.Parameter, requires_grad=False)
    # By way of fp64, all experts of a layer would take twice the memory.
    fp32 = (x.float() if isinstance(x, Tensor) else x.dequantize() for x in weights.values())
    layer = Layer(config, dict(zip(weights, map(frozen, fp32), strict=True)))
    single.layers, single.norm = nn.ModuleList([layer]), frozen(model.norm.float())
    single.embed_tokens = single.lm_head = frozen(x.float().flatten(0, 1))
    return single


class TextReference:
    """References of `layers`, torch's residual stream x [B,T,H] after them, and the last layer's output on its input
    `with_perturbed_input`, exact fp64 [2B,T,H]."""

    def __init__(self, x: Tensor) -> None:
        self.x, self.exact = x, x.double().repeat(2, 1, 1)
        self.layers: list[LayerReference] = []

    def advance(self, check: LayerCheck, exact: reference.Values) -> None:
        """Append the layer of `check`, with what it computes in fp64 on its input `with_perturbed_input`."""
        values, norm = check.values, to_fp64(check.layer.input_layernorm)
        normed = reference.rms_norm(self.exact.to(values.x.device), norm, check.config.rms_norm_eps)
        references = {"normed": Fp64Reference.from_baseline(normed, values.normed)}
        for name, ratio in {"attended": PART_RATIO, "y": PART_RATIO, "output": tolerance.RATIO}.items():
            references[name] = Fp64Reference.from_baseline(getattr(exact, name), getattr(values, name), ratio)
        logits, perturbed = exact.logits.view(2, *values.x.shape[:2], -1)
        error = max(largest(x.view_as(logits) - logits) for x in (values.logits, perturbed))
        limit = tolerance.RATIO * error + tolerance.TOKEN_FLOOR[values.x.dtype] * largest(logits)
        ids, weights = (x.view(*logits.shape[:2], -1) for x in (values.ids, values.weights))
        self.layers.append(LayerReference(values.x, values.normed, ids, weights, logits.clone(), limit, references))
        self.x, self.exact = values.output, exact.output


def check_layers(
    target: Target, ids: Tensor, probe_config: Any, step: Step, calls: Callable[[LayerCheck, int], Iterator[Call]]
) -> tuple[list[Row], TextReference, TextReference, Tensor]:
    """Measure the `calls` of every layer on ids [B,T] -> rows, references with the model's config and `probe_config`,
    and the last layer's output [2B,T,H] in fp64 from the text `with_perturbed_input` on, with torch's routes."""
    x, rows = F.embedding(ids, target.embed_tokens), []
    expected, exact = TextReference(x), with_perturbed_input(x)
    probe_expected = expected if probe_config == target.config else TextReference(x)
    for index in range(len(target.layers)):
        layer = target.layers[index]
        check = target.check(layer, expected.x, target.config)
        rows += [measure_call(target, check, index, *call) for call in calls(check, index)]
        # One pass over the layer's weights in fp64, for torch's input of the layer and for fp64's.
        inputs, size = with_perturbed_input(check.values.x), 2 * len(x)
        both = check.fp64(torch.cat((inputs, exact.to(inputs.device))))
        values = {name: part[: len(part) // 2] for name, part in vars(both).items()}
        expected.advance(check, replace(both, **values))
        exact = both.output[size:].clone()  # a view would keep the rest alive
        if probe_expected is not expected:
            check = target.check(layer, probe_expected.x, probe_config)
            probe_expected.advance(check, check.fp64(with_perturbed_input(check.values.x)))
        del layer, check  # on a mesh, a layer that was gathered goes before the next one is
        step()
    return rows, expected, probe_expected, exact


def check_in_fp32(target: Target, expected: TextReference, step: Step) -> list[Row]:
    """The rows of each layer alone with its weights widened to fp32, on torch's input of that layer."""
    rows = []
    for index, layer in enumerate(expected.layers if target.widens else ()):
        single = Target(single_layer_model(target.model, index, layer.x))
        (B, T, _), nothing = layer.x.shape, lambda: None
        ids, config = torch.arange(B * T, device=layer.x.device).view(B, T), single.probe_config(T)
        found, _, probe_expected, _ = check_layers(single, ids, config, nothing, text_calls)
        probe = LayerProbe(probe_expected.layers)
        single.probe(config, ids, probe)
        rows += [replace(row, layer=index, case=row.case + FP32) for row in found + probe.as_rows()]
        single.layers[0]._parameters.clear()  # the probe's copies are cycles of references, and would keep it
        step()
    return rows


def measure_call(target: Target, check: LayerCheck, index: int | None, op: str, case: str, args: tolerance.Args) -> Row:
    """The row of one call of an operation."""
    expected = Tolerance(op, args)

    def measure() -> list[Row]:
        return [Row(index, op, case, *expected.measure(check.operation(op, args)))]

    return rows_or_fault(target, op, measure, layer=index, case=case)[0]


def rows_or_fault(
    target: Target, op: str, function: Callable[..., list[Row]], *args: Any, layer: int | None = None, case: str = ""
) -> list[Row]:
    """`function(*args)`, or one row that is infinitely wrong where it raises."""
    rows: list[Row] = []
    with target.catch_faults(lambda error: rows.append(Row(layer, op, case, math.inf, 0.0, one_line(error)))):
        rows += function(*args)
    return rows


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:ERROR_LENGTH]


class LayerProbe:
    """Compares what enters and leaves each layer of a forward with the references, and replaces what enters it.

    What attention and the experts add to the residual stream is compared before, since a large residual hides it. The
    gate's routes are compared with torch's and replaced, too. `flips` counts those that differ.
    """

    def __init__(self, layers: list[LayerReference], step: Step = lambda: None) -> None:
        self.layers, self.step, self.flips = layers, step, 0
        self.notes: dict[tuple[int, str], str] = {}
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

    def fail(self, error: Exception) -> None:
        """Record that the forward raised, in the layer that it had reached."""
        index = min(self.layer, len(self.layers) - 1)
        self.errors.setdefault((index, self.case), []).append((math.inf, 0.0))
        self.notes[index, self.case] = one_line(error)

    def replace_routes(self, weights: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """weights, ids [BT,K] of the gate -> torch's for tokens that torch routes to other experts, else unchanged."""
        index, expected = self.layer, self.layers[self.layer]
        self.layer += 1
        got, want = ids.view(*self.valid.shape, -1), expected.ids[self.where].to(ids.dtype)
        pair = expected.route_error(got[self.valid], self.where_valid, weights.view_as(got)[self.valid])
        self.errors.setdefault((index, ROUTES), []).append(pair)
        if got.shape != want.shape:
            return expected.weights[self.where].to(weights.dtype).flatten(0, 1), want.flatten(0, 1)
        flipped = (got.sort(-1).values != want.sort(-1).values).any(-1, keepdim=True)
        self.flips += int(flipped[self.valid].sum())
        weights = weights.view_as(got).where(~flipped, expected.weights[self.where].to(weights.dtype))
        return weights.flatten(0, 1), torch.where(flipped, want, got).view_as(ids)

    def record(self, index: int, name: str, got: Tensor) -> None:
        """The error of `name` of a LayerReference. x must equal the reference's, as the probe put it there."""
        layer = self.layers[index]
        if name == "x":  # where torch itself overflows, nothing can be said
            expected = Fp64Reference(layer.x.double(), 0.0 if layer.x.isfinite().all() else math.inf)
        else:
            expected = layer.references[name]
        got = got.view(*self.valid.shape, -1) if got.dim() == 2 else got
        part = PARTS.get(name)
        case = self.case if part is None else f"{part}, {self.case}"
        fits = got.shape[:2] == self.valid.shape
        pair = expected.measure(got[self.valid], self.where_valid) if fits else (math.inf, expected.limit)
        self.errors.setdefault((index, case), []).append(pair)

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

    def attention(self, index: int, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """`model.Layer.attention`, its output recorded."""
        attended = forward(*args)
        self.record(index, "attended", attended)
        return attended

    def experts(self, index: int, forward: Callable[..., Any], h: Tensor, x: Tensor, *args: Any) -> Any:
        """`model.Layer.experts`, which is also run without a residual stream, its output recorded."""
        self.record(index, "y", forward(h, torch.zeros_like(x), *args)[1])
        return forward(h, x, *args)

    def as_rows(self) -> list[Row]:
        """A row for each layer and case: attention, the routes, the experts, then the whole layer."""
        kinds = [PARTS["attended"], ROUTES, PARTS["y"]]

        def order(item: Any) -> int:
            kind = item[0][1].partition(",")[0]
            return kinds.index(kind) if kind in kinds else len(kinds)

        items = sorted(self.errors.items(), key=order)
        notes = (self.notes.get(key, "") for key, _ in items)
        return [
            Row(key[0], "layer", key[1], *tolerance.worst(pairs), note)
            for (key, pairs), note in zip(items, notes, strict=True)
        ]


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
        for name in ("forward", "attention", "experts") if probe_layers else ():
            setattr(layer, name, partial(getattr(probe, name), index, getattr(layer, name)))
    model.layers = nn.ModuleList(layers)
    return model


def split_text(tokens: int, batch: int = 1) -> list[tuple[str, list[int], list[int]]]:
    """The calls that read a text over a cache: (case, first token, number of tokens), both for each sequence.

    After every other call a sequence has read one token less than the one before it: no two stand at the same place,
    and of no two chunks are the counts those of the first.
    """
    single = min(SINGLE_TOKENS, tokens - 1) or 1
    rest = tokens - single
    bounds = sorted({0, -(-2 * rest // 5), -(-3 * rest // 4), rest})
    places = [[max(0, bound - b * (at % 2)) for b in range(batch)] for at, bound in enumerate(bounds)]
    chunks = [
        (CHUNKS, begin, [b - a for a, b in zip(begin, end, strict=True)])
        for begin, end in pairwise(places)
        if end != begin
    ]
    return chunks + [(TOKENS, [place + at for place in places[-1]], [1] * batch) for at in range(single)]
