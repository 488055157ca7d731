"""On a GPU, what other files of this folder compare on a CPU: `apply`, names, masks, quantizers, saving, training and
and torch.compile, four families beside their eager functions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtral_triton import ExpertsConfig, apply, register, revert, stored_config
from mixtral_triton.hf.experts import NAME
from tests.support.families import build, by_name, experts_of

pytestmark = [pytest.mark.gpu, pytest.mark.compiled]
register()
CUDA, LIMITS = torch.device("cuda"), {torch.float32: 1e-5, torch.bfloat16: 0.05}
FAMILIES = "mixtral", "qwen3_moe", "olmoe", "deepseek_v3"
T = 12
# transformers 5.25 beside the package kernels loads those of the hub onto a GPU: a test loads no code from a network.
ON_GPU: Any = {"device_map": "cuda", "use_kernels": False}
IDS = torch.randint(2, 64, (3, T), generator=torch.Generator().manual_seed(0))
PLACES = torch.arange(T)
MASKS: dict[str, dict[str, Tensor]] = {
    "none": {},
    "left": {"attention_mask": (torch.tensor([[0], [3], [7]]) <= PLACES).long()},
    "right": {"attention_mask": (torch.tensor([[12], [9], [5]]) > PLACES).long()},
    "holes": {"attention_mask": ((PLACES + torch.tensor([[0], [1], [2]])) % 4 > 0).long()},
    "packed": {"position_ids": torch.cat((PLACES[:5], PLACES[:7])).expand(3, T)},
}


def on_cuda(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.to(CUDA) for name, x in values.items()}


@torch.no_grad()
def logits(model: Any, mask: str = "none") -> Tensor:
    """Those of visible tokens, on the CPU."""
    found = model(IDS.to(CUDA), use_cache=False, **on_cuda(MASKS[mask])).logits.float().cpu()
    return found[MASKS[mask].get("attention_mask", torch.ones_like(IDS)).bool()]


def assert_near(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """In 16 bits a route may flip, of a token in a few."""
    errors = (got - want).abs().amax(-1) / want.abs().max()
    assert errors.median() <= LIMITS[dtype] and (dtype != torch.float32 or errors.max() <= LIMITS[dtype]), errors


def of_apply(family: str, dtype: torch.dtype) -> Any:
    return apply(build(family).to(CUDA, dtype))


def of_names(family: str, dtype: torch.dtype) -> Any:
    return by_name(family, dtype).to(CUDA)


@pytest.mark.parametrize("way", [of_apply, of_names])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_are_eager_s(family: str, dtype: torch.dtype, way: Callable[..., Any]) -> None:
    eager, model = build(family).to(CUDA, dtype), way(family, dtype)
    assert_near(logits(model), logits(eager), dtype)
    if dtype == torch.float32:
        settings: Any = {"max_new_tokens": 3, "do_sample": False}
        mask = on_cuda(MASKS["left"])
        found = (x.generate(IDS.to(CUDA), **mask, **settings).cpu() for x in (model, eager))
        assert torch.equal(*found)
    if way is of_apply:
        assert torch.equal(logits(revert(model)), logits(eager))


@pytest.mark.parametrize("mask", [mask for mask in MASKS if mask != "none"])
@pytest.mark.parametrize("family", FAMILIES)
def test_masks_of_every_kind(family: str, mask: str) -> None:
    want, dtype = logits(build(family).to(CUDA), mask), torch.float32
    for way in (of_apply, of_names):
        assert_near(logits(way(family, dtype), mask), want, dtype)


def quantized_twin(family: str, weights: str, folder: Path) -> tuple[Any, Any]:
    """A model that is quantized while it loads onto the GPU, and one whose experts have the dequantized values."""
    twin, settings = build(family), {"quantization_config": ExpertsConfig(weights), "attn_implementation": NAME}
    twin.save_pretrained(folder)
    quantized = AutoModelForCausalLM.from_pretrained(folder, **ON_GPU, **settings)
    for dense, ours in zip(experts_of(twin).values(), experts_of(quantized).values(), strict=True):
        for key in ("gate_up_proj", "down_proj"):
            assert getattr(ours, key).data.device.type == "cuda"
            getattr(dense, key).data = getattr(ours, key).dequantize().cpu()
    return quantized, twin.to(CUDA)


@pytest.mark.parametrize("weights", ["int4", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_quantized_while_loading(family: str, weights: str, tmp_path: Path) -> None:
    quantized, twin = quantized_twin(family, weights, tmp_path / "dense")
    want = logits(twin)
    assert_near(logits(quantized), want, torch.float32)
    assert_near(logits(apply(quantized)), want, torch.float32)


@pytest.mark.parametrize("weights", ["int4", "fp8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_experts_that_were_saved_are_read_as_stored(family: str, weights: str, tmp_path: Path) -> None:
    quantized, twin = quantized_twin(family, weights, tmp_path / "dense")
    want = logits(twin)
    quantized.save_pretrained(tmp_path / "saved")
    settings: Any = {"config": stored_config(tmp_path / "saved"), "attn_implementation": NAME}
    stored = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", **ON_GPU, **settings)
    assert_near(logits(stored), want, torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
def test_save_pretrained_of_an_applied_model_writes_what_the_model_writes(family: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "before")
    of_apply(family, torch.float32).save_pretrained(tmp_path / "applied")
    files = [file.name for file in (tmp_path / "before").iterdir()]
    assert all((tmp_path / "before" / x).read_bytes() == (tmp_path / "applied" / x).read_bytes() for x in files)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_static_cache_with_torch_compile_is_one_graph(family: str) -> None:
    model, eager = of_names(family, torch.float32), build(family).to(CUDA)
    settings: Any = {"max_new_tokens": 6, "do_sample": False}
    want = eager.generate(IDS.to(CUDA), **settings)
    with torch._dynamo.config.patch(error_on_recompile=False):
        assert torch.equal(model.generate(IDS.to(CUDA), cache_implementation="static", **settings), want)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("way", [of_apply, of_names])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_of_lora(family: str, way: Callable[..., Any], autocast: bool) -> None:
    """With gradient checkpointing; the gradients of adapters beside eager's."""
    peft = pytest.importorskip("peft")
    grads = []
    for model in (way(family, torch.float32), build(family).to(CUDA)):
        torch.manual_seed(0)
        settings: Any = {"target_modules": ["q_proj", "q_b_proj", "kv_b_proj"], "init_lora_weights": False}
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, **settings)).train()
        adapted.gradient_checkpointing_enable()
        adapted.enable_input_require_grads()
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            adapted(IDS.to(CUDA), labels=IDS.to(CUDA), use_cache=False).loss.backward()
        grads.append(torch.cat([x.grad.flatten().cpu() for x in adapted.parameters() if x.grad is not None]))
    error = float((grads[0] - grads[1]).norm() / grads[1].norm())
    assert error <= (0.3 if autocast else 1e-4), error


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_on_two_gpus(family: str, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    model = build(family)
    model.save_pretrained(tmp_path)
    half = model.config.num_hidden_layers // 2
    places = {"model.embed_tokens": 0, "model.norm": 1, "model.rotary_emb": 0, "lm_head": 1}
    places |= {f"model.layers.{i}": int(i >= half) for i in range(model.config.num_hidden_layers)}
    split = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, use_kernels=False)
    assert_near(logits(apply(split)), logits(model.to(CUDA)), torch.float32)
