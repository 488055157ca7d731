"""Perplexity and held-out texts, and the cost of quantization that verify reports."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mixtral_triton import Mixtral, quantize, reference, verify
from mixtral_triton.cli import SMALL, main, parse_weights
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.quantize import QuantizedWeight
from mixtral_triton.verification import held_out, perplexity, weights
from mixtral_triton.verification.layers import ModelUnderTest
from mixtral_triton.verification.weights import check_weights
from tests.support import hub
from tests.support.models import check_loaded, random_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="on the torch backend: run once, without the interpreter")
TEXT = torch.randint(23, (31,), generator=torch.Generator().manual_seed(0))
IDS = torch.randint(2048, (2, 9), generator=torch.Generator().manual_seed(0))
BOTH = {"experts": "int4", "linear": "int8"}


def perplexity_by_loop(model: Mixtral, ids: torch.Tensor, context: int) -> float:
    """Token i from the tokens of its window before it, in numpy's fp64."""
    losses = []
    for i in range(1, len(ids)):
        start = (i - 1) // context * context
        logits = reference.forward(model, ids[None, start:i])[0, -1].double().numpy()
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[i]])
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("context", "tokens"), [(8, 31), (7, 31), (1, 31), (30, 31), (64, 31), (5, 2)])
def test_perplexity_equals_a_loop_over_tokens(context: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In windows of WINDOW_TOKENS tokens, and of the model's positions where they are fewer."""
    model, ids = random_model(max_position_embeddings=context), TEXT[:tokens]
    expected = perplexity_by_loop(model, ids, context)
    assert math.isclose(perplexity(model, ids), expected, rel_tol=1e-5)
    monkeypatch.setattr(weights, "WINDOW_TOKENS", context)
    assert math.isclose(perplexity(random_model(), ids), expected, rel_tol=1e-5)


@pytest.mark.parametrize(("factor", "expected"), [(0.0, 23), (1e6, math.inf)], ids=["uniform", "no overflow"])
def test_perplexity_of_extreme_logits(factor: float, expected: float) -> None:
    model = random_model()
    model.lm_head.data.mul_(factor)
    assert perplexity(model, TEXT) == pytest.approx(expected, rel=1e-12)


def test_few_logits_are_in_memory_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = random_model(max_position_embeddings=1024), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda h: sizes.append(len(h)) or head(h))
    perplexity(model, TEXT.repeat(33)[:1001])
    assert sum(sizes) == 1000 and max(sizes) == weights.LOGIT_ROWS


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (TEXT[None], r"ids' is \[1, 31\]"),
        (TEXT[:1], "at least two"),
        ([1, 2], "list"),
        (TEXT.float(), "int64"),
        (TEXT + 1, "holds token 23"),
    ],
)
def test_bad_text_raises_value_error(ids: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        perplexity(random_model(), ids)


def test_held_out_text(tmp_path: Path) -> None:
    config = random_model().config
    assert held_out(tmp_path, config) is None
    (tmp_path / "heldout.json").write_text('{"ids": [0, 22, 3]}')
    found = held_out(tmp_path, config)
    assert found is not None and found.dtype == torch.int64 and found.tolist() == [0, 22, 3]
    for ids in (None, [], [1], [1, 23], [-1, 2], [1, 2.0], [True, 1], "12", {"0": 1}):
        (tmp_path / "heldout.json").write_text(json.dumps({"ids": ids}))
        with pytest.raises(ValueError, match=r"heldout\.json: ids needs to be a list"):
            held_out(tmp_path, config)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A checkpoint of one layer that is not quantized, with a held-out text."""
    hub.write(tmp_path, hub.awq(), None, only="none of them")
    (tmp_path / "heldout.json").write_text(json.dumps({"ids": list(range(40))}))
    return tmp_path


def load(folder: Path, **options: Any) -> Mixtral:
    return Mixtral.from_pretrained(folder, "cpu", **options)


def load_fp64(folder: Path, weights: Any) -> Any:
    """The model in fp64 with dequantized weights."""
    model = load(folder, weights=weights)
    for module in (model, *model.layers):
        for name, weight in list(module.named_children()):
            if isinstance(weight, QuantizedWeight):
                delattr(module, name)
                setattr(module, name, torch.nn.Parameter(weight.dequantize(), requires_grad=False))
    return model.double()


def routes(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The experts of every layer and token, [L, B*T, E] as a mask."""
    found, x = [], model.embed_tokens[ids]
    attend = reference.uncached_attention(model.config.sliding_window, model.cos, model.sin)
    for layer in model.layers:
        values = reference.block(layer, model.config, x, attend)
        found.append(F.one_hot(values.ids.long(), model.config.num_local_experts).sum(1))
        x = values.output
    return torch.stack(found)


@pytest.mark.parametrize(("formats", "window"), [(BOTH, 2048), ("int4", 25)], ids=str)
def test_cost_equals_that_of_whole_models(formats: Any, window: int, tmp_path: Path, monkeypatch: Any) -> None:
    """With a text of one window, and of several, the last one shorter."""
    monkeypatch.setattr(weights, "WINDOW_TOKENS", window)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SMALL / name, tmp_path / name)
    text = json.loads((SMALL / "heldout.json").read_text())["ids"][:60]
    (tmp_path / "heldout.json").write_text(json.dumps({"ids": text}))
    model, steps = load(tmp_path, weights=formats), []
    with torch.no_grad():
        cost = check_weights(ModelUnderTest(model), tmp_path, IDS, lambda: steps.append(1))[1]
        ours, theirs = load_fp64(tmp_path, formats), load_fp64(tmp_path, None)
        cosines = F.cosine_similarity(*(reference.forward(one, IDS).double() for one in (ours, theirs)), dim=-1)
        flips = int((routes(ours, IDS) != routes(theirs, IDS)).any(-1).sum())
        scores = [perplexity(one, torch.tensor(text)) for one in (ours, theirs)]
    assert cost is not None and len(steps) == 4 and f"as stored {scores[1]:.3f}" in str(cost)
    assert cost.formats == (formats if isinstance(formats, dict) else {"experts": formats})
    assert (cost.cosine, cost.min_cosine) == pytest.approx((float(cosines.mean()), float(cosines.min())), abs=1e-6)
    assert (cost.flips, cost.routed) == (flips, 4 * 18) and 0 < cost.min_cosine < cost.cosine < 1
    assert (cost.perplexity, cost.stored_perplexity) == pytest.approx(scores, rel=1e-5)
    assert cost.perplexity != cost.stored_perplexity


