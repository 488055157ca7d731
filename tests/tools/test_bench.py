"""The benchmark: cases, peers checked against the reference, tables, with a device and without; and its plot."""

import argparse
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mixtral_triton.kernels.experts.op import ExpertCase
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench import command, decode_step, measure
from mixtral_triton.tools.bench.cases import BENCHED, QUICK, TOKENS, Case, cases
from mixtral_triton.tools.bench.command import figure_of
from mixtral_triton.tools.bench.measure import Outcome, fault, our_call, timed_row, untimed_row, wall_seconds
from mixtral_triton.tools.bench.peers import PEERS
from mixtral_triton.tools.gpus import GPUS, LINKS
from tests.cli.commands import output, run, run_json

CPU, H100 = torch.device("cpu"), GPUS["h100"]
STEP_OF_8X7B = "B=1,S=1024,L=32,H=4096,I=14336,E=8,K=2,Hq=32,Hkv=8,D=128,V=32000"


def small(name: str, dtype: torch.dtype | None = None) -> Case:
    op = BENCHED[name]
    return Case(op, op.test_shapes[0], dtype or (torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]))


def use_bench(monkeypatch: pytest.MonkeyPatch, device: torch.device = CPU, timer: Any = wall_seconds) -> None:
    """Let the command measure on a stand-in for a GPU."""
    if device is CPU:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "current_gpu", lambda: (device, H100, timer))


def test_cases_cover_both_models_all_token_counts_and_contexts_to_32k() -> None:
    found = cases()
    assert {case.op.name for case in found} == set(BENCHED) == {*OPS, "decode_step"}
    layer = [case.sizes for case in found if case.op.name == "expert_swiglu" and "down" not in case.as_dict()]
    for H in (4096, 6144):
        assert tuple(sizes.T for sizes in layer if sizes.H == H) == TOKENS
    for name, letter in (("attention", "S"), ("cached_attention", "C"), ("decode_step", "S")):
        assert max(getattr(case.sizes, letter) for case in found if case.op.name == name) == 32768
    assert len({(case.op.name, *sorted(case.as_dict().items())) for case in found}) == len(found)
    quick = cases(quick=True)
    assert {case.op.name for case in quick} == set(BENCHED)
    assert max(sum(case.op.name == name for case in quick) for name in BENCHED) == QUICK
    assert {case.sizes.H for case in cases(["linear"], quick=True)} == {4096}
    assert [case.sizes.E for case in cases(["route"], at=["T=64"])] == [8]
    assert {case.sizes.T for case in cases(["route"], at=["T=64", "T=128"])} == {64, 128}, "of one letter any"
    assert {case.sizes.N for case in cases(["linear"], at=["T=64", "N=32000"])} == {32000}


def test_floor_follows_the_actual_routing() -> None:
    case = Case(OPS["expert_swiglu"], ExpertCase(T=6, H=32, I=16, E=8, K=2))
    args = case.inputs(CPU) | {"ids": torch.tensor([[3, 5]] * 6, dtype=torch.int32)}
    assert case.cost(args).bytes == case.op.cost(replace(case.sizes, distinct=2), case.dtype).bytes < case.cost().bytes
    for offload in (0, 3):
        sizes = replace(decode_step.SMALL, B=1, offload=offload)
        step = decode_step.inputs(sizes, torch.float32, CPU, torch.Generator().manual_seed(0))
        routed, experts = decode_step.routed(step), sizes.E
        assert routed["distinct"] == sizes.K and routed["distinct_on_host"] in ((0,) if not offload else (1, 1.5, 2))
        changes = routed, {"offload": 0}
        cost, all_on_gpu = (decode_step.cost(replace(sizes, **more), torch.float32) for more in changes)
        each = sizes.L * 3 * sizes.H * sizes.I * 4
        assert cost.host_bytes == routed["distinct_on_host"] * each
        assert cost.bytes + cost.host_bytes == all_on_gpu.bytes and cost.flops == all_on_gpu.flops
        assert decode_step.cost(sizes, torch.float32).host_bytes == 2 * offload / experts * each


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("name", BENCHED)
def test_every_peer_is_right_or_says_why_not(name: str) -> None:
    row = timed_row(small(name), H100, CPU, wall_seconds, PEERS)
    assert row.ours.seconds and row.ours.note is None, row.ours
    for peer, outcome in row.peers.items():
        assert (outcome.seconds is None) == (outcome.note is not None)
        takes = peer == "torch" or name in ("expert_swiglu", "decode_step")
        assert outcome.seconds if takes else outcome.note == "it has no such operation", (peer, outcome)
        assert row.ratio(peer) == (outcome.seconds and outcome.seconds / row.ours.seconds)
    assert row.share == row.floor_s / row.ours.seconds
    assert json.loads(json.dumps(row.as_dict()))["peers"].keys() == row.peers.keys()


