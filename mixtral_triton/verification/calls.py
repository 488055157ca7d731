"""The calls of operations in a layer: those of forwards over a cache, recorded with what torch computes in them; the
same in every size that `generate` launches; and parts that no forward calls alone."""

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, pairwise, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from ..checkpoint.config import PREFILL_CHUNK
from ..kernels.launching.launch import DEFAULT_ARCH, Launch, target_arch
from ..kernels.operation.torch_operator import unflatten_args
from ..kernels.ops.experts.tiles import decode_tokens
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..kernels.weights.composite_args import first_part
from ..kernels.weights.quantized import QuantizedWeight
from ..kernels.weights.quantized_cache import QuantizedCache
from ..kernels.weights.weight_args import Weight
from ..model.cache import KVCache
from ..model.layer import Layer
from ..model.mixtral import Mixtral
from ..model.precompile import on_meta
from .tolerance import Args, ConvertedExperts, to_fp64

Call = tuple[str, str, Args]  # operation, case, arguments
RecordedCall = tuple[str, Args, list[Launch]]

SEQUENCES = 64  # of `generate` in one batch, at most
CACHE_SLOTS = 4096  # slots of the caches, of more than MANY sequences a quarter
MANY = 8
FEW = 10  # tokens of a sequence in the calls of all layers but the first: layers differ in their weights alone
SHORTEST = 5  # tokens that make a chunk of several behind another
EDGE = 8  # rows of a part of a tile: this many are run, and twice as many
TABLES = {"table", "cos", "sin"}  # arguments of which a call reads a row for each token: in every size as recorded
OVERWRITTEN = {"k_cache", "v_cache", "past"}  # arguments that a forward writes into after a call


