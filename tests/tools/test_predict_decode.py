"""What is predicted of few rows: bytes from L2, a decode step's share of its floor, and who multiplies."""

from __future__ import annotations

from typing import Any

import pytest

from mixtral_triton.kernels import linear
from mixtral_triton.kernels.dispatch import expected_distinct_experts
from mixtral_triton.kernels.launch import tensors
from mixtral_triton.kernels.op import Shape
from mixtral_triton.tools.bench.cases import cases
from mixtral_triton.tools.bench.measure import untimed_row
from mixtral_triton.tools.gpus import GPUS
from mixtral_triton.tools.offline import compile_launch
from mixtral_triton.tools.predict import sm_shared_bytes
from mixtral_triton.tools.work import count_work
from tests.tools.test_predict import BF16, LAYER, foreseen, microseconds, once, recorded

# By how few rows: bytes from L2 for each byte of a weight.
A_WEIGHT_BYTE = {1: 1.3, 4: 1.3, 9: 1.3, 16: 1.3, 17: 1.5, 32: 1.5, 64: 1.5}


@once
@pytest.mark.parametrize("T", A_WEIGHT_BYTE)
@pytest.mark.parametrize(("H", "I", "N"), [(4096, 14336, 6144), (6144, 16384, 8192)])
def test_decode_loads_little_more_than_its_weights_from_l2(
    T: int, H: int, I: int, N: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where routing is uniform; the gate's by the program, each of which reads it whole."""
    monkeypatch.setattr(linear, "use_skinny_kernel", lambda *sizes: True)
    layer = Shape(T=T, H=H, I=I, N=N, E=8, K=2)
    for name in ("linear", "expert_swiglu", "gate_route", "rms_norm_gate_route"):
        for launch in recorded(name, layer):
            operands = {key.removesuffix("_ptr"): one for key, one in tensors(dict(launch.args)).items()}
            weight = next((operands[key] for key in ("gate", "weight", "gate_up", "down") if key in operands), None)
            if weight is None:  # the experts' combine
                continue
            share = expected_distinct_experts(T, 2 / 8, 8) / 8 if name == "expert_swiglu" else 1.0
            programs = 1 if "gate" in operands else count_work(launch).programs
            weight_bytes = weight.nbytes + operands["norm"].nbytes if "norm" in operands else weight.nbytes
            assert programs * count_work(launch).loaded / (weight_bytes * share) <= A_WEIGHT_BYTE[T], (launch.kernel, T)


@once
def test_two_programs_of_32_tokens_fit_an_sm() -> None:
    for launch in recorded("expert_swiglu", LAYER | {"T": 32})[:2]:
        assert 2 * count_work(launch).shared < sm_shared_bytes("sm_90")


# What a decode step of 8x7B on an H200 reaches of its floor, at the least: one sequence, 1024 positions.
STEP = 0.82


@once
@pytest.mark.parametrize("L", [1, 4])
def test_a_decode_step_is_near_its_floor(L: int) -> None:
    (case,) = (
        case
        for case in cases(["decode_step"])
        if {**case.sizes, "L": L, "B": 1, "S": 1024, "H": 4096} == {**case.sizes}
    )
    said = untimed_row(case, GPUS["h200"]).predicted
    assert said is not None and said.share >= STEP


@once
@pytest.mark.parametrize("name", ["h100", "h200", "a100", "b200"])
@pytest.mark.parametrize("T", [17, 32, 33, 64])
def test_linear_is_ours_where_that_is_no_slower(name: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a library, as it is predicted."""
    gpu = GPUS[name]
    for H, N in ((4096, 6144), (4096, 4096), (4096, 32000), (6144, 8192), (6144, 6144), (6144, 32000)):
        sizes = Shape(T=T, H=H, N=N)
        if not linear.use_skinny_kernel(sizes, BF16, gpu.arch):
            continue
        seconds = []
        for ours in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(linear, "use_skinny_kernel", lambda *sizes, ours=ours: ours)
                seconds.append(foreseen("linear", sizes, gpu).seconds)
        assert seconds[0] <= 1.01 * seconds[1], sizes


@once
@pytest.mark.parametrize("format", ["int4:128", "int8", "fp8"])
def test_quantized_linear_takes_the_faster_kernel(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for T in (17, 64):
        sizes = Shape(T=T, H=4096, N=6144, weight=format)
        selected = microseconds("linear", sizes)
        with monkeypatch.context() as patch:
            patch.setattr(linear, "use_skinny_kernel", lambda *sizes: False)
            assert selected < microseconds("linear", sizes)


# Thread instructions that a byte of a dense weight may cost, of which an H200 has 6.0 to spare and a B200 4.4.
A_BYTE = 2.5


@once
@pytest.mark.parametrize("T", [1, 9, 16, 32, 64])
def test_masks_cost_few_instructions(T: int, monkeypatch: pytest.MonkeyPatch, covers: Any) -> None:
    monkeypatch.setattr(linear, "use_skinny_kernel", lambda *sizes: True)
    for name in ("linear", "expert_swiglu"):
        for launch in recorded(name, LAYER | {"T": T, "N": 6144}):
            if "decode" not in launch.kernel:
                continue
            rows = launch.constexprs["BLOCK_N"] * (2 if "_up_" in launch.kernel else 1)
            (loop,) = compile_launch(launch, "sm_90").loops
            figure = loop.instructions_a_byte(launch.num_warps or 0, rows * launch.constexprs["BLOCK_K"] * 2)
            assert figure <= A_BYTE and not loop.spills, (launch.kernel, figure)
            covers("main loops", f"{launch.kernel}, T {T}: {figure:.2f} thread instructions a byte (bound {A_BYTE})")
