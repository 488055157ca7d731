"""Your function beside an operation: found, called, checked before it is timed; from the command line and in Python."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.my_experts import swiglu
from mixtral_triton import cli
from mixtral_triton.cli import SMALL, main
from mixtral_triton.config import MixtralConfig
from mixtral_triton.kernels import reference
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.bench import command as bench_command
from mixtral_triton.tools.bench.cases import BENCHED, Case, Oracle, cases
from mixtral_triton.tools.bench.cases import model_sizes as letters
from mixtral_triton.tools.bench.measure import Bench, checked_row, compare, timed_row
from mixtral_triton.tools.bench.peers import PEERS, arguments
from mixtral_triton.tools.bench.peers import import_peer as imported
from mixtral_triton.tools.bench.peers import user_peer as own_peer
from mixtral_triton.tools.gpus import GPUS

ROOT = Path(__file__).parents[2]
CPU, H100 = torch.device("cpu"), GPUS["h100"]
SIZES = {"T": 7, "H": 32, "I": 24, "E": 4, "K": 2}
WRITTEN = ",".join(f"{letter}={size}" for letter, size in SIZES.items())
compiled_way = pytest.mark.skipif(INTERPRETED, reason="compiles: needs a process without TRITON_INTERPRET")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU says")

MINE = """
import torch
from examples.my_experts import swiglu

def off(*args): return swiglu(*args) * 1.1
def shaped(*args): return swiglu(*args)[None]
def writes(x, *args):
    y = swiglu(x, *args)
    x += 1
    return y
def nothing(*args): pass
def few(x): return x
def broken(*args): raise RuntimeError("no such thing")
def nan(*args): return swiglu(*args) * float("nan")
NUMBER = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current folder with a module of peers, as a user has it; nothing of it stays."""
    (tmp_path / "mine_for_bench.py").write_text(MINE)
    (tmp_path / "torn_for_bench.py").write_text("def f(:\n")
    (tmp_path / "raises_for_bench.py").write_text("raise RuntimeError('of the module\\nand more')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.endswith("_for_bench")]:
        del sys.modules[name]


def peers(*names: str) -> list[str]:
    return [word for name in names for word in ("--peer", f"mine_for_bench:{name}")]


def rows(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, capsys.readouterr().out.splitlines()) if line["kind"] == "row"]


@compiled_way
@without_gpu
def test_the_example_is_right_from_the_root() -> None:
    """The very line of docs/bench.md, in a process of its own."""
    line = "bench expert_swiglu --sizes T=16,H=256,I=512,E=8,K=2 --peer examples.my_experts:swiglu"
    assert line in " ".join((ROOT / "docs" / "bench.md").read_text().split())
    environment = {**os.environ, "COLUMNS": "80"}
    command = [sys.executable, "-m", "mixtral_triton", *line.split()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    words = " ".join(done.stdout.split())
    assert "examples.my_experts:swiglu, T16 H256 I512 E8 K2: right, not timed: there is no GPU" in words


@compiled_way
@without_gpu
def test_wrong_peers_are_named_with_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("off", "shaped", "writes", "nothing", "few", "broken", "nan")
    args = ["bench", "expert_swiglu", "--sizes", WRITTEN, "--peer", "examples.my_experts:swiglu", *peers(*names)]
    assert main([*args, "--json"]) == 1
    (row,) = rows(capsys)
    said = {name.partition(":")[2]: told for name, told in row["peers"].items()}
    assert said["swiglu"]["right"] and said["swiglu"]["note"].startswith("right, not timed")
    assert all(said[name]["right"] is False and said[name]["time_us"] is None for name in names)
    assert said["off"]["note"].startswith("wrong: an error of ") and "inf" in said["nan"]["note"]
    assert said["shaped"]["note"] == "wrong: results of shape [1, 7, 32], where [7, 32] would be right"
    assert said["writes"]["note"] == "wrong: it writes into x"
    assert said["nothing"]["note"] == "wrong: results of shape none, where [7, 32] would be right"
    assert "is called with (x, gate_up_proj, down_proj, ids, weights)" in said["few"]["note"]
    assert said["broken"]["note"] == "fails: RuntimeError: no such thing"
    assert main(args) == 1
    table = capsys.readouterr().out
    assert "wrong: it writes into x" in " ".join(table.split()) and "fails: RuntimeError: no such thing" in table


@compiled_way
def test_a_right_peer_is_timed_and_a_wrong_one_is_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a stand-in for a GPU."""
    timed: list[Any] = []

    def timer(call: Any) -> float:
        timed.append(call())
        return 1e-3

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        bench_command.Bench, "of", classmethod(lambda cls, device: Bench(CPU, H100, None, timer, timer))
    )
    unwanted = [word for name in ("torch.compile", "HF grouped_mm", "Liger", "vLLM") for word in ("--without", name)]
    args = ["bench", "expert_swiglu", "--sizes", WRITTEN, *unwanted, "--peer", "examples.my_experts:swiglu"]
    parsed = cli.parser().parse_args([*args, "--json"])
    assert bench_command.run(parsed, no_bar) == 0 and len(timed) == 3, "ours, torch, and the example"
    (row,) = rows(capsys)
    assert row["peers"]["examples.my_experts:swiglu"] == {"time_us": 1e3, "note": None, "right": True, "ratio": 1.0}
    parsed = cli.parser().parse_args([*args, *peers("off", "writes")])
    assert bench_command.run(parsed, no_bar) == 1 and len(timed) == 6, "the wrong ones are not timed"
    assert capsys.readouterr().out.count("wrong: ") == 2


