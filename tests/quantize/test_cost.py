"""What quantizing cost, beside whole models in fp64; verify of a quantized model, and the faults that it sees."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console

from mixtral_triton import Mixtral, reference, verify
from mixtral_triton.cli import SMALL, main, parse_weights
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.quantize import QuantizedWeight, quantizers
from mixtral_triton.verification import quality, quantization
from mixtral_triton.verification.loaded import check_loaded
from mixtral_triton.verification.quality import perplexity
from mixtral_triton.verification.quantization import Quantization, cost
from tests.support import hub

plain_way = pytest.mark.skipif(INTERPRETED, reason="in plain torch: run once, without the interpreter")
IDS = torch.randint(2048, (2, 9), generator=torch.Generator().manual_seed(0))
BOTH = {"experts": "int4", "linear": "int8"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The small checkpoint with a held-out text of a few tokens."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(SMALL / name, tmp_path / name)
    text = json.loads((SMALL / "heldout.json").read_text())["ids"][:60]
    (tmp_path / "heldout.json").write_text(json.dumps({"ids": text}))
    return tmp_path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A dense checkpoint of one layer, with a held-out text."""
    hub.write(tmp_path, hub.awq(), None, only="none of them")
    (tmp_path / "heldout.json").write_text(json.dumps({"ids": list(range(40))}))
    return tmp_path


def wide(folder: Path, weights: Any) -> Any:
    """The whole model in fp64, its quantized weights replaced by what they stand for."""
    model = Mixtral.from_pretrained(folder, "cpu", weights=weights)
    for holder in (model, *model.layers):
        for name, weight in list(holder.named_children()):
            if isinstance(weight, QuantizedWeight):
                delattr(holder, name)
                setattr(holder, name, torch.nn.Parameter(weight.dequantize(), requires_grad=False))
    return model.double()


