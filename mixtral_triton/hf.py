"""The drop-in for transformers: `apply` makes one Mixtral run on this package's operations, `revert` undoes it.

Nothing is patched. Attention, mask and experts come in through transformers' own registries, under a name of their own,
and the instance's copy of its config selects them; norms, gates, rotary embedding and the attention module around it
become instances of a subclass. What a module was is kept in the module itself, so that a deep copy can be reverted too.
"""

from __future__ import annotations

import re
from copy import deepcopy
from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")
NEEDS = (5, 7)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WAS = "_mixtral_triton_was"  # attribute of a changed module: its "class" and "config" of before


def apply(
    model: Model, attention: bool = True, experts: bool = True, rms_norm: bool = True, rope: bool = True
) -> Model:
    """Run this instance of transformers' Mixtral on the package's operations -> the same instance.

    attention  attention and its masks; rope: rotary embedding; rms_norm: every norm; experts: the gate's top-k and the
    experts. Applying again holds the latest choice. Parameters, their names, hooks and every other instance stay.
    For inference: `forward` works with gradients enabled, a backward pass or training mode is a ValueError.
    """
    ours = _import_modules()
    _check_model("apply", model, ours.theirs)
    swaps = _swaps(ours, attention=attention, experts=experts, rms_norm=rms_norm, rope=rope)
    revert(model)
    _check_weights(model)
    blocks = set(swaps)
    blocks |= {ours.theirs.MixtralExperts} if experts else set()
    blocks |= {ours.theirs.MixtralAttention} if attention else set()
    _check_modules(model, blocks)
    if not blocks:
        return model
    for module in model.modules():
        if type(module) in swaps:
            _was(module)["class"] = type(module)
            _become(module, swaps[type(module)])
        elif isinstance(module, ours.theirs.MixtralModel):
            module.register_forward_pre_hook(ours.before_forward, with_kwargs=True)
    _configure(model, ours.NAME if attention else None, ours.NAME if experts else None)
    return model


def revert(model: Model) -> Model:
    """Undo `apply`, bit for bit -> the same instance. Nothing to undo is fine."""
    ours = _import_modules()
    _check_model("revert", model, ours.theirs)
    for module in model.modules():
        was = module.__dict__.pop(_WAS, {})
        if "config" in was:
            module.__dict__["config"] = was["config"]
        if "class" in was:
            _become(module, was["class"])
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is ours.before_forward]:
            del module._forward_pre_hooks[key], module._forward_pre_hooks_with_kwargs[key]
    return model


def mixtral_modules(function: str, model: Any) -> Any:
    """transformers' modeling_mixtral, for a `model` that is made of it; ValueError that names `function` otherwise."""
    theirs = _import_modules().theirs
    _check_model(function, model, theirs)
    return theirs


def applied(model: nn.Module) -> bool:
    """Whether `apply` changed anything in this instance."""
    return any(_WAS in module.__dict__ for module in model.modules())


def _release(transformers: Any) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])


def cache_keyword() -> str:
    """What the installed transformers calls a forward's cache: it was renamed in 5.24."""
    import transformers

    return "cache" if _release(transformers) >= (5, 24) else "past_key_values"


def _import_modules() -> Any:
    """hf_modules, with the registries told about it; ImportError that says what to install."""
    need = "{}.{}".format(*NEEDS)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"mixtral_triton.apply needs transformers: pip install 'transformers>={need}'") from error
    if _release(transformers) < NEEDS:
        found = transformers.__version__
        raise ImportError(
            f"mixtral_triton.apply needs transformers >= {need}, found {found}: pip install -U transformers"
        )
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.moe import ExpertsInterface

    from . import hf_modules
    from .hf_mask import interval_mask

    AttentionInterface.register(hf_modules.NAME, hf_modules.attention)
    AttentionMaskInterface.register(hf_modules.NAME, interval_mask)
    ExpertsInterface.register(hf_modules.NAME, hf_modules.experts)
    return hf_modules


