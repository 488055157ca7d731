"""`apply` beside what others put around a model: PEFT's adapters, and accelerate's layers on the CPU and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import apply, revert
from mixtral_triton.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules around the model: run once, without")
IDS = torch.randint(1, 48, (2, 9), generator=torch.Generator().manual_seed(2))
EXPERTS, GATE = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.gate.weight"]


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


@pytest.mark.parametrize("parameters", [None, EXPERTS, GATE], ids=["attention", "experts", "gate"])
@pytest.mark.parametrize("first", ["apply", "adapter"])
def test_adapters_of_peft(first: str, parameters: Any, make_hf: Any, calls: set[str]) -> None:
    peft = pytest.importorskip("peft")
    hf = make_hf()
    base = hf(IDS).logits
    if first == "apply":
        apply(hf)
    torch.manual_seed(0)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=4, target_modules=linears, target_parameters=parameters, init_lora_weights=False)
    model = peft.get_peft_model(hf, config).eval().requires_grad_(False)
    apply(hf)
    calls.clear()
    got = model(IDS).logits
    assert {"attention", "expert_swiglu", "rope"} <= calls
    want = (revert(hf), model(IDS).logits)[1]
    assert close(got, want) and not close(want, base)
    apply(hf)
    merged = model.merge_and_unload()
    assert close(merged(IDS).logits, want)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map_of_accelerate(place: str, make_hf: Any, tmp_path: Path, calls: set[str]) -> None:
    """Hooks bring a layer's weights when it runs; until then they are on the meta device."""
    pytest.importorskip("accelerate")
    transformers = pytest.importorskip("transformers")
    hf = make_hf()
    want = hf(IDS).logits
    hf.save_pretrained(tmp_path / "model")
    modules = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    layers = {f"model.layers.{index}": place if index else "cpu" for index in range(2)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=modules | layers, offload_folder=tmp_path / "offload", dtype=torch.float32
    ).eval()
    parameters = {parameter.device.type for parameter in model.model.layers[1].parameters()}
    assert parameters == ({"meta"} if place == "disk" else {"cpu"})
    assert close(apply(model)(IDS).logits, want) and {"attention", "expert_swiglu", "rope", "rms_norm"} <= calls
    texts = [each.generate(IDS[:1], max_new_tokens=4, do_sample=False) for each in (model, hf)]
    assert torch.equal(*texts)
    assert close(revert(model)(IDS).logits, want)
