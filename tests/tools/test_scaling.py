"""More GPUs on paper: what `mixtral_triton.tools.scaling` predicts of a split, and `fit --scaling` prints of it."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from mixtral_triton.cli import main
from mixtral_triton.parallel import Shard
from mixtral_triton.tools.fit import KNOWN
from mixtral_triton.tools.gpus import GPU, GPUS
from mixtral_triton.tools.scaling import Step, busiest, step

CONFIG, H100 = KNOWN["mixtral-8x7b"], GPUS["h100"]
DOCS = Path(__file__).parents[2] / "docs" / "scaling.md"


def decode(tp: int = 1, ep: int = 1, gpu: GPU = H100) -> Step:
    return step(CONFIG, {}, Shard(tp=tp, ep=ep), gpu, 1, 1, 4096)


def test_one_gpu_sends_nothing_and_is_what_bench_predicts(capsys: pytest.CaptureFixture[str]) -> None:
    """But for the fused pair of experts and norm, which a mesh has not."""
    sizes = "B=1,S=4096,L=4,H=4096,I=14336,E=8,K=2,Hq=32,Hkv=8,D=128,V=32000"
    assert main(["bench", "decode_step", "--sizes", sizes, "--gpu", "h100", "--json"]) == 0
    row = next(json.loads(line) for line in capsys.readouterr().out.splitlines() if '"kind": "row"' in line)
    found = step(replace(CONFIG, num_hidden_layers=4), {}, Shard(), H100, 1, 1, 4096)
    assert found.sending == 0 and found.computing * 1e6 == pytest.approx(row["predicted"]["time_us"], rel=0.02)


def test_a_rank_computes_its_part() -> None:
    whole, half, eighth = (decode(tp=n).computing for n in (1, 2, 8))
    assert 0.5 * whole < half < 0.6 * whole and 0.125 * whole < eighth < 0.25 * whole
    # One token's two experts: eight ranks of "ep" are no faster than one of them, which eight of "tp" share.
    assert decode(ep=8).computing > 2 * eighth


def test_all_reduce_takes_hops_and_bytes() -> None:
    """NCCL's tree over eight GPUs: 6.8 us and seven hops of 0.6 there and back; then bytes, by the slower link."""
    small = decode(tp=8).sending / (2 * 32 + 1)
    assert small == pytest.approx(15.2e-6, rel=0.05)
    assert decode(tp=16).sending / (2 * 32 + 1) == pytest.approx(25.2e-6, rel=0.05)
    chunk = [step(CONFIG, {}, Shard(tp=n), H100, 1, 2048, 2048).sending for n in (8, 16)]
    moved = 64 * 2 * 7 / 8 * 2048 * 4096 * 2
    assert chunk[0] == pytest.approx(64 * 15.2e-6 + moved / (0.82 * 450e9), rel=0.02)
    assert chunk[1] > chunk[0] + 64 * 9e-6  # eight network GPUs a node carry what NVLink does, from farther away
    slow = replace(H100, chip=replace(H100.chip, network=5e9))  # type: ignore[type-var]
    assert decode(tp=16, gpu=slow).sending > decode(tp=16).sending
    assert decode(tp=8, gpu=slow).sending == decode(tp=8).sending


@pytest.mark.parametrize(
    ("tokens", "ep", "experts", "routes"),
    [(1, 8, 1 / 2, 1 / 2), (1, 2, 3 / 7 + 4 / 7 / 2, 3 / 7 + 4 / 7 / 2), (2048, 8, 1 / 8, 1 / 8), (1, 1, 1, 1)],
)
def test_the_busiest_rank(tokens: int, ep: int, experts: float, routes: float) -> None:
    """Two of eight experts a token: both in the same half with 3 chances of 7."""
    found = busiest(tokens, 2, 8, ep)
    assert found == pytest.approx((experts, routes), rel=0.12)
    assert tokens == 1 or found[1] > routes  # never even


def numbers(line: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"[\d,]*\d\.?\d*", line)]


def test_the_documented_figures_are_the_printed_ones(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    blocks = re.findall(r"```text\n\$ mixtral-triton (.*)\n((?:.*\n)*?)```", DOCS.read_text())
    assert len(blocks) >= 2
    for command, text in blocks:
        assert main(shlex.split(command)) == 0
        got, want = (numbers(one) for one in (capsys.readouterr().out, text))
        assert got == pytest.approx(want, rel=0.1, abs=1.01), f"print {command!r} into docs/scaling.md again"


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--gpu", "a100", "--scaling", "int4", "--context", "2048", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted"] is True and found["format"] == "int4" and found["gpu"] == "A100 80GB"
    first, *rest = found["splits"]
    assert first["gpus"] == 1 and first["fits"] and first["decode"]["sending_us"] == 0
    assert all(split["decode"]["sending_us"] > 0 for split in rest)
    # Those that divide the model: it has eight experts.
    assert [(one["tp"], one["ep"]) for one in rest if one["gpus"] == 16] == [(16, 1), (8, 2), (4, 4), (2, 8)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scaling"], "--scaling is given and there is no GPU here, needs --gpu, too"),
        (["--gpu", "rtx4090", "--scaling"], "--scaling has the rates of h100, a100, h200, b200, mi300x: needs --gpu"),
        (["--gpu", "h100", "--scaling", "int3"], "--scaling is 'int3', needs one of as stored, fp8, int8, int4"),
    ],
)
def test_wrong_options_are_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