def _swaps(ours: Any, **parts: bool) -> dict[type[nn.Module], type[nn.Module]]:
    """transformers' class -> ours, for the parts that are wanted."""
    for name, value in parts.items():
        if not isinstance(value, bool):
            raise ValueError(f"apply: argument '{name}' is {value!r}, needs True or False")
    by_part = {
        "rms_norm": (ours.RMSNorm,),
        "experts": (ours.Router,),
        "rope": (ours.Rotary, ours.Attention),
    }
    wanted = [subclass for part, classes in by_part.items() if parts[part] for subclass in classes]
    return {subclass.__base__: subclass for subclass in wanted}


def _check_model(function: str, model: Any, theirs: Any) -> None:
    """One of transformers' Mixtral models, whatever its head."""
    if isinstance(model, theirs.MixtralPreTrainedModel):
        return
    inner = next((name for name in ("_orig_mod", "module", "base_model") if hasattr(model, name)), None)
    hint = f"; give it the model inside, .{inner}" if inner is not None else ""
    raise ValueError(
        f"{function}: model is a {type(model).__name__}, needs transformers' MixtralForCausalLM or MixtralModel{hint}"
    )


def _check_weights(model: Any) -> None:
    """Plain parameters in a dtype that the operations know, whole on one device each."""
    if getattr(model, "is_quantized", False) or getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("apply: model is quantized; load it without quantization_config (bf16, fp16 or fp32)")
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError("apply: model has a tensor-parallel plan; load it without tp_plan, or with a device_map")
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"apply: parameter {name} is sharded (a DTensor); load the model whole, or with a device_map"
            )
        if type(parameter) is not nn.Parameter or parameter.dtype not in DTYPES:
            what = f"{parameter.dtype} in a {type(parameter).__name__}"
            raise ValueError(f"apply: parameter {name} is {what}, needs a plain fp32, bf16 or fp16 parameter")


def _check_modules(model: Any, blocks: set[type[nn.Module]]) -> None:
    """The blocks to be changed are transformers' own, and nothing stands between them and their callers."""
    for name, module in model.named_modules():
        kind = next((block for block in blocks if isinstance(module, block)), None)
        if kind is None:
            continue
        if type(module) is not kind:
            raise ValueError(f"apply: {name} is a {type(module).__name__}, not transformers' own {kind.__name__}")
        hooked = "_hf_hook" in module.__dict__  # accelerate's, which keeps the forward it wraps
        forward = "_old_forward" if hooked else "forward"
        if forward in module.__dict__ and not _plain(module, forward):
            raise ValueError(f"apply: {name} has a {forward} of its own, which would stay in use; remove it first")
        if kind.__name__ == "MixtralExperts":
            _check_experts(name, module)
        elif kind.__name__ == "MixtralAttention":
            _check_heads(module)


def _check_experts(name: str, module: Any) -> None:
    from transformers.activations import ACT2FN

    if not isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
        raise ValueError(f"apply: {name} has activation {module.act_fn}, needs silu; apply(model, experts=False)")
    if module.act_fn._forward_hooks or module.act_fn._forward_pre_hooks:
        raise ValueError(
            f"apply: {name}.act_fn has hooks, and fused experts never call it; apply(model, experts=False)"
        )
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(f"apply: {name} is split over ranks (expert parallel); load the model whole, or experts=False")


def _check_heads(module: Any) -> None:
    if module.head_dim > 256:
        raise ValueError(f"apply: head_dim is {module.head_dim}, needs at most 256; attention=False, rope=False")


def _plain(module: nn.Module, name: str) -> bool:
    """Whether the instance's own attribute `name` is nothing but its class's forward, bound."""
    value: Any = module.__dict__.get(name)
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward


def _was(module: nn.Module) -> dict[str, Any]:
    return module.__dict__.setdefault(_WAS, {})


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the module's class, and with it the bound forward that accelerate's hooks keep, or left behind."""
    bound = [name for name in ("forward", "_old_forward") if _plain(module, name)]
    module.__class__ = kind
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)


def _configure(model: Any, attention: str | None, experts: str | None) -> None:
    """Give the instance a config of its own, one copy for all of its modules, that selects our implementations."""
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if config is None:
            continue
        if id(config) not in copies:
            copies[id(config)] = copy = deepcopy(config)
            if attention is not None:
                copy._attn_implementation = attention
            if experts is not None:
                copy._experts_implementation = experts
        _was(module)["config"] = config
        module.__dict__["config"] = copies[id(config)]
