"""The modules of a transformers model that run this package's operations, and their own forwards in its place."""

import copy
import inspect
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import eager_mask
from transformers.models.mixtral import modeling_mixtral

from ..checkpoint.config import check_value
from ..hf.drop_in import codes, is_changed, is_patched, set_class
from ..hf.experts import NAME, PROJECTIONS, is_experts
from ..hf.replaced import Replaced
from .tolerance import ConvertedExperts

OWN = "transformers.", "accelerate.", "mixtral_triton."  # packages whose hooks are right


def eager_experts(module: nn.Module, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The module's own forward in x's dtype, without transformers' dispatch to an implementation."""
    same = copy.copy(module)
    vars(same).update(_parameters={}, _modules={k: v for k, v in module._modules.items() if k not in PROJECTIONS})
    vars(same).update({name: ConvertedExperts(getattr(module, name), x.dtype) for name in PROJECTIONS})
    return inspect.unwrap(type(module).forward)(same, x, ids, weights.to(x.dtype))


def eager_attention(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
    """The eager attention of the file that defines the module, whose softmax is in fp32."""
    if mask is not None:  # of `fp32_mask`
        mask = mask.to(q.dtype).clamp(min=torch.finfo(torch.float32 if q.dtype == torch.float64 else q.dtype).min)
    default = modeling_mixtral.eager_attention_forward
    function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", default)
    return function(module, q, k, v, mask, **kwargs)


def fp32_mask(*args: Any, **kwargs: Any) -> Tensor:
    return eager_mask(*args, **kwargs | {"dtype": torch.float32})


def selected_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The modules that run this package's operations, with their paths: experts and attention that dispatch to it by
    name, and those whose class `apply` replaced. ValueError for one with another forward or a hook, which all runs of
    `verify` would call."""
    modules = dict[nn.Module, str]()
    for path, module in model.named_modules():
        if type(module).__name__ == "ParamWrapper" and any(
            is_experts(x) or isinstance(x, Replaced) for x in module.modules()
        ):
            raise ValueError(
                f"verify: {path} has PEFT's target_parameters, needs them merged: model.merge_and_unload()"
            )
        replaced = isinstance(module, Replaced)
        selects = f"_{'experts' if is_experts(module) else 'attn'}_implementation"
        if getattr(getattr(module, "config", None), selects, None) != NAME and not replaced:
            continue
        kinds = [kind for kind in type(module).__mro__ if "forward" in vars(kind)]
        calls = [replaced or any("get_interface" in code.co_names for code in codes(kind)) for kind in kinds]
        patched = is_patched(kinds[0])
        if not (any(calls) or is_experts(module) or (patched and "attention" in type(module).__name__.lower())):
            continue
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        roots = [str(getattr(getattr(hook, "func", hook), "__module__", "")) for hook in hooks]
        faults = [f"the hook {x!r:.60}" for x, root in zip(hooks, roots, strict=True) if not root.startswith(OWN)]
        faults += ["a forward of its own"] * is_changed(module)
        faults += [f"the forward of {kinds[0].__name__}"] * (patched or not calls[0])
        check_value(f"verify: {path}", ", ".join(faults), "transformers' own forward, without hooks", not faults)
        modules[module] = path
    return modules


@contextmanager
def originals(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give modules that `apply` replaced their original classes."""
    kinds = {module: type(module) for module in modules if isinstance(module, Replaced)}
    try:
        for module, kind in kinds.items():
            set_class(module, kind.original)
        yield
    finally:
        for module, kind in kinds.items():
            set_class(module, kind)


def own_classes(model: nn.Module, selected: dict[nn.Module, str]) -> str:
    """The classes of a model with weights of their own, or that rotate, that are transformers' own."""
    own = {type(x).__name__ for x in model.modules() if x not in selected and (x._parameters or x._buffers)}
    return ", ".join(sorted(own))


def run_original(module: Any, args: Sequence[Tensor], dtype: torch.dtype | None = None) -> Any:
    """The forward of a replaced module's original class, in a dtype; None: as it is."""
    if dtype is None:
        return type(module).original.forward(module, *args)
    same = copy.copy(module)
    parameters = {name: weight.to(dtype) for name, weight in module._parameters.items()}
    vars(same).update(_parameters=parameters)
    return type(module).original.forward(same, *(x.to(dtype) for x in args))


@contextmanager
def short_windows(model: Any, window: int) -> Iterator[None]:
    """Shorten the windows of a model's layers and configs, so that a text of few tokens leaves them, and switch off the
    loss of the routers, which needs a mask of the new tokens alone."""
    pairs: Any = ((module, getattr(module, "config", None)) for module in model.modules())
    holders = {id(holder): holder for pair in pairs for holder in pair}
    with ExitStack() as stack:
        for holder in holders.values():
            for name, value in (("sliding_window", window), ("output_router_logits", False)):
                if (before := getattr(holder, name, None) or 0) > value:
                    stack.callback(setattr, holder, name, before)
                    setattr(holder, name, value)
        yield


@contextmanager
def in_fp64(model: nn.Module) -> Iterator[None]:
    """Convert the parameters of each module but experts to fp64 while it runs, to save memory."""
    kept = dict[nn.Parameter, tuple[nn.Module, Tensor]]()

    def parameters(module: Any) -> Iterable[nn.Parameter]:  # of an adapter all, since it reads the dtype of its parts
        return module.parameters(recurse=hasattr(module, "base_layer"))

    def enter(module: nn.Module, args: Any) -> None:
        for parameter in parameters(module):
            if parameter.is_floating_point() and parameter not in kept:
                kept[parameter] = module, parameter.data
                parameter.data = parameter.data.double()

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        for parameter in parameters(module):
            if parameter in kept and kept[parameter][0] is module:
                parameter.data = kept.pop(parameter)[1]

    with ExitStack() as stack:
        for module in model.modules():
            if any(True for _ in parameters(module)) and not is_experts(module):
                stack.enter_context(module.register_forward_pre_hook(enter))
                stack.enter_context(module.register_forward_hook(leave))
        try:
            yield
        finally:
            for parameter, (_, data) in kept.items():
                parameter.data = data