@pytest.mark.compiled
@pytest.mark.parametrize("on_host", [(), pytest.param((3,), marks=pytest.mark.slow)])
def test_wrong_decode_step_is_detected(on_host: tuple[int, ...]) -> None:
    """Also with an offloaded expert, which transformers has none of."""
    case = Case(decode_step.STEP, decode_step.STEP.test_shapes[len(on_host)], torch.float32)
    args, peers = case.inputs(CPU), {"transformers": PEERS["transformers"]}
    assert getattr(args["model"].layers[1].down_proj, "on_host", ()) == on_host
    row = timed_row(case, H100, CPU, lambda call: (call(), 1.0)[1], peers)
    assert row.ours.right and row.peers["transformers"].right == (not on_host or None)
    check, step = partial(fault, case.op, args), decode_step.decode_step
    assert check(step) is None
    assert "wrong: 3 of 3 rows" in str(check(lambda **args: step(**args) * 1.2))
    assert "[1, 3, 100], where [3, 100]" in str(check(lambda **args: step(**args)[None]))
    for _ in range(14):  # once around the ring of 12 slots
        step(**args)
    assert check(step) is None


def test_decode_step_is_captured_after_its_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def capture(once: Any, generator: Any, device: Any) -> Any:
        calls.append("capture")
        assert once() is None
        return lambda: calls.append("replay")

    monkeypatch.setattr(decode_step, "can_capture", lambda model: True)
    monkeypatch.setattr(decode_step, "capture", capture)
    monkeypatch.setattr(decode_step, "decode_step", lambda **args: calls.append("step") or torch.tensor(len(calls)))
    args = {"model": argparse.Namespace(device=CPU), "cache": None, "token": None}
    replay = our_call(small("decode_step"), args)
    assert calls == ["step", "capture", "step"]
    assert replay(**args) == torch.tensor(3) and calls[3:] == ["replay"]


@pytest.mark.compiled
@pytest.mark.skipif(torch.cuda.is_available(), reason="prints what is known without a GPU")
def test_command_without_a_gpu(tmp_path: Path) -> None:
    out, plot = output("bench route rope --quick --plot", tmp_path / "a.svg"), tmp_path / "a.svg"
    assert "No time was measured: there is no GPU." in out and "H100 80GB" in out and plot.stat().st_size
    lines = run_json("bench route --quick --gpu a100")
    assert [line["kind"] for line in lines] == ["gpu"] + ["row"] * QUICK
    assert lines[0]["name"] == "A100 80GB" and lines[0]["source"] == "data sheet"
    assert all(line["time_us"] is None and line["floor_us"] > 0 for line in lines[1:])


BENCH_STEP, INT8 = "bench decode_step --sizes {sizes} --gpu {gpu} --offload {offload}", " --cache-dtype int8"


@pytest.mark.parametrize(
    ("offload", "gpu", "host"), [("3", "h200", 0.75), ("auto", "h100", 34 / 128), ("auto", "h200", 0)]
)
def test_floor_of_a_decode_step_with_experts_in_host_memory(offload: str, gpu: str, host: float) -> None:
    """It counts the link. `auto` is what `fit` says: 34 of 256 for an H100, none for an H200."""
    _, row = run_json(BENCH_STEP.format(sizes=STEP_OF_8X7B, gpu=gpu, offload=offload))
    assert row["host_bytes"] == host * 32 * 3 * 4096 * 14336 * 2 and row["sizes"]["offload"] == 4 * host
    assert row["bound"] == ("link" if host else "memory")
    assert not host or 1e6 * row["host_bytes"] / LINKS[GPUS[gpu].link] < row["floor_us"]
    shown = output(BENCH_STEP.format(sizes=STEP_OF_8X7B, gpu=gpu, offload=offload))
    assert f" offload{4 * host:g} " in shown
    assert not host or "MB of host" in output(BENCH_STEP.format(sizes=STEP_OF_8X7B, gpu=gpu, offload=3))


