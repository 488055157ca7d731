"""What `save_pretrained` writes of quantized experts: a compressed-tensors checkpoint with one tensor an expert.

transformers' own conversions give the names: they split a tensor of row numbers as they split dense experts.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion

from ..checkpoint.config import check_value
from ..kernels.weights.quantized import QuantizedWeight
from ..quantize.write import Kind, config_group, kind_of, pack_linear, quantization_config
from .experts import PROJECTIONS, is_experts


def compressed_state(model: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a state dict for transformers to rename and write, and the `quantization_config` of these files.

    ValueError that names a module whose family has no tensor an expert in its files, or that is offloaded.
    """
    weights = {
        f"{path}.{key}": getattr(module, key)
        for path, module in model.named_modules()
        for key in (PROJECTIONS if is_experts(module) else ())
    }
    weights = {name: weight for name, weight in weights.items() if isinstance(weight, QuantizedWeight)}
    inside = tuple(f"{name}." for name in weights)
    state = {name: x for name, x in model.state_dict().items() if not name.startswith(inside)}
    embeddings = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Embedding)}
    dense = {name: x.to("meta") for name, x in state.items() if x.dim() > 1 and name not in embeddings}
    stored = revert_weight_conversion(model, dense)
    files = {name for name, x in stored.items() if x.dim() == 2}
    # transformers' reader looks a linear up by its module's name in the model, others by its tensor's in the files.
    modules = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    names, pack = defaultdict[Kind, list[str]](list), lru_cache(maxsize=1)(pack_linear)  # once for all its tensors
    for name, weight in weights.items():
        check_value(f"save_pretrained: device of {name}", str(weight.device), "memory", weight.device.type != "meta")
        linears = {linear: weight[expert][rows] for linear, expert, rows in _linears(model, name, weight)}
        kind, shapes = kind_of(weight, linears.values()), dict[Any, dict[str, Tensor]]()
        for linear, part in linears.items():
            if part.shape not in shapes:
                shapes[part.shape] = pack_linear(part, kind)
            tensors = _pack_later(partial(pack, part, kind), shapes[part.shape])
            state |= {f"{linear}.{suffix}": x for suffix, x in tensors.items()}
        names[kind] += revert_weight_conversion(model, {f"{linear}.weight": torch.empty(0) for linear in linears})
    groups = [config_group(kind, _targets(names, kind)) for kind in names]
    dense_linears = {name.removesuffix(".weight") for name in files | modules if name.endswith(".weight")}
    return state, quantization_config(groups, sorted({"lm_head", *dense_linears}))


def _pack_later(pack: Callable[[], dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors that `pack` returns, like those of another linear of this shape. Matrices are packed by their
    `contiguous`, which transformers calls while it writes a shard; until then they take no memory."""

    def later(name: str, x: Tensor) -> Any:
        if x.dim() == 1:  # the linear's shape
            return x.clone()
        if min(x.shape) == 1:
            return pack()[name]
        tensor: Any = torch.empty_like(x.t(), memory_format=torch.contiguous_format).t()  # which cannot be written
        tensor.contiguous = lambda: pack()[name]
        return tensor

    return {name: later(name, x) for name, x in like.items()}


def _linears(model: Any, name: str, weight: QuantizedWeight) -> Iterable[tuple[str, int, slice]]:
    """Return the linears of experts by their names before transformers renames modules, with expert and rows."""
    conversions = getattr(model, "_weight_conversions", None)
    conversions = get_model_conversion_mapping(model, add_legacy=False) if conversions is None else conversions
    converters: Any = SimpleNamespace(
        config=model.config, _weight_conversions=[x for x in conversions if isinstance(x, WeightConverter)]
    )
    E, N, _ = weight.shape
    for linear, rows in revert_weight_conversion(converters, {name: torch.arange(E * N).view(E, N, 1)}).items():
        need = f"a tensor an expert, which {model.config.model_type} has not"
        check_value(f"save_pretrained: {name} in files", linear, need, linear != name)
        expert, start = divmod(int(rows.flatten()[0]), N)
        yield linear.removesuffix(".weight"), expert, slice(start, start + rows.numel())


def _targets(names: dict[Kind, list[str]], kind: Kind) -> list[str]:
    """Return patterns of the linears of one kind: any expert's, of any layer where other kinds have other names."""

    def patterns(kind: Kind, numbers: str) -> set[str]:
        return {re.sub(numbers, r"\\.\\d+", re.escape(name.removesuffix(".weight"))) for name in names[kind]}

    if len(names) == 1:
        return ["Linear"]
    any_layer, others = r"\\\.\d+(?=\\\.)", set[str]()
    for other in names.keys() - {kind}:
        others |= patterns(other, any_layer)
    own = patterns(kind, any_layer)
    return ["re:" + pattern for pattern in sorted(patterns(kind, r"(?<=experts)\\\.\d+") if own & others else own)]
