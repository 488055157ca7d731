"""`apply` makes one of transformers' Mixtrals use this package's operations, `revert` undoes it.

The modules of the instance become instances of subclasses, which know the class that they replace. Models made from
its config do not use this package, as the config stays.
"""

import warnings
from collections.abc import Iterator
from functools import cache
from itertools import chain
from types import MethodType
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..checkpoint.config import check_value
from ..kernels.launching.launch import INTERPRETED
from ..kernels.operation import call
from ..kernels.operation.checks import FLOATS
from .experts import check_experts
from .modules import PARTS_ATTRIBUTE, Applied, Parts, applied_class, modeling

Model = TypeVar("Model", bound=nn.Module)


@cache
def warn_without_kernels() -> None:
    """Warn once a process where no kernel can run."""
    if not (INTERPRETED or torch.cuda.is_available()):
        text = "there is no GPU, so the operations run in plain torch; TRITON_INTERPRET=1 interprets the kernels"
        warnings.warn(f"mixtral_triton: {text}", stacklevel=3)


def apply(
    model: Model, attention: bool = True, experts: bool = True, rms_norm: bool = True, rope: bool = True
) -> Model:
    """Make this instance of transformers' Mixtral use the package's operations -> the same instance.

    attention: attention and its masks; rope: rotary embedding; rms_norm: every norm; experts: the gate's top-k and the
    experts. The last of several calls decides. Parameters, their names, hooks, the config and every other instance
    stay. transformers' `set_attn_implementation` and `set_experts_implementation` select other implementations, and
    these by the name "mixtral_triton". `output_attentions` computes the weights in torch, for that call alone.
    On a CPU the operations run in plain torch, or interpreted (TRITON_INTERPRET=1).
    Where gradients are recorded, attention, norms, router and rotary embedding are transformers' own, and the experts,
    which have to be frozen, this package's with a backward pass. A block of another class, a quantized or sharded
    weight, hooks on `act_fn` and continuous batching are ValueErrors.
    """
    check_mixtral("apply", model)
    for name, value in {"attention": attention, "experts": experts, "rms_norm": rms_norm, "rope": rope}.items():
        check_value(f"apply: argument '{name}'", value, "True or False", isinstance(value, bool))
    blocks: tuple[Any, ...] = (modeling.MixtralAttention,) if attention or rope else ()
    blocks += (modeling.MixtralTopKRouter, modeling.MixtralExperts) if experts else ()
    blocks += (modeling.MixtralRMSNorm,) if rms_norm else ()
    blocks += (modeling.MixtralRotaryEmbedding,) if rope else ()
    for fault in chain(_faults_of_weights(model), _faults_of_modules(model, blocks, attention)):
        raise ValueError(f"apply: {fault}")
    warn_without_kernels()
    revert(model)
    parts = Parts(attention or None, experts or None, rope)
    changing: tuple[Any, ...] = (*blocks, modeling.MixtralPreTrainedModel) if blocks else ()
    for module in model.modules():
        if isinstance(module, changing):
            kind: Any = type(module)
            _set_class(module, applied_class(kind))
            module.__dict__[PARTS_ATTRIBUTE] = parts
    return model


def revert(model: Model) -> Model:
    """Undo `apply`, bit for bit -> the same instance. A model that is not applied stays as it is."""
    check_mixtral("revert", model)
    fused: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Applied)}
    for name, module in fused.items():
        if type(module) is not applied_class(module.original):  # as with a parametrization
            got, need = f"{name or 'the model'} is a {type(module).__name__}", "needs the class that apply gave it"
            raise ValueError(f"revert: {got}, {need}: remove first what was put on it after apply")
    for module in fused.values():
        _set_class(module, module.original)
        del module.__dict__[PARTS_ATTRIBUTE]
    return model


def applied(model: nn.Module) -> bool:
    """Whether `apply` changed any module of this instance."""
    return any(isinstance(module, Applied) for module in model.modules())


def check_mixtral(function: str, model: Any) -> None:
    """Raise ValueError that names `function` unless `model` is one of transformers' Mixtral models."""
    base = modeling.MixtralPreTrainedModel
    if isinstance(model, base):
        return
    holder = model if isinstance(model, nn.Module) else getattr(model, "model", None)  # a pipeline has it
    parts = holder.named_modules() if isinstance(holder, nn.Module) else ()
    inner = next((name for name, module in parts if isinstance(module, base)), None)
    path = ".".join(filter(None, ("model" if holder is not model else "", inner)))
    hint = f"; give it the model inside, .{path}" if inner is not None else ""
    if isinstance(model, PreTrainedModel):
        hint = '; another family takes mixtral_triton.register() and experts_implementation="mixtral_triton"'
    need = f"transformers' MixtralForCausalLM or MixtralModel{hint}"
    raise ValueError(f"{function}: model is a {type(model).__name__}, needs {need}")


def _faults_of_weights(model: Any) -> Iterator[str]:
    """What is wrong with the parameters, which need a dtype of the operations, each whole on one device."""
    config, quantizer = getattr(model.config, "quantization_config", None), getattr(model, "hf_quantizer", None)
    if getattr(model, "is_quantized", False) or quantizer is not None or config is not None:
        plain = "load it without quantization_config (bf16, fp16 or fp32)"
        yield f"model is quantized; {plain}, or the folder with mixtral_triton.Mixtral.from_pretrained"
    if (getattr(model, "_tp_size", None) or 1) > 1:
        yield "model has a tensor-parallel plan; load it without tp_plan, or with a device_map"
    for name, parameter in model.named_parameters():
        if type(parameter) not in call.PLAIN_TYPES or parameter.dtype not in FLOATS:
            got = f"{parameter.dtype} in a {type(parameter).__name__}"
            yield f"parameter {name} is {got}, needs a plain fp32, bf16 or fp16 parameter"


def _faults_of_modules(model: Any, blocks: tuple[type[nn.Module], ...], attention: bool) -> Iterator[str]:
    """What is wrong with the modules to replace, which need transformers' class and forward."""
    backbone = modeling.MixtralModel
    for name, module in model.named_modules() if blocks else ():
        needs_attention = attention and isinstance(module, modeling.MixtralDecoderLayer)
        if needs_attention and not any(isinstance(child, modeling.MixtralAttention) for child in module.modules()):
            got = f"{name}.self_attn is a {type(module.self_attn).__name__}, which cannot read fused attention's masks"
            yield f"{got}; needs transformers' own MixtralAttention, or attention=False"
        base = next((cls for cls in (*blocks, backbone) if isinstance(module, cls)), None)
        if base is None:
            continue
        current = module.original if isinstance(module, Applied) else type(module)
        if current is not base and base is not backbone:
            yield f"{name} is a {current.__name__}, not transformers' own {base.__name__}"
        forward = "_old_forward" if "_hf_hook" in module.__dict__ else "forward"  # accelerate keeps what it wraps
        if forward in module.__dict__ and not is_own_forward(module, forward):
            yield f"{name or f'the {current.__name__}'} has a {forward} of its own, which would stay in use; remove it"
        if base is modeling.MixtralExperts:
            check_experts(module, name)
            if getattr(module, "_is_expert_parallel", False):
                yield f"{name} is split over ranks (expert parallel); load it whole, or experts=False"


def is_own_forward(module: nn.Module, name: str) -> bool:
    """Whether the instance's attribute `name` is the bound forward of its class."""
    return bool(module.__dict__.get(name) == MethodType(type(module).forward, module))


def _set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the module's class, and the bound forward that hooks of accelerate keep."""
    bound = [name for name in ("forward", "_old_forward") if is_own_forward(module, name)]
    module.__class__ = kind
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)
