"""Time the host's part of a decode layer outside a graph: ours, transformers' Mixtral and Qwen3-MoE with `apply`, and
the latter with attention and experts by name.

Triton's JIT runs against the driver of a simulated GPU (tests/support/stub), whose launches do nothing, and torch's
operations on the CPU, on tiny tensors. A step of one token is timed and divided by the layers. The unit is a plain
launch of a small kernel, `kernel[grid](...)`; figures and ratios are medians over rounds that time all.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from operator import truediv
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
import triton
import triton.language as tl
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton import KVCache, Mixtral, apply, register
from mixtral_triton.bench.measure import wall_seconds
from mixtral_triton.hf.masks import CACHE
from mixtral_triton.terminal import console, table_of
from tests.support.stub.driver import Driver
from tests.support.stub.gpu import GPU

Call = Callable[[], object]
LAYERS, PROMPT, LAUNCHES = 8, 64, 32
# So small that a decode step is nearly all host time.
SIZES: dict[str, Any] = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": LAYERS}
SIZES |= {"num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 4096, "sliding_window": None}
SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
MANY_EXPERTS = {"num_experts": 16, "num_experts_per_tok": 8, "moe_intermediate_size": 64, "head_dim": 16}
PAIRS = {  # attention and experts of Qwen3-MoE, by name
    "by name": ("mixtral_triton", "mixtral_triton"),
    "sdpa, our experts": ("sdpa", "mixtral_triton"),
    "sdpa, grouped_mm": ("sdpa", "grouped_mm"),
    "sdpa, batched_mm": ("sdpa", "batched_mm"),
    "eager": ("eager", "eager"),
}


class SilentLauncher:
    def __init__(self, src: Any, metadata: Any) -> None:
        triton.runtime.driver.active.kernels.add(src.fn)

    def __call__(self, *args: Any) -> None: ...


class SilentDriver(Driver):
    launcher_cls = SilentLauncher


RIVALS = {"of eager": "eager", "of grouped_mm": "sdpa, grouped_mm", "of names": "by name"}


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs, mask=offs < n, other=0.0), mask=offs < n)


def launch_plain() -> None:
    x, y = torch.zeros(128), torch.zeros(128)
    for _ in range(LAUNCHES):
        copy_kernel[(1,)](x, y, 128, BLOCK=128)


def step_of(hf: Any, attention: str | None, experts: str | None, ids: Tensor) -> Call:
    """Return a step of a model of transformers with these implementations, None: those it has, and its own cache."""
    if attention is not None:
        hf.set_attn_implementation(attention)
        hf.set_experts_implementation(experts)
    return partial(hf, ids[:, :1], use_cache=True, **{CACHE: hf(ids, use_cache=True)[1]})


def steps() -> dict[str, dict[str, Call]]:
    """Return a step of one token on a cache that holds a prompt, by model, on the same weights in fp32."""
    register()
    eager = transformers.MixtralForCausalLM(transformers.MixtralConfig(**SIZES)).eval()
    ids = torch.randint(SIZES["vocab_size"], (1, PROMPT))
    with tempfile.TemporaryDirectory() as folder:
        eager.save_pretrained(folder)
        model = Mixtral.from_pretrained(folder, "cpu")
    cache = KVCache(model.config, 1, model.config.max_position_embeddings, device="cpu", dtype=model.dtype)
    model(ids, cache=cache)
    calls: dict[str, Call] = {"ours": partial(model, ids[:, :1], cache=cache)}
    calls["eager"] = step_of(eager, "eager", "eager", ids)
    calls["applied"] = step_of(apply(deepcopy(eager)), None, None, ids)
    qwen3 = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SIZES | MANY_EXPERTS)).eval()
    by_name = {name: step_of(deepcopy(qwen3), *pair, ids) for name, pair in PAIRS.items()}
    return {"Qwen3-MoE": by_name | {"applied": step_of(apply(qwen3), None, None, ids)}, "Mixtral": calls}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    # CPU tensors take the path of a GPU's: only the memory differs.
    triton.runtime.driver.set_active(SilentDriver(GPU()))
    with mock.patch("mixtral_triton.kernels.operation.call.INTERPRETED", True):
        models = steps()
        calls = {("", "plain"): launch_plain}
        calls |= {(model, name): call for model, layers in models.items() for name, call in layers.items()}
        for call in calls.values():
            for _ in range(min(20, args.rounds)):  # compiles, and fills caches
                call()
        # All run in each round, so a change of the machine's speed hits all.
        rounds = [{key: wall_seconds(call) for key, call in calls.items()} for _ in range(args.rounds)]
    plain, lines = [times["", "plain"] / LAUNCHES for times in rounds], []
    for model, name in (key for key in calls if key[0]):
        layer = [times[model, name] / LAYERS for times in rounds]
        row = {"us": 1e6 * statistics.median(layer)}
        row["plain launches"] = statistics.median(map(truediv, layer, plain))
        for title, rival in RIVALS.items():
            if rival in models[model]:
                row[title] = statistics.median(times[model, name] / times[model, rival] for times in rounds)
        figures = {title: f"{value:.2f}" for title, value in row.items()}
        lines.append(({"layer": f"{model}, {name}", **figures}, ""))
    versions = ", ".join(f"{module.__name__} {module.__version__}" for module in (triton, torch, transformers))
    title = f"{versions}; a plain launch takes {1e6 * statistics.median(plain):.2f} us"
    console().print(table_of(title, lines))


if __name__ == "__main__":
    main()
