"""What a model takes of a GPU's memory: weights by format, cache, workspace, logits; what fits, and how long a text.

B sequences, S tokens each, N rows of a chunk, H hidden, I intermediate, E experts, K experts per token, Hq query heads,
Hkv key/value heads, D head size, V vocabulary, L layers

All bytes but OVERHEAD are counted, by the shapes that the code allocates. Only a config is read, never weights.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from rich.filesize import decimal

from ..config import MixtralConfig
from ..generate import PREFILL_CHUNK
from ..parallel import UNSHARDED, Shard
from ..quantize.spec import PARTS, QuantSpec, select_specs
from ..weights import parameter_shapes
from .gpus import GPU, GPUS

KNOWN = {
    # mistralai/Mixtral-8x7B-v0.1 and mistralai/Mixtral-8x22B-Instruct-v0.1, by their config.json
    "mixtral-8x7b": MixtralConfig(rope_theta=1e6, dtype="bfloat16"),
    "mixtral-8x22b": MixtralConfig(
        vocab_size=32768,
        hidden_size=6144,
        intermediate_size=16384,
        num_hidden_layers=56,
        num_attention_heads=48,
        max_position_embeddings=65536,
        rope_theta=1e6,
        dtype="bfloat16",
    ),
}
# An estimate, not a count: what the driver keeps of the total that its tool prints, a CUDA context with the kernels of
# torch and Triton, a library's workspace for matrix products, the graph of a decode step and that step's own buffers.
OVERHEAD = 5 * 2**28
MOST_LAYERS = 10_000  # a config that asks for more is broken, and would take for ever to add up
TIGHT = 0.02  # of the memory: what the estimate may be wrong by
MOST_GPUS = 16
# Of each logit: in the model's dtype, in fp32, and what a draw by temperature and top_p makes of it, its sort included.
LOGIT_BYTES = 64

Weights = str | Mapping[str, str] | None  # as `Mixtral.from_pretrained` takes them
QuantSpecs = Mapping[str, QuantSpec]  # of the parameters that are quantized, by name
STORED = "as stored"
FORMATS: dict[str, Weights] = {
    STORED: None,
    "fp8": "fp8",
    "int8": "int8",
    "int4": "int4",
    "int4, linear int8": {"experts": "int4", "linear": "int8"},
}


def format_options(config: MixtralConfig, shard: Shard = UNSHARDED) -> dict[str, QuantSpecs]:
    """The forms that each of FORMATS has for a model; a format that its columns do not take is left out."""
    shapes, found = parameter_shapes(config), {}
    for name, weights in FORMATS.items():
        try:
            found[name] = shard_specs(config, select_specs(weights, shapes), shard)
        except ValueError:  # int4, whose groups have to divide the columns
            continue
    return found


def shard_specs(config: MixtralConfig, specs: QuantSpecs, shard: Shard) -> QuantSpecs:
    """Those of a rank's parts; ValueError where a group of columns would be cut."""
    return shard.specs(specs, parameter_shapes(config), parameter_shapes(config, shard))


def stored_dtype(config: MixtralConfig) -> torch.dtype:
    return getattr(torch, config.dtype or "bfloat16")


def weight_bytes(
    config: MixtralConfig, specs: QuantSpecs, dtype: torch.dtype | None = None, shard: Shard = UNSHARDED
) -> int:
    """Of all parameters that a rank keeps; `dtype`: of those that have no form, None: as stored."""
    itemsize = (dtype or stored_dtype(config)).itemsize
    return sum(
        _packed(specs[name], shape) if name in specs else itemsize * math.prod(shape)
        for name, shape in parameter_shapes(config, shard).items()
    )


def _packed(spec: QuantSpec, shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) * _row(spec, shape[-1])


@lru_cache(maxsize=256)
def _row(spec: QuantSpec, columns: int) -> int:
    """Bytes of one row: its codes, scales and zeros."""
    return spec.empty((1, columns), "meta").nbytes


def table_bytes(config: MixtralConfig) -> int:
    """Of the rotary tables, fp32."""
    return 4 * config.max_position_embeddings * config.head_dim


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """All of them, and those that a token goes through: K of E experts."""
    total = active = 0
    for name, shape in parameter_shapes(config).items():
        count = math.prod(shape)
        total += count
        chosen = name.endswith(PARTS["experts"])
        active += count * config.num_experts_per_tok // config.num_local_experts if chosen else count
    return total, active


def token_flops(config: MixtralConfig, context: int) -> int:
    """Of the products of one token behind `context` others: two a weight that it meets, and of its attention."""
    embedding = config.vocab_size * config.hidden_size
    met = parameters(config)[1] - (0 if config.tie_word_embeddings else embedding)
    seen = min(context, config.sliding_window or context)
    return 2 * met + 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim * seen


def cache_bytes(config: MixtralConfig, batch: int, context: int) -> int:
    """Of a KVCache: a ring of the window where there is one."""
    slots = config.sliding_window or context
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * batch * heads * slots * stored_dtype(config).itemsize


