"""The calls of operations in one layer, on what torch computes in it, and those of every size that `generate` has.

B batch, T tokens, N = B T rows, H hidden, E experts, K experts per token, C slots of a cache
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import ops, reference
from ..cache import KVCache
from ..generate import PREFILL_CHUNK
from ..kernels import reference as kernel_reference
from ..kernels.experts.tiles import DECODE_TOKENS
from ..kernels.launch import multiprocessors, target_arch
from ..kernels.linear import SKINNY_M
from ..kernels.quantized import QuantizedWeight
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..tools import tolerance
from ..tools.tolerance import Args

Call = tuple[str, str, Args]  # operation, case, arguments

# (B, T) of the forwards of `generate`: a step of B sequences, and a chunk of a prompt.
STEPS = [(B, 1) for B in (1, 2, 4, 5, 8, 9, 16, 17, 32, 33, 64)]
CHUNKS = [(1, T) for T in (2, 16, 17, 32, 33, 64, 65, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, PREFILL_CHUNK)]
CONTEXT = 4096  # slots of the caches, of more than MANY sequences a quarter
MANY = 8


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
        self.eps = {"eps": config.rms_norm_eps}
        self.proj = {"gate_up_proj": layer.gate_up_proj, "down_proj": layer.down_proj}

    def calls(self) -> Iterator[Call]:
        """The calls on the text. An operation of the registry that no call here names is not verified."""
        window, layer, values = self.config.sliding_window, self.layer, self.values
        yield "rms_norm", "input", {"x": values.x, "weight": layer.input_layernorm, **self.eps}
        norm = {"x": values.attended, "weight": layer.post_attention_layernorm, **self.eps}
        yield "add_rms_norm", "with residual", norm | {"residual": values.x}
        rows = torch.arange(values.x[..., 0].numel(), device=values.x.device)
        yield "rms_norm_gate_route", "all tokens", self._gate(rows)
        yield "embed_rms_norm", "rows of the input", self._embed(rows.view(self.positions.shape))
        yield "rope", "all tokens", {"q": values.q, "k": values.k, **self.tables, "positions": self.positions}
        keys = {"k": self.rk, "v": values.v, "window": window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        ends = self._uneven(self.positions.shape[1], 1)
        yield (
            "attention",
            "padded, deterministic",
            {**{"q": self.rq, **keys, "starts": ends // 3, "lengths": ends, "deterministic": True}},
        )
        yield from self._cached_calls()
        yield "linear", "o, few tokens", {"x": values.heads[0, :SKINNY_M], "weight": layer.o_proj}
        yield "linear", "o, deterministic", {"x": values.heads, "weight": layer.o_proj, "deterministic": True}
        yield "route", "all tokens", {"logits": values.logits, "top_k": values.ids.shape[1]}
        yield "gate_route", "all tokens", {"x": values.h, "gate": layer.gate, "top_k": values.ids.shape[1]}
        yield "sort_by_expert", "all tokens", {"ids": values.ids, "num_experts": len(layer.gate)}
        yield from self._expert_calls(rows)

    def _uneven(self, length: int, least: int) -> Tensor:
        """`length` for the first sequence, one less for each one after it, int32 [B]."""
        B = len(self.positions)
        return (length - torch.arange(B, device=self.values.x.device)).clamp(min=least).int()

    def _cached_calls(self) -> Iterator[Call]:
        """Ring caches that hold about half of each sequence: a chunk after it, and one token after it."""
        values, (B, T) = self.values, self.positions.shape
        past = self._uneven(T // 2, 0)
        cache = KVCache(self.config, B, T, values.x.device, values.x.dtype)
        ring = {"k_cache": cache.keys[0], "v_cache": cache.values[0]}
        half = slice(0, T // 2)
        first = {"k": self.rk[:, half], "v": values.v[:, half], **ring, "past": past * 0, "new": past}
        yield "append", "first half", first
        kernel_reference.append(**first)
        where = {**ring, "past": past, "window": self.config.sliding_window}

        def tokens(x: Tensor, count: int) -> Tensor:
            """`count` tokens [B,count,...] of each sequence after those in the cache."""
            at = past[:, None] + torch.arange(count, device=past.device)
            return x[torch.arange(B, device=past.device)[:, None], at]

        rest = T - T // 2
        chunk = {"q": tokens(self.rq, rest), "k": tokens(self.rk, rest), "v": tokens(values.v, rest)}
        yield "cached_attention", "chunk", {**chunk, **where, "new": self._uneven(rest, 0)}
        where["new"] = new = torch.ones_like(past)
        token = {name: tokens(getattr(values, name), 1) for name in "qkv"}
        yield "rope_append_attention", "one token", {**token, **self.tables, **where}
        kernel_reference.append(tokens(self.rk, 1), token["v"], **ring, past=past, new=new)
        yield "cached_attention", "one token", {"q": tokens(self.rq, 1), "k": None, "v": None, **where}

    def _expert_calls(self, rows: Tensor) -> Iterator[Call]:
        """The routes of the text, and routes that take every expert: few tokens (decode), and more (prefill)."""
        values, E, (N, K) = self.values, len(self.layer.gate), self.values.ids.shape
        yield "expert_swiglu", "as routed", self._experts(rows)
        yield "expert_swiglu", "deterministic", {**self._experts(rows), "deterministic": True}
        yield "experts_add_rms_norm", "as routed", self._experts_norm(rows)
        needed = -(-E // K)
        sizes = {"decode": min(DECODE_TOKENS, max(16, needed)), "prefill": max(DECODE_TOKENS + 1, needed)}
        for case, size in sizes.items():
            at = torch.arange(size, device=rows.device)
            ids = self.local_ids(((at[:, None] * K + torch.arange(K, device=rows.device)) % E).int())
            args = {"x": values.h[at % N], **self.proj, "ids": ids, "weights": values.weights[at % N]}
            yield "expert_swiglu", f"every expert, {case}", args

    def _gate(self, rows: Tensor) -> Args:
        x, residual = (each.flatten(0, 1)[rows] for each in (self.values.attended, self.values.x))
        norm = {"weight": self.layer.post_attention_layernorm, **self.eps}
        return {"x": x, "residual": residual, **norm, "gate": self.layer.gate, "top_k": self.values.ids.shape[1]}

    def _embed(self, rows: Tensor) -> Args:
        """The layer's input in the place of the embedding."""
        table = self.values.x.flatten(0, 1)
        return {"input_ids": rows, "table": table, "weight": self.layer.input_layernorm, **self.eps}

    def _experts(self, rows: Tensor) -> Args:
        values = self.values
        routes = {"ids": self.local_ids(values.ids)[rows], "weights": values.weights[rows]}
        return {"x": values.h[rows], **self.proj, **routes}

    def _experts_norm(self, rows: Tensor) -> Args:
        residual = (self.values.x + self.values.attended).view_as(self.values.h)[rows]
        norm = {"norm_weight": self.layer.post_attention_layernorm, **self.eps}
        return {**self._experts(rows), **norm, "residual": residual}

    def sized_calls(self, B: int, T: int) -> Iterator[Call]:
        """The calls of a forward of B sequences of T tokens of `generate`, on rows drawn from the text."""
        values, config, device = self.values, self.config, self.values.x.device
        generator = torch.Generator().manual_seed(B * PREFILL_CHUNK + T)

        def draw(*shape: int) -> Tensor:
            return torch.randint(len(values.h), shape, generator=generator).to(device)

        case, rows, layer = f"{B} x {T} tokens", draw(B * T), self.layer
        yield "linear", f"qkv, {case}", {"x": values.normed.flatten(0, 1)[rows], "weight": layer.qkv_proj}
        yield "linear", f"o, {case}", {"x": values.heads.flatten(0, 1)[rows], "weight": layer.o_proj}
        yield "rms_norm_gate_route", case, self._gate(rows)
        yield "embed_rms_norm", case, self._embed(rows.view(B, T))
        yield "experts_add_rms_norm", case, self._experts_norm(rows)
        q, k, v, rq, rk = (x.flatten(0, 1) for x in (values.q, values.k, values.v, self.rq, self.rk))
        at = rows.view(B, T)
        slots = min(CONTEXT // (4 if B > MANY else 1), config.max_position_embeddings, config.sliding_window or CONTEXT)
        # Sequences end at other places, the first one where the cache does.
        past = torch.arange(B, device=device) * 37 % slots if T == 1 else torch.full((B,), slots // 3, device=device)
        past = (slots - 1 - past).clamp(max=max(0, config.max_position_embeddings - T)).int()
        caches = draw(B, slots)
        ring = {f"{name}_cache": x[caches].transpose(1, 2).contiguous() for name, x in (("k", rk), ("v", v))}
        where = {**ring, "past": past, "new": torch.full_like(past, T), "window": config.sliding_window}
        if T == 1:
            yield "rope_append_attention", case, {"q": q[at], "k": k[at], "v": v[at], **self.tables, **where}
        else:
            positions = past[:, None] + torch.arange(T, device=device)
            yield "rope", case, {"q": q[at], "k": k[at], **self.tables, "positions": positions}
            yield "cached_attention", case, {"q": rq[at], "k": rk[at], "v": v[at], **where}
            del where["window"]
            yield "append", case, {"k": rk[at], "v": v[at], **where}

    def to_meta(self) -> LayerCheck:
        """The same calls with tensors on the meta device, to see what they launch."""
        names = ("input_layernorm", "qkv_proj", "o_proj", "post_attention_layernorm", "gate", *self.proj)
        layer = SimpleNamespace(**_to_meta({name: getattr(self.layer, name) for name in names}))
        check = LayerCheck(reference.Values(**_to_meta(vars(self.values))), layer, self.config, _to_meta(self.tables))
        check.local_ids = self.local_ids
        return check

    def fp64(self, x: Tensor) -> reference.Values:
        """What the layer computes on x fp64 [nB,T,H], in fp64 with torch's routes."""
        ids = self.values.ids.repeat(len(x) // len(self.values.x), 1)
        return tolerance.fp64_block(self.layer, self.config, self.tables, x, ids)


class SizedCalls:
    """The calls on the text in every layer, and in the first one calls that launch what else `generate` launches.

    All layers have the same sizes, and so the same launches. A call of more than `limit` tokens is not made: `not_run`
    says so where no other call launches the same.
    """

    def __init__(self, config: Any, device: torch.device, limit: int) -> None:
        self.config, self.limit, self.launched = config, limit, set[Hashable]()
        self.gpu = target_arch(device), multiprocessors(device)
        self.not_run: list[str] = []

    def __call__(self, check: LayerCheck, index: int) -> Iterator[Call]:
        for call in text_calls(check, index):
            if index == 0:
                self.launched |= launches(call, *self.gpu)
            yield call
        if index == 0:
            yield from self.calls_of_generate(check)

    def calls_of_generate(self, check: LayerCheck) -> Iterator[Call]:
        on_meta = check.to_meta()
        for B, T in STEPS + CHUNKS:
            if self.config.max_position_embeddings < T:
                continue
            needed: set[tuple[str, str]] = set()
            for call in on_meta.sized_calls(B, T):
                new = launches(call, *self.gpu) - self.launched
                if new and self.limit < B * T:
                    self._leave_out(call, B * T, new)
                elif new:
                    needed.add(call[:2])
                self.launched |= new
            yield from (call for call in (check.sized_calls(B, T) if needed else ()) if call[:2] in needed)

    def _leave_out(self, call: Call, tokens: int, new: set[Any]) -> None:
        kernels = " and ".join(sorted({kernel for kernel, *_ in new}))
        self.not_run.append(f"{call[0]} ({call[1]}): {kernels}; needs a GPU or --tokens {tokens}")


def text_calls(check: LayerCheck, index: int) -> Iterator[Call]:
    """The calls on the text of layer `index`. Deterministic experts, slow ones, are called in the first layer alone."""
    return (call for call in check.calls() if index == 0 or call[:2] != ("expert_swiglu", "deterministic"))


def launches(call: Call, arch: str, sms: int | None) -> set[Hashable]:
    """The launch configurations of a call: (kernel, warps, stages, constants)."""
    op, _, args = call
    with record_launches(arch, sms) as records:
        OPS[op].run(*OPS[op].bind(**_to_meta(args)))
    return {
        (each.kernel, each.num_warps, each.num_stages, tuple(sorted(each.constexprs.items())))
        for each in records
        if each.grid is not None
    }


def _to_meta(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with its tensors on the meta device."""

    def convert(x: Any) -> Any:
        if isinstance(x, QuantizedWeight):
            return x.on_meta()
        return x.to("meta") if isinstance(x, Tensor) else x

    return {name: convert(x) for name, x in values.items()}
