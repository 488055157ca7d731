"""What verify takes from the files by its own reader: config.json and every layout, with injected faults; what is in
memory at a time."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_triton import Mixtral, MixtralConfig, quantize, verify
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.quantize import layouts
from mixtral_triton.verification.probe import TextReference
from mixtral_triton.verification.stored_tensors import decode
from mixtral_triton.verification.tolerance import ConvertedExperts, token_floor
from tests.support import hub
from tests.support.faults import Inject, Patch, all_dtypes
from tests.support.models import check_loaded, random_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="on the torch backend: run once, without the interpreter")
IDS = torch.arange(12)[None]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


load = partial(Mixtral.from_pretrained, device="cpu")


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A checkpoint that is not quantized, with a window, a theta of 1e6 and positions that bf16 cannot hold."""
    sizes = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}, "sliding_window": 6}
    monkeypatch.setattr(hub, "SIZES", hub.SIZES | sizes | {"max_position_embeddings": 4200, "rms_norm_eps": 1e-5})
    hub.write(tmp_path, hub.awq(), None, only="none of them")
    return tmp_path


def read_config(patch: Patch, **changes: Any) -> None:
    read = MixtralConfig.from_pretrained
    patch.setattr(MixtralConfig, "from_pretrained", lambda folder: replace(read(folder), **changes))


# Written down before any was tried: what is injected, and the case of the first wrong row.
CONFIG_FAULTS: dict[str, tuple[Inject, str]] = {
    "theta 1e4": (partial(read_config, rope_theta=1e4), "rope_theta"),
    "eps x 100": (partial(read_config, rms_norm_eps=1e-3), "rms_norm_eps"),
    "window off": (partial(read_config, sliding_window=None), "sliding_window"),
    "window + 1": (partial(read_config, sliding_window=7), "sliding_window"),
    "top_k 1": (partial(read_config, num_experts_per_tok=1), "num_experts_per_tok"),
    "8 heads for 4": (partial(read_config, **HEADS), "num_attention_heads"),
    "another dtype": (partial(read_config, dtype="float16"), "dtype"),
}


@pytest.mark.exhaustive
@all_dtypes
@pytest.mark.parametrize("fault", [None, *CONFIG_FAULTS])
def test_fault_of_the_config(fault: str | None, dense: Path, dtype: torch.dtype, monkeypatch: Patch) -> None:
    if fault is None:
        assert not verify(load(dense, dtype=dtype), IDS, folder=dense).wrong
        return
    inject, case = CONFIG_FAULTS[fault]
    inject(monkeypatch)
    first = verify(load(dense, dtype=dtype), IDS, folder=dense).wrong[0]
    assert (first.layer, first.op, first.case) == (None, "config", case)


# eos_token_id of config.json and of generation_config.json (MISSING: the field, NO_FILE: the file is not there).
MISSING, NO_FILE = "missing", "no file"
EOS: list[tuple[Any, Any]] = [(2, NO_FILE), (2, 2), (2, 4), (2, [2, 4]), (2, None), ([2, 4], [4, 5]), ([3], MISSING)]
EOS += [(None, [2, 4]), (-1, 4), (MISSING, [4]), (MISSING, NO_FILE)]


def write_eos(folder: Path, of_config: Any, of_generation: Any) -> None:
    for name, value in (("config.json", of_config), ("generation_config.json", of_generation)):
        config = json.loads((folder / name).read_text()) if name == "config.json" else {"temperature": 0.5}
        config.pop("eos_token_id", None)
        if value != NO_FILE:
            (folder / name).write_text(json.dumps(config if value == MISSING else config | {"eos_token_id": value}))


# Those that a faulty loader keeps of the ids of both files, and the ids that these declare.
DROPPED = [((2, [2, 4]), {2}, {2, 4}), ((2, 4), {4}, {2, 4}), ((MISSING, 4), {2}, {2, 4})]
DROPPED += [(([2, 4], [4, 5]), {4, 5}, {2, 4, 5})]


@pytest.mark.parametrize(("of_files", "kept", "declared"), [*((files, None, None) for files in EOS), *DROPPED], ids=str)
def test_ids_that_end_a_text_are_those_of_both_files(
    of_files: Any, kept: Any, declared: Any, dense: Path, monkeypatch: Patch
) -> None:
    write_eos(dense, *of_files)
    if kept is not None:
        read_config(monkeypatch, eos_token_id=tuple(kept))
    report = verify(load(dense), IDS[:, :3], folder=dense, quick=True)
    assert [row.where for row in report.wrong] == ["config (eos_token_id)"] * (kept is not None)
    assert kept is None or f"the model has {kept}, declared is {declared}" in " ".join(str(report).split())


