"""The transposed products of `expert_swiglu_backward`, compiled offline: FLOP an instruction, and no spill."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mixtral_triton.bench.compile import compile_launch
from mixtral_triton.kernels.launching.arch import ARCHS
from mixtral_triton.kernels.launching.launch import Launch
from mixtral_triton.kernels.ops.experts import backward_kernels
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights.quantized import QuantSpec
from tests.support.calls import inputs
from tests.support.faults import module_with_fault

pytestmark = pytest.mark.compiled

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
QWEN3 = {"T": 4096, "H": 2048, "I": 768, "E": 128, "K": 8}
ODD = {"T": 300, "H": 90, "I": 70, "E": 8, "K": 2}


def launches(arch: str, name: str | None, dtype: torch.dtype = BF16, sizes: Any = QWEN3, zeros: bool = False) -> Any:
    """The kernels that are not the forward's."""
    args = inputs("expert_swiglu_backward", {**sizes, "gate_up": name, "down": name}, "meta", dtype)
    for key in ("gate_up_proj", "down_proj") if zeros else ():
        spec = args[key].spec
        args[key] = QuantSpec(spec.format, spec.group, spec.scales, True).empty(tuple(args[key].shape), "meta")
    with record_launches(arch) as found:
        OPS["expert_swiglu_backward"].run(**args)
    return [
        launch for launch in found if "_grad_" in launch.kernel or launch.fn.__module__ == backward_kernels.__name__
    ]


# FLOP for each other instruction: at least 95 % of a prototype's, whose FLOP were
# sm_90 5,958 / 2,175 / 2,533, sm_89 2,731 / 1,872 / 1,473 for dense / int4 / int8.
FLOP = {
    ("sm_90", None): 5660,
    ("sm_90", "int4:128"): 2066,
    ("sm_90", "int8"): 2406,
    ("sm_89", None): 2594,
    ("sm_89", "int4:128"): 1778,
    ("sm_89", "int8"): 1399,
}


def figure(launch: Launch, arch: str) -> float:
    compiled = compile_launch(launch, arch)
    assert compiled.fault is None, compiled
    return compiled.loop_flop_per_instruction or 0.0


@pytest.mark.exhaustive
@pytest.mark.parametrize(("arch", "name"), FLOP)
def test_transposed_products_do_little_beside_their_dots(arch: str, name: str | None, covers: Any) -> None:
    for launch in launches(arch, name):
        if "_grad_" in launch.kernel:
            flop, least = figure(launch, arch), FLOP[arch, name]
            assert flop >= least, (launch.kernel, flop)
            covers("main loops", f"{launch.kernel}, {name or 'bf16'}, {arch}: {flop:,.0f} FLOP (bound {least:,})")


def test_a_shift_by_a_constant_is_caught(tmp_path: Any) -> None:
    """Injected fault: sm_80 then unpacks in the layout of the operand, in each warp."""
    fault = ("zero = tl.minimum(pid_n, 0)", "zero: tl.constexpr = 0")
    module = module_with_fault(backward_kernels, tmp_path, fault)
    launch = next(each for each in launches("sm_89", "int4:128") if each.kernel == "experts_grad_h_kernel")
    assert figure(replace(launch, fn=module.experts_grad_h_kernel), "sm_89") < FLOP["sm_89", "int4:128"] / 2


CASES = [(name, dtype, QWEN3, False) for name in (None, "int4:128", "int8", "fp8") for dtype in (BF16, FP16, FP32)]
CASES += [(name, dtype, QWEN3, True) for name in ("int4:32", "int4:128") for dtype in (BF16, FP16)]
CASES += [(name, BF16, QWEN3, False) for name in ("int4:64", "int8:32", "fp8:128")]
CASES += [(name, dtype, ODD, False) for name in (None, "int8") for dtype in (BF16, FP16)]


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(("name", "dtype", "sizes", "zeros"), CASES, ids=str)
def test_no_spill_in_any_format(name: str | None, dtype: torch.dtype, sizes: Any, zeros: bool, arch: str) -> None:
    for launch in launches(arch, name, dtype, sizes, zeros):
        compiled = compile_launch(launch, arch)
        assert compiled.fault is None, (launch.kernel, compiled.fault)
