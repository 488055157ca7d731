"""Quantized checkpoints in the hub's layouts, packed by code that shares nothing with the reader, and their values."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

SIZES: dict[str, Any] = {"model_type": "mixtral", "vocab_size": 40, "hidden_size": 128, "intermediate_size": 256}
SIZES |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SIZES |= {"num_local_experts": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64}
SIZES |= {"rope_theta": 1e4, "eos_token_id": None}
ATTENTION = {"q": (128, 128), "k": (64, 128), "v": (64, 128), "o": (128, 128)}
EXPERT = {"w1": (256, 128), "w3": (256, 128), "w2": (128, 256)}
AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # the column of each 4 bits, lowest first

Packer = Callable[[int, int, Any], tuple[dict[str, Tensor], Tensor]]  # N, K, random numbers -> tensors, their meaning


def linears() -> dict[str, tuple[int, int]]:
    layer = "model.layers.0"
    found = {f"{layer}.self_attn.{name}_proj": shape for name, shape in ATTENTION.items()}
    for expert in range(SIZES["num_local_experts"]):
        found |= {f"{layer}.block_sparse_moe.experts.{expert}.{name}": shape for name, shape in EXPERT.items()}
    return found


def dense(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {"model.embed_tokens": (40, 128), "lm_head": (40, 128), "model.layers.0.block_sparse_moe.gate": (2, 128)}
    found = {f"{name}.weight": torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    norms = ("model.norm", "model.layers.0.input_layernorm", "model.layers.0.post_attention_layernorm")
    return found | {f"{name}.weight": torch.rand(128, generator=generator).to(dtype) for name in norms}


# Another family's names of what Mixtral has: parts of tensors' names, and fields of config.json.
RENAMED = {
    "qwen3_moe": {
        "block_sparse_moe": "mlp",
        **{".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."},
        **{"intermediate_size": "moe_intermediate_size", "num_local_experts": "num_experts"},
    }
}
ADDED: dict[str, dict[str, Any]] = {"qwen3_moe": {"norm_topk_prob": True}}


def rename(name: str, family: str) -> str:
    for ours, theirs in RENAMED.get(family, {}).items():
        name = name.replace(ours, theirs)
    return name


def write(
    folder: Path, packer: Packer, config: Any, only: str = "", family: str = "mixtral", **changes: Any
) -> dict[str, Tensor]:
    """Write a checkpoint whose linears with `only` in their names are packed; return each tensor's values in fp32, by
    the names of a Mixtral.

    family: a model_type, by whose names it is written. changes: tensors by name that replace others; None removes one.
    """
    random = np.random.default_rng(0)
    tensors = dense()
    meaning = {name: tensor.float() for name, tensor in tensors.items()}
    for name, (N, K) in linears().items():
        parts, exact = packer(N, K, random)
        if only not in name:
            parts = {"weight": exact.bfloat16()}
            exact = exact.bfloat16().float()
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        meaning[f"{name}.weight"] = exact
    for name in ("q_norm", "k_norm") if family == "qwen3_moe" else ():
        norm = torch.from_numpy(random.uniform(0.5, 1.5, SIZES["head_dim"])).bfloat16()
        tensors[f"model.layers.0.self_attn.{name}.weight"] = norm
        meaning[f"model.layers.0.self_attn.{name}.weight"] = norm.float()
    tensors = {rename(name, family): tensor for name, tensor in (tensors | changes).items() if tensor is not None}
    save_file(tensors, folder / "model.safetensors")
    values = {rename(name, family): value for name, value in SIZES.items()} | ADDED.get(family, {})
    values |= {"model_type": family} | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(values))
    return meaning


def packed_words(values: np.ndarray, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """[R, n] -> int32 [R, n * bits / 32]; `order`: which value of a word stands in each of its fields."""
    if order is not None:
        values = values.reshape(len(values), -1, len(order))[..., list(order)].reshape(len(values), -1)
    fields = values[..., None] >> np.arange(bits) & 1
    stream = np.packbits(fields.astype(bool).reshape(len(values), -1), axis=1, bitorder="little")
    return torch.from_numpy(np.pad(stream, ((0, 0), (0, -stream.shape[1] % 4))).view(np.int32))


def dequantize(codes: np.ndarray, zeros: Any, scales: Tensor, groups: Any = None) -> Tensor:
    """(code - zero) * scale in fp32: codes [N,K], zeros [N,G], scales [N,G]; the group of each column."""
    K, G = codes.shape[1], scales.shape[1]
    at = np.arange(K) * G // K if groups is None else groups
    zero = zeros if isinstance(zeros, int) else zeros[:, at]
    return torch.from_numpy((codes - zero).astype(np.float32)) * scales.float()[:, at]


def scales_of(random: Any, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.from_numpy(random.uniform(0.005, 0.02, shape)).to(dtype)


def fp8(
    scale: str = "channel", name: str = "weight_scale", dtype: torch.dtype = torch.bfloat16, rows: int = 128
) -> Packer:
    """Pack fp8 with a scale per tensor, channel, or block of rows x 128."""

    def pack(N: int, K: int, random: Any) -> tuple[dict[str, Tensor], Tensor]:
        values = torch.from_numpy(random.uniform(-400, 400, (N, K))).to(torch.float8_e4m3fn)
        shape = {"scalar": (), "tensor": (1,), "channel": (N, 1), "block": (-(-N // rows), K // 128)}[scale]
        scales = scales_of(random, *shape, dtype=dtype) / 16
        of_each = scales[np.arange(N)[:, None] // rows, np.arange(K) // 128] if scale == "block" else scales
        return {"weight": values, name: scales}, values.float() * of_each.float()

    return pack


def int8(N: int, K: int, random: Any) -> tuple[dict[str, Tensor], Tensor]:
    values, scales = random.integers(-128, 128, (N, K)), scales_of(random, N, 1)
    return {"weight": torch.from_numpy(values.astype(np.int8)), "weight_scale": scales}, dequantize(values, 0, scales)


def compressed(bits: int = 4, group: int = 128, zeros: bool = False) -> Packer:
    """Pack compressed-tensors' pack-quantized; group -1: channels."""

    def pack(N: int, K: int, random: Any) -> tuple[dict[str, Tensor], Tensor]:
        G = 1 if group == -1 else K // group
        half = 1 << (bits - 1)
        values, scales = random.integers(-half, half, (N, K)), scales_of(random, N, G)
        parts = {"weight_packed": packed_words(values + half, bits), "weight_scale": scales}
        parts["weight_shape"] = torch.tensor([N, K])
        points = random.integers(-half, half, (N, G)) if zeros else 0
        if zeros:
            parts["weight_zero_point"] = packed_words(points.T + half, bits).t()
        return parts, dequantize(values, points, scales)

    return pack


