"""`stored_config`: quantized checkpoints in transformers, experts as stored, and refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from mixtral_triton import register, stored_config, verify
from mixtral_triton.hf import stored as stored_module
from mixtral_triton.hf.experts import PROJECTIONS
from mixtral_triton.kernels.weights.formats import FORMATS
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.verification.stored_tensors import check_stored
from tests.support.families import EXPERTS_REFUSED, LIMIT, NOT_TRIED, VERSION, experts_of, marked_families
from tests.support.hub import LAYOUTS, compressed, compressed_config, fp8, gptq, gptq_config, pack_config
from tests.support.stored import EXPERTS, IDS, INT4, load, write_quantized

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(VERSION < (5, 17), reason="earlier ones have no hook for the conversions"),
]
# Families whose files, as transformers writes them, have no tensor an expert, and those with another conversion.
FUSED = {"gemma4_text", "granitemoe", "granitemoe_swa", "granitemoehybrid", "granitemoeshared", "hy_v4"}
FUSED |= {"inkling_text", "minimax_m3_vl_text", "zaya"}
register()


def agrees(model: Any, exact: Path, quantized: bool = True) -> bool:
    """Whether the experts' values and every parameter are those of the exact folder, and the logits nearly."""
    dense = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    for ours, theirs in zip(experts_of(model).values(), experts_of(dense).values(), strict=True):
        for key in PROJECTIONS:
            weight = getattr(ours, key)
            assert isinstance(weight, QuantizedWeight) == quantized
            assert torch.equal(weight.dequantize() if quantized else weight, getattr(theirs, key))
    want = dict(dense.named_parameters())
    assert all(torch.equal(x, want[name]) for name, x in model.named_parameters())
    with torch.no_grad():
        got, logits = model(IDS).logits, dense(IDS).logits
    return bool((got - logits).abs().max() <= LIMIT * logits.abs().max())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "mixtral"])
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"ct act-order"}))
def test_every_layout_is_read_exactly(layout: str, family: str, tmp_path: Path) -> None:
    stored, exact = write_quantized(family, tmp_path, *LAYOUTS[layout])
    assert agrees(load(stored), exact)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [name for name in marked_families() if name not in NOT_TRIED | EXPERTS_REFUSED])
def test_every_family_is_read_exactly(family: str, tmp_path: Path) -> None:
    only = EXPERTS if family == "lara_mini" else ""  # its attention has another conversion
    stored, exact = write_quantized(family, tmp_path, *LAYOUTS[INT4], only=only)
    if family in FUSED | {"lara_mini"}:
        with pytest.warns(UserWarning, match="its experts are not quantized one by one: all is dense"):
            assert agrees(load(stored), exact, quantized=False)
    else:
        assert agrees(load(stored), exact)


MIXED = compressed_config("pack-quantized", num_bits=4, strategy="group", group_size=32)
MIXED["config_groups"]["group_0"] |= {"targets": [r"re:.*\.experts\..*"]}
EIGHT = compressed_config("float-quantized", strategy="channel", type="float", num_bits=8)["config_groups"]["group_0"]
MIXED["config_groups"]["group_1"] = EIGHT | {"targets": [r"re:.*self_attn.*"], "format": "float-quantized"}


def by_name(N: int, K: int, random: Any) -> tuple[dict[str, Tensor], Tensor]:
    """fp8 for the square linears of attention, int4 for experts, which are not."""
    return fp8()(N, K, random) if (N, K) not in ((256, 128), (128, 256)) else compressed(4, 32)(N, K, random)


def test_mixed_schemes_and_dense_layers(tmp_path: Path) -> None:
    for name, packer, config, only in (
        ("fp8 attention", by_name, MIXED, r"[qo]_proj|" + EXPERTS),
        ("dense attention", *LAYOUTS["fp8 blocks"], EXPERTS),
    ):
        (folder := tmp_path / name).mkdir()
        assert agrees(load(write_quantized("olmoe", folder, packer, config, only)[0]), folder / "exact")
    stored, _ = write_quantized("olmoe", tmp_path, *LAYOUTS["fp8 blocks"], only=r"layers\.1\." + ".*")
    model = load(stored)
    first, second = experts_of(model).values()
    assert isinstance(first.down_proj, Tensor) and isinstance(second.down_proj, QuantizedWeight)
    with torch.no_grad():
        assert model(IDS).logits.isfinite().all()


