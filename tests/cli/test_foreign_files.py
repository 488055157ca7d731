"""Files, names and texts of a checkpoint that do harm: one line that names the file, and never a hang or a crash."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mixtral_triton.cli import SMALL
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.tools.prompt import load_tokenizer

pytestmark = [
    pytest.mark.skipif(INTERPRETED, reason="about files: run once, without the interpreter"),
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
