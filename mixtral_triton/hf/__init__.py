"""The drop-in for transformers: `apply` makes one Mixtral run on this package's operations, `revert` undoes it.

Nothing is patched: the instance's modules become instances of subclasses, and every subclass knows what it stands for.
Its config is not touched, so that nothing that is made of it runs on this package, and edits of it are the user's.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from .. import ops
from ..inputs import DTYPES
from .release import release

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")
NEEDS = (5, 7)


def apply(
    model: Model, attention: bool = True, experts: bool = True, rms_norm: bool = True, rope: bool = True
) -> Model:
    """Run this instance of transformers' Mixtral on the package's operations -> the same instance.

    attention  attention and its masks; rope: rotary embedding; rms_norm: every norm; experts: the gate's top-k and the
    experts. Applying again holds the latest choice. Parameters, their names, hooks, the config and every other instance
    stay. transformers' `set_attn_implementation` and `set_experts_implementation` select others, and ours by the name
    "mixtral_triton". `output_attentions` has plain torch's weights beside our result, for that call alone.
    For inference: `forward` works with gradients enabled, a backward pass or training mode is a ValueError. So is what
    cannot be honoured, here (a block of another class, a quantized or sharded weight, a simulated GPU) or in
    the forward (hooks on `act_fn`, continuous batching).
    """
    ours = _import_modules()
    _check_model("apply", model, ours.theirs)
    blocks = _blocks(ours.theirs, attention=attention, experts=experts, rms_norm=rms_norm, rope=rope)
    _check_weights(model)
    _check_devices(model)
    _check_modules(model, blocks, ours)
    revert(model)
    parts = ours.Parts(attention or None, experts or None, rope)
    changing = (*blocks, ours.theirs.MixtralPreTrainedModel) if blocks else ()
    for module in model.modules():
        if isinstance(module, changing):
            _become(module, ours.applied_class(type(module)))
            module.__dict__[ours.PARTS] = parts
    return model


def revert(model: Model) -> Model:
    """Undo `apply`, bit for bit -> the same instance. Nothing to undo is fine."""
    ours = _import_modules()
    _check_model("revert", model, ours.theirs)
    for module in model.modules():
        if isinstance(module, ours.Applied):
            _become(module, module.theirs)
            del module.__dict__[ours.PARTS]
    return model


def mixtral_modules(function: str, model: Any) -> Any:
    """transformers' modeling_mixtral, for a `model` that is made of it; ValueError that names `function` otherwise."""
    theirs = _import_modules().theirs
    _check_model(function, model, theirs)
    return theirs


def applied(model: nn.Module) -> bool:
    """Whether `apply` changed anything in this instance."""
    applied_class = _import_modules().Applied
    return any(isinstance(module, applied_class) for module in model.modules())


def _import_modules() -> Any:
    """The module of subclasses; ImportError that says what to install."""
    need = "{}.{}".format(*NEEDS)
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"mixtral_triton.apply needs transformers: pip install 'transformers>={need}'") from error
    if release(transformers) < NEEDS:
        found = transformers.__version__
        raise ImportError(
            f"mixtral_triton.apply needs transformers >= {need}, found {found}: pip install -U transformers"
        )
    from . import modules as hf_modules

    return hf_modules


def _blocks(theirs: Any, **parts: bool) -> tuple[type[nn.Module], ...]:
    """transformers' blocks that change, for the parts that are wanted."""
    for name, value in parts.items():
        if not isinstance(value, bool):
            raise ValueError(f"apply: argument '{name}' is {value!r}, needs True or False")
    by_part = {
        "attention": (theirs.MixtralAttention,),
        "experts": (theirs.MixtralTopKRouter, theirs.MixtralExperts),
        "rms_norm": (theirs.MixtralRMSNorm,),
        "rope": (theirs.MixtralRotaryEmbedding, theirs.MixtralAttention),
    }
    return tuple({block for part, blocks in by_part.items() if parts[part] for block in blocks})


def _check_model(function: str, model: Any, theirs: Any) -> None:
    """One of transformers' Mixtral models, whatever its head."""
    kind = theirs.MixtralPreTrainedModel
    if isinstance(model, kind):
        return
    inside = model.named_modules() if isinstance(model, nn.Module) else ()
    inner = next((name for name, module in inside if isinstance(module, kind)), None)
    hint = f"; give it the model inside, .{inner}" if inner is not None else ""
    raise ValueError(
        f"{function}: model is a {type(model).__name__}, needs transformers' MixtralForCausalLM or MixtralModel{hint}"
    )


