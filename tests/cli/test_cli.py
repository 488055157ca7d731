"""The command line: what it prints where, on terminals and pipes of every kind, how it ends, and errors of one line."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import mixtral_triton
from mixtral_triton import Mixtral, cli
from mixtral_triton.cli import SMALL, main, parser
from mixtral_triton.kernels.quantized import BITS
from mixtral_triton.tools import processes, terminal

ROOT = Path(__file__).parents[2]
# Each test decides for itself whether to interpret, so once is enough.
pytestmark = pytest.mark.compiled
GENERATE = ("generate", "--device", "cpu", "--prompt", "The café", "--max-new-tokens", "3")
TRACE = ("trace", *GENERATE[1:5])
FULL = Path("/dev/full")


def command(*args: str, code: str = "", **environment: str) -> dict[str, Any]:
    """What `subprocess` takes to run the command line, after `code`, in an environment without encodings or Triton."""
    free = ("TRITON_INTERPRET", "LC_ALL", "LC_CTYPE", "LANG", "COLUMNS")
    kept = {key: value for key, value in os.environ.items() if key not in free and not key.startswith("PYTHON")}
    kept |= {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    program = ["-c", f"{code}\nimport sys\nfrom mixtral_triton.cli import main\nsys.exit(main(sys.argv[1:]))"]
    entry = program if code else ["-m", "mixtral_triton"]
    return {"args": [sys.executable, *entry, *args], "cwd": ROOT, "env": kept | environment}


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(**command(*args, **environment), capture_output=True, timeout=240)


def run_text(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(**command(*args), capture_output=True, text=True, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "trace"])
def test_interpret_runs_the_kernels_on_the_cpu(name: str) -> None:
    """A GPU at hand is not used."""
    fake = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
    report = "import atexit\natexit.register(lambda: print(__import__('mixtral_triton').kernels.launch.INTERPRETED))"
    more = ("--max-new-tokens", "1") if name == "generate" else ("--layers", "0")
    process = command(name, "--interpret", "--prompt", "A b", *more, code=fake + report)
    done = subprocess.run(**process, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True", done.stderr
    assert "--interpret: the Triton kernels run interpreted" in done.stderr


@pytest.fixture
def fresh() -> Iterator[None]:
    """`select_backend` as in a new process; what it sets is undone."""
    with patch.dict(os.environ):
        os.environ.pop("TRITON_INTERPRET", None)
        yield


TORCH, INTERPRETER = "plain torch", "the Triton kernels run interpreted"


@pytest.mark.parametrize(
    ("values", "interpret", "gpu", "note", "switch"),
    [
        ({}, False, False, f"No GPU found: {TORCH}", None),
        ({}, False, True, "", None),
        ({}, True, False, f"No GPU found: {INTERPRETER}", "1"),
        ({}, True, True, "", None),
        ({"device": "cpu"}, False, True, f"--device cpu: {TORCH}", None),
        ({"device": "cpu"}, True, True, f"--device cpu: {INTERPRETER}", "1"),
        ({"interpret": True}, False, True, f"--interpret: {INTERPRETER}", "1"),
        ({"interpret": True}, False, False, f"--interpret: {INTERPRETER}", "1"),
    ],
)
def test_select_backend(
    values: Any, interpret: bool, gpu: bool, note: str, switch: str | None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    args = argparse.Namespace(**{"device": None, "interpret": False} | values)
    found = processes.select_backend(args, interpret)
    assert found.startswith(note) and bool(found) == bool(note)
    assert os.environ.get("TRITON_INTERPRET") == switch
    assert args.device == ("cpu" if values else None)


def test_a_switch_of_the_user_stays(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    args = argparse.Namespace(device=None, interpret=False)
    assert processes.select_backend(args, interpret=True) == "" and os.environ["TRITON_INTERPRET"] == "0"
    args.interpret = True
    with pytest.raises(ValueError, match="TRITON_INTERPRET=0"):
        processes.select_backend(args, interpret=False)


@pytest.mark.parametrize(
    ("args", "line"),
    [((*GENERATE, "--json"), "generating: "), (GENERATE, "reading the prompt: 0/"), (TRACE, "tracing: ")],
    ids=["generate --json", "generate", "trace"],
)
def test_long_work_reports_progress_on_a_pipe(
    args: tuple[str, ...], line: str, in_process: None, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = Mixtral.hidden
    monkeypatch.setattr(Mixtral, "hidden", lambda *args: time.sleep(0.2) or hidden(*args))
    monkeypatch.setattr(terminal, "INTERVAL", 0.05)
    assert main([*args]) == 0
    assert line in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"mixtral-triton {mixtral_triton.__version__}\n"
    assert version("mixtral-triton") == mixtral_triton.__version__


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(actions.choices)


@pytest.mark.parametrize("name", sorted(subcommands()))
def test_the_help_prints_every_default(name: str) -> None:
    sub = subcommands()[name]
    assert sub.format_help()
    for action in sub._actions[1:]:
        text = sub._get_formatter()._expand_help(action)
        if isinstance(action.default, (int, float)) and action.nargs != 0:
            assert text.endswith(f"default: {action.default:g}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("args", [GENERATE, TRACE, ("generate", "--help")], ids=lambda args: args[0])
def test_a_closed_pipe_is_exit_141_without_a_message(args: tuple[str, ...]) -> None:
    with subprocess.Popen(**command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == terminal.CLOSED_PIPE == 128 + signal.SIGPIPE
    assert ("plain torch" in error or not error) and "rror" not in error and "Exception" not in error


@pytest.mark.exhaustive
@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("args", [GENERATE, (*GENERATE, "--json"), TRACE], ids=["generate", "generate --json", "trace"])
def test_a_full_disk_under_stdout_is_one_line(args: tuple[str, ...], environment: dict[str, str]) -> None:
    process = command(*args, TRITON_INTERPRET="0", **environment)
    with FULL.open("wb") as disk:
        done = subprocess.run(**process, stdout=disk, stderr=subprocess.PIPE, timeout=240)
    assert done.returncode == 2
    assert done.stderr.decode() == f"mixtral-triton {args[0]}: [Errno 28] No space left on device\n"


def test_ctrl_c_ends_the_line() -> None:
    process = command(*GENERATE[:4], "The return", "--max-new-tokens", "900", TRITON_INTERPRET="0")
    # A run that was started with SIGINT ignored, as by `&` or nohup, would pass that on.
    process["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(**process, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(12)  # the prompt, and a bit of what follows
        running.send_signal(signal.SIGINT)
        out, error = running.stdout.read(), running.stderr.read()
    assert running.returncode == 130 and error == b"mixtral-triton generate: interrupted\n"
    assert out.endswith(b"\n") and b"tokens/s" not in out


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(args: Any) -> int:
        raise error

    monkeypatch.setattr(cli, "_generate", fail)


def test_ctrl_c_on_a_terminal_writes_over_its_echo(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*GENERATE]) == 130
    assert capsys.readouterr().err == "\rmixtral-triton generate: interrupted\n"


def test_missing_headers_or_compiler_are_one_line(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Python.h the compiler fails, as any process does. Without a compiler Triton's own function complains."""
    from triton.runtime.build import compile_module_from_src

    with monkeypatch.context() as patch:
        fail_with(patch, subprocess.CalledProcessError(1, ["gcc", "main.c"]))
        patch.setenv("CC", "gcc")
        patch.setattr(terminal.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
        assert main([*GENERATE]) == 2 and "python3-dev" in capsys.readouterr().err
        (tmp_path / "Python.h").touch()
        assert main([*GENERATE]) == terminal.CRASHED  # something else is wrong with that build
        assert "crashed: CalledProcessError" in capsys.readouterr().err
    source = f"int x{time.time_ns()};"
    monkeypatch.setattr(cli, "_generate", lambda args: compile_module_from_src(source, "nothing") and 0)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert main([*GENERATE]) == 2
    error = capsys.readouterr().err
    assert "needs a C compiler" in error and error.count("\n") == 1


def test_an_unexpected_error_is_a_crash_of_one_line(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    fail_with(monkeypatch, RuntimeError("a fault\nof ours"))
    assert main([*GENERATE]) == terminal.CRASHED == 3
    error = capsys.readouterr().err
    assert (
        error.startswith("mixtral-triton generate: crashed: RuntimeError: a fault of ours") and error.count("\n") == 1
    )


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "args", [("--peer", "transformers"), ("--prompt", "many words " * 600)], ids=["peer not installed", "too long"]
)
def test_a_wrong_argument_of_verify_is_the_only_line(args: tuple[str, ...]) -> None:
    """On a machine without a GPU and without transformers."""
    hide = "import importlib.util as u\nfind = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'transformers' else find(name, *rest)"
    process = command("verify", "--device", "cpu", *args, code=hide)
    done = subprocess.run(**process, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert done.stderr.startswith("mixtral-triton verify: ")


@pytest.mark.exhaustive
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
@pytest.mark.parametrize("name", ["generate", "trace"])
def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(name: str, encoding: str) -> None:
    where = {"PYTHONIOENCODING": encoding}
    done = run(name, "--device", "cpu", "--prompt", "The café → 日本\nfor statement", TRITON_INTERPRET="0", **where)
    progress = (b"tracing: ", b"reading the prompt: ", b"prefill: ")  # the first two: of a slow machine
    assert done.returncode == 0 and all(line.startswith(progress) for line in done.stderr.splitlines()), done.stderr
    assert "é" in done.stdout.decode("latin-1") if encoding == "latin-1" else done.stdout.isascii()
    assert (b"<s>[5]The[4] ca[" if name == "trace" else b"The caf") in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "args", [("compile", "append", "--arch", "sm_90"), ("tune", "route", "--at", "T=64", "--dry-run")]
)
def test_tables_are_drawn_in_ascii(args: tuple[str, ...]) -> None:
    done = run(*args, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"----" in done.stdout and b"?" not in done.stdout + done.stderr


@pytest.mark.slow
def test_json_is_the_same_in_every_encoding() -> None:
    found = [run(*GENERATE, "--json", **where) for where in ({}, {"PYTHONIOENCODING": "ascii"})]
    first, second = (json.loads(done.stdout)["text"] for done in found)
    assert first == second


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["generate", "trace", "verify"])
def test_a_prompt_that_is_not_utf_8_is_one_line(name: str) -> None:
    process = command(name, "--device", "cpu", "--prompt", "x", TRITON_INTERPRET="0")
    process["args"][-1] = b"\xff\xfe"
    done = subprocess.run(**process, capture_output=True, timeout=240)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"--prompt" in done.stderr


@pytest.mark.slow
def test_verify_the_shipped_checkpoint() -> None:
    """A short text: CI runs the README's command with the default one."""
    done = run_text("verify", "--device", "cpu", "--tokens", "12")
    assert done.returncode == 0, done.stderr
    assert "Triton, interpreted" in done.stdout and "RIGHT" in done.stdout
    note, *progress = done.stderr.splitlines()
    assert "run interpreted" in note and all(line.startswith("verifying: ") for line in progress)
    report = json.loads(run_text("verify", "--json", "--device", "cpu", "--quick", "--prompt", "The for").stdout)
    assert report["ok"] and report["backend"] == "Triton, interpreted" and report["rows"]


@pytest.mark.slow
def test_generate_streams_and_repeats_itself() -> None:
    args = ("generate", "--device", "cpu", "--prompt", "The return statement", "--max-new-tokens", "6")
    done = run_text(*args)
    assert done.returncode == 0, done.stderr
    note, rates = done.stderr.splitlines()
    assert note.startswith("--device cpu: plain torch") and rates.startswith("prefill: ") and "tokens/s" in rates
    assert done.stdout.startswith("The return statement")
    as_json = json.loads(run_text(*args, "--json").stdout)
    assert len(as_json["tokens"]) == 6 and as_json["prompt"] + as_json["text"] in done.stdout


PROMPT, TRACE_PROMPT = ("generate", "--prompt", "x"), ("trace", "--device", "cpu", "--prompt")
H100, RTX4090 = ("fit", "--gpu", "h100"), ("fit", "--gpu", "rtx4090")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (("verify", "--nonsense"), r"--nonsense \(see mixtral-triton verify --help\)"),
        (("verfy",), "did you mean verify\\?"),
        (("bench", "rms_nrm"), "did you mean rms_norm\\?"),
        (("compile", "rop", "--arch", "sm_90"), "did you mean rope\\?"),
        (("compile", "rope", "--arch", "sm_91"), "did you mean sm_90\\?"),
        (("fit", "--gpu", "rtx4900"), "did you mean RTX 4090\\?"),
        (("bench", "--gpu", "mi300"), "did you mean MI300X\\?"),
        (
            ("verify", "--weights", "int3"),
            "'int3' needs one of int4, int8, fp8, in a form like int4, or experts=int4,linear=int8; did you",
        ),
        (("verify", "--weights", "experts=int3"), "'int3' needs one of int4, int8, fp8"),
        (("verify", "--weights", "expert=int4"), "'expert' needs one of experts, linear, .* did you mean experts\\?"),
        (("verify", "--weights", "experts=int4,experts=int8"), "experts=int4,experts=int8"),
        (("verify", "--device", "gpu"), "'gpu' is unknown to torch: needs cuda, cuda:1, ... or cpu"),
        (("verify", "no/such/folder"), "no/such/folder"),
        (("generate",), "--prompt"),
        (("generate", "--prompt", ""), "--prompt is empty"),
        ((*PROMPT, "--max-new-tokens", "5000"), "max_position_embeddings"),
        ((*PROMPT, "--max-new-tokens", "-1"), "max_new_tokens"),
        ((*PROMPT, "--seed", str(1 << 64)), "--seed"),
        ((*PROMPT, "--temperature", "-1"), "mixtral-triton generate: temperature is -1.0, needs"),
        ((*PROMPT, "--interpret", "--device", "cuda"), "mixtral-triton generate: --interpret runs"),
        ((*PROMPT, "--top-p", "0"), "top_p"),
        (("verify", "--device", "cuda:99"), "cuda:99"),
        *(((name, "--device", "meta", "--prompt", "x"), "meta") for name in ("verify", "generate", "trace")),
        ((*PROMPT, "--context", "64"), "--context is 64, and goes with --offload auto"),
        ((*TRACE_PROMPT, ""), "--prompt is empty"),
        ((*TRACE_PROMPT, "x", "--layers", "4"), "--layers is 4, needs layers of 0..3"),
        (("trace", "no/such/folder", "--prompt", "x"), "no/such/folder"),
        ((*TRACE_PROMPT, "x y", "--counts", "no/such/file"), "--counts 'no/such/file' needs a file that can be"),
        (("fit", "--gpu", "abacus"), "abacus.*H100 80GB.*MI300X"),
        (("fit", "--gpu", "v100"), "v100.*sm_80 or later"),
        ((*H100, "--memory", "5"), "--gpu is given, and --memory"),
        (("fit", "--memory", "0"), "--memory is 0"),
        (("fit", "--memory", "inf"), "--memory is inf"),
        (("fit", "--batch", "0"), "--batch is 0"),
        (("fit", "--context", "32769"), "--context is 32769.*32768"),
        (("fit", "--context", "0"), "--context is 0"),
        (("fit", "no/such/folder"), "no/such/folder"),
        ((*RTX4090, "--link", "pcie9x16"), "--link.*pcie9x16.*pcie4x16"),
        ((*RTX4090, "--host-memory", "-1"), "--host-memory is -1, needs GiB, at least 0"),
        ((*RTX4090, "--host-memory", "2"), "--host-memory is 2.1 GB, and int4.* with 62 of 256 .* needs 5.7 GB"),
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


def test_without_a_command_the_help_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main([])
    assert left.value.code == 0
    out, error = capsys.readouterr()
    assert not error and all(name in out for name in subcommands())


def test_formats_are_those_of_quantized_weights_and_far_names_are_not_suggested() -> None:
    assert tuple(BITS) == cli.FORMATS
    message = "argument 'OP' is 'nonsense', needs one of rms_norm, linear"
    assert terminal.did_you_mean(message) == message
    assert terminal.did_you_mean("--temperature is -1.0, needs 0") == "--temperature is -1.0, needs 0"


def test_the_small_checkpoint_has_a_name_in_every_folder(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert mixtral_triton.SMALL == SMALL and Mixtral.from_pretrained("small", "meta").config.num_hidden_layers == 4
    assert main(["fit", "small", "--memory", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"] == "small"
    (tmp_path / "small").mkdir()
    with pytest.raises(FileNotFoundError, match=r"needs its config\.json"):
        Mixtral.from_pretrained("small", "meta")  # a folder of the user's has precedence


def test_a_missing_gpu_is_one_line_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    model = Mixtral.from_pretrained(SMALL, "cpu")
    with pytest.raises(ValueError, match="device 'cuda' does not exist: this machine has 0 GPUs") as error:
        model.to("cuda")
    assert "\n" not in str(error.value)
    assert model.to("cpu").to(torch.float32).dtype == torch.float32


def test_compile_takes_several_architectures(capsys: pytest.CaptureFixture[str], in_process: None) -> None:
    assert main(["compile", "append", "--arch", "sm_80", "--arch", "sm_90", "--arch", "sm_80", "--json"]) == 0
    found = [json.loads(line)["arch"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(set(found)) == ["sm_80", "sm_90"] and found.count("sm_80") == found.count("sm_90")


@pytest.mark.slow
def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("compile", "rms_norm", "--arch", "sm_90", TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    lines = [line for line in done.stderr.decode().splitlines() if line.startswith("mixtral-triton")]
    assert done.returncode == 2 and len(lines) == 1 and "needs TRITON_CACHE_DIR" in lines[0], done.stderr
