"""The command line in processes of its own: exit codes, stdout and stderr, JSON; and its errors, each one line."""

from __future__ import annotations

import json
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
Corrupt = Callable[[Path], object]


def run(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(*args), capture_output=True, text=True, timeout=240)


def test_verify_the_shipped_checkpoint() -> None:
    done = run("verify", "--device", "cpu")
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
    assert done.stderr.startswith("--device cpu: plain torch") and done.stderr.count("\n") == 1
    assert "The return statement" in done.stdout and "tokens/s" in done.stdout
    as_json = json.loads(run(*args, "--json").stdout)
    assert len(as_json["tokens"]) == 6 and as_json["prompt"] + as_json["text"] in done.stdout


PROMPT = ("generate", "--prompt", "x")


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
    ],
)
def test_bad_input_is_one_line_on_stderr(args: tuple[str, ...], named: str, capsys: Any, in_process: None) -> None:
    try:
        status: Any = main(args)
    except SystemExit as left:  # argparse
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and named in error and len(error.strip().splitlines()) == 1, error


DROPPED = "model.layers.1.self_attn.q_proj.weight"
POISONED = "model.layers.3.block_sparse_moe.experts.7.w2.weight"


def tensors(change: Callable[[dict[str, Any]], object]) -> Corrupt:
    def corrupt(folder: Path) -> None:
        values = load_file(folder / MODEL)
        change(values)
        save_file(values, folder / MODEL)

    return corrupt


def index(target: str) -> Corrupt:
    def corrupt(folder: Path) -> None:
        names = list(load_file(folder / MODEL))
        (folder / MODEL).unlink()
        content = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
        (folder / f"{MODEL}.index.json").write_text(json.dumps(content))

    return corrupt


def config(**changes: Any) -> Corrupt:
    def corrupt(folder: Path) -> None:
        values = json.loads((folder / CONFIG).read_text()) | changes
        (folder / CONFIG).write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    return corrupt


def rewrite(change: Callable[[Path], object]) -> Corrupt:
    return lambda folder: change(folder / MODEL)


CORRUPT: dict[str, tuple[Corrupt, str]] = {
    "missing": (tensors(lambda values: values.pop(DROPPED)), DROPPED),
    "extra": (tensors(lambda values: values.update(extra=values["model.norm.weight"] + 0)), "extra"),
    "nan": (tensors(lambda values: values[POISONED][5].fill_(float("nan"))), "experts.7.w2.weight"),
    "not safetensors": (rewrite(lambda file: file.write_bytes(b"x" * 10**6)), MODEL),
    "truncated": (rewrite(lambda file: file.write_bytes(file.read_bytes()[: 10**6])), MODEL),
    "pickle": (rewrite(lambda file: file.rename(file.with_name("pytorch_model.bin"))), "pytorch_model.bin"),
    "no shard": (index("gone.safetensors"), "gone.safetensors"),
    "outside": (index("../model.safetensors"), "../model.safetensors"),
    "misshapen": (config(hidden_size=64), "model.embed_tokens.weight"),
    "not json": (lambda folder: (folder / CONFIG).write_text("{"), CONFIG),
    "other model": (config(model_type="llama"), "model_type"),
    "no theta": (config(rope_parameters=..., rope_theta=...), "rope_theta"),
    "top-k": (config(num_experts_per_tok=9), "num_experts_per_tok"),
    "heads": (config(num_key_value_heads=3), "num_key_value_heads"),
    "activation": (config(hidden_act="gelu"), "hidden_act"),
    "dropout": (config(attention_dropout=0.1), "attention_dropout"),
}


@pytest.mark.parametrize(("corrupt", "named"), CORRUPT.values(), ids=CORRUPT)
def test_a_corrupt_checkpoint_is_one_line(
    corrupt: Corrupt, named: str, tmp_path: Path, capsys: Any, in_process: None
) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in (CONFIG, MODEL, "tokenizer.json"):
        shutil.copy(SMALL / name, folder / name)
    corrupt(folder)
    assert main(["verify", str(folder), "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert named in error and len(error.strip().splitlines()) == 1, error
