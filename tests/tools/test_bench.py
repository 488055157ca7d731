"""The benchmark: cases, peers checked against the reference, tables, with a device and without; and its plot."""

import argparse
import json
from contextlib import suppress
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mixtral_triton.kernels.attention.op import AttentionCase
from mixtral_triton.kernels.experts.op import ExpertCase
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench import command, decode_step, measure
from mixtral_triton.tools.bench.cases import BENCHED, QUICK, TOKENS, Case, Oracle, cases, check_of
from mixtral_triton.tools.bench.command import figure_of
from mixtral_triton.tools.bench.measure import Outcome, Row, our_call, timed_row, untimed_row, wall_seconds
from mixtral_triton.tools.bench.peers import PEERS, Peer, Unsupported
from mixtral_triton.tools.gpus import GPUS, LINKS
from tests.cli.commands import output, run, run_json

CPU, H100 = torch.device("cpu"), GPUS["h100"]
SLOW = ("torch.compile", "FlexAttention", "HF static cache")  # minutes of compilation on a CPU
WITHOUT_PEERS = [word for name in {peer.name for peer in PEERS} - {"torch"} for word in ("--without", name)]
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


def test_peers_are_for_known_operations_and_installed_modules() -> None:
    assert {peer.op for peer in PEERS} <= {None, *BENCHED}
    assert not Peer("missing", None, "no_such_module", lambda op, args: op.reference).does("route")
    names = {peer.name for peer in PEERS if peer.does("attention")}
    assert names >= {"torch", "torch.compile", "SDPA", "FlexAttention"}


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("name", BENCHED)
def test_every_peer_is_right_or_says_why_not(name: str) -> None:
    slow = set(SLOW) - ({"torch.compile"} if name == "rms_norm" else set())
    peers = [peer for peer in PEERS if peer.does(name) and peer.name not in slow]
    row = timed_row(small(name), H100, CPU, wall_seconds, peers)
    assert row.ours.seconds and row.ours.note is None, row.ours
    for peer in peers:
        outcome = row.peers[peer.name]
        assert (outcome.seconds is None) == (outcome.note is not None)
        assert outcome.seconds or "chunk beside the cache" in str(outcome.note), (peer.name, outcome)
        assert row.ratio(peer.name) == (outcome.seconds and outcome.seconds / row.ours.seconds)
    assert row.share == row.floor_s / row.ours.seconds
    assert json.loads(json.dumps(row.as_dict()))["peers"].keys() == row.peers.keys()


@pytest.mark.parametrize(("name", "least"), [("attention", 5), ("cached_attention", 3)])
def test_sdpa_equals_the_reference(name: str, least: int) -> None:
    op, right = OPS[name], 0
    sdpa = next(peer for peer in PEERS if (peer.name, peer.op) == ("SDPA", name))
    for args in (Case(op, sizes, torch.float32).inputs(CPU) for sizes in op.test_shapes):
        with suppress(Unsupported):
            assert Oracle(op, args).fault(sdpa.build(op, args)) is None
            right += 1
    assert right >= least


def test_long_attention_is_checked_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_triton.tools.bench.cases.UNBLOCKED_MOST", 16)
    monkeypatch.setattr("mixtral_triton.tools.bench.cases.BLOCK", 8)
    case = Case(OPS["attention"], AttentionCase(B=1, T=64, S=64, Hq=2, Hkv=1, D=16, window=20), torch.float32)
    oracle = Oracle(case.op, case.inputs(CPU))
    assert [rows for _, rows in oracle.parts] == [slice(0, 8), slice(28, 36), slice(56, 64)]
    assert oracle.fault(case.op.reference) is None

    for place in (3, 30, 60):
        off = 1e-2 * (torch.arange(64) == place)[None, :, None, None]
        assert "wrong" in str(oracle.fault(lambda off=off, **args: case.op.call_reference(**args) + off))


@pytest.mark.compiled
@pytest.mark.parametrize("on_host", [(), pytest.param((3,), marks=pytest.mark.slow)])
def test_wrong_decode_step_is_detected(on_host: tuple[int, ...]) -> None:
    """Also with an offloaded expert, which transformers has none of."""
    case = Case(decode_step.STEP, decode_step.STEP.test_shapes[len(on_host)], torch.float32)
    args, peer = case.inputs(CPU), next(peer for peer in PEERS if peer.name == "HF eager")
    assert getattr(args["model"].layers[1].down_proj, "on_host", ()) == on_host
    row = timed_row(case, H100, CPU, lambda call: (call(), 1.0)[1], [peer])
    assert row.ours.right and row.peers["HF eager"].note == ("its weights are dense" if on_host else None)
    check, step = check_of(case.op, args), decode_step.decode_step
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
    assert row["bound"] == row["predicted"]["limit"] == ("link" if host else "memory")
    assert not host or row["floor_us"] == pytest.approx(1e6 * row["host_bytes"] / LINKS[GPUS[gpu].link])
    assert 0.5 < row["predicted"]["of_floor"] <= 1
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
    _, row = run_json("bench rms_norm --quick", *WITHOUT_PEERS)
    assert row["time_us"] > 0 and row["peers"]["torch"]["ratio"] > 0 and set(row["peers"]) == {"torch"}
    monkeypatch.setattr(measure, "our_call", lambda case, args: lambda x, weight, eps: x)
    assert "wrong" in run_json("bench rms_norm --quick", *WITHOUT_PEERS, status=1)[1]["note"]


