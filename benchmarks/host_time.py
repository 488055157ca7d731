"""Time the host's part of a decode layer outside a graph: ours, and transformers' Mixtral with `apply`.

    python benchmarks/host_time.py [--rounds 40] [--json]

No GPU is used. Triton's JIT runs against the driver of a simulated GPU (tests/support/stub), whose launches do nothing;
torch's operations run on the CPU, on tensors so small that a call is nearly all of their time. A step of one token in a
model of 8 layers is timed and divided by the layers, with embedding, head and masks. The unit is a plain launch of a
small kernel, `kernel[grid](...)`, timed in the same rounds. All alternate, so that a change of the machine's speed hits
all; a figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from operator import truediv
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

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton import KVCache, Mixtral, apply
from mixtral_triton.hf.attention import CACHE
from mixtral_triton.tools.bench.measure import wall_seconds
from tests.support.stub.driver import Driver
from tests.support.stub.gpu import GPU

Call = Callable[[], object]
LAYERS, PROMPT, LAUNCHES = 8, 64, 32
# So small that a decode step is nearly all host time.
SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": None}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
# The most that each may take: plain launches, and a share of transformers' eager layer.
LIMITS = {"ours": (30, 0.5), "applied": (60, 0.8)}


def hf_step(model: Any, ids: torch.Tensor) -> Call:
    """Return a step of one token on a cache that holds `ids` and grows."""
    cache = model(ids, use_cache=True)[1]
    return lambda: model(ids[:, :1], use_cache=True, **{CACHE: cache})


def our_step(hf: Any, ids: torch.Tensor) -> Call:
    """Return the same step of our model with the weights of transformers' one."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        model = Mixtral.from_pretrained(folder, "cpu")
    cache = KVCache(model.config, 1, model.config.max_position_embeddings, device="cpu", dtype=model.dtype)
    model(ids, cache=cache)
    return lambda: model(ids[:, :1], cache=cache)


def alternate(calls: dict[str, Call], rounds: int, quiet: bool) -> dict[str, list[float]]:
    """Return each call's wall times. All run in each round, so a change of the machine's speed hits all."""
    for call in calls.values():
        for _ in range(min(20, rounds)):  # compiles, and fills caches
            call()
    shown = track(range(rounds), "timing", console=Console(stderr=True), transient=True, disable=quiet)
    times = [{name: wall_seconds(call) for name, call in calls.items()} for _ in shown]
    return {name: [one[name] for one in times] for name in calls}


class SilentLauncher:
    """A launcher that launches nothing."""

    def __init__(self, src: Any, metadata: Any) -> None:
        triton.runtime.driver.active.kernels.add(src.fn)

    def __call__(self, *args: Any) -> None: ...


class SilentDriver(Driver):
    launcher_cls = SilentLauncher


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


def launch_plain() -> None:
    x, y = torch.zeros(128), torch.zeros(128)
    for _ in range(LAUNCHES):
        copy_kernel[(1,)](x, y, 128, BLOCK=128)


def steps() -> dict[str, Call]:
    """Return the steps on the same random weights, in fp32, the dtype that a CPU multiplies fastest."""
    eager = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES, **EAGER)).eval()
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT))
    applied = hf_step(apply(deepcopy(eager)), ids)
    return {"ours": our_step(eager, ids), "applied": applied, "eager": hf_step(eager, ids)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # CPU tensors take the path of a GPU's: only the memory differs.
    triton.runtime.driver.set_active(SilentDriver(GPU()))
    with mock.patch("mixtral_triton.kernels.call.INTERPRETED", True):
        times = alternate({"plain": launch_plain, **steps()}, args.rounds, args.json)
    plain = [seconds / LAUNCHES for seconds in times.pop("plain")]
    rows = []
    for name, seconds in times.items():
        layer = [one / LAYERS for one in seconds]
        row = {"layer": name, "us": 1e6 * statistics.median(layer)}
        row["plain launches"] = statistics.median(map(truediv, layer, plain))
        row["of eager"] = statistics.median(map(truediv, seconds, times["eager"]))
        rows.append(row | {"limits": "at most {}, at most {}".format(*LIMITS[name]) if name in LIMITS else ""})
    about = {"triton": triton.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    about["plain_launch_us"] = 1e6 * statistics.median(plain)
    if args.json:
        print(json.dumps({**about, "rows": rows}))
        return
    table = Table(*rows[0], title=", ".join(f"{name} {value}" for name, value in about.items()), title_justify="left")
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else value for value in row.values()))
    Console().print(table)


if __name__ == "__main__":
    main()
