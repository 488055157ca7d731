"""Time a decode step of transformers' Mixtral with `apply` beside eager, and count device kernels a layer.

    python benchmarks/drop_in.py [--device cuda] [--rounds 200] [--json]

On the CPU it is CPU time with the torch backend and one thread, on models so small that most of it is host time between
the operations. On a GPU it is what a decode loop waits for, also for two layers of 8x7B. The two alternate; a figure is
the median over the rounds, a ratio the median of the rounds' ratios. Our kernels are counted on meta tensors (the
launches of a GPU), eager's as torch's computing operations.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from benchmarks.common import EAGER, hf_model, hf_step, options, report, rounds
from mixtral_triton import apply
from mixtral_triton.inputs import usable_device
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.tools.bench.measure import paired, wall_seconds

PROMPT, SMALL = 64, Path(__file__).parents[1] / "mixtral_triton" / "small"
SIZES_OF_8X7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336}
SIZES_OF_8X7B |= {"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8}


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


def time_pair(label: str, eager: Any, count: int, quiet: bool) -> dict[str, Any]:
    prompt = torch.zeros((1, PROMPT), dtype=torch.long, device=eager.device)
    steps = hf_step(apply(deepcopy(eager)), prompt), hf_step(eager, prompt)
    for _ in range(min(20, count)):
        for step in steps:
            step()
    gpu = eager.device.type == "cuda"
    clock = partial(wall_seconds, device=eager.device, clock=time.perf_counter if gpu else time.process_time)
    applied, plain, ratio = paired(*steps, clock, rounds(count, quiet, label))
    return {"model": label, "applied_ms": applied * 1e3, "eager_ms": plain * 1e3, "ratio": ratio}


def count_kernels(layers: int, ours: bool) -> int:
    """Return the launches of a decode step, of ours on meta tensors, where nothing runs."""
    model = hf_model(num_hidden_layers=layers)
    model = apply(model).to("meta") if ours else model
    step = hf_step(model, torch.zeros((1, PROMPT), dtype=torch.long, device=model.device))
    with record_launches() as launches:
        step()
    return len(launches)


def main() -> None:
    parser = options(__doc__, rounds=200)
    parser.add_argument("--device", type=usable_device, default="cpu", help="cpu (the default), cuda, cuda:1, ...")
    parser.add_argument("--small", action="store_true", help="leave out the layers of 8x7B on a GPU")
    args = parser.parse_args()
    torch.set_num_threads(1)
    gpu = args.device.type == "cuda"
    with torch.no_grad():
        named = models(args.device, gpu and not args.small)
        rows = [time_pair(label, model, args.rounds, args.json) for label, model in named]
        kernels = {
            name: count_kernels(2, ours) - count_kernels(1, ours)
            for name, ours in (("applied", True), ("eager", False))
        }
    columns = {"model": "model", "applied_ms": "applied, ms", "eager_ms": "eager, ms", "ratio": "eager / applied"}
    about = {"device": str(args.device), "clock": "wall" if gpu else "CPU", "kernels_a_layer": kernels}
    report(args.json, about, columns, rows)


if __name__ == "__main__":
    main()
