"""Predicted times: beside what others published, beside what interpreted kernels load, and what makes them longer."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from mixtral_triton.kernels.launch import INTERPRETED, override_configs
from mixtral_triton.kernels.op import Launch, LaunchConfig, Shape, Sizes
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench.cases import Case, cases
from mixtral_triton.tools.bench.measure import Outcome, Row, untimed_row
from mixtral_triton.tools.bench.report import op_table
from mixtral_triton.tools.gpus import GPU, GPUS
from mixtral_triton.tools.predict import Prediction, floor, predict
from mixtral_triton.tools.traffic import count_traffic
from mixtral_triton.tools.work import WORK, count_work, row_tiles

H100, BF16 = GPUS["h100"], torch.bfloat16
LAYER = Shape(H=4096, I=14336, E=8, K=2)
PREDICTABLE = [name for name, gpu in GPUS.items() if gpu.chip is not None]
once = pytest.mark.skipif(INTERPRETED, reason="runs no kernel: once, without TRITON_INTERPRET")

# BLOCK_M, rows of a weight a program takes, BLOCK_K, warps, stages.
Tile = tuple[int, int, int, int, int]
SMALL: Tile = (64, 256, 64, 4, 4)
LARGE: Tile = (128, 256, 64, 8, 4)


def tiles(tile: Tile, short: int = 0) -> dict[str, LaunchConfig]:
    """For both expert kernels of prefill; those of up are half gate, half up. `short`: SHORT_M."""
    m, n, k, warps, stages = tile
    columns = {"experts_up_kernel": n // 2, "experts_down_kernel": n}
    rows = {"BLOCK_M": m, "SHORT_M": short}
    return {
        kernel: LaunchConfig({**rows, "BLOCK_N": block, "BLOCK_K": k, "GROUP_M": 8}, warps, stages)
        for kernel, block in columns.items()
    }


def recorded(name: str, sizes: Sizes, arch: str = "sm_90", **configs: LaunchConfig) -> list[Launch]:
    args = OPS[name].inputs(sizes, BF16, torch.device("meta"))
    if sizes.get("T") is not None and isinstance(sizes, Shape) and sizes.switches.deterministic:
        args["deterministic"] = True
    with override_configs(configs), record_launches(arch) as launches:
        OPS[name].run(**args)
    return launches


def foreseen(name: str, sizes: Sizes, gpu: GPU = H100, **configs: LaunchConfig) -> Prediction:
    return predict(recorded(name, sizes, gpu.arch, **configs), gpu, OPS[name].cost(sizes, BF16))


def microseconds(name: str, sizes: Sizes, **configs: LaunchConfig) -> float:
    return foreseen(name, sizes, **configs).seconds * 1e6


# Published by vLLM: its fused experts of 8x7B on two H100s, half the width on each, by the number of tokens; with the
# tiles that it ships for that.
VLLM: dict[int, tuple[float, Tile]] = {
    1: (144, (16, 64, 128, 4, 4)),
    2: (229, (16, 128, 128, 8, 4)),
    4: (351, (16, 32, 256, 4, 4)),
    8: (435, (16, 128, 128, 8, 4)),
    16: (471, (16, 128, 128, 4, 4)),
    64: (483, (32, 128, 128, 4, 4)),
    256: (537, (64, 128, 128, 4, 4)),
    512: (662, SMALL),
    1024: (834, LARGE),
    1536: (1123, LARGE),
}


def half_layer(T: int) -> float:
    """Our kernels for many rows with vLLM's tiles: `deterministic` takes them for few rows, too."""
    return microseconds("expert_swiglu", LAYER | {"T": T, "I": 7168, "deterministic": True}, **tiles(VLLM[T][1]))


@once
@pytest.mark.parametrize("T", [T for T in VLLM if T >= 8])
def test_published_times_of_vllm(T: int) -> None:
    assert half_layer(T) == pytest.approx(VLLM[T][0], rel=0.15)


@once
def test_predictions_keep_the_order_of_published_times() -> None:
    said = [half_layer(T) for T in VLLM]
    assert said == sorted(said) and said[0] < said[-1] / 5
    # With few tokens latency counts: the prediction is too short, by at most a quarter.
    assert all(0.75 * VLLM[T][0] < half_layer(T) < VLLM[T][0] for T in (1, 2, 4))


