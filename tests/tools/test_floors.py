"""Floors: of an expert layer and of a decode step, worked out independently; data sheets, and what measures a GPU."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mixtral_triton.bench import measure
from mixtral_triton.bench.fit import KNOWN, step_costs
from mixtral_triton.bench.gpus import GPUS, LINKS, find_gpu, floor
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.kernels.operation.cases import Cost
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.quantize import select_specs

pytestmark = pytest.mark.compiled
CPU, H100, BF16, SMALLER = torch.device("cpu"), GPUS["h100"], torch.bfloat16, KNOWN["mixtral-8x7b"]

# Microseconds for an expert layer of 8x7B in bf16 on an H100 SXM, by the number of tokens, worked out independently.
EXPERT_FLOORS = {1: 210, 2: 368, 4: 575, 8: 758, 16: 834, 32: 843, 128: 848, 512: 866, 1024: 891, 2048: 1459}
EXPERT_FLOORS |= {4096: 2918, 8192: 5837}


@pytest.mark.parametrize(("T", "microseconds"), EXPERT_FLOORS.items())
def test_floors_of_the_expert_layer(T: int, microseconds: int) -> None:
    cost = OPS["expert_swiglu"].cost({"T": T, "H": 4096, "I": 14336, "E": 8, "K": 2}, BF16)
    seconds, bound = floor([cost], H100)
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.003) and bound == ("matmul" if T > 1024 else "memory")


def test_launches_follow_one_another_each_at_its_own_limit() -> None:
    """The link of one hides behind no product of the next."""
    costs = [
        Cost(H100.matmul, 1),
        Cost(1, 2 * H100.bandwidth),
        Cost(1, 1, 4 * LINKS[H100.link]),
        Cost(2, 1, fp8_flops=2),
    ]
    assert floor(costs, H100) == (pytest.approx(7.0), "link")
    assert floor(costs[:2], H100) == (pytest.approx(3.0), "memory")
    fp8 = Cost(2 * H100.matmul, 1, fp8_flops=2 * H100.matmul)
    assert floor([fp8], H100) == (pytest.approx(1.0), "matmul")


@pytest.mark.parametrize("B", [1, 7])
@pytest.mark.parametrize("weights", [None, "int4", {"experts": "int4", "linear": "int8"}], ids=str)
def test_bytes_of_a_step_are_those_of_weights_cache_and_little_else(B: int, weights: Any) -> None:
    """The chosen experts, each other weight, and the keys and values; an expert in host memory crosses the link."""
    shapes, S, E = parameter_shapes(SMALLER), 1000, 8
    specs = select_specs(weights, shapes) if weights else {}
    distinct = E * (1 - 0.75**B)
    total = 2 * 2 * B * S * 8 * 128 * 32.0
    for name, (*lead, columns) in shapes.items():
        rows, kind = torch.Size(lead).numel(), name.rpartition(".")[2]
        size = specs[name].empty((1, columns), "meta").nbytes if name in specs else 2 * columns
        share = distinct / E if kind in ("gate_up_proj", "down_proj") else 0.0 if kind == "embed_tokens" else 1.0
        total += share * rows * size
    costs = step_costs(SMALLER, B, S, BF16, specs)
    assert sum(cost.bytes for cost in costs) == pytest.approx(total, rel=0.002 * B)
    hosted = step_costs(SMALLER, B, S, BF16, specs, hosted=[2] * 32)
    codes = 32 * 3 * 4096 * 14336 * (0.5 if weights else 2)
    assert sum(cost.host_bytes for cost in hosted) == pytest.approx(distinct * 2 / E * codes)
    assert sum(cost.host_bytes + cost.bytes for cost in hosted) == sum(cost.bytes for cost in costs)


def test_a_gpu_is_found_by_the_driver_s_name_and_by_those_that_people_write() -> None:
    names = {"H100 80GB HBM3": "h100", "H200": "h200", "A100-SXM4-80GB": "a100", "B200": "b200", "A10": "a10"}
    names |= {"B300 SXM6 AC": "b300", "L40S": "l40s", "GeForce RTX 5090": "rtx5090"}
    names |= {"A10G": "a10g", "L4": "l4", "A30": "a30", "A40": "a40", "RTX A6000": "a6000", "H100 NVL": "h100nvl"}
    names |= {"A100-SXM4-40GB": "a100-40", "A100-PCIE-40GB": "a100-40", "GH200 480GB": "gh200"}
    names |= {"RTX 6000 Ada Generation": "rtx6000ada", "RTX PRO 6000 Blackwell Server Edition": "rtxpro6000"}
    names = {f"NVIDIA {name}": gpu for name, gpu in names.items()} | {"AMD Instinct MI300X": "mi300x"}
    names |= {"h100": "h100", "rtx 5090": "rtx5090", "A100": "a100", "6000 ada": "rtx6000ada"}
    assert {name: find_gpu(name) for name in names} == {name: GPUS[gpu] for name, gpu in names.items()}
    assert all(gpu.bandwidth and gpu.matmul for gpu in GPUS.values())
    every = [name for gpu in GPUS.values() for name in gpu.names]
    assert len(every) == len(set(every))
    # The same chip with other memory or clocks.
    unknown = ["H100 PCIe", "A100-SXM4-64GB", "H200 NVL", "GB200", "L40", "GeForce RTX 5090 Laptop GPU", "GB300"]
    unknown += ["RTX 6000", "RTX PRO 6000 Blackwell Max-Q Workstation Edition", "GH200 144G HBM3e", "A100 80GB PCIe"]
    assert not [name for name in unknown if find_gpu(f"NVIDIA {name}")]


def test_measured_rates_replace_those_of_the_data_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEVICE", CPU)
    monkeypatch.setattr(measure, "time_call", lambda call: call() is None or 2.0)
    monkeypatch.setattr(measure, "target_arch", lambda device: "sm_90")
    found = Mock(total_memory=3 << 20)
    found.name = "NVIDIA H100 80GB HBM3"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    gpu = measure.measure_gpu(memory=1 << 12, n=16)
    assert (gpu.bandwidth, gpu.matmul, gpu.source) == (2 * 4096 / 2.0, 2 * 16**3 / 2.0, "measured")
    assert (gpu.name, gpu.mib, gpu.link) == (found.name, 3, H100.link)
