"""`expert_swiglu_backward`: its reference beside autograd, formats, odd sizes, routes; its launches and its memory."""

from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.kernels import reference
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.operation.cases import sample_quantized
from mixtral_triton.kernels.ops.experts import activations, backward
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.weights.fp8 import with_fp8_activations
from mixtral_triton.kernels.weights.quantized import QuantizedWeight
from mixtral_triton.verification.tolerance import Tolerance
from tests.support.calls import as_tuple, inputs, selected_configs, with_offload
from tests.support.memory import LiveBytes
from tests.support.traffic import count_traffic

NAME = "expert_swiglu_backward"
OP = OPS[NAME]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SIZES: dict[str, Any] = {"T": 12, "H": 128, "I": 64, "E": 4, "K": 2}
MODELS = {
    "Mixtral": {"H": 4096, "I": 14336, "E": 8, "K": 2},
    "Qwen3": {"H": 2048, "I": 768, "E": 128, "K": 8},
    "DeepSeek-V3": {"H": 7168, "I": 2048, "E": 256, "K": 8},
}


def test_the_reference_has_the_gradients_of_autograd() -> None:
    drawn = inputs(NAME, SIZES | {"T": 9}).items()
    args = {key: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for key, x in drawn}
    args["ids"][3, 0] = SIZES["E"]  # contributes nothing
    grad, leaves = args.pop("grad"), [args[key].requires_grad_() for key in ("x", "weights")]
    exact = torch.autograd.grad(reference.expert_swiglu(**args), leaves, grad)
    found = OP.call_reference(grad=grad, **args)
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-12) for a, b in zip(found, exact, strict=True))
    assert found[1][3, 0] == 0


def with_zeros(name: str, *shape: int) -> QuantizedWeight:
    weight = sample_quantized(name, *shape, device="cpu", generator=torch.Generator().manual_seed(1))
    zeros = 128 + torch.randint(4, 12, weight.scales.shape, generator=torch.Generator().manual_seed(2))
    return QuantizedWeight(weight.format, weight.data, weight.scales, zeros.bfloat16(), weight.shape, weight.group)


def case(H: int, I: int, E: int = 4, K: int = 2, T: int = 12, **more: Any) -> dict[str, Any]:
    return {"T": T, "H": H, "I": I, "E": E, "K": K, **more}


CASES: list[tuple[dict[str, Any], str]] = [  # sizes, and what else changes
    (case(64, 32, E=2, T=7, gate_up="int4:32", down="int4:32"), "zeros"),
    (case(256, 128, gate_up="int4:32", down="int4:128"), "zeros"),
    (case(192, 64, gate_up="int4:64", down="int4:32"), "zeros"),
    (case(96, 72, gate_up="int4:32", down="int8"), ""),  # padded units, a depth off the tile
    (case(128, 64, gate_up="int8:128", down="fp8:32"), ""),
    (case(72, 40, gate_up="fp8", down="int8"), "codes"),
    (case(72, 40), "empty"),
    (case(90, 35, T=33), "foreign"),
    (case(128, 64, gate_up="int8", down="int4:64"), "offload"),
    (case(64, 32), "offload"),
    (case(64, 32, E=1, K=1, T=1, down="int8"), ""),
]


def arguments(sizes: dict[str, Any], change: str, dtype: torch.dtype) -> dict[str, Any]:
    args, E = inputs(NAME, sizes, dtype=dtype), sizes["E"]
    if change == "zeros":
        args["gate_up_proj"] = with_zeros(sizes["gate_up"], E, 2 * sizes["I"], sizes["H"])
        args["down_proj"] = with_zeros(sizes["down"], E, sizes["H"], sizes["I"])
    elif change == "codes":  # they are dequantized, as those of fp8
        args["gate_up_proj"] = with_fp8_activations(args["gate_up_proj"])
    elif change == "empty":
        args["ids"] = args["ids"] * 0 + torch.tensor([1, 3], dtype=torch.int32)
    elif change == "foreign":
        args["ids"][::3, 0], args["ids"][5, 1] = E, -7
    elif change == "offload":
        args = with_offload(args, (0, 2))
    return args


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("sizes", "change"), CASES, ids=str)
def test_formats_sizes_and_routes(sizes: dict[str, Any], change: str, dtype: torch.dtype, covers: Any) -> None:
    """fp32: at most 1e-5 of the largest gradient; bf16: at most twice the error of plain torch."""
    args = arguments(sizes, change, dtype)
    exact = {key: x for key, x in args.items() if key != "gate_up_proj"}
    exact["gate_up_proj"] = args["gate_up_proj"].viewed_as("fp8") if change == "codes" else args["gate_up_proj"]
    got, again = OP.run(**args), OP.run(**args)
    error, limit = Tolerance(NAME, exact).measure(lambda **_: got)
    assert error <= (1e-5 if dtype == FP32 else limit) and all(map(torch.equal, got, again))
    own = (args["ids"] >= 0) & (args["ids"] < sizes["E"])
    assert got[1].dtype == FP32 and not got[1][~own].any() and got[1][own].all()
    covers("gradients", f"expert_swiglu_backward {sizes} {change} {dtype}: {error:.1e} (limit {limit:.1e})")