# Written down before any was tried: the layout, and what its reader makes of (codes, scales, zeros), or AWQ's order.
LAYOUT_FAULTS: dict[str, tuple[str, Any]] = {
    "awq in the order of gptq": ("awq 128", list(range(8))),
    "awq in the inverse order": ("awq 64", list(hub.AWQ_COLUMNS)),
    "gptq v1 read as v2": ("gptq 128 1", lambda c, s, z: (c, s, z - 1)),
    "gptq v2 read as v1": ("gptq 64 0", lambda c, s, z: (c, s, z + 1)),
    "sign of int8": ("ct int8", lambda c, s, z: (c ^ 128, s, z)),
    "sign of packed int8": ("ct pack int8", lambda c, s, z: (c ^ 128, s, z)),
    "rows of blocks rolled": ("fp8 blocks of 48 rows", lambda c, s, z: (c, s.roll(48, 0), z)),
    "columns of blocks rolled": ("fp8 blocks", lambda c, s, z: (c, s.roll(1, 1), z)),
    "groups rolled": ("ct int4 32 True", lambda c, s, z: (c, s.roll(1, 1), z)),
    "one scale for all rows": ("ct fp8 channel", lambda c, s, z: (c, s[:1].expand_as(s), z)),
    "scales in bf16": ("gptq 32 0", lambda c, s, z: (c, s.bfloat16().to(s.dtype), z)),
    "zeros with a sign": ("ct int4 64 True", lambda c, s, z: (c, s, z ^ 8)),
    "fp8 without its last bit": ("autofp8", lambda c, s, z: (c & 254, s, z)),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", LAYOUT_FAULTS)
def test_fault_of_a_layout_s_reader(fault: str, tmp_path: Path, monkeypatch: Patch) -> None:
    """Also while verify reads: its decoder shares nothing with the one that loads."""
    layout, change = LAYOUT_FAULTS[fault]
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    rows = layouts.HubLayout.rows
    if isinstance(change, list):
        monkeypatch.setattr(layouts, "AWQ_ORDER", change)
    else:
        monkeypatch.setattr(layouts.HubLayout, "rows", lambda *args: change(*rows(*args)))
    assert {(row.layer, row.op) for row in verify(load(tmp_path), IDS, folder=tmp_path).wrong} == {(0, "weights")}


@pytest.mark.exhaustive
@pytest.mark.parametrize("layout", [name for name in hub.LAYOUTS if name != "ct act-order"])
def test_right_layout(layout: str, tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    report = verify(load(tmp_path), IDS[:, :2], folder=tmp_path)
    assert not report.wrong, str(report)


@pytest.mark.parametrize("off", [0, 1])
def test_act_order_is_decoded(off: int) -> None:
    parts, meaning = hub.gptq(32, off, reorder=True)(16, 64, np.random.default_rng(0))
    assert torch.equal(decode(parts, hub.gptq_config(32, off)), meaning)


def test_one_expert_is_in_fp64_at_a_time_and_references_keep_no_more_than_they_hold(monkeypatch: Patch) -> None:
    alive, most, getitem = list[weakref.ref[Tensor]](), [0], ConvertedExperts.__getitem__

    def counted(experts: Any, expert: Any) -> Any:
        alive.append(weakref.ref(rows := getitem(experts, expert)))
        alive[:] = [each for each in alive if each() is not None]
        most[0] = max(most[0], len(alive))
        return rows

    monkeypatch.setattr(ConvertedExperts, "__getitem__", counted)
    model = random_model(dtype=torch.bfloat16, num_hidden_layers=2)
    verify(model, IDS[:, :4])
    assert most[0] <= 4  # an expert's two projections, and those of the one before: of the layer's 8
    with torch.no_grad():
        text = TextReference(model, model.config, IDS)
    for layer in (*text.layers, *text.fp64_layers):
        tensors = [*layer.inputs, *layer.outputs, layer.ids, layer.weights, layer.logits]
        tensors += [each.exact for each in layer.parts.values()]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors) and len(tensors) >= 11


def test_every_limit_behind_a_cache_of_8_bits_allows_another_code() -> None:
    """A rounding in fp32 may change a code by one: in the layer, in the norm of the next one, and in the logits."""
    model, least = random_model(num_hidden_layers=2), token_floor(torch.float32, quantized=True)
    with torch.no_grad():
        text = TextReference(model, model.config, IDS, torch.int8)
    parts = [part for layer in text.layers for part in layer.parts.values()]
    assert all(part.limit >= least for part in (*parts, text.logits, text.end_to_end))


@pytest.mark.parametrize("name", ["linear", "expert_swiglu", "experts_add_rms_norm"])
def test_fault_smaller_than_the_cost_of_int4(name: str, dense: Path, inject_fault: Callable[[str], None]) -> None:
    inject_fault(name)
    model = load(dense, dtype=torch.float32, weights={"experts": "int4", "linear": "int4"})
    assert {row.op for row in verify(model, IDS[:, :4]).wrong} == {name}


@pytest.mark.parametrize(("format", "factor"), [("int4", 1.1), ("int8", 1.002), ("fp8", 1.01)])
def test_a_wrong_scale_of_one_group_is_found(format: str, factor: float, dense: Path, monkeypatch: Patch) -> None:
    encode = quantize.encode
    rows = check_loaded(dense, load(dense, weights=format))
    assert [(row.case, row.ok) for row in rows] == [("as stored", True), ("as stored", True), ("quantized", True)]

    def change_scale(*args: Any) -> Any:
        codes, scales = encode(*args)
        scales[1, 0] *= factor
        return codes, scales

    monkeypatch.setattr(quantize, "encode", change_scale)
    assert [row.ok for row in check_loaded(dense, load(dense, weights=format))] == [True, True, False]