@dataclass
class LayerCheck:
    """What torch computes in a layer."""

    values: reference.Values
    layer: Any  # weights by the names of `layer.Layer`
    config: Any
    tables: dict[str, Tensor]  # cos and sin fp32
    quantized: bool = False  # caches have 8 bits
    coarse: bool = False  # `ModelUnderTest.coarse`

    def __post_init__(self) -> None:
        values, (B, T, _) = self.values, self.values.x.shape
        self.token_rows = torch.arange(B * T, device=values.x.device).view(B, T)  # the row of each token
        norms = reference.head_norms(self.layer, self.config)
        rotation = self.tables["cos"], self.tables["sin"], self.token_rows % T, *norms
        self.rq, self.rk = reference.rope(values.q, values.k, *rotation)

    def calls(self, index: int) -> Iterator[Call]:
        """The calls in layer `index` that no forward of `generate` makes."""
        layer, values, (B, T), eps = self.layer, self.values, self.token_rows.shape, self.config.rms_norm_eps
        yield "rms_norm", "input", {"x": values.x, "weight": layer.input_layernorm, "eps": eps}
        norm = {"residual": values.x, "weight": layer.post_attention_layernorm, "eps": eps}
        yield "add_rms_norm", "with residual", {"x": values.attn_output, **norm}
        keys = {"k": self.rk, "v": values.v, "window": self.config.sliding_window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        ends = (T - torch.arange(B, device=self.token_rows.device)).clamp(min=1).int()
        yield "attention", "padded", {"q": self.rq, **keys, "starts": ends // 3, "lengths": ends}
        (N, K), E = values.ids.shape, len(layer.gate)
        top_k = {"top_k": K, "renormalize": self.config.renormalize}
        yield "route", "all tokens", {"logits": values.logits, **top_k}
        yield "gate_route", "all tokens", {"x": values.h, "gate": layer.gate, **top_k}
        yield "sort_by_expert", "all tokens", {"ids": values.ids, "num_experts": E}
        proj = {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}
        experts = {"x": values.h, **proj, "ids": values.ids, "weights": values.weights}
        yield "expert_swiglu_backward", "all tokens", {"grad": values.attn_output.flatten(0, 1), **experts}
        gate_up, down = (Weight.of(experts[name]).name for name in ("gate_up_proj", "down_proj"))
        limit = decode_tokens(gate_up, down, K, values.h.dtype, target_arch(values.h.device))
        sizes = {"decode": min(limit, -(-E // K))}
        if index == 0 or values.x.is_cuda:  # they are slow
            sizes |= {"prefill": limit + E, **({} if gate_up is None else {"decode in several tiles": limit})}
        for case, size in sizes.items():  # routes that take every expert
            if not size:  # fp8 codes are sorted, however few
                continue
            ids = torch.arange(size * K, device=values.x.device).view(size, K) % E
            if case != "decode":  # each group ends with few rows of a tile: the grid needs all the tiles of its bound
                ids = ids[:1].repeat(size, 1)
                ids[: E - K, -1] = torch.arange(K, E, device=ids.device)[:size]
            rows = torch.arange(size, device=values.x.device) % N
            some = {"x": values.h[rows], "ids": ids.int(), "weights": values.weights[rows]}
            yield "expert_swiglu", f"every expert, {case}", {**experts, **some}

    def fp64(self, x: Tensor) -> reference.Values:
        """Compute the layer on x fp64 [nB,T,H], in fp64 with torch's routes, one matrix, expert and sequence at a
        time."""
        ids = self.values.ids.repeat(len(x) // len(self.values.x), 1)
        tables = {name: table.double() for name, table in self.tables.items()}
        attend = reference.uncached_attention(self.config.sliding_window, **tables, quantized=self.quantized)

        def attend_sequences(q: Tensor, k: Tensor, v: Tensor, *norms: Any) -> Tensor:
            sequences = zip(*(part.split(1) for part in (q, k, v)), strict=True)
            return torch.cat([attend(*sequence, *norms) for sequence in sequences])

        def convert(weight: Any) -> Any:
            return ConvertedExperts(weight) if len(weight.shape) == 3 else to_fp64(weight)

        return reference.block(self.layer, self.config, x, attend_sequences, ids, convert)


def single_layer_model(model: Any, config: Any, weights: Args, outer: Args) -> Any:
    """`model` with one layer of these weights, and `outer`, what it has outside of its layers: tables and weights."""
    model = copy.copy(model)
    model._parameters, model._modules, model._buffers, model.config = {}, {}, {}, config
    model.layers = nn.ModuleList([Layer(config, weights)])
    for name, x in outer.items():
        setattr(model, name, x)
    return model


class CallRecorder(TorchDispatchMode):
    """Records the calls of operations: the name, the arguments by name, and on meta tensors the launches. Elsewhere
    torch computes the results, so that a fault in one operation does not reach the arguments of the next."""

    def __init__(self, arch: str = DEFAULT_ARCH, sms: int | None = None) -> None:
        super().__init__()
        self.gpu, self.calls = (arch, sms), list[RecordedCall]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mixtral_triton":
            return func(*args, **(kwargs or {}))
        op = OPS[func._opname]
        values = op.bind_by_name(*unflatten_args(op.arguments, args))
        recorded = {name: x.clone() if name in OVERWRITTEN else x for name, x in values.items()}
        with record_launches(*self.gpu) as records:
            out = op.run(**values) if args[0].is_meta else op.call_reference(**values)
        self.calls.append((op.name, recorded, records))
        return out


def resize(recorded: Any, like: Any) -> Any:
    """A recorded argument in the shape and the strides of `like`, a meta tensor: along a dimension of another size its
    elements are drawn, the same ones of every tensor with these sizes. A number is that of `like`."""
    if isinstance(like, QuantizedCache):
        return QuantizedCache(*map(resize, recorded.tensors, like.tensors))
    if isinstance(like, QuantizedWeight):  # which quantizes activations in a call of many rows
        return recorded if recorded.format == like.format else recorded.viewed_as(like.format)
    if not isinstance(like, Tensor):
        return like
    if (x := recorded).shape == like.shape:
        return x
    for dim, size in enumerate(like.shape):
        if x.shape[dim] != size:
            generator = torch.Generator().manual_seed(size)
            x = x.index_select(dim, torch.randint(x.shape[dim], (size,), generator=generator).to(x.device))
    return torch.empty_strided(like.shape, like.stride(), dtype=x.dtype, device=x.device).copy_(x)


def forwards(config: Any) -> list[tuple[int, int, int]]:
    """(B, T, C) of `generate`'s forwards, the smallest first: steps of 1 to 64 sequences, every context, and chunks."""
    limit = config.max_position_embeddings
    contexts = [n + 1 for n in (128 << step for step in range(20)) if n < limit]
    sizes = [(B, 1) for B in range(1, SEQUENCES + 1)] + [(1, T) for T in range(2, SEQUENCES + 1)]
    sizes += [(1, T + extra) for T in range(SEQUENCES, PREFILL_CHUNK + 1, SEQUENCES) for extra in (0, 1)]
    sizes += [(B, T) for B in (2, 3, 5, MANY, SEQUENCES) for T in (2, 17, SEQUENCES, 500, 900, PREFILL_CHUNK)]
    slots = {True: min(limit, CACHE_SLOTS // 4), False: min(limit, CACHE_SLOTS)}
    with_slots = {(B, T, slots[B > MANY]) for B, T in sizes if min(limit, PREFILL_CHUNK) >= T}
    with_slots |= {(B, 1, C) for B in (1, MANY, SEQUENCES) for C in (*contexts, limit)}
    return sorted(with_slots, key=lambda size: (size[0] * size[1], size[2]))


class SizedCalls:
    """The calls of an operation in every layer, and in the first one those that launch what else `generate` launches.

    `generate`'s calls are recorded on the meta device for every size in `forwards`, for this `gpu`. Of each launch
    configuration the smallest and the largest number of rows are run, and those at an EDGE: sizes differ in masks, and
    a row that a mask loses shows there. A call of more than `limit` tokens (0: without kernels) is not made: `not_run`.
    """

    def __init__(self, target: Any, limit: int = 0, gpu: tuple[str, int | None] = (DEFAULT_ARCH, None)) -> None:
        self.target, self.limit, self.gpu = target, limit, gpu
        self.rows: dict[Any, set[int]] = defaultdict(set)  # that were run, by launch
        self.not_run: dict[str, None] = {}  # each line once
        self.model: Any = on_meta(target.model, [0])
        self.model.sixteen_bit_rows = Mixtral.sixteen_bit_rows  # as `generate` has it
        if target.lm_head is None:
            self.model.lm_head = None
        self.weight_names = [*self.model.layers[0]._parameters, *self.model.layers[0]._modules]

    def __call__(self, check: LayerCheck, index: int) -> Iterator[Call]:
        if self.limit and index:
            check = self.target.check(self.target.layers[index], check.values.x[:, :FEW].contiguous(), check.config)
        yield from check.calls(index)
        recorded, done = self.record_text(check), {("linear", "lm_head, ")}  # of no layer
        for step, calls in sorted(recorded.items()):
            for op, name, args in calls:
                if (op, name) not in done:
                    done.add((op, name))
                    yield op, name + ("one token" if step else "chunk"), args
        if self.limit and not index:
            yield from self.calls_of_generate(recorded, check.tables)

    def layer_model(self, check: LayerCheck) -> tuple[Any, dict[int, str]]:
        """A model of the layer alone, whose embedding is the residual stream of the text, a row a token; the names of
        its weights by the `id` of their first part."""
        layer, device = getattr(check.layer, "local", check.layer), check.values.x.device
        weights = {name: getattr(layer, name) for name in self.weight_names}
        outer = {"embed_tokens": check.values.x.flatten(0, 1), "norm": self.target.norm, "lm_head": self.target.lm_head}
        outer = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in (outer | check.tables).items()}
        model = single_layer_model(self.model, self.model.config, weights, outer)
        return model, {id(first_part(weight)): name for name, weight in (weights | outer).items()}

    def record_calls(
        self, model: Any, ids: Tensor, cache: KVCache, lengths: Tensor | None = None
    ) -> list[RecordedCall]:
        """The calls of a forward of `ids` [B,T] over a cache, and of the head."""
        recorder = CallRecorder(*self.gpu)
        with torch.no_grad(), self.target.catch_faults(self.not_run.setdefault), recorder:
            h = model.hidden(ids, cache, lengths)
            _ = model.lm_head is None or model.head(h[:, 0])
        return recorder.calls

    def make_cache(self, B: int, C: int, device: Any) -> KVCache:
        return KVCache(self.model.config, B, C, device, torch.int8 if self.target.quantized else self.model.dtype)

    def record_text(self, check: LayerCheck) -> dict[bool, list[Call]]:
        """The calls of a step (True) and of the chunk before it, which read the text, a short one several times. Slots
        of the cache that nothing has written hold other keys of the text."""
        (B, T), rows, (model, names) = check.token_rows.shape, check.token_rows, self.layer_model(check)
        length = max(T, min(SHORTEST, len(model.cos)))
        ids = rows[:, torch.arange(length, device=rows.device) % T]
        cache, calls = self.make_cache(B, length, rows.device), dict[bool, list[Call]]()
        slots = torch.arange(B * cache.slots, device=rows.device).view(B, -1) % (B * T)
        cache.keys[0][:] = check.rk.flatten(0, 1)[slots].transpose(1, 2)
        cache.values[0][:] = check.values.v.flatten(0, 1)[slots].transpose(1, 2)
        for begin, end in pairwise(sorted({0, length // 2, length - 1, length})):
            n, b = end - begin, torch.arange(B, device=rows.device)
            # Deterministic torch computes the chunk's padding in another way.
            lengths = n - b % n * (not model.deterministic)
            recorded = self.record_calls(model, ids[:, begin:end].contiguous(), cache, lengths)
            calls[n == 1] = [(op, self._prefix(op, args, names), args) for op, args, _ in recorded]
        return calls

    def _prefix(self, op: str, args: Args, names: dict[int, str]) -> str:
        """Return the start of the case of a linear, or of a norm of queries or keys, the name of its weight; of other
        operations nothing."""
        name = names.get(id(first_part(args.get("weight"))), "another")
        name = name if op == "linear" or name in ("q_norm", "k_norm") else ""
        return name and f"{name.removesuffix('_proj')}, "

    def calls_of_size(self, size: tuple[int, int, int]) -> list[RecordedCall]:
        """The calls of a forward on the meta device: of B sequences, T tokens each, C slots."""
        B, T, C = size
        ids = torch.empty((B, T), dtype=torch.int64, device="meta")
        return self.record_calls(self.model, ids, self.make_cache(B, C, "meta"))

    def positions_of_size(self, size: tuple[int, int, int], table: Tensor) -> Args:
        """`past`, `new` and `positions` of a forward, whose cache has some tokens of each sequence. The first sequence
        ends where the cache or the positions do, and its padding is beyond."""
        (B, T, C), config, limit = size, self.model.config, len(table)
        b, slots = torch.arange(B, device=table.device), config.window or min(C, config.max_position_embeddings)
        short = 0 * b if self.model.deterministic else (b + 1) % 3  # as in `record_text`
        new = (T - short).clamp(min=1)
        last = (limit if config.window else min(limit, slots)) - new
        past = slots - 1 - (b * 37 % slots if T == 1 else slots // 3 + b % 5)
        past = torch.where(b == 0, last, past.minimum(last)).clamp(min=0).int()
        positions = (past[:, None] + torch.arange(T, device=table.device)).clamp(max=limit - 1)
        return {"past": past, "new": new.int(), "positions": positions}

    def calls_of_generate(self, text: dict[bool, list[Call]], tables: dict[str, Tensor]) -> Iterator[Call]:
        """The calls of each size in `forwards` that launch something else, with the values of those of the text."""
        calls, needed = list[Any](), defaultdict[Any, set[int]](set)
        for size in forwards(self.target.config):
            of_text = chain(text.get(size[1] == 1, []), repeat(("", "", {})))  # no chunk in a text of few tokens
            for (op, args, records), same in zip(self.calls_of_size(size), of_text, strict=False):
                launches, rows = configurations(args, records), _rows(args)
                calls.append((size, op, args, same, rows, launches))
                for launch in launches:
                    needed[launch].add(rows)
        beyond = defaultdict[tuple[int, int], set[str]](set)  # kernels, by the rows that run and that a chunk reaches
        for launch, sizes in needed.items():
            most, reached = (max((n for n in sizes if n <= m), default=0) for m in (self.limit, PREFILL_CHUNK))
            most = min(most, reached)
            if 0 < most < reached:
                beyond[most, reached].add(launch[0][0])
            tiled = any(name in ("BLOCK_T", "BLOCK_M") for name, _ in launch[0][3])
            needed[launch] = sizes & {min(sizes), most, *((EDGE, 2 * EDGE) if tiled else ())}
        for (most, reached), names in beyond.items():
            line = f"{most + 1} to {reached} rows of {', '.join(sorted(names))}; needs a GPU or --tokens {reached}"
            self.not_run[line] = None
        for size, op, like, (op_of_text, name, values), N, launches in calls:
            new = {launch for launch in launches if N in needed[launch] - self.rows[launch]}
            # More than the most that are needed were run for another launch.
            new -= {launch for launch in new if N == max(needed[launch]) < max(self.rows[launch], default=0)}
            if not new:
                continue
            for launch in launches:
                self.rows[launch].add(N)
            slots = f", {size[2]} slots" if size[2] > CACHE_SLOTS else ""
            case, tokens = f"{name}{size[0]} x {size[1]} tokens{slots}", size[0] * size[1] if op != "linear" else N
            if self.limit < tokens or op != op_of_text:
                needs = f"a GPU or --tokens {tokens}" if self.limit < tokens else f"a text of {SHORTEST} tokens"
                kernels = " and ".join(sorted({kernel for (kernel, *_), *_ in new}))
                self.not_run[f"{op} ({case}): {kernels}; needs {needs}"] = None
                continue
            given = self.positions_of_size(size, tables["cos"])
            given |= {name: values[name] for name in TABLES & values.keys()}
            resized = {name: resize(values[name], x) for name, x in like.items() if name not in given}
            yield op, case, {name: given[name] if name in given else resized[name] for name in like}


def configurations(args: Args, records: list[Launch]) -> set[Any]:
    """((kernel, warps, stages, constants), shapes of weights) of each launch of Triton's."""
    shapes = tuple(tuple(args[name].shape) for name in ("weight", "gate_up_proj") if name in args)
    kernels = (record for record in records if record.grid is not None)
    return {((x.kernel, x.num_warps, x.num_stages, tuple(sorted(x.constexprs.items()))), shapes) for x in kernels}


def _rows(args: Args) -> int:
    """The rows that share tiles in a call: tokens of one sequence, or of all, by the shape of its first argument."""
    name, first = next(iter(args.items()))
    return first.shape[1] if name in ("q", "k", "input_ids") else first.shape[:-1].numel()