# Worked out independently: bytes of whole waves of tiles at 7 TB/s, weights at 92 % of 3.35 TB/s, 1.2 us a gap.
OWN = {(512, SMALL): 1314, (512, LARGE): 1036, (1024, SMALL): 2371, (1024, LARGE): 1650, (1536, SMALL): 3442}
OWN |= {(1536, LARGE): 2253, (2048, LARGE): 2900, (4096, LARGE): 5446, (8192, LARGE): 10400}


@once
@pytest.mark.parametrize(("T", "tile"), OWN)
def test_an_expert_layer_by_its_tile(T: int, tile: Tile) -> None:
    said = foreseen("expert_swiglu", LAYER | {"T": T}, **tiles(tile))
    assert said.seconds * 1e6 == pytest.approx(OWN[T, tile], rel=0.15) and said.limit == "L2"


@once
@pytest.mark.parametrize(
    ("name", "sizes", "kernel", "waste"),
    [
        ("linear", Shape(T=4, H=4096, N=4096), "linear_decode_kernel", {"BLOCK_N": 128}),
        ("linear", Shape(T=4096, H=4096, N=4096, deterministic=True), "linear_kernel", {"BLOCK_N": 32}),
        ("expert_swiglu", LAYER | {"T": 2048}, "experts_down_kernel", {"BLOCK_M": 32, "SHORT_M": 0}),
        ("attention", Shape(B=1, T=4096, S=4096, Hq=32, Hkv=8, D=128, window=64), "attention_prefill_kernel",
         {"BLOCK_M": 256}),
    ],
)  # fmt: skip
def test_more_padding_or_a_smaller_tile_takes_longer(
    name: str, sizes: Sizes, kernel: str, waste: dict[str, int]
) -> None:
    selected = next(launch for launch in recorded(name, sizes) if launch.kernel == kernel)
    tile = {key: size for key, size in selected.constexprs.items() if key.startswith(("BLOCK", "SHORT", "GROUP_M"))}
    config = LaunchConfig({**tile, **waste}, selected.num_warps or 4, selected.num_stages or 1)
    assert microseconds(name, sizes, **{kernel: config}) > 1.05 * microseconds(name, sizes)


@once
@pytest.mark.parametrize("format", ["int4:128", None])
def test_padding_of_few_rows_is_multiplied_and_not_loaded(format: str | None) -> None:
    one, many = (count_work(recorded("linear", Shape(T=T, H=512, N=64, weight=format))[0]) for T in (1, 4))
    assert many.loaded - one.loaded == 3 * 512 * 2 and many.flops == one.flops


@once
def test_one_more_launch_takes_longer() -> None:
    launches, cost = recorded("route", Shape(T=1, E=8, K=2)), OPS["route"].cost(Shape(T=1, E=8, K=2), BF16)
    one, two = (predict(launches * times, H100, cost) for times in (1, 2))
    assert one.limit == "launches" and two.seconds >= one.seconds + 1.2e-6


@once
def test_one_program_more_than_a_wave_takes_another_wave() -> None:
    full, more = (Shape(T=64 * m, H=4096, N=64 * n, deterministic=True) for m, n in ((12, 11), (7, 19)))
    assert [launch.grid for sizes in (full, more) for launch in recorded("linear", sizes)] == [(132,), (133,)]
    one, two = (foreseen("linear", sizes).parts[0] for sizes in (full, more))
    assert one.limit == two.limit == "L2" and two.seconds == pytest.approx(2 * one.seconds)


@once
@pytest.mark.parametrize("name", PREDICTABLE)
def test_no_prediction_is_below_the_floor(name: str) -> None:
    """Nor is the sum of its parts, with no help from the floor."""
    gpu = GPUS[name]
    for case in cases(quick=name != "h100"):
        said, cost = untimed_row(case, gpu).predicted, case.cost()
        assert said is not None and gpu.chip is not None
        parts = sum(part.seconds for part in said.parts) + gpu.chip.launch_gap * len(said.parts)
        assert parts >= floor(cost, gpu) and 0 < said.share <= 1, (case.op.name, case.as_dict())


