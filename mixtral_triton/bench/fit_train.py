"""`fit --train`: what LoRA over frozen experts takes of a GPU's memory, calculated by shapes. Nothing is measured.

The rest is as PEFT and Trainer do it: the adapter is fp32 over 16-bit weights, so AdamW keeps two moments and no other
copy; each layer keeps its input alone (gradient checkpointing), and is computed again for its backward pass.

K experts per token, E experts, H hidden, I intermediate, V vocabulary
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..checkpoint.arguments import default_dtype, in_decimal, weight_bytes
from ..checkpoint.config import MixtralConfig
from ..checkpoint.tensors import parameter_shapes
from ..model.offload_plan import AUTO_CONTEXT
from ..terminal import check_range, console, table_of
from .fit import COLOURS, KNOWN, STORED, QuantSpecs, Request, free_bytes, select_gpu, verdict
from .gpus import GPUS

# Qwen/Qwen3-30B-A3B by its config.json, as a Mixtral, which has no norms of queries and keys
QWEN3: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 768, "num_hidden_layers": 48}
QWEN3 |= {"num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 128, "num_experts_per_tok": 8}
QWEN3_CONFIG = MixtralConfig(**QWEN3, rope_theta=1e6, max_position_embeddings=40960, dtype="bfloat16")
MODELS = KNOWN | {"qwen3-30b-a3b": QWEN3_CONFIG}
FP32 = 4
STEP = 4  # bytes of AdamW's count of steps, one a parameter
RANK = 16
CAPTION = (
    "Calculated, not measured: adapter, gradients and both moments of AdamW are fp32, without another copy; inputs: of "
    "each layer, by gradient checkpointing, and of the last norm; layer: what one layer saves for backward while it is "
    "computed again; its experts save x, ids and weights; backward: working memory of its experts' backward pass, with "
    "a projection's dequantized experts; logits: in fp32, their cross entropy and gradient; kept results of the model "
    "are 16 bits more; in all: without the smaller one of logits, and layer and backward, which follow each other; "
    "used: of what the driver and a context leave free, by estimate where the GPU is not at hand"
)


def training_need(
    config: MixtralConfig, specs: QuantSpecs, batch: int, context: int, rank: int, head_norms: bool = False
) -> dict[str, int]:
    """Return bytes on one GPU by what they hold, and "total", with LoRA of this rank on the q and v projections.

    specs: of the experts, by parameter name. head_norms: each layer has norms of queries and keys, as Qwen3's have.
    """
    dtype, tokens = default_dtype(config), batch * context
    H, V, L, size = config.hidden_size, config.vocab_size, config.num_hidden_layers, dtype.itemsize
    E, K, I = config.num_local_experts, config.num_experts_per_tok, config.intermediate_size
    q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, kv = q_heads * config.head_dim, kv_heads * config.head_dim
    shapes = parameter_shapes(config)
    norms = {f"layers.{layer}.{name}": (config.head_dim,) for layer in range(L) for name in ("q_norm", "k_norm")}
    shapes |= norms if head_norms else {}
    adapter = FP32 * L * rank * (2 * H + q + kv)
    saved = 2 * FP32 * (H + 1)  # the norms' inputs and scales
    saved += FP32 * (q + kv + q_heads + kv_heads) if head_norms else 0
    saved += FP32 * H * (2 if size < FP32 else 1) + 2 * FP32 * rank  # LoRA's inputs, converted for q and v apart
    saved += size * (2 * q + 2 * kv) + FP32 * q_heads  # q, k, v, result and sums of attention
    saved += FP32 * (E + K + 1) + size * H + 8 * K + FP32 * K  # router; x, ids and weights
    slots = tokens * K
    swiglu = FP32 * slots * I  # one of the fp32 values of each slot in `FrozenExperts.backward`
    dense = size * E * 2 * I * H if specs else 0  # of gate and up, dequantized
    expert = (FP32 + 1) * 2 * I * H if specs else 0  # one of these in fp32, and its codes
    product = 6 * swiglu + size * slots * 2 * I + dense + max(expert, size * slots * H)
    need = {
        "weights": weight_bytes(shapes, specs, dtype),
        "adapter": adapter,
        "gradients": adapter,
        "optimizer": 2 * adapter + STEP * 4 * L,
        "inputs": tokens * (L * size * H + FP32 * (H + 1)),
        "layer": tokens * saved,
        "backward": max(9 * swiglu, product),
        "logits": tokens * 3 * FP32 * V,
    }
    unused = min(need["logits"], need["layer"] + need["backward"])
    return need | {"total": sum(need.values()) - unused}


def run(args: argparse.Namespace) -> int:
    """Run the command -> exit status: 1 where no GPU of the options holds any format. ValueError for a wrong option."""
    if args.link or args.cache_dtype:
        raise ValueError("--train takes neither --link nor --cache-dtype: needs them left out")
    rank = RANK if args.rank is None else args.rank
    check_range("--rank", rank, 1)
    request = Request.of(args, MODELS)
    if request.specs.get(STORED):
        raise ValueError(f"fit --train: {request.name} is quantized already, needs a dense checkpoint")
    config, batch = request.config, request.batch
    context = min(AUTO_CONTEXT, request.context) if args.context is None else request.context
    asked = select_gpu(args)
    gpus = [*GPUS.values()] if asked is None else [asked]
    formats = [name for name in (STORED, "fp8", "int8", "int4") if name in request.specs]
    sizes = batch, context, rank, config is QWEN3_CONFIG
    needs = {name: training_need(config, request.specs[name], *sizes) for name in formats}
    verdicts = {
        name: {gpu.name: verdict(need["total"], free_bytes(gpu)) for gpu in gpus} for name, need in needs.items()
    }
    if args.json:
        found: dict[str, Any] = {"model": request.name, "batch": batch, "context": context, "rank": rank}
        rows = [{"format": name, "bytes": needs[name], "gpus": verdicts[name]} for name in formats]
        print(json.dumps(found | {"calculated": True, "formats": rows}))
    else:
        lines = []
        for name, need in needs.items():
            cells = {"experts": request.label(name)} | {key: in_decimal(value) for key, value in need.items()}
            cells["in all"] = cells.pop("total")
            fitting = [gpu for gpu, word in verdicts[name].items() if word == "fits"]
            if asked is None:
                lines.append((cells | {"smallest GPU": fitting[0] if fitting else "-"}, ""))
            else:
                word = verdicts[name][asked.name]
                cells["used"] = f"{100 * need['total'] / free_bytes(asked):.0f} %"
                lines.append((cells | {"verdict": word}, COLOURS[word]))
        place = "" if asked is None else f", on {asked.name}"
        title = f"{request.name}: LoRA of rank {rank} on q and v, {batch} x {context:,} tokens{place}"
        console().print(table_of(title, lines, CAPTION))
    return 0 if any(word != "no" for words in verdicts.values() for word in words.values()) else 1
