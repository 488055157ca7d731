"""The calls of operations in one layer, on what torch computes in it, and those of every size that `generate` has.

B batch, T tokens, N = B T rows, H hidden, E experts, K experts per token, C slots of a cache
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..cache import KVCache
from ..generate import PREFILL_CHUNK
from ..kernels import reference as kernel_reference
from ..kernels.experts.tiles import DECODE_TOKENS
from ..kernels.linear import SKINNY_M
from ..kernels.quantized import QuantizedWeight
from ..kernels.quantized_cache import QuantizedCache
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..tools import tolerance
from ..tools.tolerance import Args

Call = tuple[str, str, Args]  # operation, case, arguments

# (B, T) of the forwards of `generate`: a step of B sequences, and a chunk of a prompt.
STEPS = [(B, 1) for B in (1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64)]
CHUNKS = [(1, T) for T in (2, 16, 17, 32, 33, 64, 65, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, PREFILL_CHUNK)]
CACHE_SLOTS = 4096  # slots of the caches, of more than MANY sequences a quarter
MANY = 8


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
        yield "linear", "o, deterministic", {"x": values.heads, "weight": layer.o_proj, "deterministic": True}
        (N, K), E = values.ids.shape, len(layer.gate)
        yield "route", "all tokens", {"logits": values.logits, "top_k": K}
        yield "gate_route", "all tokens", {"x": values.h, "gate": layer.gate, "top_k": K}
        yield "sort_by_expert", "all tokens", {"ids": values.ids, "num_experts": E}
        experts = self._experts(self.at.flatten())
        yield "expert_swiglu", "as routed", experts
        if index == 0:  # they are slow
            yield "expert_swiglu", "deterministic", {**experts, "deterministic": True}
        sizes = {"decode": min(DECODE_TOKENS, max(16, -(-E // K))), "prefill": max(DECODE_TOKENS + 1, -(-E // K))}
        for case, size in sizes.items():  # routes that take every expert
            ids = torch.arange(size * K, device=values.x.device).view(size, K) % E
            rows = torch.arange(size, device=values.x.device) % N
            args = {"x": values.h[rows], **self.proj, "ids": self.local_ids(ids.int()), "weights": values.weights[rows]}
            yield "expert_swiglu", f"every expert, {case}", args

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

    def sized_calls(self, B: int, T: int) -> Iterator[Call]:
        """The calls of a forward of B sequences of T tokens of `generate`, on rows drawn from the text."""
        values, config, device = self.values, self.config, self.at.device
        generator = torch.Generator().manual_seed(B * PREFILL_CHUNK + T)

        def draw(*shape: int) -> Tensor:
            return torch.randint(len(values.h), shape, generator=generator).to(device)

        case, at = f"{B} x {T} tokens", draw(B, T)
        for name, x, weight in (("qkv", values.normed, self.layer.qkv_proj), ("o", values.heads, self.layer.o_proj)):
            yield "linear", f"{name}, {case}", {"x": x.flatten(0, 1)[at.flatten()], "weight": weight}
        yield from self._row_calls(case, at)
        slots = min(
            CACHE_SLOTS // (4 if B > MANY else 1), config.max_position_embeddings, config.sliding_window or CACHE_SLOTS
        )
        # Sequences end at other places, the first one where the cache does.
        past = torch.arange(B, device=device) * 37 % slots if T == 1 else torch.full((B,), slots // 3, device=device)
        past = (slots - 1 - past).clamp(max=max(0, config.max_position_embeddings - T)).int()
        caches = draw(B, slots)
        keys = {"k_cache": self.rk, "v_cache": values.v}
        ring: Args = {name: x.flatten(0, 1)[caches].transpose(1, 2).contiguous() for name, x in keys.items()}
        for name, x in ring.items() if self.quantized else ():
            ring[name] = QuantizedCache.of(x)
        yield from self._ring_calls(case, at, ring, past, torch.full_like(past, T))

    def fp64(self, x: Tensor) -> reference.Values:
        """What the layer computes on x fp64 [nB,T,H], in fp64 with torch's routes."""
        ids = self.values.ids.repeat(len(x) // len(self.values.x), 1)
        return tolerance.fp64_block(self.layer, self.config, self.tables, x, ids, self.quantized)


class SizedCalls:
    """The calls on the text in every layer, and in the first one calls that launch what else `generate` launches.

    All layers have the same sizes, and so the same launches. A call of more than `limit` tokens is not made: `not_run`
    says so where no other call launches the same. gpu: its architecture and number of multiprocessors.
    """

    def __init__(self, limit: int, gpu: tuple[str, int | None]) -> None:
        self.limit, self.gpu, self.launched, self.not_run = limit, gpu, set[Any](), list[str]()

    def __call__(self, check: LayerCheck, index: int) -> Iterator[Call]:
        for call in check.calls(index):
            if index == 0:
                self.launched |= launches(call, *self.gpu)
            yield call
        if index == 0:
            yield from self.calls_of_generate(check)

    def calls_of_generate(self, check: LayerCheck) -> Iterator[Call]:
        for B, T in STEPS + CHUNKS:
            for call in check.sized_calls(B, T) if check.config.max_position_embeddings >= T else ():
                new = launches(call, *self.gpu) - self.launched
                self.launched |= new
                if new and self.limit < B * T:
                    kernels = " and ".join(sorted({kernel for kernel, *_ in new}))
                    self.not_run.append(f"{call[0]} ({call[1]}): {kernels}; needs a GPU or --tokens {B * T}")
                elif new:
                    yield call


def launches(call: Call, arch: str, sms: int | None) -> set[Any]:
    """The launch configurations of a call."""

    def on_meta(x: Any) -> Any:
        if isinstance(x, QuantizedWeight):
            return x.on_meta()
        return x.to("meta") if isinstance(x, (Tensor, QuantizedCache)) else x

    op, _, args = call
    with record_launches(arch, sms) as records:
        OPS[op].run(*OPS[op].bind(**{name: on_meta(x) for name, x in args.items()}))
    return configurations(records)


def configurations(records: Any) -> set[Any]:
    """(kernel, warps, stages, constants) of each launch of Triton's."""
    launched = (each for each in records if each.grid is not None)
    return {(each.kernel, each.num_warps, each.num_stages, tuple(sorted(each.constexprs.items()))) for each in launched}
