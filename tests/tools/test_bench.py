"""The benchmark: floors, cases, peers checked against the reference, and what it prints with a device and without."""

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
from mixtral_triton.tools.bench import command as bench_command
from mixtral_triton.tools.bench import decode_step
from mixtral_triton.tools.bench.cases import BENCHED, MODELS, QUICK, TOKENS, Case, Oracle, cases, oracle_of, spread
from mixtral_triton.tools.bench.command import count_cases as counted
from mixtral_triton.tools.bench.command import reduce_sizes as reduced
from mixtral_triton.tools.bench.measure import Bench, Outcome, Row, host_timer, our_call, timed_row, untimed_row
from mixtral_triton.tools.bench.peers import PEERS, Peer, peers_of, visible
from mixtral_triton.tools.bench.report import gpu_line, op_table, plot
from mixtral_triton.tools.gpus import GPUS

CPU, H100 = torch.device("cpu"), GPUS["h100"]
SLOW = ("torch.compile", "FlexAttention", "HF static cache")  # minutes of compiling on a CPU
quickly = partial(host_timer, budget=0.0)
compiled_way = pytest.mark.skipif(INTERPRETED, reason="times and compiles: once, without TRITON_INTERPRET")
EXCUSES = (
    "chunk beside the cache",
    "does not interpret",
    "already selects",
    "too many rows",
)  # of what a peer has no way to do


def test_the_floor_follows_the_routing_that_happened() -> None:
    op = OPS["expert_swiglu"]
    case = Case(op, {"T": 6, "H": 32, "I": 16, "E": 8, "K": 2})
    args = case.inputs(CPU)
    args["ids"] = torch.tensor([[3, 5]] * 6, dtype=torch.int32)
    assert case.cost(args).bytes == op.cost({**case.sizes, "chosen": 2}, case.dtype).bytes < case.cost().bytes
    step = Case(decode_step.STEP, decode_step.STEP.test_shapes[0], torch.float32)
    one = decode_step.inputs({**step.sizes, "B": 1}, torch.float32, CPU, torch.Generator().manual_seed(0))
    assert decode_step.expected_distinct_experts(one) == step.sizes["K"]


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
    assert {case.sizes["H"] for case in cases(["linear"], quick=True)} == {4096}
    shapes = [(case.op.name, *sorted(case.as_dict().items())) for case in found]
    assert len(set(shapes)) == len(shapes)
    quick = cases(quick=True)
    assert {case.op.name for case in quick} == set(BENCHED)
    assert max(sum(case.op.name == name for case in quick) for name in BENCHED) == QUICK
    assert [case.sizes["E"] for case in cases(["route"], at=["T=64"])] == [8]
    assert spread(range(10), 4) == [0, 3, 6, 9] and spread([1, 2], 4) == [1, 2]


def small(name: str, index: int = 0, dtype: torch.dtype | None = None) -> Case:
    op = BENCHED[name]
    return Case(op, op.test_shapes[index], dtype or (torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]))


def test_peers_name_operations_that_there_are() -> None:
    assert {peer.op for peer in PEERS} <= {None, *BENCHED}
    missing = Peer("missing", None, "no_such_module", lambda op, args: op.reference)
    assert not missing.installed
    assert {"torch", "torch.compile", "SDPA", "FlexAttention"} <= {peer.name for peer in peers_of("attention")}


@compiled_way
@pytest.mark.parametrize("name", BENCHED)
def test_every_peer_is_right_or_says_why_not(name: str) -> None:
    peers = [peer for peer in peers_of(name) if peer.name not in SLOW]
    row = timed_row(small(name), H100, CPU, quickly, peers)
    assert row.ours.seconds and row.ours.note is None, row.ours
    for peer in peers:
        outcome = row.peers[peer.name]
        assert (outcome.seconds is None) == (outcome.note is not None)
        assert outcome.seconds or any(word in str(outcome.note) for word in EXCUSES), (peer.name, outcome)
        assert row.ratio(peer.name) == (outcome.seconds and outcome.seconds / row.ours.seconds)
    assert row.share == row.floor_s / row.ours.seconds
    assert json.loads(json.dumps(row.as_dict()))["peers"].keys() == row.peers.keys()


@compiled_way
def test_torch_compile_is_a_peer_like_the_others() -> None:
    peers = [peer for peer in peers_of("rms_norm") if peer.name == "torch.compile"]
    assert timed_row(small("rms_norm"), H100, CPU, quickly, peers).peers["torch.compile"].seconds


WINDOWS = [
    (40, 40, 0, True),
    (40, 40, 9, True),
    (1, 50, 0, True),
    (1, 50, 20, True),
    (30, 30, 8, False),
    (9, 40, 12, True),
]


