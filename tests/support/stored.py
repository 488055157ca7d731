"""Checkpoints of tiny models of any family of transformers, quantized in the hub's layouts, and their values."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from mixtral_triton import stored_config
from tests.support.families import build
from tests.support.hub import Packer

# Sizes that every layout's groups and blocks divide.
SIZES = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 256, "head_dim": 32}
SIZES |= {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 32, "shared_expert_intermediate_size": 128}
SIZES |= {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "expert_ffn_hidden_size": 256}
SCALES = {"weight_scale", "weight_scale_inv", "scales"}
IDS = torch.arange(2, 20).view(2, 9)
INT4 = "ct int4 32 False"  # of LAYOUTS
EXPERTS, LINEARS = r"\.experts\.\d+\.", r"(_proj(_with_mqa)?|\.w[123])\.weight$"


def write_quantized(
    family: str, folder: Path, packer: Packer, config: Any, only: str = "", change: Any = None
) -> tuple[Path, Path]:
    """Write a tiny model twice: packed, and with the exact values in fp32; return both folders.

    only: a pattern of the names of the linears that are packed. change: is called with the packed file's tensors.
    """
    stored, exact_folder = folder / "stored", folder / "exact"
    known = CONFIG_MAPPING[family]().to_dict()
    left = ("head_dim",) if "qk_rope_head_dim" in known else ()  # the rotated columns' size
    sizes = {name: size for name, size in SIZES.items() if name in known and name not in left}
    build(family, **sizes).save_pretrained(exact_folder)
    tensors, random = load_file(exact_folder / "model.safetensors"), np.random.default_rng(0)
    packed, exact = dict[str, Tensor](), dict[str, Tensor]()
    for name, x in sorted(tensors.items()):
        if x.dim() == 2 and x.shape[1] % 128 == 0 and re.search(LINEARS, name) and re.search(only, name):
            parts, values = packer(*x.shape, random)
            parts = {part: y * 8 if part in SCALES else y for part, y in parts.items()}  # of a size that logits show
            packed |= {name.removesuffix("weight") + part: y.contiguous() for part, y in parts.items()}
            exact[name] = values * 8
        else:
            exact[name] = x.bfloat16().float()
            packed[name] = x.bfloat16()
    save_file(exact, exact_folder / "model.safetensors", {"format": "pt"})
    values = json.loads((exact_folder / "config.json").read_text())
    stored.mkdir()
    if change is not None:
        change(packed)
    save_file(packed, stored / "model.safetensors", {"format": "pt"})
    (stored / "config.json").write_text(json.dumps(values | {"quantization_config": config, "dtype": "bfloat16"}))
    return stored, exact_folder


def load(folder: Path, **kwargs: Any) -> Any:
    config = stored_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, **{"dtype": torch.float32} | kwargs)
