"""What the host does between launches: the benchmark's ratios, and the calls that a decode layer takes."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from mixtral_triton import KVCache, Mixtral, MixtralConfig
from mixtral_triton.kernels import plan
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.registry import OPS

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiled kernels: needs a process without TRITON_INTERPRET")

ROOT = Path(__file__).parents[2]
CALLS_MOST = 80  # of this package's functions, a decode layer
# Other tests share the caches, which torch's operations feel more than a plain launch does: an applied model has many.
SLACK, APPLIED_SLACK = 2, 4


def test_the_benchmark_prints_its_ratios_and_they_are_within_bounds() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "host_time.py"), "--rounds", "15"]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "plain launches" in table and "at most 30" in table and "at most 0.8" in table
    printed = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout
    rows = {row["layer"]: row for row in json.loads(printed)["rows"]}
    assert rows["ours"]["plain_launches"] <= 30 * SLACK and rows["ours"]["of_eager"] <= 0.5
    assert rows["applied"]["plain_launches"] <= 60 * APPLIED_SLACK and rows["applied"]["of_eager"] <= 0.8


def calls_of(call: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """Of this package's functions and of Triton's descriptors, by file and name."""
    seen: Counter[tuple[str, str]] = Counter()
    own = (str(ROOT / "kernels"), str(ROOT / "mixtral_triton"))

    def note(frame: Any, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and (code.co_filename.startswith(own) or code is TensorDescriptor.__post_init__.__code__):
            seen[Path(code.co_filename).name, code.co_name] += 1

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return seen


def a_layer(T: int) -> Counter[tuple[str, str]]:
    """The calls of a layer of T tokens, seen before: those of three layers less those of two."""
    found = []
    for layers in (2, 3):
        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": layers}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        config = MixtralConfig(**sizes, **heads, rope_theta=1e6, max_position_embeddings=512)
        model = Mixtral(config, device="cuda", dtype=torch.bfloat16)
        cache = KVCache(config, 1, 512, device="cuda", dtype=torch.bfloat16)
        ids = torch.zeros(1, T, dtype=torch.int64).to("cuda")

        def step(model: Mixtral = model, ids: Any = ids, cache: KVCache = cache) -> Any:
            return model(ids, cache=cache)

        step()
        found.append(calls_of(step))
    return found[1] - found[0]


def test_a_decode_layer_computes_nothing_anew(gpu: Any, covers: Any) -> None:
    gpu.driver.executes = False
    calls = a_layer(1)
    runs = {(Path(op.run.__code__.co_filename).name, op.run.__name__) for op in OPS.values()}
    assert not [name for name in calls if name in runs or name[1] in ("configs", "launch", "__post_init__")], calls
    assert calls.total() <= CALLS_MOST, calls
    covers("host", f"a decode layer: {calls.total()} calls of the package's functions")


def test_a_chunk_makes_no_descriptor_anew(gpu: Any) -> None:
    """In prefill: only what torch multiplies is run again."""
    gpu.driver.executes = False
    calls = a_layer(80)
    assert not calls["tensor_descriptor.py", "__post_init__"] and not calls["tma.py", "describe"]
    assert not [name for name in calls if name[1] == "configs"], calls


def test_forgotten_plans_are_caught(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu.driver.executes, numbers, known = False, itertools.count(), plan.call_key
    monkeypatch.setattr(plan, "call_key", lambda args: (*known(args), next(numbers)))
    calls = a_layer(1)
    assert calls.total() > 2 * CALLS_MOST and any(name[1] == "configs" for name in calls)
