"""The host's time between launches: a decode layer of ours, and of transformers' Mixtral with `apply`, outside a graph.

    python benchmarks/host_time.py [--rounds 40] [--json]

No GPU is used. Triton's own JIT runs against the driver of a simulated GPU (tests/support/stub), whose launches do
nothing; torch's operations run on the CPU, on tensors so small that a call is nearly all of their time. A step of one
token in a model of 8 layers is timed, and shared out over the layers; embedding, head and masks are among it. The unit
is a plain launch: `kernel[grid](...)` of a small kernel, timed in the same rounds. All take turns, so that a change of
the machine's speed hits them alike; a figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import triton
import triton.language as tl
from rich.console import Console
from rich.progress import track
from rich.table import Table

from mixtral_triton import KVCache, Mixtral, apply
from mixtral_triton.hf.release import cache_keyword

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's folder is on the path, the repository is not
from tests.support.stub.driver import Driver
from tests.support.stub.gpu import GPU

LAYERS, PROMPT, LAUNCHES = 8, 64, 32
SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": None,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}
# What each may take: plain launches, and a part of transformers' eager layer.
LIMITS = {"ours": (30, 0.5), "applied": (60, 0.8)}
Call = Callable[[], object]


class Silent:
    """A launcher that launches nothing, in no time."""

    def __init__(self, src: Any, metadata: Any) -> None:
        triton.runtime.driver.active.kernels.add(src.fn)

    def __call__(self, *args: Any) -> None: ...


class SilentDriver(Driver):
    launcher_cls = Silent


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


def plain_launches() -> Call:
    x, y = torch.zeros(128), torch.zeros(128)

    def launches() -> None:
        for _ in range(LAUNCHES):
            copy_kernel[(1,)](x, y, 128, BLOCK=128)

    return launches


def ours(folder: str, ids: torch.Tensor) -> Call:
    model = Mixtral.from_pretrained(folder, device="cpu")
    cache = KVCache(model.config, 1, SIZES["max_position_embeddings"], device="cpu", dtype=model.dtype)  # type: ignore[arg-type]
    model(ids, cache=cache)
    return lambda: model(ids[:, :1], cache=cache)


def theirs(model: Any, ids: torch.Tensor) -> Call:
    """On a cache that grows."""
    kept, name = model(ids, use_cache=True)[1], cache_keyword()
    return lambda: model(ids[:, :1], use_cache=True, **{name: kept})


def steps() -> dict[str, Call]:
    """The same random weights in all; fp32, since that is what a CPU multiplies quickest."""
    eager = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT))  # type: ignore[call-overload]
    with tempfile.TemporaryDirectory() as folder:
        eager.save_pretrained(folder)
        own = ours(folder, ids)
    return {"ours": own, "applied": theirs(apply(deepcopy(eager)), ids), "eager": theirs(eager, ids)}


def seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measured(rounds: int, quiet: bool) -> dict[str, list[float]]:
    """By name, seconds of a plain launch and of a layer, a round each."""
    # Tensors of a CPU go the way of a GPU's: only its memory is the other one.
    triton.runtime.driver.set_active(SilentDriver(GPU()))
    with torch.no_grad(), mock.patch("mixtral_triton.kernels.call.INTERPRETED", True):
        calls = {"plain": plain_launches(), **steps()}
        for call in calls.values():
            for _ in range(5):  # compiles, and makes the plans
                call()
        shown = range(rounds) if quiet else track(range(rounds), console=Console(stderr=True), transient=True)
        times = [{name: seconds(call) for name, call in calls.items()} for _ in shown]
    return {name: [one[name] / (LAUNCHES if name == "plain" else LAYERS) for one in times] for name in calls}


def row(name: str, times: dict[str, list[float]]) -> dict[str, Any]:
    def over(other: str) -> float:
        return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))

    found = {"layer": name, "us": 1e6 * statistics.median(times[name])}
    return found | {"plain_launches": over("plain"), "of_eager": over("eager")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    times = measured(args.rounds, args.json)
    plain = 1e6 * statistics.median(times["plain"])
    rows = [row(name, times) for name in ("ours", "applied", "eager")]
    versions = {"triton": triton.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if args.json:
        print(json.dumps({**versions, "plain_launch_us": plain, "rows": rows}))
        return
    told = ", ".join(f"{name} {number}" for name, number in versions.items())
    title = f"a decode layer's host time; a plain launch takes {plain:.1f} us; {told}"
    table = Table(title=title, title_justify="left")
    for column in ("layer", "us", "plain launches", "of transformers' eager"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for one in rows:
        launches, share = LIMITS.get(one["layer"], (None, None))
        most = f" (at most {launches})" if launches else "", f" (at most {share})" if share else ""
        table.add_row(
            one["layer"], f"{one['us']:.0f}", f"{one['plain_launches']:.1f}{most[0]}", f"{one['of_eager']:.2f}{most[1]}"
        )
    Console().print(table)


if __name__ == "__main__":
    main()
