"""Experts of transformers' models by `ops.expert_swiglu`: which modules have them, and the function that runs them.

T tokens, K experts per token, E experts, H hidden, I intermediate
"""

from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import is_autocast_available
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes
from transformers.activations import ACT2FN
from transformers.integrations import moe

from .. import ops
from ..kernels.operation.call import transformed, untraced
from ..kernels.operation.checks import FLOATS
from ..kernels.ops.experts.activations import ACTIVATIONS, number_names
from ..kernels.reference import activate
from .training import FrozenExperts, is_recorded, own_routes

NAME = "mixtral_triton"  # among transformers' implementations of experts and attention, and its quantizers
PROJECTIONS = ("gate_up_proj", "down_proj")
# Activations by the class of act_fn, and the attributes that hold the numbers of a class's own `_apply_gate`.
ACT_FNS = {nn.SiLU: "silu"} | {type(ACT2FN[x.act_fn]): name for name, x in ACTIVATIONS.items() if x.act_fn}
NUMBERS = "limit", "swiglu_limit", "alpha", "swiglu_alpha"
# What transformers' decorator of experts says of a module, the value that the operation needs, and what another means.
DECLARED = {
    "has_gate": (True, "experts without a gate"),
    "has_bias": (False, "a bias"),
    "is_transposed": (False, "transposed weights"),
    "is_concatenated": (True, "interleaved rows of gate and up"),
    "has_post_expert_norm": (False, "a norm behind each expert"),
}
PACKED = "gptq", "awq"  # quantizers of transformers that leave the experts of their files unread
NEEDED = [need for need, _ in DECLARED.values()]


def fused(operation: Any, *tensors: Any) -> Any:
    """Return the operation to run: None where torch records gradients of these tensors, which it does not have; without
    its checks unless a tracer, derivatives or autocast may change its arguments, or a tensor is a lazy negation.
    ValueError for another dtype than the operations have, as of a model that was converted."""
    if tensors[0].dtype not in FLOATS:
        got = f"{operation.__name__} got {tensors[0].dtype}, as of a converted model"
        raise ValueError(f"mixtral_triton: {got}, needs fp32, bf16 or fp16; or mixtral_triton.revert(model)")
    if torch.is_grad_enabled():
        return None if is_recorded(*tensors) else operation
    if not untraced() or torch._C._is_any_autocast_enabled() or transformed():
        return operation
    for x in tensors:  # a loop: a generator would take a call for each tensor
        if isinstance(x, Tensor) and x.is_neg():
            return operation
    return operation.unchecked


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """Return the dtype that autocast selects for x, None without autocast."""
    device = x.device.type
    if torch._C._is_any_autocast_enabled() and is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


def is_experts(module: nn.Module) -> bool:
    """Whether transformers' decorator of experts made this module's class."""
    return "is_concatenated" in vars(module)


@cache
def own_gate(apply_gate: Any, act_fn: str | None, numbers: tuple[Any, ...]) -> str | None:
    """Return the activation that a class's own `_apply_gate` computes, with the act_fn of that name and attributes
    NUMBERS: the one that equals it in fp64 on gates and ups of all sizes. None where it is another, or reads more."""
    held = {name: value for name, value in zip(NUMBERS, numbers, strict=True) if isinstance(value, float | int)}
    by_name = {name.removeprefix("swiglu_"): float(value) for name, value in held.items()}
    with _disable_current_modes(), torch.no_grad():
        steps = torch.linspace(-4, 4, 161, dtype=torch.float64, device="cpu")
        values = torch.cat([steps, *(steps * value for value in by_name.values())])
        gate, up = values.repeat_interleave(len(values)), values.repeat(len(values))
        act = {"act_fn": partial(activate, up=torch.ones_like(gate), activation=act_fn)} if act_fn else {}
        try:
            want = apply_gate(SimpleNamespace(**act, **held), torch.cat((gate, up)))
        except Exception:  # whatever a model's own code raises on an object that lacks what else it reads
            return None
        for name in ACTIVATIONS:
            activation = ":".join((name, *(str(by_name.get(number, 0.0)) for number in number_names(name))))
            ours = activate(gate, up, activation)
            if want.shape == ours.shape and torch.allclose(ours, want, rtol=1e-12, atol=1e-12):
                return activation
    return None