def test_cost_without_quantization_text_or_folder(tiny: Path) -> None:
    assert verify(load(tiny), IDS[:1, :3] % 40, folder=tiny).quantization is None
    model = load(tiny, weights="int8")
    report = verify(model, IDS[:1, :3] % 40)
    assert report.quantization is None and report.as_dict()["quantization"] is None and "Quantized" not in str(report)
    (tiny / "heldout.json").unlink()
    cost = check_weights(ModelUnderTest(model), tiny, IDS % 40, lambda: None)[1]
    assert cost is not None and cost.perplexity is None and "perplexity" not in str(cost)


@pytest.mark.parametrize("name", ["linear", "expert_swiglu", "experts_add_rms_norm"])
def test_fault_smaller_than_the_cost_of_int4(name: str, tiny: Path, inject_fault: Callable[[str], None]) -> None:
    inject_fault(name)
    model = load(tiny, dtype=torch.float32, weights={"experts": "int4", "linear": "int4"})
    assert {row.op for row in verify(model, IDS[:1, :4] % 40).wrong} == {name}


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_wrong_scales_of_the_quantizer(format: str, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = quantize.encode
    rows = check_loaded(tiny, load(tiny, weights=format))
    assert [(row.case, row.ok) for row in rows] == [("as stored", True), ("as stored", True), ("quantized", True)]

    def double_scales(*args: Any) -> Any:
        codes, scales = encode(*args)
        return codes, 2 * scales

    monkeypatch.setattr(quantize, "encode", double_scales)
    assert [row.ok for row in check_loaded(tiny, load(tiny, weights=format))] == [True, True, False]


def test_weights_option(tiny: Path, capsys: pytest.CaptureFixture[str], in_process: None) -> None:
    assert parse_weights("int4") == "int4" and parse_weights("experts=int4,linear=int8") == BOTH
    assert main(["verify", str(tiny), "--device", "cpu", "--weights", "experts=int4,linear=int8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["quantization"]["formats"] == BOTH and all(row["ok"] for row in found["rows"])
    assert "perplexity" in found["quantization"]
    for text in ("experts=int4,experts=int8", "experts=", "experts=int4,", "int3", "heads=int4", "="):
        try:
            status: Any = main(["verify", "--device", "cpu", "--weights", text])
        except SystemExit as exit:  # of argparse
            status = exit.code
        error = capsys.readouterr().err
        assert status == 2 and "weights" in error and len(error.strip().splitlines()) == 1, error