def workspace_bytes(config: MixtralConfig, batch: int, context: int) -> int:
    """The most that `generate` holds at one time while it reads prompts, in chunks of PREFILL_CHUNK tokens.

    In a layer's experts: its input and that normed, attention's result, the sum and that normed, and the next sum; of
    each slot its row in sorted order, the experts' inner values and result (a remembered call has all of these at one
    time), then the output in their place. In its attention: its input and that normed, queries, keys and values, those
    rotated, and the heads' result.
    """
    hidden, inner, chosen = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    experts = max(6 * hidden + chosen * (2 * hidden + inner), 7 * hidden + chosen * hidden)
    row = max(experts, 2 * hidden + 3 * heads) + config.num_local_experts
    row += hidden if context > PREFILL_CHUNK else 0  # the chunk before it is still there
    counters = 16 + 12 * chosen  # positions; routes, their weights and order
    rows = batch * min(context, PREFILL_CHUNK)
    return rows * (row * stored_dtype(config).itemsize + counters) + 8 * batch * context


@dataclass(frozen=True)
class Need:
    """Bytes of a model that runs on one GPU, or on each of several."""

    weights: int
    tables: int
    cache: int
    workspace: int
    logits: int
    overhead: int = OVERHEAD

    @classmethod
    def of(cls, config: MixtralConfig, specs: QuantSpecs, batch: int, context: int, gpus: int = 1) -> Need:
        """Several GPUs: weights and cache in even parts, as if those divided them; embedding and the rest on each."""
        embedding = config.vocab_size * config.hidden_size * stored_dtype(config).itemsize
        return cls(
            embedding - (embedding - weight_bytes(config, specs)) // gpus,
            table_bytes(config),
            -(-cache_bytes(config, batch, context) // gpus),
            workspace_bytes(config, batch, context),
            LOGIT_BYTES * batch * config.vocab_size,
        )

    @property
    def total(self) -> int:
        return self.weights + self.tables + self.cache + self.workspace + self.logits + self.overhead


@dataclass(frozen=True)
class Plan:
    """One set of forms on GPUs of `memory` bytes.

    verdict  "fits"; "tight": by less than TIGHT of the memory; "no"
    longest  tokens a sequence that it holds without being tight, at most the model's positions; 0: not one
    needs    the least number of such GPUs that hold it without being tight, at most MOST_GPUS; None: more
    """

    need: Need
    memory: int
    longest: int
    needs: int | None

    @property
    def verdict(self) -> str:
        if self.need.total > self.memory:
            return "no"
        return "fits" if self.need.total <= comfortable(self.memory) else "tight"


def comfortable(memory: int) -> int:
    return memory - math.ceil(memory * TIGHT)


def plan(config: MixtralConfig, specs: QuantSpecs, memory: int, batch: int, context: int, gpus: int = 1) -> Plan:
    """On `gpus` GPUs of `memory` bytes each, `batch` sequences of `context` tokens."""
    room, lengths, counts = comfortable(memory), range(config.max_position_embeddings + 1), range(1, MOST_GPUS + 1)
    longest = bisect_right(lengths, room, key=lambda S: Need.of(config, specs, batch, S, gpus).total) - 1
    needs = next((n for n in counts if Need.of(config, specs, batch, context, n).total <= room), None)
    return Plan(Need.of(config, specs, batch, context, gpus), memory, max(0, longest), needs)


def smallest_gpu(config: MixtralConfig, specs: QuantSpecs, batch: int, context: int) -> GPU | None:
    """The listed GPU with the least memory that holds it without being tight."""
    need = Need.of(config, specs, batch, context).total
    return min((gpu for gpu in GPUS if need <= comfortable(gpu.bytes)), key=lambda gpu: gpu.mib, default=None)


def check(
    config: MixtralConfig,
    specs: QuantSpecs,
    device: torch.device,
    dtype: torch.dtype,
    free_choice: bool = True,
    free: int | None = None,
    shard: Shard = UNSHARDED,
) -> None:
    """ValueError where the weights alone do not fit in what is free on a CUDA `device`, before anything is allocated.

    forms, dtype: of the quantized parameters, and of the others. free_choice: whether others can be asked for, as is so
    for files that are not quantized themselves. free: bytes; None: the driver is asked, and torch for what it keeps.
    """
    if device.type != "cuda":
        return
    if free is None:
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, of what was let go
        free = torch.cuda.mem_get_info(device)[0] + kept
    tables = table_bytes(config)
    need = weight_bytes(config, specs, dtype, shard) + tables
    if need <= free:
        return
    others = format_options(config, shard) if free_choice else {STORED: specs}
    sizes = {name: weight_bytes(config, other, dtype, shard) + tables for name, other in others.items()}
    would = [f"weights={FORMATS[name]!r} takes {decimal(size)}" for name, size in sizes.items() if size <= free]
    if not would:
        least = min(sizes, key=sizes.__getitem__)
        gpu = smallest_gpu(config, others[least], 1, 1) if shard == UNSHARDED else None
        would = [f"no format fits, the least is {decimal(sizes[least])} with weights={FORMATS[least]!r}"]
        would += [f"a GPU like the {gpu.name} holds that"] if gpu else []
    got = f"the weights take {decimal(need)}, and {device} has {decimal(free)} free"
    raise ValueError(f"Mixtral.from_pretrained: {got}: {'; '.join(would)}")
