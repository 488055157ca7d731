"""Floors and predicted times: compared with published times, between GPUs, and in bench's table; and the timers."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_triton.kernels import linear
from mixtral_triton.kernels.experts.op import ExpertCase
from mixtral_triton.kernels.launch import Launch, LaunchConfig, override_configs
from mixtral_triton.kernels.linear import LinearSizes
from mixtral_triton.kernels.op import Cost, runs_on
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.router import RouteSizes
from mixtral_triton.tools.bench import decode_step
from mixtral_triton.tools.bench.cases import Case, cases
from mixtral_triton.tools.bench.command import op_table
from mixtral_triton.tools.bench.measure import DeviceTimer, Outcome, Row, step_timer, untimed_row
from mixtral_triton.tools.gpus import GPU, GPUS, data_sheet
from mixtral_triton.tools.predict import (
    CAUTIOUS,
    OPTIMISTIC,
    TILE,
    Prediction,
    floor,
    list_schedule,
    measure_gpu,
    predict,
)
from tests.cli.commands import shown
from tests.support.calls import Sizes

pytestmark = pytest.mark.compiled
CPU, H100, BF16 = torch.device("cpu"), GPUS["h100"], torch.bfloat16
LAYER = {"H": 4096, "I": 14336, "E": 8, "K": 2}
PREDICTABLE = [name for name, gpu in GPUS.items() if gpu.l2]

# BLOCK_M, rows of a weight a program takes, BLOCK_K, warps, stages.
Tile = tuple[int, int, int, int, int]
SMALL: Tile = (64, 256, 64, 4, 4)
LARGE: Tile = (128, 256, 64, 8, 4)


def tiles(tile: Tile, short: int = 0) -> dict[str, LaunchConfig]:
    """For both expert kernels of prefill; those of up are half gate, half up. `short`: SHORT_M."""
    m, n, k, warps, stages = tile
    fixed = {"BLOCK_M": m, "SHORT_M": short, "BLOCK_K": k, "GROUP_M": 8}
    columns = {"experts_up_kernel": n // 2, "experts_down_kernel": n}
    return {kernel: LaunchConfig({**fixed, "BLOCK_N": block}, warps, stages) for kernel, block in columns.items()}


def recorded(name: str, sizes: Sizes, arch: str = "sm_90", **configs: LaunchConfig) -> list[Launch]:
    args = OPS[name].inputs(sizes, BF16, torch.device("meta"))
    with override_configs(configs), record_launches(arch) as launches:
        OPS[name].run(**args)
    return launches


def foreseen(name: str, sizes: Sizes, gpu: GPU = H100, **configs: LaunchConfig) -> Prediction:
    return predict(recorded(name, sizes, gpu.arch, **configs), gpu, OPS[name].cost(sizes, BF16))


def microseconds(name: str, sizes: Sizes, **configs: LaunchConfig) -> float:
    return foreseen(name, sizes, **configs).seconds * 1e6


def experts(T: int, **more: float) -> Cost:
    return OPS["expert_swiglu"].cost({"T": T, "H": 4096, "I": 14336, "E": 8, "K": 2, **more}, torch.bfloat16)


# Microseconds for an expert layer of 8x7B in bf16 on an H100 SXM, by the number of tokens, worked out independently.
EXPERT_FLOORS = {1: 210, 2: 368, 4: 575, 8: 758, 16: 834, 32: 843, 128: 848, 512: 866, 1024: 891, 2048: 1459}
EXPERT_FLOORS |= {4096: 2918, 8192: 5837}


@pytest.mark.parametrize(("T", "microseconds"), EXPERT_FLOORS.items())
def test_floors_of_the_expert_layer(T: int, microseconds: int) -> None:
    seconds, bound = floor(experts(T), H100)
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.003) and bound == ("matmul" if T > 1024 else "memory")


@pytest.mark.parametrize(("gpu", "tokens_per_second"), [("h100", 131), ("h200", 188), ("a100", 80)])
def test_floor_of_decoding_8x7b(gpu: str, tokens_per_second: int) -> None:
    sizes = replace(decode_step.MIXTRAL, B=1, S=1, L=32)
    assert 1 / floor(decode_step.cost(sizes, BF16), GPUS[gpu])[0] == pytest.approx(tokens_per_second, rel=0.01)


def test_data_sheet_by_the_driver_s_name() -> None:
    names = {"H100 80GB HBM3": "h100", "H200": "h200", "A100-SXM4-80GB": "a100", "B200": "b200", "A10": "a10"}
    names |= {"B300 SXM6 AC": "b300", "L40S": "l40s", "GeForce RTX 5090": "rtx5090"}
    names |= {"A10G": "a10g", "L4": "l4", "A30": "a30", "A40": "a40", "RTX A6000": "a6000", "H100 NVL": "h100nvl"}
    names |= {"A100-SXM4-40GB": "a100-40", "A100-PCIE-40GB": "a100-40", "GH200 480GB": "gh200"}
    names |= {"RTX 6000 Ada Generation": "rtx6000ada", "RTX PRO 6000 Blackwell Server Edition": "rtxpro6000"}
    assert {name: data_sheet(f"NVIDIA {name}") for name in names} == {name: GPUS[gpu] for name, gpu in names.items()}
    assert all(gpu.driver and gpu.bandwidth and gpu.matmul and gpu.l2 and gpu.vector for gpu in GPUS.values())
    # The same chip with other memory or clocks.
    unknown = ["H100 PCIe", "A100-SXM4-64GB", "H200 NVL", "GB200", "L40", "GeForce RTX 5090 Laptop GPU", "GB300"]
    unknown += ["RTX 6000", "RTX PRO 6000 Blackwell Max-Q Workstation Edition", "GH200 144G HBM3e"]
    assert not [name for name in unknown if data_sheet(f"NVIDIA {name}")]


def test_measure_gpu() -> None:
    gpu = measure_gpu("x", "sm_90", CPU, lambda call: call() is None or 2.0, memory=1 << 12, n=16)
    assert (gpu.bandwidth, gpu.matmul, gpu.source) == (2 * 4096 / 2.0, 2 * 16**3 / 2.0, "measured")


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


def test_predictions_follow_published_times() -> None:
    """Our kernels for many rows with vLLM's tiles: `deterministic` takes them for few rows, too.

    With few tokens latency counts: the prediction is too short, by at most a quarter.
    """
    layer = LAYER | {"I": 7168, "deterministic": True}
    said = [microseconds("expert_swiglu", layer | {"T": T}, **tiles(tile)) for T, (_, tile) in VLLM.items()]
    assert said == sorted(said) and said[0] < said[-1] / 5
    for predicted, (T, (published, _)) in zip(said, VLLM.items(), strict=True):
        least, most = (0.85, 1.15) if T >= 8 else (0.75, 1.0)
        assert least * published < predicted < most * published, T


def test_one_more_launch_takes_longer() -> None:
    launches, cost = recorded("route", {"T": 1, "E": 8, "K": 2}), OPS["route"].cost({"T": 1, "E": 8, "K": 2}, BF16)
    one, two = (predict(launches * times, H100, cost) for times in (1, 2))
    assert one.limit == "launches" and two.seconds >= one.seconds + 1.2e-6 + OPTIMISTIC.kernel
    assert one.cautious == pytest.approx(one.seconds + CAUTIOUS.kernel - OPTIMISTIC.kernel)


# An expert layer of 8x7B on an H100, worked out independently by a list schedule of tiles: 680 TFLOP/s, 89 % of the
# memory's bandwidth, 6.5 TB/s from L2, 3 us a tile.
INDEPENDENT = {512: 989, 1024: 1590, 1536: 2137, 4096: 4959}


@pytest.mark.parametrize("T", INDEPENDENT)
def test_range_of_the_expert_layer_holds_an_independent_estimate(T: int) -> None:
    said = foreseen("expert_swiglu", LAYER | {"T": T})
    assert said.seconds * 1e6 < INDEPENDENT[T] < said.cautious * 1e6 < 1.3 * said.seconds * 1e6


def test_list_schedule() -> None:
    """A program starts on the processor that is free first; long ones at the end are what the others wait for."""
    assert list_schedule([(264, 1.0)], 132) == 2.0 and list_schedule([(265, 1.0)], 132) == 3.0
    assert list_schedule([(1, 3.0), (3, 1.0)], 2) == 3.0 and list_schedule([(3, 1.0), (1, 3.0)], 2) == 4.0
    assert list_schedule([(1.5, 2.0), (0.5, 2.0)], 1) == 4.0  # an expected number of programs
    falling, rising = (list_schedule([(32, float(n)) for n in each], 132) for each in (range(32, 0, -1), range(1, 33)))
    assert 32 * 33 * 16 / 132 <= falling < rising


def test_one_program_more_than_a_wave_takes_another_wave() -> None:
    full, more = ({"T": 64 * m, "H": 4096, "N": 64 * n, "deterministic": True} for m, n in ((12, 11), (7, 19)))
    assert [launch.grid for sizes in (full, more) for launch in recorded("linear", sizes)] == [(132,), (133,)]
    one, two = (foreseen("linear", sizes).parts[0] for sizes in (full, more))
    assert one[1] == two[1] == "L2"
    ends = OPTIMISTIC.tile * (1 + 2 * 64 * 64 / TILE) / 3  # which two on an SM hide
    assert two[0] == pytest.approx(2 * (one[0] - ends))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PREDICTABLE)
def test_no_prediction_is_below_the_floor(name: str) -> None:
    """Nor is the sum of its parts, with no help from the floor; and no kernel below the least time of one."""
    gpu = GPUS[name]
    for case in (case for case in cases(quick=name != "h100") if runs_on(case.sizes, gpu.arch)):
        said, cost = untimed_row(case, gpu).predicted, case.cost()
        assert said is not None
        parts = [seconds for seconds, _ in said.parts]
        assert sum(parts) + gpu.gap(False) * len(parts) >= floor(cost, gpu)[0], (case.op.name, case.as_dict())
        assert 0 < said.share <= 1 and min(parts) >= OPTIMISTIC.kernel


# What a decode step of 8x7B on an H200 reaches of its floor, at the least: one sequence, 1024 positions.
STEP = 0.82


@pytest.mark.parametrize("L", [1, 4])
def test_a_decode_step_is_near_its_floor(L: int) -> None:
    case = Case(decode_step.STEP, replace(decode_step.MIXTRAL, L=L))
    said = untimed_row(case, GPUS["h200"]).predicted
    assert said is not None and said.share >= STEP


@pytest.mark.parametrize("name", ["h100", "h200", "a100", "b200"])
@pytest.mark.parametrize("T", [17, 32, 33, 64])
def test_linear_is_ours_where_that_is_no_slower(name: str, T: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, widths = GPUS[name], ((4096, 6144), (4096, 4096), (4096, 32000), (6144, 8192), (6144, 6144), (6144, 32000))
    weights = ("int4:128", "int8", "fp8") if name == "h100" else ()
    for sizes in (*({"H": H, "N": N} for H, N in widths), *({"H": 4096, "N": 6144, "weight": one} for one in weights)):
        sizes = LinearSizes(T, **sizes)
        if not linear.use_skinny_kernel(sizes, BF16, gpu.arch):
            assert sizes.weight is None
            continue
        seconds = []
        for ours in (True, False):
            with monkeypatch.context() as patch:
                patch.setattr(linear, "use_skinny_kernel", lambda *sizes, ours=ours: ours)
                seconds.append(foreseen("linear", sizes, gpu).seconds)
        assert seconds[0] < (1.0 if sizes.weight else 1.01) * seconds[1], sizes


@pytest.mark.parametrize(("T", "least"), [(512, 0.80), (1024, 0.55), (1536, 0.50), (4096, 0.60), (8192, 0.65)])
@pytest.mark.parametrize("name", ["expert_swiglu", "experts_add_rms_norm"])
def test_share_of_the_floor(name: str, T: int, least: float, covers: Any) -> None:
    share = foreseen(name, LAYER | {"T": T}).share
    covers("predicted shares", f"{name}, T {T}, H100: {100 * share:.0f} % of the floor (bound {100 * least:.0f} %)")
    assert share >= least


def table_of(row: Row) -> str:
    return " ".join(shown(op_table([row])).split())


def test_bench_prints_the_prediction_of_the_data_sheet() -> None:
    case = Case(OPS["expert_swiglu"], ExpertCase(512, **LAYER))
    row = untimed_row(case, H100)
    assert row.predicted is not None
    said = row.as_dict()["predicted"]
    times = {"time_us": row.predicted.seconds * 1e6, "cautious_us": row.predicted.cautious * 1e6}
    assert said == {**times, "limit": "memory", "of_floor": row.predicted.share}
    assert said["of_floor"] == pytest.approx(row.floor_s * 1e6 / said["time_us"]) and row.as_dict()["time_us"] is None
    measured = replace(H100, name="NVIDIA H100 80GB HBM3", bandwidth=3e12, source="measured", l2=0.0)
    timed = replace(untimed_row(case, measured), ours=Outcome(15e-6, right=True))
    assert timed.predicted == row.predicted and timed.floor_s > row.floor_s
    for text in map(table_of, (row, timed)):
        seconds = f"{said['time_us']:,.0f}-{said['cautious_us']:,.0f}"
        assert all(words in text for words in ("predicted, us", seconds, "not measured"))
    assert " memory " in table_of(row) and f"{100 * said['of_floor']:.0f} %" in table_of(row)


def test_no_prediction_for_a_gpu_without_cost_model_figures() -> None:
    gpu = replace(GPUS["a10"], name="A GPU", l2=0.0)
    row = untimed_row(Case(OPS["route"], RouteSizes(1, 8, 2)), gpu)
    assert row.predicted is None and row.as_dict()["predicted"] is None and "redicted" not in table_of(row)
    with pytest.raises(ValueError, match=r"predict: GPU is A GPU, needs one whose L2 bandwidth"):
        foreseen("linear", {"T": 1, "H": 64, "N": 64}, gpu)


class FakeEvent:
    """A CUDA event on a device that has done its work as soon as the host has asked for it."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: Any) -> float:
        return (other.at - self.at) * 1e3


