"""Folders with a chat template, for the tests of chat and of batches."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mixtral_triton import Mixtral

# An answer stands in the next turn as it was written. The third turn fails where its text says so.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% else %}"
    "{% if 'fail' in m.content %}{{ raise_exception('no turn 3') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }} [/]{% endif %}{% endfor %}"
)


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.fixture
def whole_folder(folder: Path) -> Path:
    """The small checkpoint with a chat template."""
    change(folder / "tokenizer_config.json", chat_template=TEMPLATE)
    return folder


@pytest.fixture
def chat_folder(whole_folder: Path) -> Path:
    """The same with one layer."""
    change(whole_folder / "config.json", num_hidden_layers=1)
    tensors = load_file(whole_folder / "model.safetensors")
    kept = {name: x for name, x in tensors.items() if ".layers." not in name or ".layers.0." in name}
    save_file(kept, whole_folder / "model.safetensors")
    return whole_folder


@pytest.fixture
def appended(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tokens that each forward of a model appends."""
    counts, hidden = list[int](), Mixtral.hidden

    def count(model: Mixtral, ids: Any, cache: Any = None, lengths: Any = None, *rest: Any) -> Any:
        counts.append(ids.numel() if lengths is None else int(lengths.sum()))
        return hidden(model, ids, cache, lengths, *rest)

    monkeypatch.setattr(Mixtral, "hidden", count)
    return counts
