"""Each layout of the hub, packed by tests/support/hub.py, loads as the values that it means."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_triton import Mixtral, weights
from mixtral_triton.cli import SMALL, main
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.quantize import QuantizedWeight, layouts
from mixtral_triton.quantize.hub import read_headers
from mixtral_triton.verification.weights import check_loaded
from mixtral_triton.weights import total_bytes
from tests.model.test_weights import expected
from tests.quantize.test_quantize import assert_equals_dequantized_copy
from tests.support import hub

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about files: run once, without the interpreter")
W1, W2, W3 = (f"model.layers.0.block_sparse_moe.experts.1.{name}" for name in ("w1", "w2", "w3"))
Q = "model.layers.0.self_attn.q_proj"


def load(folder: Path, **settings: Any) -> Mixtral:
    return Mixtral.from_pretrained(folder, device="cpu", **settings)


def differs(folder: Path, meaning: dict[str, Tensor]) -> list[str]:
    """Return the names of weights that are not, bit for bit, what the files mean."""
    model = load(folder)
    places = model.named_weights().items()
    got = {name: at.dequantize() if isinstance(at, QuantizedWeight) else at.data.float() for name, at in places}
    wanted = expected(model.config, meaning, "per_expert")
    assert wanted.keys() == got.keys()
    return [name for name in wanted if not torch.equal(wanted[name], got[name])]


@pytest.mark.parametrize("layout", [name for name in hub.LAYOUTS if name != "ct act-order"])
def test_each_layout_loads_exactly(tmp_path: Path, layout: str) -> None:
    packer, config = hub.LAYOUTS[layout]
    assert differs(tmp_path, hub.write(tmp_path, packer, config)) == []
    layer = load(tmp_path).layers[0]
    assert all(isinstance(at, QuantizedWeight) for at in (layer.gate_up_proj, layer.down_proj, layer.qkv_proj))
    assert isinstance(layer.gate, torch.nn.Parameter)


@pytest.mark.parametrize("layout", ["", "awq 32"], ids=["dense", "quantized"])
def test_headers_are_read_and_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    calls: list[str] = []

    def count_calls(name: str) -> None:
        original = getattr(weights, name)
        monkeypatch.setattr(weights, name, lambda *args: (calls.append(name), original(*args))[1])

    hub.write(tmp_path, *hub.LAYOUTS[layout or "awq 32"], only="" if layout else "none of them")
    count_calls("_read_header")
    count_calls("targets")
    load(tmp_path)
    assert calls == ["_read_header", "targets"]


@pytest.mark.parametrize(
    "layout", ["ct fp8 block", "fp8 blocks of 48 rows", "ct int4 32 True", "gptq 64 1", "awq 32", "autofp8"]
)
def test_layouts_load_in_small_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    monkeypatch.setattr("mixtral_triton.quantize.hub.PIECE", 3000)
    assert differs(tmp_path, hub.write(tmp_path, *hub.LAYOUTS[layout])) == []


@pytest.mark.parametrize("layout", ["ct fp8 channel", "ct int4 128 True", "gptq 128 1", "awq 128"])
def test_logits_and_tokens_equal_the_dequantized_model(tmp_path: Path, layout: str) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    assert_equals_dequantized_copy(load(tmp_path, dtype=torch.float32))


def test_only_experts_or_only_attention_quantized(tmp_path: Path) -> None:
    packer, config = hub.LAYOUTS["ct int4 64 False"]
    for only, name in (("experts", "qkv_proj"), ("self_attn", "gate_up_proj")):
        assert differs(tmp_path, hub.write(tmp_path, packer, config, only)) == []
        assert isinstance(getattr(load(tmp_path).layers[0], name), torch.nn.Parameter)


def test_hf_quant_config_and_compression_config_are_read(tmp_path: Path) -> None:
    packer, config = hub.LAYOUTS["modelopt"]
    meaning = hub.write(tmp_path, packer, None)
    ours = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": ["lm_head"]}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(ours))
    assert differs(tmp_path, meaning) == []
    packer, config = hub.LAYOUTS["ct fp8 channel"]
    meaning = hub.write(tmp_path, packer, None)
    (tmp_path / "config.json").write_text(json.dumps(hub.SIZES | {"compression_config": config}))
    assert differs(tmp_path, meaning) == []


def test_scales_of_activations_are_ignored_with_a_warning(tmp_path: Path) -> None:
    one = torch.ones(1)
    more = {f"{W1}.input_scale": one, f"{Q[:-6]}k_proj.k_scale": one.clone(), f"{Q[:-7]}.kv_scale": one.clone()}
    meaning = hub.write(tmp_path, *hub.LAYOUTS["autofp8"], **more)
    with pytest.warns(UserWarning, match=r"3 scales of .* \(input_scale, k_scale, kv_scale\) are not used"):
        assert differs(tmp_path, meaning) == []


@pytest.mark.parametrize("unused", [True, False])
def test_progress_adds_up_and_only_unused_scales_cause_a_warning(tmp_path: Path, unused: bool) -> None:
    more, read = {f"{W1}.input_scale": torch.ones(1)} if unused else {}, list[int]()
    hub.write(tmp_path, *hub.LAYOUTS["autofp8"], **more)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(tmp_path, progress=read.append)
    assert sum(read) == total_bytes(read_headers(tmp_path)) and len(caught) == unused


def test_command_line_prints_the_warning_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((SMALL / "tokenizer.json").read_bytes())
    hub.write(tmp_path, *hub.LAYOUTS["autofp8"], **{f"{W1}.input_scale": torch.ones(1)})
    assert main(["trace", str(tmp_path), "--device", "cpu", "--prompt", "!", "--json"]) == 0
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith(
        f"mixtral-triton trace: {tmp_path}: 1 scales of activations or caches (input_scale) are not"
    )


def test_meta_reads_headers_only(tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["ct int4 128 True"], **{f"{W1}.weight_shape": torch.zeros(2, dtype=torch.int64)})
    model = Mixtral.from_pretrained(tmp_path, device="meta")
    assert all(at.device.type == "meta" for at in model.named_weights().values())
    assert model.layers[0].down_proj.shape == (2, 128, 256)


def test_act_order_without_reordering_and_bias_of_zeros_load(tmp_path: Path) -> None:
    bias = {f"{W1}.bias": torch.zeros(256, dtype=torch.float16)}
    assert differs(tmp_path, hub.write(tmp_path, hub.gptq(128), hub.gptq_config(128, desc_act=True), **bias)) == []


FAULTS: dict[str, tuple[str, str, Any]] = {
    "nibble order of awq": ("awq 128", "AWQ_ORDER", list(hub.AWQ_COLUMNS)),
    "high nibble first": ("ct int4 128 False", "unpacked", lambda x, *_: high_nibble_first(x)),
    "zeros off by one": ("gptq 128 1", "Layout.rows", lambda codes, scales, zeros: (codes, scales, zeros - 1)),
    "rows' scales swapped": ("ct fp8 channel", "Layout.rows", lambda codes, scales, _: (codes, scales.flip(0), None)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_injected_fault_changes_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    layout, name, replacement = FAULTS[fault]
    if name == "Layout.rows":
        rows = layouts.Layout.rows
        monkeypatch.setattr(layouts.Layout, "rows", lambda *args: replacement(*rows(*args)))
    else:
        monkeypatch.setattr(layouts, name, replacement)
    assert differs(tmp_path, hub.write(tmp_path, *hub.LAYOUTS[layout]))


def high_nibble_first(x: Tensor) -> Tensor:
    data = x.contiguous().view(torch.uint8)
    return torch.stack((data >> 4, data & 15), dim=-1).flatten(-2)


def test_swapped_scales_of_w1_and_w3_are_detected(tmp_path: Path) -> None:
    packer, config = hub.LAYOUTS["autofp8"]
    meaning = hub.write(tmp_path, packer, config)
    again = {f"{W1}.weight_scale": torch.tensor(0.25), f"{W3}.weight_scale": torch.tensor(0.5)}
    hub.write(tmp_path, packer, config, **again)
    assert differs(tmp_path, meaning) == ["layers.0.gate_up_proj"]


def test_a_linear_in_several_files_loads(tmp_path: Path) -> None:
    meaning = hub.write(tmp_path, *hub.LAYOUTS["ct int4 64 True"])
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    files = {name: f"{number % 3}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, tmp_path / file)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    assert differs(tmp_path, meaning) == []


def test_tied_head_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "SIZES", hub.SIZES | {"tie_word_embeddings": True})
    embedding = hub.dense()["model.embed_tokens.weight"]
    for head in (None, embedding):
        meaning = hub.write(tmp_path, *hub.LAYOUTS["awq 64"], **{"lm_head.weight": head})
        assert differs(tmp_path, meaning) == []
    hub.write(tmp_path, *hub.LAYOUTS["awq 64"], **{"lm_head.weight": embedding + 1})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path)


def test_deterministic_result_is_independent_of_the_batch(tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["gptq 64 1"])
    model, ids = load(tmp_path, deterministic=True), torch.arange(12).view(3, 4)
    assert torch.equal(model(ids)[1:2], model(ids[1:2]))


@pytest.mark.parametrize("layout", ["ct fp8 tensor", "awq 64"])
def test_verify_finds_changed_scales(tmp_path: Path, layout: str) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    model = load(tmp_path)
    with torch.no_grad():
        assert [row.error for row in check_loaded(tmp_path, model)] == [0.0, 0.0]
        gate_up = model.layers[0].gate_up_proj
        gate_up.scales.copy_(gate_up.scales.flip(1))
        outside, layer = check_loaded(tmp_path, model)
        assert outside.error == 0 and layer.error > 0


def test_verify_finds_swapped_w1_and_w3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = weights.table

    def swapped(*args: Any) -> dict[str, weights.Target]:
        found = table(*args)
        one, three = f"{W1}.weight", f"{W3}.weight"
        return found | {one: found[three], three: found[one]} if one in found else found  # the other layout

    monkeypatch.setattr(weights, "table", swapped)
    hub.write(tmp_path, *hub.LAYOUTS["ct int4 64 False"])
    with torch.no_grad():
        assert check_loaded(tmp_path, load(tmp_path))[1].error > 0