@torch.compiler.assume_constant_result
def known_gate(kind: Any, *args: Any) -> str | None:
    """`own_gate` of a class, whose cache a compiler does not see."""
    return own_gate(kind._apply_gate, *args)


def check_experts(module: Any, name: str = "", instead: str = 'experts_implementation="grouped_mm"') -> str:
    """Return the activation of `module`, a module of experts. Raise ValueError that names it, and what would do
    `instead`, unless `ops.expert_swiglu` computes its forward."""
    flags, fault = vars(module), None  # read here: each attribute of a module that is a module costs a call
    if [*map(flags.get, DECLARED)] != NEEDED:  # as in releases of transformers that lack a flag
        fault = next((what for flag, (need, what) in DECLARED.items() if flags.get(flag, need) is not need), None)
    act_fn: Any = flags["_modules"].get("act_fn", flags.get("act_fn"))
    activation = "silu" if act_fn is nn.functional.silu else ACT_FNS.get(type(act_fn))
    activation = None if "forward" in getattr(act_fn, "__dict__", ()) else activation
    if fault is None and type(module)._apply_gate is not moe._default_apply_gate:
        activation = known_gate(type(module), activation, tuple(map(flags.get, NUMBERS)))
        if activation is None:
            fault = f"an activation of its own, {type(module).__name__}._apply_gate"
    elif fault is None and activation is None:
        fault = f"the activation {act_fn!r:.80}"
    if fault is None and isinstance(act_fn, nn.Module) and (act_fn._forward_hooks or act_fn._forward_pre_hooks):
        fault = "hooks on act_fn, which fused experts never call"
    if fault is None and "DTensor" in [type(x).__name__ for x in flags["_parameters"].values()]:
        fault = "a DTensor"
    fields = object.__getattribute__(flags["config"], "__dict__") if untraced() else {}  # a missing attribute is slow
    method = getattr(fields.get("quantization_config"), "quant_method", None)
    if method in PACKED and not all(getattr(x, "_is_hf_initialized", False) for x in flags["_parameters"].values()):
        fault = f"random weights: transformers did not read them from the {method:s} checkpoint"
    if fault is not None:
        needs = f"needs SiLU or GELU experts [E, 2I, H] and [E, H, I], gate first, or {instead}"
        raise ValueError(f"mixtral_triton: {name or type(module).__name__} has {fault}, {needs}")
    return str(activation)


def experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """hidden_states [T,H], top_k_index and top_k_weights [T,K] -> [T,H]. Ids of E and above are other ranks' experts,
    which contribute nothing. ValueError that names the module's class for experts that `check_experts` refuses."""
    activation = check_experts(module)
    gate_up, down = module.gate_up_proj, module.down_proj
    dtype = down.dtype if isinstance(down, Tensor) else autocast_dtype(hidden_states)
    if dtype not in (None, hidden_states.dtype):  # by autocast; "grouped_mm" casts to the dtype of its weights, too
        x = hidden_states.to(dtype)
        return experts(module, x, top_k_index, top_k_weights).to(hidden_states.dtype)
    run = fused(ops.expert_swiglu, hidden_states, top_k_weights, gate_up, down)
    if run is None:
        if not is_compiling():
            args = hidden_states, gate_up, down, top_k_index, top_k_weights
            return FrozenExperts.apply(*args, type(module).__name__, activation)
        run = ops.expert_swiglu  # whose operator a compiler follows, with its gradients
    if top_k_index.device.type == "cpu":  # where the operation refuses them
        top_k_index, top_k_weights, _ = own_routes(top_k_index, top_k_weights, len(down))
    if top_k_weights.dtype != hidden_states.dtype:
        top_k_weights = top_k_weights.float()
    return run(hidden_states, gate_up, down, top_k_index, top_k_weights, activation)