@contextmanager
def no_bar(label: str, total: int) -> Iterator[Any]:
    yield argparse.Namespace(update=lambda done, total: None)


@pytest.mark.parametrize("name", OPS)
def test_a_peer_gets_the_arguments_in_the_operation_s_order(name: str) -> None:
    """The reference, called by position; and the operator's own order is the same."""
    op = OPS[name]
    case = Case(op, op.test_shapes[0], torch.float32 if torch.float32 in op.dtypes else op.dtypes[0])
    args = case.inputs(CPU)
    taken = list(arguments(op, args))
    schema = getattr(torch.ops.mixtral_triton, name).default._schema
    assert taken == [argument.name for argument in schema.arguments][: len(taken)]

    def mine(*given: Any) -> Any:
        return op.call_reference(**dict(zip(taken, given, strict=True)))

    assert Oracle(op, args).fault(own_peer("mine", mine).build(op, args)) is None


def test_results_are_held_to_number_kind_and_shape() -> None:
    case = Case(OPS["route"], {"T": 1, "E": 8, "K": 2}, torch.float32)
    args = case.inputs(CPU)
    judge = Oracle(case.op, args)

    def fault(change: Any) -> str | None:
        return judge.fault(lambda logits, top_k: change(*reference.route(logits, top_k)))

    assert fault(lambda w, i: (w, i)) is None and fault(lambda w, i: [w, i.long()]) is None, "ids of any integer type"
    assert "[2] and [1, 2], where [1, 2] and [1, 2]" in str(fault(lambda w, i: (w[0], i))), "no broadcasting"
    assert "[1, 2], where" in str(fault(lambda w, i: w))
    assert "a result is a float" in str(fault(lambda w, i: (w, 1.0)))
    assert "inf" in str(fault(lambda w, i: (w, i.flip(-1) + 1)))


def test_what_a_peer_wrote_into_is_put_back() -> None:
    case = Case(OPS["rms_norm"], {"T": 3, "H": 8}, torch.float32)
    args = case.inputs(CPU)
    before = args["x"].clone()
    row = timed_row(case, H100, CPU, lambda call: 1.0, [own_peer("mine", lambda x, weight, eps: x.zero_())])
    assert row.peers["mine"].note == "wrong: it writes into x" and row.ours.right
    assert "writes into x" in str(Oracle(case.op, args).fault(lambda x, weight, eps: x.zero_()))
    assert args["x"].equal(before)