@pytest.mark.parametrize(("gpu", "more", "experts"), [("h100", "", 141), ("h100", INT8, 92), ("rtx4090", "", 224)])
def test_offload_auto_is_what_fit_says(gpu: str, more: str, experts: int) -> None:
    """All but one expert of a layer where nothing is enough."""
    sizes = STEP_OF_8X7B.replace("B=1,S=1024", "B=8,S=32768")
    _, row = run_json(BENCH_STEP.format(sizes=sizes, gpu=gpu, offload=f"auto{more}"))
    assert 32 * row["sizes"]["offload"] == experts


@pytest.mark.compiled
def test_wrong_result_on_a_device_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    use_bench(monkeypatch)
    monkeypatch.setattr(command, "cases", lambda *args: [small("rms_norm")])
    _, row = run_json("bench rms_norm --quick", "--peer", "torch")
    assert row["time_us"] > 0 and row["peers"]["torch"]["ratio"] > 0 and set(row["peers"]) == {"torch"}
    monkeypatch.setattr(measure, "our_call", lambda case, args: lambda x, weight, eps: x)
    assert "wrong" in run_json("bench rms_norm --quick", "--peer", "torch", status=1)[1]["note"]


@pytest.mark.parametrize(
    ("error", "note", "status"),
    [(torch.OutOfMemoryError(), "out of memory", 0), (ValueError("no tile\nor"), "fails: ValueError: no tile", 1)],
)
def test_a_case_that_cannot_start_has_its_row(error: Exception, note: str, status: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(measure, "untimed_row", Mock(side_effect=[error, untimed_row(small("route"), H100)]))
    use_bench(monkeypatch)
    assert run_json("bench route --quick --at T=1", status=status)[1]["note"] == note


@pytest.mark.compiled
def test_a_lost_gpu_ends_the_process_after_the_row_of_its_case(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_bench(monkeypatch, torch.device("cuda", 0))
    gpu.driver.breaks = "rms_norm_kernel"
    sizes = "".join(f" --sizes T={T},H=16" for T in (1, 2, 3))
    status, out, error = run(f"bench rms_norm --json{sizes}", "--peer", "torch")
    lines = list(map(json.loads, out.splitlines()))
    assert status == 1 and [line["kind"] for line in lines] == ["gpu", "row"]
    assert "illegal memory access" in lines[1]["note"] and "cuda:0 is lost to this process" in error


def labels(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_legend().get_texts()]


@pytest.mark.compiled
def test_plot() -> None:
    """A panel for each operation, a bar for each case in the order of the floors, and times where there are any."""
    pytest.importorskip("matplotlib")
    rows = [untimed_row(case, H100) for case in cases(["expert_swiglu", "rms_norm"])]
    rows = [row for row in rows if row.case.sizes.H == 4096 and "down" not in row.case.as_dict()]
    figure = figure_of(rows, H100)
    experts, norm = figure.axes
    assert "these are floors" in figure.get_suptitle() and labels(experts) == labels(norm) == ["floor"]
    assert experts.get_title() == "expert_swiglu, bfloat16, H4096 I14336 E8 K2"
    assert [tick.get_text() for tick in experts.get_yticklabels()] == [f"T{T}" for T in TOKENS]
    timed = [replace(row, ours=Outcome(row.floor_s * 2, right=True)) for row in rows]
    axes = figure_of(timed, H100).axes[0]
    floors_us = [bar.get_width() for bar in axes.patches]
    assert floors_us == sorted(floors_us) and labels(axes) == ["ours", "floor"] and axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata() == pytest.approx([2 * one for one in floors_us])
