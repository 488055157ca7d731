"""Plan memory: what a model takes of a GPU, and what of it lies in host memory instead (kernels/weights/offload.py)."""

from __future__ import annotations

import math
import warnings
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.arguments import default_dtype, is_int, usable_device
from ..checkpoint.config import PREFILL_CHUNK, MixtralConfig
from ..kernels.weights.fp8 import encoded_bytes
from ..kernels.weights.offload import OffloadedWeight, empty_on_host
from ..quantize import QUANTIZED_PARTS, QuantSpec
from .cache import cache_bytes
from .parallel import Ranks

MIB = 2**20
GRAPH_BYTES = 256 * MIB  # by estimate: a decode step's buffers, by tests/tools/test_fit.py, and as much for its kernels
MARGIN = 0.02  # of the free memory: what an allocator rounds up, and the error of the estimates
# Of each logit: in the model's dtype, in fp32, and what a draw by temperature and top_p makes of it, its sort included.
LOGIT_BYTES = 64
MEMINFO = Path("/proc/meminfo")
AUTO_CONTEXT = 4096  # tokens of one sequence, which offload="auto" leaves memory for by default
Movable = tuple[Sequence[int], int]  # bytes of an expert of each layer, and of the embedding


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, QuantSpec], dtype: torch.dtype) -> int:
    """Return the bytes of the parameters of these shapes: those in `specs` quantized, the others in `dtype`."""
    quantized = (specs[name].empty(shape, "meta").nbytes for name, shape in shapes.items() if name in specs)
    dense = (math.prod(shape) * dtype.itemsize for name, shape in shapes.items() if name not in specs)
    return sum(quantized) + sum(dense)


