"""Random models, small and of awkward sizes, for every test that needs one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, MixtralConfig
from mixtral_triton.checkpoint.config import SMALL
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.kernels.weights.offload import OffloadedWeight
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.model.memory_plan import Placement
from mixtral_triton.quantize import quantize_into, select_specs
from mixtral_triton.verification.compare_weights import check_weights
from mixtral_triton.verification.report import Row

SIZES: dict[str, Any] = {"vocab_size": 23, "hidden_size": 16, "intermediate_size": 12, "num_hidden_layers": 1}
SIZES |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
SIZES |= {"rope_theta": 1e4, "max_position_embeddings": 64, "eos_token_id": None}
# With several tiles of some kernels.
WIDER_SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_local_experts": 8}
WIDER_SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


def random_model(
    device: Any = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0, gain: float = 2.0,
    deterministic: bool = False, weights: Any = None, on_host: Any = (), embedding: bool = False, **sizes: Any,
) -> Mixtral:  # fmt: skip
    """A model of SIZES, changed by `sizes`; on the meta device its shapes alone.

    Its matrices make a vector `gain` times as long: at 2 neither a route nor a greedy token is a close call.
    `weights` quantizes as `Mixtral.from_pretrained` does; `on_host` are the offloaded experts, a tuple for each layer
    or one for all; `embedding`: it lies there, too.
    """
    config = MixtralConfig(**SIZES | sizes)
    specs = select_specs(weights, parameter_shapes(config))
    if not any(isinstance(of_layer, tuple) for of_layer in on_host):
        on_host = [on_host] * config.num_hidden_layers
    model = Mixtral(config, device, dtype, deterministic, specs, None, Placement(on_host, embedding))
    generator = torch.Generator().manual_seed(seed)
    # In the order of a model without offload: seeds that tests rely on were tried in it.
    order = Mixtral(config, "meta", specs=specs) if any(on_host) else model
    for name in order.named_weights() if model.device.type != "meta" else ():
        weight = model.named_weights()[name]
        values = torch.randn(weight.shape, generator=generator)
        scale = 1.0 if name == "embed_tokens" else gain * weight.shape[-1] ** -0.5
        values = 1 + 0.3 * values if len(weight.shape) == 1 else values * scale
        parts = [(weight, values)]
        if isinstance(weight, OffloadedWeight):
            parts = [(weight[each : each + 1], values[each : each + 1]) for each in range(len(weight))]
        for part, of_part in parts:
            if isinstance(part, QuantizedWeight):
                quantize_into(part, of_part)
            else:
                part.data.copy_(of_part)
    return model


def cache_of(model: Mixtral, batch: int, max_len: int = 12) -> KVCache:
    return KVCache(model.config, batch, max_len, model.device, model.dtype)


def computed(model: Mixtral, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each forward from now on adds the tokens that it appends to all sequences."""
    counts, hidden = list[int](), model.hidden
    monkeypatch.setattr(model, "hidden", lambda *args: (counts.append(int(args[2].sum())), hidden(*args))[1])
    return counts


def tokens(*shape: int, seed: int = 0, device: Any = "cpu", vocabulary: int = SIZES["vocab_size"]) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed)).to(device)


def seeded(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def check_loaded(folder: Path, model: Mixtral) -> list[Row]:
    """verify's rows of the loaded tensors against the files of the folder."""
    rows = check_weights(model, folder, lambda: None)
    return [row for row in rows if row.case in ("as stored", "quantized")]


# The tokens of a text that the small checkpoint was not trained on.
HELD_OUT: list[int] = json.loads((SMALL / "heldout.json").read_text())["ids"]


def perplexity(model: Mixtral, ids: list[int] = HELD_OUT, cache_dtype: torch.dtype | None = None) -> float:
    """exp of the mean loss of a text, whose windows are as long as the model's positions."""
    length = model.config.max_position_embeddings
    texts = [ids[start : start + length] for start in range(0, len(ids) - 1, length - 1)]
    return float(torch.cat(model.score(texts, cache_dtype=cache_dtype)).double().mean().neg().exp())
