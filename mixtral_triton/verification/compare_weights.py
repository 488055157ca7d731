"""The loaded weights against the files, without the loader's tables of names and places."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..model.mixtral import Mixtral
from ..quantize import QuantizedWeight, QuantSpec
from .probe import Step
from .report import ROUNDED, Row, worst_rows
from .stored_tensors import LAYER, Source, config_row, linear_of_expert
from .tolerance import largest

EXPERT = re.compile(r"\.experts\.(\d+)\.\w+\.weight")


def check_weights(model: Mixtral, folder: Any, step: Step) -> list[Row]:
    """The rows of all weights, without a folder whether they are finite."""
    layers = [None, *range(len(model.layers))]
    if folder is None:
        return [_finite_row(model, index) for index in layers]
    source = Source(folder)
    if extra := source.layers.keys() - layers:
        raise ValueError(f"verify: {source.folder} is another model's: it has a layer {extra.pop()}")
    rows = [config_row(source, model)]
    for index in layers:
        rows += [_finite_row(model, index), *_compare_layer(source, model, index)]
        if index is not None:
            step()
    return rows


def _weights(model: Mixtral, index: int | None) -> dict[str, Any]:
    """The weights of a layer (None: outside the layers) by name. A tied head is left out."""
    if index is None:
        weights = {name: getattr(model, name) for name in ("embed_tokens", "norm")}
        return weights if model.lm_head is model.embed_tokens else {**weights, "lm_head": model.lm_head}
    layer = model.layers[index]
    quantized = {name: module for name, module in layer.named_modules() if isinstance(module, QuantizedWeight)}
    return dict(layer.named_parameters()) | quantized


def _finite_row(model: Mixtral, index: int | None) -> Row:
    """The row of a layer, or None: whether weights are finite, which a text does not show of tokens that it lacks."""
    weights = _weights(model, index).values()
    finite = (_dense(weight[expert]).isfinite().all() for weight in weights for expert in _experts(weight))
    return Row.exact(index, "weights", "finite", all(finite))


def _experts(weight: Any) -> Iterable[Any]:
    """Indices of the experts of a weight [E,N,K], which are read one at a time to save memory; of any other, one."""
    return range(len(weight)) if len(weight.shape) == 3 else (...,)


def _dense(weight: Any) -> Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedWeight) else weight  # type: ignore[no-any-return]


def _compare_layer(source: Source, model: Mixtral, index: int | None) -> list[Row]:
    """The rows of one layer, or of None, against the files. A part that no tensor or more than one fills is an infinite
    difference. ValueError for another model's folder."""
    missing, rows = sum(weight.shape.numel() for weight in _weights(model, index).values()), list[Row]()
    for name, files in source.layers[index].items():
        weight, tied = locate_weight(model, name), name == "lm_head.weight" and model.lm_head is model.embed_tokens
        missing -= 0 if tied else weight.shape.numel()  # a tied head may be stored, too
        for expert in _experts(weight):
            loaded, from_file = weight[expert], source.read(files, weight.device, expert)
            shape = list(from_file.shape) if expert is ... else files[name].get_slice(name).get_shape()
            if list(weight.shape) != shape:
                raise ValueError(f"verify: {source.folder} is another model's: {name} has shape {shape} there")
            if isinstance(loaded, QuantizedWeight) and (len(files) == 1 or name in model.requantized):
                result = "quantized", _rounding_error(loaded, from_file), loaded.kind.scale_error
            else:
                loaded = _dense(loaded)
                rounded = torch.promote_types(loaded.dtype, from_file.dtype) != loaded.dtype
                from_file = from_file.to(loaded.device, loaded.dtype)
                error = 0.0 if torch.equal(loaded, from_file) else largest(loaded.double() - from_file.double())
                result = ROUNDED if rounded else "as stored", error, 0.0
            rows.append(Row(index, "weights", *result))
    return worst_rows([Row.exact(index, "weights", "as stored", missing == 0), *rows])


def locate_weight(model: Any, name: str) -> Any:
    """Return the weight, or the part of one, that the tensor of this name fills."""
    layer_match, parameter = LAYER.match(name), name.removesuffix(".weight").rpartition(".")[2]
    try:
        if layer_match is None:
            return getattr(model, parameter)
        layer, D = model.layers[int(layer_match[1])], model.config.head_dim
        if expert := EXPERT.search(name):
            return linear_of_expert(layer, int(expert[1]), parameter)
        queries, keys = model.config.num_attention_heads * D, model.config.num_key_value_heads * D
        rows = {"q_proj": slice(0, queries), "k_proj": slice(queries, queries + keys)}
        rows["v_proj"] = slice(queries + keys, None)
        return layer.qkv_proj[rows[parameter]] if parameter in rows else getattr(layer, parameter)
    except (AttributeError, LookupError, RuntimeError) as error:
        raise ValueError(f"verify: the files hold {name}, and this model has no place for it") from error


def _rounding_error(loaded: QuantizedWeight, from_file: Tensor) -> float:
    """The RMS error, beyond that of the nearest codes at the scale that clips nothing, relative to the largest value,
    of the worst group of columns that loading gives one scale."""
    group, top = QuantSpec.default_for(loaded.format, from_file.shape[-1]).group, loaded.kind.largest
    groups = from_file.to(loaded.device, torch.float32).unflatten(-1, (-1, group))
    unit = (groups.abs().amax(-1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    groups = groups / unit
    floats = loaded.kind.float_dtype
    nearest = groups.round() if floats is None else groups.to(floats).float()
    error = (loaded.dequantize().view_as(groups) / unit - groups).square().mean(-1).sqrt()
    return largest((error - (nearest - groups).square().mean(-1).sqrt()).clamp(min=0)) / top
