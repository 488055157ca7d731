"""The command line: what it prints where, on terminals and pipes of every kind, how it ends, and errors of one line."""

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import pytest

import mixtral_triton
from mixtral_triton import Mixtral, terminal
from mixtral_triton.cli import commands as cli
from mixtral_triton.cli.commands import SMALL, parser
from mixtral_triton.kernels.weights.formats import BITS
from tests.cli.commands import ROOT, error_line, heed_interrupts, output, run, run_json

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


def start(*args: str, code: str = "", text: bool = True, **environment: str) -> subprocess.CompletedProcess[Any]:
    return subprocess.run(**command(*args, code=code, **environment), capture_output=True, text=text, timeout=240)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["generate", "trace"])
def test_interpret_runs_the_kernels_on_the_cpu(name: str) -> None:
    """A GPU at hand is not used."""
    fake = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n"
    module = "mixtral_triton.kernels.launching.launch"
    report = f"import atexit, sys\natexit.register(lambda: print(sys.modules['{module}'].INTERPRETED))"
    more = ("--max-new-tokens", "1") if name == "generate" else ()
    done = start(name, "--interpret", "--prompt", "A b", *more, code=fake + report)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "True", done.stderr
    assert "--interpret: the Triton kernels run interpreted" in done.stderr


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
@patch.dict(os.environ)
def test_select_backend(values: Any, interpret: bool, gpu: bool, note: str, switch: Any, monkeypatch: Any) -> None:
    os.environ.pop("TRITON_INTERPRET", None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    args = argparse.Namespace(**{"device": None, "interpret": False} | values)
    found = terminal.select_backend(args, interpret)
    assert found.startswith(note) and bool(found) == bool(note)
    assert os.environ.get("TRITON_INTERPRET") == switch
    assert args.device == ("cpu" if values else None)


@patch.dict(os.environ, TRITON_INTERPRET="0")
def test_a_switch_of_the_user_stays_and_an_option_comes_before_it() -> None:
    args = argparse.Namespace(device=None, interpret=False)
    assert terminal.select_backend(args, interpret=True) == "" and os.environ["TRITON_INTERPRET"] == "0"
    args.interpret = True
    assert INTERPRETER in terminal.select_backend(args, interpret=False) and os.environ["TRITON_INTERPRET"] == "1"


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(actions.choices)


def test_the_help_prints_every_default() -> None:
    for command in subcommands().values():
        for action in command._actions[1:]:
            text = command._get_formatter()._expand_help(action)
            numeric = isinstance(action.default, (int, float)) and action.nargs != 0
            assert not numeric or text.endswith(f"default: {action.default:g}")
            outputs = "--json or --batch" if command.prog.endswith("generate") else "--json"
            assert action.dest != "logprobs" or text.startswith(f"with {outputs}: ")


@pytest.mark.slow
@pytest.mark.parametrize("args", [GENERATE, TRACE, ("generate", "--help")], ids=lambda args: args[0])
def test_a_closed_pipe_is_exit_141_without_a_message(args: tuple[str, ...]) -> None:
    with subprocess.Popen(**command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read().decode()
    assert process.returncode == terminal.CLOSED_PIPE == 128 + signal.SIGPIPE
    assert ("plain torch" in error or not error) and "rror" not in error and "Exception" not in error


def test_a_closed_stdout_is_refused_before_any_work(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python sets it where the descriptor is closed
    status = cli.main(["fit"])
    assert status == 2 and capsys.readouterr().err == (
        "mixtral-triton: standard output is closed, and results go there\n"
    )


@pytest.mark.slow
@pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("args", [GENERATE, (*GENERATE, "--json"), TRACE], ids=["generate", "generate --json", "trace"])
def test_a_full_disk_under_stdout_is_one_line(args: tuple[str, ...], environment: dict[str, str]) -> None:
    process = command(*args, TRITON_INTERPRET="0", **environment)
    with FULL.open("wb") as disk:
        done = subprocess.run(**process, stdout=disk, stderr=subprocess.PIPE, timeout=240)
    assert done.returncode == 2
    assert done.stderr.decode() == f"mixtral-triton {args[0]}: [Errno 28] No space left on device\n"


@pytest.mark.slow
def test_ctrl_c_ends_the_line() -> None:
    process = command(*GENERATE[:4], "The return", "--max-new-tokens", "900", TRITON_INTERPRET="0")
    process["preexec_fn"] = heed_interrupts
    with subprocess.Popen(**process, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(12)  # the prompt, and a bit of what follows
        running.send_signal(signal.SIGINT)
        out, error = running.stdout.read(), running.stderr.read()
    assert running.returncode == 130 and error == b"mixtral-triton generate: interrupted\n"
    assert out.endswith(b"\n") and b"tokens/s" not in out


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    monkeypatch.setattr(cli, "_generate", Mock(side_effect=error))


def test_a_missing_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own function complains."""
    from triton.runtime.build import compile_module_from_src

    source = f"int x{time.time_ns()};"
    monkeypatch.setattr(cli, "_generate", lambda args: compile_module_from_src(source, "nothing") and 0)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "C compiler" in error_line("", *GENERATE)


def test_an_unexpected_error_is_a_crash_of_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, RuntimeError("a fault\nof ours"))
    status, _, error = run("", *GENERATE)
    assert status == terminal.CRASHED == 3 and error.count("\n") == 1
    assert error.startswith("mixtral-triton generate: crashed: RuntimeError: a fault of ours")


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(encoding: str) -> None:
    where = {"PYTHONIOENCODING": encoding, "TRITON_INTERPRET": "0"}
    done = start("generate", "--device", "cpu", "--prompt", "The café → 日本\nfor statement", text=False, **where)
    assert done.returncode == 0 and all(line.startswith(b"prefill: ") for line in done.stderr.splitlines()), done.stderr
    assert "é" in done.stdout.decode("latin-1") if encoding == "latin-1" else done.stdout.isascii()
    assert b"The caf" in done.stdout


def test_version_and_help_without_a_command() -> None:
    assert output("--version") == f"mixtral-triton {mixtral_triton.__version__}\n"
    assert version("mixtral-triton") == mixtral_triton.__version__
    status, out, error = run("")
    assert status == 0 and not error and all(name in out for name in subcommands())


def test_formats_are_those_of_quantized_weights_and_far_names_are_not_suggested() -> None:
    assert tuple(BITS) == cli.FORMAT_NAMES
    message = "argument 'OP' is 'nonsense', needs one of rms_norm, linear"
    assert terminal.did_you_mean(message) == message
    assert terminal.did_you_mean("--temperature is -1.0, needs 0") == "--temperature is -1.0, needs 0"


def test_the_small_checkpoint_has_a_name_in_every_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert mixtral_triton.SMALL == SMALL and Mixtral.from_pretrained("small", "meta").config.num_hidden_layers == 4
    assert run_json("fit small --memory 8")["model"] == "small"
    (tmp_path / "small").mkdir()
    with pytest.raises(FileNotFoundError, match=r"small/config\.json"):
        Mixtral.from_pretrained("small", "meta")  # a folder of the user's has precedence


@pytest.mark.slow
def test_compile_takes_several_architectures() -> None:
    found = [line["arch"] for line in run_json("compile append --arch sm_80 --arch sm_90 --arch sm_80")]
    assert sorted(set(found)) == ["sm_80", "sm_90"] and found.count("sm_80") == found.count("sm_90")


@pytest.mark.slow
def test_compile_refuses_a_process_that_interprets() -> None:
    done = start("compile", "rope", "--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2 and "needs one with TRITON_INTERPRET unset" in done.stderr
