"""The command line in processes of its own: exit codes, what is said where, JSON."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixtral_triton.cli import SMALL, main
from mixtral_triton.kernels.launch import INTERPRETED

ROOT = Path(__file__).parents[2]
# Each starts a process that chooses for itself whether to interpret, so once is enough.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="chooses the interpreter itself: run once, without")


def run(*args: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "mixtral_triton", *args]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=timeout)


def test_verify_the_shipped_checkpoint() -> None:
    done = run("verify", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "Triton, interpreted" in done.stdout and "RIGHT" in done.stdout
    before, *progress = done.stderr.splitlines()
    assert "run interpreted" in before
    assert all(line.startswith("verifying: ") for line in progress)


def test_verify_json(tmp_path: Path) -> None:
    done = run("verify", "--json", "--device", "cpu", "--prompt", "The for statement")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["ok"] and report["way"] == "Triton, interpreted" and report["rows"]


def test_generate_streams_and_repeats_itself() -> None:
    args = ("generate", "--device", "cpu", "--prompt", "The return statement", "--max-new-tokens", "6")
    done = run(*args)
    assert done.returncode == 0, done.stderr
    assert "The return statement" in done.stdout and "tokens/s" in done.stdout
    as_json = json.loads(run(*args, "--json").stdout)
    assert len(as_json["tokens"]) == 6
    assert as_json["prompt"] + as_json["text"] in done.stdout


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((), "COMMAND"),
        (("verify", "--nonsense"), "--nonsense"),
        (("verify", "no/such/folder"), "no/such/folder"),
        (("generate",), "--prompt"),
        (("generate", "--prompt", ""), "--prompt is empty"),
        (("generate", "--prompt", "x", "--max-new-tokens", "5000"), "max_position_embeddings"),
        (("generate", "--prompt", "x", "--max-new-tokens", "-1"), "max_new_tokens"),
        (("generate", "--prompt", "x", "--seed", str(1 << 64)), "--seed"),
        (("generate", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("generate", "--prompt", "x", "--top-p", "0"), "top_p"),
        (("verify", "--device", "toaster"), "toaster"),
        (("verify", "--device", "cuda:99"), "cuda:99"),
        *(((command, "--device", "meta", "--prompt", "x"), "meta") for command in ("verify", "generate", "trace")),
        (("compile", "--arch", "sm_12"), "sm_12"),
        (("compile", "nonsense", "--arch", "sm_90"), "nonsense"),
    ],
)
def test_bad_input_is_one_line_on_stderr(
    args: tuple[str, ...], named: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in this process, which has made its choice: nothing gets to run
    try:
        status: Any = main(args)
    except SystemExit as left:  # argparse
        status = left.code
    error = capsys.readouterr().err
    assert status == 2
    assert named in error and len(error.strip().splitlines()) == 1, error


def test_bad_input_of_a_process() -> None:
    done = run("verify", "no/such/folder")
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1, done.stderr


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.extra"] = tensors["model.norm.weight"].clone()
    save_file(tensors, folder / "model.safetensors")


def poison(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.3.block_sparse_moe.experts.7.w2.weight"][5, 6] = float("nan")
    save_file(tensors, folder / "model.safetensors")


def truncate(folder: Path) -> None:
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1_000_000)


def pickle_only(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def index(target: str) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        names = list(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / "model.safetensors.index.json").write_text(json.dumps(content))

    return corrupt


def config(**changes: Any) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        kept = {key: value for key, value in values.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(kept))

    return corrupt


def not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("corrupt", "named"),
    [
        pytest.param(drop_tensor, "model.layers.1.self_attn.q_proj.weight", id="missing"),
        pytest.param(add_tensor, "model.extra", id="extra"),
        pytest.param(poison, "experts.7.w2.weight", id="nan"),
        pytest.param(truncate, "model.safetensors", id="truncated"),
        pytest.param(pickle_only, "pytorch_model.bin", id="pickle"),
        pytest.param(index("gone.safetensors"), "gone.safetensors", id="no shard"),
        pytest.param(index("../model.safetensors"), "../model.safetensors", id="outside"),
        pytest.param(config(hidden_size=64), "model.embed_tokens.weight", id="misshapen"),
        pytest.param(not_json, "config.json", id="not json"),
        pytest.param(config(model_type="llama"), "model_type", id="other model"),
        pytest.param(config(rope_parameters=..., rope_theta=...), "rope_theta", id="no theta"),
        pytest.param(config(num_experts_per_tok=9), "num_experts_per_tok", id="top-k"),
        pytest.param(config(num_key_value_heads=3), "num_key_value_heads", id="heads"),
        pytest.param(config(hidden_act="gelu"), "hidden_act", id="activation"),
        pytest.param(config(attention_dropout=0.1), "attention_dropout", id="dropout"),
    ],
)
def test_a_corrupt_checkpoint_is_refused(
    corrupt: Callable[[Path], None],
    named: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in this process, which has made its choice: nothing gets to run
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(SMALL / name, folder / name)
    corrupt(folder)
    assert main(["verify", str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.strip().splitlines()) == 1, error
