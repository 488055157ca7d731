"""The loaded tensors beside the files: each read once more, by its name alone, and compared.

What was quantized while it was loaded is not what is stored: each group of columns that shares a scale may be as far
from it as rounding to its format takes it.

`weights.py` fills the model. What is here shares nothing with it, so that a tensor in another's place is seen: the
names are those that transformers writes (per expert, or fused), the places those that Layer and Mixtral document. What
the codes of a quantized linear mean is asked of `quantize` once more, for one name at a time.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import MixtralConfig
from ..quantize import QuantizedWeight, hub
from ..quantize.spec import QuantSpec
from ..tools.tolerance import worst
from .report import Row

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
# Half a step of a format whose scale clips nothing, in parts of the largest value; 2 % for a scale that was rounded.
ROUNDING = {"int4": 1.02 / 14, "int8": 1.02 / 254, "fp8": 1.02 / 16}
EXPERT = re.compile(r"block_sparse_moe\.experts\.(\d+)\.w([123])\.weight")


def check_loaded(folder: Any, model: Any) -> list[Row]:
    """A row for the embedding, final norm and head, and one a layer: 0 where all is there, else the largest difference.
    Of those that were quantized while they were loaded another row: how far a group of columns is from the files, see
    `_rounded`.

    A part of a parameter that no tensor fills, or two do, is an infinite one. ValueError for a folder of another model.
    """
    holders = [_Holder(module) for module in chain((model,), model.layers)]
    for name, stored in _stored(Path(folder), model.config):
        at, place = _place(model, name)
        if tuple(place.shape) != (shape := tuple(stored.get_shape())):
            raise ValueError(f"verify: {folder} is another model's: {name} has shape {list(shape)} there")
        twice = name == "lm_head.weight" and model.lm_head is model.embed_tokens
        for ours, theirs in _pieces(place, stored):
            holders[at].compare(ours, theirs, twice)
    return [row for at, holder in enumerate(holders) for row in holder.rows(at - 1 if at else None)]


class _Holder:
    """What was found of the weights of one module, its layers apart."""

    def __init__(self, module: Any) -> None:
        self.left = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        self.left += sum(part.shape.numel() for part in module.children() if isinstance(part, QuantizedWeight))
        self.difference: float = 0.0
        self.rounded: tuple[float, float] | None = None

    def compare(self, ours: Any, theirs: Any, twice: bool) -> None:
        """A piece of a weight with what is stored; `twice`: it has been counted under another name."""
        self.left -= 0 if twice else theirs.shape.numel()
        if isinstance(ours, QuantizedWeight) and isinstance(theirs, Tensor):
            self.rounded = worst((self.rounded or (0.0, 1.0), (_rounded(ours, theirs), ROUNDING[ours.format])))
        else:
            self.difference = max(self.difference, _difference(ours, theirs))

    def rows(self, layer: int | None) -> list[Row]:
        """The second one where something was quantized while it was loaded."""
        found = [Row(layer, "weights", "as stored", float("inf") if self.left else self.difference, 0.0)]
        return found if self.rounded is None else [*found, Row(layer, "weights", "quantized", *self.rounded)]


class _Linear:
    """A quantized linear, unread, as safetensors' slices are: [:] is its weight."""

    def __init__(self, plan: hub.Plan, linear: hub.Linear) -> None:
        self.plan, self.linear = plan, linear

    def get_shape(self) -> tuple[int, ...]:
        return self.linear.target.shape

    def __getitem__(self, index: slice) -> QuantizedWeight:
        return hub.read(self.plan, self.linear)[index]


def _stored(folder: Path, config: MixtralConfig) -> Iterator[tuple[str, Any]]:
    """Every tensor of the checkpoint, unread, and its name; the several of a quantized linear as one."""
    headers = hub.read_headers(folder)
    if headers.scheme is None:
        yield from _tensors(folder)
        return
    plan = hub.plan(headers, config)
    yield from ((name, stored) for name, stored in _tensors(folder) if name in plan.dense)
    for linear in plan.linears:
        yield f"{linear.name}.weight", _Linear(plan, linear)


