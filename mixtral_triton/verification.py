"""verify: this runtime beside plain torch, layer by layer and op by op, on the user's own weights.

The reference's activations go into every operation, so that one flipped route cannot hide the next layer. The error of
an operation is measured against wider arithmetic (fp32, or fp64 for fp32 weights), next to the error of plain torch in
the weights' dtype, which sets the limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .cache import KVCache
from .kernels import reference as kernel_reference
from .kernels.experts_config import DECODE_TOKENS
from .kernels.launch import INTERPRETED
from .kernels.linear import FEW
from .kernels.registry import OPS
from .model import Layer, Mixtral, check_ids, check_vocabulary
from .report import Report, Row

TOKENS = 96  # of the default input: beyond the sort-free experts, and beyond the small checkpoint's window
RATIO = 2.0  # an operation may err at most this many times as much as plain torch in the same dtype
# What one rounding of a result (16-bit types), or another order of a long sum (fp32), may cost in any case.
FLOOR = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-19}
LOGITS_LIMIT = 1e-4  # of the largest logit, end to end in fp32

Args = dict[str, Any]


def verify(
    target: Mixtral | nn.Module | str | os.PathLike[str],
    input_ids: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Compare `target` with plain torch, or a transformers Mixtral with transformers' own modules -> Report.

    target: a Mixtral, a checkpoint folder, or a model of transformers: as `apply` left it, else as it would be applied.
    input_ids int64 [B,T]; None: a fixed pseudo-random text. `progress` is called with (layers done, layers).
    """
    if isinstance(target, nn.Module) and not isinstance(target, Mixtral):
        from .hf_verification import verify_hf

        return verify_hf(target, input_ids, progress)
    if not isinstance(target, (Mixtral, str, os.PathLike)):
        got = type(target).__name__
        raise ValueError(f"verify: target is a {got}, needs a Mixtral, a checkpoint folder or transformers' Mixtral")
    model = target if isinstance(target, Mixtral) else Mixtral.from_pretrained(target)
    ids = text_or_default(input_ids, model.config, model.device)
    with torch.no_grad():
        return _verify(model, ids, progress)


def text_or_default(ids: Tensor | None, config: Any, device: torch.device) -> Tensor:
    if device.type == "meta":
        raise ValueError("verify: the model is on the meta device, which holds no numbers, needs a CPU or a GPU")
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        length = min(TOKENS, config.max_position_embeddings)
        return torch.randint(config.vocab_size, (1, length), generator=generator).to(device)
    check_ids(ids, config.vocab_size, device)
    check_vocabulary(ids, config.vocab_size)
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"verify: input_ids has {ids.shape[1]} tokens, more than max_position_embeddings")
    return ids


def _verify(model: Mixtral, ids: Tensor, progress: Callable[[int, int], None] | None) -> Report:
    x = F.embedding(ids, model.embed_tokens)
    rows, expected, x = check_layers(partial(LayerCheck, model), model.layers, x, progress)
    rows.append(Row(len(model.layers), "rms_norm", "final", *measure("rms_norm", _norm_args(model, x, model.norm))))
    logits, routes = _own_forward(model, ids)
    if model.dtype == torch.float32:
        want = model.head(reference.rms_norm(x, model.norm, model.config.rms_norm_eps))
        rows.append(end_row(len(model.layers), "logits", logits, want))
    return finish(rows, expected, routes, model.device, model.dtype)


def check_layers(
    make: Callable[[Any, Tensor], LayerCheck],
    layers: Sequence[Any],
    x: Tensor,
    progress: Callable[[int, int], None] | None,
) -> tuple[list[Row], list[Tensor], Tensor]:
    """Every call of `make(layer, its input)` measured, layer after layer -> rows, routes, the last layer's output."""
    rows: list[Row] = []
    routes: list[Tensor] = []
    for index, layer in enumerate(layers):
        check = make(layer, x)
        for op, case, args in check.calls():
            rows.append(Row(index, op, case, *measure(op, args, check.plain.get(op))))
        x = check.output
        routes.append(check.ids)
        if progress is not None:
            progress(index + 1, len(layers))
    return rows, routes, x


def end_row(layers: int, name: str, got: Tensor, want: Tensor) -> Row:
    return Row(layers, name, "end to end", float((got - want).abs().max() / want.abs().max()), LOGITS_LIMIT)


def finish(
    rows: list[Row],
    expected: list[Tensor],
    routes: list[Tensor],
    device: torch.device,
    dtype: torch.dtype,
    peer: str = "plain torch",
) -> Report:
    flips = sum(_flips(*pair) for pair in zip(expected, routes, strict=True))
    way = "plain torch" if device.type == "cpu" and not INTERPRETED else "Triton, interpreted"
    if device.type == "cuda":
        way = f"Triton on {torch.cuda.get_device_name(device)}"
    routed = sum(len(ids) for ids in expected)
    return Report(tuple(rows), flips, routed, way, str(dtype).removeprefix("torch."), peer)


def _flips(a: Tensor, b: Tensor) -> int:
    """Tokens whose set of experts differs, ids [T,K] each."""
    return int((a.sort(-1).values != b.sort(-1).values).any(-1).sum())