def test_a_stored_model_runs_verify_and_keeps_its_scales_in_16_bits(tmp_path: Path) -> None:
    stored, _ = write_quantized("qwen3_moe", tmp_path, *LAYOUTS["awq 32"])
    model = load(stored, dtype="auto", device_map="auto", attn_implementation="mixtral_triton")
    weight = model.model.layers[0].mlp.experts.down_proj
    assert model.dtype == torch.bfloat16 and weight.scales.dtype == torch.float16 and weight.zeros is not None
    report = verify(model)
    assert report.ok, str(report)
    assert [row.layer for row in report.rows if row.op == "weights"] == [0, 1]
    tensors = load_file(stored / "model.safetensors")
    tensors = {name: x.clone() for name, x in tensors.items() if f"{NAME}." not in name}  # one expert is missing
    save_file(tensors, stored / "model.safetensors", {"format": "pt"})
    experts = dict(enumerate(experts_of(model).values()))
    assert [row.ok for row in check_stored(experts, stored)] == [True, False]


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"ct act-order"}))
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
def test_verify_compares_stored_experts_with_their_files(family: str, layout: str, tmp_path: Path) -> None:
    stored, _ = write_quantized(family, tmp_path, *LAYOUTS[layout])
    model = load(stored)
    experts: Any = [*experts_of(model).values()]

    def right() -> list[bool]:
        return [row.ok for row in verify(model).rows if row.op == "weights"]

    assert right() == [True, True]
    if FORMATS[experts[1].down_proj.format].float_dtype is None:
        experts[1].down_proj.data[2, 5, 3] ^= 16
        assert right() == [True, False]
        experts[1].down_proj.data[2, 5, 3] ^= 16
    experts[0].gate_up_proj.scales[3] *= 2
    assert right() == [False, True]
    experts[0].gate_up_proj, experts[1].gate_up_proj = experts[1].gate_up_proj, experts[0].gate_up_proj
    assert right() == [False, False]
    (stored / "config.json").unlink()
    assert right() == [] and "needs their folder" in str(verify(model))


NAME = "model.layers.1.mlp.experts.3.down_proj"
PARTS = "weight_packed", "weight_scale", "weight_shape"
Change = Callable[[dict[str, Tensor]], Any]
REFUSED: dict[str, tuple[Any, dict[str, Any], Change, str]] = {
    "a missing part": (
        *LAYOUTS[INT4],
        lambda x: x.pop(f"{NAME}.weight_scale"),
        r"1 missing \(.*3.down_proj.weight_scale",
    ),
    "missing codes": (*LAYOUTS[INT4], lambda x: x.pop(f"{NAME}.weight_packed"), "needs weight_packed of codes"),
    "a missing linear": (
        *LAYOUTS[INT4],
        lambda x: [x.pop(f"{NAME}.{part}") for part in PARTS],
        "rows of all experts for model.layers.1.mlp.experts.down_proj is 384, needs 512 by the config",
    ),
    "all experts of a layer": (
        *LAYOUTS[INT4],
        lambda x: [x.pop(name) for name in [*x] if "layers.1.mlp.experts." in name],
        r"2 missing \(model.layers.1.mlp.experts.down_proj, model.layers.1.mlp.experts.gate_up_proj\)",
    ),
    "a part too much": (
        *LAYOUTS[INT4],
        lambda x: x.update({f"{NAME}.odd": torch.zeros(1)}),
        r"unknown \(.*down_proj.odd",
    ),
    "another shape": (
        *LAYOUTS[INT4],
        lambda x: x.update({f"{NAME}.weight_scale": torch.ones(128, 4)}),
        r"down_proj.weight_scale has shape \(128, 4\), not \(128, 8\)",
    ),
    "NaN": (*LAYOUTS[INT4], lambda x: x[f"{NAME}.weight_scale"][5].fill_(math.nan), "3.down_proj: a scale is NaN"),
    "another expert": (
        *LAYOUTS["fp8 blocks"],
        lambda x: x.update({key.replace(".3.", ".4."): y.clone() for key, y in [*x.items()] if NAME in key}),
        "experts.4.down_proj: expert is '4', needs 0 to 3 by the config",
    ),
    "a dense expert": (
        *LAYOUTS["fp8 blocks"],
        lambda x: (x.pop(f"{NAME}.weight_scale_inv"), x.update({f"{NAME}.weight": torch.zeros(128, 256).bfloat16()})),
        "needs one format, .* is quantized, .* dense",
    ),
    "act-order": (
        gptq(64, reorder=True),
        gptq_config(64, desc_act=True),
        len,
        "act-order .* original 16-bit checkpoint",
    ),
    "groups of 16": (
        compressed(4, 16),
        pack_config(4, 16),
        len,
        "group size is 16, needs 32, 64, 128 or a scale per row",
    ),
}


LAST = "model.layers.1."
TENSORS = [LAST + name for name in ("self_attn.v_proj", "mlp.gate", "input_layernorm")]
TENSORS += ["model.norm", "model.embed_tokens", "lm_head"]


