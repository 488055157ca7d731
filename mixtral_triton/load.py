"""Load a checkpoint into a model: what is quantized, what stays in host memory, and whether the memory suffices."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import weights
from .config import MixtralConfig, checkpoint_folder, parse_json_object
from .inputs import check_dtype, check_memory, free_memory, in_decimal, usable_device, weight_bytes
from .kernels.offload import ALIGNMENT
from .parallel import UNSHARDED, Ranks
from .quantize import hub, quantizers
from .quantize.spec import PARTS, QuantSpec, select_specs

if TYPE_CHECKING:
    from .model import Mixtral


def load(
    cls: type[Mixtral],
    folder: str | os.PathLike[str],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    quantized: str | Mapping[str, str] | None,
    deterministic: bool,
    offload: int | str,
    offload_by: str | os.PathLike[str] | None,
    progress: Callable[[int], None] | None,
    ranks: Ranks | None,
) -> Mixtral:
    folder = checkpoint_folder(folder)
    config = MixtralConfig.from_pretrained(folder)
    headers, shard = hub.read_headers(folder), UNSHARDED if ranks is None else ranks.shard
    shard.check(config)
    # Before the parameters are allocated: a broken config could ask for any size.
    fill: Callable[..., None]
    requantized: frozenset[str] = frozenset()
    if headers.scheme is None:
        fill = partial(weights.load, headers, weights.check(headers, config, shard), quantizer=quantizers.fill)
        specs: Mapping[str, QuantSpec] = select_specs(quantized, weights.parameter_shapes(config))
    else:
        wanted_specs = None if quantized is None else select_specs(quantized, weights.parameter_shapes(config))
        plan = hub.plan(headers, config, shard, wanted_specs)
        fill, specs = partial(hub.load, headers, plan), plan.specs
        requantized = frozenset(
            f"{each.name}.weight" for each in plan.linears if each.target.parameter in plan.requantized
        )
        if requantized:
            text = f"{headers.scheme.name} is dequantized and quantized anew (weights={quantized!r})"
            warnings.warn(f"{folder}: {text}; `verify` tells what that costs", stacklevel=3)
    if dtype is not None:
        check_dtype("Mixtral.from_pretrained", dtype)
    dtype = dtype or weights.stored_dtype(headers)
    place = usable_device(ranks.device_type if device is None and ranks is not None else device)
    if ranks is not None:
        ranks.check_device(place)
    shapes, own_shapes = weights.parameter_shapes(config), weights.parameter_shapes(config, shard)
    tables = 4 * config.max_position_embeddings * config.head_dim  # the rotary tables, fp32

    def bytes_of(quantized: Any) -> int:
        return tables + weight_bytes(
            own_shapes, shard.specs(select_specs(quantized, shapes), shapes, own_shapes), dtype
        )

    specs = shard.specs(specs, shapes, own_shapes)
    needed = tables + weight_bytes(own_shapes, specs, dtype)
    per_expert = offloaded_bytes(own_shapes, specs, dtype)
    count = check_offload(offload, config, ranks, place, needed, per_expert)
    check_memory(place, needed - count * per_expert, bytes_of if headers.scheme is None and not count else None)
    on_host = select_experts(config, count, offload_by)
    model = cls(config, place, dtype, deterministic, specs, ranks, on_host)
    model.requantized = requantized
    fill(config, model.named_weights(), progress, shard)
    return model


def offloaded_bytes(shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, QuantSpec], dtype: torch.dtype) -> int:
    """Bytes of one expert of each layer that offloading moves: its rows, without scales and zeros."""
    total = 0
    for name, shape in shapes.items():
        if name.rpartition(".")[2] in PARTS["experts"]:
            size = specs[name].empty((1, *shape[1:]), "meta").data.nbytes if name in specs else 0
            total += size or shape[1] * shape[2] * dtype.itemsize
    return total


def check_offload(
    offload: int | str, config: MixtralConfig, ranks: Ranks | None, device: torch.device, needed: int, per_expert: int
) -> int:
    """Return how many experts of each layer to offload. ValueError where that is impossible, before any allocation."""
    caller, most = f"Mixtral.from_pretrained: offload is {offload!r}", config.num_local_experts - 1
    if offload != "auto" and (type(offload) is not int or not 0 <= offload <= most):
        raise ValueError(f"{caller}, needs 0 to {most} experts of each layer, or 'auto'")
    if offload and ranks is not None:
        raise ValueError(f"{caller}, and a mesh splits the experts over GPUs: needs 0, or no mesh")
    free = free_memory(device)
    if offload == "auto":
        over = 0 if free is None else max(0, needed - free)
        count = min(most, -(-over // per_expert))
        if count == 0:
            warnings.warn("offload='auto': all experts fit the device, so none is offloaded", stacklevel=4)
    else:
        count = int(offload)
    host = host_memory()
    if count and host is not None and device.type != "meta" and count * per_expert > host:
        fit = host // per_expert
        raise ValueError(
            f"{caller}: {count} experts of each layer take {in_decimal(count * per_expert)} of host memory, and "
            f"{in_decimal(host)} are available: {f'offload={fit} would do' if fit else 'not even one fits'}"
        )
    if count and per_expert // config.num_hidden_layers % ALIGNMENT:
        raise ValueError(f"{caller}: the rows of an expert are no multiple of {ALIGNMENT} bytes, needs 0")
    return count


def host_memory() -> int | None:
    """Bytes of host memory that can be pinned; None where the system does not say. WSL pins at most half of it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    available = sizes.get("MemAvailable")
    if available is None or "microsoft" not in os.uname().release.lower():
        return available
    return min(available, sizes["MemTotal"] // 2)


def select_experts(config: MixtralConfig, count: int, counts: str | os.PathLike[str] | None) -> Sequence[Sequence[int]]:
    """Return the experts of each layer that stay in host memory: the last, or the least used by the file `counts`."""
    L, E = config.num_hidden_layers, config.num_local_experts
    if counts is None:
        return [range(E - count, E)] * L if count else ()
    path = Path(counts)
    used: Any = parse_json_object(path.read_bytes(), str(path)).get("counts")
    right = (
        isinstance(used, list) and len(used) == L and all(isinstance(layer, list) and len(layer) == E for layer in used)
    )
    if not right or not all(type(number) is int for layer in used for number in layer):
        raise ValueError(
            f"{path}: counts needs {L} lists of {E} integers: it is another model's, or `trace` did not write it"
        )
    return [sorted(sorted(range(E), key=layer.__getitem__)[:count]) for layer in used] if count else ()