@pytest.mark.parametrize(("T", "S", "window", "causal"), WINDOWS)
def test_masks_of_the_attention_peers(T: int, S: int, window: int, causal: bool) -> None:
    """What SDPA and FlexAttention are told to mask is what the reference masks; and SDPA gives the same result."""
    sizes = Shape(B=2, T=T, S=S, Hq=4, Hkv=2, D=16, window=window, causal=causal)
    case = Case(OPS["attention"], sizes, torch.float32)
    args = case.inputs(CPU)
    seen = visible(args)(torch.arange(T)[:, None], torch.arange(S))
    assert seen.equal(reference._visible(torch.arange(S - T, S)[:, None], torch.arange(S), window, causal))
    sdpa = next(peer for peer in PEERS if (peer.name, peer.op) == ("SDPA", "attention"))
    assert Oracle(case.op, args).fault(sdpa.build(case.op, args)) is None


@pytest.mark.parametrize(("name", "C", "past"), [("cached_attention", 32, 31), ("cached_attention", 32, 9)])
def test_the_cached_attention_peer_on_a_ring_full_or_not(name: str, C: int, past: int) -> None:
    sizes = Shape(B=2, Hq=4, Hkv=2, D=16, C=C, window=0, past=past, T=1, fresh=False)
    case = Case(OPS[name], sizes, torch.float32)
    args = case.inputs(CPU)
    sdpa = next(peer for peer in PEERS if (peer.name, peer.op) == ("SDPA", name))
    assert Oracle(case.op, args).fault(sdpa.build(case.op, args)) is None


