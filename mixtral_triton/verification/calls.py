"""The calls of operations in one layer, on what torch computes in it, and those that `generate` makes, of every size.

B batch, T tokens, N = B T rows, H hidden, E experts, K experts per token, C slots of a cache
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from ..cache import KVCache, cache_shape
from ..generate import PREFILL_CHUNK
from ..kernels import reference as kernel_reference
from ..kernels.call import unflatten_args
from ..kernels.experts.tiles import DECODE_TOKENS
from ..kernels.launch import DEFAULT_ARCH, Launch, launch_context
from ..kernels.linear import SKINNY_M
from ..kernels.quantized import QuantizedWeight
from ..kernels.quantized_cache import QuantizedCache
from ..kernels.registry import OPS
from ..model import Mixtral
from ..tools import tolerance
from ..tools.tolerance import Args

Call = tuple[str, str, Args]  # operation, case, arguments

SEQUENCES = 64  # of `generate` in one batch, at most
CACHE_SLOTS = 4096  # slots of the caches, of more than MANY sequences a quarter
MANY = 8
FEW = 10  # tokens of a sequence in the calls of all layers but the first: layers differ in their weights alone
EDGE = 8  # rows of a part of a tile: this many are run, and twice as many
# Rows, sequences, and keys of each, where bits must not depend on the batch. So many keys would be split for one sequence.
BATCH, RAGGED, KEYS = 33, 5, 280
LAYOUTS = ("sliced", "transposed", "expanded")
WEIGHTS = {"weight", "norm_weight", "gate", "gate_up_proj", "down_proj", "table", "cos", "sin"}


def with_layout(layout: str, name: str, x: Any, mutates: Sequence[str]) -> Any:
    """An argument in one of the LAYOUTS: every second element of each dimension, with NaN or what is out of range
    between; the first dimension last in memory; the first element repeated. A cache keeps a dense last dimension, and
    no element of one that is written is there twice."""
    if not isinstance(x, Tensor) or (layout == "expanded" and name in mutates):
        return x
    if layout == "expanded":
        return x[:1].expand(x.shape)
    if layout == "transposed":
        last = 1 if name.endswith("cache") else -1
        return x.transpose(0, last).contiguous().transpose(0, last)
    around = torch.full([2 * n + 1 for n in x.shape], float("nan") if x.is_floating_point() else 10**6, device=x.device)
    steps = [2] * (x.dim() - 1) + [1 if name.endswith("cache") else 2]
    places = tuple(slice(1, 1 + step * n, step) for n, step in zip(x.shape, steps, strict=True))
    return around.to(x.dtype)[places].copy_(x)


class LayerCheck:
    """The calls of operations in a layer, on what torch computes in it.

    layer, tables  weights by the names of `model.Layer`; cos and sin fp32
    local_ids      routes [N,K] -> routes as this layer numbers its experts
    quantized      caches have 8 bits
    """

    local_ids: Callable[[Tensor], Tensor] = staticmethod(lambda ids: ids)

    def __init__(
        self, values: reference.Values, layer: Any, config: Any, tables: dict[str, Tensor], quantized: bool = False
    ) -> None:
        self.quantized = quantized
        self.values, self.layer, self.config, self.tables = values, layer, config, tables
        B, T, _ = values.x.shape
        self.at = torch.arange(B * T, device=values.x.device).view(B, T)  # the row of each token
        self.rq, self.rk = reference.rope(values.q, values.k, **tables, positions=self.at % T)
        self.norm = {"weight": layer.post_attention_layernorm, "eps": config.rms_norm_eps}
        self.proj = {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}

    def calls(self, index: int) -> Iterator[Call]:
        """The calls on the text in layer `index`. An operation of the registry that no call names is not verified."""
        window, layer, values, T = self.config.sliding_window, self.layer, self.values, self.at.shape[1]
        yield "rms_norm", "input", {"x": values.x, **self.norm, "weight": layer.input_layernorm}
        yield "add_rms_norm", "with residual", {"x": values.attn_output, "residual": values.x, **self.norm}
        yield from self._row_calls("all tokens", self.at)
        yield "rope", "all tokens", {"q": values.q, "k": values.k, **self.tables, "positions": self.at % T}
        keys = {"k": self.rk, "v": values.v, "window": window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        ends = self._uneven(T, 1)
        padded = {"starts": ends // 3, "lengths": ends, "deterministic": True}
        yield "attention", "padded, deterministic", {"q": self.rq, **keys, **padded}
        yield from self._cached_calls()
        yield "linear", "o, few tokens", {"x": values.heads[0, :SKINNY_M], "weight": layer.o_proj}
        (N, K), E = values.ids.shape, len(layer.gate)
        yield "route", "all tokens", {"logits": values.logits, "top_k": K}
        yield "gate_route", "all tokens", {"x": values.h, "gate": layer.gate, "top_k": K}
        yield "sort_by_expert", "all tokens", {"ids": values.ids, "num_experts": E}
        sizes = {"decode": min(DECODE_TOKENS, max(16, -(-E // K)))}
        if index == 0 or values.x.is_cuda:  # they are slow
            sizes["prefill"] = max(DECODE_TOKENS + 1, -(-E // K))
        for case, size in sizes.items():  # routes that take every expert
            ids = torch.arange(size * K, device=values.x.device).view(size, K) % E
            rows = torch.arange(size, device=values.x.device) % N
            args = {"x": values.h[rows], **self.proj, "ids": self.local_ids(ids.int()), "weights": values.weights[rows]}
            yield "expert_swiglu", f"every expert, {case}", args

    def deterministic_calls(self) -> Iterator[Call]:
        """Calls of BATCH rows or RAGGED sequences, whose bits must not depend on the batch."""
        values, rows = self.values, torch.arange(BATCH, device=self.at.device)
        at = (rows[:, None] * 7 + torch.arange(KEYS, device=rows.device)) % len(values.h)
        # 16 bits would hide another order of a sum over keys.
        heads = values.heads.flatten(0, 1)
        rq, rk, v = (x.flatten(0, 1).float() for x in (self.rq, self.rk, values.v))
        b, sequences = rows[:RAGGED], at[:RAGGED]
        keys = {"k": rk[sequences], "v": v[sequences], "starts": b, "lengths": KEYS - 7 * b}
        for op, args in (
            ("linear", {"x": heads[at[:, 0]], "weight": self.layer.o_proj}),
            ("expert_swiglu", self._experts(at[:, 0])),
            ("attention", {"q": rq[sequences[:, :1]], **keys}),
        ):
            yield op, "deterministic", {**args, "deterministic": True}

    def strided_calls(self) -> Iterator[Call]:
        """The calls on the text, each with its activations in the LAYOUTS."""
        for op, _, args in self.calls(1):
            for layout in LAYOUTS:
                change = partial(with_layout, layout, mutates=OPS[op].mutates)
                yield op, layout, {name: x if name in WEIGHTS else change(name, x) for name, x in args.items()}

    def _uneven(self, length: int, least: int) -> Tensor:
        """`length` for the first sequence, one less for each one after it, int32 [B]."""
        return (length - torch.arange(len(self.at), device=self.at.device)).clamp(min=least).int()

    def _cached_calls(self) -> Iterator[Call]:
        """Ring caches that hold about half of each sequence: a chunk after it, and one token after it."""
        values, (B, T) = self.values, self.at.shape
        past, half = self._uneven(T // 2, 0), T // 2
        cache = KVCache(self.config, B, T, values.x.device, torch.int8 if self.quantized else values.x.dtype)
        ring: Args = {"k_cache": cache.keys[0], "v_cache": cache.values[0]}
        first = {"k": self.rk[:, :half], "v": values.v[:, :half], **ring, "past": past * 0, "new": past}
        yield "append", "first half", first
        kernel_reference.append(**first)
        rest = self.at[:, : T - half] + past[:, None]
        yield from self._ring_calls("chunk", rest, ring, past, self._uneven(T - half, 0))
        last, new = rest[:, :1], torch.ones_like(past)
        yield from self._ring_calls("one token", last, ring, past, new)
        rq, rk, v = (x.flatten(0, 1)[last] for x in (self.rq, self.rk, values.v))
        kernel_reference.append(rk, v, **ring, past=past, new=new)
        where = {**ring, "past": past, "new": new, "window": self.config.sliding_window}
        yield "cached_attention", "one token", {"q": rq, "k": None, "v": None, **where}

    def _row_calls(self, case: str, at: Tensor) -> Iterator[Call]:
        """The calls between attention and the next layer's, on the rows at [B,T] of the text."""
        rows = at.flatten()
        x, residual = (each.flatten(0, 1)[rows] for each in (self.values.attn_output, self.values.x))
        gate = {"gate": self.layer.gate, "top_k": self.values.ids.shape[1]}
        yield "rms_norm_gate_route", case, {"x": x, "residual": residual, **self.norm, **gate}
        # The layer's input in the place of the embedding.
        table = {"table": self.values.x.flatten(0, 1), "weight": self.layer.input_layernorm}
        yield "embed_rms_norm", case, {"input_ids": at, **self.norm, **table}
        norm = {"norm_weight": self.norm["weight"], "eps": self.norm["eps"], "residual": x + residual}
        yield "experts_add_rms_norm", case, {**self._experts(rows), **norm}

    def _experts(self, rows: Tensor) -> Args:
        values = self.values
        routes = {"ids": self.local_ids(values.ids)[rows], "weights": values.weights[rows]}
        return {"x": values.h[rows], **self.proj, **routes}

    def _ring_calls(self, case: str, at: Tensor, ring: Args, past: Tensor, new: Tensor) -> Iterator[Call]:
        """The calls on the rows at [B,T] of the text behind `past` tokens in a ring cache."""
        values, T = self.values, at.shape[1]
        q, k, v, rq, rk = (x.flatten(0, 1)[at] for x in (values.q, values.k, values.v, self.rq, self.rk))
        where, window = {**ring, "past": past, "new": new}, {"window": self.config.sliding_window}
        if T == 1:
            yield "rope_append_attention", case, {"q": q, "k": k, "v": v, **self.tables, **where, **window}
            return
        positions = past[:, None] + torch.arange(T, device=at.device)
        yield "rope", case, {"q": q, "k": k, **self.tables, "positions": positions}
        yield "cached_attention", case, {"q": rq, "k": rk, "v": v, **where, **window}
        yield "append", case, {"k": rk, "v": v, **where}

    def derive(self, op: str, recorded: Args, weights: dict[int, Any], size: tuple[int, int, int]) -> Args:
        """Arguments like those `recorded` on meta tensors in a forward of this size, strides included: `weights`, and
        rows drawn from the text. KeyError for an argument that has no values here."""
        (B, T, C), values, config, device = size, self.values, self.config, self.at.device

        def draw(count: int, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(len(values.h), (B, count), generator=generator).to(device)

        at, slots = draw(T, B * PREFILL_CHUNK + T), cache_shape(config, B, C)[4]
        # Sequences end at other places, the first one where the cache does.
        past = torch.arange(B, device=device) * 37 % slots if T == 1 else torch.full((B,), slots // 3, device=device)
        limit = len(self.tables["cos"])  # transformers makes them for the text
        past = (slots - 1 - past).clamp(max=max(0, limit - T)).int()
        x, gate = values.x, op == "rms_norm_gate_route"
        is_o = weights.get(_key(recorded.get("weight"))) is self.layer.o_proj
        rows = values.heads if is_o else values.normed if op == "linear" else values.attn_output
        q, k = (self.rq, self.rk) if op in ("cached_attention", "append") else (values.q, values.k)
        text = {"x": rows, "residual": x if gate else x + values.attn_output, "q": q, "k": k, "v": values.v}
        text = {name: part.flatten(0, 1) for name, part in text.items()}
        if op.startswith("expert"):
            text |= {"x": values.h, "ids": self.local_ids(values.ids), "weights": values.weights}
        found = {"table": x.flatten(0, 1), "input_ids": at, "past": past, "new": torch.full_like(past, T)}
        found["positions"] = past[:, None] + torch.arange(T, device=device)

        def value(name: str, like: Any) -> Any:
            if not (isinstance(like, (Tensor, QuantizedCache)) or name in WEIGHTS):
                return like
            if name in found:
                return found[name]
            if name in ("k_cache", "v_cache"):
                cached = self.rk if name == "k_cache" else values.v
                cached = cached.flatten(0, 1)[draw(slots, slots)].transpose(1, 2).contiguous()
                return QuantizedCache.of(cached) if self.quantized else cached
            if (name not in text and _key(like) not in weights) or (name == "cos" and limit < T):
                raise KeyError(name)
            if name not in text:
                return weights[_key(like)]
            part = text[name][at.flatten()]
            out = torch.empty_strided(like.shape, like.stride(), dtype=part.dtype, device=device)
            return out.copy_(part[: like.numel() // part[0].numel()].reshape(like.shape))

        return {name: value(name, like) for name, like in recorded.items()}

    def prefix(self, tokens: int) -> LayerCheck:
        """The same of the first tokens of each sequence."""
        B, T = self.at.shape
        parts = {}
        for name, x in vars(self.values).items():
            rows = x if x.shape[:2] == (B, T) and name not in ("h", "logits", "weights", "ids") else x.view(B, T, -1)
            parts[name] = rows[:, :tokens].contiguous() if rows is x else rows[:, :tokens].flatten(0, 1)
        check = LayerCheck(reference.Values(**parts), self.layer, self.config, self.tables, self.quantized)
        check.local_ids = self.local_ids
        return check

    def fp64(self, x: Tensor) -> reference.Values:
        """What the layer computes on x fp64 [nB,T,H], in fp64 with torch's routes."""
        ids = self.values.ids.repeat(len(x) // len(self.values.x), 1)
        return tolerance.fp64_block(self.layer, self.config, self.tables, x, ids, self.quantized)


class CallRecorder(TorchDispatchMode):
    """Records the calls of operations on meta tensors: the name, the arguments by name, and the launches."""

    def __init__(self, arch: str = DEFAULT_ARCH, sms: int | None = None) -> None:
        super().__init__()
        self.gpu, self.calls = {"arch": arch, "sms": sms}, list[tuple[str, Args, list[Launch]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mixtral_triton":
            return func(*args, **(kwargs or {}))
        op, records = OPS[func._opname], list[Launch]()
        values = op.bind(*unflatten_args(op.arguments, args))
        with launch_context(**self.gpu, records=records):
            out = op.run(*values)
        self.calls.append((op.name, dict(zip(op.names, values, strict=True)), records))
        return out


def with_layers(model: Any, layers: int) -> Any:
    """A Mixtral of a Mixtral's first layers, on the same weights."""
    model = copy.copy(model)
    model._modules = {**model._modules, "layers": nn.ModuleList(list(model.layers)[:layers])}
    model.config = replace(model.config, num_hidden_layers=layers)
    return model


def on_meta(model: Any, layers: int) -> Any:
    """A copy of a Mixtral's first layers on the meta device, without a caller's hooks and other ranks."""
    model, ranks = with_layers(model, layers), model.ranks
    memo: dict[int, Any] = {id(x): x.detach().to("meta") for x in (*model.parameters(), *model.buffers())}
    if ranks is not None:
        memo[id(ranks)] = SimpleNamespace(
            shard=ranks.shard,
            local_ids=ranks.local_ids,
            all_reduce=lambda part, in_order: part,
            all_gather=lambda part, size: part.new_empty((*part.shape[:-1], size)),
        )
    model = copy.deepcopy(model, memo)
    for module in model.modules():  # which may read values
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return model


def forwards(config: Any) -> list[tuple[int, int, int]]:
    """(B, T, C) of the forwards of `generate`, the smallest first: steps of 1 to 64 sequences, contexts up to the
    model's positions, and chunks of prompts."""
    limit = config.max_position_embeddings
    contexts = [n + 1 for n in (128 << step for step in range(20)) if n < limit]
    sizes = [(B, 1) for B in range(1, SEQUENCES + 1)] + [(1, T) for T in range(2, SEQUENCES + 1)]
    sizes += [(1, T + at) for T in range(SEQUENCES, PREFILL_CHUNK + 1, SEQUENCES) for at in (0, 1)]
    sizes += [(B, T) for B in (2, 3, 5, MANY, SEQUENCES) for T in (2, 17, SEQUENCES, 500, 900, PREFILL_CHUNK)]
    found = {
        (B, T, min(limit, CACHE_SLOTS // (4 if B > MANY else 1))) for B, T in sizes if min(limit, PREFILL_CHUNK) >= T
    }
    found |= {(B, 1, C) for B in (1, MANY, SEQUENCES) for C in (*contexts, limit)}
    return sorted(found, key=lambda size: (size[0] * size[1], size[2]))


class SizedCalls:
    """The calls on the text in every layer, and in the first one those that launch what else `generate` launches.

    `generate`'s calls are recorded on the meta device for every size in `forwards`. All layers have the same sizes, and
    so the same launches. Of each launch configuration the smallest and the largest number of rows are run, and those
    at an EDGE. A call of more than `limit` tokens is not made: `not_run` says so where no other call launches the same.

    target       whose model is recorded; `gpu`: the architecture and number of multiprocessors that it is recorded for
    cache_dtype  of the cache; None: the model's
    """

    def __init__(
        self, target: Any, limit: int, gpu: tuple[str, int | None], cache_dtype: torch.dtype | None = None
    ) -> None:
        self.target, self.limit, self.gpu, self.cache_dtype = target, limit, gpu, cache_dtype
        self.rows: dict[Any, set[int]] = defaultdict(set)  # that were run, by launch
        self.not_run: list[str] = []

    def __call__(self, check: LayerCheck, index: int) -> Iterator[Call]:
        if index:
            yield from check.prefix(FEW).calls(index)
            return
        for call in check.calls(0):
            for launch in launches(call, *self.gpu):
                self.rows[launch].add(_rows(call[2]))
            yield call
        yield from check.prefix(3).strided_calls()
        yield from check.deterministic_calls()
        yield from self.calls_of_generate(check)

    def recorded(self, layer: Any, tables: Args) -> tuple[dict[int, Any], dict[int, str], list[Any]]:
        """The weights of `layer` by those of its copy on the meta device, their names, and a (size, operation,
        arguments, launches) for each call of `generate`, the smallest first."""
        target, config = self.target, replace(self.target.config, num_hidden_layers=1)
        if target.is_mixtral:
            model, outer = on_meta(target.model, 1), target.model
        else:
            model, outer = Mixtral(config, "meta", target.embed_tokens.dtype), target
        first = model.layers[0]
        pairs = {name: (getattr(first, name), getattr(layer, name)) for name in (*first._parameters, *first._modules)}
        pairs |= {name: (getattr(model, name), getattr(outer, name)) for name in ("norm", "lm_head")}
        pairs |= {name: (getattr(model, name), table) for name, table in tables.items()}
        names = {_key(on): name for name, (on, _) in pairs.items()}
        real = {_key(on): weight for on, weight in pairs.values() if weight is not None}
        calls: list[Any] = []
        for size in forwards(target.config):
            B, T, C = size
            cache = KVCache(model.config, B, C, "meta", self.cache_dtype or model.dtype)
            with torch.no_grad(), CallRecorder(*self.gpu) as recorder:
                h = model.hidden(torch.empty((B, T), dtype=torch.int64, device="meta"), cache)
                _ = outer.lm_head is None or model.head(h[:, 0])
            calls += [(size, *call[:2], configurations(*call[1:])) for call in recorder.calls]
        return real, names, calls

    def calls_of_generate(self, check: LayerCheck) -> Iterator[Call]:
        real, names, calls = self.recorded(getattr(check.layer, "local", check.layer), check.tables)
        needed: dict[Any, list[int]] = defaultdict(list)
        for _, _, args, found in calls:
            for launch in found:
                needed[launch].append(_rows(args))
        for launch, rows in needed.items():
            rows.sort()
            most = max((n for n in rows if n <= min(self.limit, PREFILL_CHUNK)), default=0)
            tiled = any(name in ("BLOCK_T", "BLOCK_M") for name, _ in launch[0][3])
            needed[launch] = [n for n in rows if n in (rows[0], most) or (tiled and n in (EDGE, 2 * EDGE))]
        for size, op, args, found in calls:
            N = _rows(args)
            new = [launch for launch in found if N in needed[launch] and not self._has(launch, N, needed[launch])]
            if not new:
                continue
            case = f"{size[0]} x {size[1]} tokens" + f", {size[2]} slots" * (size[2] > CACHE_SLOTS)
            if op == "linear":
                case = f"{names[_key(args['weight'])].removesuffix('_proj')}, {case}"
            tokens = size[0] * size[1] if op != "linear" else N
            needs = f"a GPU or --tokens {tokens}" if self.limit < tokens else ""
            try:
                call = op, case, Args() if needs else check.derive(op, args, real, size)
            except KeyError as error:
                needs = f"values of {error}"
            for launch in found:
                self.rows[launch].add(N)
            if needs:
                kernels = " and ".join(sorted({kernel for (kernel, *_), *_ in new}))
                self.not_run.append(f"{op} ({case}): {kernels}; needs {needs}")
            else:
                yield call

    def _has(self, launch: Any, N: int, needed: list[int]) -> bool:
        """Whether these rows were run, or fewer than the fewest, or more than the most."""
        ran = self.rows[launch]
        return N in ran or any(n < N == needed[0] or n > N == needed[-1] for n in ran)


def launches(call: Call, arch: str, sms: int | None) -> set[Any]:
    """The launch configurations of a call."""

    def on_meta(x: Any) -> Any:
        if isinstance(x, QuantizedWeight):
            return x.on_meta()
        return x.to("meta") if isinstance(x, (Tensor, QuantizedCache)) else x

    op, _, args = call
    records: list[Launch] = []
    with launch_context(arch=arch, sms=sms, records=records):
        OPS[op].run(*OPS[op].bind(**{name: on_meta(x) for name, x in args.items()}))
    return configurations(args, records)


def configurations(args: Args, records: list[Launch]) -> set[Any]:
    """((kernel, warps, stages, constants), shapes of weights) of each launch of Triton's."""
    shapes = tuple(tuple(args[name].shape) for name in ("weight", "gate_up_proj") if name in args)
    return {
        ((each.kernel, each.num_warps, each.num_stages, tuple(sorted(each.constexprs.items()))), shapes)
        for each in records
        if each.grid is not None
    }


def _rows(args: Args) -> int:
    """The rows that share tiles in a call: tokens of one sequence, or of all, by the shape of its first argument."""
    name, first = next(iter(args.items()))
    return first.shape[1] if name in ("q", "k", "input_ids") else first.shape[:-1].numel()


def _key(weight: Any) -> int:
    """A weight's identity in a call; a quantized one is put together anew there, around its codes."""
    return id(weight.data if isinstance(weight, QuantizedWeight) else weight)
