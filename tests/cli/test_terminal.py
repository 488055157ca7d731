"""What the command line says where, on terminals and pipes of every kind, and how it ends."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import mixtral_triton
from mixtral_triton import Mixtral, cli
from mixtral_triton.cli import main, parser
from mixtral_triton.config import MixtralConfig
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.tools import processes, terminal

ROOT = Path(__file__).parents[2]
# Each starts a process that chooses for itself whether to interpret, so once is enough.
pytestmark = pytest.mark.skipif(INTERPRETED, reason="chooses the interpreter itself: run once, without")
GENERATE = ("generate", "--device", "cpu", "--prompt", "The café", "--max-new-tokens", "3")
FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")


def command(*args: str, **environment: str) -> dict[str, Any]:
    """What `subprocess` takes to run the command line in an environment that says nothing of encodings or Triton."""
    free = ("TRITON_INTERPRET", "LC_ALL", "LC_CTYPE", "LANG", "COLUMNS")
    kept = {key: value for key, value in os.environ.items() if key not in free and not key.startswith("PYTHON")}
    kept |= {key: os.environ[key] for key in ("PYTHONPATH",) if key in os.environ}
    return {"args": [sys.executable, "-m", "mixtral_triton", *args], "cwd": ROOT, "env": kept | environment}


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(**command(*args, **environment), capture_output=True, timeout=240)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")  # in this process, which has made its choice


# Which way


def test_without_a_gpu_generate_is_plain_torch_and_says_so() -> None:
    done = run(*GENERATE)
    assert done.returncode == 0
    said = done.stderr.decode().splitlines()
    assert len(said) == 1 and said[0].startswith("--device cpu: plain torch") and "--interpret" in said[0]
    assert b"torch" not in done.stdout


CHOSEN = """
import sys
from mixtral_triton.cli import main
status = main(sys.argv[1:])
from mixtral_triton.kernels.launch import INTERPRETED
print(status, INTERPRETED)
"""


@pytest.mark.parametrize("gpus", [False, True], ids=["no GPU", "a GPU"])
@pytest.mark.parametrize("name", ["generate", "trace"])
def test_interpret_interprets_on_the_cpu_with_a_gpu_or_without(name: str, gpus: bool) -> None:
    """The kernels themselves: a launch counted in the process. A GPU that is there is not asked for anything."""
    fake = "import torch; torch.cuda.is_available = lambda: True; torch.cuda.device_count = lambda: 1\n" if gpus else ""
    more = ("--max-new-tokens", "1") if name == "generate" else ("--layers", "0")
    process = command(name, "--interpret", "--prompt", "A b", *more)
    process["args"][1:3] = ["-c", fake + CHOSEN]
    done = subprocess.run(**process, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1] == "0 True", done.stderr
    assert "--interpret: the Triton kernels run interpreted" in done.stderr


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`choose` as in a process that has chosen nothing; what it sets is undone."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    before = dict(os.environ)
    yield
    for key in set(os.environ) - set(before):
        del os.environ[key]


def options(**given: Any) -> argparse.Namespace:
    return argparse.Namespace(**{"device": None, "interpret": False} | given)


@pytest.mark.parametrize(
    ("given", "interpret", "gpu", "said", "switch"),
    [
        ({}, False, False, "No GPU found: plain torch", None),
        ({}, False, True, "", None),
        ({}, True, False, "No GPU found: the Triton kernels run interpreted", "1"),
        ({}, True, True, "", None),
        ({"device": "cpu"}, False, True, "--device cpu: plain torch", None),
        ({"device": "cpu"}, True, True, "--device cpu: the Triton kernels run interpreted", "1"),
        ({"interpret": True}, False, True, "--interpret: the Triton kernels run interpreted", "1"),
        ({"interpret": True}, False, False, "--interpret: the Triton kernels run interpreted", "1"),
    ],
)
def test_the_way_is_chosen(
    given: Any, interpret: bool, gpu: bool, said: str, switch: str | None, fresh: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    args = options(**given)
    note = processes.select_backend(args, interpret)
    assert note.startswith(said) and bool(note) == bool(said)
    assert os.environ.get("TRITON_INTERPRET") == switch
    assert args.device == ("cpu" if given else None)


def test_what_the_user_set_stays(fresh: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert processes.select_backend(options(), interpret=True) == "" and os.environ["TRITON_INTERPRET"] == "0"
    with pytest.raises(ValueError, match="TRITON_INTERPRET=0"):
        processes.select_backend(options(interpret=True), interpret=False)


def test_interpret_on_a_gpu_is_refused(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", "--interpret", "--device", "cuda"]) == 2
    assert "--interpret runs on the CPU" in capsys.readouterr().err


def test_verify_says_before_how_long_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    small = MixtralConfig.from_pretrained(cli.SMALL)
    monkeypatch.setattr("mixtral_triton.kernels.launch.INTERPRETED", True)
    assert processes.add_verify_time("Slow.", small, "torch.bfloat16", 96) == (
        "Slow. 4 layers with 96 tokens: about 40 s on two cores."
    )
    monkeypatch.setattr("mixtral_triton.kernels.launch.INTERPRETED", False)
    assert processes.add_verify_time("", small, "torch.bfloat16", 96) == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(3, "10 s"), (44, "40 s"), (119, "120 s"), (150, "2 minutes"), (5e4, "10 hours")]
)
def test_about(seconds: float, said: str) -> None:
    assert processes.about(seconds) == f"about {said}"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ((*GENERATE, "--json"), "generating: "),
        (GENERATE, "reading the prompt: 0/"),
        (("trace", *GENERATE[1:5]), "tracing: "),
    ],
    ids=["generate --json", "generate", "trace"],
)
def test_long_work_says_something_now_and_then(
    args: tuple[str, ...], said: str, plain: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden = Mixtral.hidden

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return hidden(*args)

    monkeypatch.setattr(Mixtral, "hidden", slow)
    monkeypatch.setattr(terminal, "INTERVAL", 0.05)
    assert main([*args]) == 0
    assert said in capsys.readouterr().err


# The help and the version


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """One source: what the metadata of an installed package have comes from the same line."""
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"mixtral-triton {mixtral_triton.__version__}\n"
    assert version("mixtral-triton") == mixtral_triton.__version__


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (actions,) = (action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(actions.choices)


@pytest.mark.parametrize("name", sorted(subcommands()))
def test_the_help_tells_every_default(name: str) -> None:
    sub = subcommands()[name]
    assert sub.format_help()
    for action in sub._actions[1:]:
        text = sub._get_formatter()._expand_help(action)
        assert text.startswith(("default: ", "(default: ")) or len(text) > 15, action.dest
        if action.nargs is None and not action.option_strings:
            assert "default" not in text, action.dest  # has to be given
            continue
        assert ("(required)" if action.required and action.option_strings else "default: ") in text, action.dest
        if action.default not in (None, [], True, False) and action.option_strings:
            assert f"(default: {action.default})" in text


# Pipes, full disks, Ctrl-C


@pytest.mark.parametrize("args", [GENERATE, ("trace", *GENERATE[1:5]), ("generate", "--help")], ids=lambda a: a[0])
def test_a_reader_that_leaves_ends_it_without_a_word(args: tuple[str, ...]) -> None:
    with subprocess.Popen(**command(*args), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()  # before the first word: the kindest `head` is not quicker
        told = process.stderr.read().decode()
    assert process.returncode == terminal.CLOSED_PIPE == 128 + signal.SIGPIPE
    assert "plain torch" in told or not told
    assert "rror" not in told and "Exception" not in told


@full
@pytest.mark.parametrize("environment", [{}, {"PYTHONUNBUFFERED": "1"}], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("args", [GENERATE, (*GENERATE, "--json"), ("trace", *GENERATE[1:5])], ids=lambda a: a[-1])
def test_a_full_disk_under_the_output_is_one_line(args: tuple[str, ...], environment: dict[str, str]) -> None:
    process = command(*args, TRITON_INTERPRET="0", **environment)
    with FULL.open("wb") as disk:
        done = subprocess.run(**process, stdout=disk, stderr=subprocess.PIPE, timeout=240)
    assert done.returncode == 2
    assert done.stderr.decode() == f"mixtral-triton {args[0]}: standard output: No space left on device\n"


def test_ctrl_c_ends_the_line() -> None:
    args = ("generate", "--device", "cpu", "--prompt", "The return", "--max-new-tokens", "900")
    process = command(*args, TRITON_INTERPRET="0")
    with subprocess.Popen(**process, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        running.stdout.read(12)  # the prompt, and a bit of what follows
        running.send_signal(signal.SIGINT)
        out, told = running.stdout.read(), running.stderr.read()
    assert running.returncode == 130
    assert out.endswith(b"\n") and b"tokens/s" not in out
    assert told == b"mixtral-triton generate: interrupted\n"


def interrupt(args: Any) -> int:
    raise KeyboardInterrupt


def test_ctrl_c_on_a_terminal_writes_over_what_the_terminal_echoed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_generate", interrupt)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main([*GENERATE]) == 130
    assert capsys.readouterr().err == "\rmixtral-triton generate: interrupted\n"


# Errors


def test_no_name_comes_twice(plain: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*GENERATE, "--temperature", "-1"]) == 2
    assert capsys.readouterr().err.startswith("mixtral-triton generate: temperature is -1.0, needs")


def test_a_missing_compiler_is_one_line(
    plain: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own complaint, by Triton's own function, where there is none."""
    from triton.runtime.build import compile_module_from_src

    def build(args: Any) -> int:
        compile_module_from_src(f"int x{time.time_ns()};", "nothing")
        return 0

    monkeypatch.setattr(cli, "_generate", build)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert main([*GENERATE]) == 2
    error = capsys.readouterr().err
    assert "needs a C compiler" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "args", [("--peer", "transformers"), ("--prompt", "many words " * 600)], ids=["peer not installed", "too long"]
)
def test_what_is_wrong_with_verify_is_said_before_how_long_it_takes(args: tuple[str, ...]) -> None:
    """As a process without a GPU and without transformers has it: nothing but the line of the error."""
    process = command("verify", "--device", "cpu", *args)
    hide = "import importlib.util as u, sys\nfind = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'transformers' else find(name, *rest)\n"
    process["args"][1:3] = ["-c", hide + "from mixtral_triton.cli import main\nsys.exit(main(sys.argv[1:]))"]
    done = subprocess.run(**process, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout, done.stderr
    assert done.stderr.startswith("mixtral-triton verify: ")


def test_missing_headers_are_one_line(
    plain: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without Python.h the compiler fails, as any process does: what is missing is looked for."""

    def build(args: Any) -> int:
        raise subprocess.CalledProcessError(1, ["gcc", "main.c"])

    monkeypatch.setattr(cli, "_generate", build)
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr("mixtral_triton.tools.terminal.sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    assert main([*GENERATE]) == 2
    assert "python3-dev" in capsys.readouterr().err
    (tmp_path / "Python.h").touch()
    with pytest.raises(subprocess.CalledProcessError):  # something else is wrong with that build
        main([*GENERATE])


def test_another_runtime_error_is_not_hidden(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Any) -> int:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(cli, "_generate", fail)
    with pytest.raises(RuntimeError, match="ours"):
        main([*GENERATE])


# Encodings


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "latin-1"}]
)
@pytest.mark.parametrize("name", ["generate", "trace"])
def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show(name: str, environment: dict[str, str]) -> None:
    prompt = "The café → 日本\nfor statement"
    done = run(name, "--device", "cpu", "--prompt", prompt, TRITON_INTERPRET="0", **environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr == b""
    if "latin-1" in environment.values():
        assert "é" in done.stdout.decode("latin-1")
    else:
        assert done.stdout.isascii()
    marks = b"<s>[5]The[4] ca[" if name == "trace" else b"The caf"
    assert marks in done.stdout


@pytest.mark.parametrize(
    "args", [("compile", "append", "--arch", "sm_90"), ("tune", "route", "--at", "T=64", "--dry-run")]
)
def test_tables_are_drawn_in_ascii(args: tuple[str, ...]) -> None:
    done = run(*args, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and b"----" in done.stdout
    assert b"?" not in done.stdout + done.stderr


def test_json_is_the_same_in_every_encoding() -> None:
    found = [run(*GENERATE, "--json", **where) for where in ({}, {"LC_ALL": "C"}, {"PYTHONIOENCODING": "utf-16"})]
    first, second = (json.loads(done.stdout)["text"] for done in found[:2])
    assert first == second and found[2].returncode == 0


@pytest.mark.parametrize("name", ["generate", "trace", "verify"])
def test_a_prompt_that_is_no_text_is_one_line(name: str) -> None:
    process = command(name, "--device", "cpu", "--prompt", "x", TRITON_INTERPRET="0")
    process["args"][-1] = b"\xff\xfe"
    done = subprocess.run(**process, capture_output=True, timeout=240)
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"--prompt" in done.stderr
