"""Other implementations of each operation, if they are installed, and a user's own function.

A peer's `build(op, args)` imports and prepares what need not be timed (masks, compiled code) and returns a function
that takes the operation's arguments by name. It raises `Unsupported` for a case that it cannot do.
"""

from __future__ import annotations

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

from ...kernels import reference
from ...kernels.op import Op
from ...kernels.quantized import QuantizedWeight
from ...kernels.quantized_cache import QuantizedCache
from ...weights import table
from .decode_step import STEPS_MOST

Args = dict[str, Any]
Function = Callable[..., Any]


class Unsupported(Exception):
    """The peer cannot do this case."""


@dataclass(frozen=True)
class Peer:
    """`op` None: any operation. `needs`: the module that must be installed, "" for torch alone.

    strict  it must also be right by `stricter_oracles`, if it takes their inputs
    """

    name: str
    op: str | None
    needs: str
    build: Callable[[Op, Args], Function]
    strict: bool = False

    def does(self, op: str) -> bool:
        """Whether it is installed and does the operation."""
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


def _window(args: Args) -> int:
    return max(0, args.get("window") or 0)


def _require_unpadded(args: Args) -> None:
    if args.get("starts") is not None or args.get("lengths") is not None:
        raise Unsupported("ragged keys")


def _visible(args: Args, t: Any, j: Any) -> Any:
    """Return the mask of `attention` for query and key indices; queries align with the end of the keys."""
    shift = args["k"].shape[1] - args["q"].shape[1]
    return reference._visible(t + shift, j, args.get("window"), args.get("causal", True))


def _sdpa_call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool = False) -> Tensor:
    """Return attention of q [B,T,Hq,D] over k and v [B,Hkv,S,D]."""
    out = F.scaled_dot_product_attention(q.transpose(1, 2), k, v, mask, is_causal=causal, enable_gqa=True)
    return out.transpose(1, 2)


def _sdpa(op: Op, args: Args) -> Function:
    _require_unpadded(args)
    T, S, mask = args["q"].shape[1], args["k"].shape[1], None
    if not (args.get("causal", True) and T in (1, S) and not 0 < _window(args) < S):
        t, j = (torch.arange(n, device=args["q"].device) for n in (T, S))
        mask = _visible(args, t[:, None], j)
    causal = mask is None and T == S
    return lambda q, k, v, **_: _sdpa_call(q, k.transpose(1, 2), v.transpose(1, 2), mask, causal)


def _flex(op: Op, args: Args) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _require_unpadded(args)
    torch.compiler.reset()
    T, S = args["q"].shape[1], args["k"].shape[1]
    block = create_block_mask(lambda b, h, t, j: _visible(args, t, j), None, None, T, S, args["q"].device)
    flex: Any = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return flex(*(x.transpose(1, 2) for x in (q, k, v)), block_mask=block, enable_gqa=True).transpose(1, 2)

    return run


def _flash(op: Op, args: Args) -> Function:
    from flash_attn import flash_attn_func

    _require_unpadded(args)
    causal, window = args.get("causal", True), _window(args)
    sides = (-1, -1) if not window else (window - 1, 0) if causal else (window // 2, window // 2)
    return lambda q, k, v, **_: flash_attn_func(q, k, v, causal=causal, window_size=sides)


def _cached_slots(args: Args) -> Tensor:
    """Return how many slots each sequence's one query sees: all written ones, since the window is the ring."""
    _require_dense(args)
    if args["k"] is not None:
        raise Unsupported("a chunk beside the cache")
    slots = args["k_cache"].shape[2]
    if 0 < _window(args) < slots:
        raise Unsupported("a window shorter than the ring")
    return (args["past"] + args["new"]).clamp(max=slots)


def _sdpa_cached(op: Op, args: Args) -> Function:
    lengths, slots = _cached_slots(args), args["k_cache"].shape[2]
    written = torch.arange(slots, device=lengths.device) < lengths[:, None]
    mask = None if bool(written.all()) else written[:, None, None]
    return lambda q, k_cache, v_cache, **_: _sdpa_call(q, k_cache, v_cache, mask)


def _flash_cached(op: Op, args: Args) -> Function:
    from flash_attn import flash_attn_with_kvcache

    lengths = _cached_slots(args).int()

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> Tensor:
        caches = (x.transpose(1, 2) for x in (k_cache, v_cache))
        return flash_attn_with_kvcache(q, *caches, cache_seqlens=lengths, causal=True)

    return run


def _hf_step(op: Op, args: Args, kind: str) -> Function:
    """Return a step of transformers' model on our weights and a copy of our cache, with transformers' default experts.

    kind  "eager", or "applied" by `apply`: with a growing cache; "static cache": compiled, in CUDA graphs
    """
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
    """Return a peer that calls `function` by position with the operation's arguments, in its order and with defaults,
    up to the last one that the case sets."""
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
    """Return the peer that `--peer` names, from a module in the current folder, as `python -m` finds it, or installed.

    ValueError for a module that does not exist or import, a name that it lacks, or something that is no function.
    """
    sys.path.insert(0, os.getcwd())
    try:
        return user_peer(text, pkgutil.resolve_name(text if ":" in text else f"{text}:"))
    except Exception as error:  # the module's own code may raise anything
        cause = f"{type(error).__name__}: {error}"
        raise ValueError(f"--peer is {text!r}, needs MODULE:FUNCTION, in this folder or installed: {cause}") from error
