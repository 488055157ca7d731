"""Other implementations of each operation, if they are installed, and a user's own function."""

import importlib.util
import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...checkpoint import table
from ...kernels import reference
from ...kernels.op import Op
from ...kernels.quantized import QuantizedWeight
from ...kernels.quantized_cache import QuantizedCache
from .decode_step import STEPS_MOST, Args

Function = Callable[..., Any]


class Unsupported(Exception):
    """The peer cannot do this case."""


@dataclass(frozen=True)
class Peer:
    """Another implementation of an operation. `build` imports and prepares what need not be timed (masks, compiled
    code) and returns a function of the operation's arguments by name, or raises `Unsupported`."""

    name: str
    op: str | None  # None: any
    needs: str  # the module that must be installed; "": torch alone
    build: Callable[[Op, Args], Function]
    strict: bool = False  # it must also be right by `stricter_oracles`, if it takes their inputs

    def does(self, op: str) -> bool:
        return self.op in (None, op) and (not self.needs or importlib.util.find_spec(self.needs) is not None)


def _compile(op: Op, args: Args) -> Function:
    torch.compiler.reset()  # shapes of earlier cases would count against the limit of recompilations
    compiled = torch.compile(op.reference, dynamic=False)
    return lambda **kwargs: compiled(**op.reference_args(kwargs))


def _require_dense(args: Args) -> None:
    for kind, what in ((QuantizedWeight, "weights are"), (QuantizedCache, "cache is")):
        if any(isinstance(value, kind) for value in args.values()):
            raise Unsupported(f"its {what} dense")


def _library(name: str, op: str, target: str, names: str) -> Peer:
    """Return a peer that calls another library's function, by position with the arguments `names`."""

    def build(op: Op, args: Args) -> Function:
        _require_dense(args)
        function = pkgutil.resolve_name(target)
        return lambda **kwargs: function(*(kwargs[name] for name in names.split()))

    return Peer(name, op, target.split(".")[0], build)


def _grouped_mm(op: Op, args: Args) -> Function:
    _require_dense(args)
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    E, H, I = args["down_proj"].shape
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, torch.nn.Parameter(args[name], requires_grad=False))
    ids = args["ids"].long()
    return lambda x, weights, **_: module(x, ids, weights)


def _mask(args: Args) -> tuple[int, int, int, bool, Function]:
    """Return T, S, the window (0: none) and causal of an `attention`, and whether query t sees key j as a function."""
    if args.get("starts") is not None or args.get("lengths") is not None:
        raise Unsupported("ragged keys")
    T, S, window, causal = args["q"].shape[1], args["k"].shape[1], args.get("window") or 0, args.get("causal", True)
    window = max(0, window)
    return T, S, window, causal, lambda t, j: reference._visible(t + S - T, j, window, causal)


def _sdpa_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Return attention of q [B,T,Hq,D] over k and v [B,Hkv,S,D]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _sdpa(op: Op, args: Args) -> Function:
    (T, S, window, causal, visible), mask = _mask(args), None
    if not (causal and T in (1, S) and not 0 < window < S):
        t, j = (torch.arange(n, device=args["q"].device) for n in (T, S))
        mask = visible(t[:, None], j)
    return lambda q, k, v, **_: _sdpa_call(q, k.transpose(1, 2), v.transpose(1, 2), mask, mask is None and T == S)