def in_decimal(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def free_memory(device: torch.device) -> int | None:
    """Return a CUDA device's free bytes, those that torch keeps of freed memory included; None for another device."""
    if device.type != "cuda":
        return None
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


@contextmanager
def explain_out_of_memory(caller: str, device: torch.device, batch: int, context: int) -> Iterator[None]:
    """Raise ValueError where torch finds no memory for `batch` sequences of `context` tokens."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        got = f"{batch} {'sequence' if batch == 1 else 'sequences'} of {context} tokens"
        needs = "fewer of them, weights of fewer bits or offload: `mixtral-triton fit` says what fits"
        reason = str(error).split("\n")[0]
        raise ValueError(f"{caller}: no memory is left on {device} for {got} ({reason}), needs {needs}") from error


@dataclass(frozen=True)
class Placement:
    """What lies in host memory."""

    experts: Sequence[Sequence[int]] = ()  # of each layer; () where no layer has any
    embedding: bool = False
    host_bytes: int = 0
    staging_bytes: int = 0  # of prefill's buffers, one a projection, as large as the layer with the most experts needs

    @property
    def count(self) -> int:
        return sum(map(len, self.experts))

    @property
    def freed_bytes(self) -> int:
        """Return the bytes of the device that are free then, buffers counted."""
        return self.host_bytes - self.staging_bytes

    @classmethod
    def of(cls, experts: Sequence[Sequence[int]], expert_bytes: Sequence[int], embedding: int = 0) -> Placement:
        """`expert_bytes`: of one expert of each layer; `embedding`: bytes, 0 where it stays on the device."""
        sizes = [len(of_layer) * size for of_layer, size in zip(experts, expert_bytes, strict=True)]
        return cls(experts, embedding > 0, sum(sizes) + embedding, max(sizes))

    def empty_weight(
        self, name: str, shape: tuple[int, ...], spec: QuantSpec | None, dtype: torch.dtype, device: Any
    ) -> Any:
        """Return the unset parameter `name`: an nn.Parameter, where there is a spec a QuantizedWeight, and where some
        of its experts lie in host memory an OffloadedWeight of either kind."""
        if name == "embed_tokens" and self.embedding:
            return empty_on_host(shape, dtype, usable_device(device))
        experts: Sequence[int] = ()
        if self.experts and name.endswith(QUANTIZED_PARTS["experts"]):
            experts = self.experts[int(name.split(".")[1])]
        first = "meta" if experts else device
        weight = torch.empty(shape, device=first, dtype=dtype) if spec is None else spec.empty(shape, first)
        if experts:
            return OffloadedWeight(weight, experts, device)
        return nn.Parameter(weight, requires_grad=False) if isinstance(weight, Tensor) else weight

    def describe(self, config: MixtralConfig) -> str:
        """Return how many lie in host memory."""
        total = config.num_hidden_layers * config.num_local_experts
        return f"{self.count} of {total} experts{' and the embedding' if self.embedding else ''} in host memory"


RESIDENT = Placement()


def offloaded_weights(model: nn.Module) -> Iterator[OffloadedWeight]:
    return (module for module in model.modules() if isinstance(module, OffloadedWeight))


def table_bytes(config: MixtralConfig) -> int:
    """Return the bytes of the rotary tables, fp32."""
    return 4 * config.max_position_embeddings * config.head_dim


def workspace_bytes(
    config: MixtralConfig, batch: int, context: int, chunk: int = PREFILL_CHUNK, activations: str | None = None
) -> int:
    """Return the most bytes that `generate` holds at one time while it reads prompts, in chunks of `chunk` tokens.

    A layer's experts hold their input and its norm, attention's result, the sum and its norm, the next sum and its
    norm; for each slot its row in sorted order, the inner values and the result, since a launch plan allocates all of
    these at first. Attention holds its input and its norm, queries, keys and values, those rotated, and the heads'.
    With quantized activations the sorted rows and the inner values have codes, with a scale each: the former instead.
    """
    hidden, inner, slots = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    counters = 16 + 12 * slots  # positions; routes, their weights and order
    per_slot = 2 * hidden + inner
    if activations is not None:
        per_slot -= hidden
        counters += slots * (encoded_bytes(hidden) + encoded_bytes(inner))
    attention = (3 + (config.family.norms == "row")) * heads  # a norm of all heads has a result of its own
    row = max(7 * hidden + slots * per_slot, 2 * hidden + attention) + config.num_local_experts
    row += hidden if context > chunk else 0  # the chunk before it is still there
    return batch * min(context, chunk) * (row * default_dtype(config).itemsize + counters) + 8 * batch * context


def running_bytes(
    config: MixtralConfig,
    batch: int,
    context: int,
    chunk: int = PREFILL_CHUNK,
    cache_dtype: torch.dtype | None = None,
    activations: str | None = None,
) -> dict[str, int]:
    """Return bytes beside the weights by what they hold, while `batch` sequences of `context` tokens are generated."""
    return {
        "cache": cache_bytes(config, batch, context, cache_dtype),
        "workspace": workspace_bytes(config, batch, context, chunk, activations),
        "logits": LOGIT_BYTES * batch * config.vocab_size,
        "graph": GRAPH_BYTES,
    }


def estimated_free(memory: int) -> int:
    """Return the free bytes of a GPU of so much memory, by its driver's tool, that runs this process alone.

    The driver's part: torch's total_memory beside nvidia-smi's total is 32,117 of 32,607 MiB for an RTX 5090, 40,339 of
    40,960 for an A100 40 GB, 79.15 GiB of 81,920 MiB for an A100 80 GB, 23.64 GiB of 24,564 MiB for an RTX 4090. The
    context's: reports of one with torch's kernels have 256 to 426 MiB.
    """
    return memory - min(870 * MIB, math.ceil(0.0152 * memory)) - 426 * MIB


def usable_bytes(free: int) -> int:
    """Return the bytes that may be planned for, of the free ones."""
    return free - math.ceil(free * MARGIN)


def movable_bytes(
    config: MixtralConfig, shapes: Mapping[str, tuple[int, ...]], specs: Mapping[str, QuantSpec], dtype: torch.dtype
) -> Movable:
    """Return the bytes to move: an expert of each layer, without scales and zeros; the embedding, 0 if tied."""
    expert_bytes = [0] * config.num_hidden_layers
    for name, shape in shapes.items():
        if name.endswith(QUANTIZED_PARTS["experts"]):
            size = specs[name].empty((1, *shape[1:]), "meta").data.nbytes if name in specs else 0
            expert_bytes[int(name.split(".")[1])] += size or shape[1] * shape[2] * dtype.itemsize
    return expert_bytes, 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size * dtype.itemsize


def select_experts(config: MixtralConfig, count: int) -> list[Sequence[int]]:
    """Return the experts of each layer that make `count` in the whole model: the last ones. Layers differ by at most
    one, and those with more are far apart, so that each has time to stage its experts."""
    L, E = config.num_hidden_layers, config.num_local_experts
    return [range(E - ((layer + 1) * count // L - layer * count // L), E) for layer in range(L)]


def fewest(config: MixtralConfig, sizes: Movable, needed: int, available: int) -> Placement | None:
    """Return the fewest experts of the whole model in host memory, and the embedding, with which `available` bytes
    suffice; None where no number is enough. needed: bytes where all of it is on the device."""
    L, most, excess = config.num_hidden_layers, config.num_local_experts - 1, needed - available
    if excess <= 0:
        return Placement()

    def place(count: int) -> Placement:
        return Placement.of(select_experts(config, count), *sizes)

    # One more in each layer needs larger buffers, any other one does not.
    full = bisect_left(range(most + 1), excess, key=lambda of_each: place(of_each * L).freed_bytes)
    least = max(0, (full - 1) * L + 1)
    count = bisect_left(range(full * L + 1), excess, least, key=lambda count: place(count).freed_bytes)
    return place(count) if count <= L * most else None


def available_bytes(device: torch.device) -> int | None:
    """Return the bytes that may be planned for on a CUDA device; None for another."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # makes the context, whose memory is then no longer free
    free = free_memory(device)
    return None if free is None else usable_bytes(free)


@dataclass(frozen=True)
class MemoryRequest:
    """The arguments of `from_pretrained` that decide what memory is needed, and where."""

    offload: int | str = 0
    context: int | None = None
    cache_dtype: torch.dtype | None = None
    activations: str | None = None


def place(
    request: MemoryRequest,
    config: MixtralConfig,
    ranks: Ranks | None,
    device: torch.device,
    needed: int,
    sizes: Movable,
) -> Placement:
    """Return what lies in host memory, where `needed` bytes would be on the device without offload; ValueError, before
    any allocation, where that is impossible, or the rest exceeds a CUDA device's memory."""
    offload, context = request.offload, request.context
    caller, most = "Mixtral.from_pretrained", 0 if ranks is not None else config.num_local_experts - 1
    if (offload != "auto" or ranks is not None) and (type(offload) is not int or not 0 <= offload <= most):
        need = f"0 to {most} experts of each layer, or 'auto'" if ranks is None else "0: a mesh splits the experts"
        raise ValueError(f"{caller}: offload is {offload!r}, needs {need}")
    limit = config.max_position_embeddings
    if context is None:
        context = min(AUTO_CONTEXT, limit)
    elif offload != "auto":
        got = f"context is {context!r} and offload is {offload!r}"
        raise ValueError(f"{caller}: {got}, needs offload='auto' (--offload auto) beside a context")
    elif not is_int(context, 1) or context > limit:
        raise ValueError(f"{caller}: context is {context!r}, needs 1 to {limit}, the model's positions, or None")
    available, placement = available_bytes(device), Placement()
    if offload == "auto" and available is not None:
        running = running_bytes(config, 1, context, PREFILL_CHUNK, request.cache_dtype, request.activations)
        smallest = fewest(config, sizes, needed + sum(running.values()), available)
        placement = smallest or Placement.of(select_experts(config, most * config.num_hidden_layers), *sizes)
    elif offload and offload != "auto":
        placement = Placement.of(select_experts(config, int(offload) * config.num_hidden_layers), sizes[0])
    text, host, size = placement.describe(config), host_memory(), in_decimal(placement.host_bytes)
    if host is not None and device.type != "meta" and placement.host_bytes > host:
        got = f"offload is {offload!r}, {text} take {size}"
        raise ValueError(f"{caller}: {got}, needs as much host memory: {in_decimal(host)} are available")
    if offload == "auto":
        warnings.warn(f"offload='auto': {text} ({size})", stacklevel=4)
    free, needed = free_memory(device), needed - placement.freed_bytes
    if free is not None and needed > free:
        got = f"the weights take {in_decimal(needed)}, and {device} has {in_decimal(free)} free"
        raise ValueError(f"{caller}: {got}: `mixtral-triton fit` says which formats fit")
    return placement


def host_memory() -> int | None:
    """Return the bytes of host memory that are available; None where the system does not say."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    kilobytes = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return 1024 * kilobytes[0] if kilobytes else None
