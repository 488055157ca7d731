"""Who else does the same work: by operation, and only those that are installed.

A peer's `build(op, args)` imports and prepares what need not be timed (masks, compiled code) and returns a function
that takes the operation's arguments by name. What a peer cannot do raises `Unfit`, and says so in the table.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import linear
from ...kernels.launch import INTERPRETED, override_configs, target_arch
from ...kernels.op import Op
from ...kernels.quantized import QuantizedWeight
from . import decode_step

Args = dict[str, Any]
Function = Callable[..., Any]


class Unfit(Exception):
    """The peer has no way to do this case."""


@dataclass(frozen=True)
class Peer:
    """`op` None: any operation. `needs`: the module that has to be installed, "" for torch alone."""

    name: str
    op: str | None
    needs: str
    build: Callable[[Op, Args], Function]

    @property
    def installed(self) -> bool:
        return not self.needs or importlib.util.find_spec(self.needs) is not None


def _torch(op: Op, args: Args) -> Function:
    return op.call_reference


def _compile(op: Op, args: Args) -> Function:
    torch.compiler.reset()  # else the shapes of earlier cases would count against the limit of recompilations
    compiled = torch.compile(op.reference, dynamic=False)
    return lambda **given: compiled(**op.reference_args(given))


def _dense(args: Args) -> None:
    if any(isinstance(value, QuantizedWeight) for value in args.values()):
        raise Unfit("its weights are dense")


def _fused_norm(op: Op, args: Args) -> Function:
    return lambda x, weight, eps: F.rms_norm(x, weight.shape, weight, eps)


def _liger_norm(op: Op, args: Args) -> Function:
    from liger_kernel.transformers.functional import liger_rms_norm

    return lambda x, weight, eps: liger_rms_norm(x, weight, eps)


def _liger_add_norm(op: Op, args: Args) -> Function:
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return lambda x, residual, weight, eps: liger_fused_add_rms_norm(x, residual, weight, eps)


def _liger_rope(op: Op, args: Args) -> Function:
    """Liger rotates in place: it gets copies, of which only the first call's result means anything."""
    from liger_kernel.transformers.functional import liger_rope

    q, k = (args[name].transpose(1, 2).clone() for name in "qk")
    cos, sin = (torch.cat(2 * [args[name][args["positions"]]], -1).to(q.dtype) for name in ("cos", "sin"))

    def run(**_: Any) -> tuple[Tensor, Tensor]:
        rotated = liger_rope(q, k, cos, sin)
        return rotated[0].transpose(1, 2), rotated[1].transpose(1, 2)

    return run


def _grouped_mm(op: Op, args: Args) -> Function:
    _dense(args)
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    gate_up, down = args["gate_up_proj"], args["down_proj"]
    E, H, I = down.shape
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name, weight in (("gate_up_proj", gate_up), ("down_proj", down)):
        setattr(module, name, torch.nn.Parameter(weight, requires_grad=False))
    ids = args["ids"].long()
    return lambda x, weights, **_: module(x, ids, weights)


