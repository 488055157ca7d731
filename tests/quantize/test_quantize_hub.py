"""Each layout of the hub, packed by tests/support/hub.py, loads as the values that it means; others are rejected."""

import copy
import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mixtral_triton import Mixtral
from mixtral_triton.checkpoint import tensors as checkpoint
from mixtral_triton.checkpoint.tensors import total_bytes
from mixtral_triton.quantize import QuantizedWeight
from mixtral_triton.quantize.hub import read_headers
from tests.model.test_weights import expected, save
from tests.support import hub

pytestmark = pytest.mark.compiled
W1, Q = "model.layers.0.block_sparse_moe.experts.1.w1", "model.layers.0.self_attn.q_proj"


load = partial(Mixtral.from_pretrained, device="cpu")
CPU = torch.device("cpu")


def differs(folder: Path, meaning: dict[str, Tensor], device: torch.device = CPU) -> list[str]:
    """Return the names of weights that are not, bit for bit, what the files mean."""
    model = load(folder, device=device)
    places = model.named_weights().items()
    got = {name: at.dequantize() if isinstance(at, QuantizedWeight) else at.data.float() for name, at in places}
    wanted = expected(model.config, meaning, "per_expert")
    assert wanted.keys() == got.keys() and {x.device.type for x in got.values()} == {device.type}
    return [name for name in wanted if not torch.equal(wanted[name], got[name].cpu())]


@pytest.mark.parametrize("layout", [name for name in hub.LAYOUTS if name != "ct act-order"])
def test_each_layout_loads_exactly(
    tmp_path: Path, layout: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    packer, config = hub.LAYOUTS[layout]
    meaning = hub.write(tmp_path, packer, config)
    assert differs(tmp_path, meaning, device) == []
    layer = load(tmp_path, device=device).layers[0]
    assert all(isinstance(at, QuantizedWeight) for at in (layer.gate_up_proj, layer.down_proj, layer.qkv_proj))
    assert isinstance(layer.gate, torch.nn.Parameter)
    monkeypatch.setattr("mixtral_triton.quantize.PIECE", 3000)
    assert differs(tmp_path, meaning, device) == []


@pytest.mark.parametrize("layout", ["", "awq 32"], ids=["dense", "quantized"])
def test_headers_are_read_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout or "awq 32"], only="" if layout else "none of them")
    spies = [mock.Mock(side_effect=getattr(checkpoint, name)) for name in ("_read_header", "destinations")]
    monkeypatch.setattr(checkpoint, "_read_header", spies[0])
    monkeypatch.setattr(checkpoint, "destinations", spies[1])
    load(tmp_path)
    assert [spy.call_count for spy in spies] == [1, 1]


def test_a_part_of_the_linears_and_a_linear_in_several_files_load(tmp_path: Path) -> None:
    packer, config = hub.LAYOUTS["ct int4 64 False"]
    for only, name in (("experts", "qkv_proj"), ("self_attn", "gate_up_proj")):
        assert differs(tmp_path, hub.write(tmp_path, packer, config, only)) == []
        assert isinstance(getattr(load(tmp_path).layers[0], name), torch.nn.Parameter)
    meaning = hub.write(tmp_path, *hub.LAYOUTS["ct int4 64 True"])
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    assert differs(save(tmp_path, tensors, shards=3), meaning) == []


def test_act_order_without_reordering_and_other_places_of_the_config(tmp_path: Path) -> None:
    bias = {f"{W1}.bias": torch.zeros(256, dtype=torch.float16)}
    assert differs(tmp_path, hub.write(tmp_path, hub.gptq(128), hub.gptq_config(128, desc_act=True), **bias)) == []
    meaning = hub.write(tmp_path, hub.LAYOUTS["modelopt"][0], None)
    ours = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(ours))
    assert differs(tmp_path, meaning) == []


