"""The benchmark: cases, peers checked against the reference, tables, with a device and without."""

from __future__ import annotations

import argparse
import json
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mixtral_triton.cli import main
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench import command, decode_step, measure
from mixtral_triton.tools.bench.cases import BENCHED, QUICK, TOKENS, Case, Oracle, cases, check_of
from mixtral_triton.tools.bench.measure import our_call, timed_row, untimed_row, wall_seconds
from mixtral_triton.tools.bench.peers import PEERS, Peer, Unsupported
from mixtral_triton.tools.gpus import GPUS, LINKS

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
        assert tuple(sizes["T"] for sizes in layer if sizes["H"] == H) == TOKENS
    for name, letter in (("attention", "S"), ("cached_attention", "C"), ("decode_step", "S")):
        assert max(case.sizes[letter] for case in found if case.op.name == name) == 32768
    assert len({(case.op.name, *sorted(case.as_dict().items())) for case in found}) == len(found)
    quick = cases(quick=True)
    assert {case.op.name for case in quick} == set(BENCHED)
    assert max(sum(case.op.name == name for case in quick) for name in BENCHED) == QUICK
    assert {case.sizes["H"] for case in cases(["linear"], quick=True)} == {4096}
    assert [case.sizes["E"] for case in cases(["route"], at=["T=64"])] == [8]
    assert {case.sizes["T"] for case in cases(["route"], at=["T=64", "T=128"])} == {64, 128}, "of one letter any"
    assert {case.sizes["N"] for case in cases(["linear"], at=["T=64", "N=32000"])} == {32000}


def test_floor_follows_the_actual_routing() -> None:
    case = Case(OPS["expert_swiglu"], {"T": 6, "H": 32, "I": 16, "E": 8, "K": 2})
    args = case.inputs(CPU) | {"ids": torch.tensor([[3, 5]] * 6, dtype=torch.int32)}
    assert case.cost(args).bytes == case.op.cost({**case.sizes, "distinct": 2}, case.dtype).bytes < case.cost().bytes
    for offload in (0, 3):
        sizes = {**decode_step.SMALL, "B": 1, "offload": offload}
        step = decode_step.inputs(sizes, torch.float32, CPU, torch.Generator().manual_seed(0))
        routed, experts = decode_step.routed(step), sizes["E"]
        assert routed["distinct"] == sizes["K"] and routed["distinct_on_host"] in ((0,) if not offload else (1, 1.5, 2))
        cost, all_on_gpu = (decode_step.cost({**sizes, **more}, torch.float32) for more in (routed, {"offload": 0}))
        each = sizes["L"] * 3 * sizes["H"] * sizes["I"] * 4
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