def _flex(op: Op, args: Args) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, S, *_, visible = _mask(args)
    torch.compiler.reset()
    block = create_block_mask(lambda b, h, t, j: visible(t, j), None, None, T, S, args["q"].device)
    flex: Any = partial(torch.compile(flex_attention, dynamic=False), block_mask=block, enable_gqa=True)
    return lambda q, k, v, **_: flex(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def _flash(op: Op, args: Args) -> Function:
    from flash_attn import flash_attn_func

    _, _, window, causal, _ = _mask(args)
    sides = (-1, -1) if not window else (window - 1, 0) if causal else (window // 2, window // 2)
    return lambda q, k, v, **_: flash_attn_func(q, k, v, causal=causal, window_size=sides)


def _cached_slots(args: Args) -> Tensor:
    """Return how many slots each sequence's one query sees: all written ones, since the window is the ring."""
    _require_dense(args)
    if args["k"] is not None:
        raise Unsupported("a chunk beside the cache")
    slots = args["k_cache"].shape[2]
    if 0 < (args.get("window") or 0) < slots:
        raise Unsupported("a window shorter than the ring")
    return (args["past"] + args["new"]).clamp(max=slots)


def _sdpa_cached(op: Op, args: Args) -> Function:
    lengths, slots = _cached_slots(args), args["k_cache"].shape[2]
    written = torch.arange(slots, device=lengths.device) < lengths[:, None]
    mask = None if bool(written.all()) else written[:, None, None]
    return lambda q, k_cache, v_cache, **_: _sdpa_call(q, k_cache, v_cache, mask)


def _flash_cached(op: Op, args: Args) -> Function:
    from flash_attn import flash_attn_with_kvcache

    flash = partial(flash_attn_with_kvcache, cache_seqlens=_cached_slots(args).int(), causal=True)
    return lambda q, k_cache, v_cache, **_: flash(q, k_cache.transpose(1, 2), v_cache.transpose(1, 2))


def _hf_step(op: Op, args: Args, kind: str) -> Function:
    """Return an "eager" step of transformers on our weights, "applied", or in CUDA graphs over a "static cache"."""
    from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM, StaticCache
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    from ...hf import apply
    from ...hf.attention import CACHE

    model, cache = args["model"], args["cache"]
    _require_dense({**model.named_weights(), "keys": cache.keys[0]})
    fields = asdict(model.config)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    settings = MixtralConfig(**fields, rope_parameters=rope)
    with torch.device("meta"):
        hf = MixtralForCausalLM(settings).eval()
    parameters, targets = dict(model.named_parameters()), table(model.config, "fused")
    hf.load_state_dict({name: parameters[one.parameter][one.index] for name, one in targets.items()}, assign=True)
    hf.model.rotary_emb = MixtralRotaryEmbedding(settings).to(model.device)
    hf = apply(hf) if kind == "applied" else hf
    compiled = kind == "static cache"
    copy = StaticCache(settings, cache.slots + STEPS_MOST) if compiled else DynamicCache()
    for index, layer in enumerate(zip(cache.keys, cache.values, strict=True)):
        copy.update(*(x[:, :, : cache.slots - 1].clone() for x in layer), index)
    forward = torch.compile(hf.forward, mode="reduce-overhead") if compiled else hf.forward
    return lambda token, **_: forward(token, use_cache=True, **{CACHE: copy}).logits[:, -1].float()


EXPERTS = "x gate_up_proj down_proj"
LIGER, VLLM = "liger_kernel.transformers.functional", "vllm.model_executor.layers.fused_moe.fused_moe"
PEERS = (
    Peer("torch", None, "", lambda op, args: op.call_reference),
    Peer("torch.compile", None, "", _compile),
    Peer("F.rms_norm", "rms_norm", "", lambda *_: lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)),
    _library("Liger", "rms_norm", f"{LIGER}:liger_rms_norm", "x weight eps"),
    _library("Liger", "add_rms_norm", f"{LIGER}:liger_fused_add_rms_norm", "x residual weight eps"),
    _library("Liger", "expert_swiglu", "liger_kernel.ops:LigerFusedMoEFunction.apply", f"{EXPERTS} ids weights"),
    _library("vLLM", "expert_swiglu", f"{VLLM}:fused_experts", f"{EXPERTS} weights ids"),
    Peer("HF grouped_mm", "expert_swiglu", "transformers", _grouped_mm),
    Peer("SDPA", "attention", "", _sdpa),
    Peer("FlexAttention", "attention", "", _flex),
    Peer("flash-attention", "attention", "flash_attn", _flash),
    Peer("SDPA", "cached_attention", "", _sdpa_cached),
    Peer("flash-attention", "cached_attention", "flash_attn", _flash_cached),
    Peer("HF eager", "decode_step", "transformers", partial(_hf_step, kind="eager")),
    Peer("HF applied", "decode_step", "transformers", partial(_hf_step, kind="applied")),
    Peer("HF static cache", "decode_step", "transformers", partial(_hf_step, kind="static cache")),
)


def user_peer(name: str, function: Function) -> Peer:
    """Return a peer that calls `function` by position with the arguments, up to the last one that the case sets."""
    if not callable(function):
        raise ValueError(f"peer {name!r} is a {type(function).__name__}, needs a function")

    def build(op: Op, args: Args) -> Function:
        count = 1 + max(map(op.names.index, args))
        try:
            inspect.signature(function).bind(*op.names[:count])
        except TypeError as error:
            raise TypeError(f"{error}; it is called with ({', '.join(op.names[:count])})") from error
        except ValueError:  # a C function without a signature
            pass
        return lambda **kwargs: function(*op.bind(**kwargs)[:count])

    return Peer(name, None, "", build, strict=True)


def import_peer(text: str) -> Peer:
    """Return the peer that `--peer` names, of a module in this folder or installed; ValueError where there is none."""
    sys.path.insert(0, os.getcwd())
    try:
        return user_peer(text, pkgutil.resolve_name(text if ":" in text else f"{text}:"))
    except Exception as error:  # the module's own code may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"--peer is {text!r}, needs MODULE:FUNCTION, in this folder or installed: {cause}") from error