@pytest.mark.parametrize("unused", [True, False])
def test_progress_adds_up_and_only_unused_scales_cause_a_warning(tmp_path: Path, unused: bool) -> None:
    names, read = (f"{W1}.input_scale", f"{Q[:-6]}k_proj.k_scale", f"{Q[:-7]}.kv_scale") if unused else (), list[int]()
    meaning = hub.write(tmp_path, *hub.LAYOUTS["autofp8"], **{name: torch.ones(1) for name in names})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tmp_path, progress=read.append)
        assert differs(tmp_path, meaning) == []
    assert sum(read) == total_bytes(read_headers(tmp_path)) and bool(caught) == unused
    assert all("3 scales of activations or caches (input_scale, k_scale, kv_scale)" in str(w.message) for w in caught)


def test_meta_reads_headers_only(tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["ct int4 128 True"], **{f"{W1}.weight_shape": torch.zeros(2, dtype=torch.int64)})
    model = Mixtral.from_pretrained(tmp_path, device="meta")
    assert all(at.device.type == "meta" for at in model.named_weights().values())
    assert model.layers[0].down_proj.shape == (2, 128, 256)


# Unsupported checkpoints raise a ValueError of one line that names the format and an alternative.
PACKED, FP8 = hub.pack_config(), hub.LAYOUTS["ct fp8 channel"][1]


def assert_refused(folder: Path, message: str, *devices: str) -> None:
    for device in devices or ("cpu", "meta"):
        with pytest.raises(ValueError, match=message) as caught:
            Mixtral.from_pretrained(folder, device=device)
        line = str(caught.value)
        assert str(folder) in line and line.isprintable() and len(line) < 700


def group(config: dict[str, Any], **weights: Any) -> dict[str, Any]:
    """Return the compressed-tensors config with changed arguments of its weights."""
    changed = copy.deepcopy(config)
    changed["config_groups"]["group_0"]["weights"] |= weights
    return changed


GROUP = PACKED["config_groups"]["group_0"]
CONFIGS: dict[str, tuple[Any, str]] = {
    "nf4": ({"quant_method": "bitsandbytes"}, "quant_method is 'bitsandbytes', needs one of .*awq; or .*weights="),
    "none": ({"bits": 4}, "quant_method is 'None', needs one of"),
    "no object": ("int4", "quantization_config: the value is 'int4', needs a JSON object"),
    "gemv": (hub.awq_config(version="gemv"), "version is 'gemv', needs gemm"),
    "awq no zeros": (hub.awq_config(zero_point=False), "zero_point is False, needs True"),
    "3 bits": (hub.gptq_config(bits=3), "bits is 3, needs 4"),
    "marlin": (hub.gptq_config(checkpoint_format="marlin"), "checkpoint_format is 'marlin', needs gptq or gptq_v2"),
    "is marlin": (hub.gptq_config(is_marlin_format=True), "is_marlin_format is True, needs False"),
    "group": (hub.gptq_config(group_size="all"), "group_size is 'all', needs a positive integer"),
    "group 48": (hub.pack_config(group=48), "the group size is 48, needs a divisor of 128 columns"),
    "group 0": (hub.pack_config(group=0), "group_size is 0, needs"),
    "nvfp4": (PACKED | {"format": "nvfp4-pack-quantized"}, "format is 'nvfp4-pack-quantized', needs pack-quantized or"),
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
    "ct targets": (PACKED | {"config_groups": {"a": GROUP | {"targets": "x"}}}, "targets is 'x'"),
    "ct pattern": (
        PACKED | {"config_groups": {"a": GROUP | {"targets": ["re:("]}}},
        r"has the pattern 're:\(', needs a",
    ),
    "modelopt": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "quant_algo is 'NVFP4', needs FP8"),
    "block size": ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size is 128, needs"),
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


zeros = partial(torch.zeros, dtype=torch.int32)


