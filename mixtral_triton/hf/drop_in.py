"""`apply` makes one of transformers' models use this package's operations, `revert` undoes it.

Experts and attention are selected by name in a copy of the instance's configs, so that models made from the same config
stay as they are. Norms, routers and modules that rotate become instances of subclasses (replaced.py) where the class
computes what an operation does (probes.py). What is not served stays transformers' own.
"""

import copy
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import CodeType, MethodType
from typing import Any, NamedTuple, TypeVar

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
CONFIGS = "_mixtral_triton_configs"  # attribute of a module: its own configs by their attributes, as OwnConfigs
IMPLEMENTATIONS = {"attention": "_attn_implementation_internal", "experts": "_experts_implementation_internal"}
MISSING = object()


class Parts(NamedTuple):
    attention: bool
    experts: bool
    rms_norm: bool
    rope: bool


@dataclass
class OwnConfig:
    """A config before `apply`, and a copy of its values then, by which `revert` knows what was edited since."""

    original: Any
    values: Any


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
    rotary embedding. The last of several calls decides. A class is served where its own forward gives on random numbers what
    the operation gives, or declares it; the rest stays transformers' own, and so does what has a forward of its own:
    `verify(model)` lists both. Parameters, their names, hooks and every other instance stay; the instance has configs
    of its own, where transformers' `set_attn_implementation` and `set_experts_implementation` select as ever.
    On a CPU the operations run in plain torch, or interpreted (TRITON_INTERPRET=1). Where gradients are recorded,
    attention, norms, routers and rotary embedding are transformers' own, and the experts, which have to be frozen, this
    package's with a backward pass. A tensor-parallel or expert-parallel model, or one in fp64, is a ValueError.
    """
    check_model("apply", model)
    parts = Parts(attention, experts, rms_norm, rope)
    for name, value in parts._asdict().items():
        check_value(f"apply: argument '{name}'", value, "True or False", isinstance(value, bool))
    for fault in _faults(model):
        raise ValueError(f"apply: {fault}")
    warn_without_kernels()
    revert(model)
    selected = select_configs(model, parts)
    tables = rotary_tables(model) if rope else None
    for module in model.modules():
        original: Any = type(module)
        if not is_changed(module) and (kind := kind_of(module, tables, parts)) is not None:
            set_class(module, replacement(original, kind))
    _copy_configs(model, selected)
    return model


def revert(model: Model) -> Model:
    """Undo `apply`, bit for bit -> the same instance. A model that is not applied stays as it is. Its configs are those
    from before, with what was edited since, but for the implementations that were selected."""
    check_model("revert", model)
    fused: dict[str, Any] = {name: module for name, module in model.named_modules() if isinstance(module, Replaced)}
    for name, module in fused.items():
        if type(module) is not replacement(module.original, module.kind):  # as with a parametrization
            got, need = f"{name or 'the model'} is a {type(module).__name__}", "needs the class that apply gave it"
            raise ValueError(f"revert: {got}, {need}: remove first what was put on it after apply")
    for module in fused.values():
        set_class(module, module.original)
    for module in model.modules():
        for name, (config, own) in module.__dict__.pop(CONFIGS, {}).items():
            if module.__dict__.get(name) is config:
                module.__dict__[name] = own.original
                _keep_edits(config, own)
    return model


def applied(model: nn.Module) -> bool:
    """Whether `apply` changed any module of this instance."""
    return any(isinstance(module, Replaced) or CONFIGS in vars(module) for module in model.modules())


def runs_here(model: nn.Module) -> bool:
    """Whether a model runs this package's operations, by `apply` or by name."""
    configs = [part.config for part in model.modules() if isinstance(part, PreTrainedModel)]
    return applied(model) or NAME in {getattr(config, x) for config in configs for x in IMPLEMENTATIONS.values()}


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


def select_configs(model: nn.Module, parts: Parts) -> dict[str, list[Any]]:
    """The configs, by part, in which this package's name is to be selected: those whose modules it serves all."""
    served, refused = {part: list[Any]() for part in IMPLEMENTATIONS}, {part: list[Any]() for part in IMPLEMENTATIONS}
    for module in model.modules():
        part = "experts" if is_experts(module) else "attention" if dispatches(type(module)) else None
        if part is None or not isinstance(config := vars(module).get("config"), PreTrainedConfig):
            continue
        fault = fault_of_experts(module) if part == "experts" else fault_of_attention(module)
        (served if fault is None and not is_changed(module) else refused)[part].append(config)
    refused_ids = {part: {*map(id, configs)} for part, configs in refused.items()}
    return {
        part: [config for config in configs if getattr(parts, part) and id(config) not in refused_ids[part]]
        for part, configs in served.items()
    }


