"""The benchmark: cases, peers checked against the reference, tables, with a device and without."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mixtral_triton import cli
from mixtral_triton.cli import main
from mixtral_triton.kernels import reference
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench import command, decode_step, measure
from mixtral_triton.tools.bench.cases import BENCHED, MODELS, QUICK, TOKENS, Case, Oracle, cases, oracle_of, spread
from mixtral_triton.tools.bench.measure import Bench, Outcome, Row, host_timer, our_call, timed_row, untimed_row
from mixtral_triton.tools.bench.peers import PEERS, Peer, peers_of, visible
from mixtral_triton.tools.bench.report import gpu_line, op_table, plot
from mixtral_triton.tools.gpus import GPUS

CPU, H100 = torch.device("cpu"), GPUS["h100"]
SLOW = ("torch.compile", "FlexAttention", "HF static cache")  # minutes of compilation on a CPU
REASONS = ("chunk beside the cache", "does not interpret", "already selects", "too many rows")
quick_timer = partial(host_timer, budget=0.0)
compiled_only = pytest.mark.skipif(INTERPRETED, reason="times and compiles: once, without TRITON_INTERPRET")


@contextmanager
def no_bar(label: str, total: int) -> Iterator[Any]:
    yield argparse.Namespace(update=lambda done, total: None)


def small(name: str, dtype: torch.dtype | None = None) -> Case:
    op = BENCHED[name]
    return Case(op, op.test_shapes[0], dtype or (torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]))


def use_bench(monkeypatch: pytest.MonkeyPatch, device: torch.device = CPU, timer: Any = quick_timer) -> None:
    """Let the command measure on a stand-in for a GPU."""
    if device is CPU:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(Bench, "of", classmethod(lambda cls, current: Bench(device, H100, None, timer, timer)))


def run(*args: str) -> int:
    return command.run(cli.parser().parse_args(["bench", *args]), no_bar)


def text(table: Any) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def test_cases_cover_both_models_all_token_counts_and_contexts_to_32k() -> None:
    found = cases()
    assert {case.op.name for case in found} == set(BENCHED) == {*OPS, "decode_step"}
    layer = [case.sizes for case in found if case.op.name == "expert_swiglu" and "down" not in case.as_dict()]
    for model in MODELS.values():
        assert tuple(sizes["T"] for sizes in layer if sizes["H"] == model["H"]) == TOKENS
    for name, letter in (("attention", "S"), ("cached_attention", "C"), ("decode_step", "S")):
        assert max(case.sizes[letter] for case in found if case.op.name == name) == 32768
        assert {case.sizes["Hq"] for case in found if case.op.name == name} == {32, 48}
    listed = {(sizes["H"], sizes["N"]) for sizes in OPS["linear"].bench_shapes}
    assert {(case.sizes["H"], case.sizes["N"]) for case in found if case.op.name == "linear"} == listed
    assert len({(case.op.name, *sorted(case.as_dict().items())) for case in found}) == len(found)
    quick = cases(quick=True)
    assert {case.op.name for case in quick} == set(BENCHED)
    assert max(sum(case.op.name == name for case in quick) for name in BENCHED) == QUICK
    assert {case.sizes["H"] for case in cases(["linear"], quick=True)} == {4096}
    assert [case.sizes["E"] for case in cases(["route"], at=["T=64"])] == [8]
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread([1, 2], 4) == [1, 2]


def test_floor_follows_the_actual_routing() -> None:
    case = Case(OPS["expert_swiglu"], {"T": 6, "H": 32, "I": 16, "E": 8, "K": 2})
    args = case.inputs(CPU) | {"ids": torch.tensor([[3, 5]] * 6, dtype=torch.int32)}
    assert case.cost(args).bytes == case.op.cost({**case.sizes, "chosen": 2}, case.dtype).bytes < case.cost().bytes
    sizes = decode_step.STEP.test_shapes[0]
    step = decode_step.inputs({**sizes, "B": 1}, torch.float32, CPU, torch.Generator().manual_seed(0))
    assert decode_step.expected_distinct_experts(step) == sizes["K"]


def test_peers_are_for_known_operations_and_installed_modules() -> None:
    assert {peer.op for peer in PEERS} <= {None, *BENCHED}
    assert not Peer("missing", None, "no_such_module", lambda op, args: op.reference).installed
    assert {"torch", "torch.compile", "SDPA", "FlexAttention"} <= {peer.name for peer in peers_of("attention")}


@compiled_only
@pytest.mark.parametrize("name", BENCHED)
def test_every_peer_is_right_or_says_why_not(name: str) -> None:
    peers = [peer for peer in peers_of(name) if peer.name not in SLOW]
    row = timed_row(small(name), H100, CPU, quick_timer, peers)
    assert row.ours.seconds and row.ours.note is None, row.ours
    for peer in peers:
        outcome = row.peers[peer.name]
        assert (outcome.seconds is None) == (outcome.note is not None)
        assert outcome.seconds or any(reason in str(outcome.note) for reason in REASONS), (peer.name, outcome)
        assert row.ratio(peer.name) == (outcome.seconds and outcome.seconds / row.ours.seconds)
    assert row.share == row.floor_s / row.ours.seconds
    assert json.loads(json.dumps(row.as_dict()))["peers"].keys() == row.peers.keys()


@compiled_only
def test_torch_compile_is_a_peer() -> None:
    peers = [peer for peer in peers_of("rms_norm") if peer.name == "torch.compile"]
    assert timed_row(small("rms_norm"), H100, CPU, quick_timer, peers).peers["torch.compile"].seconds


@pytest.mark.parametrize(
    ("T", "S", "window", "causal"),
    [(40, 40, 0, True), (40, 40, 9, True), (1, 50, 0, True), (1, 50, 20, True), (30, 30, 8, False), (9, 40, 12, True)],
)
def test_sdpa_and_its_mask_equal_the_reference(T: int, S: int, window: int, causal: bool) -> None:
    sizes = Shape(B=2, T=T, S=S, Hq=4, Hkv=2, D=16, window=window, causal=causal)
    case = Case(OPS["attention"], sizes, torch.float32)
    args = case.inputs(CPU)
    mask = visible(args)(torch.arange(T)[:, None], torch.arange(S))
    assert mask.equal(reference._visible(torch.arange(S - T, S)[:, None], torch.arange(S), window, causal))
    sdpa = next(peer for peer in PEERS if (peer.name, peer.op) == ("SDPA", "attention"))
    assert Oracle(case.op, args).fault(sdpa.build(case.op, args)) is None


@pytest.mark.parametrize("past", [31, 9])
def test_sdpa_on_a_full_and_a_partial_ring(past: int) -> None:
    sizes = Shape(B=2, Hq=4, Hkv=2, D=16, C=32, window=0, past=past, T=1, fresh=False)
    case = Case(OPS["cached_attention"], sizes, torch.float32)
    args = case.inputs(CPU)
    sdpa = next(peer for peer in PEERS if (peer.name, peer.op) == ("SDPA", "cached_attention"))
    assert Oracle(case.op, args).fault(sdpa.build(case.op, args)) is None


def test_wrong_and_failing_peers_are_not_timed() -> None:
    def off(x: Any, residual: Any, weight: Any, eps: float) -> Any:
        y, total = reference.rms_norm(x, weight, eps, residual)
        return y * 1.001, total

    def fails(error: Exception) -> Any:
        def build(op: Any, args: Any) -> Any:
            raise error

        return build

    builds = {
        "off": lambda op, args: off,
        "broken": fails(RuntimeError("no kernel for this GPU\nand more")),
        "full": fails(torch.OutOfMemoryError("CUDA out of memory")),
    }
    peers = [Peer(name, None, "", build) for name, build in builds.items()]
    row = timed_row(small("add_rms_norm", torch.float32), H100, CPU, quick_timer, peers)
    assert str(row.peers["off"].note).startswith("wrong: an error of 1.0e-03")
    assert row.peers["broken"].note == "fails: RuntimeError: no kernel for this GPU"
    assert row.peers["full"].note == "out of memory" and not any(one.seconds for one in row.peers.values())


def test_long_attention_is_checked_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_triton.tools.bench.cases.UNBLOCKED_MOST", 16)
    monkeypatch.setattr("mixtral_triton.tools.bench.cases.BLOCK", 8)
    sizes = {"B": 1, "T": 64, "S": 64, "Hq": 2, "Hkv": 1, "D": 16, "window": 20}
    case = Case(OPS["attention"], sizes, torch.float32)
    oracle = Oracle(case.op, case.inputs(CPU))
    assert [rows for _, rows in oracle.parts] == [slice(0, 8), slice(28, 36), slice(56, 64)]
    assert oracle.fault(case.op.reference) is None

    def off(place: int, **args: Any) -> Any:
        out = case.op.call_reference(**args)
        out[:, place] += 1e-2
        return out

    assert all("wrong" in str(oracle.fault(partial(off, place))) for place in (3, 30, 60))


@compiled_only
def test_wrong_decode_step_is_detected() -> None:
    case = small("decode_step", torch.float32)
    args = case.inputs(CPU)
    oracle, step = oracle_of(case.op, args), decode_step.decode_step
    assert oracle.fault(step) is None
    assert "wrong: 3 of 3 rows" in str(oracle.fault(lambda **args: step(**args) * 1.2))
    assert "[1, 3, 100], where [3, 100]" in str(oracle.fault(lambda **args: step(**args)[None]))
    for _ in range(14):  # once around the ring of 12 slots
        step(**args)
    assert oracle.fault(step) is None


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


@compiled_only
def test_a_device_is_measured_from_rates_to_plot(tmp_path: Path) -> None:
    bench = Bench.of(CPU, memory=1 << 20, n=64)
    assert bench.gpu.source == "measured" and min(bench.gpu.bandwidth, bench.gpu.matmul) > 0
    selected = [Case(OPS["sort_by_expert"], {"T": 3, "E": 4, "K": 2}, torch.int32), small("route")]
    rows = [timed_row(case, bench.gpu, bench.device, bench.timer, [PEERS[0]]) for case in selected]
    table = text(op_table(rows[1:]))
    assert "torch / ours" in table and "of floor" in table and "%" in table
    plot(rows, bench.gpu, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "data sheet: 3.35 TB/s" in gpu_line(bench.gpu, H100)


def test_tables_show_notes_in_place_of_times() -> None:
    row = untimed_row(small("route"), H100)
    assert row.launches == ("route_kernel",) and row.ours.seconds is None and row.share is None
    assert "time" not in text(op_table([row]))
    peers = {"slow": Outcome(4e-6), "mad": Outcome(note="wrong: an error of 1.0e+00")}
    fast = Row(row.case, 10, 20, 1e-6, "memory", row.launches, Outcome(2e-6, right=True), peers)
    table = text(op_table([fast]))
    assert "50 %" in table and "2.00" in table and "mad, T1 E8 K2: wrong: an error of 1.0e+00" in table


@pytest.mark.skipif(not INTERPRETED, reason="counts interpreted kernels: needs TRITON_INTERPRET=1")
def test_traffic_at_reduced_sizes() -> None:
    lines = list(command.count_cases(cases(["rms_norm", "append"], quick=True)))
    norm, append = (next(line for line in lines if line["op"] == name) for name in ("rms_norm", "append"))
    assert norm["touched"] == norm["moved"] == 1.0 and norm["issued"] is None and norm["sizes"] == {"T": 1, "H": 512}
    assert append["touched"] == pytest.approx(1.0, abs=0.01)
    assert len({(line["op"], *line["sizes"].items()) for line in lines}) == len(lines)


def test_reduced_sizes_keep_the_path_of_a_kernel() -> None:
    for case in (case for case in cases() if case.op is not decode_step.STEP):
        reduced, sizes = command.reduce_sizes(case.sizes), case.sizes
        case.op.check(**case.op.inputs(reduced, case.dtype, "meta"))
        assert (reduced["T"] == 1) == (sizes["T"] == 1)
        assert "Hq" not in sizes or reduced["Hq"] // reduced["Hkv"] == sizes["Hq"] // sizes["Hkv"]
        assert (reduced.get("S") == reduced["T"]) == (sizes.get("S") == sizes["T"])
        if "past" in sizes and case.op.name == "cached_attention":
            assert (reduced["window"] >= reduced["C"]) == (sizes["window"] >= sizes["C"])


@compiled_only
@pytest.mark.skipif(torch.cuda.is_available(), reason="prints what is known without a GPU")
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "route", "rope", "--quick", "--plot", str(tmp_path / "a.svg")]) == 0
    out = capsys.readouterr().out
    assert "No time was measured: there is no GPU." in out and "H100 80GB" in out
    assert "regs" in out and "128x8x2" in out and "bytes touched" in out and (tmp_path / "a.svg").stat().st_size
    assert main(["bench", "route", "--quick", "--json", "--gpu", "a100"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines[:2]] == ["gpu", "row"]
    assert {line["kind"] for line in lines} == {"gpu", "row", "kernel", "traffic"}
    assert lines[0]["name"] == "A100 80GB" and lines[0]["source"] == "data sheet"
    assert all(line["time_us"] is None and line["floor_us"] > 0 for line in lines if line["kind"] == "row")
    assert {line["arch"] for line in lines if line["kind"] == "kernel"} == {"sm_80"}


@compiled_only
def test_wrong_result_on_a_device_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_bench(monkeypatch)
    monkeypatch.setattr(command, "cases", lambda *args, **more: [small("rms_norm")])
    without = [word for name in {peer.name for peer in PEERS} - {"torch"} for word in ("--without", name)]
    assert run("rms_norm", "--quick", "--json", *without) == 0
    _, begin, row, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert begin["number"] == 0 and begin["sizes"] == row["sizes"] and end == {"kind": "end"}
    assert row["time_us"] > 0 and row["peers"]["torch"]["ratio"] > 0 and set(row["peers"]) == {"torch"}
    monkeypatch.setattr(measure, "our_call", lambda case, args: lambda x, weight, eps: x)
    assert run("rms_norm", "--quick", "--json", *without) == 1
    assert "wrong" in json.loads(capsys.readouterr().out.splitlines()[2])["note"]


@pytest.mark.parametrize(
    ("error", "note", "status"),
    [
        (torch.OutOfMemoryError("CUDA"), "out of memory", 0),
        (ValueError("no such tile"), "fails: ValueError: no such tile", 1),
    ],
)
def test_a_case_that_cannot_start_has_a_row_with_the_error(
    error: Exception, note: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(op: Any, args: Any) -> Any:
        raise error

    monkeypatch.setattr(measure, "oracle_of", raises)
    use_bench(monkeypatch)
    assert run("route", "--quick", "--at", "T=1") == status and note in capsys.readouterr().out


@compiled_only
def test_a_lost_gpu_ends_the_process_after_the_row_of_its_case(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_bench(monkeypatch, torch.device("cuda", 0))
    gpu.driver.breaks = "rms_norm_kernel"
    sizes = [word for T in (1, 2, 3) for word in ("--sizes", f"T={T},H=16")]
    args = ["bench", "rms_norm", "--json", *sizes, *(word for p in PEERS for word in ("--without", p.name))]
    assert main(args) == 1
    printed = capsys.readouterr()
    lines = list(map(json.loads, printed.out.splitlines()))
    assert [line["kind"] for line in lines] == ["gpu", "begin", "row"]
    assert "illegal memory access" in lines[2]["note"] and "cuda:0 is lost to this process" in printed.err
    gpu.driver.breaks, gpu.driver.broken = "", False
    assert main([*args, "--first", "1"]) == 0
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(line["number"], line["sizes"]["T"]) for line in lines if line["kind"] == "begin"] == [(1, 2), (2, 3)]
    assert lines[-1] == {"kind": "end"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("nonsense", "nonsense"),
        ("--gpu voodoo", "mi300x"),
        ("--without nobody", "FlexAttention"),
        ("route --at many", "T=4096"),
        ("route --at T=3", "T=3"),
        ("route --first -1", "--first"),
        ("--sizes T=3", "--sizes"),
        ("route --at T=1 --sizes T=3,E=8,K=2", "--at"),
        ("route --sizes T=3", "lacks E, K: route needs T, E, K"),
        ("route --sizes T=3,E=8,K=2,H=4", "has H, and route has T, E, K"),
        ("route --sizes T=3,E=8,K=9", "K=9, needs at most E=8"),
        ("route --sizes T=3,T=4", "each letter once"),
        ("rms_norm --sizes T=0,H=8", "T=0"),
        ("sort_by_expert --dtype float16", "sort_by_expert has int32, int64"),
        ("--model no/such/folder", "no/such/folder"),
        ("--plot roofline.txt", ".png"),
        ("--plot no/such/folder/a.png", "no/such/folder"),
        ("route --quick --gpu h100", "the traffic could not be counted"),
    ],
)
def test_bad_input_is_one_line(
    args: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "INTERPRETED", True)
    monkeypatch.setattr(command.sys, "executable", "false")  # the process that counts traffic fails
    assert main(["bench", *args.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
