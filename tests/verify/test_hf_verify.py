"""verify on a model of transformers: right as it is, wrong where anything is planted, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mixtral_triton import apply, hf, verify
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS

transformers = pytest.importorskip("transformers")
IDS = torch.randint(1, 48, (2, 10), generator=torch.Generator().manual_seed(0))
once = pytest.mark.skipif(INTERPRETED, reason="about the comparison: run once, without the interpreter")


@pytest.mark.parametrize("dtype", [torch.float32] if INTERPRETED else [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("window", [6, None])
def test_each_error_is_at_most_twice_that_of_transformers(dtype: torch.dtype, window: int | None, make_hf: Any) -> None:
    """Against wider arithmetic, on transformers' activations: so the routes are the same for both."""
    model = make_hf(sliding_window=window).to(dtype)
    report = verify(model, IDS)
    assert report.ok, str(report)
    assert "transformers' own modules" in str(report)
    for layer in range(model.config.num_hidden_layers):
        assert {row.op for row in report.rows if row.layer == layer} == {*OPS, "layer"}
    assert not hf.applied(model)
    if dtype == torch.float32:
        assert report.flips == 0 and report.rows[-1].op == "logits"


@once
@pytest.mark.parametrize("kind", ["MixtralModel", "MixtralForSequenceClassification"])
def test_other_heads_are_compared_without_theirs(kind: str, make_hf: Any) -> None:
    report = verify(make_hf(kind), IDS)
    assert report.ok and report.rows[-1].op == "hidden"


@once
def test_any_rotary_embedding_is_verified(make_hf: Any) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    assert verify(make_hf(head_dim=8, rope_parameters=rope)).ok


@once
def test_an_applied_model_is_verified_as_it_is(make_hf: Any) -> None:
    model = apply(make_hf(), attention=False)
    assert verify(model).ok
    assert hf.applied(model) and model.config._attn_implementation == "eager"
    assert not any(module._forward_hooks for module in model.modules())


@once
@pytest.mark.parametrize("name", ["rms_norm", "rope", "attention", "gate_route", "expert_swiglu"])
def test_a_fault_in_any_operation_is_seen(name: str, make_hf: Any, spoil: Callable[[str], None]) -> None:
    spoil(name)
    report = verify(make_hf(), IDS)
    assert not report.ok and any(row.op == name and not row.ok for row in report.rows)


@once
def test_a_fault_in_the_wiring_is_seen_in_its_layer(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation right, but the layers call attention without its window."""
    from mixtral_triton.hf import modules as hf_modules

    attention = hf_modules.attention

    def no_window(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
        return attention(*args, **kwargs)

    monkeypatch.setattr(hf_modules, "attention", no_window)
    report = verify(make_hf(), IDS)
    assert [(row.layer, row.op) for row in report.wrong[:1]] == [(0, "layer")]
    assert {row.op for row in report.wrong} == {"layer", "logits"}


@once
def test_an_expert_that_the_text_does_not_take_is_exercised(make_hf: Any) -> None:
    model = make_hf()
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[3] = 0.0
        model.model.layers[1].mlp.experts.gate_up_proj[3, 0, 0] = float("nan")
    assert not verify(model, IDS[:, :1]).ok


@once
def test_bad_input(make_hf: Any) -> None:
    with pytest.raises(ValueError, match="verify: model is a Linear, needs transformers'"):
        verify(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="token 48"):
        verify(make_hf(), torch.full((1, 3), 48))
    with pytest.raises(ValueError, match="offloading"):
        verify(make_hf().to("meta"))
    model = make_hf().train()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        verify(model)
    assert not hf.applied(model)
