"""Load a checkpoint into a model: what is quantized, what stays in host memory, and whether the memory suffices."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from . import quantize, weights
from .cache import cache_bytes
from .config import MixtralConfig, checkpoint_folder, read_json_object
from .generate import PREFILL_CHUNK
from .inputs import check_dtype, check_memory, default_dtype, free_memory, in_decimal, usable_device, weight_bytes
from .kernels.offload import ALIGNMENT
from .parallel import UNSHARDED, Ranks
from .quantize import QUANTIZED_PARTS, QuantSpec, hub, select_specs

if TYPE_CHECKING:
    from .model import Mixtral

# An estimate, not a count: what the driver keeps of the total that its tool prints, a CUDA context with the kernels of
# torch and Triton, a library's workspace for matrix products, the graph of a decode step and that step's own buffers.
OVERHEAD = 5 * 2**28
TIGHT = 0.02  # of the memory: the error of the estimate
# Of each logit: in the model's dtype, in fp32, and what a draw by temperature and top_p makes of it, its sort included.
LOGIT_BYTES = 64
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
AUTO_CONTEXT = 4096  # tokens of one sequence, which offload="auto" leaves memory for


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
    # The check and the plan come first: a broken config could ask for any number of parameters.
    fill: Callable[..., None]
    requantized: frozenset[str] = frozenset()
    if headers.scheme is None:
        fill = partial(weights.load, headers, weights.check(headers, config, shard), quantizer=quantize.fill)
        specs: Mapping[str, QuantSpec] = select_specs(quantized, weights.parameter_shapes(config))
    else:
        plan = hub.plan(headers, config, shard, quantized)
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
    target_device = usable_device(ranks.device_type if device is None and ranks is not None else device)
    if ranks is not None:
        ranks.check_device(target_device)
    shapes, own_shapes = weights.parameter_shapes(config), weights.parameter_shapes(config, shard)
    specs = shard.specs(specs, shapes, own_shapes)

    def bytes_of(specs: Mapping[str, QuantSpec]) -> int:
        return table_bytes(config) + weight_bytes(own_shapes, specs, dtype)

    def bytes_if(quantized: Any) -> int:
        return bytes_of(shard.specs(select_specs(quantized, shapes), shapes, own_shapes))

    needed = bytes_of(specs)
    per_expert = offloaded_bytes(own_shapes, specs, dtype)
    count = check_offload(offload, config, ranks, target_device, needed, per_expert)
    needed -= count * (per_expert - staging_bytes(config, per_expert))
    check_memory(target_device, needed, bytes_if if headers.scheme is None and not count else None)
    on_host = select_experts(config, count, offload_by)
    model = cls(config, target_device, dtype, deterministic, specs, ranks, on_host)
    model.requantized = requantized
    fill(config, model.named_weights(), progress, shard)
    return model


def table_bytes(config: MixtralConfig) -> int:
    """Bytes of the rotary tables, fp32."""
    return 4 * config.max_position_embeddings * config.head_dim


def workspace_bytes(config: MixtralConfig, batch: int, context: int) -> int:
    """The most that `generate` holds at one time while it reads prompts, in chunks of PREFILL_CHUNK tokens.

    A layer's experts hold their input and its norm, attention's result, the sum and its norm, the next sum and its
    norm; for each slot its row in sorted order, the experts' inner values and result: a cached launch plan allocates
    all of these before its first launch. Attention holds its input and its norm, queries, keys and values, those
    rotated, and the heads' result.
    """
    hidden, inner, slots = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    row = max(7 * hidden + slots * (2 * hidden + inner), 2 * hidden + 3 * heads) + config.num_local_experts
    row += hidden if context > PREFILL_CHUNK else 0  # the chunk before it is still there
    counters = 16 + 12 * slots  # positions; routes, their weights and order
    rows = batch * min(context, PREFILL_CHUNK)
    return rows * (row * default_dtype(config).itemsize + counters) + 8 * batch * context


def running_bytes(
    config: MixtralConfig, batch: int, context: int, cache_dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Bytes beside the weights by what they hold, while `batch` sequences of `context` tokens are generated."""
    return {
        "cache": cache_bytes(config, batch, context, cache_dtype),
        "workspace": workspace_bytes(config, batch, context),
        "logits": LOGIT_BYTES * batch * config.vocab_size,
    }