def gptq(group: int = 128, off: int = 1, symmetric: bool = False, reorder: bool = False) -> Packer:
    """Pack GPTQ; reorder: the groups are scattered over the columns."""

    def pack(N: int, K: int, random: Any) -> tuple[dict[str, Tensor], Tensor]:
        G = 1 if group == -1 else K // group
        codes, scales = random.integers(0, 16, (N, K)), scales_of(random, N, G, dtype=torch.float16)
        zeros = np.full((N, G), 8) if symmetric else random.integers(off, 16, (N, G))
        groups = np.arange(K) * G // K
        groups = random.permutation(groups) if reorder else groups
        parts = {"qweight": packed_words(codes, 4).t(), "qzeros": packed_words(zeros.T - off, 4)}
        parts |= {"scales": scales.t(), "g_idx": torch.from_numpy(groups.astype(np.int32))}
        return parts, dequantize(codes, zeros, scales, groups)

    return pack


def awq(group: int = 128) -> Packer:
    def pack(N: int, K: int, random: Any) -> tuple[dict[str, Tensor], Tensor]:
        codes, zeros = random.integers(0, 16, (N, K)), random.integers(0, 16, (N, K // group))
        scales = scales_of(random, N, K // group, dtype=torch.float16)
        parts = {name: packed_words(x.T, 4, AWQ_COLUMNS) for name, x in (("qweight", codes), ("qzeros", zeros))}
        parts["scales"] = scales.t()
        return parts, dequantize(codes, zeros, scales)

    return pack


def compressed_config(format: str, ignore: Any = ("lm_head",), **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False} | weights}
    group |= {"input_activations": None, "output_activations": None}
    config = {"quant_method": "compressed-tensors", "format": format, "ignore": list(ignore)}
    return config | {"config_groups": {"group_0": group}}


def pack_config(bits: int = 4, group: int = 128, zeros: bool = False) -> dict[str, Any]:
    strategy = {"strategy": "channel"} if group == -1 else {"strategy": "group", "group_size": group}
    return compressed_config("pack-quantized", num_bits=bits, symmetric=not zeros, **strategy)


def gptq_config(group: int = 128, off: int = 1, symmetric: bool = False, **more: Any) -> dict[str, Any]:
    version = "gptq" if off else "gptq_v2"
    config = {"quant_method": "gptq", "bits": 4, "group_size": group, "sym": symmetric, "checkpoint_format": version}
    return config | {"desc_act": group == -1} | more


def awq_config(group: int = 128, **more: Any) -> dict[str, Any]:
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return config | {"modules_to_not_convert": ["gate"]} | more


def fp8_config(strategy: str, **weights: Any) -> dict[str, Any]:
    return compressed_config("float-quantized", strategy=strategy, type="float", num_bits=8, **weights)


LAYOUTS: dict[str, tuple[Packer, dict[str, Any]]] = {
    "ct fp8 channel": (fp8(), fp8_config("channel")),
    "ct fp8 tensor": (fp8("tensor"), fp8_config("tensor")),
    "ct fp8 block": (fp8("block"), fp8_config("block", block_structure=[128, 128])),
    "ct int8": (int8, compressed_config("int-quantized", strategy="channel", num_bits=8)),
    "autofp8": (fp8("scalar", dtype=torch.float32), {"quant_method": "fp8", "ignored_layers": ["lm_head"]}),
    "modelopt": (fp8("scalar", dtype=torch.float32), {"quant_method": "modelopt", "quant_algo": "FP8"}),
}
for _name, _rows in (("fp8 blocks", 128), ("fp8 blocks of 48 rows", 48)):
    _config = {"quant_method": "fp8", "weight_block_size": [_rows, 128], "activation_scheme": "dynamic"}
    LAYOUTS[_name] = (fp8("block", "weight_scale_inv", torch.float32, _rows), _config)
for _group in (128, 64, 32, -1):
    for _zeros in (False, True):
        LAYOUTS[f"ct int4 {_group} {_zeros}"] = (compressed(4, _group, _zeros), pack_config(4, _group, _zeros))
    for _off in (0, 1):
        LAYOUTS[f"gptq {_group} {_off}"] = (gptq(_group, _off), gptq_config(_group, _off))
LAYOUTS["gptq act-order"] = (gptq(64), gptq_config(64, desc_act=True))
LAYOUTS["ct act-order"] = (compressed(4, 64), pack_config(4, 64))
LAYOUTS["ct act-order"][1]["config_groups"]["group_0"]["weights"]["actorder"] = "group"
LAYOUTS["ct pack int8"] = (compressed(8, 64), pack_config(8, 64))
LAYOUTS["ct pack int8 channel"] = (compressed(8, -1), pack_config(8, -1))
LAYOUTS["gptq symmetric"] = (gptq(symmetric=True), gptq_config(symmetric=True))
LAYOUTS |= {f"awq {group}": (awq(group), awq_config(group)) for group in (128, 64, 32)}
