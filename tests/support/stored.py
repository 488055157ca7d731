"""Checkpoints of tiny models of any family of transformers, quantized in the hub's layouts, and their values."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.families import build
from tests.support.hub import Packer

# Sizes that every layout's groups and blocks divide.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 32}
SIZES |= {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32, "shared_expert_intermediate_size": 128}
SIZES |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4}
EXPERTS, LINEARS = r"\.experts\.\d+\.", r"(_proj(_with_mqa)?|\.w[123])\.weight$"


def write_quantized(
    family: str, folder: Path, packer: Packer, config: Any, only: str = "", **changes: Any
) -> tuple[Path, Path]:
    """Write a tiny model twice: packed, and with the exact values in fp32; return both folders.

    only: a pattern of the names of the linears that are packed. changes: of tensors by name that end in the key.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = CONFIG_MAPPING[family]().to_dict()
    stored, exact_folder = folder / "stored", folder / "exact"
    build(family, **{name: size for name, size in SIZES.items() if name in known}).save_pretrained(exact_folder)
    tensors, random = load_file(exact_folder / "model.safetensors"), np.random.default_rng(0)
    packed, exact = dict[str, Tensor](), dict[str, Tensor]()
    for name, x in sorted(tensors.items()):
        if x.dim() == 2 and re.search(LINEARS, name) and re.search(only, name):
            parts, values = packer(*x.shape, random)
            packed |= {name.removesuffix("weight") + part: y.contiguous() for part, y in parts.items()}
            exact[name] = values * 8  # of a size that changes logits
            packed |= {
                key: y * 8
                for key, y in packed.items()
                if key.startswith(name.removesuffix("weight")) and key.rpartition(".")[2] in SCALES
            }
        else:
            exact[name] = x.bfloat16().float()
            packed[name] = x.bfloat16()
    save_file(exact, exact_folder / "model.safetensors", {"format": "pt"})
    values = json.loads((exact_folder / "config.json").read_text())
    stored.mkdir()
    for name, change in changes.items():
        packed = change(packed)
    save_file(packed, stored / "model.safetensors", {"format": "pt"})
    (stored / "config.json").write_text(json.dumps(values | {"quantization_config": config, "dtype": "bfloat16"}))
    return stored, exact_folder


SCALES = {"weight_scale", "weight_scale_inv", "scales"}
