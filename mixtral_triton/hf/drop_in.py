"""`apply` makes one of transformers' models use this package's operations, `revert` undoes it.

Experts and attention are selected by name in a copy of the instance's configs, so that models made from the same config
stay as they are. Norms, routers and modules that rotate become instances of subclasses (replaced.py) where the class
computes what an operation does (probes.py). What is not served stays transformers' own.
"""

import copy
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import CodeType, MethodType
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from ..checkpoint.config import check_value
from ..kernels.launching.launch import INTERPRETED
from .attention import ADDED, INDICES, MAX_HEAD
from .experts import NAME, check_experts, is_experts
from .probes import tables_of
from .replaced import Replaced, kind_of, replacement

Model = TypeVar("Model", bound=nn.Module)
# An attribute of a module: by attribute its own config, the one before `apply`, and a copy of that by which edits show.
CONFIGS = "_mixtral_triton_configs"
IMPLEMENTATIONS = "_attn_implementation_internal", "_experts_implementation_internal"  # of configs


@cache
def warn_without_kernels() -> None:
    """Warn once a process where no kernel can run."""
    if not (INTERPRETED or torch.cuda.is_available()):
        text = "there is no GPU, so the operations run in plain torch; TRITON_INTERPRET=1 interprets the kernels"
        warnings.warn(f"mixtral_triton: {text}", stacklevel=3)


def apply(
    model: Model, attention: bool = True, experts: bool = True, rms_norm: bool = True, rope: bool = True
) -> Model:
    """Make this instance of one of transformers' models use the package's operations -> the same instance.

    attention: attention and its masks; experts: routers and experts; rms_norm: norms, also with 1 + weight; rope:
    rotary embedding. The last of several calls decides. A class is served where its own forward gives on random numbers
    what the operation gives, or where it declares that; the rest, and what has a forward of its own, stays
    transformers' own: `verify(model)` lists both. Parameters, their names, hooks and every other instance stay; the
    instance has configs of its own, where transformers' `set_attn_implementation` and `set_experts_implementation`
    select as ever.
    On a CPU the operations run in plain torch, or interpreted (TRITON_INTERPRET=1). Where gradients are recorded,
    attention, norms, routers and rotary embedding are transformers' own, and the experts, which have to be frozen, this
    package's with a backward pass. A tensor-parallel or expert-parallel model, or one in fp64, is a ValueError.
    """
    check_model("apply", model)
    for name, value in {"attention": attention, "experts": experts, "rms_norm": rms_norm, "rope": rope}.items():
        check_value(f"apply: argument '{name}'", value, "True or False", isinstance(value, bool))
    for fault in _faults(model):
        raise ValueError(f"apply: {fault}")
    warn_without_kernels()
    revert(model)
    kinds = {kind for x in model.modules() if "RotaryEmbedding" in type(x).__name__ for kind in tables_of(x) or ()}
    tables = kinds.pop() if rope and len(kinds) == 1 else None
    for module in model.modules():
        original: Any = type(module)
        if not is_changed(module) and (kind := kind_of(module, tables, rms_norm, experts)) is not None:
            set_class(module, replacement(original, kind))
    _select_in_copies(model, attention, experts)
    return model


def revert(model: Model) -> Model:
    """Undo `apply`, bit for bit -> the same instance. A model that is not applied stays as it is. Its configs are those
    from before, with what was edited since, but for the implementations that were selected."""
    check_model("revert", model)
    fused: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Replaced)}
    for name, module in fused.items():
        if "kind" not in vars(type(module)):  # a subclass, as of a parametrization
            got, need = f"{name or 'the model'} is a {type(module).__name__}", "needs the class that apply gave it"
            raise ValueError(f"revert: {got}, {need}: remove first what was put on it after apply")
    for module in fused.values():
        set_class(module, module.original)
    for module in model.modules():
        for name, (own, original, before) in module.__dict__.pop(CONFIGS, {}).items():
            if module.__dict__.get(name) is own:
                module.__dict__[name] = original
                for key, value in vars(own).items():  # those of configs in it are edits of their own
                    edited = not isinstance(value, PreTrainedConfig) and value != vars(before).get(key, CONFIGS)
                    if edited and key not in IMPLEMENTATIONS:
                        setattr(original, key, value)
    return model


def applied(model: nn.Module) -> bool:
    """Whether `apply` changed any module of this instance."""
    return any(isinstance(module, Replaced) or CONFIGS in vars(module) for module in model.modules())


def runs_here(model: nn.Module) -> bool:
    """Whether a model runs this package's operations, by `apply` or by name."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return applied(model) or NAME in {getattr(config, x) for config in configs for x in IMPLEMENTATIONS}


def check_model(function: str, model: Any) -> None:
    """Raise ValueError that names `function` unless `model` is one of transformers' models."""
    if isinstance(model, PreTrainedModel):
        return
    holder = model if isinstance(model, nn.Module) else getattr(model, "model", None)  # a pipeline has it
    parts = holder.named_modules() if isinstance(holder, nn.Module) else ()
    inner = next((name for name, module in parts if isinstance(module, PreTrainedModel)), None)
    path = ".".join(filter(None, ("model" if holder is not model else "", inner)))
    hint = f"; give it the model inside, .{path}" if inner is not None else ""
    raise ValueError(f"{function}: model is a {type(model).__name__}, needs transformers' PreTrainedModel{hint}")


