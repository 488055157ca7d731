"""Several processes on the command line, as torchrun starts them: the same text, one report, and no endless wait."""

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from mixtral_triton.cli import SMALL, main

pytestmark = pytest.mark.compiled

PROMPT = ("--device", "cpu", "--dtype", "float32", "--prompt", "The return statement", "--temperature", "0.8", "--json")


def torchrun(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    start = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "mixtral_triton")
    return subprocess.run(
        (*start, *command), capture_output=True, text=True, timeout=100, env=one_thread(**environment)
    )


def test_torchrun_writes_the_same_text(capsys: pytest.CaptureFixture[str]) -> None:
    command = ("generate", str(SMALL), *PROMPT, "--max-new-tokens", "8")
    run = torchrun(*command, "--ep", "2")
    assert run.returncode == 0, run.stderr
    assert main(command) == 0
    alone, several = (json.loads(text) for text in (capsys.readouterr().out, run.stdout))
    assert alone["tokens"] == several["tokens"] and alone["text"] == several["text"]


@pytest.mark.slow
def test_torchrun_verifies_each_rank_s_part() -> None:
    """One report, the first rank's. In plain torch, which is quick: all is near, and nothing was compared."""
    run = torchrun("verify", str(SMALL), "--tp", "2", "--prompt", "return", "--json", TRITON_INTERPRET="0")
    assert run.returncode != 0
    report = json.loads(run.stdout)
    assert all(row["ok"] for row in report["rows"]) and not report["compared"]
    assert {"weights", "layer", "logits"} <= {row["op"] for row in report["rows"]}


def one_thread(**more: str) -> dict[str, str]:
    paths = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": paths, **more}


def test_a_killed_rank_ends_the_others() -> None:
    command = (sys.executable, "-m", "mixtral_triton", "generate", str(SMALL), *PROMPT[:-1], "--tp", "2")
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    first, second = (
        subprocess.Popen((*command, "--max-new-tokens", "1000"), env=one_thread(RANK=str(rank), **common), **pipes)
        for rank in range(2)
    )
    try:
        assert first.stdout is not None and first.stdout.read(len("The return statement") + 1)  # it writes
        second.send_signal(signal.SIGKILL)
        start = time.monotonic()
        _, stderr = first.communicate(timeout=60)
        assert time.monotonic() - start < 30 and first.returncode == 2
        assert "mixtral-triton generate: rank 0 of 2: rank 1 is gone: " in stderr.splitlines()[-1]
    finally:
        for one in (first, second):
            one.kill()
            one.communicate()


INVALID = [
    (("--tp", "2"), {}, "--tp 2 times --ep 1 needs 2 processes, and torchrun started 1: torchrun --nproc-per-node 2"),
    (("--tp", "2"), {"WORLD_SIZE": "3", "RANK": "1"}, "rank 1 of 3: --tp 2 times --ep 1 needs 2 processes"),
    ((), {"WORLD_SIZE": "2", "RANK": "0"}, "rank 0 of 2: --tp 1 times --ep 1 needs 1 processes"),
    (("--ep", "0"), {}, "--ep is 0, needs at least 1"),
    (("--tp", "2", "--device", "cuda:1"), {"WORLD_SIZE": "2", "RANK": "1"}, "--device is 'cuda:1', needs cpu or cuda"),
]


@pytest.mark.parametrize(("options", "environment", "message"), INVALID, ids=[message for _, _, message in INVALID])
def test_invalid_processes(options: Any, environment: Any, message: str, monkeypatch: Any, capsys: Any) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(["generate", "--prompt", "x", *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_mesh_has_no_peer(in_process: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is loaded."""
    assert main(["verify", "--tp", "2", "--peer", "transformers"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "peer is 'transformers', and no rank of a mesh has all weights for it: needs None" in line
