"""Time a decode step of our model, and of transformers' Mixtral with `apply`, beside eager; count kernels a layer.

    python benchmarks/drop_in.py [--device cuda] [--rounds 200] [--json]

On the CPU it is CPU time with the torch backend and one thread, on models so small that most of it is host time between
the operations. On a GPU it is what a decode loop waits for, also for two layers of 8x7B. All alternate; a figure is the
median over the rounds, a ratio the median of the rounds' ratios. Our kernels are counted on meta tensors (the launches
of a GPU), eager's as torch's computing operations.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton import KVCache, Mixtral, apply
from mixtral_triton.cli import SMALL
from mixtral_triton.hf.mask import CACHE
from mixtral_triton.inputs import usable_device
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.tools.bench.measure import wall_seconds

Call = Callable[[], object]
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# So small that a decode step is nearly all host time.
TINY = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8}
TINY |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096}
SIZES_OF_8X7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
SIZES_OF_8X7B |= {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8}
PROMPT = 64


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


def models(device: torch.device, large: bool) -> Iterator[tuple[str, Any]]:
    yield "8 tiny layers, fp32", hf_model().to(device)
    for dtype in ("float32", "bfloat16"):
        model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=dtype, **EAGER).eval()
        yield f"the shipped checkpoint, {dtype}", model.to(device)
    if large:
        with device:
            torch.set_default_dtype(torch.bfloat16)
            model = hf_model(**SIZES_OF_8X7B)
            torch.set_default_dtype(torch.float32)
        yield "2 layers of 8x7B, bf16", model


def time_steps(label: str, eager: Any, rounds: int, quiet: bool) -> dict[str, Any]:
    prompt = torch.zeros((1, PROMPT), dtype=torch.long, device=eager.device)
    steps = {"applied": hf_step(apply(deepcopy(eager)), prompt), "eager": hf_step(eager, prompt)}
    if eager.num_parameters() < 1e8:  # weights go through files; `bench decode_step` times larger ones
        steps["ours"] = our_step(our_model(eager), prompt)
    gpu = eager.device.type == "cuda"
    clock = partial(wall_seconds, device=eager.device, clock=time.perf_counter if gpu else time.process_time)
    times = alternate(steps, clock, rounds, quiet)
    row = {"model": label, **{f"{name}_ms": 1e3 * statistics.median(times[name]) for name in ("eager", "applied")}}
    row |= {"eager / applied": ratio(times["eager"], times["applied"])}
    return row | {"eager / ours": ratio(times["eager"], times["ours"]) if "ours" in times else None}


def count_kernels(layers: int, ours: bool) -> int:
    """Return the launches of a decode step, of ours on meta tensors, where nothing runs."""
    model = hf_model(num_hidden_layers=layers)
    model = apply(model).to("meta") if ours else model
    step = hf_step(model, torch.zeros((1, PROMPT), dtype=torch.long, device=model.device))
    with record_launches() as launches:
        step()
    return len(launches)


@torch.no_grad()
def main() -> None:
    parser = options(__doc__, rounds=200)
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--small", action="store_true", help="leave out the layers of 8x7B on a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gpu = args.device.type == "cuda"
    rows = [time_steps(*one, args.rounds, args.json) for one in models(args.device, gpu and not args.small)]
    counts = {"applied": True, "eager": False}
    kernels = {name: count_kernels(2, ours) - count_kernels(1, ours) for name, ours in counts.items()}
    about = {"device": str(args.device), "clock": "wall" if gpu else "CPU", "kernels_a_layer": kernels}
    report(args.json, about, rows)


if __name__ == "__main__":
    main()