def usable_bytes(memory: int) -> int:
    """Bytes that may be planned for, of all memory of a GPU."""
    return memory - math.ceil(memory * TIGHT)


def offloaded_bytes(shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, QuantSpec], dtype: torch.dtype) -> int:
    """Bytes of one expert of each layer that offloading moves: its rows, without scales and zeros."""
    total = 0
    for name, shape in shapes.items():
        if name.rpartition(".")[2] in QUANTIZED_PARTS["experts"]:
            size = specs[name].empty((1, *shape[1:]), "meta").data.nbytes if name in specs else 0
            total += size or shape[1] * shape[2] * dtype.itemsize
    return total


def staging_bytes(config: MixtralConfig, per_expert: int) -> int:
    """Bytes of prefill's two buffers for one offloaded expert of each layer, of `per_expert` bytes in all."""
    return 2 * per_expert // config.num_hidden_layers


def experts_to_offload(config: MixtralConfig, needed: int, room: int, per_expert: int) -> int:
    """Return the fewest experts of each layer with which `room` bytes suffice where `needed` are; may be too many."""
    gained = per_expert - staging_bytes(config, per_expert)
    return max(0, -(-(needed - room) // max(1, gained)))


def room_for_model(device: torch.device) -> int | None:
    """Bytes that `fit` counts on for a model on a CUDA device, at most those that are free; None for another device."""
    free = free_memory(device)
    if free is None:
        return None
    return min(free, usable_bytes(torch.cuda.get_device_properties(device).total_memory) - OVERHEAD)


def check_offload(
    offload: int | str, config: MixtralConfig, ranks: Ranks | None, device: torch.device, needed: int, per_expert: int
) -> int:
    """Return how many experts of each layer to offload. ValueError where that is impossible, before any allocation."""
    caller, most = f"Mixtral.from_pretrained: offload is {offload!r}", config.num_local_experts - 1
    if offload != "auto" and (type(offload) is not int or not 0 <= offload <= most):
        raise ValueError(f"{caller}, needs 0 to {most} experts of each layer, or 'auto'")
    if offload and ranks is not None:
        raise ValueError(f"{caller}, and a mesh splits the experts over GPUs: needs 0, or no mesh")
    if offload == "auto":
        context, room = min(AUTO_CONTEXT, config.max_position_embeddings), room_for_model(device)
        needed += sum(running_bytes(config, 1, context).values())
        count = 0 if room is None else min(most, experts_to_offload(config, needed, room, per_expert))
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
    """Bytes of host memory that can be pinned, those that control groups, as of a container, still allow; None where
    the system does not say. WSL pins at most half of it."""
    try:
        lines = (PROC / "meminfo").read_text().splitlines()
    except OSError:
        return None
    sizes = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    available = sizes.get("MemAvailable")
    if available is not None and "microsoft" in os.uname().release.lower():
        available = min(available, sizes["MemTotal"] // 2)
    with suppress(OSError):
        available = available and min([available, *_left_in_groups()])
    return available


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that each limited control group of this process, of version 1 or 2, has left."""
    names = {"memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"), "": ("memory.max", "memory.current")}
    for line in (PROC / "self" / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        folder = CGROUPS / controllers / path.lstrip("/")
        for each in (folder, *folder.parents):  # a container may not see the folders of its path
            with suppress(OSError, ValueError, KeyError):  # "max" is no limit
                limit, used = (int((each / name).read_text()) for name in names[controllers])
                yield max(0, limit - used)


def select_experts(config: MixtralConfig, count: int, counts: str | os.PathLike[str] | None) -> Sequence[Sequence[int]]:
    """Return the experts of each layer that stay in host memory: the last, or the least used by the file `counts`."""
    L, E = config.num_hidden_layers, config.num_local_experts
    if counts is None:
        return [range(E - count, E)] * L if count else ()
    path = Path(counts)
    used: Any = read_json_object(path).get("counts")
    layers = used if isinstance(used, list) else []
    right = len(layers) == L and all(isinstance(layer, list) and len(layer) == E for layer in layers)
    if not right or not all(type(number) is int for layer in layers for number in layer):
        needs = f"{L} lists of {E} integers"
        raise ValueError(f"{path}: counts needs {needs}: it is another model's, or `trace` did not write it")
    return [sorted(sorted(range(E), key=layer.__getitem__)[:count]) for layer in layers] if count else ()
