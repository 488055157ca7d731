"""Load a Qwen3-MoE with int4 experts by transformers' own names, verify it and generate; a tiny random one by default.

python -m examples.qwen3 [FOLDER]
"""

import sys
import tempfile

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from mixtral_triton import ExpertsConfig, register, verify

TINY = Qwen3MoeConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    num_experts=8,
    num_experts_per_tok=3,
    max_position_embeddings=128,
)


def main() -> None:
    with tempfile.TemporaryDirectory() as tiny:
        folder = sys.argv[1] if len(sys.argv) > 1 else tiny
        if folder == tiny:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(TINY).save_pretrained(tiny)
        register()
        settings = {"quantization_config": ExpertsConfig("int4"), "attn_implementation": "mixtral_triton"}
        model = AutoModelForCausalLM.from_pretrained(folder, **settings)
    print(model.model.layers[0].mlp.experts)
    print(verify(model))
    print(model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=8, do_sample=False).tolist())


if __name__ == "__main__":
    main()
