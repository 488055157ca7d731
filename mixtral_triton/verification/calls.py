"""The calls of operations in one layer, on what torch computes in it, and those of `generate`, of every size."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .. import reference
from ..checkpoint.config import PREFILL_CHUNK
from ..kernels.launching.launch import DEFAULT_ARCH, Launch, target_arch
from ..kernels.operation.torch_operator import unflatten_args
from ..kernels.ops.experts.tiles import decode_tokens
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..kernels.weights.fp8 import W8A8, with_fp8_activations
from ..kernels.weights.quantized import QuantizedWeight
from ..kernels.weights.weight_args import Weight
from ..model.cache import KVCache, cache_shape
from ..model.mixtral import Mixtral
from ..model.precompile import on_meta
from .tolerance import Args, ConvertedExperts, to_fp64

Call = tuple[str, str, Args]  # operation, case, arguments

SEQUENCES = 64  # of `generate` in one batch, at most
CACHE_SLOTS = 4096  # slots of the caches, of more than MANY sequences a quarter
MANY = 8
FEW = 10  # tokens of a sequence in the calls of all layers but the first: layers differ in their weights alone
EDGE = 8  # rows of a part of a tile: this many are run, and twice as many
WEIGHTS = {"weight", "norm_weight", "gate", "gate_up_proj", "down_proj", "table", "cos", "sin"}


@dataclass
class LayerCheck:
    """The calls of operations in a layer, on what torch computes in it."""

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
        self.norm = {"weight": self.layer.post_attention_layernorm, "eps": self.config.rms_norm_eps}

    def calls(self, index: int) -> Iterator[Call]:
        """The calls in layer `index` that no forward of `generate` makes."""
        layer, values, (B, T) = self.layer, self.values, self.token_rows.shape
        yield "rms_norm", "input", {"x": values.x, **self.norm, "weight": layer.input_layernorm}
        yield "add_rms_norm", "with residual", {"x": values.attn_output, "residual": values.x, **self.norm}
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
        norm = {"residual": (values.x + values.attn_output).flatten(0, 1), "norm_weight": self.norm["weight"]}
        yield "experts_add_rms_norm", "all tokens", {**experts, **norm, "eps": self.config.rms_norm_eps}
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

    def derive(self, op: str, recorded: Args, weights: dict[int, Any], size: tuple[int, int, int]) -> Args:
        """Arguments like those `recorded` on meta tensors in a forward of this size, strides included: `weights`, and
        rows drawn from the text. KeyError for an argument without values, ValueError for those that do not fit."""
        OPS[op].check(**recorded)
        (B, T, C), values, config, device = size, self.values, self.config, self.token_rows.device

        def draw(count: int, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randint(len(values.h), (B, count), generator=generator).to(device)

        index, slots = draw(T, B * PREFILL_CHUNK + T), cache_shape(config, B, C)[4]
        b = torch.arange(B, device=device)
        # Deterministic torch computes the chunk's padding in another way.
        short = 0 * b if recorded.get("deterministic") else (b + 1) % 3
        new = (T - short).clamp(min=1)
        limit = len(self.tables["cos"])  # transformers makes them for the text
        last = (limit if config.window else min(limit, slots)) - new
        # The first sequence ends where the cache or the positions do, and its padding is beyond.
        past = slots - 1 - (b * 37 % slots if T == 1 else slots // 3 + b % 5)
        past = torch.where(b == 0, last, past.minimum(last)).clamp(min=0).int()
        weight = _key(weights.get(_key(recorded.get("weight"))))
        of_heads = weight in [_key(getattr(self.layer, name, None)) for name in ("o_proj", "q_norm", "k_norm")]
        x = values.heads if of_heads else values.normed if op == "linear" else values.attn_output
        residual = values.x if op == "rms_norm_gate_route" else values.x + values.attn_output
        q, k = (self.rq, self.rk) if op in ("cached_attention", "append") else (values.q, values.k)
        text = {"x": x, "residual": residual, "q": q, "k": k, "v": values.v}
        text = {name: part.flatten(0, 1) for name, part in text.items()}
        if op.startswith("expert"):
            text |= {"x": values.h, "ids": values.ids, "weights": values.weights}
        by_argument = {"table": values.x.flatten(0, 1), "input_ids": index, "past": past}
        positions = (past[:, None] + torch.arange(T, device=device)).clamp(max=limit - 1)
        by_argument |= {"new": new.int(), "positions": positions}
        empty_like = partial(torch.empty_like, device=device)

        def value(name: str, like: Any) -> Any:
            if name in ("k_cache", "v_cache"):
                cached = self.rk if name == "k_cache" else values.v
                layer = empty_like(like) if isinstance(like, Tensor) else like.map(empty_like)
                layer[:] = cached.flatten(0, 1)[draw(slots, slots)].transpose(1, 2)
                return layer
            if not (isinstance(like, Tensor) or name in WEIGHTS):
                return like
            if name in by_argument:
                return by_argument[name]
            if name not in text:
                if _key(like) not in weights or (name == "cos" and limit < T):
                    raise KeyError(name)
                weight = weights[_key(like)]
                return with_fp8_activations(weight) if getattr(like, "format", None) == W8A8 else weight
            part = text[name][index.flatten()].flatten()
            if (count := like.numel()) > len(part):
                raise ValueError(f"{name}, more than the {len(part)} of the text")
            out = torch.empty_strided(like.shape, like.stride(), dtype=part.dtype, device=device)
            return out.copy_(part[:count].view(like.shape))

        return {name: value(name, like) for name, like in recorded.items()}

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


class CallRecorder(TorchDispatchMode):
    """Records the calls of operations on meta tensors: the name, the arguments by name, and the launches."""

    def __init__(self, arch: str = DEFAULT_ARCH, sms: int | None = None) -> None:
        super().__init__()
        self.gpu, self.calls = (arch, sms), list[tuple[str, Args, list[Launch]]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "mixtral_triton":
            return func(*args, **(kwargs or {}))
        op = OPS[func._opname]
        values = op.bind_by_name(*unflatten_args(op.arguments, args))
        with record_launches(*self.gpu) as records:
            out = op.run(**values)
        self.calls.append((op.name, values, records))
        return out


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
        config, dtype = replace(target.config, num_hidden_layers=1), target.embed_tokens.dtype
        self.model: Any = on_meta(target.model, [0]) if target.is_mixtral else Mixtral(config, "meta", dtype)
        self.model.sixteen_bit_rows = Mixtral.sixteen_bit_rows  # as `generate` has it
        first, outer = self.model.layers[0], ("norm", "embed_tokens", "lm_head", "cos", "sin")
        on = {name: getattr(first, name) for name in (*first._parameters, *first._modules)}
        self.on = on | {name: getattr(self.model, name) for name in outer}  # its weights by name
        self.names = {_key(weight): name for name, weight in self.on.items()}

    def __call__(self, check: LayerCheck, index: int) -> Iterator[Call]:
        few = check
        if self.limit and index:
            few = self.target.check(self.target.layers[index], check.values.x[:, :FEW].contiguous(), check.config)
        yield from few.calls(index)
        yield from self.calls_on_text(few)
        if self.limit and not index:
            yield from self.calls_of_generate(check)

    def weights(self, check: LayerCheck) -> dict[int, Any]:
        """The weights of a layer by those of its copy on the meta device."""
        outer = self.target.model if self.target.is_mixtral else self.target
        owners = SimpleNamespace(**check.tables), getattr(check.layer, "local", check.layer), outer
        named = {name: next(x for part in owners if (x := getattr(part, name, self)) is not self) for name in self.on}
        return {_key(self.on[name]): weight for name, weight in named.items() if weight is not None}

    def record_calls(self, size: tuple[int, int, int]) -> list[tuple[str, Args, list[Launch]]]:
        """The calls of a forward over a cache: of B sequences, T tokens each, C slots."""
        B, T, C = size
        cache = KVCache(self.model.config, B, C, "meta", torch.int8 if self.target.quantized else self.model.dtype)
        recorder = CallRecorder(*self.gpu)
        with torch.no_grad(), self.target.catch_faults(self.not_run.setdefault), recorder:
            h = self.model.hidden(torch.empty((B, T), dtype=torch.int64, device="meta"), cache)
            _ = self.target.lm_head is None or self.model.head(h[:, 0])
        return recorder.calls

    def _prefix(self, op: str, recorded: Args) -> str:
        """Return the start of the case of a linear, or of a norm of queries or keys, the name of its weight; of other
        operations nothing."""
        name = self.names.get(_key(recorded.get("weight")), "another")
        name = name if op == "linear" or name in ("q_norm", "k_norm") else ""
        return name and f"{name.removesuffix('_proj')}, "

    def calls_on_text(self, check: LayerCheck) -> Iterator[Call]:
        """Calls of a chunk as long as the text and of a step after it: each operation and weight of a layer once."""
        (B, T), weights = check.token_rows.shape, self.weights(check)
        done = {("linear", "lm_head, "), ("experts_add_rms_norm", "")}  # of no layer, and among its `calls`
        C = min(2 * T, self.target.config.max_position_embeddings)
        for size, case in ((B, T, C), "chunk"), ((B, 1, C), "one token"):
            for op, recorded, _ in self.record_calls(size):
                if (key := (op, self._prefix(op, recorded))) in done:
                    continue
                done.add(key)
                try:
                    args = check.derive(op, recorded, weights, size)
                except (KeyError, ValueError) as error:
                    self.not_run[f"{op}; needs values of {error}"] = None
                    continue
                yield op, key[1] + case, args

    def calls_of_generate(self, check: LayerCheck) -> Iterator[Call]:
        weights = self.weights(check)
        calls, needed = list[Any](), defaultdict[Any, set[int]](set)
        for size in forwards(self.target.config):
            for op, args, records in self.record_calls(size):
                calls.append((size, op, args, N := _rows(args), launches := configurations(args, records)))
                for launch in launches:
                    needed[launch].add(N)
        beyond = defaultdict[tuple[int, int], set[str]](set)  # kernels, by the rows that run and that a chunk reaches
        for launch, rows in needed.items():
            most, reached = (max((n for n in rows if n <= m), default=0) for m in (self.limit, PREFILL_CHUNK))
            most = min(most, reached)
            if 0 < most < reached:
                beyond[most, reached].add(launch[0][0])
            tiled = any(name in ("BLOCK_T", "BLOCK_M") for name, _ in launch[0][3])
            needed[launch] = rows & {min(rows), most, *((EDGE, 2 * EDGE) if tiled else ())}
        for (most, reached), names in beyond.items():
            line = f"{most + 1} to {reached} rows of {', '.join(sorted(names))}; needs a GPU or --tokens {reached}"
            self.not_run[line] = None
        for size, op, args, N, launches in calls:
            new = {launch for launch in launches if N in needed[launch] - self.rows[launch]}
            # More than the most that are needed were run for another launch.
            new -= {launch for launch in new if N == max(needed[launch]) < max(self.rows[launch], default=0)}
            if not new:
                continue
            slots = f", {size[2]} slots" if size[2] > CACHE_SLOTS else ""
            case = f"{self._prefix(op, args)}{size[0]} x {size[1]} tokens{slots}"
            tokens = size[0] * size[1] if op != "linear" else N
            needs = f"a GPU or --tokens {tokens}" if self.limit < tokens else ""
            try:
                call = op, case, Args() if needs else check.derive(op, args, weights, size)
            except (KeyError, ValueError) as error:
                needs = f"values of {error}"
            for launch in launches:
                self.rows[launch].add(N)
            if needs:
                kernels = " and ".join(sorted({kernel for (kernel, *_), *_ in new}))
                self.not_run[f"{op} ({case}): {kernels}; needs {needs}"] = None
            else:
                yield call


def configurations(args: Args, records: list[Launch]) -> set[Any]:
    """((kernel, warps, stages, constants), shapes of weights) of each launch of Triton's."""
    shapes = tuple(tuple(args[name].shape) for name in ("weight", "gate_up_proj") if name in args)
    kernels = (record for record in records if record.grid is not None)
    return {((x.kernel, x.num_warps, x.num_stages, tuple(sorted(x.constexprs.items()))), shapes) for x in kernels}


def _rows(args: Args) -> int:
    """The rows that share tiles in a call: tokens of one sequence, or of all, by the shape of its first argument."""
    name, first = next(iter(args.items()))
    return first.shape[1] if name in ("q", "k", "input_ids") else first.shape[:-1].numel()


def _key(weight: Any) -> int:
    """A weight's identity in a call; a quantized one is put together anew there, around its codes."""
    return id(weight.data if isinstance(weight, QuantizedWeight) else weight)