def _norm_args(model: Mixtral, x: Tensor, weight: Tensor) -> Args:
    return {"x": x, "weight": weight, "eps": model.config.rms_norm_eps}


class LayerCheck:
    """One layer in plain torch on x [B,T,H], and the calls in it that the runtime has to equal."""

    plain: Mapping[str, Callable[..., Any]] = {}  # what sets an operation's limit, where not its reference

    def __init__(self, model: Mixtral, layer: Layer, x: Tensor) -> None:
        config = model.config
        self.model, self.layer, self.x = model, layer, x
        B, T, H = x.shape
        Hq, Hkv, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        h = reference.rms_norm(x, layer.input_layernorm, config.rms_norm_eps)
        self.q, self.k, self.v = F.linear(h, layer.qkv_proj).view(B, T, Hq + 2 * Hkv, D).split((Hq, Hkv, Hkv), dim=2)
        self.positions = torch.arange(T, device=x.device).expand(B, T)
        self.tables = {"cos": model.cos, "sin": model.sin}
        self.rq, self.rk = reference.rope(self.q, self.k, **self.tables, positions=self.positions)
        a = reference.attention(self.rq, self.rk, self.v, window=config.sliding_window)
        self.heads = a.reshape(B, T, Hq * D)
        self.a = F.linear(self.heads, layer.o_proj)
        self.h = reference.rms_norm(x + self.a, layer.post_attention_layernorm, config.rms_norm_eps).view(B * T, H)
        self.gate_logits = F.linear(self.h, layer.gate)
        self.weights, self.ids = reference.route(self.gate_logits, config.num_experts_per_tok)
        experts = reference.expert_swiglu(self.h, layer.gate_up_proj, layer.down_proj, self.ids, self.weights)
        self.output = x + self.a + experts.view_as(x)

    def calls(self) -> Iterator[tuple[str, str, Args]]:
        """(op, case, arguments), every operation of the registry at least once."""
        window, layer = self.model.config.sliding_window, self.layer
        yield "rms_norm", "input", _norm_args(self.model, self.x, layer.input_layernorm)
        norm = _norm_args(self.model, self.a, layer.post_attention_layernorm)
        yield "add_rms_norm", "with residual", norm | {"residual": self.x}
        rows = _norm_args(self.model, self.x, layer.input_layernorm)
        rows["table"] = rows.pop("x").flatten(0, 1)  # the layer's input in the place of the embedding
        rows["input_ids"] = torch.arange(len(rows["table"]), device=self.x.device).view(self.positions.shape)
        yield "embed_rms_norm", "rows of the input", rows
        yield "rope", "all tokens", {"q": self.q, "k": self.k, **self.tables, "positions": self.positions}
        keys = {"k": self.rk, "v": self.v, "window": window}
        yield "attention", "prefill", {"q": self.rq, **keys}
        yield "attention", "decode", {"q": self.rq[:, -1:], **keys}
        yield from self._cached()
        yield "linear", "o, few tokens", {"x": self.heads[0, :FEW], "weight": layer.o_proj}
        yield "linear", "o, deterministic", {"x": self.heads, "weight": layer.o_proj, "deterministic": True}
        yield "route", "all tokens", {"logits": self.gate_logits, "top_k": self.ids.shape[1]}
        yield "gate_route", "all tokens", {"x": self.h, "gate": layer.gate, "top_k": self.ids.shape[1]}
        yield "sort_by_expert", "all tokens", {"ids": self.ids, "num_experts": len(layer.gate)}
        yield from self._experts()

    def _cached(self) -> Iterator[tuple[str, str, Args]]:
        """The ring, filled with the first half of the text: a chunk after it, and one token after it."""
        B, T = self.positions.shape
        past = torch.full((B,), T // 2, dtype=torch.int32, device=self.x.device)
        cache = KVCache(self.model.config, B, T, self.x.device, self.x.dtype)
        ring = {"k_cache": cache.keys[0], "v_cache": cache.values[0]}
        half = slice(0, T // 2)
        first = {"k": self.rk[:, half], "v": self.v[:, half], **ring, "past": past * 0, "new": past}
        yield "append", "first half", first
        kernel_reference.append(**first)
        rest = slice(T // 2, T)
        chunk = {"q": self.rq[:, rest], "k": self.rk[:, rest], "v": self.v[:, rest]}
        where = {"past": past, "window": self.model.config.sliding_window}
        yield "cached_attention", "chunk", {**chunk, **ring, **where, "new": T - past}
        one, new = slice(T // 2, T // 2 + 1), torch.ones_like(past)
        token = {"q": self.q[:, one], "k": self.k[:, one], "v": self.v[:, one]}
        yield "rope_append", "one token", {**token, **self.tables, **ring, "past": past, "new": new}
        kernel_reference.append(self.rk[:, one], self.v[:, one], **ring, past=past, new=new)
        yield "cached_attention", "one token", {"q": self.rq[:, one], "k": None, "v": None, **ring, **where, "new": new}

    def _experts(self) -> Iterator[tuple[str, str, Args]]:
        """The routing that happened, and one that takes every expert; few tokens (decode) and all (prefill)."""
        proj = {"gate_up_proj": self.layer.gate_up_proj, "down_proj": self.layer.down_proj}
        routed = {"x": self.h, **proj, "ids": self.ids, "weights": self.weights}
        yield "expert_swiglu", "as routed", routed
        norm = {"residual": (self.x + self.a).view_as(self.h), "norm_weight": self.layer.post_attention_layernorm}
        yield "experts_add_rms_norm", "as routed", routed | norm | {"eps": self.model.config.rms_norm_eps}
        N, K = self.ids.shape
        E = len(self.layer.gate)
        for case, rows in (("every expert, decode", DECODE_TOKENS), ("every expert, prefill", DECODE_TOKENS + 1)):
            rows = max(rows, -(-E // K)) if rows > DECODE_TOKENS else min(rows, max(16, -(-E // K)))
            take = torch.arange(rows, device=self.h.device)
            ids = ((take[:, None] * K + torch.arange(K, device=self.h.device)) % E).int()
            x, weights = self.h[take % N], self.weights[take % N]
            yield "expert_swiglu", case, {"x": x, **proj, "ids": ids, "weights": weights}


class Yardstick:
    """The exact results of one call of an operation, and how far from them another way to do it may be.

    Errors and limits are relative to the largest value of the result.
    """

    def __init__(self, name: str, args: Args, plain: Callable[..., Any] | None = None) -> None:
        """`plain` is the way whose error sets the limits; None: the operation's reference."""
        op = OPS[name]
        self.args, self.mutates, self.follows = args, op.mutates, op.follows
        self.exact = _truth(name, args, op.mutates)
        self.limits: list[float] = []
        for same, exact in zip(_results(plain or op.reference, args, op.mutates), self.exact, strict=True):
            known = op.follows is not None and self.limits  # what follows from the first result has no error of its own
            self.limits.append(max(0.0 if known else RATIO * _error(same, exact), FLOOR.get(same.dtype, 0.0)))

    def measure(self, function: Callable[..., Any]) -> tuple[float, float]:
        """Error of `function` and its limit; of several results, the one nearest to (or farthest beyond) its limit."""
        got = _results(function, self.args, self.mutates)
        exact = self.exact if self.follows is None else [self.exact[0], *self.follows(self.args, got)]
        errors = [_error(*pair) for pair in zip(got, exact, strict=True)]
        return max(zip(errors, self.limits, strict=True), key=lambda pair: pair[0] / max(pair[1], 1e-30))


def measure(name: str, args: Args, plain: Callable[..., Any] | None = None) -> tuple[float, float]:
    """Error of the runtime's `name` on `args`, and its limit."""
    return Yardstick(name, args, plain).measure(getattr(torch.ops.mixtral_triton, name))


def _results(function: Callable[..., Any], args: Args, mutates: tuple[str, ...]) -> list[Tensor]:
    """What a call gives back, and the arguments it changed (copies: the caller's stay as they are)."""
    own = {name: value.clone() if name in mutates else value for name, value in args.items()}
    out = function(**own)
    results = [] if out is None else list(out) if isinstance(out, tuple) else [out]
    return results + [own[name] for name in mutates]


def _truth(name: str, args: Args, mutates: tuple[str, ...]) -> list[Tensor]:
    """The reference in wider arithmetic; the experts one at a time, since a layer of them is most of a model."""
    if name == "experts_add_rms_norm":
        args = dict(args)
        residual, weight, eps = (args.pop(key) for key in ("residual", "norm_weight", "eps"))
        (out,) = _truth("expert_swiglu", args, mutates)
        return list(reference.rms_norm(out, _widen(weight), eps, _widen(residual)))
    if name != "expert_swiglu":
        wide = {key: _widen(value) for key, value in args.items()}
        return _results(OPS[name].reference, wide, mutates)
    x, weights = _widen(args["x"]), _widen(args["weights"])
    out = torch.zeros_like(x)
    for expert in args["ids"].unique().tolist():
        only = weights.masked_fill(args["ids"] != expert, 0.0).sum(-1, keepdim=True)
        gate_up, down = (_widen(args[key][expert : expert + 1]) for key in ("gate_up_proj", "down_proj"))
        out += reference.expert_swiglu(x, gate_up, down, torch.zeros_like(args["ids"][:, :1]), only)
    return [out]


def _widen(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.dtype.is_floating_point:
        return value
    return value.double()


def _error(got: Tensor, want: Tensor) -> float:
    """Largest difference relative to the largest value; any NaN, or any difference of integers, is infinite."""
    if not want.dtype.is_floating_point:
        return 0.0 if torch.equal(got, want) else float("inf")
    if got.numel() == 0:
        return 0.0
    error = float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


class Routes(TorchDispatchMode):
    """Collects the experts that every `gate_route` call chose."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mixtral_triton.gate_route.default:
            self.ids.append(out[2])
        return out


def _own_forward(model: Mixtral, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The runtime's own forward -> its logits, and the routes of every layer."""
    with Routes() as routes:
        logits = model(ids)
    return logits, routes.ids
