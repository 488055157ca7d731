"""A decode step of transformers' Mixtral with `apply` beside eager: its time, and device kernels a layer.

    python benchmarks/drop_in.py [--device cuda] [--rounds 200] [--json]

On the CPU it is CPU time on the plain way with one thread, on models so small that most of it is the host's work
between the operations. On a GPU it is what a decode loop waits for, of those models and of two layers of 8x7B. The two
take turns; a figure is the median over the rounds, a ratio the median of the rounds' ratios.
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
from mixtral_triton.hf.release import cache_keyword
from mixtral_triton.inputs import usable_device
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.tools.bench.timing import paired

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
LAYERS_OF_8X7B = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def tiny(**sizes: Any) -> Any:
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**TINY | EAGER | sizes)).eval()


def models(device: torch.device, large: bool) -> Iterator[tuple[str, Any]]:
    yield "8 tiny layers, fp32", tiny().to(device)
    for dtype in ("float32", "bfloat16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=dtype, **EAGER).eval()
        yield f"the shipped checkpoint, {dtype}", model.to(device)
    if large:
        with device:
            torch.set_default_dtype(torch.bfloat16)
            model = tiny(**LAYERS_OF_8X7B)
            torch.set_default_dtype(torch.float32)
        yield "2 layers of 8x7B, bf16", model


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


def wall_seconds(step: Callable[[], Any]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def timed(label: str, eager: Any, rounds: int, quiet: bool) -> dict[str, Any]:
    ours, theirs = decode(apply(deepcopy(eager))), decode(eager)
    for _ in range(min(20, rounds)):
        ours(), theirs()
    shown = range(rounds) if quiet else track(range(rounds), label, console=Console(stderr=True), transient=True)
    clock = wall_seconds if eager.device.type == "cuda" else cpu_seconds
    applied, plain, ratio = paired(ours, theirs, clock, shown)
    return {"model": label, "applied_ms": applied * 1e3, "eager_ms": plain * 1e3, "ratio": ratio}


def kernels(layers: int, ours: bool) -> int:
    """What a decode step launches; our kernels on meta tensors, where nothing runs."""
    model = tiny(num_hidden_layers=layers)
    step = decode(apply(model).to("meta") if ours else model)
    with record_launches() as launches:
        step()
    return len(launches)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--small", action="store_true", help="on a GPU, too, without the layers of 8x7B")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    large = args.device.type == "cuda" and not args.small
    with torch.no_grad():
        rows = [timed(label, model, args.rounds, args.json) for label, model in models(args.device, large)]
        counts = {name: kernels(2, ours) - kernels(1, ours) for name, ours in (("applied", True), ("eager", False))}
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        print(json.dumps({**versions, "rows": rows, "kernels_a_layer": counts}))
        return
    kind = "time" if args.device.type == "cuda" else "CPU time"
    title = f"decode step on {args.device}, {kind}, torch {torch.__version__}, transformers {transformers.__version__}"
    table = Table(title=title, title_justify="left")
    for column in ("model", "applied, ms", "eager, ms", "eager / applied"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for row in rows:
        times = f"{row['applied_ms']:.2f}", f"{row['eager_ms']:.2f}"
        table.add_row(row["model"], *times, f"{row['ratio']:.3f}")
    Console().print(table)
    print(f"device kernels a layer: {counts['applied']} applied, {counts['eager']} eager")


if __name__ == "__main__":
    main()