@once
@pytest.mark.parametrize(
    ("B", "T", "rows"), [(1, 128, 64), (1, 500, 64), (1, 1024, 128), (8, 512, 128), (1, 8192, 128)]
)
def test_attention_uses_the_faster_of_two_tiles(B: int, T: int, rows: int) -> None:
    """Two small programs an SM hide each other's softmax, and read the keys twice as often."""
    sizes = Shape(B=B, T=T, S=T, Hq=32, Hkv=8, D=128, window=0)
    (launch,) = recorded("attention", sizes)
    configs = {m: LaunchConfig({"BLOCK_M": m, "BLOCK_N": 128, "BLOCK_D": 128}, m // 16, m // 64) for m in (64, 128)}
    times = {m: microseconds("attention", sizes, attention_prefill_kernel=config) for m, config in configs.items()}
    assert launch.constexprs["BLOCK_M"] == rows == min(times, key=lambda m: times[m])


@once
def test_bytes_of_launches_sum_to_the_operation_s_cost() -> None:
    """Beyond them lie the partial sums of splits, and x in sorted order."""
    for case in cases():
        args = case.inputs(torch.device("meta"))
        with record_launches() as launches, torch.no_grad():
            case.op.run(**args)
        bytes = sum(count_work(launch).memory for launch in launches)
        assert 0.9999 <= bytes / case.cost().bytes < 1.07, (case.op.name, case.as_dict())


@once
def test_a_faster_gpu_is_predicted_to_be_faster() -> None:
    by_gpu = {name: foreseen("expert_swiglu", LAYER | {"T": 4096}, GPUS[name]).seconds for name in PREDICTABLE}
    assert by_gpu["a100"] > by_gpu["h100"] > by_gpu["b200"]
    fast = {name: foreseen("expert_swiglu", LAYER | {"T": 8}, GPUS[name]).seconds for name in PREDICTABLE}
    assert fast["a100"] > fast["h100"] > fast["h200"] > fast["b200"]


@once
def test_every_launch_of_the_registry_has_work() -> None:
    for op in OPS.values():
        for sizes in (*op.test_shapes, *op.bench_shapes):
            for dtype in op.dtypes:
                args = op.inputs(sizes, dtype, torch.device("meta"))
                with record_launches() as launches:
                    op.run(**args)
                for launch in launches:
                    work = count_work(launch)
                    assert work.memory > 0 and work.programs > 0 and work.loaded > 0
                    # What multiplies tiles has a formula of its own: it does not stream its tensors.
                    source = "" if launch.fn is None else launch.fn.src
                    assert launch.kernel in WORK or ("tl.dot" not in source and "add_products" not in source)


@once
def test_unknown_kernel_or_gpu_raises_value_error() -> None:
    with pytest.raises(
        ValueError, match=r"count_work: kernel is 'new_kernel', needs one with a formula: .*linear_kernel"
    ):
        count_work(Launch("new_kernel", (1,)))
    with pytest.raises(ValueError, match=r"predict: GPU is A10, needs one whose L2 bandwidth"):
        foreseen("linear", Shape(T=1, H=64, N=64), GPUS["a10"])


@once
@pytest.mark.parametrize(("T", "rows"), [(7, 4), (64, 16), (300, 128)])
def test_row_tiles_are_those_of_random_routing(T: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = torch.rand(2000, T, 8, generator=generator).argsort(-1)[..., :2].flatten(1)
    counts = torch.stack([(groups == expert).sum(1) for expert in range(8)])
    whole = -(-counts // rows)
    expected = float(whole.sum(0).double().mean())
    assert row_tiles(T, 2 / 8, 8, rows) == pytest.approx((expected, rows * expected), rel=0.01)
    tiles = math.ceil(T / rows)
    assert row_tiles(T, 1.0, 2, rows) == (2 * tiles, 2 * tiles * rows)
    half = rows // 2
    issued = whole * rows - half * ((counts % rows > 0) & (counts % rows <= half))
    heights = (half, rows)
    assert row_tiles(T, 2 / 8, 8, rows, heights)[1] == pytest.approx(float(issued.sum(0).double().mean()), rel=0.01)


COUNTED = [
    ("linear", Shape(T=128, H=256, N=128, deterministic=True), ("x", "weight"), 1.0),
    ("linear", Shape(T=16, H=512, N=64), ("x", "weight"), 1.0),
    ("linear", Shape(T=16, H=512, N=64, weight="int4:128"), ("x", "weight", "scales"), 1.0),
    ("linear", Shape(T=128, H=512, N=64, weight="int8"), ("x", "weight"), 1.0),
    ("gate_route", Shape(T=32, H=512, E=16, K=2), ("x", "gate"), 1.0),
    ("attention", Shape(B=1, T=512, S=512, Hq=2, Hkv=1, D=64, window=0), ("q", "k", "v"), 1.1),
    ("attention", Shape(B=1, T=512, S=512, Hq=2, Hkv=1, D=64, window=100), ("q", "k", "v"), 1.4),
    ("attention", Shape(B=2, T=1, S=1024, Hq=16, Hkv=1, D=64, window=0), ("q", "k", "v"), 1.0),
]


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter: needs TRITON_INTERPRET=1")
@pytest.mark.parametrize(("name", "sizes", "tensors", "most"), COUNTED)
def test_formulas_match_interpreted_kernels(name: str, sizes: Shape, tensors: tuple[str, ...], most: float) -> None:
    """Exactly where tiles are full; of attention keys outside the mask are in the formula and not in the count."""
    args = OPS[name].inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(0))
    with count_traffic() as traffic, record_launches() as launches:
        OPS[name].run(**args)
    work = count_work(launches[0])
    loaded = sum(argument.loaded for key, argument in traffic.kernels[0].arguments.items() if key in tensors)
    assert 1.0 <= work.programs * work.loaded / loaded <= most
    flops = traffic.kernels[0].flops
    assert flops <= work.programs * work.flops <= most * flops


@pytest.mark.skipif(not INTERPRETED, reason="counts in the interpreter: needs TRITON_INTERPRET=1")
@pytest.mark.parametrize("T", [64, 960])
def test_expert_formulas_match_interpreted_kernels(T: int) -> None:
    """Of even routes, as the formulas expect of random ones."""
    sizes = Shape(T=T, H=256, I=256, E=8, K=2)
    args = OPS["expert_swiglu"].inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(0))
    args["ids"] = torch.arange(2 * T, dtype=torch.int32).view(T, 2) % 8
    with count_traffic() as traffic, record_launches() as launches:
        OPS["expert_swiglu"].run(**args)
    ours = [launch for launch in launches if launch.grid]
    products = {"experts_up": ("x", "short", "gate_up"), "experts_down": ("h", "short", "down")}
    checked = 0
    for launch, kernel in zip(ours, traffic.kernels, strict=True):
        for _, operands in (item for item in products.items() if launch.kernel.startswith(item[0])):
            work, loaded = (
                count_work(launch),
                sum(kernel.arguments[name].loaded for name in operands if name in kernel.arguments),
            )
            assert work.programs * work.loaded == pytest.approx(loaded, rel=0.1)
            assert work.programs * work.flops == pytest.approx(kernel.flops, rel=0.1)
            checked += 1
    assert checked == 2


def shown(rows: list[Row], width: int = 120) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(op_table(rows))
    return captured.get()


@once
def test_bench_prints_the_prediction() -> None:
    case = Case(OPS["expert_swiglu"], LAYER | {"T": 512})
    row = untimed_row(case, H100)
    assert row.predicted is not None
    said = row.as_dict()["predicted"]
    assert said == {"time_us": row.predicted.seconds * 1e6, "limit": "memory", "of_floor": row.predicted.share}
    assert said["of_floor"] == pytest.approx(row.floor_s * 1e6 / said["time_us"]) and row.as_dict()["time_us"] is None
    for width in (80, 120):
        text = " ".join(shown([row], width).split())
        assert "predicted, us" in text and f"{said['time_us']:,.0f}" in text and "not measured" in text
        assert " memory " in text and f"{100 * said['of_floor']:.0f} %" in text


@once
def test_a_measured_gpu_gets_the_prediction_of_its_data_sheet() -> None:
    case = Case(OPS["linear"], Shape(T=1, H=4096, N=4096))
    measured = replace(H100, name="NVIDIA H100 80GB HBM3", bandwidth=3e12, source="measured", chip=None)
    row = replace(untimed_row(case, measured), ours=Outcome(15e-6, right=True))
    assert row.predicted == untimed_row(case, H100).predicted and row.floor_s > untimed_row(case, H100).floor_s
    text = shown([row])
    assert "15" in text and f"{row.predicted.seconds * 1e6:.3g}" in text and "not measured" in text  # type: ignore[union-attr]


@once
@pytest.mark.parametrize("name", ["a10", "b300"])
def test_no_prediction_for_a_gpu_without_cost_model_figures(name: str) -> None:
    row = untimed_row(Case(OPS["route"], Shape(T=1, E=8, K=2)), GPUS[name])
    assert row.predicted is None and row.as_dict()["predicted"] is None and "redicted" not in shown([row])