@pytest.mark.compiled
def test_wrong_decode_step_is_detected() -> None:
    case = small("decode_step", torch.float32)
    args = case.inputs(CPU)
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
def test_command_without_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "route", "rope", "--quick", "--plot", str(tmp_path / "a.svg")]) == 0
    out, plot = capsys.readouterr().out, tmp_path / "a.svg"
    assert "No time was measured: there is no GPU." in out and "H100 80GB" in out and plot.stat().st_size
    assert main(["bench", "route", "--quick", "--json", "--gpu", "a100"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["kind"] for line in lines] == ["gpu"] + ["row"] * QUICK
    assert lines[0]["name"] == "A100 80GB" and lines[0]["source"] == "data sheet"
    assert all(line["time_us"] is None and line["floor_us"] > 0 for line in lines[1:])


def test_decode_step_with_experts_in_host_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Its floor counts the link. `auto` is what `fit` says: 32 of 256 for an H100, none for an H200."""
    for offload, gpu, host in (("3", "h200", 0.75), ("auto", "h100", 2 * 32 / 256), ("auto", "h200", 0)):
        args = ["bench", "decode_step", "--sizes", STEP_OF_8X7B, "--offload", offload, "--gpu", gpu, "--json"]
        assert main(args) == 0
        row = json.loads(capsys.readouterr().out.splitlines()[1])
        assert row["host_bytes"] == host * 32 * 3 * 4096 * 14336 * 2 and row["sizes"]["offload"] == 4 * host
        assert row["bound"] == row["predicted"]["limit"] == ("link" if host else "memory")
        if host:
            assert row["floor_us"] == pytest.approx(1e6 * row["host_bytes"] / LINKS[GPUS[gpu].link])
        assert 0.5 < row["predicted"]["of_floor"] <= 1
    assert main([*args[:-2], "h100"]) == 0 and "MB of host" in capsys.readouterr().out
    # As `fit` says: 135 and, beside a cache of 8 bits, 86 of 256; all but one of a layer where nothing is enough.
    for gpu, more, experts in (("h100", (), 135), ("h100", ("--cache-dtype", "int8"), 86), ("rtx4090", (), 7 * 32)):
        sizes = STEP_OF_8X7B.replace("B=1,S=1024", "B=8,S=32768")
        args = ["bench", "decode_step", "--sizes", sizes, "--offload", "auto", "--json", "--gpu", gpu, *more]
        assert main(args) == 0
        assert 32 * json.loads(capsys.readouterr().out.splitlines()[1])["sizes"]["offload"] == experts


@pytest.mark.slow
def test_offloaded_decode_step_is_checked_and_has_no_peer_of_transformers() -> None:
    case = Case(decode_step.STEP, decode_step.STEP.test_shapes[1], torch.float32)
    args = case.inputs(CPU)
    assert args["model"].layers[1].down_proj.on_host == (3,) and untimed_row(case, H100).cost.host_bytes > 0
    peers = [peer for peer in PEERS if peer.does("decode_step") and peer.name in ("torch", "HF eager")]
    row = timed_row(case, H100, CPU, lambda call: (call(), 1.0)[1], peers)
    assert row.ours.right and row.peers["torch"].right and row.peers["HF eager"].note == "its weights are dense"
    step = decode_step.decode_step
    assert "wrong: 3 of 3 rows" in str(check_of(case.op, args)(lambda **args: step(**args) * 1.2))


@pytest.mark.compiled
def test_wrong_result_on_a_device_exits_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    use_bench(monkeypatch)
    monkeypatch.setattr(command, "cases", lambda *args: [small("rms_norm")])
    args = ["bench", "rms_norm", "--quick", "--json", *WITHOUT_PEERS]
    assert main(args) == 0
    _, row = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["time_us"] > 0 and row["peers"]["torch"]["ratio"] > 0 and set(row["peers"]) == {"torch"}
    monkeypatch.setattr(measure, "our_call", lambda case, args: lambda x, weight, eps: x)
    assert main(args) == 1
    assert "wrong" in json.loads(capsys.readouterr().out.splitlines()[1])["note"]


@pytest.mark.parametrize(
    ("error", "note", "status"),
    [(torch.OutOfMemoryError(), "out of memory", 0), (ValueError("no tile\nor"), "fails: ValueError: no tile", 1)],
)
def test_a_case_that_cannot_start_has_a_row_with_the_error(
    error: Exception, note: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "check_of", Mock(side_effect=error))
    use_bench(monkeypatch)
    assert main(["bench", "route", "--quick", "--at", "T=1", "--json"]) == status
    assert json.loads(capsys.readouterr().out.splitlines()[1])["note"] == note


@pytest.mark.compiled
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
    assert [line["kind"] for line in lines] == ["gpu", "row"]
    assert "illegal memory access" in lines[1]["note"] and "cuda:0 is lost to this process" in printed.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("nonsense", "nonsense"),
        ("--gpu voodoo", "MI300X"),
        ("--gpu l4", "whose bandwidth and matmul rate are unknown, needs one of rtx4080, a10,"),
        ("--without nobody", "FlexAttention"),
        ("route --at many", "T=4096"),
        ("route --at T=3", "T=3"),
        ("--sizes T=3", "--sizes"),
        ("--peer a:b", "goes with the one operation"),
        ("route rope --peer a:b", "goes with the one operation"),
        ("route --at T=1 --sizes T=3,E=8,K=2", "--at"),
        ("route --sizes T=3", "lacks E, K: route needs T, E, K"),
        ("route --sizes T=3,E=8,K=2,H=4", "has H, and route has T, E, K"),
        ("route --sizes T=3,E=8,K=9", "K=9, needs at most E=8"),
        ("route --sizes T=3,T=4", "each letter once"),
        ("rms_norm --sizes T=0,H=8", "T=0"),
        ("sort_by_expert --dtype float16", "sort_by_expert has int32, int64"),
        ("decode_step rope --offload 2", "--offload is 2, and goes with decode_step"),
        (f"decode_step --sizes {STEP_OF_8X7B},offload=9", "offload is 9, needs 0 to 7 experts"),
        ("decode_step --gpu h100 --offload 8", "offload is 8, needs 0 to 7 experts of each layer"),
        ("--plot roofline.txt", ".png"),
        ("--plot no/such/folder/a.png", "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(args: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *args.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