def half(x: dict[str, Tensor]) -> None:
    """As of another number of heads."""
    x[f"{LAST}self_attn.k_proj.weight"] = x[f"{LAST}self_attn.k_proj.weight"][:32].clone()


def one_more(x: dict[str, Tensor]) -> None:
    x |= {name.replace(".3.", ".4."): x[name].clone() for name in [*x] if f"{LAST}mlp.experts.3." in name}


# What is dense in a file whose linears of these names are quantized.
REFUSED_DENSE: dict[str, tuple[str, Change, str]] = {
    **{f"no {x}": (EXPERTS, lambda y, x=x: y.pop(f"{x}.weight"), rf"1 missing \({x}.weight\)") for x in TENSORS},
    "no q_proj": (
        "",
        lambda x: [x.pop(f"{LAST}self_attn.q_proj.{y}") for y in PARTS],
        rf"1 missing \({LAST}self_attn.q_proj.weight\)",
    ),
    "heads": (EXPERTS, half, r"k_proj.weight has shape \(32, 128\), not \(64, 128\)"),
    "NaN in lm_head": (
        EXPERTS,
        lambda x: x["lm_head.weight"][3, 2].fill_(math.nan),
        "lm_head.weight in .* is 'not finite",
    ),
    "an expert more": ("self_attn", one_more, "experts.4.down_proj: expert is '4', needs 0 to 3 by the config"),
    "an expert less": (
        "self_attn",
        lambda x: x.pop(f"{NAME}.weight"),
        "rows of all experts for model.layers.1.mlp.experts.down_proj is 384, needs 512",
    ),
    "a linear more": (
        "",
        lambda x: x.update({f"{LAST}mlp.odd.{y}": x[f"{NAME}.{y}"].clone() for y in PARTS}),
        "mlp.odd is 'quantized'",
    ),
}


SLOW = [pytest.param(f"no {x}", marks=pytest.mark.slow) for x in TENSORS[1:]]


@pytest.mark.parametrize("fault", [*REFUSED, *(x for x in REFUSED_DENSE if x[3:] not in TENSORS[1:]), *SLOW])
def test_faults_reach_the_user_in_one_line(fault: str, tmp_path: Path) -> None:
    dense = REFUSED_DENSE.get(fault)
    only, *others = ("", *REFUSED[fault]) if dense is None else (dense[0], *LAYOUTS[INT4], *dense[1:])
    packer, config, change, message = others
    stored, _ = write_quantized("qwen3_moe", tmp_path, packer, config, only, change)
    with pytest.raises(ValueError, match=message) as error:
        load(stored)
    print(error.value)
    assert "\n" not in str(error.value)


METHODS: dict[str, dict[str, Any]] = {
    "quant_method is 'mxfp4'": {"quant_method": "mxfp4"},
    "quant_method is 'bitsandbytes'": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "quant_method is 'hqq'": {"quant_method": "hqq"},
    "transform_config is ": pack_config() | {"transform_config": {"config_groups": {"R1": {}}}},
    "quant_algo is 'NVFP4'": {"quant_method": "modelopt", "quant_algo": "NVFP4"},
    "format is 'nvfp4-pack-quantized'": compressed_config("nvfp4-pack-quantized", num_bits=4),
    "is dense, and loads with quantization_config=ExpertsConfig": {},
}


def test_other_methods_and_dense_checkpoints_are_refused_by_stored_config(tmp_path: Path) -> None:
    stored, exact = write_quantized("olmoe", tmp_path, *LAYOUTS["modelopt"])
    values = json.loads((exact / "config.json").read_text())
    for message, config in METHODS.items():
        (exact / "config.json").write_text(json.dumps(values | ({"quantization_config": config} if config else {})))
        with pytest.raises(ValueError, match=message):
            stored_config(exact)
    (exact / "config.json").write_text(json.dumps(values))
    (stored / "config.json").write_text(json.dumps(values))
    (stored / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert agrees(load(stored), exact)


def test_every_file_of_the_hub_is_of_the_revision(tmp_path: Path, monkeypatch: Any) -> None:
    stored, revisions = write_quantized("olmoe", tmp_path, *LAYOUTS["modelopt"])[0], list[Any]()
    values = json.loads((stored / "config.json").read_text())
    (stored / "hf_quant_config.json").write_text(json.dumps({"quantization": values.pop("quantization_config")}))
    (stored / "config.json").write_text(json.dumps(values))
    config, cached_file = AutoConfig.from_pretrained, stored_module.cached_file
    spy = lambda run: lambda *args, **kwargs: revisions.append(kwargs.get("revision")) or run(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(stored_module.AutoConfig, "from_pretrained", spy(config))
    monkeypatch.setattr(stored_module, "cached_file", spy(cached_file))
    stored_config(stored, revision="v9")
    assert revisions == ["v9", "v9"]
