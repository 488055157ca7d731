"""The command `perplexity` beside transformers' recipe of sliding windows; the baseline."""

import io
import json
import math
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_triton import Mixtral
from mixtral_triton.checkpoint.config import SMALL
from mixtral_triton.checkpoint.tokenizer import load_tokenizer
from mixtral_triton.verification.report import Report, Row
from tests.cli.commands import output, run, run_json
from tests.support.models import HELD_OUT

pytestmark = pytest.mark.compiled
COMMAND = "perplexity --device cpu"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A text of some 1,200 tokens, with characters of several bytes."""
    decoded = load_tokenizer(SMALL).decode(HELD_OUT[1:1200], skip_special_tokens=True)
    (tmp_path / "text.txt").write_text(f"{decoded} Überall.\n")
    return tmp_path / "text.txt"


@pytest.mark.exhaustive
@pytest.mark.parametrize(("window", "stride"), [(1024, 512), (300, 299), (200, 70), (2, 1)])
def test_perplexity_equals_the_recipe_of_transformers(window: int, stride: int, text: Path) -> None:
    """Their documentation's loop, "Perplexity of fixed-length models"; a loss is the mean over the targets of a window,
    of which the window's first token is none."""
    transformers = pytest.importorskip("transformers")
    length = 60 if window == 2 else None
    text.write_text(text.read_text()[:length])
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).eval()
    encodings = transformers.AutoTokenizer.from_pretrained(SMALL)(text.read_text(), return_tensors="pt").input_ids
    nll, count, previous = 0.0, 0, 0
    for begin in range(0, encodings.shape[1], stride):
        end = min(begin + window, encodings.shape[1])
        target = encodings[:, begin:end].clone()
        target[:, : previous - end] = -100 if previous else target[:, : previous - end]
        targets = int((target[:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(encodings[:, begin:end], labels=target).loss
        nll, count, previous = nll + float(loss) * targets, count + targets, end
        if end == encodings.shape[1]:
            break
    options = () if (window, stride) == (1024, 512) else ("--window", window, "--stride", stride)
    found = run_json(f"{COMMAND} --dtype float32 --text", text, *options)
    assert found["tokens"] == count and math.isclose(found["nats"], nll / count, rel_tol=1e-4)
    assert math.isclose(found["perplexity"], math.exp(nll / count), rel_tol=1e-4) and "baseline" not in found
    assert math.isclose(found["bits_per_byte"], nll / math.log(2) / len(text.read_bytes()), rel_tol=1e-4)


@pytest.mark.slow
def test_a_format_is_beside_the_baseline(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = run_json(f"{COMMAND} --text", text)
    for options in (["--weights", "experts=int4,linear=int8"], ["--cache-dtype", "int8"]):
        found = run_json(f"{COMMAND} --text", text, *options)
        assert found["baseline"] == stored and 0 < abs(found["perplexity"] / stored["perplexity"] - 1) < 0.05
    table = output(f"{COMMAND} --weights int4 --cache-dtype int8 --text", text)
    assert "with these options" in table and "as stored" in table and f"{stored['perplexity']:.4f}" in table
    assert re.search(r"[+-]\d\.\d\d%", table)
    monkeypatch.setattr("sys.stdin", io.StringIO(text.read_text()))
    assert run_json(f"{COMMAND} --text -") == stored
    models = [Mixtral.from_pretrained(SMALL, "cpu", weights="int4"), ValueError("no memory")]
    monkeypatch.setattr(Mixtral, "from_pretrained", Mock(side_effect=models))
    status, out, error = run(f"{COMMAND} --weights int4 --json --text", text)
    assert status == 0 and json.loads(out)["baseline"] is None and "no baseline: no memory" in error


def test_damage_shows_beside_the_original_and_not_to_verify(text: Path, folder: Path) -> None:
    """Two experts swapped in each layer are other weights, which the runtime computes rightly."""
    text.write_text(text.read_text()[:600])
    tensors = load_file(folder / "model.safetensors")
    swap = {"experts.0.": "experts.1.", "experts.1.": "experts.0."}
    renamed = {re.sub(r"experts\.[01]\.", lambda match: swap[match[0]], name): x for name, x in tensors.items()}
    save_file(renamed, folder / "model.safetensors")
    found = run_json(f"{COMMAND} --weights int8 --weights int4 --text", text, folder, "--against", SMALL)["models"]
    assert [*found] == ["weights int8", "weights int4", "as stored", str(SMALL)]
    assert all(values["difference"] > 0.5 for values in [*found.values()][:3])
    table = output(f"{COMMAND} --text", text, folder, "--against", SMALL)
    assert str(folder) in table and str(SMALL) in table and re.search(r"\+\d+\.\d\d%", table)
    verdict = Report((Row.exact(None, "weights", "as stored", True),), 0, 0, "Triton", "bfloat16").verdict
    assert verdict == "RIGHT: all 1 comparisons are within their limits; how good the weights are, `perplexity` says"


@pytest.mark.slow
def test_fp8_activations_cost_at_most_a_percent_of_perplexity(tmp_path: Path, covers: Any) -> None:
    (tmp_path / "text.txt").write_text(load_tokenizer(SMALL).decode(HELD_OUT[:1500], skip_special_tokens=True))
    for weights in ("fp8", "experts=fp8,linear=fp8"):
        command = f"perplexity --device cpu --weights {weights} --text"
        without, found = (run_json(command, tmp_path / "text.txt", *more) for more in ((), ("--activations", "fp8")))
        cost = found["perplexity"] / without["perplexity"] - 1
        assert 0 != cost <= 0.01 and found["baseline"] == without["baseline"]
        covers("quantization", f"{weights}, activations fp8: {cost:+.2%} of perplexity beside fp8 weights (bound 1 %)")