def test_device_timers_time_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the events: neither the sweeps before a run, nor what warms up. A row of steps: all of it."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    sheet = SimpleNamespace(L2_cache_size=1 << 10)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: sheet)
    monkeypatch.setattr("mixtral_triton.tools.bench.measure.SWEEP_BYTES", 1 << 24)
    timer = DeviceTimer(CPU, budget=0.05)
    assert timer.buffer.nbytes == 1 << 24 and timer.sweep_seconds > 0
    calls: list[int] = []

    def call() -> None:
        calls.append(len(calls))
        time.sleep(0.1 if len(calls) == 1 else 0.01)

    assert 0.01 <= timer(call) < 0.02
    assert len(calls) >= 5 + 3
    assert 0.01 <= step_timer(call, budget=0.05) < 0.02


# A layer's attention of 8x7B with 4,096 tokens on an H100, worked out independently: tensor cores at 630 to 750
# TFLOP/s, and beside them a softmax whose exp2 an SM computes 16 a clock.
@pytest.mark.parametrize("name", ["attention", "cached_attention"])
def test_range_of_prefill_attention_is_near_an_independent_estimate(name: str) -> None:
    """A prompt that fills an empty cache counts once, not as if the cache had been full before."""
    keys = {"S": 4096} if name == "attention" else {"C": 4096}
    said = foreseen(name, {"B": 1, "T": 4096, "Hq": 32, "Hkv": 8, "D": 128, **keys})
    assert said.seconds * 1e6 == pytest.approx(327, rel=0.15) and said.cautious * 1e6 == pytest.approx(416, rel=0.15)