def _tensors(folder: Path) -> Iterator[tuple[str, Any]]:
    """A slice of its file for each, by name."""
    files = [folder / "model.safetensors"]
    if not files[0].exists():
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        files = [folder / name for name in sorted(set(index["weight_map"].values()))]
    for file in files:
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                for name in opened.keys():  # noqa: SIM118 (it is no dictionary)
                    yield name, opened.get_slice(name)
        except SafetensorError as error:
            raise ValueError(f"{file}: cannot be read again: {error}") from error


def _place(model: Any, name: str) -> tuple[int, Any]:
    """Where the tensor of this name has to stand: 0, or a layer's number + 1, and a part of a weight there."""
    found = LAYER.fullmatch(name)
    outside = {"model.embed_tokens.weight": "embed_tokens", "model.norm.weight": "norm", "lm_head.weight": "lm_head"}
    try:
        if found is None:
            return 0, getattr(model, outside[name])
        return int(found[1]) + 1, _in_layer(model.layers[int(found[1])], found[2])
    except (LookupError, RuntimeError) as error:
        raise ValueError(f"verify: the files hold {name}, and this model has no place for it") from error


def _in_layer(layer: Any, name: str) -> Any:
    """The same for the rest of the name, in a layer."""
    config = layer.config
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    inner = config.intermediate_size
    if expert := EXPERT.fullmatch(name):
        number, kind = int(expert[1]), expert[2]
        if kind == "2":
            return layer.down_proj[number]
        return layer.gate_up_proj[number][:inner] if kind == "1" else layer.gate_up_proj[number][inner:]
    return {
        "input_layernorm.weight": lambda: layer.input_layernorm,
        "post_attention_layernorm.weight": lambda: layer.post_attention_layernorm,
        "self_attn.q_proj.weight": lambda: layer.qkv_proj[:queries],
        "self_attn.k_proj.weight": lambda: layer.qkv_proj[queries : queries + keys],
        "self_attn.v_proj.weight": lambda: layer.qkv_proj[queries + keys :],
        "self_attn.o_proj.weight": lambda: layer.o_proj,
        "block_sparse_moe.gate.weight": lambda: layer.gate,
        "mlp.gate.weight": lambda: layer.gate,
        "mlp.experts.gate_up_proj": lambda: layer.gate_up_proj,
        "mlp.experts.down_proj": lambda: layer.down_proj,
    }[name]()


def _pieces(place: Any, stored: Any) -> Iterator[tuple[Any, Any]]:
    """Ours and theirs, one expert at a time where a tensor holds all of them."""
    if len(place.shape) < 3:
        yield place, stored[:]
        return
    for expert in range(len(place)):
        yield place[expert], stored[expert : expert + 1][0]


def _difference(ours: Any, theirs: Any) -> float:
    ours, theirs = (one.dequantize() if isinstance(one, QuantizedWeight) else one for one in (ours, theirs))
    theirs = theirs.to(ours.device, ours.dtype)
    return 0.0 if torch.equal(ours, theirs) else float((ours.double() - theirs.double()).abs().max())


def _rounded(ours: QuantizedWeight, theirs: Tensor) -> float:
    """Of each group of columns that loading gives a scale, whatever a mesh cuts, the root mean square of the
    difference, in parts of the largest value there: the worst group's."""
    group = QuantSpec.default_for(ours.format, theirs.shape[-1]).group
    groups = theirs.to(ours.device, torch.float32).unflatten(-1, (-1, group))
    apart = (ours.dequantize().view_as(groups) - groups).square().mean(-1).sqrt()
    worst_group = float((apart / groups.abs().amax(-1).clamp(min=1e-30)).max())
    return worst_group if worst_group == worst_group else float("inf")
