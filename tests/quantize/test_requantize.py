"""`weights=` on a quantized checkpoint: its values, by loops that share no code with the reader, quantized anew."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import Mixtral, verify
from mixtral_triton.quantize import QuantizedWeight, layouts, quantize
from mixtral_triton.quantize.hub import plan, read_headers
from mixtral_triton.weights import parameter_shapes
from tests.model.test_weights import expected
from tests.support import hub

pytestmark = pytest.mark.compiled
BOTH = {"experts": "int4", "linear": "int8"}


def gptq(group: int, off: int = 1, symmetric: bool = False, bits: int = 4, reorder: bool = False) -> Any:
    config = hub.gptq_config(group, off, symmetric, bits=bits, desc_act=reorder or group == -1)
    return hub.gptq(group, off, symmetric, bits, reorder), config


ACT_ORDER = gptq(64, reorder=True)
# Layouts that no kernel runs, and how they are refused.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "act-order": (ACT_ORDER, "the weight is in act-order"),
    "8 bits": (gptq(-1, bits=8), "bits is 8, needs 4"),
    "8 bits act-order": (gptq(32, bits=8, reorder=True), "bits is 8, needs 4"),
    "8 bits symmetric": (gptq(128, 0, True, bits=8), "bits is 8, needs 4"),
    "groups of 16": ((hub.compressed(4, 16), hub.pack_config(4, 16)), "the group size is 16, needs 32, 64, 128"),
}


def load(folder: Path, **options: Any) -> Mixtral:
    return Mixtral.from_pretrained(folder, "cpu", **options)


def different(model: Mixtral, meaning: dict[str, Tensor], formats: dict[str, str | None]) -> list[str]:
    """The names of weights that are not what `meaning` becomes in `formats`; None: dense."""
    wrong = []
    for name, value in expected(model.config, meaning, "per_expert").items():
        format, got = formats.get(name.rpartition(".")[2]), model.named_weights()[name]
        want = value.to(model.dtype).float() if format is None else quantize(value, format).dequantize()
        got = got.dequantize() if isinstance(got, QuantizedWeight) else got.float()
        wrong += [] if torch.equal(got, want) else [name]
    return wrong


EXPERTS = dict.fromkeys(("gate_up_proj", "down_proj"), "int8")
QUANTIZED_PARTS = dict.fromkeys(EXPERTS, "int4") | dict.fromkeys(("qkv_proj", "o_proj", "lm_head"), "int8")


@pytest.mark.filterwarnings("ignore:.*quantized anew")
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_layouts_are_quantized_anew_with_weights(tmp_path: Path, case: str, monkeypatch: Any) -> None:
    layout, message = UNSUPPORTED[case]
    monkeypatch.setattr("mixtral_triton.quantize.hub.PIECE", 5000)
    meaning = hub.write(tmp_path, *layout)
    message = rf"{tmp_path}.*{message}.*; or quantize it anew with weights=\"int8\""
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).isprintable()
    model = load(tmp_path, weights="int8")
    assert different(model, meaning, EXPERTS) == []
    assert different(load(tmp_path, weights=BOTH), meaning, QUANTIZED_PARTS) == []
    report = verify(model, torch.arange(12)[None] % 40, folder=tmp_path)
    assert {row.op for row in report.wrong} <= {"expert_swiglu", "experts_add_rms_norm", "layer"}
    assert all(row.ok for row in report.rows if row.op == "weights") and 0.9 < report.quantization.min_cosine < 1


@pytest.mark.parametrize("layout", [None, "awq 64"], ids=["dense", "quantized"])
def test_a_config_far_beyond_the_files_is_refused_at_once(tmp_path: Path, layout: str | None, monkeypatch: Any) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout or "awq 64"], only="" if layout else "none of them")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 << 30}))
    monkeypatch.setattr("mixtral_triton.weights.table", lambda *args: pytest.fail("lists all tensors of that config"))
    with pytest.raises(ValueError, match="the config asks for"):
        load(tmp_path, weights="int8")


def test_what_is_not_named_stays_as_stored(tmp_path: Path) -> None:
    meaning = hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(tmp_path, weights="int8")
    assert [str(each.message) for each in caught] == [
        f"{tmp_path}: awq is dequantized and quantized anew (weights='int8'); `verify` tells what that costs"
    ]
    exact = expected(model.config, meaning, "per_expert")["layers.0.qkv_proj"]
    assert torch.equal(model.layers[0].qkv_proj.dequantize(), exact)
    assert model.layers[0].down_proj.format == "int8"


def test_a_rank_quantizes_what_one_process_does(tmp_path: Path) -> None:
    from mixtral_triton.parallel import Shard
    from mixtral_triton.quantize.hub import load as fill

    hub.write(tmp_path, *ACT_ORDER)
    whole = load(tmp_path, weights="int8")
    config, headers, parts = whole.config, read_headers(tmp_path), []
    for rank in range(2):
        shard = Shard(tp=2, tp_rank=rank, rank=rank)
        shapes, local = parameter_shapes(config), parameter_shapes(config, shard)
        found = plan(headers, config, shard, "int8")
        specs = shard.specs(found.specs, shapes, local)
        weights: dict[str, Any] = {name: torch.empty(shape) for name, shape in local.items()}
        weights |= {name: spec.empty(local[name], "cpu") for name, spec in specs.items()}
        fill(headers, found, config, weights, shard=shard)
        parts.append(weights["layers.0.down_proj"].dequantize())
    assert torch.equal(torch.cat(parts, dim=-1), whole.layers[0].down_proj.dequantize())


def test_quantize_config_of_autogptq_is_read(tmp_path: Path) -> None:
    config = hub.gptq_config(64)
    for key in ("quant_method", "checkpoint_format"):
        del config[key]
    meaning = hub.write(tmp_path, hub.gptq(64), None)
    (tmp_path / "quantize_config.json").write_text(json.dumps(config | {"model_name_or_path": None}))
    exact = expected(load(tmp_path).config, meaning, "per_expert")["layers.0.qkv_proj"]
    assert torch.equal(load(tmp_path).layers[0].qkv_proj.dequantize(), exact)
    (tmp_path / "quantize_config.json").write_text(json.dumps(config | {"bits": 5}))
    with pytest.raises(ValueError, match=r"quantize_config\.json: .*bits is 5"):
        load(tmp_path)


def test_group_out_of_range_raises_value_error(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    hub.write(tmp_path, *ACT_ORDER, **{f"{name}.g_idx": torch.full((128,), 2, dtype=torch.int32)})
    with pytest.raises(ValueError, match=rf"{name}: g_idx is from 2 to 2, needs groups in 0\.\.1"):
        load(tmp_path, weights="int8")


@pytest.mark.filterwarnings("ignore:.*quantized anew")
@pytest.mark.parametrize("fault", ["groups in order", "no zeros"])
def test_injected_fault_changes_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    check, values = layouts.HubLayout.check, layouts.HubLayout.values
    if fault == "groups in order":
        monkeypatch.setattr(layouts.HubLayout, "check", lambda *args: check(*args).sort().values)
    else:
        monkeypatch.setattr(layouts.HubLayout, "values", lambda self, rows, at: values(self, (*rows[:2], None), at))
    meaning = hub.write(tmp_path, *UNSUPPORTED["8 bits act-order"][0])
    assert different(load(tmp_path, weights="int8"), meaning, EXPERTS)
