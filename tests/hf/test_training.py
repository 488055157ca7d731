"""Training around frozen experts: gradients beside eager's, what is saved for them, LoRA and QLoRA by PEFT and Trainer,
gradient checkpointing, and what is refused."""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mixtral_triton import apply, hf, register
from mixtral_triton.hf import training
from mixtral_triton.hf.experts import NAME, PROJECTIONS
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.quantize import quantize
from mixtral_triton.verification.families import eager_experts
from tests.support.families import NAMED, build, by_name, experts_of, marked_families, with_int4_experts

register()
GATED = "hy_v4", "minimax_m3_vl_text", "granitemoe_swa"  # other activations, or sinks
once = pytest.mark.skipif(INTERPRETED, reason="about gradients of whole models: run once")
T = 9
IDS = torch.randint(2, 64, (2, T), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
LABELS = IDS.masked_fill(MASK.cumsum(-1) <= 1, -100)  # padding predicts nothing


def randomized(model: Any, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def with_lora(model: Any, pattern: str = r".*self_attn.*(q_proj|v_proj|q_b_proj|kv_b_proj)", **settings: Any) -> Any:
    return randomized(peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=pattern, **settings))).train()


def gradients(model: Any, **kwargs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(0)  # of a router's jitter
    model(input_ids=IDS, attention_mask=MASK, labels=LABELS, use_cache=False, **kwargs).loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad}


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    assert got.keys() == want.keys() and got
    return max(float((got[name] - x).abs().max() / x.abs().max()) for name, x in want.items())


@once
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", [*NAMED[1:], "mixtral", *GATED])
def test_lora_gradients_are_those_of_the_dequantized_eager_model(family: str, tmp_path: Path, covers: Any) -> None:
    if family not in marked_families():
        pytest.skip("this transformers keeps its experts in another way")
    dense = build(family)
    quantized = with_int4_experts(dense, tmp_path)
    want = gradients(with_lora(dense))
    error = largest_error(gradients(with_lora(quantized)), want)
    assert error <= 1e-5
    covers("gradients", f"{family:20} LoRA over int4 experts {error:.0e}")


@pytest.fixture
def module() -> Any:
    found = next(iter(experts_of(build("olmoe", num_hidden_layers=1)).values()))
    found.config._experts_implementation = NAME
    return found.requires_grad_(False)


def in_format(module: Any, format: str | None) -> Any:
    for key in PROJECTIONS if format is not None else ():
        weight = quantize(module._parameters.pop(key), format)
        setattr(module, key, weight)
    return module


def routed(dtype: torch.dtype = torch.float32, tokens: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(8, generator=generator)[:3] for _ in range(tokens)])
    x, weights = torch.randn(tokens, 64, generator=generator), torch.rand(tokens, 3, generator=generator)
    return x.to(dtype).requires_grad_(), ids, weights.to(dtype).requires_grad_()


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
def test_gradients_of_x_and_of_routing_weights(format: str | None, dtype: torch.dtype, module: Any) -> None:
    """So that a router may train. In bf16 within twice the error of eager."""
    module = in_format(module.to(dtype), format)
    x, ids, weights = routed(dtype)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(4)).to(dtype)

    def backward(function: Any, dtype: torch.dtype) -> list[Tensor]:
        leaves = [each.detach().to(dtype).requires_grad_() for each in (x, weights)]
        out = function(leaves[0], ids, leaves[1])
        return [each.double() for each in torch.autograd.grad(out, leaves, grad.to(dtype))]

    eager = lambda *args: eager_experts(module, *args)  # noqa: E731
    exact, baseline, got = backward(eager, torch.float64), backward(eager, dtype), backward(module, dtype)
    again = backward(module, dtype)
    for true, near, ours, same in zip(exact, baseline, got, again, strict=True):
        floor = {torch.float32: 1e-5, torch.bfloat16: 2**-8}[dtype] * float(true.abs().max())
        assert (ours - true).abs().max() <= max(2 * float((near - true).abs().max()), floor)
        assert torch.equal(ours, same)


@once
def test_experts_of_other_ranks_have_no_gradient(module: Any) -> None:
    x, ids, weights = routed()
    ids[2, 0] = len(module.down_proj)
    module(x, ids, weights).sum().backward()
    assert weights.grad[2, 0] == 0 and weights.grad.abs().sum() > 0 and x.grad.isfinite().all()


def saved_bytes(function: Any, *args: Any) -> int:
    seen: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function(*args)
    return sum(seen.values())


@once
@pytest.mark.parametrize("format", [None, "int4"])
def test_x_ids_and_weights_alone_are_saved(format: str | None, module: Any, covers: Any) -> None:
    module = in_format(module, format)
    x, ids, weights = routed(tokens=64)
    own = saved_bytes(module, x, ids, weights)
    eager = saved_bytes(lambda *args: eager_experts(module, *args), x, ids, weights)
    assert own == x.nbytes + ids.nbytes + weights.nbytes < eager / 3
    checkpointed = saved_bytes(lambda *args: checkpoint(module, *args, use_reentrant=False), x, ids, weights)
    assert checkpointed <= own
    covers("gradients", f"saved for 64 tokens, {format or 'dense':6} {own:,} bytes, eager {eager:,}")


@once
def test_experts_that_train_are_refused(module: Any) -> None:
    x, ids, weights = routed()
    module.down_proj.requires_grad_(True)
    with torch.no_grad():
        module(x, ids, weights)
    out = module(x, ids, weights)
    with pytest.raises(ValueError, match="OlmoeExperts has experts that require gradients, needs frozen") as found:
        out.sum().backward()
    assert 'experts_implementation="grouped_mm"' in str(found.value)


