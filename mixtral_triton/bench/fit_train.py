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
from ..kernels.weights.formats import BITS
from ..model.offload_plan import AUTO_CONTEXT, usable_bytes
from ..terminal import console, table_of
from .fit import STORED, QuantSpecs, Request, free_bytes, select_gpus

FP32 = 4
STEP = 4  # bytes of AdamW's count of steps, one a parameter
RANK = 16  # of LoRA
CAPTION = (
    "Calculated, not measured: adapter: in fp32, with its gradients; optimizer: both moments of AdamW in fp32; "
    "activations, with gradient checkpointing: each layer's input, and the larger one of logits with their cross "
    "entropy and gradient, and what one layer saves and computes for its backward pass"
)


def saved_bytes(config: MixtralConfig) -> int:
    """Return the bytes that one layer saves for its backward pass, a token."""
    H, size = config.hidden_size, default_dtype(config).itemsize
    E, K = config.num_local_experts, config.num_experts_per_tok
    q_heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, kv = q_heads * config.head_dim, kv_heads * config.head_dim
    saved = 2 * FP32 * (H + 1)  # the norms' inputs and scales
    saved += FP32 * (q + kv + q_heads + kv_heads) if config.family.norms else 0  # queries and keys, and their scales
    saved += FP32 * H * (2 if size < FP32 else 1) + 2 * FP32 * RANK  # LoRA's inputs, converted for q and v apart
    saved += size * (2 * q + 2 * kv) + FP32 * q_heads  # q, k, v, result and sums of attention
    saved += 2 * size * H  # the layer's result, computed again, and its gradient
    return saved + FP32 * (E + K + 1) + size * H + 8 * K + FP32 * K  # router; x, ids and weights


def backward_bytes(config: MixtralConfig, quantized: bool, tokens: int) -> int:
    """Return the bytes that a layer's experts work in, in the backward pass or, if more, computed again before it."""
    H, I, size = config.hidden_size, config.intermediate_size, default_dtype(config).itemsize
    slots = tokens * config.num_experts_per_tok
    # Of each slot a row of x, of its gradient or of the result, which share their memory, gate, up, and the gradient of
    # h; forward x (not of quantized experts), h and the result.
    backward, forward = H + 3 * I, (1 if quantized else 2) * H + I
    result = tokens * (size * H + FP32 * config.num_experts_per_tok)
    return size * slots * max(backward, forward) + FP32 * (slots + config.num_local_experts + 1) + result


def training_need(config: MixtralConfig, specs: QuantSpecs, batch: int, context: int) -> dict[str, int]:
    """Return bytes on one GPU by what they hold, and "total", with LoRA on the q and v projections.

    specs: of the experts, by parameter name.
    """
    dtype, tokens = default_dtype(config), batch * context
    H, L, D = config.hidden_size, config.num_hidden_layers, config.head_dim
    adapter = FP32 * L * RANK * (2 * H + (config.num_attention_heads + config.num_key_value_heads) * D)
    layer = tokens * saved_bytes(config) + backward_bytes(config, bool(specs), tokens)
    logits = tokens * 3 * FP32 * config.vocab_size  # in fp32, with their cross entropy and gradient
    need = {
        "weights": weight_bytes(parameter_shapes(config), specs, dtype),
        "adapter": 2 * adapter,
        "optimizer": 2 * adapter + STEP * 4 * L,
        # The inputs of the layers and of the last norm; the logits are gone before the first layer's turn.
        "activations": tokens * (L * dtype.itemsize * H + FP32 * (H + 1)) + max(logits, layer),
    }
    return need | {"total": sum(need.values())}


def run(args: argparse.Namespace) -> int:
    """Run the command -> exit status: 1 where no GPU of the options holds any format. ValueError for a wrong option."""
    if args.cache_dtype:
        raise ValueError("--train is given, and --cache-dtype, too: needs one of the two")
    request, devices = Request.of(args), select_gpus(args)
    if request.specs.get(STORED):
        raise ValueError(f"fit --train: {request.name} is quantized already, needs a dense checkpoint")
    context = min(AUTO_CONTEXT, request.context) if args.context is None else request.context
    rows, lines = list[dict[str, Any]](), list[Any]()
    for name in (name for name in (STORED, *reversed(BITS)) if name in request.specs):
        config, specs = request.config, request.specs[name]
        need = training_need(config, specs, request.batch, context)
        gpus = [device.name for device in devices if need["total"] <= usable_bytes(free_bytes(device))]
        rows.append({"format": name, "bytes": need, "gpus": gpus})
        cells = {"experts": name, **{part: in_decimal(size) for part, size in need.items()}}
        lines.append((cells | {"smallest GPU": [*gpus, "-"][0]}, ""))
    if args.json:
        about: dict[str, Any] = {"model": request.name, "batch": request.batch, "context": context, "rank": RANK}
        print(json.dumps(about | {"calculated": True, "formats": rows}))
    else:
        title = f"{request.name}: LoRA of rank {RANK} on q and v, {request.batch} x {context:,} tokens"
        console().print(table_of(title, lines, CAPTION))
    return 0 if any(row["gpus"] for row in rows) else 1
