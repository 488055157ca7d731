"""An estimate of what `verify` takes: bytes of the files, memory and time."""

import math
import timeit
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import parameter_shapes
from ..kernels.launch import INTERPRETED
from ..quantize.cost import quantized_formats
from ..tolerance import largest, to_fp64

CALLS_S = 0.3  # seconds that Python takes for a layer's calls
PASSES, LOGITS = 10, 16  # how often a layer's weights are converted to fp64; tensors of a text's logits at once


def estimate(model: Any, ids: Tensor, files: Sequence[Path] = (), quick: bool = False) -> str:
    """Estimate what `verify` on ids [B,T] takes: bytes of the files, memory beside the model, and seconds of torch's
    computation in fp64, for which a product with one expert is timed."""
    config, N, down = model.full_config, ids.numel(), model.layers[0].down_proj[0]
    x = torch.ones((2 * N, down.shape[-1]), dtype=torch.float64, device=model.device)
    seconds = min(timeit.repeat(lambda: largest(x @ to_fp64(down).T), number=1, repeat=3))
    layer = sum(math.prod(shape) for name, shape in parameter_shapes(config).items() if name.startswith("layers.0."))
    fp32, quantized = not quick and model.dtype != torch.float32, bool(files and quantized_formats(model))
    products = layer / down.shape.numel() * (PASSES * (1 + fp32) + 2 * quantized)
    seconds = config.num_hidden_layers * (seconds * products + CALLS_S)
    # Every layer's references stay. Beside them are a layer in fp32 or as stored and an expert, or the head and logits.
    references = config.num_hidden_layers * N * config.hidden_size * (8 * 8 + 3 * model.dtype.itemsize)
    inside = layer * max(6 * fp32, 4 * quantized) + 24 * config.intermediate_size * config.hidden_size
    memory = (references + max(inside, 8 * config.vocab_size * (config.hidden_size + LOGITS * N))) / 1e6
    stored = sum(file.stat().st_size for file in files) / 1e6
    torch_takes = f"torch takes about {memory:,.0f} MB beside the model and {seconds:.0f} s"
    return f"verifying: reads {stored:,.1f} MB once, {torch_takes}{', without the interpreter' if INTERPRETED else ''}"