def test_a_wrong_peer_is_said_to_be_wrong_and_a_failing_one_why() -> None:
    case = small("add_rms_norm", dtype=torch.float32)

    def off(x: Any, residual: Any, weight: Any, eps: float) -> Any:
        y, total = reference.rms_norm(x, weight, eps, residual)
        return y * 1.001, total

    def broken(op: Any, args: Any) -> Any:
        raise RuntimeError("no kernel for this GPU\nand more")

    def full(op: Any, args: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    peers = [
        Peer("off", None, "", lambda op, args: off),
        Peer("broken", None, "", broken),
        Peer("full", None, "", full),
    ]
    row = timed_row(case, H100, CPU, quickly, peers)
    said = {name: outcome.note for name, outcome in row.peers.items()}
    assert str(said["off"]).startswith("wrong: an error of 1.0e-03")
    assert said["broken"] == "fails: RuntimeError: no kernel for this GPU"
    assert said["full"] == "out of memory"
    assert not any(outcome.seconds for outcome in row.peers.values())


@pytest.mark.parametrize(
    ("error", "said", "status"),
    [
        (torch.OutOfMemoryError("CUDA"), "out of memory", 0),
        (ValueError("no such tile"), "fails: ValueError: no such tile", 1),
    ],
)
def test_a_case_that_cannot_start_is_a_row_that_says_so(
    error: Exception, said: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(op: Any, args: Any) -> Any:
        raise error

    monkeypatch.setattr("mixtral_triton.tools.bench.measure.oracle_of", raises)
    bench = Bench(CPU, H100, None, quickly, quickly)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_command.Bench, "of", classmethod(lambda cls, device: bench))
    args = cli.parser().parse_args(["bench", "route", "--quick", "--at", "T=1"])
    assert bench_command.run(args, no_bar) == status
    assert said in capsys.readouterr().out


def test_a_long_attention_is_checked_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_triton.tools.bench.cases.UNBLOCKED_MOST", 16)
    monkeypatch.setattr("mixtral_triton.tools.bench.cases.BLOCK", 8)
    sizes = {"B": 1, "T": 64, "S": 64, "Hq": 2, "Hkv": 1, "D": 16, "window": 20}
    case = Case(OPS["attention"], sizes, torch.float32)
    args = case.inputs(CPU)
    judge = Oracle(case.op, args)
    assert [rows for _, rows in judge.parts] == [slice(0, 8), slice(28, 36), slice(56, 64)]
    assert judge.fault(case.op.reference) is None
    for place in (3, 30, 60):

        def off(**given: Any) -> Any:
            out = case.op.call_reference(**given)
            out[:, place] += 1e-2  # noqa: B023
            return out

        assert "wrong" in str(judge.fault(off))


@compiled_way
def test_a_wrong_step_is_said_to_be_wrong() -> None:
    case = small("decode_step", dtype=torch.float32)
    args = case.inputs(CPU)
    judge = oracle_of(case.op, args)
    assert judge.fault(decode_step.decode_step) is None
    assert "wrong: 3 of 3 rows" in str(judge.fault(lambda **given: decode_step.decode_step(**given) * 1.2))
    assert "[1, 3, 100], where [3, 100]" in str(judge.fault(lambda **given: decode_step.decode_step(**given)[None]))
    for _ in range(14):  # once around the ring of 12 slots
        decode_step.decode_step(**args)
    assert judge.fault(decode_step.decode_step) is None


def test_our_step_is_captured_once_its_kernels_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a CUDA graph: what is captured runs on the buffers of the capture, and returns nothing."""
    done: list[str] = []

    def captured(once: Any, generator: Any, device: Any) -> Any:
        done.append("capture")
        kept = once()
        assert kept is None
        return lambda: done.append("replay")

    monkeypatch.setattr(decode_step, "can_capture", lambda model: True)
    monkeypatch.setattr(decode_step, "captured", captured)
    monkeypatch.setattr(decode_step, "decode_step", lambda **args: done.append("step") or torch.tensor(len(done)))
    case = small("decode_step")
    model = argparse.Namespace(device=CPU)
    run = our_call(case, {"model": model, "cache": None, "token": None})
    assert done == ["step", "capture", "step"]
    assert run(model=model, cache=None, token=None) == torch.tensor(3) and done[3:] == ["replay"]


@compiled_way
def test_a_device_is_benchmarked_from_its_rates_to_the_plot(tmp_path: Path) -> None:
    """The way of a GPU, with the CPU as the device: rates, rows, tables, plot."""
    bench = Bench.of(CPU, memory=1 << 20, n=64)
    assert bench.gpu.source == "measured" and min(bench.gpu.bandwidth, bench.gpu.matmul) > 0
    chosen = [Case(OPS["sort_by_expert"], {"T": 3, "E": 4, "K": 2}, torch.int32), small("route")]
    one = [peer for peer in PEERS if peer.name == "torch"]
    rows = [timed_row(case, bench.gpu, bench.device, bench.timer, one) for case in chosen]
    shown = text(op_table(rows[1:]))
    assert "torch / ours" in shown and "of floor" in shown and "%" in shown
    plot(rows, bench.gpu, tmp_path / "roofline.png")
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")
    assert "data sheet: 3.35 TB/s" in gpu_line(bench.gpu, H100)


def text(shown: Any) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as captured:
        console.print(shown)
    return captured.get()


def test_tables_tell_what_could_not_be_measured() -> None:
    row = untimed_row(small("route"), H100)
    assert row.launches == ("route_kernel",) and row.ours.seconds is None and row.share is None
    assert "time" not in text(op_table([row]))
    peers = {"slow": Outcome(4e-6), "mad": Outcome(note="wrong: an error of 1.0e+00")}
    fast = Row(row.case, 10, 20, 1e-6, "memory", row.launches, Outcome(2e-6, right=True), peers)
    shown = text(op_table([fast]))
    assert "50 %" in shown and "2.00" in shown and "mad, T1 E8 K2: wrong: an error of 1.0e+00" in shown


@pytest.mark.skipif(not INTERPRETED, reason="counts interpreted kernels: needs TRITON_INTERPRET=1")
def test_traffic_at_reduced_sizes() -> None:
    lines = list(counted(cases(["rms_norm", "append"], quick=True)))
    norm, append = (next(line for line in lines if line["op"] == name) for name in ("rms_norm", "append"))
    assert norm["touched"] == norm["moved"] == 1.0 and norm["issued"] is None and norm["sizes"] == {"T": 1, "H": 512}
    assert append["touched"] == pytest.approx(1.0, abs=0.01)
    shapes = [(line["op"], *line["sizes"].items()) for line in lines]
    assert len(set(shapes)) == len(shapes)


def test_reduced_sizes_keep_what_a_kernel_s_path_depends_on() -> None:
    for case in cases():
        if case.op is not decode_step.STEP:
            small, real = reduced(case.sizes), case.sizes
            case.op.check(**case.op.inputs(small, case.dtype, "meta"))
            assert (small["T"] == 1) == (real["T"] == 1)
            assert "Hq" not in real or small["Hq"] // small["Hkv"] == real["Hq"] // real["Hkv"]
            assert (small.get("S") == small["T"]) == (real.get("S") == real["T"])
            if "past" in real and case.op.name == "cached_attention":
                assert (small["window"] >= small["C"]) == (real["window"] >= real["C"])


def test_a_count_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_command, "INTERPRETED", True)
    monkeypatch.setattr(bench_command.sys, "executable", "false")
    assert main(["bench", "route", "--quick", "--gpu", "h100"]) == 2
    assert "the traffic could not be counted" in capsys.readouterr().err


@contextmanager
def no_bar(label: str, total: int) -> Iterator[Any]:
    yield argparse.Namespace(update=lambda done, total: None)


@compiled_way
@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "route", "rope", "--quick", "--plot", str(tmp_path / "a.svg")]) == 0
    out = capsys.readouterr().out
    assert "No time was measured: there is no GPU." in out and "H100 80GB" in out
    assert "regs" in out and "128x8x2" in out and "bytes touched" in out
    assert (tmp_path / "a.svg").stat().st_size
    assert main(["bench", "route", "--quick", "--json", "--gpu", "a100"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines[:2]] == ["gpu", "row"]
    assert {line["kind"] for line in lines} == {"gpu", "row", "kernel", "traffic"}
    assert lines[0]["name"] == "A100 80GB" and lines[0]["source"] == "data sheet"
    assert all(line["time_us"] is None and line["floor_us"] > 0 for line in lines if line["kind"] == "row")
    assert {line["arch"] for line in lines if line["kind"] == "kernel"} == {"sm_80"}


@compiled_way
def test_with_a_device_a_wrong_result_is_exit_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on a stand-in for a GPU; then with an operator whose results are off."""
    bench = Bench(CPU, H100, None, quickly, quickly)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench_command.Bench, "of", classmethod(lambda cls, device: bench))
    monkeypatch.setattr(bench_command, "cases", lambda *chosen, **more: [small("rms_norm")])
    without = sorted({peer.name for peer in PEERS} - {"torch"})
    unwanted = [word for name in without for word in ("--without", name)]
    args = cli.parser().parse_args(["bench", "rms_norm", "--quick", "--json", *unwanted])
    assert bench_command.run(args, no_bar) == 0
    _, begin, row, end = map(json.loads, capsys.readouterr().out.splitlines())
    assert begin["number"] == 0 and begin["sizes"] == row["sizes"] and end == {"kind": "end"}
    assert row["time_us"] > 0 and row["peers"]["torch"]["ratio"] > 0 and set(row["peers"]) == {"torch"}
    monkeypatch.setattr("mixtral_triton.tools.bench.measure.our_call", lambda case, args: lambda x, weight, eps: x)
    assert bench_command.run(args, no_bar) == 1
    assert "wrong" in json.loads(capsys.readouterr().out.splitlines()[2])["note"]


