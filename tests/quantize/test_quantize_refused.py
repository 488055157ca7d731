"""Unsupported quantized checkpoints raise a ValueError of one line that names the format and an alternative."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_triton import Mixtral
from mixtral_triton.kernels.launch import INTERPRETED
from tests.quantize.test_quantize_hub import W1, Q
from tests.support import hub

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about files: run once, without the interpreter")
PACKED, FP8 = hub.pack_config(), hub.LAYOUTS["ct fp8 channel"][1]


def assert_refused(folder: Path, message: str) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(ValueError, match=message) as caught:
            Mixtral.from_pretrained(folder, device=device)
        line = str(caught.value)
        assert str(folder) in line and line.isprintable() and len(line) < 700


def group(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    """Return the compressed-tensors config with changed arguments of its weights."""
    changed = json.loads(json.dumps(config))
    changed["config_groups"]["group_0"]["weights"] |= weights
    return changed


CONFIGS: dict[str, tuple[Any, str]] = {
    "nf4": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', needs .*nf4.*; or .*weights="),
    "hqq": ({"quant_method": "hqq"}, "quant_method is 'hqq', needs one of compressed-tensors, .*awq .*scales"),
    "mxfp4": ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4', needs .*power of two"),
    "other": (
        {"quant_method": "aqlm"},
        "quant_method is 'aqlm', needs one of .*awq; or .*weights=",
    ),
    "none": ({"bits": 4}, "quant_method is 'None', needs one of"),
    "no object": ("int4", "quantization_config: the value is 'int4', needs a JSON object"),
    "gemv": (hub.awq_config(version="gemv"), "version is 'gemv', needs gemm"),
    "awq no zeros": (hub.awq_config(zero_point=False), "zero_point is False, needs True"),
    "awq names": (hub.awq_config(modules_to_not_convert="gate"), "modules_to_not_convert is 'gate', needs a list"),
    "2 bits": (hub.gptq_config(bits=2), "bits is 2, needs 3 or 4 or 8"),
    "marlin": (hub.gptq_config(checkpoint_format="marlin"), "checkpoint_format is 'marlin', needs gptq or gptq_v2"),
    "is marlin": (hub.gptq_config(is_marlin_format=True), "is_marlin_format is True, needs False"),
    "gptq sym": (hub.gptq_config(sym=3), "sym is 3, needs True or False"),
    "group": (hub.gptq_config(group_size="all"), "group_size is 'all', needs a positive integer"),
    "group 48": (hub.pack_config(group=48), "groups of 48 do not divide 128 columns"),
    "group 0": (hub.pack_config(group=0), "group_size is 0, needs"),
    "nvfp4": (PACKED | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', needs pack-quantized or"),
    "mxfp4 ct": (PACKED | {"format": "mxfp4-pack-quantized"}, "format is 'mxfp4-pack-quantized', needs"),
    "marlin 24": (PACKED | {"format": "marlin-24"}, "format is 'marlin-24', needs"),
    "ct 3 bits": (group(PACKED, num_bits=3), "num_bits is 3, needs 4 or 8"),
    "ct int8 zeros": (group(PACKED, num_bits=8, symmetric=False), "symmetric is False, needs true for 8 bits"),
    "ct tensor": (group(PACKED, strategy="tensor"), "strategy is 'tensor', needs group or channel"),
    "ct dynamic": (group(PACKED, dynamic=True), "dynamic is True, needs False"),
    "ct fp8 group": (group(FP8, strategy="group"), "strategy is 'group', needs channel or tensor or block"),
    "ct fp8 zeros": (group(FP8, symmetric=False), "symmetric is False, needs True"),
    "ct block": (group(FP8, strategy="block", block_structure=[0, 128]), "block_structure is .* needs .rows, columns."),
    "ct no block": (group(FP8, strategy="block"), r"block_structure is None, needs \[rows, columns\]"),
    "ct rotated": (PACKED | {"transform_config": {"config_groups": {"u": {}}}}, "transform_config is .*, needs"),
    "ct sparse": (PACKED | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config is .*, needs"),
    "ct no groups": (PACKED | {"config_groups": {}}, "config_groups is {}, needs an object"),
    "ct no weights": (PACKED | {"config_groups": {"a": {}}}, "config_groups is .*, needs groups with weights"),
    "ct targets": (
        PACKED | {"config_groups": {"a": group(PACKED)["config_groups"]["group_0"] | {"targets": "x"}}},
        "targets is 'x'",
    ),
    "ct pattern": (
        PACKED | {"ignore": ["re:("]},
        r"ignore or targets has the pattern 're:\(', needs a regular expression",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', needs FP8"),
    "block size": ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128, needs"),
    "contradiction": (PACKED | {"ignore": [W1]}, f"{W1} is quantized, but the config declares it dense"),
    "contradiction re": (PACKED | {"ignore": ["re:.*self_attn.*"]}, "self_attn.q_proj is quantized, but the config"),
    "other layout": (hub.awq_config(), r"awq.* asks for: .* unknown \("),
    "other group": (hub.pack_config(group=64), r"weight_scale has shape \(.*, 1\), not \(.*, 2\)"),
    "no zeros": (hub.pack_config(zeros=True), "10 missing .*weight_zero_point"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_unsupported_config_raises_value_error(tmp_path: Path, case: str) -> None:
    config, message = CONFIGS[case]
    hub.write(tmp_path, hub.compressed(), config)
    assert_refused(tmp_path, message)


def ones(*shape: int, dtype: torch.dtype = torch.float32, at: tuple[int, ...] = (), value: float = 1) -> Tensor:
    tensor = torch.ones(shape, dtype=dtype)
    tensor[at] = value
    return tensor


def nan_codes(code: int) -> Tensor:
    return ones(256, 128, dtype=torch.uint8, at=(255, 127), value=code).view(torch.float8_e4m3fn)


def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


SHUFFLED, BF16, FP8_DTYPE = torch.arange(128, dtype=torch.int32) % 2, torch.bfloat16, torch.float8_e4m3fn
GATE, NORM = "model.layers.0.block_sparse_moe.gate.weight", "model.norm.weight"
# A layout, a tensor of W1 (or by its full name) that is replaced (None: removed), and the error.
TENSORS: dict[str, tuple[str, str, Tensor | None, str]] = {
    "act-order": (
        "gptq 64 1",
        "g_idx",
        SHUFFLED,
        f"{W1}: the weight is in act-order .* desc_act false; or quantize it anew",
    ),
    "act-order ct": ("ct int4 64 False", "weight_g_idx", SHUFFLED, f"{W1}: the weight is in act-order"),
    "zero of 16": ("gptq 128 1", "qzeros", zeros(1, 32) - 1, f"{W1}: a stored zero is 15: some readers"),
    "not symmetric": ("gptq symmetric", "qzeros", zeros(1, 32), f"{W1}: a zero is not 8, but the config says"),
    "bias": ("awq 128", "bias", ones(256), f"{W1}: the bias is not 0"),
    "NaN": ("ct fp8 channel", "weight", nan_codes(0x7F), f"{W1}: a weight is NaN .*damaged"),
    "-NaN": ("autofp8", "weight", nan_codes(0xFF), f"{W1}: a weight is NaN .*damaged"),
    "NaN scale": (
        *("ct fp8 channel", "weight_scale", ones(256, 1, dtype=BF16, value=np.nan)),
        f"{W1}: a scale is NaN or infinite.*damaged",
    ),
    "infinite scale": (
        *("awq 64", "scales", ones(2, 256, dtype=torch.float16, at=(1, 7), value=np.inf)),
        f"{W1}: a scale is NaN or infinite.*damaged",
    ),
    "packed shape": (
        "ct int4 128 False",
        "weight_packed",
        zeros(256, 15),
        r"w1\.weight_packed has shape \(256, 15\), not",
    ),
    "weight_shape": (
        "ct int4 128 False",
        "weight_shape",
        torch.tensor([128, 256]),
        r"weight_shape is \[128, 256\], needs",
    ),
    "packed dtype": (
        "ct int4 128 False",
        "weight_packed",
        zeros(256, 16, dtype=torch.int64),
        "stored as I64, needs I32",
    ),
    "act-order without indices": ("ct act-order", "weight_g_idx", None, r"10 missing \(model.*weight_g_idx"),
    "gptq act-order without indices": ("gptq act-order", "g_idx", None, rf"1 missing \({W1}\.g_idx"),
    "dense NaN": (
        "awq 128",
        NORM,
        ones(128, dtype=BF16, at=(5,), value=np.nan),
        rf"{NORM} holds nan at \[5\]: .* damaged",
    ),
    "missing scale": ("ct fp8 channel", "weight_scale", None, rf"1 missing \({W1}\.weight_scale\)"),
    "unknown part": ("autofp8", "pre_quant_scale", ones(128), rf"1 unknown \({W1}\.pre_quant_scale\)"),
    "q alone dense": (
        *("autofp8", f"{Q}.weight", ones(128, 128, dtype=BF16)),
        r"layers\.0\.qkv_proj needs one format, .*k_proj is quantized, .*q_proj\.weight dense",
    ),
    "scales of two dtypes": (
        *("ct fp8 channel", "weight_scale", ones(256, 1)),
        r"layers\.0\.gate_up_proj needs scales of one dtype, .* has torch\.\w+, others torch",
    ),
    "dense of two dtypes": (
        "awq 128",
        NORM,
        ones(128),
        r"tensors of one dtype are needed; .* model\.norm\.weight is F32",
    ),
    "quantized gate": ("autofp8", GATE, zeros(2, 128, dtype=FP8_DTYPE), r"of one dtype are .*gate\.weight is F8_E4M3"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_unsupported_tensors_raise_value_error(tmp_path: Path, case: str) -> None:
    layout, name, tensor, message = TENSORS[case]
    changes = {name if name.startswith("model.") else f"{W1}.{name}": tensor}
    if name == f"{Q}.weight":
        changes[f"{Q}.weight_scale"] = None
    hub.write(tmp_path, *hub.LAYOUTS[layout], **changes)
    with pytest.raises(ValueError, match=message) as caught:
        Mixtral.from_pretrained(tmp_path, device="cpu")
    assert str(tmp_path) in str(caught.value) and str(caught.value).isprintable()


def test_groups_that_do_not_divide_raise_value_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """96 columns in groups of 64."""
    monkeypatch.setattr(hub, "EXPERT", {"w1": (96, 128), "w3": (96, 128), "w2": (128, 96)})
    monkeypatch.setattr(hub, "SIZES", hub.SIZES | {"intermediate_size": 96})
    hub.write(tmp_path, hub.compressed(group=32), hub.pack_config(group=64))
    assert_refused(tmp_path, r"w2: groups of 64 do not divide 96 columns")


def test_gguf_raises_value_error(tmp_path: Path) -> None:
    (tmp_path / "mixtral.Q4_0.gguf").write_bytes(b"GGUF")
    assert_refused(tmp_path, r"'mixtral.Q4_0.gguf' is GGUF, needs safetensors")


def test_codes_without_a_config_raise_value_error(tmp_path: Path) -> None:
    hub.write(tmp_path, hub.compressed(), None)
    assert_refused(tmp_path, r"is stored as 'I(32|64)', needs one of F32, BF16, F16")


DROPPED = object()
ODD = (None, 0, -1, 3, 1.5, "x", "", [], {}, [1], ["a"], {"a": 1}, True, False, 10**30, [[128]], "re:(", DROPPED)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Return every container and key in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, inner in items for place in ((value, key), *places(inner))]


@pytest.mark.parametrize("layout", hub.LAYOUTS)
def test_random_config_loads_or_raises_value_error(tmp_path: Path, layout: str) -> None:
    packer, config = hub.LAYOUTS[layout]
    hub.write(tmp_path, packer, config)
    random = np.random.default_rng(3)
    for _ in range(12):
        changed = json.loads(json.dumps(config))
        holder, key = places(changed)[random.integers(len(places(changed)))]
        if (value := ODD[random.integers(len(ODD))]) is DROPPED:
            del holder[key]
        else:
            holder[key] = value
        (tmp_path / "config.json").write_text(json.dumps(hub.SIZES | {"quantization_config": changed}))
        try:
            Mixtral.from_pretrained(tmp_path, device="meta")
        except ValueError as error:
            assert str(tmp_path) in str(error) and str(error).isprintable() and len(str(error)) < 900
