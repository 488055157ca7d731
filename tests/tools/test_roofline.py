"""GPUs, floors and timers: what every figure of the benchmark rests on."""

from __future__ import annotations

import argparse
import time

import pytest
import torch

from mixtral_triton.kernels.op import Cost
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench import decode_step
from mixtral_triton.tools.bench.measure import DeviceTimer, StepTimer
from mixtral_triton.tools.gpus import GPUS, data_sheet
from mixtral_triton.tools.predict import bound, family_note, floor, measure_gpu

CPU, H100 = torch.device("cpu"), GPUS["h100"]


def experts(T: int, **more: float) -> Cost:
    return OPS["expert_swiglu"].cost({"T": T, "H": 4096, "I": 14336, "E": 8, "K": 2, **more}, torch.bfloat16)


# Microseconds for an expert layer of 8x7B in bf16 on an H100 SXM, by the number of tokens, worked out independently.
EXPERT_FLOORS = {1: 210, 2: 368, 4: 575, 8: 758, 16: 834, 32: 843, 128: 848, 512: 866, 1024: 891, 2048: 1459}
EXPERT_FLOORS |= {4096: 2918, 8192: 5837}


@pytest.mark.parametrize(("T", "microseconds"), EXPERT_FLOORS.items())
def test_floors_of_the_expert_layer(T: int, microseconds: int) -> None:
    assert floor(experts(T), H100) * 1e6 == pytest.approx(microseconds, rel=0.003)
    assert bound(experts(T), H100) == ("matmul" if T > 1024 else "memory")


@pytest.mark.parametrize(("gpu", "tokens_per_second"), [("h100", 131), ("h200", 188), ("a100", 80)])
def test_floor_of_decoding_8x7b(gpu: str, tokens_per_second: int) -> None:
    sizes = {**decode_step.STEP.bench_shapes[0], "B": 1, "S": 1, "L": 32}
    assert 1 / floor(decode_step.cost(sizes, torch.bfloat16), GPUS[gpu]) == pytest.approx(tokens_per_second, rel=0.01)


def test_data_sheet_by_the_driver_s_name() -> None:
    names = {
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA H200": "h200",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA B200": "b200",
    }
    names |= {"NVIDIA B300 SXM6 AC": "b300", "NVIDIA A10": "a10", "NVIDIA L40S": "l40s"}
    names |= {"NVIDIA GeForce RTX 5090": "rtx5090"}
    assert {name: data_sheet(name) for name in names} == {name: GPUS[gpu] for name, gpu in names.items()}
    # The same chip with other memory or clocks.
    assert not any(map(data_sheet, ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA H200 NVL", "NVIDIA GB200")))
    assert not any(map(data_sheet, ("NVIDIA A10G", "NVIDIA L40", "NVIDIA GeForce RTX 5090 Laptop GPU", "NVIDIA GB300")))


def test_family_note() -> None:
    assert not any(family_note(GPUS[gpu].arch) for gpu in ("a100", "h100", "h200", "b200", "mi300x"))
    assert "sm_120" in str(family_note("sm_120")) and "sm_80" in str(family_note("sm_120"))
    assert "those of sm_100" in str(family_note(GPUS["b300"].arch))


def test_measure_gpu() -> None:
    gpu = measure_gpu("x", "sm_90", CPU, lambda call: call() is None or 2.0, memory=1 << 12, n=16)
    assert (gpu.bandwidth, gpu.matmul, gpu.source) == (2 * 4096 / 2.0, 2 * 16**3 / 2.0, "measured")


class FakeEvent:
    """A CUDA event on a device that has done its work as soon as the host has asked for it."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None: ...

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.at - self.at) * 1e3


def test_device_timers_time_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the events: neither the sweeps before a run, nor what warms up. A row of steps: all of it."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    sheet = argparse.Namespace(L2_cache_size=1 << 10)
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
    assert 0.01 <= StepTimer(CPU, budget=0.05)(call) < 0.02
