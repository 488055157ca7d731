"""The benchmark: cases, peers checked against the reference, tables, with a device and without; and its plot."""

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from mixtral_triton.bench import measure
from mixtral_triton.bench.cases import BENCHED, TOKENS, Case, cases
from mixtral_triton.bench.command import figure_of
from mixtral_triton.bench.gpus import GPUS, LINKS
from mixtral_triton.bench.measure import Outcome, measure_row, untimed_row
from mixtral_triton.bench.peers import PEERS
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.ops.experts.op import ExpertCase
from mixtral_triton.kernels.registry import OPS
from tests.cli.commands import error_line, output, run, run_json

CPU, H100 = torch.device("cpu"), GPUS["h100"]
BENCH = "bench expert_swiglu --sizes T=7,H=32,I=24,E=4,K=2"
EXAMPLE = "examples.my_experts:swiglu"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="prints what a machine without a GPU prints")

MINE = """
from examples.my_experts import swiglu

def off(*args): return swiglu(*args) * 1.1
def shaped(*args): return swiglu(*args)[None]
def nothing(*args): pass
def one(x): return x
def broken(*args): raise RuntimeError("no such thing")
def nan(*args): return swiglu(*args) * float("nan")
"""

TRITON = """
import torch, triton, triton.language as tl

@triton.jit
def norm_kernel(x_ptr, weight_ptr, y_ptr, eps, times, H: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + tl.program_id(0) * H + offs, mask=offs < H, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=0) / H + eps) * tl.load(weight_ptr + offs, mask=offs < H).to(tl.float32)
    tl.store(y_ptr + tl.program_id(0) * H + offs, y * times, mask=offs < H)

def norm(x, weight, eps, times=1.0):
    y = torch.empty_like(x)
    norm_kernel[(len(x),)](x, weight, y, eps, times, H=x.shape[1], BLOCK=triton.next_power_of_2(x.shape[1]))
    return y

def double(x, weight, eps): return norm(x, weight, eps, 2.0)

@triton.jit
def product_kernel(x_ptr, weight_ptr, y_ptr, N: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x, weight = tl.load(x_ptr + offs, mask=offs < N), tl.load(weight_ptr + offs % N, mask=offs < N)
    tl.store(y_ptr + offs, x * weight, mask=offs < N)

def of_bf16(x, weight, eps):
    rows = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    for row in rows.to(x.dtype):
        product_kernel[(1,)](row, weight, row, N=len(row), BLOCK=triton.next_power_of_2(len(row)))
        yield row
def in_bf16(x, weight, eps): return torch.stack([*of_bf16(x, weight, eps)])
"""


