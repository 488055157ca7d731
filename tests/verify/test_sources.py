"""What verify takes from the files by its own reader: config.json and every layout, with injected faults."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_triton import Mixtral, MixtralConfig, model, verification, verify, weights
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.model import State
from mixtral_triton.quantize import layouts
from mixtral_triton.verification import layers, source, targets
from mixtral_triton.verification.layers import ModelUnderTest, compare_layers
from mixtral_triton.verification.source import Source, decode
from mixtral_triton.verification.weights import estimate
from tests.support import hub
from tests.support.faults import Inject, Patch, all_dtypes, change_state, in_router, one_at_a_time
from tests.support.models import check_loaded, random_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about files: run once, without the interpreter")
IDS = torch.arange(12)[None]
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}


def load(folder: Path, **options: Any) -> Mixtral:
    return Mixtral.from_pretrained(folder, "cpu", **options)


@pytest.fixture
def dense(tmp_path: Path, monkeypatch: Patch) -> Path:
    """A checkpoint that is not quantized, with a window, a theta of 1e6 and positions that bf16 cannot hold."""
    sizes = {"rope_theta": None, "rope_parameters": {"rope_theta": 1e6}, "sliding_window": 6}
    monkeypatch.setattr(hub, "SIZES", hub.SIZES | sizes | {"max_position_embeddings": 4200, "rms_norm_eps": 1e-5})
    hub.write(tmp_path, hub.awq(), None, only="none of them")
    return tmp_path


def read_config(patch: Patch, **changes: Any) -> None:
    """The config's reader gives other values."""
    read = MixtralConfig.from_pretrained
    patch.setattr(MixtralConfig, "from_pretrained", lambda folder: replace(read(folder), **changes))


def change_tables(patch: Patch, positions: torch.dtype = torch.float32, theta: float | None = None) -> None:
    def tables(base: float, P: int, D: int, device: Any) -> tuple[Tensor, Tensor]:
        angles = torch.arange(P).to(positions).float()[:, None]
        angles = angles * (1.0 / (theta or base) ** (torch.arange(0, D, 2).float() / D))
        return angles.cos().to(device), angles.sin().to(device)

    patch.setattr(model, "rope_tables", tables)


def round_positions(state: State) -> None:
    if not state.decodes:
        state.positions = state.positions.bfloat16().long()


# Written down before any was tried: what is injected, and the case of the first wrong row.
CONFIG_FAULTS: dict[str, tuple[Inject, str]] = {
    "theta 1e4": (partial(read_config, rope_theta=1e4), "rope_theta"),
    "eps x 100": (partial(read_config, rms_norm_eps=1e-3), "rms_norm_eps"),
    "window off": (partial(read_config, sliding_window=None), "sliding_window"),
    "window + 1": (partial(read_config, sliding_window=7), "sliding_window"),
    "top_k 1": (partial(read_config, num_experts_per_tok=1), "num_experts_per_tok"),
    "8 heads for 4": (partial(read_config, **HEADS), "num_attention_heads"),
    "another dtype": (partial(read_config, dtype="float16"), "dtype"),
    "theta 1e4 in the tables": (partial(change_tables, theta=1e4), "rotary tables"),
    "positions in bf16 in the tables": (partial(change_tables, positions=torch.bfloat16), "rotary tables"),
    "positions in bf16": (change_state(round_positions), "positions"),
    "eps x 100 in the router": (in_router(rms_norm_eps=1e-3), "rms_norm_eps"),
    "top_k 1 in the router": (in_router(num_experts_per_tok=1), "num_experts_per_tok"),
    "window off in attention": (change_state(lambda state: setattr(state, "window", None)), "sliding_window"),
}


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


def test_head_that_is_tied_against_the_config(dense: Path) -> None:
    tied = load(dense)
    tied.lm_head = tied.embed_tokens
    first = verify(tied, IDS, folder=dense).wrong[0]
    assert (first.op, first.case) == ("config", "tie_word_embeddings")


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


@pytest.mark.parametrize("layout", [name for name in hub.LAYOUTS if name != "ct act-order"])
def test_right_layout(layout: str, tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    report = verify(load(tmp_path), IDS[:, :2], folder=tmp_path)
    assert not report.wrong, str(report)


@pytest.mark.parametrize("off", [0, 1])
def test_act_order_is_decoded(off: int) -> None:
    parts, meaning = hub.gptq(32, off, reorder=True)(16, 64, np.random.default_rng(0))
    assert torch.equal(decode(parts, hub.gptq_config(32, off)), meaning)


def test_one_gathered_layer_at_a_time(dense: Path, monkeypatch: Patch) -> None:
    """On a mesh each layer is gathered when it is read: none is alive when the next one is."""
    target = ModelUnderTest(random_model(num_hidden_layers=3, max_position_embeddings=4200))
    gathered = one_at_a_time(monkeypatch, targets, "Layer")
    ranks = SimpleNamespace(model=target.model, config=target.config, gather=lambda name, weight: weight.detach() + 0)
    target.layers = targets._GatheredLayers(ranks)  # type: ignore[arg-type]
    with torch.no_grad():
        report = verification._verify(target, IDS[:, :4], None, None, None, True, None)
    assert not report.wrong and len(gathered) >= 6


def test_one_layer_in_fp32_at_a_time(monkeypatch: Patch) -> None:
    models = one_at_a_time(monkeypatch, layers, "single_layer_model", lambda model: model.layers[0].gate_up_proj)
    verify(random_model(dtype=torch.bfloat16, num_hidden_layers=3), IDS[:, :4])
    assert len(models) == 3


def test_references_keep_no_more_than_they_hold() -> None:
    target = ModelUnderTest(random_model(num_hidden_layers=2))
    with torch.no_grad():
        _, expected, _ = compare_layers(target, IDS)
    for layer in expected.layers:
        tensors = [x for x in vars(layer).values() if isinstance(x, Tensor)]
        tensors += [each.exact for each in layer.references.values()]
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in tensors) and len(tensors) == 9


def test_each_tensor_is_read_once(dense: Path, monkeypatch: Patch) -> None:
    """Rows and the cost of quantization share what is read; the loader reads before."""
    model, reads = load(dense, weights={"experts": "int4", "linear": "int8"}), Counter[str]()
    read = Source.read

    def count(source: Source, files: Any, *args: Any) -> Tensor:
        reads.update(list(files))
        return read(source, files, *args)

    monkeypatch.setattr(Source, "read", count)
    monkeypatch.setattr(weights, "fill", None)
    report = verify(model, IDS, folder=dense)
    assert report.quantization is not None and set(reads.values()) == {1} and len(reads) == 16


def test_layouts_are_decoded_on_the_model_s_device(tmp_path: Path, gpu: Any, monkeypatch: Patch) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    model, devices = Mixtral.from_pretrained(tmp_path, "cuda"), set()
    unpack = source.unpack
    monkeypatch.setattr(source, "unpack", lambda x, *args: (devices.add(x.device.type), unpack(x, *args))[1])
    assert not [row for row in check_loaded(tmp_path, model) if not row.ok] and devices == {"cuda"}


def test_the_cost_is_said_before(dense: Path) -> None:
    found = [estimate(load(dense), IDS.repeat(1, n), dense) for n in (1, 100)]
    size = (dense / "model.safetensors").stat().st_size / 1e6
    assert all(re.search(rf": reads {size:.1f} MB once, .* and \d+ s$", text) for text in found)
    small, large = (int(re.findall(r"about (\d+) MB", text)[0]) for text in found)
    assert 0 < small < large
