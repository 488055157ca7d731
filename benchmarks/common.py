"""Shared by the scripts that time us beside transformers: models with random weights, decode steps, options, tables."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.hf.mask import CACHE

Call = Callable[[], object]
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# So small that a decode step is nearly all host time.
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}


def hf_model(**sizes: Any) -> Any:
    """Return transformers' eager Mixtral with random weights: TINY but for `sizes`."""
    fixed = {"sliding_window": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY | fixed | EAGER | sizes)).eval()


def our_model(hf: Any, device: torch.device | str = "cpu") -> Mixtral:
    """Return our model with the weights of transformers' one."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        return Mixtral.from_pretrained(folder, device=device)


def hf_step(model: Any, ids: torch.Tensor) -> Call:
    """Return a step of one token on a cache that holds `ids` and grows."""
    cache = model(ids, use_cache=True)[1]
    return lambda: model(ids[:, :1], use_cache=True, **{CACHE: cache})


def our_step(model: Mixtral, ids: torch.Tensor) -> Call:
    cache = KVCache(model.config, 1, model.config.max_position_embeddings, device=model.device, dtype=model.dtype)
    model(ids, cache=cache)
    return lambda: model(ids[:, :1], cache=cache)


def options(doc: str | None, rounds: int) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--json", action="store_true")
    return parser


def rounds(count: int, quiet: bool, label: str = "timing") -> Iterable[int]:
    return range(count) if quiet else track(range(count), label, console=Console(stderr=True), transient=True)


def report(as_json: bool, about: dict[str, Any], columns: dict[str, str], rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as JSON, or as a table of `columns`: headings by key, below what they are about."""
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if as_json:
        print(json.dumps({**about, "rows": rows}))
        return
    table = Table(title=", ".join(f"{name} {value}" for name, value in about.items()), title_justify="left")
    for index, heading in enumerate(columns.values()):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*(f"{row[key]:.2f}" if isinstance(row[key], float) else str(row[key]) for key in columns))
    Console().print(table)
