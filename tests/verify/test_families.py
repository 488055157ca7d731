"""verify of other families than Mixtral: right models are right, a fault in one layer is named by its module's path."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.moe import ExpertsInterface

from mixtral_triton import ExpertsConfig, ops, register, verify
from mixtral_triton.hf import attention
from mixtral_triton.hf.experts import NAME
from mixtral_triton.kernels.launching.launch import INTERPRETED
from tests.support.families import NAMED, build, experts_of

register()
pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules and masks, whatever the backend: run once")
DTYPES = torch.float32, torch.bfloat16


def by_name(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = build(family, **changes).to(dtype)
    model.set_experts_implementation(NAME)
    model.set_attn_implementation(NAME)
    return model


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(name for name in NAMED if name != "qwen3_moe"), "qwen3_next", "jamba"]
)
def test_right_model_is_right_and_stays_as_it_was(family: str) -> None:
    for dtype in DTYPES:
        model = by_name(family, dtype, **({"sliding_window": 20} if family == "mixtral" else {}))
        config = model.config.to_dict()
        before = {name: (x.dtype, x.clone()) for name, x in model.state_dict().items()}
        report = verify(model)
        assert report.ok, report
        found = {(row.op, row.layer) for row in report.rows if row.layer is not None}
        wanted = {("experts", int(name.split(".")[2])) for name in experts_of(model)}
        assert wanted <= found and any(op == "attention" for op, _ in found)
        logits = {row.case for row in report.rows if row.op == "logits"}
        assert logits == {"whole text", "in chunks"} or (family == "jamba" and "logits; in fp64" in str(report))
        after = model.state_dict()
        assert all(after[name].dtype == kind and torch.equal(after[name], x) for name, (kind, x) in before.items())
        assert model.config.to_dict() == config


@pytest.mark.parametrize("format", ["int4", "int8", "fp8"])
def test_quantized_experts_are_judged_beside_their_dequantized_values(format: str, tmp_path: Path) -> None:
    build("olmoe").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=ExpertsConfig(format), dtype="bfloat16")
    report = verify(model)
    assert report.ok and [row.op for row in report.rows] == ["experts", "experts", "logits", "logits"], report
    weight = model.model.layers[1].mlp.experts.down_proj
    weight.scales.mul_(1.5)  # of both ways: no fault of ours
    assert verify(model).ok


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_of_transformers_is_judged_by_the_logits_of_any_text(attention: str) -> None:
    """Padding in fp64 under eager's softmax in fp32, and texts that are too short for chunks."""
    model = build("qwen3_moe")
    model.set_experts_implementation(NAME)
    model.set_attn_implementation(attention)
    for dtype in DTYPES:
        for ids in (None, *(torch.arange(2 * T).view(2, T) for T in (1, 2, 3))):
            report = verify(model.to(dtype), ids)
            assert report.ok and "logits" in {row.op for row in report.rows}, report


Inject = Callable[[pytest.MonkeyPatch, Any], None]


def in_layer(index: int, interface: Any, change: Callable[..., Any]) -> Inject:
    """change(*arguments, **keywords), what this package's function gets in the layer."""

    def inject(patch: pytest.MonkeyPatch, model: Any) -> None:
        function, faulty = interface._global_mapping[NAME], {*map(id, model.model.layers[index].modules())}

        def run(module: Any, *args: Any, **kwargs: Any) -> Any:
            if id(module) in faulty:
                args, kwargs = change(*args, **kwargs)
            return function(module, *args, **kwargs)

        patch.setitem(interface._global_mapping, NAME, run)

    return inject


def without_window(q: Any, k: Any, v: Any, mask: Any, **kwargs: Any) -> Any:
    return (q, k, v, mask[:, :1]), kwargs


FAULTS: dict[str, tuple[str, Inject]] = {
    "halved routing weights": (
        "experts in layer 1 (model.layers.N.mlp.experts): model.layers.1.mlp.experts: error",
        in_layer(1, ExpertsInterface, lambda x, ids, weights: ((x, ids, weights / 2), {})),
    ),
    "routes of the next token": (
        "experts in layer 0 (model.layers.N.mlp.experts): model.layers.0.mlp.experts: error",
        in_layer(0, ExpertsInterface, lambda x, ids, weights: ((x, ids.roll(1, 0), weights.roll(1, 0)), {})),
    ),
    "no window": (
        "attention in layer 1 (model.layers.N.self_attn): model.layers.1.self_attn: error",
        in_layer(1, AttentionInterface, without_window),
    ),
    "padding is seen": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        lambda patch, model: patch.setattr(attention, "first_key", lambda valid: (True, None)),
    ),
    "another scale": (
        "attention in layer 0 (model.layers.N.self_attn): model.layers.0.self_attn: error",
        in_layer(0, AttentionInterface, lambda *args, **kw: (args, kw | {"scaling": 1.1 * kw["scaling"]})),
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_in_a_layer_is_named_by_its_path(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    line, inject = FAULTS[fault]
    model = by_name("qwen3_moe", use_sliding_window=True, sliding_window=12, max_window_layers=0)
    assert verify(model).ok
    inject(monkeypatch, model)
    report = verify(model)
    assert not report.ok and line in " ".join(str(report).split()), report


def test_a_model_that_is_not_judged_says_why() -> None:
    needs = re.escape('experts_implementation="mixtral_triton"')
    with pytest.raises(ValueError, match=f"verify: model is a OlmoeForCausalLM, .*{needs}"):
        verify(build("olmoe"))


def test_in_training_mode_gradients_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in DTYPES:
        model = by_name("olmoe", dtype).train().requires_grad_(False)
        report = verify(model)
        assert report.ok and all(module.training for module in model.modules()), report
        judged = [(row.op, row.layer) for row in report.rows if row.op.startswith("gradient")]
        assert judged == [(f"gradient of {name}", layer) for layer in (0, 1) for name in ("x", "routing weights")]
    right = ops.expert_swiglu_backward

    def faulty(grad: Any, x: Any, gate_up: Any, down: Any, *route: Any) -> Any:
        factor = 2 if down is model.model.layers[1].mlp.experts.down_proj else 1
        return tuple(factor * out for out in right(grad, x, gate_up, down, *route))

    monkeypatch.setattr(ops, "expert_swiglu_backward", faulty)
    report = verify(model)
    assert {(row.op, row.layer) for row in report.wrong} == {("gradient of x", 1), ("gradient of routing weights", 1)}
    assert "model.layers.1.mlp.experts: error" in str(report)
    with pytest.raises(ValueError, match="experts that require gradients"):
        verify(by_name("olmoe").train())
