"""A decode step of transformers' Mixtral with `apply` beside eager: CPU time, and device kernels a layer.

    python benchmarks/drop_in.py [--rounds 200] [--json]

CPU time is measured on the plain CPU way with one thread, on models so small that most of it is the host's work between
the operations. The two take turns; a figure is the median over the rounds, a ratio the median of the rounds' ratios.
Kernels are counted on meta tensors for ours (the launches a GPU would see), as torch's computing operations for eager.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixtral_triton import apply
from mixtral_triton.cli import SMALL
from mixtral_triton.hf import cache_keyword
from mixtral_triton.kernels.launch import record_launches
from mixtral_triton.timing import paired

PROMPT = 64
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}


def tiny(**sizes: Any) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY | EAGER | sizes)).eval()


def models() -> Iterator[tuple[str, Any]]:
    yield "8 tiny layers, fp32", tiny()
    for dtype in ("float32", "bfloat16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=dtype, **EAGER).eval()
        yield f"the shipped checkpoint, {dtype}", model


def decode(model: Any) -> Callable[[], Any]:
    """A step of one token, on a cache that holds the prompt and grows."""
    cache = model(torch.zeros((1, PROMPT), dtype=torch.long, device=model.device), use_cache=True)[1]
    name = cache_keyword()
    token = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    return lambda: model(token, use_cache=True, **{name: cache})


def cpu_seconds(step: Callable[[], Any]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def host(label: str, eager: Any, rounds: int, quiet: bool) -> dict[str, Any]:
    ours, theirs = decode(apply(deepcopy(eager))), decode(eager)
    for _ in range(20):
        ours(), theirs()
    shown = range(rounds) if quiet else track(range(rounds), label, console=Console(stderr=True), transient=True)
    applied, plain, ratio = paired(ours, theirs, cpu_seconds, shown)
    return {"model": label, "applied_cpu_ms": applied * 1e3, "eager_cpu_ms": plain * 1e3, "ratio": ratio}


def kernels(layers: int, ours: bool) -> int:
    """What a decode step launches; our kernels on meta tensors, where nothing runs."""
    model = tiny(num_hidden_layers=layers)
    step = decode(apply(model).to("meta") if ours else model)
    with record_launches() as launches:
        step()
    return len(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [host(label, model, args.rounds, args.json) for label, model in models()]
        counts = {name: kernels(2, ours) - kernels(1, ours) for name, ours in (("applied", True), ("eager", False))}
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({**versions, "rows": rows, "kernels_a_layer": counts}))
        return
    title = f"decode step on the CPU, torch {torch.__version__}, transformers {transformers.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("model", "applied, CPU ms", "eager, CPU ms", "eager / applied"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        times = f"{row['applied_cpu_ms']:.2f}", f"{row['eager_cpu_ms']:.2f}"
        table.add_row(row["model"], *times, f"{row['ratio']:.3f}")
    Console().print(table)
    print(f"device kernels a layer: {counts['applied']} applied, {counts['eager']} eager")


if __name__ == "__main__":
    main()
