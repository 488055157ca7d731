"""The activations of experts: their derivatives, their names, and a toy that one entry adds."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mixtral_triton import ops, reference
from mixtral_triton.bench.compile import compile_launch
from mixtral_triton.kernels.launching.launch import INTERPRETED, LaunchConfig, launch
from mixtral_triton.kernels.ops.experts.activations import ACTIVATION_CASES, ACTIVATIONS, Activation
from mixtral_triton.kernels.ops.experts.activations import constants as activation_constants
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.reference import activate
from mixtral_triton.kernels.registry import OPS
from tests.support.calls import inputs

SIZES: dict[str, Any] = {"T": 5, "H": 64, "I": 32, "E": 4, "K": 2}
NAMES = "silu", *ACTIVATION_CASES


@triton.jit
def toy_scaled_square(gate, up, NUMBERS: tl.constexpr):
    relu = tl.maximum(gate, 0.0) * NUMBERS[0]
    return relu * gate * up, 2 * relu * up, relu * gate


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    plain = lambda gate, up, factor: factor * gate.relu() ** 2 * up  # noqa: E731
    slopes = lambda gate, up, factor: (2 * factor * gate.relu() * up, factor * gate.relu() ** 2)  # noqa: E731
    monkeypatch.setitem(ACTIVATIONS, "toy_scaled_square", Activation(plain, slopes, toy_scaled_square, (0.5,)))
    return "toy_scaled_square:0.5"


@triton.jit
def apply_kernel(x_ptr, out_ptr, n, ACTIVATION: tl.constexpr, NUMBERS: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    results = ACTIVATION(tl.load(x_ptr + offs, mask=offs < n), tl.load(x_ptr + n + offs, mask=offs < n), NUMBERS)
    for i in tl.static_range(3):
        tl.store(out_ptr + i * n + offs, results[i], mask=offs < n)


@pytest.mark.parametrize("name", [*NAMES, "toy"])
def test_derivatives_are_those_of_autograd(name: str, toy: str, device: torch.device) -> None:
    """In plain torch, and in the kernel, of gates and ups of all sizes, those at a limit included. NaN stays NaN."""
    name = toy if name == "toy" else name
    steps = torch.cat((torch.linspace(-5, 5, 101), torch.tensor([0.75, -0.75])))
    x = torch.stack((steps.repeat(len(steps)), steps.repeat_interleave(len(steps))))
    gate, up = (part.double().requires_grad_() for part in x)
    h = activate(gate, up, name)
    slopes = torch.autograd.grad(h.sum(), (gate, up))
    for got_slope, slope in zip(activate(gate, up, name, True), slopes, strict=True):
        assert torch.allclose(got_slope, slope, rtol=1e-12, atol=1e-12)
    bad = torch.tensor([[torch.nan, 0.5], [0.5, torch.nan]])
    assert activate(*bad, name).isnan().all()
    if INTERPRETED or device.type == "cuda":
        x = torch.cat((x, bad), 1)
        got, n = torch.empty(3, x.shape[1], device=device), x.shape[1]
        config = LaunchConfig({**activation_constants(name), "BLOCK": 1024}, num_warps=4)
        launch(apply_kernel, (triton.cdiv(n, 1024),), config, x_ptr=x.to(device), out_ptr=got, n=n)
        assert torch.allclose(got[:, :-2].cpu().double(), torch.stack((h, *slopes)), rtol=1e-5, atol=1e-5)
        assert got[0, -2:].isnan().all()


@pytest.mark.compiled
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", NAMES[::-1])
def test_a_compiled_graph_has_the_gradients_of_autograd_and_no_others(name: str) -> None:
    args = {**inputs("expert_swiglu", SIZES), "activation": name}
    leaves = [args[key].requires_grad_() for key in ("x", "weights")]
    want = torch.autograd.grad(reference.expert_swiglu(**args).sum(), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(lambda **args: ops.expert_swiglu(**args) + 0, backend="eager", fullgraph=True)
    for got, slope in zip(torch.autograd.grad(compiled(**args).sum(), leaves), want, strict=True):
        assert torch.allclose(got, slope, rtol=1e-4, atol=1e-5)
    for key in ("gate_up_proj", "down_proj") if name == NAMES[-1] else ():
        trained = compiled(**args | {key: args[key].clone().requires_grad_()}).sum()
        with pytest.raises(ValueError, match="expert_swiglu has experts that require gradients"):
            trained.backward()


@pytest.mark.slow
@pytest.mark.parametrize("T", [5, 150])  # decode and prefill
def test_a_toy_activation_is_one_entry(T: int, toy: str, device: torch.device) -> None:
    sizes = SIZES | {"T": T}
    args = inputs("expert_swiglu", sizes)
    want = reference.expert_swiglu(**args | {"activation": toy})
    plain = reference.expert_swiglu(**args | {"activation": "silu"})
    got = ops.expert_swiglu(**inputs("expert_swiglu", sizes, device) | {"activation": toy}).cpu()
    assert torch.allclose(got, want, atol=1e-5) and not torch.allclose(plain, want, atol=1e-2)
    name = "expert_swiglu_backward"
    wants = OPS[name].call_reference(**inputs(name, sizes) | {"activation": toy})
    for x, y in zip(
        ops.expert_swiglu_backward(**inputs(name, sizes, device) | {"activation": toy}), wants, strict=True
    ):
        assert torch.allclose(x.cpu(), y, atol=1e-4)


@pytest.mark.compiled
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_a_toy_activation_compiles_and_its_source_is_in_the_cache_key(toy: str) -> None:
    args = {**inputs("expert_swiglu", SIZES, "meta", torch.bfloat16), "activation": toy}
    with record_launches("sm_90") as launches:
        OPS["expert_swiglu"].run(**args)
    up = next(launch for launch in launches if "_up_" in launch.kernel)
    assert compile_launch(up, "sm_90").fault is None
    assert hasattr(up.constexprs["ACTIVATION"], "cache_key")  # as Triton's key of a constexpr asks


@pytest.mark.parametrize(
    "wrong",
    [
        "gelu",
        "silu:1",
        "clamped_silu",
        "clamped_silu:x",
        "clamped_silu:-1",
        "clamped_silu:nan",
        "clamped_silu:inf",
        "silu:",
        3,
    ],
)
def test_another_name_is_a_value_error(wrong: Any, device: torch.device) -> None:
    for name in ("expert_swiglu", "expert_swiglu_backward", "experts_add_rms_norm"):
        args = {**inputs(name, SIZES, device), "activation": wrong}
        with pytest.raises(ValueError, match=rf"{name}: argument 'activation' is .*, needs 'silu' or .*:alpha:limit'"):
            getattr(ops, name)(**args)