def test_no_tokens_and_expanded_gradients(device: torch.device) -> None:
    args = inputs(NAME, SIZES, device)
    none = args | {key: args[key][:0] for key in ("grad", "x", "ids", "weights")}
    assert [tuple(x.shape) for x in as_tuple(ops.expert_swiglu_backward(**none))] == [(0, 128), (0, 2)]
    expanded = torch.ones((), device=device).expand_as(args["grad"])  # of `sum`
    found = ops.expert_swiglu_backward(**args | {"grad": expanded})
    assert all(map(torch.equal, found, ops.expert_swiglu_backward(**args | {"grad": expanded.clone()})))


@pytest.mark.exhaustive
@pytest.mark.interpreted
@pytest.mark.parametrize("name", ["int4:128", "int8", None])
def test_a_weight_is_read_once_for_each_row_tile(name: str | None, covers: Any) -> None:
    """One row tile an expert: exactly once, by each of the three products."""
    sizes = case(256, 256, E=2, K=1, T=40, gate_up=name, down=name)
    args = inputs(NAME, sizes, dtype=BF16)
    args["ids"] = (torch.arange(40, dtype=torch.int32) % 2)[:, None]
    with count_traffic() as traffic:
        OP.run(**args)
    for kernel, operand in (("down", "down"), ("grad_h", "weight"), ("grad_x", "weight")):
        weight = traffic[f"experts_{kernel}_kernel"].arguments[operand]
        ratio = weight.loaded / (weight.buffer.numel() * weight.buffer.element_size())
        assert ratio == 1.0, (kernel, ratio)
        covers("traffic", f"expert_swiglu_backward, {name}, {kernel}: {ratio:.2f} of the stored weight")


def meta(model: str, T: int, name: str | None) -> dict[str, Any]:
    return inputs(NAME, MODELS[model] | {"T": T, "gate_up": name, "down": name}, "meta", BF16)


MOST_BYTES = {"Mixtral": 0.82e9, "Qwen3": 0.35e9, "DeepSeek-V3": 1.0e9}


@pytest.mark.compiled
@pytest.mark.parametrize("name", ["int4:128", None])
@pytest.mark.parametrize("model", MODELS)
def test_launches_and_memory(model: str, name: str | None, covers: Any) -> None:
    """No host read (meta tensors have no values), no dense expert, at most ten launches, none of torch's."""
    for arch in ("sm_80", "sm_89", "sm_90", "sm_100", "gfx942"):
        args = meta(model, 4096, name)
        with record_launches(arch) as launches:
            OP.run(**args)
        assert len(launches) <= 10 and all(launch.fn is not None for launch in launches)
    with LiveBytes() as live:
        OP.run(**args)
    assert live.peak <= MOST_BYTES[model]
    covers("training", f"{model}, {name or 'bf16'}, T = 4,096: {len(launches)} launches, {live.peak / 1e9:.2f} GB")


def test_each_transposed_product_has_a_tile_that_divides_its_depth() -> None:
    for sizes in (*MODELS.values(), {"H": 2880, "I": 1440, "E": 4, "K": 2}):
        for name in (None, "int8"):
            call = {**sizes, "T": 4096, "gate_up": name, "down": name}
            tiles = selected_configs(NAME, call, BF16)
            depths = {"experts_grad_h_kernel": sizes["H"], "experts_grad_x_kernel": 2 * sizes["I"]}
            assert all(depth % tiles[kernel].constexprs["BLOCK_K"] == 0 for kernel, depth in depths.items())


@pytest.mark.interpreted
def test_a_derivative_without_its_second_term_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Injected fault."""
    right, args = activations.silu, inputs(NAME, SIZES)

    def faulty(gate: Any, up: Any, numbers: Any) -> Any:
        h, _, of_up = right(gate, up, numbers)
        return h, h / gate, of_up

    monkeypatch.setattr(backward, "constants", lambda name: {"ACTIVATION": faulty, "NUMBERS": ()})
    error, limit = Tolerance(NAME, args).measure(OP.run)
    assert error > 100 * limit and INTERPRETED


def test_wrong_arguments_are_named(device: torch.device) -> None:
    args = inputs(NAME, SIZES, device)
    for name, wrong in (("x", args["x"][:, 1:]), ("weights", args["weights"][:, :1]), ("ids", args["x"])):
        with pytest.raises(ValueError, match=f"expert_swiglu_backward: argument '{name}' is"):
            ops.expert_swiglu_backward(**args | {name: wrong})
    outside = {**inputs(NAME, SIZES), "ids": args["ids"].cpu() + SIZES["E"]}
    with pytest.raises(ValueError, match="argument 'ids' is from"):
        ops.expert_swiglu_backward(**outside)
