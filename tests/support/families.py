"""Tiny models of every family that transformers marks with its decorator of experts, from its own registry."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from mixtral_triton import ExpertsConfig, apply
from mixtral_triton.hf.experts import NAME, PROJECTIONS, is_experts
from mixtral_triton.hf.probes import Norm, Router
from mixtral_triton.kernels.launching.launch import INTERPRETED

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
# The best known; the tests of the others are exhaustive.
NAMED = [
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "qwen2_moe",
    "deepseek_v3",
    "glm4_moe",
    "ernie4_5_moe",
    "granitemoe",
    "phimoe",
    "minimax_m2",
]
# Sizes by the names that configs have for them: small, and no two alike that a mistake could swap.
SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 96}
SIZES |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 8)
SIZES |= dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "moe_top_k", "num_experts_per_token"), 3)
SIZES |= dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 32)
SIZES |= {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
SIZES |= {"qk_head_dim": 24, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_start_index": 1}
SIZES |= {"moe_layer_end_index": 1, "mlp_only_layers": [], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
SIZES |= {"layer_types": None, "num_nextn_predict_layers": 0, "moe_layer_interval": 1, "n_shared_experts": 1}
JAMBA = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 1, "expert_layer_offset": 0}
FIXES: dict[str, dict[str, Any]] = {
    "gemma4_text": {"enable_moe_block": True, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16}
    | {"top_k_experts": 3},
    "glm_moe_dsa": {"mlp_layer_types": ["dense", "sparse"]},  # transformers 5.7 makes the first three dense by default
    "granitemoehybrid": {"layer_types": ["attention", "attention"]},
    "jamba": JAMBA | {"use_mamba_kernels": False},
    "kolibri1_1": {"index_num_heads": 2, "layer_types": ["indexed_attention", "sliding_attention"]},
    "longcat_flash": {"num_layers": 2, "ffn_hidden_size": 96, "zero_expert_num": 4},
    "lfm2_moe": {"layer_types": ["full_attention", "full_attention"], "num_dense_layers": 1},
    "qwen3_5_moe_text": {"num_hidden_layers": 4},
    "qwen3_next": {"num_hidden_layers": 4},
    "zaya": {"num_experts_per_tok": 1},
}
MODELS = Path(transformers.__file__).parent / "models"
LARGEST = 10_000_000  # parameters of a model that counts as tiny
LIMIT = 1e-4 if INTERPRETED else 1e-5  # of the largest logit, fp32
# Families whose experts or attention this package refuses, with what the message says, and those that are not tried.
EXPERTS_REFUSED = {
    "aria_text": "transposed weights",
    "ergo": "experts without a gate",
    "gpt_oss": "a bias",
    "nemotron_h": "experts without a gate",
}
ATTENTION_REFUSED = {"gemma4_text": "heads of 512", "inkling_text": "a position bias"}
MULTIMODAL = "dots3_note", "gemma4", "qwen3_5_moe", "qwen4_exp"
NOT_TRIED = dict.fromkeys(MULTIMODAL, "text and images; its text model is a family of its own")
NOT_TRIED |= dict.fromkeys(("inkling2_text", "inkling2_loop_text"), "no tiny config; another activation of experts")
NOT_TRIED |= dict.fromkeys(("bailing_hybrid", "kimi_linear", "qwen4_exp_text"), "no tiny config: pattern of layers")
NOT_TRIED |= {"beam": "its default has no experts"}


def config_of(family: str, **changes: Any) -> Any:
    """The tiny config of a model type."""
    kind = CONFIG_MAPPING[family]
    known = kind().to_dict()
    latent = {"head_dim": SIZES["qk_rope_head_dim"], "num_key_value_heads": 4} if "qk_rope_head_dim" in known else {}
    sizes = {name: value for name, value in (SIZES | latent).items() if name in known}
    return kind(**sizes | FIXES.get(family, {}) | changes)


def randomize(model: nn.Module, seed: int = 1) -> Any:
    """Give a model random weights that are large enough that neither a route nor a greedy token is a close call."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = 1 + 0.2 * values if values.dim() == 1 else values * 1.5 * values.shape[-1] ** -0.5
    for name, buffer in model.named_buffers():
        if name.endswith("bias"):  # of routers, by which they select experts
            buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def build(family: str, **changes: Any) -> Any:
    """The tiny model, fp32, with transformers' eager functions."""
    config = config_of(family, **changes)
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    assert size < LARGEST, f"{size:,} parameters"
    return randomize(kind._from_config(config, attn_implementation="eager", experts_implementation="eager"))


def by_name(
    family: str, dtype: torch.dtype = torch.float32, attention: str = NAME, experts: str = NAME, **changes: Any
) -> Any:
    """The tiny model with these implementations."""
    model = build(family, **changes).to(dtype)
    model.set_experts_implementation(experts)
    model.set_attn_implementation(attention)
    return model


def experts_of(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_experts(module)}


def with_int4_experts(model: Any, folder: Path, attention: str = NAME) -> Any:
    """Load the model, saved in the folder, with int4 experts, and give the model itself their dequantized values."""
    model.save_pretrained(folder)
    settings: Any = {"quantization_config": ExpertsConfig("int4"), "attn_implementation": attention}
    quantized = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    for ours, theirs in zip(experts_of(model).values(), experts_of(quantized).values(), strict=True):
        for key in PROJECTIONS:
            dense, weight = getattr(ours, key), getattr(theirs, key)
            assert weight.format == "int4" and weight.shape == dense.shape
            error = float((weight.dequantize() - dense).norm() / dense.norm())
            assert 0.01 < error < 0.15, (key, error)
            dense.data = weight.dequantize()
    return quantized


def marked_families() -> list[str]:
    """The model types of transformers' causal models whose file has the decorator of experts."""
    names = {name: model_type_to_module_name(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    files = {name: MODELS / module / f"modeling_{module}.py" for name, module in names.items()}  # none is imported
    texts = {name: file.read_text() for name, file in files.items() if file.exists()}
    return sorted(name for name, text in texts.items() if "@use_experts_implementation" in text)


def applied_parts(family: str) -> list[str]:
    """Which RMS norms with a weight, rotary functions and routers of a family `apply` replaces."""
    modules = [*apply(build(family)).modules()]
    kinds = [type(getattr(module, "kind", None)) for module in modules]
    norms = [x for x in modules if "RMSNorm" in type(x).__name__ and "weight" in x._parameters]
    count = kinds.count(Norm)
    return [
        "all" if count and count >= len(norms) else "some" if count else "",
        *("yes" * (x in kinds) for x in (tuple, Router)),
    ]


def table() -> str:
    """The table of families in docs/drop_in.md."""
    lines = ["| `model_type` | experts and int4 | attention | norms | rope | router |", "| --- " * 6 + "|"]
    for family in marked_families():
        if (reason := NOT_TRIED.get(family)) is not None:
            lines.append(f"| `{family}` | not tried: {reason} | | | | |")
            continue
        refused = (table.get(family) for table in (EXPERTS_REFUSED, ATTENTION_REFUSED))
        cells = ["yes" if what is None else f"refused: {what}" for what in refused] + applied_parts(family)
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