def test_a_case_too_large_for_a_cpu_is_not_checked_and_says_so() -> None:
    (case,) = cases(["expert_swiglu"], sizes=["T=1,H=4096,I=14336,E=8,K=2"])
    row = checked_row(case, H100, [own_peer("mine", swiglu)], "there is no GPU")
    said = str(row.peers["mine"].note)
    assert (
        said == "not checked: too large for a CPU (1,409 million values, 1 GFLOP)" and row.peers["mine"].right is None
    )
    (step,) = (case for case in cases(["decode_step"], at=["L=1", "H=4096"]))
    assert "too large" in str(step.too_large_for_cpu())
    assert Case(OPS["expert_swiglu"], SIZES).too_large_for_cpu() is None


@without_gpu
def test_in_python_it_takes_five_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the module's docstring; those of docs/bench.md are the same."""
    import mixtral_triton.tools.bench as module

    lines = [line[4:] for line in str(module.__doc__).splitlines() if line.startswith("    ")]
    code = "\n".join(lines)
    documented = (ROOT / "docs" / "bench.md").read_text()
    assert len(lines) <= 5 and code.replace("\n\n", "\n") in documented.replace("\n\n", "\n")
    exec(compile(code, "bench", "exec"), {})
    assert "right, not timed: there is no GPU" in capsys.readouterr().out


@without_gpu
def test_compare_gives_rows() -> None:
    found = compare(
        "expert_swiglu", SIZES, {**SIZES, "T": 3}, peers={"a": swiglu, "b": lambda *args: args[0]}, dtype=torch.float32
    )
    assert [row.case.sizes["T"] for row in found] == [7, 3] and {row.case.dtype for row in found} == {torch.float32}
    assert all(row.peers["a"].right and row.peers["b"].right is False and row.floor_s > 0 for row in found)
    assert compare("route", model=MixtralConfig.from_pretrained(SMALL))[0].case.sizes["E"] == 8
    with pytest.raises(ValueError, match="needs a function"):
        compare("route", peers={"mine": 3})  # type: ignore[dict-item]


def test_a_checkpoint_s_sizes_are_those_of_the_cases() -> None:
    small, plain = MixtralConfig.from_pretrained(SMALL), MixtralConfig(rope_theta=1e6, num_local_experts=6)
    for model in (small, plain):
        own, found = letters(model), cases(model=model)
        assert {case.op.name for case in found} == set(BENCHED)
        for case in found:
            named = {
                letter: size
                for letter, size in case.sizes.items()
                if letter in "HIEKDV" or letter in ("Hq", "Hkv", "P")
            }
            assert all(own[letter] == size for letter, size in named.items())
            assert case.sizes.get("T", 1) <= own["P"] and case.sizes.get("C", 0) <= (own["window"] or own["P"])
            assert case.sizes.get("window", own["window"]) == own["window"] or model is plain
            if case.op.name in OPS:
                case.op.check(**case.inputs(torch.device("meta")))
        products = {(case.sizes["H"], case.sizes["N"]) for case in found if case.op.name == "linear"}
        heads, keys = own["Hq"] * own["D"], 2 * own["Hkv"] * own["D"]
        assert products == {(own["H"], heads + keys), (heads, own["H"]), (own["H"], own["V"])}
    (case,) = cases(["expert_swiglu"], sizes=["T=3"], model=small)
    assert case.sizes == {"T": 3, "H": 128, "I": 256, "E": 8, "K": 2}, "what --sizes leave out is the model's"


def test_a_dtype_goes_to_every_operation_that_has_it() -> None:
    found = cases(quick=True, dtype=torch.float16)
    assert {case.dtype for case in found if case.op.name != "sort_by_expert"} == {torch.float16}
    assert {case.dtype for case in found if case.op.name == "sort_by_expert"} == {torch.int32}