def routes(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Experts of every layer and token, [L, B*T, E] as a mask."""
    found, x = [], model.embed_tokens[ids]
    for layer in model.layers:
        values = reference.block(
            layer, model.config, x, reference.uncached_attention(model.config.sliding_window, model.cos, model.sin)
        )
        found.append(F.one_hot(values.ids.long(), model.config.num_local_experts).sum(1))
        x = values.output
    return torch.stack(found)


@plain_way
@pytest.mark.parametrize(("weights", "window"), [(BOTH, 2048), ("int4", 25)], ids=str)
def test_it_is_what_whole_models_say(folder: Path, weights: Any, window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the text has several windows, the last one shorter."""
    for module in (quality, quantization):
        monkeypatch.setattr(module, "CONTEXT", window)
    model, said = Mixtral.from_pretrained(folder, "cpu", weights=weights), []
    with torch.no_grad():
        found = cost(model, folder, IDS, lambda: said.append(1))
        ours, theirs = wide(folder, weights), wide(folder, None)
        logits = [reference.forward(one, IDS).double() for one in (ours, theirs)]
        cosines = F.cosine_similarity(logits[0], logits[1], dim=-1)
        moved = int((routes(ours, IDS) != routes(theirs, IDS)).any(-1).sum())
        text = torch.tensor(json.loads((folder / "heldout.json").read_text())["ids"])
        scores = [perplexity(one, text) for one in (ours, theirs)]
    assert found is not None and len(said) == 4
    assert found.formats == (weights if isinstance(weights, dict) else {"experts": weights})
    assert (found.cosine, found.least) == pytest.approx((float(cosines.mean()), float(cosines.min())), abs=1e-6)
    assert (found.moved, found.routed) == (moved, 4 * 18) and 0 < found.least < found.cosine < 1
    assert (found.perplexity, found.without) == pytest.approx(scores, rel=1e-5)
    assert found.perplexity != found.without


@plain_way
def test_nothing_quantized_costs_nothing(folder: Path) -> None:
    assert cost(Mixtral.from_pretrained(folder, "cpu"), folder, IDS, lambda: None) is None


@plain_way
def test_without_a_text_there_is_no_perplexity(tiny: Path) -> None:
    (tiny / "heldout.json").unlink()
    found = cost(Mixtral.from_pretrained(tiny, "cpu", weights="int8"), tiny, IDS % 40, lambda: None)
    assert found is not None and found.perplexity is None and "perplexity" not in str(found)


def test_a_quantized_model_is_found_right_and_its_cost_told(tiny: Path) -> None:
    """The rows compare with the dequantized weights; what was lost is told apart, and is no part of the verdict."""
    model = Mixtral.from_pretrained(tiny, "cpu", weights=BOTH)
    steps: list[tuple[int, int]] = []
    report = verify(model, IDS[:1, :6] % 40, lambda *done: steps.append(done), folder=tiny)
    assert not report.wrong, str(report)
    assert report.quantization is not None and report.quantization.formats == BOTH
    assert steps[-1][0] == steps[-1][1]
    assert report.as_dict()["quantization"]["moved"] == report.quantization.moved
    assert "Quantized: " in str(report)


@plain_way
def test_of_a_model_without_its_folder_no_cost_is_told(tiny: Path) -> None:
    report = verify(Mixtral.from_pretrained(tiny, "cpu", weights="int8"), IDS[:1, :3] % 40)
    assert report.quantization is None and report.as_dict()["quantization"] is None and "Quantized" not in str(report)


@plain_way
@pytest.mark.parametrize("name", ["linear", "expert_swiglu", "experts_add_rms_norm"])
def test_a_fault_of_a_kernel_is_seen_through_the_quantization(
    name: str, tiny: Path, spoil: Callable[[str], None]
) -> None:
    """3 % in one element: what int4 costs is more than that, and hides nothing."""
    spoil(name)
    model = Mixtral.from_pretrained(tiny, "cpu", dtype=torch.float32, weights={"experts": "int4", "linear": "int4"})
    report = verify(model, IDS[:1, :4] % 40)
    assert {row.op for row in report.wrong} == {name}


@plain_way
@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_a_quantizer_that_is_wrong_is_not_right_beside_itself(
    format: str, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = quantizers.encode

    def twice(*args: Any) -> Any:
        codes, scales = encode(*args)
        return codes, 2 * scales

    right = check_loaded(tiny, Mixtral.from_pretrained(tiny, "cpu", weights=format))
    assert [(row.case, row.ok) for row in right] == [("as stored", True), ("as stored", True), ("quantized", True)]
    monkeypatch.setattr(quantizers, "encode", twice)
    wrong = check_loaded(tiny, Mixtral.from_pretrained(tiny, "cpu", weights=format))
    assert [row.ok for row in wrong] == [True, True, False]


@plain_way
@pytest.mark.parametrize("width", [60, 80, 120])
def test_what_is_told_fits_the_terminal(width: int) -> None:
    told = str(Quantization(BOTH, 0.99912, 0.98, 12, 384, 28.462, 28.199))
    out = Console(file=io.StringIO(), width=width)
    out.print(told)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= width
    assert "routes that moved: 12 of 384; perplexity 28.462, without 28.199 (+0.93 %)" in " ".join(text.split())


@plain_way
def test_weights_at_the_command_line() -> None:
    assert parse_weights("int4") == "int4"
    assert parse_weights("experts=int4,linear=int8") == BOTH


@plain_way
@pytest.mark.parametrize("text", ["experts=int4,experts=int8", "experts=", "experts=int4,", "int3", "heads=int4", "="])
def test_weights_that_are_none_are_one_line(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in this process, which has made its choice
    try:
        status: Any = main(["verify", "--device", "cpu", "--weights", text])
    except SystemExit as left:  # argparse
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and "weights" in error and len(error.strip().splitlines()) == 1, error


@plain_way
def test_verify_at_the_command_line_tells_the_cost(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert main(["verify", str(tiny), "--device", "cpu", "--weights", "experts=int4,linear=int8", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["quantization"]["formats"] == BOTH and all(row["ok"] for row in found["rows"])
    assert "perplexity" in found["quantization"]