def _faults(model: Any) -> Iterator[str]:
    """Why nothing of a model can be applied."""
    if (getattr(model, "_tp_size", None) or 1) > 1:
        yield "model has a tensor-parallel plan; load it without tp_plan, or with a device_map"
    for name, parameter in model.named_parameters():
        if "DTensor" in type(parameter).__name__:
            yield f"parameter {name} is a {type(parameter).__name__}; load the model without tp_plan"
        if parameter.dtype == torch.float64:
            yield f"parameter {name} is torch.float64, needs fp32, bf16 or fp16"
    for name, module in model.named_modules():
        if getattr(module, "_is_expert_parallel", False):
            yield f"{name} is split over ranks (expert parallel); load the model whole"


def _select_in_copies(model: nn.Module, attention: bool, experts: bool) -> None:
    """Select this package's name in the configs whose modules of experts or attention it serves all, and give all
    modules copies of their configs, which share what the configs share."""
    serves = dict[tuple[int, str], bool]()
    for module in model.modules():
        part = IMPLEMENTATIONS[1] if is_experts(module) else IMPLEMENTATIONS[0] if dispatches(type(module)) else None
        if part is not None and (experts if is_experts(module) else attention):
            served = not is_changed(module) and (serves_experts if is_experts(module) else serves_attention)(module)
            key = id(vars(module).get("config")), part
            serves[key] = served and serves.get(key, True)
    if not any(serves.values()):
        return
    memo, before = dict[int, Any](), dict[int, Any]()
    for module in model.modules():
        for name, config in [item for item in vars(module).items() if isinstance(item[1], PreTrainedConfig)]:
            own = module.__dict__[name] = copy.deepcopy(config, memo)
            module.__dict__.setdefault(CONFIGS, {})[name] = own, config, copy.deepcopy(config, before)
            for part in IMPLEMENTATIONS:
                if serves.get((id(config), part)):
                    setattr(own, part, NAME)


def serves_experts(module: nn.Module) -> bool:
    try:
        return bool(check_experts(module))
    except ValueError:
        return False


def serves_attention(module: Any) -> bool:
    """Whether `check_attention` would take a layer's attention, as far as its class and attributes say it."""
    columns, values = (getattr(module, name, getattr(module, "head_dim", 0)) for name in ("qk_head_dim", "v_head_dim"))
    constants = (text for code in codes(type(module)) for constant in code.co_consts for text in _texts(constant))
    added = {*ADDED}.difference(INDICES).intersection(constants)
    return not added and values <= columns <= MAX_HEAD and bool(getattr(module, "is_causal", True))


def _texts(constant: Any) -> tuple[Any, ...]:
    """The strings of a constant of a code, which names keywords in tuples."""
    return constant if isinstance(constant, tuple) else (constant,)


def codes(kind: type[nn.Module]) -> Iterator[CodeType]:
    """The code of a class's forward, and of what that wraps."""
    function: Any = kind.forward
    while (code := getattr(function, "__code__", None)) is not None:
        yield code
        function = getattr(function, "__wrapped__", None)


def dispatches(kind: type[nn.Module]) -> bool:
    """Whether a class's forward asks transformers for an implementation of attention."""
    return any("get_interface" in code.co_names for code in codes(kind))


def is_patched(kind: type[nn.Module]) -> bool:
    """Whether a class's forward, or what it wraps, stands in no folder of its class, this package, or transformers,
    torch and `kernels`, which have decorators."""
    if (file := getattr(sys.modules.get(kind.__module__), "__file__", None)) is None:  # a notebook's class
        return False
    packages = transformers, torch, sys.modules.get("kernels", torch)
    folders = Path(file).parent, Path(__file__).parents[1], *(Path(str(each.__file__)).parent for each in packages)
    roots = tuple(f"{folder}/" for folder in folders)
    return not all(code.co_filename.startswith(roots) for code in codes(kind))


def is_changed(module: nn.Module) -> bool:
    """Whether an instance has a forward of its own, which stays in use."""
    name = "_old_forward" if "_hf_hook" in vars(module) else "forward"  # accelerate keeps what it wraps
    return name in vars(module) and not is_own_forward(module, name)


def is_own_forward(module: nn.Module, name: str) -> bool:
    """Whether the instance's attribute `name` is the bound forward of its class."""
    return bool(module.__dict__.get(name) == MethodType(type(module).forward, module))


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the module's class, and the bound forward that hooks of accelerate keep."""
    bound = [name for name in ("forward", "_old_forward") if is_own_forward(module, name)]
    module.__class__ = kind
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)
