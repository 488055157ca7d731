"""A user's function as a peer: found, called, and checked before it is timed."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.my_experts import swiglu
from mixtral_triton.kernels import reference
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.kernels.router import RouteSizes
from mixtral_triton.tools.bench.cases import Case, cases
from mixtral_triton.tools.bench.measure import checked_row, fault, timed_row
from mixtral_triton.tools.bench.peers import PEERS, find_peer, user_peer
from mixtral_triton.tools.gpus import GPUS
from tests.cli.commands import error_line, output, run_json
from tests.tools.test_bench import use_bench

CPU, H100 = torch.device("cpu"), GPUS["h100"]
NORM = {"x": None, "weight": None, "eps": 0.0}
SIZES = {"T": 7, "H": 32, "I": 24, "E": 4, "K": 2}
BENCH = "bench expert_swiglu --sizes T=7,H=32,I=24,E=4,K=2"
EXAMPLE = "examples.my_experts:swiglu"
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="prints what a machine without a GPU prints")

MINE = """
from examples.my_experts import swiglu

def off(*args): return swiglu(*args) * 1.1
def shaped(*args): return swiglu(*args)[None]
def writes(x, *args):
    y = swiglu(x, *args)
    x += 1
    return y
def nothing(*args): pass
def one(x): return x
def broken(*args): raise RuntimeError("no such thing")
def nan(*args): return swiglu(*args) * float("nan")
NUMBER = 3
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
"""


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


def peer_options(*names: str) -> list[str]:
    return [word for name in names for word in ("--peer", f"mine_for_bench:{name}")]


WRONG = {
    "off": "wrong: an error of ",
    "shaped": "wrong: results of shape [[1, 7, 32]], where [[7, 32]] would be right",
    "writes": "wrong: it writes into x",
    "nothing": "wrong: results of shape [], where [[7, 32]] would be right",
    "one": "is called with (x, gate_up_proj, down_proj, ids, weights)",
    "broken": "fails: RuntimeError: no such thing",
    "nan": "an error of inf",
}


@pytest.mark.compiled
@without_gpu
def test_wrong_peers_have_notes_and_exit_1(folder: Path) -> None:
    row = run_json(f"{BENCH} --peer {EXAMPLE}", *peer_options(*WRONG), status=1)[1]
    peers = {name.partition(":")[2]: outcome for name, outcome in row["peers"].items()}
    assert peers["swiglu"]["right"] and peers["swiglu"]["note"].startswith("right, not timed")
    for name, note in WRONG.items():
        assert peers[name]["right"] is False and peers[name]["time_us"] is None and note in peers[name]["note"]


@without_gpu
def test_triton_peers_are_checked_where_their_kernels_are_interpreted(folder: Path) -> None:
    (folder / "kernel_for_bench.py").write_text(TRITON)
    outcomes = {"norm": (0, True, "right, not timed"), "double": (1, False, "wrong: an error of")}
    for name, (status, right, note) in outcomes.items():
        if not INTERPRETED:  # a process that compiles has no driver to launch by
            status, right, note = 0, None, "not checked: its Triton kernels need a GPU, or TRITON_INTERPRET=1"
        command = f"bench rms_norm --sizes T=3,H=80 --dtype float32 --peer kernel_for_bench:{name}"
        (found,) = run_json(command, status=status)[1]["peers"].values()
        assert found["right"] is right and found["time_us"] is None and found["note"].startswith(note)


@pytest.mark.compiled
def test_only_right_peers_are_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    use_bench(monkeypatch, timer=lambda call: (calls.append(call()), 1e-3)[1])
    args = [f"{BENCH} --peer torch --peer {EXAMPLE}"]
    _, row = run_json(*args)
    assert row["peers"][EXAMPLE] == {"time_us": 1e3, "note": None, "right": True, "ratio": 1.0}
    assert len(calls) == 3, "ours, torch, and the example"
    assert output(*args, *peer_options("off", "writes"), status=1).count("wrong: ") == 2 and len(calls) == 6


def test_help_after_an_operation_lists_arguments_and_sizes() -> None:
    text = output("bench rms_norm attention --help")
    assert "--sizes T=1,H=4096" in text and "weight    [H]" in text
    assert "attention --sizes B=" in text and "causal           False: iff" in text


@pytest.mark.parametrize("name", OPS)
def test_a_peer_gets_the_arguments_in_the_operation_s_order(name: str) -> None:
    op = OPS[name]
    args = Case(op, op.test_shapes[0], torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]).inputs(CPU)
    names = [argument.name for argument in getattr(torch.ops.mixtral_triton, name).default._schema.arguments]
    mine = user_peer(lambda *values: op.call_reference(**dict(zip(names, values, strict=False))), op, args)
    assert fault(op, args, mine) is None


def test_results_must_have_number_kind_and_shape() -> None:
    case = Case(OPS["route"], RouteSizes(1, 8, 2), torch.float32)
    args = case.inputs(CPU)
    w, i = reference.route(**args)
    assert fault(case.op, args, lambda **_: [w, i.long()]) is None, "ids of any integer type"
    for results, message in (
        ((w[0], i), "[[2], [1, 2]], where [[1, 2], [1, 2]]"),  # no broadcasting
        (w, "[[1, 2]], where"),
        ((w, 1.0), "[[1, 2]], where"),
        ((w, i.flip(-1) + 1), "inf"),
    ):
        assert message in str(fault(case.op, args, lambda results=results, **_: results))
    before = args["logits"].clone()
    assert "writes into logits" in str(fault(case.op, args, lambda logits, top_k: logits.zero_()))
    assert args["logits"].equal(before), "restored"


def test_a_case_too_large_for_a_cpu_is_not_checked() -> None:
    (case,) = cases(["expert_swiglu"], sizes=["T=1,H=4096,I=14336,E=8,K=2"])
    outcome = checked_row(case, H100, {"mine": partial(user_peer, swiglu)}, "there is no GPU").peers["mine"]
    assert outcome.note == "not checked: too large for a CPU (705 MB, 1 GFLOP)" and outcome.right is None
    (step,) = cases(["decode_step"], at=["L=1", "H=4096"])
    assert "too large" in str(step.too_large_for_cpu())
    assert Case(OPS["expert_swiglu"], OPS["expert_swiglu"].case(**SIZES)).too_large_for_cpu() is None


def test_modules_are_imported_from_the_current_folder_first(folder: Path) -> None:
    (folder / "json_for_bench.py").write_text("from operator import add\nclass Kept:\n    f = staticmethod(add)\n")
    later = "def f(*args):\n    import mine_for_bench\n    return mine_for_bench.NUMBER\n"
    (folder / "later_for_bench.py").write_text(later)
    assert callable(find_peer("json_for_bench:Kept.f"))
    assert find_peer("later_for_bench:f")(OPS["rms_norm"], NORM)(**NORM) == 3


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        *((text, "MODULE:FUNCTION") for text in ("mine_for_bench", "mine_for_bench:", ":off", "a:b:c", "./a:off")),
        ("mine_for_bench.py:off", "'mine_for_bench.py'"),
        ("absent_for_bench:off", "No module named 'absent_for_bench'"),
        ("torn_for_bench:f", "SyntaxError"),
        ("raises_for_bench:f", "RuntimeError: of the module"),
        ("mine_for_bench:absent", "has no attribute 'absent'"),
        ("mine_for_bench:NUMBER", "it is a int, needs a function"),
    ],
)
def test_bad_peer_is_one_line(peer: str, message: str, folder: Path) -> None:
    assert message in error_line("bench expert_swiglu --peer", peer)


def test_quantized_weights_have_sizes_and_no_dense_peer() -> None:
    (case,) = cases(["expert_swiglu"], sizes=["T=3,H=128,I=64,E=4,K=2,gate_up=int4:32,down=int8"])
    args = case.inputs(CPU)
    assert args["gate_up_proj"].name == "int4:32" and args["down_proj"].name == "int8"
    row = timed_row(case, H100, CPU, lambda call: (call(), 1.0)[1], PEERS)
    assert row.ours.right and row.peers["torch"].right
    assert row.peers["transformers"].note == "its weights and its cache are dense"
    for wrong, message in (
        ("weight=int5", "needs one of int4, int8, fp8, fp8_w8a8"),
        ("weight=int4:0", "needs one of int4, int8, fp8, fp8_w8a8, and maybe a group"),
        ("weight=fp8_w8a8:64", "needs one of int4, int8, fp8, fp8_w8a8"),
        ("weight=int4:48", "group is 48"),
    ):
        with pytest.raises(ValueError, match=message):
            cases(["linear"], sizes=[f"T=3,H=128,N=64,{wrong}"])


def test_sizes_without_a_position_are_refused() -> None:
    with pytest.raises(ValueError, match="--sizes has P=0, needs at least 1"):
        cases(["rope"], sizes=["B=1,T=2,Hq=2,Hkv=1,D=16,P=0"])