def _liger_experts(op: Op, args: Args) -> Function:
    _dense(args)
    from liger_kernel.ops import LigerFusedMoEFunction

    def run(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return LigerFusedMoEFunction.apply(x, gate_up_proj, down_proj, ids, weights)

    return run


def _vllm_experts(op: Op, args: Args) -> Function:
    _dense(args)
    from vllm.model_executor.layers.fused_moe.fused_moe import fused_experts

    def run(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_experts(x, gate_up_proj, down_proj, weights, ids)

    return run


def _window(args: Args) -> int:
    return max(0, args.get("window") or 0)


def _whole_keys(args: Args) -> None:
    if args.get("starts") is not None or args.get("lengths") is not None:
        raise Unfit("ragged keys")


def visible(args: Args) -> Callable[[Any, Any], Any]:
    """Which key j the query t of `attention` sees, T queries aligned with the end of S keys; on tensors of indices."""
    window, shift = _window(args), args["k"].shape[1] - args["q"].shape[1]

    def seen(t: Any, j: Any) -> Any:
        i = t + shift
        if args.get("causal", True):
            return (j <= i) & (j > i - window) if window else j <= i
        return (i - j).abs() <= window // 2 if window else i == i

    return seen


def _sdpa(op: Op, args: Args) -> Function:
    _whole_keys(args)
    T, S, causal = args["q"].shape[1], args["k"].shape[1], args.get("causal", True)
    mask = None
    plain = causal and T == S and not 0 < _window(args) < S
    if not plain and not (causal and T == 1 and not 0 < _window(args) < S):
        at = {"device": args["q"].device}
        mask = visible(args)(torch.arange(T, **at)[:, None], torch.arange(S, **at))

    def run(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=plain, enable_gqa=True).transpose(1, 2)

    return run


def _flex(op: Op, args: Args) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _whole_keys(args)
    torch.compiler.reset()
    seen, q = visible(args), args["q"]
    block = create_block_mask(lambda b, h, t, j: seen(t, j), None, None, q.shape[1], args["k"].shape[1], q.device)
    flex: Any = torch.compile(flex_attention, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return flex(q, k, v, block_mask=block, enable_gqa=True).transpose(1, 2)

    return run


def _flash(op: Op, args: Args) -> Function:
    from flash_attn import flash_attn_func

    _whole_keys(args)
    causal, window = args.get("causal", True), _window(args)
    sides = (-1, -1) if not window else (window - 1, 0) if causal else (window // 2, window // 2)
    return lambda q, k, v, **_: flash_attn_func(q, k, v, causal=causal, window_size=sides)


def _held(args: Args) -> Tensor:
    """Slots of the ring that each sequence's one query sees: all that were written, since the window is the ring."""
    if args["k"] is not None:
        raise Unfit("a chunk beside the cache")
    slots = args["k_cache"].shape[2]
    if 0 < _window(args) < slots:
        raise Unfit("a window shorter than the ring")
    return (args["past"] + args["new"]).clamp(max=slots)


def _sdpa_cached(op: Op, args: Args) -> Function:
    held, slots = _held(args), args["k_cache"].shape[2]
    seen = torch.arange(slots, device=held.device) < held[:, None]
    mask = None if bool(seen.all()) else seen[:, None, None]

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> Tensor:
        heads = q.transpose(1, 2)
        return F.scaled_dot_product_attention(heads, k_cache, v_cache, mask, enable_gqa=True).transpose(1, 2)

    return run


def _flash_cached(op: Op, args: Args) -> Function:
    from flash_attn import flash_attn_with_kvcache

    held = _held(args).int()

    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, **_: Any) -> Tensor:
        caches = (x.transpose(1, 2) for x in (k_cache, v_cache))
        return flash_attn_with_kvcache(q, *caches, cache_seqlens=held, causal=True)

    return run


def _few_rows(op: Op, args: Args) -> Function:
    """Our kernel for few rows where a library is chosen."""
    x, weight = args["x"], args["weight"]
    if x.device.type == "cpu" and not INTERPRETED:
        raise Unfit("kernels on a CPU that interprets none")
    sizes, arch = {"T": x.shape[0], "H": x.shape[1], "N": len(weight)}, target_arch(x.device)
    chosen = (
        args["deterministic"] or isinstance(weight, QuantizedWeight) or linear.use_skinny_kernel(sizes, x.dtype, arch)
    )
    if chosen or sizes["T"] > linear.SKINNY_M_MAX:
        raise Unfit("where it is chosen already, or of too many rows")
    config = op.configs(sizes, x.dtype, arch)["linear_decode_kernel"]

    def run(**given: Any) -> Tensor:
        with override_configs({"linear_decode_kernel": config}):
            return op.run(**given)

    return run


PEERS = (
    Peer("torch", None, "", _torch),
    Peer("torch.compile", None, "", _compile),
    Peer("linear_decode_kernel", "linear", "", _few_rows),
    Peer("F.rms_norm", "rms_norm", "", _fused_norm),
    Peer("Liger", "rms_norm", "liger_kernel", _liger_norm),
    Peer("Liger", "add_rms_norm", "liger_kernel", _liger_add_norm),
    Peer("Liger", "rope", "liger_kernel", _liger_rope),
    Peer("HF grouped_mm", "expert_swiglu", "transformers", _grouped_mm),
    Peer("Liger", "expert_swiglu", "liger_kernel", _liger_experts),
    Peer("vLLM", "expert_swiglu", "vllm", _vllm_experts),
    Peer("SDPA", "attention", "", _sdpa),
    Peer("FlexAttention", "attention", "", _flex),
    Peer("flash-attention", "attention", "flash_attn", _flash),
    Peer("SDPA", "cached_attention", "", _sdpa_cached),
    Peer("flash-attention", "cached_attention", "flash_attn", _flash_cached),
    Peer("HF eager", "decode_step", "transformers", decode_step.hf_eager),
    Peer("HF static cache", "decode_step", "transformers", decode_step.hf_static),
)


def peers_of(op: str) -> tuple[Peer, ...]:
    """The installed peers of an operation."""
    return tuple(peer for peer in PEERS if peer.op in (None, op) and peer.installed)
