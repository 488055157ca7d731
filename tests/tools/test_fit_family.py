"""`fit` for families that run in transformers alone: its bytes beside those of models that are loaded and have run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, modeling_utils

from mixtral_triton import ExpertsConfig, stored_config
from mixtral_triton.hf.masks import CACHE
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from tests.cli.commands import error_line, output, run_json
from tests.support.families import EXPERTS_REFUSED, NOT_TRIED, VERSION, build, experts_of, marked_families
from tests.support.hub import LAYOUTS
from tests.support.stored import write_quantized

pytestmark = [pytest.mark.compiled, pytest.mark.skipif(VERSION < (5, 17), reason="no conversions to plan with")]
READS = "kolibri1_1"  # values, in its forward
FAMILIES = ["deepseek_v3", *(name for name in marked_families() if name not in NOT_TRIED)]


def plans(folder: Path, *options: Any, status: int = 0) -> dict[str, Any]:
    printed = run_json("fit", folder, "--gpu", "h100", *options, status=status)
    return {plan["format"]: plan for plan in printed["formats"]} | {"about": printed}


def loaded_bytes(model: Any) -> int:
    quantized = [module for module in model.modules() if isinstance(module, QuantizedWeight)]
    return sum(x.nbytes for x in {id(x): x for x in (*quantized, *model.parameters())}.values())


def cache_bytes(model: Any, tokens: int) -> int:
    with torch.no_grad():
        cache = model(torch.arange(2, tokens + 2).expand(2, -1), use_cache=True)[CACHE]
    leaves = [x for layer in cache.layers for x in tree_leaves(vars(layer)) if isinstance(x, torch.Tensor)]
    return sum(x.nbytes for x in leaves if x.dim())


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_are_those_of_the_loaded_model_and_of_its_cache(family: str, tmp_path: Path) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    if family == READS:
        assert "Kolibri1_1ForCausalLM a forward on the meta device, by which" in error_line("fit", tmp_path)
        return
    found = plans(tmp_path, "--batch", 2, "--context", 9)
    assert found["about"]["parameters"] == sum(x.numel() for x in model.parameters())
    assert found["as stored"]["bytes"]["weights"] == loaded_bytes(model)
    cache = found["as stored"]["bytes"]["cache"]
    assert cache == pytest.approx(cache_bytes(model, 9), rel=0.02)
    for format in ("int4", "fp8"):
        if format in found:
            quantized = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ExpertsConfig(format))
            assert found[format]["bytes"]["weights"] == loaded_bytes(quantized)
    assert ("int8" in found) == (family not in EXPERTS_REFUSED)


def test_active_parameters_leave_out_the_experts_that_a_token_does_not_take(tmp_path: Path) -> None:
    (model := build("deepseek_v3")).save_pretrained(tmp_path)
    idle = sum(x.numel() * 5 // 8 for module in experts_of(model).values() for x in module.parameters())
    about = plans(tmp_path)["about"]
    assert idle and about["active_parameters"] == about["parameters"] - idle


def test_a_stored_checkpoint_has_the_bytes_of_its_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored, _ = write_quantized("deepseek_v3", tmp_path, *LAYOUTS["ct int4 32 False"])
    model = AutoModelForCausalLM.from_pretrained(stored, config=stored_config(stored), dtype="auto")
    monkeypatch.setattr(modeling_utils, "load_state_dict", None)  # nothing is read but headers
    found = plans(stored)
    assert list(found) == ["as stored", "about"]
    # transformers keeps the gates in fp32
    assert found["as stored"]["bytes"]["weights"] == pytest.approx(loaded_bytes(model), rel=0.01)
    assert output("fit", stored, "--gpu", "h100").splitlines()[-1].endswith(f'config=stored_config("{stored}"))')


@pytest.mark.slow
def test_the_longest_text_fits_and_the_last_line_loads_the_model(tmp_path: Path) -> None:
    config = AutoConfig.for_model("glm4_moe", dtype="bfloat16", max_position_embeddings=1 << 20)
    config.save_pretrained(tmp_path)
    plan = plans(tmp_path, "--context", 4096)["int4"]
    assert plan["verdict"] == "fits" and 4096 < (longest := plan["longest_context"]) < 1 << 20
    assert plans(tmp_path, "--context", longest)["int4"]["verdict"] == "fits"
    assert plans(tmp_path, "--context", longest + 1, status=1)["int4"]["verdict"] == "no"
    text = output("fit", tmp_path, "--gpu", "h100", "--context", 4096)
    assert text.splitlines()[-1].endswith(f'("{tmp_path}", quantization_config=ExpertsConfig("int4"))')
    several = output("fit", tmp_path, "--gpu", "h100", "--gpu", "h200", "--context", 4096)
    assert "tokens/s" not in text and f"{longest:,}" in several


@pytest.mark.parametrize(
    ("config", "options", "words"),
    [
        ({"model_type": "t5"}, (), "needs a causal model of transformers"),
        ({"model_type": "zzz"}, (), "does not recognize this architecture"),
        ({"model_type": "bert"}, (), "a forward on the meta device, by which fit knows its cache, failed"),
        ({"model_type": "mamba"}, (), "max_position_embeddings is 0"),
        ({"model_type": "llama"}, ("--context", 4096), "--context is 4096, needs 1 to 2048"),
        ({"model_type": "llama"}, ("--cache-dtype", "int8"), "--cache-dtype is int8, needs a family of the own model"),
    ],
    ids=str,
)
def test_what_fit_cannot_plan_is_one_line(config: Any, options: Any, words: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert words in error_line("fit", tmp_path, *options)