def test_streaming_kernels_have_a_ramp() -> None:
    sizes = {"T": 1, "H": 4096, "N": 4096}
    said, bytes_of = foreseen("linear", sizes), OPS["linear"].cost(sizes, BF16).bytes
    (part,) = said.parts
    assert part[0] == pytest.approx(bytes_of / (H100.bandwidth * OPTIMISTIC.memory) + OPTIMISTIC.ramp, rel=0.01)


def test_prefetches_shorten_a_step_by_what_the_launches_in_front_leave_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Written out for the output projection of 8x7B, which follows two launches that do little."""
    sizes = replace(decode_step.MIXTRAL, L=2)
    steps = []
    for on in (True, False):
        monkeypatch.setattr("mixtral_triton.kernels.launch.PREFETCH", on)
        args = decode_step.inputs(sizes, BF16, torch.device("meta"))
        with record_launches() as launches:
            decode_step.decode_step(**args)
        steps.append((launches, predict(launches, H100, decode_step.cost(sizes, BF16))))
    (launches, fast), (_, slow) = steps
    at = next(at for at, launch in enumerate(launches) if launch.kernel == "attention_combine_kernel")
    attention, combine, (output, _) = (part for part in fast.parts[at - 1 : at + 2])
    idle = attention[0] + combine[0] + 2 * 0.6e-6  # less their own bytes: 4 MB of keys and values
    assert slow.parts[at + 1][0] - output == pytest.approx(idle + 0.6e-6 - 4.4e6 / (3.35e12 * 0.92), rel=0.15)
    assert 0.02 < 1 - fast.seconds / slow.seconds < 0.07
