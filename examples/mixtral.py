"""A whole Mixtral on `mixtral_triton.ops`, to read from top to bottom: config, files, cache, a layer, a greedy text.

    python -m examples.mixtral [FOLDER [PROMPT]]                       # on a GPU; without one in plain torch
    TRITON_INTERPRET=1 python -m examples.mixtral [FOLDER [PROMPT]]    # the kernels, interpreted on the CPU

It prints the text of `mixtral-triton generate FOLDER --prompt PROMPT`. The package's own model adds CUDA graphs,
quantized weights, meshes, experts in host memory and checks of everything that a caller gives it.

B sequences, T tokens, H hidden, I intermediate, E experts, K experts a token, Hq query heads, Hkv key/value heads,
D head size, C slots of the cache, V vocabulary
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer

from mixtral_triton import SMALL, ops

NEW_TOKENS = 64


@dataclass
class Layer:
    """The weights of a block, as the files name them, with q, k and v in one matrix and the experts in two."""

    input_layernorm: Tensor  # [H]
    qkv_proj: Tensor  # [(Hq + 2 Hkv) D, H]
    o_proj: Tensor  # [H, Hq D]
    post_attention_layernorm: Tensor  # [H]
    gate: Tensor  # [E, H]
    gate_up_proj: Tensor  # [E, 2I, H], the gate's rows first
    down_proj: Tensor  # [E, H, I]
    k_cache: Tensor  # [1, Hkv, C, D], a ring: position p is in slot p mod C
    v_cache: Tensor


class Mixtral:
    """Mixtral (Jiang et al. 2024) for one sequence."""

    def __init__(self, folder: Path, device: str, slots: int) -> None:
        self.config = config = json.loads((folder / "config.json").read_text())
        files: dict[str, Tensor] = {}
        for file in folder.glob("*.safetensors"):
            files |= load_file(file, device)
        self.Hq, self.Hkv = config["num_attention_heads"], config["num_key_value_heads"]
        self.D = config.get("head_dim") or config["hidden_size"] // self.Hq
        self.window, self.eps = config.get("sliding_window"), config["rms_norm_eps"]
        self.embed_tokens, self.norm = files["model.embed_tokens.weight"], files["model.norm.weight"]
        self.lm_head = self.embed_tokens if config["tie_word_embeddings"] else files["lm_head.weight"]
        slots = min(slots, self.window or slots)
        shape, dtype = (1, self.Hkv, slots, self.D), self.norm.dtype
        self.layers = []
        for index in range(config["num_hidden_layers"]):
            at, moe = f"model.layers.{index}", f"model.layers.{index}.block_sparse_moe"
            experts = [f"{moe}.experts.{expert}" for expert in range(config["num_local_experts"])]
            gate_up = [torch.cat([files[f"{name}.{part}.weight"] for part in ("w1", "w3")]) for name in experts]
            self.layers.append(
                Layer(
                    input_layernorm=files[f"{at}.input_layernorm.weight"],
                    qkv_proj=torch.cat([files[f"{at}.self_attn.{name}_proj.weight"] for name in "qkv"]),
                    o_proj=files[f"{at}.self_attn.o_proj.weight"],
                    post_attention_layernorm=files[f"{at}.post_attention_layernorm.weight"],
                    gate=files[f"{moe}.gate.weight"],
                    gate_up_proj=torch.stack(gate_up),
                    down_proj=torch.stack([files[f"{name}.w2.weight"] for name in experts]),
                    k_cache=torch.zeros(shape, dtype=dtype, device=device),
                    v_cache=torch.zeros(shape, dtype=dtype, device=device),
                )
            )
        self.past = torch.zeros(1, dtype=torch.int32, device=device)  # tokens in the cache
        self.set_tables(config["max_position_embeddings"], device)

    def set_tables(self, positions: int, device: str) -> None:
        """Compute the angles of rotary embedding (Su et al. 2021, section 3.2): position * theta ** (-2i / D)."""
        theta = self.config.get("rope_theta") or self.config["rope_parameters"]["rope_theta"]
        frequencies = 1.0 / theta ** (torch.arange(0, self.D, 2).float() / self.D)
        angles = torch.outer(torch.arange(positions).float(), frequencies)
        self.cos, self.sin = angles.cos().to(device), angles.sin().to(device)

    def forward(self, ids: Tensor) -> Tensor:
        """Append the tokens ids [1,T] to the cache -> the logits [V] of the next one."""
        T = ids.shape[1]
        new = torch.full_like(self.past, T)
        # The embedding's rows x, and the first norm of them; from here on each norm follows what is added to x.
        norms = [layer.input_layernorm for layer in self.layers] + [self.norm]
        x = self.embed_tokens[ids[0]]
        h = ops.rms_norm(x, norms[0], self.eps)
        for layer, next_norm in zip(self.layers, norms[1:], strict=True):
            attn_output = self.attention(layer, h, T, new)
            h, x, _, weights, experts = ops.rms_norm_gate_route(
                attn_output,
                x,
                layer.post_attention_layernorm,
                self.eps,
                layer.gate,
                self.config["num_experts_per_tok"],
            )
            h, x = ops.experts_add_rms_norm(
                h, layer.gate_up_proj, layer.down_proj, experts, weights, x, next_norm, self.eps
            )
        self.past += new
        return ops.linear(h[-1:], self.lm_head)[0].float()

    def attention(self, layer: Layer, h: Tensor, T: int, new: Tensor) -> Tensor:
        """h [T,H] -> the output of attention [T,H]; the keys and values of the T tokens are appended to the cache."""
        heads = ops.linear(h, layer.qkv_proj).view(1, T, self.Hq + 2 * self.Hkv, self.D)
        q, k, v = heads.split((self.Hq, self.Hkv, self.Hkv), dim=2)
        positions = self.past[:, None] + torch.arange(T, device=h.device)
        q, k = ops.rope(q, k, self.cos, self.sin, positions)
        out = ops.cached_attention(q, k, v, layer.k_cache, layer.v_cache, self.past, new, window=self.window)
        # Last, since the chunk sees the keys that it replaces in the ring.
        ops.append(k, v, layer.k_cache, layer.v_cache, self.past, new)
        return ops.linear(out.view(T, self.Hq * self.D), layer.o_proj)

    @torch.no_grad()
    def generate(self, ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
        """Return the prompt's ids with those that follow, the likeliest one at a time, up to the end of the text."""
        eos, chunk = self.config.get("eos_token_id"), ids
        for _ in range(new_tokens):
            logits = self.forward(torch.tensor([chunk], device=self.past.device))
            chunk = [int(logits.argmax())]
            ids = ids + chunk
            if chunk[0] == eos:
                break
        return ids


def main(folder: Path = SMALL, prompt: str = "The return statement") -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(prompt).input_ids
    on_gpu = torch.cuda.is_available() and not triton.knobs.runtime.interpret
    model = Mixtral(Path(folder), "cuda" if on_gpu else "cpu", slots=len(ids) + NEW_TOKENS)
    print(tokenizer.decode(model.generate(ids), skip_special_tokens=True))


if __name__ == "__main__":
    main(*sys.argv[1:3])