@once
@pytest.mark.parametrize("format", [None, "int4"])
def test_written_weights_and_second_derivatives_are_refused(format: str | None, module: Any) -> None:
    x, ids, weights = routed()
    module = in_format(module, format)
    out = module(x, ids, weights)
    with pytest.raises(ValueError, match="OlmoeExperts has no second derivatives, needs create_graph=False"):
        torch.autograd.grad((out + x**3).sum(), x, create_graph=True)
    (module.down_proj.scales if format else module.down_proj).mul_(2)
    with pytest.raises(ValueError, match="OlmoeExperts has weights that were written after forward"):
        out.sum().backward()
    module(x, ids, weights).sum().backward()


@once
@pytest.mark.parametrize("format", [None, "int4"])
def test_compiled_experts_have_the_gradients_of_eager(format: str | None, module: Any) -> None:
    module = in_format(module, format)
    torch._dynamo.reset()
    found = []
    for function in (module, torch.compile(lambda *args: 2 * module(*args), backend="eager")):
        x, ids, weights = routed()
        found.append(torch.autograd.grad(function(x, ids, weights).sum(), (x, weights)))
    for got, want in zip(found[1], found[0], strict=True):
        assert torch.allclose(got, 2 * want, rtol=2e-6)


@once
@pytest.mark.slow
@pytest.mark.parametrize(
    "family", ["qwen3_moe", "qwen3_moe int4", "olmoe", "deepseek_v3", "mixtral", "mixtral by apply"]
)
def test_a_compiled_training_step_has_the_gradients_of_eager(family: str, tmp_path: Path) -> None:
    """In one graph: torch's operator has the experts' gradients."""
    model = apply(build("mixtral")) if "apply" in family else by_name(family.split()[0])
    model = with_lora(with_int4_experts(model, tmp_path) if "int4" in family else model)
    want = gradients(model)
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert largest_error(gradients(model), want) <= 2e-6


@once
@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "mixtral"])
def test_trainer_in_bf16_with_an_evaluation_each_step(family: str, tmp_path: Path, covers: Any) -> None:
    losses = []
    for names in (("sdpa", "grouped_mm"), (NAME, NAME)):
        settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "report_to": "none"}
        settings |= {"save_strategy": "no"}  # it would ask any GPU for its random state
        arguments = transformers.TrainingArguments(str(tmp_path), bf16=True, use_cpu=True, **settings)
        data = [{"input_ids": row, "labels": row} for row in IDS]
        model = with_lora(by_name(family, torch.float32, *names))
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        losses.append([log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log])
    assert len(losses[1]) == 2 and losses[1] == pytest.approx(losses[0], rel=0.01)
    covers("gradients", f"Trainer(bf16=True) {family:12} eval losses {losses[1]}, of sdpa and grouped_mm {losses[0]}")


MASKS: dict[str, dict[str, Any]] = {
    "causal": {},
    "padding on the left": {"attention_mask": MASK},
    "padding on the right": {"attention_mask": MASK.flip(1)},
    "a hole": {"attention_mask": torch.tensor([[1] * T, [1, 1, 0, *[1] * (T - 3)]])},
    "packed": {"position_ids": torch.tensor([[*range(4), *range(T - 4)]]).expand(2, T)},
}


@once
@pytest.mark.exhaustive
@pytest.mark.parametrize("window", [4, None])
@pytest.mark.parametrize("mask", MASKS)
def test_an_applied_model_has_the_gradients_of_eager_for_every_mask(mask: str, window: Any, make_hf: Any) -> None:
    """LoRA on attention and the gate: norms, rotary embedding, attention and router are transformers' own then."""
    found = []
    for change in (lambda model: model, apply):
        model = with_lora(change(make_hf(sliding_window=window)), ".*(q_proj|v_proj|o_proj|lm_head)")
        for module in model.modules():
            if type(module).__name__.endswith(("TopKRouter", "Router")):
                module.weight.requires_grad_(True)
        ids = IDS % 48
        logits = model(input_ids=ids, use_cache=False, **MASKS[mask]).logits
        real = MASKS[mask].get("attention_mask", torch.ones_like(ids)).bool()
        logits[real].square().mean().backward()
        found.append({name: x.grad.clone() for name, x in model.named_parameters() if x.requires_grad})
    assert any("gate" in name for name in found[0])
    assert largest_error(found[1], found[0]) <= 1e-4


@once
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_train_generate_and_train_again(checkpointing: bool | None, make_hf: Any, calls: set[str]) -> None:
    """With gradient checkpointing, reentrant or not. Under no_grad this package's functions run again."""
    model = with_lora(apply(make_hf()), ".*(q_proj|v_proj)")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=0.02)
    losses, ids = [], IDS % 48

    def train(steps: int) -> None:
        model.train()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            losses.append(loss.item())
            optimizer.step()

    train(4)
    tokens = model.eval().generate(input_ids=ids, max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model(input_ids=ids)
    train(4)
    assert losses[-1] < losses[4] < losses[0] and tokens.shape[1] == T + 3
    assert hf.applied(model.base_model.model)


@once
def test_the_change_of_functions_is_said_once(make_hf: Any) -> None:
    training.warn_of_gradients.cache_clear()
    model = with_lora(apply(make_hf()), ".*q_proj")
    with pytest.warns(UserWarning, match=r"gradients are recorded attention \(after apply also norms"):
        model(input_ids=IDS % 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(input_ids=IDS % 48)
