"""Programmatic dependent launch: what a kernel touches before it waits for earlier launches, and who begins early.

Read in the PTX: of a kernel on a simulated GPU nothing else tells the order.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, ops
from mixtral_triton.kernels import gate, linear
from mixtral_triton.kernels.launch import INTERPRETED, pdl_region
from mixtral_triton.kernels.op import Launch
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.gpus import GPUS
from mixtral_triton.tools.offline import collect, compile_launch
from mixtral_triton.tools.predict import predict
from tests.support.inject_fault import module_with_fault
from tests.support.models import random_model
from tests.support.ptx import Order, order

pytestmark = pytest.mark.skipif(INTERPRETED, reason="compiles, or runs no kernel: once, without TRITON_INTERPRET")

BF16 = torch.bfloat16
# By kernel, what is on its way before it waits; of others, an earlier launch writes which weights they need.
FETCHED = {"linear_decode_kernel": {"weight"}, "gate_route_kernel": {"gate"}}
WEIGHTS = {"weight", "scales", "zeros", "gate", "norm"}


def waits(launch: Launch) -> bool:
    return launch.fn is not None and "PDL" in launch.fn.arg_names


def fault(launch: Launch, found: Order) -> str | None:
    """What is wrong with the order in which a kernel touches its tensors."""
    if found.waits != 1:
        return f"waits {found.waits} times"
    if found.stores or not found.before <= WEIGHTS:
        return f"touches {sorted((found.before - WEIGHTS) | found.stores)} before it waits"
    late = FETCHED.get(launch.kernel, set()) - found.before
    return f"waits before it fetches {sorted(late)}" if late else None


def compiled(launch: Launch, arch: str = "sm_90") -> Any:
    return compile_launch(launch, arch)


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_a_kernel_fetches_weights_and_waits_and_then_does_the_rest(arch: str) -> None:
    seen = set()
    for op in OPS.values():
        for launch in filter(waits, collect(op, arch, [BF16])):
            found = order(compiled(launch, arch))
            assert fault(launch, found) is None, (op.name, launch)
            assert found.after, "something is read"
            seen.add(launch.kernel)
    assert seen >= {*FETCHED, "attention_decode_kernel", "attention_combine_kernel", "experts_combine_kernel"}
    assert seen >= {"experts_up_decode_kernel", "experts_down_decode_kernel"}


LINEAR = {"T": 1, "H": 4096, "N": 4096}
GATE = {"T": 1, "H": 4096, "E": 8, "K": 2}
FAULTS = [
    (
        linear,
        "linear",
        LINEAR,
        "waits before it fetches",
        ("from .launch import", "from .pdl import pdl_wait\nfrom .launch import"),
        ("    acc = add_products(", "    pdl_wait(PDL)\n    acc = add_products("),
        ("0, H, EVEN, H, LAYOUT, PDL)", "0, H, EVEN, H, LAYOUT)"),
    ),
    (linear, "linear", LINEAR, "waits 0 times", ("0, H, EVEN, H, LAYOUT, PDL)", "0, H, EVEN, H, LAYOUT)")),
    (
        gate,
        "rms_norm_gate_route",
        GATE,
        r"touches \['residual', 'x'\] before",
        ("    pdl_wait(PDL)\n", ""),
        ("BLOCK_H), 1.0\n", "BLOCK_H), 1.0\n    pdl_wait(PDL)\n"),
    ),
    (
        gate,
        "rms_norm_gate_route",
        GATE,
        "touches .*'total'.* before",
        ("    pdl_wait(PDL)\n", ""),
        ("    acc = _products(", "    pdl_wait(PDL)\n    acc = _products("),
    ),
]


@pytest.mark.parametrize(("module", "name", "sizes", "said", "changes"), [(*one[:4], one[4:]) for one in FAULTS])
def test_a_wait_in_the_wrong_place_is_caught(
    module: Any, name: str, sizes: Any, said: str, changes: Any, tmp_path: Path
) -> None:
    made = module_with_fault(module, tmp_path, *changes)
    with record_launches() as launches:
        getattr(made, name)(**OPS[name].inputs(sizes, BF16, "meta"))
    (launch,) = launches
    assert re.search(said, fault(launch, order(compiled(launch))) or "")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "gfx942"])
def test_an_older_gpu_or_another_maker_s_waits_as_ever(arch: str) -> None:
    with pdl_region(), record_launches(arch) as launches:
        OPS["linear"].run(**OPS["linear"].inputs(LINEAR, BF16, "meta"))
    (launch,) = launches
    assert launch.constexprs["PDL"] is False and not launch.dependent
    asm = compiled(launch, arch).asm
    assert "griddepcontrol" not in (asm["amdgcn"] if arch.startswith("gfx") else asm["ptx"])


def step(arch: str, **settings: Any) -> list[Launch]:
    """The launches of one decode step."""
    model = random_model("meta", num_hidden_layers=2, **settings)
    cache = KVCache(model.config, batch=2, max_len=9, device="meta", dtype=torch.float32)
    with record_launches(arch) as launches:
        model(torch.empty(2, 1, dtype=torch.int64, device="meta"), cache=cache)
    return launches


@pytest.mark.parametrize("arch", ["sm_90", "sm_100", "sm_80", "gfx942"])
def test_only_within_the_layers_of_a_model_a_launch_begins_early(arch: str) -> None:
    """Its first launch is an ordinary one: weights that were written in front of it have been by then."""
    launches = step(arch)
    early = [launch.dependent for launch in launches]
    layers = [at for at, launch in enumerate(launches) if launch.kernel.startswith(("linear", "attention", "experts"))]
    if arch not in ("sm_90", "sm_100"):
        assert not any(early)
        return
    assert not early[0] and launches[0].kernel != "linear_decode_kernel"
    assert all(early[at] for at in layers[:-1]) and not early[layers[-1]], "all but the head"
    assert not any(launch.dependent for launch in launches if not waits(launch))


def test_an_operation_by_itself_begins_when_all_before_it_have_ended() -> None:
    """Its weight may just have been written."""
    with record_launches() as launches:
        ops.linear(**OPS["linear"].inputs(LINEAR, BF16, "meta"))
    assert waits(launches[0]) and not launches[0].dependent


def test_triton_is_told(gpu: Any) -> None:
    gpu.driver.executes = False
    model = random_model("cuda:0", num_hidden_layers=2)
    cache = KVCache(model.config, batch=2, max_len=9, device="cuda:0", dtype=torch.float32)
    want = [launch.dependent for launch in step("sm_90") if launch.fn is not None]
    for _ in range(3):  # by itself, and by a plan
        gpu.driver.launches.clear()
        model(torch.zeros(2, 1, dtype=torch.int64).to("cuda:0"), cache=cache)
        told = [bool(launched.launcher.metadata.launch_pdl) for launched in gpu.driver.launches]
        assert told == want and any(told)


def test_compiled_model_launches_without_pdl(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code may launch its kernels among others."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not any(launch.dependent for launch in step("sm_90"))


def test_mesh_launches_without_pdl() -> None:
    """Other streams run the collectives."""

    class Ranks:
        def all_reduce(self, part: Any, in_order: bool) -> Any:
            return part

        def local_ids(self, ids: Any, experts: int) -> Any:
            return ids

        def all_gather(self, part: Any, size: int) -> Any:
            return part

    model = random_model("meta", num_hidden_layers=1)
    model.ranks = Ranks()  # type: ignore[assignment]
    cache = KVCache(model.config, batch=1, max_len=9, device="meta", dtype=torch.float32)
    with record_launches() as launches:
        model(torch.empty(1, 1, dtype=torch.int64, device="meta"), cache=cache)
    assert not any(launch.dependent for launch in launches) and any(map(waits, launches))


@pytest.mark.parametrize(("name", "shorter"), [("h100", True), ("b200", True), ("a100", False)])
def test_a_launch_that_begins_early_leaves_a_shorter_gap(name: str, shorter: bool) -> None:
    with record_launches(GPUS[name].arch) as launches:
        OPS["route"].run(**OPS["route"].inputs({"T": 1, "E": 8, "K": 2}, BF16, "meta"))
    cost = OPS["route"].cost({"T": 1, "E": 8, "K": 2}, BF16)
    times = [predict([replace(launches[0], dependent=early)], GPUS[name], cost).seconds for early in (False, True)]
    assert (times[1] < times[0]) == shorter
