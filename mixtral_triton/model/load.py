"""Load a checkpoint into a model: what is quantized, and whether the memory suffices (memory_plan.py)."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch

from ..checkpoint import tensors as checkpoint
from ..checkpoint.arguments import check_dtype, named_dtype, usable_device
from ..checkpoint.config import MixtralConfig, checkpoint_folder
from ..checkpoint.shard import UNSHARDED
from ..kernels.launching.arch import check_multiplies_fp8
from ..kernels.launching.launch import target_arch
from ..kernels.weights.fp8 import takes_fp8_activations
from ..quantize import Formats, QuantSpec, hub
from .memory_plan import MemoryRequest, movable_bytes, place, table_bytes, weight_bytes
from .model import Model
from .parallel import Ranks

M = TypeVar("M", bound=Model)


def load(
    cls: type[M],
    folder: str | os.PathLike[str],
    device: torch.device | str | None,
    dtype: Any,
    quantization: Formats,
    deterministic: bool,
    request: MemoryRequest,
    progress: Callable[[int], None] | None,
    ranks: Ranks | None,
) -> M:
    dtype = named_dtype(dtype)
    if dtype is not None:
        check_dtype("Mixtral.from_pretrained: dtype", dtype, "auto")
    if request.cache_dtype is not None:
        check_dtype("Mixtral.from_pretrained: cache_dtype", request.cache_dtype, torch.int8)
    folder = checkpoint_folder(folder)
    config = MixtralConfig.from_pretrained(folder)
    headers, shard = hub.read_headers(folder), UNSHARDED if ranks is None else ranks.shard
    shard.check(config)
    # The plan, with its checks, comes first: a broken config could ask for any number of parameters.
    plan = hub.plan_load(headers, config, shard, quantization)
    anew = (linear.name for linear in plan.linears if linear.target.parameter in plan.requantized)
    if requantized := frozenset(f"{name}.weight" for name in anew):
        text = f"{headers.scheme.name} is dequantized and quantized anew (weights={quantization!r})"
        warnings.warn(f"{folder}: {text}; `mixtral-triton perplexity` measures what that costs", stacklevel=3)
    dtype = dtype or checkpoint.DTYPES[headers.tensors[checkpoint.EMBEDDING].dtype]
    target_device = usable_device(ranks.device_type if device is None and ranks is not None else device)
    if ranks is not None and target_device.type not in (need := ranks.device_type, "meta"):
        raise ValueError(f"Mixtral.from_pretrained: device is {target_device}, needs the mesh's type, {need}")
    shapes, local_shapes = checkpoint.parameter_shapes(config), checkpoint.parameter_shapes(config, shard)
    specs = shard.specs(plan.specs, shapes, local_shapes)
    if request.activations is not None:
        check_activations(request.activations, specs, shapes, target_device)

    needed = table_bytes(config) + weight_bytes(local_shapes, specs, dtype)
    sizes = movable_bytes(config, local_shapes, specs, dtype)
    placement = place(request, config, ranks, target_device, needed, sizes)
    try:
        model = cls(config, target_device, dtype, deterministic, specs, ranks, placement)
    except torch.OutOfMemoryError as error:  # another process has taken what was free
        raise ValueError(f"{folder}: no memory is left on {target_device} for the weights: {error}") from error
    model.requantized, model.activations, model.folder = requantized, request.activations, folder
    hub.read_weights(headers, plan, config, model.named_weights(), progress or checkpoint.ignore_progress, shard)
    return model


def check_activations(
    activations: str, specs: Mapping[str, QuantSpec], shapes: Mapping[str, tuple[int, ...]], device: torch.device
) -> None:
    """Raise ValueError where no product of a layer takes activations of 8 bits, or `device` has no such products."""
    caller = f"Mixtral.from_pretrained: activations is {activations!r}"
    quantized = (name for name, spec in specs.items() if takes_fp8_activations(spec, shapes[name][-1]))
    if not any(name.startswith("layers.") for name in quantized):
        needs = "needs weights='fp8', or a checkpoint that stores them so"
        raise ValueError(f"{caller}, and no layer has fp8 weights with one scale a row: {needs}")
    if device.type == "cuda":
        check_multiplies_fp8(target_arch(device), caller)
