"""The work of a decode step of a model, launch by launch: what `fit` and `bench decode_step` make a floor of."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from ..config import MixtralConfig
from ..kernels.attention.op import CachedCase
from ..kernels.experts.op import ExpertCase
from ..kernels.formats import BITS
from ..kernels.linear import LinearSizes
from ..kernels.norm import EmbedSizes
from ..kernels.op import Cost
from ..kernels.quantized import QuantSpec
from ..kernels.registry import OPS
from ..kernels.router import GateSizes
from ..kernels.sort import expected_distinct_experts

Formats = tuple[str | None, str | None, str | None, str | None]  # of qkv, o, gate_up, down


def step_costs(
    config: MixtralConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    specs: Mapping[str, QuantSpec] | None = None,
    cache: str | None = None,
    on_host: Sequence[float] = (),
    distinct: float | None = None,
    distinct_on_host: float | None = None,
) -> list[Cost]:
    """Return the work of each launch of a decode step of `batch` sequences of `context` positions, the new one counted.

    specs             of the quantized parameters, by name
    cache             "int8", or None: in `dtype`
    on_host           how many experts of each layer are in host memory; (): none
    distinct          experts of a layer that the tokens select, and those of them in host memory, on average; None: as
    distinct_on_host  expected under uniform routing
    """
    specs, H, L = specs or {}, config.hidden_size, config.num_hidden_layers
    E, K, V = config.num_local_experts, config.num_experts_per_tok, config.vocab_size
    if distinct is None:
        distinct = expected_distinct_experts(batch, K / E, E)

    def format_of(name: str, columns: int) -> str | None:
        spec = specs.get(name)
        return None if spec is None else spec.format if spec.group == columns else f"{spec.format}:{spec.group}"

    @functools.cache  # layers are few of a kind
    def layer(formats: Formats, hosted: float) -> list[Cost]:
        qkv, o, gate_up, down = formats
        D, Hq, Hkv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        I = config.intermediate_size
        window = config.sliding_window or 0
        attention = CachedCase(batch, 1, Hq, Hkv, D, context, window, context - 1, fresh=True, cache=cache)
        case = ExpertCase(batch, H, I, E, K, gate_up, down, distinct=distinct)
        experts = OPS["experts_add_rms_norm"].cost(case, dtype)
        share = distinct * hosted / E if distinct_on_host is None else distinct_on_host
        host = int(share * (_stored_bytes(gate_up, 2 * I * H, dtype) + _stored_bytes(down, I * H, dtype)))
        return [
            OPS["linear"].cost(LinearSizes(batch, H, (Hq + 2 * Hkv) * D, weight=qkv), dtype),
            OPS["rope_append_attention"].cost(attention, dtype),
            OPS["linear"].cost(LinearSizes(batch, Hq * D, H, weight=o), dtype),
            OPS["rms_norm_gate_route"].cost(GateSizes(batch, H, E, K), dtype),
            replace(experts, bytes=experts.bytes - host, host_bytes=host),
        ]

    widths = {"qkv_proj": H, "o_proj": config.num_attention_heads * config.head_dim, "gate_up_proj": H}
    widths["down_proj"] = config.intermediate_size
    costs = [OPS["embed_rms_norm"].cost(EmbedSizes(batch, 1, V, H), dtype)]
    for index in range(L):
        formats = tuple(format_of(f"layers.{index}.{name}", columns) for name, columns in widths.items())
        costs += layer(formats, on_host[index] if on_host else 0)  # type: ignore[arg-type]
    return [*costs, OPS["linear"].cost(LinearSizes(batch, H, V, weight=format_of("lm_head", H)), dtype)]


def _stored_bytes(format: str | None, elements: int, dtype: torch.dtype) -> int:
    """Return the bytes of values or codes: scales stay on the device."""
    return elements * dtype.itemsize if format is None else elements * BITS[format.partition(":")[0]] // 8