def small(name: str, dtype: torch.dtype | None = None) -> Case:
    op = BENCHED[name]
    return Case(op, op.test_shapes[0], dtype or (torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]))


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """The command measures on the CPU in the place of a GPU; the timer, which runs the call."""
    timer = Mock(side_effect=lambda call: (call(), 1e-3)[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (("DEVICE", CPU), ("time_call", timer), ("measure_gpu", lambda: H100)):
        monkeypatch.setattr(measure, name, value)
    return timer


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with modules of peers; none stays imported."""
    (tmp_path / "mine_for_bench.py").write_text(MINE)
    (tmp_path / "torn_for_bench.py").write_text("def f(:\n")
    (tmp_path / "raises_for_bench.py").write_text("raise RuntimeError('of the module\\nand more')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_for_bench")]:
        del sys.modules[name]


def test_sizes_that_are_not_given_are_those_of_8x7b() -> None:
    found = cases(["route", "expert_swiglu"], sizes=["T=64", "T=3,E=4"])
    sizes = [tuple(case.as_dict().values()) for case in found]
    assert sizes == [(64, 8, 2), (3, 4, 2), (64, 4096, 14336, 8, 2), (3, 4096, 14336, 4, 2)]
    (case,) = cases(["expert_swiglu"], sizes=["T=3,H=128,I=64,E=4,K=2,gate_up=int4:32,down=int8"])
    args = case.inputs(CPU)
    assert args["gate_up_proj"].name == "int4:32" and args["down_proj"].name == "int8"
    assert PEERS["torch"](case.op, args)(**args).shape == (3, 128)
    (flag,) = cases(["linear"], sizes=["T=3,deterministic=1"])
    assert flag.sizes.deterministic is True and flag.as_dict()["deterministic"] == 1


def test_floor_follows_the_actual_routing() -> None:
    case = Case(OPS["expert_swiglu"], ExpertCase(T=6, H=32, I=16, E=8, K=2))
    args = case.inputs(CPU) | {"ids": torch.tensor([[3, 5]] * 6, dtype=torch.int32)}
    (routed,), (expected,) = case.costs(args), case.costs()
    assert routed.bytes == case.op.cost(replace(case.sizes, distinct=2), case.dtype).bytes < expected.bytes


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("name", BENCHED)
def test_every_peer_is_right_or_says_why_not(name: str, timed: Mock) -> None:
    row = measure_row(small(name), H100, PEERS, timed)
    assert row.ours == Outcome(1e-3, right=None if name == "decode_step" else True)
    for peer, outcome in row.peers.items():
        takes = peer == "torch" or name == "expert_swiglu"
        assert outcome == (Outcome(1e-3, right=True) if takes else Outcome(note="it has no such operation"))
        assert row.ratio(peer) == (1.0 if takes else None)
    assert row.share == row.floor_s / 1e-3 and set(row.peers) == (set() if name == "decode_step" else set(PEERS))
    assert json.loads(json.dumps(row.as_dict()))["peers"].keys() == row.peers.keys()


@pytest.mark.compiled
@without_gpu
def test_command_without_a_gpu(tmp_path: Path) -> None:
    out, plot = output("bench route rope --plot", tmp_path / "a.svg"), tmp_path / "a.svg"
    assert "No time was measured: there is no GPU." in out and "H100 80GB" in out and plot.stat().st_size
    lines = run_json("bench route --gpu a100")
    assert [line["kind"] for line in lines] == ["gpu"] + ["row"] * 2 * len(TOKENS)  # of Mixtral and OLMoE
    assert lines[0]["name"] == "A100 80GB" and lines[0]["source"] == "data sheet"
    assert all(line["time_us"] is None and line["floor_us"] > 0 for line in lines[1:])


@pytest.mark.parametrize("hosted", [0, 34])
def test_floor_of_a_decode_step_with_experts_in_host_memory(hosted: int) -> None:
    """It counts the link."""
    line = f"bench decode_step --gpu h100 --sizes L=32,cache=int8,offload={hosted}"
    _, row = run_json(line)
    assert row["host_bytes"] == pytest.approx(2 * hosted / 8 * 3 * 4096 * 14336 * 2)
    assert row["bound"] == ("link" if hosted else "memory") and row["sizes"]["cache"] == "int8"
    assert not hosted or 1e6 * row["host_bytes"] / LINKS[H100.link] < row["floor_us"]


@pytest.mark.slow
@pytest.mark.compiled
def test_only_right_peers_are_timed_and_a_wrong_result_exits_1(folder: Path, timed: Mock, monkeypatch: Any) -> None:
    names = ["--peer", "torch", "--peer", EXAMPLE]
    _, row = run_json(BENCH, *names)
    assert row["peers"][EXAMPLE] == {"time_us": 1e3, "note": None, "right": True, "ratio": 1.0}
    assert timed.call_count == 3, "ours, torch, and the example"
    assert output(BENCH, *names, "--peer", "mine_for_bench:off", status=1).count("wrong: ") == 1
    assert timed.call_count == 6
    monkeypatch.setattr(measure, "our_call", lambda case, args: lambda x, **_: x)
    assert "wrong" in run_json(BENCH, "--peer", "torch", status=1)[1]["note"]


WRONG = {
    "off": "wrong: an error of ",
    "shaped": "wrong: an error of inf",
    "nothing": "wrong: an error of inf",
    "one": "fails: TypeError: one() takes 1 positional argument but 5 were given",
    "broken": "fails: RuntimeError: no such thing",
    "nan": "an error of inf",
}


@pytest.mark.compiled
@without_gpu
def test_wrong_peers_have_notes_and_exit_1(folder: Path) -> None:
    options = [word for name in WRONG for word in ("--peer", f"mine_for_bench:{name}")]
    row = run_json(f"{BENCH} --peer {EXAMPLE}", *options, status=1)[1]
    peers = {name.partition(":")[2]: outcome for name, outcome in row["peers"].items()}
    assert peers["swiglu"]["right"] and peers["swiglu"]["note"].startswith("right, not timed")
    for name, note in WRONG.items():
        assert peers[name]["right"] is False and peers[name]["time_us"] is None and note in peers[name]["note"]


@without_gpu
def test_triton_peers_are_checked_where_their_kernels_are_interpreted(folder: Path) -> None:
    (folder / "kernel_for_bench.py").write_text(TRITON)
    in_fp32 = "right in fp32; Triton's interpreter computes bf16 wrong"
    outcomes = {"norm": (0, True, "right, not timed"), "double": (1, False, "wrong: an error of")}
    outcomes["in_bf16"] = (0, True, in_fp32)
    for name, (status, right, note) in outcomes.items():
        if not INTERPRETED:  # a process that compiles has no driver to launch by
            status, right, note = 0, None, "not checked: its Triton kernels need a GPU, or TRITON_INTERPRET=1"
        for dtype in ("bfloat16",) if name == "in_bf16" else ("float32", "bfloat16"):
            line = f"bench rms_norm --sizes T=3,H=80 --dtype {dtype} --peer kernel_for_bench:{name}"
            (found,) = run_json(line, status=status)[1]["peers"].values()
            assert found["right"] is right and found["time_us"] is None and found["note"].startswith(note), found


def test_a_case_too_large_for_a_cpu_is_not_checked() -> None:
    case = Case(OPS["expert_swiglu"], OPS["expert_swiglu"].bench_shapes[0])
    outcome = measure_row(case, H100, {"mine": PEERS["torch"]}, "there is no GPU").peers["mine"]
    assert outcome.note == "not checked: too large for a CPU (705 MB, 1 GFLOP)" and outcome.right is None


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        *((text, "MODULE:FUNCTION") for text in ("mine_for_bench", ":off")),
        ("absent_for_bench:off", "No module named 'absent_for_bench'"),
        ("torn_for_bench:f", "SyntaxError"),
        ("raises_for_bench:f", "RuntimeError: of the module"),
        ("mine_for_bench:absent", "has no attribute 'absent'"),
    ],
)
def test_bad_peer_is_one_line(peer: str, message: str, folder: Path) -> None:
    assert message in error_line("bench expert_swiglu --peer", peer)


@pytest.mark.parametrize(
    ("error", "note", "status"),
    [(torch.OutOfMemoryError(), "out of memory", 0), (ValueError("no tile\nor"), "fails: ValueError: no tile", 1)],
)
def test_a_case_that_cannot_start_has_its_row(
    error: Exception, note: str, status: int, timed: Mock, monkeypatch: Any
) -> None:
    monkeypatch.setattr(measure, "untimed_row", Mock(side_effect=[error, untimed_row(small("route"), H100)]))
    assert run_json("bench route --sizes T=1", status=status)[1]["note"] == note


@pytest.mark.compiled
def test_a_lost_gpu_ends_the_process_after_the_row_of_its_case(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "DEVICE", torch.device("cuda", 0))
    monkeypatch.setattr(measure, "measure_gpu", lambda: H100)
    gpu.driver.breaks = "rms_norm_kernel"
    sizes = "".join(f" --sizes T={T},H=16" for T in (1, 2, 3))
    status, out, error = run(f"bench rms_norm --json{sizes}", "--peer", "torch")
    lines = list(map(json.loads, out.splitlines()))
    assert status == 1 and [line["kind"] for line in lines] == ["gpu", "row"]
    assert "illegal memory access" in lines[1]["note"] and "cuda:0 is lost to this process" in error


def test_rows_that_a_lost_gpu_leaves_out_exit_1(timed: Mock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last row that there is ran out of memory, which alone is no fault."""
    only = replace(untimed_row(small("rms_norm"), H100), ours=Outcome(note="out of memory"))
    monkeypatch.setattr(measure, "measure_rows", lambda *_: iter([only]))
    assert [run(f"bench rms_norm --sizes T=1,H=16{more}")[0] for more in ("", " --sizes T=2,H=16")] == [0, 1]


@pytest.mark.compiled
def test_plot() -> None:
    """A panel for each operation, a bar for each case in the order of the floors, and times where there are any."""
    pytest.importorskip("matplotlib")

    def labels(axes: Any) -> list[str]:
        return [label.get_text() for label in axes.get_legend().get_texts()]

    rows = [untimed_row(case, H100) for case in cases(["expert_swiglu", "rms_norm"])]
    rows = [row for row in rows if row.case.sizes.H == 4096 and len(row.case.as_dict()) in (2, 5)]
    figure = figure_of(rows, H100)
    experts, norm = figure.axes
    assert "these are floors" in figure.get_suptitle() and labels(experts) == labels(norm) == ["floor"]
    assert experts.get_title() == "expert_swiglu, bfloat16"
    assert [tick.get_text() for tick in experts.get_yticklabels()] == [f"T{T} H4096 I14336 E8 K2" for T in TOKENS]
    timed = [replace(row, ours=Outcome(row.floor_s * 2, right=True)) for row in rows]
    axes = figure_of(timed, H100).axes[0]
    floors_us = [bar.get_width() for bar in axes.patches]
    assert floors_us == sorted(floors_us) and labels(axes) == ["ours", "floor"] and axes.get_xscale() == "log"
    assert axes.lines[0].get_xdata() == pytest.approx([2 * one for one in floors_us])
    named = [tick.get_text() for tick in axes.get_xticklabels(minor=True)]
    assert not any(named) and axes.get_xlim()[0] < floors_us[0]
