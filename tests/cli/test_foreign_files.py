"""Files, names and texts of a checkpoint that do harm: one line that names the file, and never a hang or a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mixtral_triton import Mixtral, config, ops
from mixtral_triton.cli import SMALL, main
from mixtral_triton.quantize import quantize
from mixtral_triton.quantize.write import write
from mixtral_triton.tools import prompt
from mixtral_triton.tools.prompt import load_tokenizer

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.usefixtures("in_process"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the small checkpoint."""
    return Path(shutil.copytree(SMALL, tmp_path / "checkpoint"))


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_truncation_and_padding_of_the_tokenizer_are_ignored(folder: Path) -> None:
    text, padding = "The return statement of a function", {"strategy": {"Fixed": 41}, "direction": "Right"}
    padding |= {"pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    want = load_tokenizer(SMALL).encode(text).ids
    for values in ({"truncation": cut}, {"padding": padding}, {"padding": padding | {"strategy": {"Fixed": 10**9}}}):
        change(folder / "tokenizer.json", **{"truncation": None, "padding": None, **values})
        assert load_tokenizer(folder).encode(text).ids == want and len(want) > 3


@pytest.fixture
def seconds() -> Iterator[None]:
    """A test that hangs fails after 20 seconds."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(20)
    yield
    signal.alarm(0)


def one_line(capsys: Any, *args: Any) -> str:
    """The line with which a command refuses its input."""
    assert main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return str(line)


GENERATE = ("--device", "cpu", "--prompt", "x", "--max-new-tokens", "1")


def test_a_prompt_without_an_end_is_refused(capsys: Any, monkeypatch: Any, seconds: None) -> None:
    monkeypatch.setattr(prompt, "PROMPT_CHARACTERS", 1000)
    line = one_line(capsys, "generate", SMALL, "--prompt-file", "/dev/zero", "--device", "cpu")
    assert "--prompt-file /dev/zero is longer than 1,000 characters" in line


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "counts.json"])
def test_files_that_never_end_are_refused(name: str, kind: str, folder: Path, capsys: Any, seconds: None) -> None:
    file = folder / name
    os.mkfifo(file) if kind == "pipe" else file.symlink_to("/dev/zero")
    if name != "counts.json":
        (folder / "model.safetensors").unlink()
    line = one_line(capsys, "generate", folder, "--offload", 1, "--offload-by", folder / "counts.json", *GENERATE)
    assert f"{file}: is a pipe, a device or a folder, needs a regular file" in line


def test_a_file_that_is_too_large_is_refused(folder: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "MOST_BYTES", 300)
    assert "config.json: has more than 300 bytes, needs at most as many" in one_line(capsys, "fit", folder)


WORDS = {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}
CUT = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 3}
TOKENIZERS: dict[str, dict[str, Any]] = {
    "panics in the file": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "bad merges": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["bad"]}},
    "unknown token": {"model": WORDS, "pre_tokenizer": None, "truncation": CUT},
}


@pytest.mark.parametrize("case", TOKENIZERS)
def test_a_tokenizer_that_fails_is_one_line(case: str, folder: Path, capfd: Any) -> None:
    """A panic, too, whose backtrace Rust would print."""
    change(folder / "tokenizer.json", **TOKENIZERS[case])
    assert f"{folder / 'tokenizer.json'} is not a tokenizer that" in one_line(capfd, "generate", folder, *GENERATE)


DOUBLE = "{% set n.s = n.s ~ n.s %}{% endfor %}"
TEMPLATES = {
    "no end": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "no end after 1 s"),
    "one large value": ("{{ 'a' * 9000000000 }}", "MemoryError"),
    "values that double": (
        "{% set n = namespace(s='aa') %}{% for i in range(40) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "fails with MemoryError",
    ),
    "a list as a name": ([{"name": ["default"], "template": "x"}], "--chat needs a template"),
    "no UTF-8": (b"\xff", "chat_template.jinja: the chat template holds bytes that are no text in UTF-8"),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_a_chat_template_is_limited(
    case: str, folder: Path, capsys: Any, seconds: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, message = TEMPLATES[case]
    monkeypatch.setattr(prompt, "TEMPLATE_SECONDS", 1 if case == "no end" else 10)
    if isinstance(template, bytes):
        (folder / "chat_template.jinja").write_bytes(template)
    else:
        change(folder / "tokenizer_config.json", chat_template=template)
    assert message in one_line(capsys, "generate", folder, "--chat", *GENERATE)


ESCAPE = "\x1b]0;title\x07\x9b31m"


def test_what_files_say_is_escaped_and_cut(folder: Path, capsys: Any) -> None:
    """Names of tensors, keys of the rope, texts of templates: none reaches the terminal as it is."""
    name = f"{ESCAPE}{'n' * 5000}"
    tensors = load_file(folder / "model.safetensors") | {name: torch.zeros(1, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    lines = [one_line(capsys, "generate", folder, *GENERATE)]
    change(folder / "tokenizer_config.json", chat_template="{{ raise_exception('" + name + "') }}")
    lines.append(one_line(capsys, "generate", folder, "--chat", *GENERATE))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: name}}))
    (folder / "model.safetensors").unlink()
    lines.append(one_line(capsys, "generate", folder, *GENERATE))
    change(folder / "config.json", rope_parameters={"rope_theta": 1e4, name: 1})
    lines.append(one_line(capsys, "fit", folder))
    for line in lines:
        assert line.isprintable() and r"\x1b]0;title\x07\x9b31m" in line and len(line) < 600


@pytest.mark.parametrize("pattern", ["(a+)+$", "(a|a)*b", ".*" * 9 + "x", "(a|b)" * 30, r"(\d{1,9}){1,9}x"])
def test_patterns_that_backtrack_are_refused(pattern: str, folder: Path, capsys: Any, seconds: None) -> None:
    kind = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    groups = {"group_0": {"targets": ["Linear"], "weights": kind, "format": "int-quantized"}}
    quantization = {"quant_method": "compressed-tensors", "config_groups": groups, "ignore": [f"re:{pattern}"]}
    change(folder / "config.json", quantization_config=quantization)
    assert "a pattern of ignore or targets is 're:" in one_line(capsys, "generate", folder, *GENERATE)


def test_links_out_of_the_folder_are_not_copied(folder: Path, tmp_path: Path) -> None:
    """The hub's cache holds links, to its blobs."""
    (tmp_path / "secret").write_text("password")
    (folder / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.warns(UserWarning, match="notes.txt is a link out of the folder, and is not copied"):
        write(folder, tmp_path / "out", "int8", "cpu")
    assert not (tmp_path / "out" / "notes.txt").exists() and (tmp_path / "out" / "tokenizer.json").is_file()
    snapshot, blobs = tmp_path / "models" / "snapshots" / "1", tmp_path / "models" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        file.rename(blobs / file.name)
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    with pytest.warns(UserWarning, match="notes.txt is a link"):
        write(snapshot, tmp_path / "again", "int8", "cpu")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (blobs / "tokenizer.json").read_bytes()


X = torch.ones(2, 64)
RAW: dict[str, tuple[Callable[[], Any], str]] = {
    "sparse": (lambda: ops.rms_norm(X.to_sparse(), X[0], 1e-5), "argument 'x' is of layout torch.sparse_coo"),
    "sparse weight": (lambda: ops.linear(X, X.to_sparse_csr()), "argument 'weight' is of layout torch.sparse_csr"),
    "eps": (lambda: ops.rms_norm(X, X[0], 2**70), "argument 'eps' is 1180591620717411303424, needs a finite"),
    "meta": (lambda: quantize(X.to("meta"), "int8"), "argument 'tensor' is on the meta device"),
    "format": (lambda: Mixtral.from_pretrained(SMALL, "cpu", weights={"experts": ["int4"]}), "weights is .*needs None"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("case", RAW)
def test_arguments_that_raised_raw_errors(case: str) -> None:
    function, message = RAW[case]
    with pytest.raises(ValueError, match=message):
        function()


COMMANDS = {
    "quantize {folder} {out} --weights int8 --device meta": "device is 'meta', which holds no numbers",
    "bench linear --gpu h100 --sizes T=999999999999999999999999999999,H=64,N=64": "--sizes is 'T=99999",
    "bench linear --gpu h100 --sizes T=9999999999,H=9999999999,N=64": "--sizes is 'T=99999",
    "fit --memory 1e300": "argument --memory: '1e300' needs GiB",
}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_crashed_are_one_line(command: str, folder: Path, tmp_path: Path, capsys: Any) -> None:
    try:
        assert COMMANDS[command] in one_line(capsys, *command.format(folder=folder, out=tmp_path / "out").split())
    except SystemExit as error:  # argparse's
        assert error.code == 2 and COMMANDS[command] in capsys.readouterr().err


MODEL, CONFIG, DROPPED = "model.safetensors", "config.json", "model.layers.1.self_attn.q_proj.weight"


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
    corrupt: Callable[[Path], object], named: str, folder: Path, capsys: Any
) -> None:
    corrupt(folder)
    assert named in one_line(capsys, "verify", folder, "--device", "cpu")
