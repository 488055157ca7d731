"""Every command that stands in README, CONTRIBUTING and docs runs and ends as it says, those for a GPU on the simulated
one.

What would take minutes is shortened: pytest collects one file with the command's options, `verify` takes one layer and
few tokens, offline compilation ends before the compiler (tests/compile runs it), and benchmarks and the training, which
have tests of their own, print their help.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mixtral_triton.cli import SMALL

pytestmark = pytest.mark.compiled
ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *ROOT.glob("docs/*.md"),
    ROOT / "benchmarks/results/README.md",
    SMALL / "README.md",
]
PROGRAMS = r"(?:TRITON_INTERPRET=1\s+)?(?:mixtral-triton|python|pytest|torchrun)\s"
# A line of a block, or text in backticks, with options in backticks and parentheses behind it.
LINE = re.compile(rf"^ *({PROGRAMS}[^`\n]+)$", re.MULTILINE)
INLINE = re.compile(rf"(?<!`)`({PROGRAMS}[^`]+)`((?:\s\(?`--[^`]+`[,)]?)*)")
# What a user puts there. The checkpoint has one layer of the small one's, and a chat template.
PLACEHOLDERS = {"[FOLDER]": "checkpoint", "FOLDER": "checkpoint", "mistralai/Mixtral-8x7B-Instruct-v0.1": "checkpoint"}
PLACEHOLDERS |= {"OUT": "out", "DIR": "out", "FILE": "out.png", "TEXT": "'A list'", "MODEL": "mixtral-8x7b"}
PLACEHOLDERS |= {"GPU": "h100", "OP": "route", "<name>": "route"}
WITHOUT_COMPILER = """
import sys
from mixtral_triton.tools import offline
offline._attempt = lambda launch, arch, op, out: offline._describe(launch, arch, op, registers=1)
from mixtral_triton.cli import main
sys.exit(main(sys.argv[1:]))
"""
COLLECT = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
SHORTER = {"verify": "--quick --tokens 12", "generate": "--max-new-tokens 4", "tune": "--dry-run"}


def commands() -> list[str]:
    """Return the distinct commands, with values for the placeholders."""
    found: dict[str, None] = {}
    for text in (path.read_text(encoding="utf-8") for path in DOCUMENTS):
        for line in (match[1] for match in LINE.finditer(text)):
            found[line] = None
        for command, options in (match.groups() for match in INLINE.finditer(text)):
            found |= dict.fromkeys([command, *(f"{command} {each}" for each in re.findall("`([^`]+)`", options))])
    lines = (" ".join(shlex.split(line, comments=True, posix=False)) for line in found)
    pattern = re.compile("|".join(rf"(?<![\w/-]){re.escape(name)}(?![\w/])" for name in PLACEHOLDERS))
    distinct = {" ".join(pattern.sub(lambda match: PLACEHOLDERS[match[0]], line).split()) for line in lines}
    # Where no folder is named it would be the small checkpoint, for a minute each.
    return sorted({re.sub(r"-triton verify( checkpoint)?", "-triton verify checkpoint", line) for line in distinct})


# test_docs.py runs the examples.
COMMANDS = [line for line in commands() if "-m venv" not in line and not line.startswith("python examples/")]


def test_commands_are_found() -> None:
    assert len(COMMANDS) > 30
    for needed in (
        "tune expert_swiglu --at T=4096 --arch sm_90",
        "bench --plot out.png",
        "verify checkpoint --peer transformers",
        "fit mixtral",
    ):
        assert any(needed in line for line in COMMANDS), needed


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the small one's first layer, with a chat template."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tensors = load_file(SMALL / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, folder / "model.safetensors")
    changes = {"config.json": {"num_hidden_layers": 1}, "tokenizer.json": {}}
    changes["tokenizer_config.json"] = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    for name, values in changes.items():
        (folder / name).write_text(json.dumps(json.loads((SMALL / name).read_text()) | values))
    return folder


def shortened(words: list[str]) -> list[str]:
    """Return the command as this test runs it; nothing where there is nothing to run."""
    program, *rest = words
    if program == "torchrun":
        return [sys.executable, "-m", "torch.distributed.run", *rest, "--device", "cpu"]
    if program == "mixtral-triton":
        entry = ["-c", WITHOUT_COMPILER] if rest[0] in ("compile", "tune") else ["-m", "mixtral_triton"]
        return [sys.executable, *entry, *rest, *options_of(rest)]
    rest = rest if program == "python" else ["-m", "pytest", *rest]
    if rest[:2] == ["-m", "pytest"]:
        paths = [word for word in rest[2:] if "/" in word or word == "tests"]
        assert all((ROOT / path).exists() for path in paths)
        options = [word for word in rest[2:] if word not in ("-n", "auto", *paths)]
        return options and [*COLLECT, *options, "tests/ops/test_launches.py"]
    more = ["figures"] if rest[0].endswith("figures.py") else ["--help"] if rest[0].startswith("benchmarks/") else []
    return [sys.executable, *rest, *more]


def options_of(words: list[str]) -> list[str]:
    return next((options.split() for name, options in SHORTER.items() if name in words), [])


QUICK = ("mixtral-triton fit mixtral-8x7b --gpu h100", "mixtral-triton compile route")


@pytest.mark.parametrize(
    "line", [pytest.param(x, marks=[] if x.startswith(QUICK) else pytest.mark.slow) for x in COMMANDS]
)
def test_command_runs(line: str, checkpoint: Path, tmp_path: Path) -> None:
    for name in ("benchmarks", "docs", "examples", "kernels", "mixtral_triton", "tests", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "checkpoint").symlink_to(checkpoint)
    words = shlex.split(line)
    settings = dict(word.split("=", 1) for word in words[:1] if word.startswith("TRITON_INTERPRET="))
    kept = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "COLUMNS")}
    environment = kept | settings | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = shortened(words[len(settings) :])
    if not command:
        return
    folder, collects = (ROOT, True) if "--collect-only" in command else (tmp_path, False)
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    allowed = {0, 1} if " fit " in line else {0, 5} if collects else {0}  # 1: no format fits; 5: no test is selected
    assert done.returncode in allowed, f"{shlex.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr
