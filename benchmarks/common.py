"""Shared by the scripts that time us beside transformers: models with random weights, decode steps, options, tables."""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from copy import deepcopy
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


def our_model(hf: Any) -> Mixtral:
    """Return our model with the weights of transformers' one, on its device."""
    with tempfile.TemporaryDirectory() as folder:
        deepcopy(hf).cpu().save_pretrained(folder)
        return Mixtral.from_pretrained(folder, device=hf.device)


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


def alternate(
    calls: dict[str, Call], clock: Callable[[Call], float], rounds: int, quiet: bool
) -> dict[str, list[float]]:
    """Return each call's times by `clock`. All run in each round, so a change of the machine's speed hits all."""
    for call in calls.values():
        for _ in range(min(20, rounds)):  # compiles, and fills caches
            call()
    shown = range(rounds) if quiet else track(range(rounds), "timing", console=Console(stderr=True), transient=True)
    times = [{name: clock(call) for name, call in calls.items()} for _ in shown]
    return {name: [one[name] for one in times] for name in calls}


def ratio(first: Sequence[float], second: Sequence[float]) -> float:
    """Return the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def report(as_json: bool, about: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Print the rows as JSON, or as a table below what they are about."""
    about |= {"torch": torch.__version__, "transformers": transformers.__version__}
    if as_json:
        print(json.dumps({**about, "rows": rows}))
        return
    table = Table(*rows[0], title=", ".join(f"{name} {value}" for name, value in about.items()), title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
