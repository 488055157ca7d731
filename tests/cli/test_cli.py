"""The command line in processes of its own: exit codes, stdout and stderr, JSON; and its errors, each one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixtral_triton.cli import SMALL, main
from mixtral_triton.kernels.launch import INTERPRETED
from tests.cli.test_terminal import command

pytestmark = pytest.mark.skipif(INTERPRETED, reason="selects the backend itself: run once, without")
MODEL, CONFIG = "model.safetensors", "config.json"


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(*args), capture_output=True, text=True, timeout=240)


def test_verify_the_shipped_checkpoint() -> None:
    """A short text: CI runs the README's command with the default one."""
    done = run("verify", "--device", "cpu", "--tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "Triton, interpreted" in done.stdout and "RIGHT" in done.stdout
    note, *progress = done.stderr.splitlines()
    assert "run interpreted" in note and all(line.startswith("verifying: ") for line in progress)
    report = json.loads(run("verify", "--json", "--device", "cpu", "--prompt", "The for statement").stdout)
    assert report["ok"] and report["backend"] == "Triton, interpreted" and report["rows"]


def test_generate_streams_and_repeats_itself() -> None:
    args = ("generate", "--device", "cpu", "--prompt", "The return statement", "--max-new-tokens", "6")
    done = run(*args)
    assert done.returncode == 0, done.stderr
    note, rates = done.stderr.splitlines()
    assert note.startswith("--device cpu: plain torch") and rates.startswith("prefill: ") and "tokens/s" in rates
    assert done.stdout.startswith("The return statement")
    as_json = json.loads(run(*args, "--json").stdout)
    assert len(as_json["tokens"]) == 6 and as_json["prompt"] + as_json["text"] in done.stdout


PROMPT = ("generate", "--prompt", "x")
TRACE = ("trace", "--device", "cpu", "--prompt")
H100, RTX4090 = ("fit", "--gpu", "h100"), ("fit", "--gpu", "rtx4090")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "COMMAND"),
        (("verify", "--nonsense"), "--nonsense"),
        (("verify", "no/such/folder"), "no/such/folder"),
        (("generate",), "--prompt"),
        (("generate", "--prompt", ""), "--prompt is empty"),
        ((*PROMPT, "--max-new-tokens", "5000"), "max_position_embeddings"),
        ((*PROMPT, "--max-new-tokens", "-1"), "max_new_tokens"),
        ((*PROMPT, "--seed", str(1 << 64)), "--seed"),
        ((*PROMPT, "--temperature", "-1"), "mixtral-triton generate: temperature is -1.0, needs"),
        ((*PROMPT, "--interpret", "--device", "cuda"), "mixtral-triton generate: --interpret runs"),
        ((*PROMPT, "--top-p", "0"), "top_p"),
        (("verify", "--device", "toaster"), "toaster"),
        (("verify", "--device", "cuda:99"), "cuda:99"),
        *(((name, "--device", "meta", "--prompt", "x"), "meta") for name in ("verify", "generate", "trace")),
        (("compile", "--arch", "sm_12"), "sm_12"),
        (("compile", "nonsense", "--arch", "sm_90"), "nonsense"),
        ((*TRACE, ""), "--prompt is empty"),
        ((*TRACE, "x", "--layers", "4"), "--layers is 4, needs layers of 0..3"),
        ((*TRACE, "x", "--plot", "trace.txt"), "ends in .png, .svg or .pdf"),
        ((*TRACE, "x", "--plot", "no/such/trace.png"), "no/such"),
        (("trace", "no/such/folder", "--prompt", "x"), "no/such/folder"),
        (("fit", "--gpu", "abacus"), "abacus.*H100 80GB.*MI300X"),
        (("fit", "--gpu", "v100"), "v100.*sm_80 or later"),
        ((*H100, "--memory", "5"), "--gpu is given, and --memory"),
        ((*H100, "--gpus", "0"), "--gpus is 0"),
        (("fit", "--gpus", "2"), "no GPU here"),
        (("fit", "--memory", "0"), "--memory is 0"),
        (("fit", "--memory", "inf"), "--memory is inf"),
        (("fit", "--batch", "0"), "--batch is 0"),
        (("fit", "--context", "32769"), "--context is 32769.*32768"),
        (("fit", "--context", "0"), "--context is 0"),
        (("fit", "no/such/folder"), "no/such/folder"),
        ((*RTX4090, "--link", "pcie9x16"), "--link.*pcie9x16.*pcie4x16"),
        ((*RTX4090, "--host-memory", "-1"), "--host-memory is -1, needs GiB, at least 0"),
        ((*RTX4090, "--host-memory", "2"), "--host-memory is 2.1 GB, and int4.* with 3 of 8.* needs 8.5 GB"),
        ((*H100, "--gpus", "2", "--link", "pcie4x8"), "--gpus is 2.*mesh"),
    ],
)
def test_bad_input_is_one_line_on_stderr(
    args: tuple[str, ...], named: str, capsys: Any, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    try:
        status: Any = main(args)
    except SystemExit as left:  # argparse
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and re.search(named, error) and len(error.strip().splitlines()) == 1, error


DROPPED = "model.layers.1.self_attn.q_proj.weight"


def drop_tensor(folder: Path) -> None:
    values = load_file(folder / MODEL)
    del values[DROPPED]
    save_file(values, folder / MODEL)


# One for each kind of error: tests/model has what else can be wrong with a checkpoint.
CORRUPT: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (drop_tensor, DROPPED),
    "truncated": (lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[: 10**6]), MODEL),
    "pickle": (lambda folder: (folder / MODEL).rename(folder / "pytorch_model.bin"), "pytorch_model.bin"),
    "not json": (lambda folder: (folder / CONFIG).write_text("{"), CONFIG),
}


@pytest.mark.parametrize(("corrupt", "named"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_checkpoint_is_one_line(
    corrupt: Callable[[Path], object], named: str, tmp_path: Path, capsys: Any, in_process: None
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in (CONFIG, MODEL, "tokenizer.json"):
        shutil.copy(SMALL / name, folder / name)
    corrupt(folder)
    assert main(["verify", str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.strip().splitlines()) == 1, error