SHUFFLED, BF16, FP8_DTYPE = torch.arange(128, dtype=torch.int32) % 2, torch.bfloat16, torch.float8_e4m3fn
GATE, NORM = "model.layers.0.block_sparse_moe.gate.weight", "model.norm.weight"
INT4, BAD_SCALE = "ct int4 128 False", f"{W1}: a scale is NaN or infinite.*damaged"
# A layout, a tensor of W1 (or by its full name) that is replaced (None: removed), and the error.
TENSORS: dict[str, tuple[str, str, Tensor | None, str]] = {
    "act-order": ("gptq 64 1", "g_idx", SHUFFLED, f"{W1}: the weight is in act-order .* desc_act false; or quant"),
    "act-order ct": ("ct int4 64 False", "weight_g_idx", SHUFFLED, f"{W1}: the weight is in act-order"),
    "zero of 16": ("gptq 128 1", "qzeros", zeros(1, 32) - 1, f"{W1}: a stored zero is 15: some readers"),
    "not symmetric": ("gptq symmetric", "qzeros", zeros(1, 32), f"{W1}: a zero is not 8, but the config says"),
    "bias": ("awq 128", "bias", ones(256), f"{W1}: the largest bias is 1.0, needs 0"),
    "NaN": ("ct fp8 channel", "weight", nan_codes(0x7F), f"{W1}: a weight is NaN .*damaged"),
    "-NaN": ("autofp8", "weight", nan_codes(0xFF), f"{W1}: a weight is NaN .*damaged"),
    "NaN scale": ("ct fp8 channel", "weight_scale", ones(256, 1, dtype=BF16, value=np.nan), BAD_SCALE),
    "infinite scale": ("awq 64", "scales", ones(2, 256, dtype=torch.float16, at=(1, 7), value=np.inf), BAD_SCALE),
    "packed shape": (INT4, "weight_packed", zeros(256, 15), r"w1\.weight_packed has shape \(256, 15\), not"),
    "weight_shape": (INT4, "weight_shape", torch.tensor([128, 256]), r"weight_shape is \[128, 256\], needs"),
    "packed dtype": (INT4, "weight_packed", zeros(256, 16, dtype=torch.int64), "stored as I64, needs I32"),
    "act-order without indices": ("ct act-order", "weight_g_idx", None, r"10 missing \(model.*weight_g_idx"),
    "gptq act-order without indices": ("gptq act-order", "g_idx", None, rf"1 missing \({W1}\.g_idx"),
    "dense NaN": ("awq 128", NORM, ones(128, dtype=BF16, at=(5,), value=np.nan), rf"{NORM} is not finite .* dam"),
    "missing scale": ("ct fp8 channel", "weight_scale", None, rf"1 missing \({W1}\.weight_scale\)"),
    "unknown part": ("autofp8", "pre_quant_scale", ones(128), rf"1 unknown \({W1}\.pre_quant_scale\)"),
    "q alone dense": ("autofp8", f"{Q}.weight", ones(128, 128, dtype=BF16), r"k_proj is quantized, .*q_proj\.weight d"),
    "scales of two dtypes": ("ct fp8 channel", "weight_scale", ones(256, 1), "gate_up_proj needs one format, .*float"),
    "dense of two dtypes": ("awq 128", NORM, ones(128), r"of one dtype are needed; .* model\.norm\.weight is F32"),
    "quantized gate": ("autofp8", GATE, zeros(2, 128, dtype=FP8_DTYPE), r"of one dtype are .*gate\.weight is F8_E4M3"),
}


@pytest.mark.parametrize("case", TENSORS)
def test_unsupported_tensors_raise_value_error(tmp_path: Path, case: str) -> None:
    layout, name, tensor, message = TENSORS[case]
    changes = {name if name.startswith("model.") else f"{W1}.{name}": tensor}
    if name == f"{Q}.weight":
        changes[f"{Q}.weight_scale"] = None
    hub.write(tmp_path, *hub.LAYOUTS[layout], **changes)
    assert_refused(tmp_path, message, "cpu")


def test_other_groups_codes_and_files_raise_value_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.write(tmp_path, hub.compressed(), None)
    assert_refused(tmp_path, r"is stored as 'I(32|64)', needs one of F32, BF16, F16")
    monkeypatch.setattr(hub, "EXPERT", {"w1": (96, 128), "w3": (96, 128), "w2": (128, 96)})
    monkeypatch.setattr(hub, "SIZES", hub.SIZES | {"intermediate_size": 96})
    hub.write(tmp_path, hub.compressed(group=32), hub.pack_config(group=64))
    assert_refused(tmp_path, r"w2: the group size is 64, needs a divisor of 96 columns")


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
        changed = copy.deepcopy(config)
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