def fault_of_experts(module: nn.Module) -> str | None:
    try:
        check_experts(module)
    except ValueError as error:
        return str(error)
    return None


def fault_of_attention(module: Any) -> str | None:
    """What `check_attention` would refuse of a layer's attention, as far as its class and attributes say it."""
    constants = {text for code in codes(type(module)) for text in _texts(code.co_consts)}
    faults = [what for name, what in ADDED.items() if name in constants and name not in INDICES]
    columns, values = (getattr(module, names[0], getattr(module, names[1], 0)) for names in HEADS)
    if max(columns, values) > MAX_HEAD or values > (columns or values):
        faults.append(f"heads of {columns} and values of {values} columns")
    if not getattr(module, "is_causal", True):
        faults.append("attention that is not causal")
    return ", ".join(faults) or None


HEADS = ("qk_head_dim", "head_dim"), ("v_head_dim", "head_dim")


def _texts(constants: tuple[Any, ...]) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, tuple):
            yield from _texts(constant)
        elif isinstance(constant, str):
            yield constant


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
    """Whether a class's forward, or what it wraps, stands in no folder of its class, transformers, torch or this
    package."""
    if (file := getattr(sys.modules.get(kind.__module__), "__file__", None)) is None:  # a notebook's class
        return False
    files = file, transformers.__file__, torch.__file__  # torch has decorators, as no_grad
    folders = *(Path(each).parent for each in files), Path(__file__).parents[1]
    roots = tuple(f"{folder}/" for folder in folders)
    return not all(code.co_filename.startswith(roots) for code in codes(kind))


def is_changed(module: nn.Module) -> bool:
    """Whether an instance has a forward of its own, which stays in use."""
    name = "_old_forward" if "_hf_hook" in vars(module) else "forward"  # accelerate keeps what it wraps
    return name in vars(module) and not is_own_forward(module, name)


def rotary_tables(model: nn.Module) -> str | None:
    """How all rotary embeddings of a model hold their angles; None: none has, or they differ."""
    modules = [module for module in model.modules() if "RotaryEmbedding" in type(module).__name__]
    kinds = {tables_of(module) for module in modules} - {None}
    return kinds.pop() if len(kinds) == 1 else None


def _copy_configs(model: nn.Module, selected: dict[str, list[Any]]) -> None:
    """Give each module copies of its configs, which share what the configs share, with this package's name selected."""
    memo, before = dict[int, Any](), dict[int, Any]()
    own = dict[int, OwnConfig]()
    for module in model.modules() if any(selected.values()) else ():
        found = {name: x for name, x in vars(module).items() if isinstance(x, PreTrainedConfig)}
        for name, config in found.items():
            if id(config) not in own:
                own[id(config)] = OwnConfig(config, copy.deepcopy(config, before))
            module.__dict__[name] = copy.deepcopy(config, memo)
            module.__dict__.setdefault(CONFIGS, {})[name] = module.__dict__[name], own[id(config)]
    for part, configs in selected.items():
        for config in configs:
            setattr(memo[id(config)], IMPLEMENTATIONS[part], NAME)


def _keep_edits(config: Any, own: OwnConfig) -> None:
    """Give the config from before `apply` what was edited in its copy."""
    for name, value in vars(config).items():
        edited = not isinstance(value, PreTrainedConfig) and value != vars(own.values).get(name, MISSING)
        if edited and name not in IMPLEMENTATIONS.values():
            setattr(own.original, name, value)


def is_own_forward(module: nn.Module, name: str) -> bool:
    """Whether the instance's attribute `name` is the bound forward of its class."""
    return bool(module.__dict__.get(name) == MethodType(type(module).forward, module))


def set_class(module: nn.Module, kind: type[nn.Module]) -> None:
    """Change the module's class, and the bound forward that hooks of accelerate keep."""
    bound = [name for name in ("forward", "_old_forward") if is_own_forward(module, name)]
    module.__class__ = kind
    for name in bound:
        module.__dict__[name] = MethodType(kind.forward, module)
