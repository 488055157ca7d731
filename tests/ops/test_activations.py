"""The activations of experts: their derivatives, their names, and a toy that one entry in each table adds."""

from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from mixtral_triton import ops, reference
from mixtral_triton.bench.compile import compile_launch
from mixtral_triton.kernels import activations as formulas
from mixtral_triton.kernels.activations import activate
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.ops.experts import activations
from mixtral_triton.kernels.ops.experts.op import ACTIVATIONS
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from tests.support.calls import inputs

SIZES: dict[str, Any] = {"T": 5, "H": 64, "I": 32, "E": 4, "K": 2}
NAMES = "silu", *ACTIVATIONS


@triton.jit
def squared_relu(gate, up, NUMBERS: tl.constexpr):
    relu = tl.maximum(gate, 0.0) * NUMBERS[0]
    return relu * gate * up, 2 * relu * up, relu * gate


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> str:
    plain = lambda gate, up, factor: factor * gate.relu() ** 2 * up  # noqa: E731
    slopes = lambda gate, up, factor: (2 * factor * gate.relu() * up, factor * gate.relu() ** 2)  # noqa: E731
    monkeypatch.setitem(formulas.ACTIVATIONS, "squared_relu", (plain, slopes))
    monkeypatch.setitem(activations.KERNELS, "squared_relu", squared_relu)
    return "squared_relu:0.5"


def test_each_name_has_a_formula_a_kernel_and_a_case() -> None:
    named = [name.partition(":")[0] for name in NAMES]
    assert named == [*formulas.ACTIVATIONS] == [*activations.KERNELS]


@pytest.mark.parametrize("name", [*NAMES, "toy"])
def test_derivatives_are_those_of_autograd(name: str, toy: str) -> None:
    name = toy if name == "toy" else name
    steps = torch.linspace(-5, 5, 101, dtype=torch.float64)
    gate, up = (x.requires_grad_() for x in (steps.repeat(101), steps.repeat_interleave(101)))
    want = torch.autograd.grad(activate(gate, up, name).sum(), (gate, up))
    for x, y in zip(activate(gate.detach(), up.detach(), name, True), want, strict=True):
        assert torch.allclose(x, y, rtol=1e-12, atol=1e-12)


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
    "wrong", ["gelu", "silu:1", "clamped_silu", "clamped_silu:x", "clamped_silu:-1", "clamped_silu:nan", "silu:", 3]
)
def test_another_name_is_a_value_error(wrong: Any, device: torch.device) -> None:
    for name in ("expert_swiglu", "expert_swiglu_backward", "experts_add_rms_norm"):
        args = {**inputs(name, SIZES, device), "activation": wrong}
        with pytest.raises(ValueError, match=rf"{name}: argument 'activation' is .*, needs 'silu' or .*:alpha:limit'"):
            getattr(ops, name)(**args)