def _check_weights(model: Any) -> None:
    """Plain parameters in a dtype that the operations know, whole on one device each."""
    told = (getattr(model, "hf_quantizer", None), getattr(model.config, "quantization_config", None))
    if getattr(model, "is_quantized", False) or any(one is not None for one in told):
        raise ValueError(
            "apply: model is quantized; load it without quantization_config (bf16, fp16 or fp32), or the folder with "
            "mixtral_triton.Mixtral.from_pretrained, which reads the quantized weights exactly"
        )
    if (getattr(model, "_tp_size", None) or 1) > 1:
        raise ValueError("apply: model has a tensor-parallel plan; load it without tp_plan, or with a device_map")
    for name, parameter in model.named_parameters():
        if type(parameter.data).__name__ == "DTensor":
            raise ValueError(
                f"apply: parameter {name} is sharded (a DTensor); load the model whole, or with a device_map"
            )
        if type(parameter) not in ops.PLAIN_TYPES or parameter.dtype not in DTYPES:
            what = f"{parameter.dtype} in a {type(parameter).__name__}"
            raise ValueError(f"apply: parameter {name} is {what}, needs a plain fp32, bf16 or fp16 parameter")


def _check_devices(model: Any) -> None:
    """The GPUs that accelerate's hooks send a split model's inputs to are there."""
    gpus = torch.cuda.device_count()
    for name, module in model.named_modules():
        hook = module.__dict__.get("_hf_hook")
        for one in getattr(hook, "hooks", (hook,)):
            place = getattr(one, "execution_device", None)
            device = torch.device("cuda", place) if isinstance(place, int) else torch.device(place or "cpu")
            if device.type == "cuda" and (device.index or 0) >= gpus:
                raise ValueError(
                    f"apply: {name or 'the model'} is to run on {device}, and this machine has {gpus} CUDA devices; "
                    "load the model with a device_map of devices that are here"
                )


def _check_modules(model: Any, blocks: tuple[type[nn.Module], ...], ours: Any) -> None:
    """The blocks to be changed are transformers' own, and nothing stands between them and their callers."""
    backbone = ours.theirs.MixtralModel
    kinds = (*blocks, backbone) if blocks else ()
    for name, module in model.named_modules():
        kind = next((kind for kind in kinds if isinstance(module, kind)), None)
        if kind is None:
            continue
        own = module.theirs if isinstance(module, ours.Applied) else type(module)
        if own is not kind and kind is not backbone:
            raise ValueError(f"apply: {name} is a {own.__name__}, not transformers' own {kind.__name__}")
        hooked = "_hf_hook" in module.__dict__  # accelerate's, which keeps the forward it wraps
        forward = "_old_forward" if hooked else "forward"
        if forward in module.__dict__ and not _plain(module, forward):
            what = name or f"the {own.__name__}"
            raise ValueError(f"apply: {what} has a {forward} of its own, which would stay in use; remove it first")
        if kind.__name__ == "MixtralExperts":
            _check_experts(name, module, ours)
        elif kind.__name__ == "MixtralAttention":
            _check_heads(module)


def _check_experts(name: str, module: Any, ours: Any) -> None:
    from transformers.activations import ACT2FN

    if not isinstance(module.act_fn, (nn.SiLU, type(ACT2FN["silu"]))):
        raise ValueError(f"apply: {name} has activation {module.act_fn}, needs silu; apply(model, experts=False)")
    ours.check_unhooked(module.act_fn, f"apply: {name}.act_fn")
    if getattr(module, "_is_expert_parallel", False):
        raise ValueError(f"apply: {name} is split over ranks (expert parallel); load the model whole, or experts=False")


def _check_heads(module: Any) -> None:
    if module.head_dim > 256:
        raise ValueError(f"apply: head_dim is {module.head_dim}, needs at most 256; attention=False, rope=False")


def _plain(module: nn.Module, name: str) -> bool:
    """Whether the instance's own attribute `name` is nothing but its class's forward, bound."""
    value: Any = module.__dict__.get(name)
    return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is type(module).forward


def _become(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the module's class, and with it the bound forward that accelerate's hooks keep, or left behind."""
    bound = [name for name in ("forward", "_old_forward") if _plain(module, name)]
    module.__class__ = kind
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)
