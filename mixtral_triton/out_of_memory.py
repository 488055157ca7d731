"""A ValueError in place of torch's, where a run finds no memory: what would fit, by the terms that loading counts."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from .arguments import free_memory, in_decimal, weight_bytes
from .kernels.offload import OffloadedWeight
from .kernels.quantized import QuantizedWeight
from .load import Placement, movable_bytes, running_bytes, table_bytes, usable_bytes

if TYPE_CHECKING:
    from .model import Mixtral


@contextmanager
def explain_out_of_memory(caller: str, model: Mixtral, batch: int, context: int, cache: torch.dtype) -> Iterator[None]:
    """Raise ValueError with what would fit where torch finds no memory for `batch` sequences of `context` tokens, whose
    cache is of the dtype `cache`."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        found = f"{batch} {'sequence' if batch == 1 else 'sequences'} of {context} tokens"
        needs = what_fits(model, batch, context, cache)
        raise ValueError(f"{caller}: no memory is left on {model.device} for {found}, needs {needs}") from error


def what_fits(model: Mixtral, batch: int, context: int, cache: torch.dtype) -> str:
    """Return the fewest experts of each layer in host memory, and the longest context, that fit by estimate.

    What runs out does not fit, whatever the estimate: the memory is taken to be less than that.
    """
    config, weights = model.config, model.named_weights()
    L, most = config.num_hidden_layers, config.num_local_experts - 1
    specs = {name: x.spec for name, x in weights.items() if isinstance(x, QuantizedWeight) and x.name is not None}
    shapes = {name: tuple(x.shape) for name, x in weights.items()}
    each, embedding = movable_bytes(config, shapes, specs, model.dtype)
    on_host = [
        x.on_host for name, x in weights.items() if isinstance(x, OffloadedWeight) and name.endswith("down_proj")
    ]
    on_host += [()] * (L - len(on_host))
    embedding *= hasattr(model.embed_tokens, "on_host")

    def need(context: int) -> int:
        running = running_bytes(config, batch, context, model.prefill_chunk, cache, model.activations)
        return table_bytes(config) + weight_bytes(shapes, specs, model.dtype) + sum(running.values())

    def freed(count: int) -> int:
        return Placement.of([range(count)] * L, each).freed_bytes

    placed, memory = Placement.of(on_host, each, embedding).freed_bytes, ""
    available = need(context) - placed - 1
    if (free := free_memory(model.device)) is not None:
        total = free + torch.cuda.memory_allocated(model.device)
        available, memory = min(available, usable_bytes(total)), f"; {in_decimal(total)} are free or held by torch"
    experts = next((n for n in range(1, most + 1) if need(context) - freed(n) <= available), None)
    longest = bisect_left(range(1, context), True, key=lambda S: need(S) - placed > available)
    options = [f"offload={experts} (experts of each layer)"] if experts and model.ranks is None else []
    options += [f"at most {longest} tokens a sequence"] if longest else []
    options += [f"at most {batch - 1} sequences"] if batch > 1 and not longest else []
    return (" or ".join(options) or "weights of fewer bits, or more memory") + memory