@pytest.mark.parametrize(
    ("error", "note", "status"),
    [(torch.OutOfMemoryError(), "out of memory", 0), (ValueError("no tile\nor"), "fails: ValueError: no tile", 1)],
)
def test_a_case_that_cannot_start_has_its_row(error: Exception, note: str, status: int, monkeypatch: Any) -> None:
    monkeypatch.setattr(measure, "check_of", Mock(side_effect=error))
    use_bench(monkeypatch)
    assert run_json("bench route --quick --at T=1", status=status)[1]["note"] == note


@pytest.mark.compiled
def test_a_lost_gpu_ends_the_process_after_the_row_of_its_case(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    use_bench(monkeypatch, torch.device("cuda", 0))
    gpu.driver.breaks = "rms_norm_kernel"
    sizes = "".join(f" --sizes T={T},H=16" for T in (1, 2, 3))
    status, out, error = run(f"bench rms_norm --json{sizes}", *WITHOUT_PEERS, "--without", "torch")
    lines = list(map(json.loads, out.splitlines()))
    assert status == 1 and [line["kind"] for line in lines] == ["gpu", "row"]
    assert "illegal memory access" in lines[1]["note"] and "cuda:0 is lost to this process" in error


def floors(*names: str) -> list[Row]:
    return [untimed_row(case, H100) for case in cases(names)]


def dense(*names: str) -> list[Row]:
    """Return rows that differ in the tokens alone."""
    return [row for row in floors(*names) if row.case.sizes.H == 4096 and "down" not in row.case.as_dict()]


def with_times(row: Row) -> Row:
    peers = {name: Outcome(row.floor_s * 3, right=True) for name in ("torch", "examples.my_experts:swiglu")}
    peers["mine:off"] = Outcome(note="wrong: an error of 1.0e-01", right=False)
    return replace(row, ours=Outcome(row.floor_s * 2, right=True), peers=peers)


def labels(axes: Any) -> list[str]:
    return [label.get_text() for label in axes.get_legend().get_texts()]


@pytest.mark.compiled
def test_plot_of_floors_predicted_times_and_times() -> None:
    pytest.importorskip("matplotlib")
    rows = dense("expert_swiglu", "rms_norm")
    figure = figure_of(rows, H100)
    experts, norm = figure.axes
    assert "these are floors and predicted times" in " ".join(figure.get_suptitle().split())
    assert labels(experts) == labels(norm) == ["predicted", "floor"]
    assert experts.get_title() == "expert_swiglu, bfloat16, H4096 I14336 E8 K2"
    assert [tick.get_text() for tick in experts.get_yticklabels()] == [f"T{T}" for T in TOKENS]
    (bars,) = experts.collections
    ends = [segment[:, 0].tolist() for segment in bars.get_segments()]
    said = [row.predicted for row in rows if row.case.op.name == "expert_swiglu"]
    assert ends == [pytest.approx([1e6 * one.seconds, 1e6 * one.cautious]) for one in said if one]
    figure = figure_of([replace(row, predicted=None) for row in rows], GPUS["a10"])
    assert "these are floors" in figure.get_suptitle() and labels(figure.axes[0]) == ["floor"]


@pytest.mark.compiled
@pytest.mark.exhaustive
@pytest.mark.parametrize("timed", [False, True])
def test_no_label_of_the_plot_overlaps_another(timed: bool, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = floors("expert_swiglu", "attention", "linear")
    figure = figure_of(list(map(with_times, rows)) if timed else rows, H100)
    figure_of([], H100).savefig(tmp_path / "empty.pdf")
    figure.savefig(tmp_path / "a.png")  # computes the layout
    texts = [label for axes in figure.axes for label in (axes.title, *axes.get_legend().get_texts())]
    for axes in figure.axes:
        texts += axes.get_yticklabels()
    boxes = [(label.get_text(), label.get_window_extent()) for label in texts]
    boxes += [("axes", axes.get_window_extent()) for axes in figure.axes]
    assert [(a, b) for (a, one), (b, other) in combinations(boxes, 2) if one.overlaps(other)] == []
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for _, box in boxes)


@pytest.mark.compiled
def test_cases_are_horizontal_bars_by_their_floors() -> None:
    pytest.importorskip("matplotlib")
    rows = floors("linear")
    (axes,) = figure_of(list(map(with_times, rows)), H100).axes
    assert len(axes.patches) == len(rows)
    floors_us = [bar.get_width() for bar in axes.patches]
    assert floors_us == sorted(1e6 * row.floor_s for row in rows)
    (times, *_) = axes.lines
    assert times.get_xdata() == pytest.approx([2 * one for one in floors_us]) and axes.get_xscale() == "log"
    assert len(axes.get_yticklabels()) == len(rows) and axes.get_xlabel() == "time, us"
    assert labels(axes) == ["ours", "torch", "examples.my_experts:swiglu", "predicted", "floor"]