@compiled_way
def test_a_lost_gpu_ends_the_process_behind_the_row_of_its_case(
    gpu: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An illegal access of one kernel: every later call fails, so none is made, and --first goes on behind it."""
    bench = Bench(torch.device("cuda", 0), H100, None, quickly, quickly)
    monkeypatch.setattr(bench_command.Bench, "of", classmethod(lambda cls, device: bench))
    gpu.driver.breaks = "rms_norm_kernel"
    sizes = [word for T in (1, 2, 3) for word in ("--sizes", f"T={T},H=16")]
    args = ["bench", "rms_norm", "--json", *sizes, *(word for p in PEERS for word in ("--without", p.name))]
    assert main(args) == 1
    shown = capsys.readouterr()
    lines = list(map(json.loads, shown.out.splitlines()))
    assert [line["kind"] for line in lines] == ["gpu", "begin", "row"]
    assert "illegal memory access" in lines[2]["note"] and "cuda:0 is lost to this process" in shown.err
    gpu.driver.breaks, gpu.driver.broken = "", False
    assert main([*args, "--first", "1"]) == 0
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(line["number"], line["sizes"]["T"]) for line in lines if line["kind"] == "begin"] == [(1, 2), (2, 3)]
    assert lines[-1] == {"kind": "end"}


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("nonsense",), "nonsense"),
        (("--gpu", "voodoo"), "mi300x"),
        (("--without", "nobody"), "FlexAttention"),
        (("route", "--at", "many"), "T=4096"),
        (("route", "--at", "T=3"), "T=3"),
        (("route", "--first", "-1"), "--first"),
        (("--sizes", "T=3"), "--sizes"),
        (("route", "--at", "T=1", "--sizes", "T=3,E=8,K=2"), "--at"),
        (("route", "--sizes", "T=3"), "lacks E, K: route needs T, E, K"),
        (("route", "--sizes", "T=3,E=8,K=2,H=4"), "has H, and route has T, E, K"),
        (("route", "--sizes", "T=3,E=8,K=9"), "K=9, needs at most E=8"),
        (("--plot", "roofline.txt"), ".png"),
        (("--plot", "no/such/folder/a.png"), "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1
