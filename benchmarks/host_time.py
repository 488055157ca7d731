"""Time the host's part of a decode layer outside a graph: ours, and transformers' Mixtral with `apply`.

    python benchmarks/host_time.py [--rounds 40] [--json]

No GPU is used. Triton's JIT runs against the driver of a simulated GPU (tests/support/stub), whose launches do nothing;
torch's operations run on the CPU, on tensors so small that a call is nearly all of their time. A step of one token in a
model of 8 layers is timed and divided by the layers, with embedding, head and masks. The unit is a plain launch of a
small kernel, `kernel[grid](...)`, timed in the same rounds. All alternate, so that a change of the machine's speed hits
all; a figure is the median over the rounds, a ratio the median of the rounds' ratios.
"""

from __future__ import annotations

import statistics
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
import triton.language as tl

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from benchmarks import drop_in
from mixtral_triton import apply
from mixtral_triton.tools.bench.measure import wall_seconds
from tests.support.stub.driver import Driver
from tests.support.stub.gpu import GPU

LAYERS, LAUNCHES = drop_in.TINY["num_hidden_layers"], 32
# The most that each may take: plain launches, and a share of transformers' eager layer.
LIMITS = {"ours": (30, 0.5), "applied": (60, 0.8)}


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


def steps() -> dict[str, drop_in.Call]:
    """Return the steps on the same random weights, in fp32, the dtype that a CPU multiplies fastest."""
    eager, ids = drop_in.hf_model(), torch.randint(drop_in.TINY["vocab_size"], (1, drop_in.PROMPT))
    ours = drop_in.our_step(drop_in.our_model(eager), ids)
    return {"ours": ours, "applied": drop_in.hf_step(apply(deepcopy(eager)), ids), "eager": drop_in.hf_step(eager, ids)}


@torch.no_grad()
def main() -> None:
    args = drop_in.options(__doc__, rounds=40).parse_args()
    torch.set_num_threads(1)
    # CPU tensors take the path of a GPU's: only the memory differs.
    triton.runtime.driver.set_active(SilentDriver(GPU()))
    with mock.patch("mixtral_triton.kernels.call.INTERPRETED", True):
        times = drop_in.alternate({"plain": launch_plain, **steps()}, wall_seconds, args.rounds, args.json)
    plain = [seconds / LAUNCHES for seconds in times.pop("plain")]
    rows = []
    for name, seconds in times.items():
        layer = [one / LAYERS for one in seconds]
        row = {"layer": name, "us": 1e6 * statistics.median(layer), "plain launches": drop_in.ratio(layer, plain)}
        row |= {"of eager": drop_in.ratio(seconds, times["eager"])}
        rows.append(row | {"limits": "at most {}, at most {}".format(*LIMITS[name]) if name in LIMITS else ""})
    drop_in.report(args.json, {"triton": triton.__version__, "plain_launch_us": 1e6 * statistics.median(plain)}, rows)


if __name__ == "__main__":
    main()