@compiled_way
@without_gpu
def test_dtype_and_model_from_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["bench", "rms_norm", "--model", str(SMALL), "--dtype", "float16", "--quick", "--json"]
    assert main(args) == 0
    lines = list(map(json.loads, capsys.readouterr().out.splitlines()))
    found = [line for line in lines if line["kind"] == "row"]
    assert {line["sizes"]["H"] for line in found} == {128} and {line["dtype"] for line in found} == {"float16"}
    kernels = [line for line in lines if line["kind"] == "kernel"]
    assert {line["dtype"] for line in kernels} == {"fp16"} and {line["constexprs"]["BLOCK_H"] for line in kernels} == {
        128
    }
    assert {line["sizes"]["H"] for line in lines if line["kind"] == "traffic"} == {128}


def test_the_module_is_looked_for_here_first_and_found_later_too(folder: Path) -> None:
    (folder / "json_for_bench.py").write_text("from operator import add\nclass Kept:\n    f = staticmethod(add)\n")
    (folder / "later_for_bench.py").write_text(
        "def f(x):\n    import mine_for_bench\n    return mine_for_bench.NUMBER\n"
    )
    assert imported("json_for_bench:Kept.f").name == "json_for_bench:Kept.f"
    peer = imported("later_for_bench:f")
    assert peer.build(OPS["rms_norm"], {"x": None})(x=None) == 3


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("--peer", "mine_for_bench"), "MODULE:FUNCTION"),
        (("--peer", "mine_for_bench:"), "MODULE:FUNCTION"),
        (("--peer", ":off"), "MODULE:FUNCTION"),
        (("--peer", "mine_for_bench.py:off"), "'mine_for_bench.py'"),
        (("--peer", "./mine_for_bench:off"), "MODULE:FUNCTION"),
        (("--peer", "a:b:c"), "MODULE:FUNCTION"),
        (("--peer", "absent_for_bench:off"), "No module named 'absent_for_bench'"),
        (("--peer", "torn_for_bench:f"), "SyntaxError"),
        (("--peer", "raises_for_bench:f"), "RuntimeError: of the module"),
        (("--peer", "mine_for_bench:absent"), "has no attribute 'absent'"),
        (("--peer", "mine_for_bench:NUMBER"), "is a int, needs a function"),
        (("route", "--peer", "mine_for_bench:off"), "goes with the one operation"),
        (("--model", "."), "config.json"),
        (("--model", "no/such/folder"), "no/such/folder"),
        (("--sizes", "T=3,T=4"), "each letter once"),
        (("--sizes", "T=0,H=8,I=8,E=4,K=2"), "T=0"),
        (("--sizes", "T=1,H=8,I=8,E=1,K=2"), "at most E=1"),
        (("--sizes", "H=8,I=8,E=1,K=2"), "lacks T: expert_swiglu needs T, H, I, E, K"),
        (("sort_by_expert", "--dtype", "float16"), "sort_by_expert has int32, int64"),
    ],
)
def test_bad_input_is_one_line(
    args: tuple[str, ...], named: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "expert_swiglu", *args]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1, error


def test_a_peer_without_an_operation_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--peer", "examples.my_experts:swiglu"]) == 2
    assert "goes with the one operation" in capsys.readouterr().err


def test_quantized_weights_are_sized_by_their_form_and_a_peer_of_dense_ones_says_so() -> None:
    (case,) = cases(["expert_swiglu"], sizes=["T=3,H=128,I=64,E=4,K=2,gate_up=int4:32,down=int8"])
    args = case.inputs(CPU)
    assert args["gate_up_proj"].name == "int4:32" and args["down_proj"].name == "int8"
    dense = next(peer for peer in PEERS if peer.name == "HF grouped_mm")
    row = timed_row(case, H100, CPU, lambda call: (call(), 1.0)[1], [dense, PEERS[0]])
    assert row.ours.right and row.peers["torch"].right and row.peers["HF grouped_mm"].note == "its weights are dense"
    for wrong, message in (("weight=int5", "needs one of int4, int8, fp8"), ("weight=int4:48", "groups of 48")):
        with pytest.raises(ValueError, match=message):
            cases(["linear"], sizes=[f"T=3,H=128,N=64,{wrong}"])
