"""Tiny models of every family that transformers marks with its decorator of experts, from its own registry."""

from typing import Any

import torch
import transformers
from torch import nn

from mixtral_triton.hf.experts import is_experts

NAMED = (
    "mixtral qwen3_moe olmoe qwen2_moe deepseek_v3 glm4_moe ernie4_5_moe granitemoe phimoe minimax_m2".split()
)  # those that the project promises
# Sizes by the names that configs have for them: small, and no two alike that a mistake could swap.
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 48}
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8)
SIZES |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token"), 3)
SIZES |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32)
SIZES |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
SIZES |= {"qk_head_dim": 24, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1}
SIZES |= {"moe_layer_end_index": 1, "mlp_only_layers": [], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES |= {"layer_types": None, "num_nextn_predict_layers": 0, "moe_layer_interval": 1, "n_shared_experts": 1}
HYBRID = dict.fromkeys(("kimi_linear", "qwen3_5_moe_text", "qwen3_next"), {"num_hidden_layers": 4})
FIXES: dict[str, dict[str, Any]] = HYBRID | {
    "granitemoehybrid": {"layer_types": ["attention", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 1},
    "bailing_hybrid": {"num_hidden_layers": 8},
    "zaya": {"num_experts_per_tok": 1},
}
LARGEST = 10_000_000  # parameters of a model that counts as tiny
LIMIT = 1e-5  # of the largest logit, fp32


def config_of(family: str, **changes: Any) -> Any:
    """The tiny config of a model type."""
    kind = transformers.models.auto.configuration_auto.CONFIG_MAPPING[family]
    known = kind().to_dict()
    latent = {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": 4} if "qk_rope_head_dim" in known else {}
    sizes = {name: value for name, value in (SIZES | latent).items() if name in known}
    return kind(**sizes | FIXES.get(family, {}) | changes)


def build(family: str, **changes: Any) -> Any:
    """The tiny model with random weights, fp32, in evaluation mode, with transformers' eager functions."""
    config = config_of(family, **changes)
    kind = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size:,} parameters: no tiny config")
    torch.manual_seed(0)
    model = kind._from_config(config, attn_implementation="eager", experts_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # large enough that neither a route nor a greedy token is a close call
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * values if values.dim() == 1 else values * 1.5 * values.shape[-1] ** -0.5
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def marked_families() -> list[str]:
    """The model types of transformers' causal models whose file has the decorator of experts."""
    from importlib import import_module
    from inspect import getsource

    found = []
    for config, kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for each in kind if isinstance(kind, tuple) else (kind,):
            if "@use_experts_implementation" in getsource(import_module(each.__module__)):
                found.append(config.model_type)
    return sorted({*found})
