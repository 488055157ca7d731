"""Programmatic dependent launch (PDL): kernels prefetch only weights before their wait, and which launches use it.

The order of loads, waits and stores is read in the PTX: a simulated GPU does not show it.
"""

import re
from dataclasses import replace
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_triton import ops
from mixtral_triton.bench.compile import Compiled, collect, compile_launch
from mixtral_triton.kernels.launching.arch import ARCHS
from mixtral_triton.kernels.launching.launch import Launch, pdl_region
from mixtral_triton.kernels.ops import linear, router
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from tests.emulator.parser import Address, parse
from tests.emulator.values import destinations
from tests.support.calls import inputs, operand_name
from tests.support.faults import module_with_fault
from tests.support.models import cache_of, random_model

pytestmark = pytest.mark.compiled

BF16 = torch.bfloat16
# Weights that a kernel loads before its wait; other kernels need the result of an earlier launch to select them.
LOADED_EARLY = {"linear_decode_kernel": {"weight"}, "gate_route_kernel": {"gate"}}
WEIGHTS = {"weight", "weight.scales", "weight.zeros", "gate", "norm.weight"}
# The up projection starts the down projection after its own wait, so the ids have been written.
UP, DOWN = "experts_up_decode_kernel", "experts_down_decode_kernel"


def has_wait(launch: Launch) -> bool:
    return launch.fn is not None and "PDL" in launch.fn.arg_names


def prefetched(launch: Launch) -> int:
    """Return the bytes of each row that the launch's programs prefetch: none where parts of a row are not alike."""
    c = launch.constexprs
    parts_alike = launch.kernel != DOWN or c["I"] % (c["SPLIT_K"] * c["BLOCK_K"] * c["LAYOUT"].fields) == 0
    return c.get("PREFETCH", 0) if parts_alike else 0


def order(compiled: Compiled) -> SimpleNamespace:
    """Return the names of the tensors that a kernel accesses before and after the first of its waits, that it stores or
    prefetches before it, and whether the next launch may start before it.

    Instructions are taken in the order of the PTX. An address belongs to the pointer arguments that it is computed
    from; a loaded value belongs to none.
    """
    program = parse(compiled.stages["ptx"].read_text())
    runtime = [(name, kind) for name, kind in compiled.signature.items() if kind != "constexpr"]
    pairs = zip(program.params, runtime, strict=False)  # two addresses of scratch memory follow
    named = {param.name: {operand_name(name)} for param, (name, kind) in pairs if kind.startswith("*")}
    found = SimpleNamespace(waits=0, before=set(), after=set(), stores=set(), prefetched=set(), releases_first=False)
    pointers: dict[Any, set[str]] = {}  # by register
    for inst in program.instructions:
        operation, addresses = inst.opcode.split(".")[0], [x.base for x in inst.operands if isinstance(x, Address)]
        if operation == "griddepcontrol":
            found.releases_first |= "launch_dependents" in inst.opcode and not found.waits
            found.waits += "wait" in inst.opcode
        elif inst.opcode.startswith("ld.param"):
            pointers[inst.operands[0]] = named.get(addresses[0].name, set())
        elif ".global" in inst.opcode:  # the source of a copy to shared memory follows its target
            accessed = pointers.get(addresses[-1], set())
            if operation != "prefetch":
                (found.after if found.waits else found.before).update(accessed)
            if not found.waits and operation not in ("ld", "cp"):
                (found.prefetched if operation == "prefetch" else found.stores).update(accessed)
            pointers |= {register: set() for register in destinations(inst.operands[0])} if operation == "ld" else {}
        elif inst.operands:
            target, *sources = (x for operand in inst.operands for x in destinations(operand))
            pointers[target] = set().union(*(pointers.get(source, ()) for source in sources))
    return found


def find_fault(launch: Launch, found: Any) -> str | None:
    """Describe what is wrong with the order of a kernel's loads and stores."""
    if found.waits != 1:
        return f"{found.waits} waits"
    allowed = WEIGHTS | ({"ids"} if launch.kernel == DOWN else set())
    if found.stores or not found.before <= allowed:
        return f"{sorted((found.before - allowed) | found.stores)} before the wait"
    if launch.kernel == UP and found.releases_first:
        return "the down projection starts before the wait for the ids"
    want = {DOWN: {"down"}, "linear_decode_kernel": {"weight"}}[launch.kernel] if prefetched(launch) else set()
    if found.prefetched != want:
        return f"{sorted(found.prefetched)} prefetched, not {sorted(want)}"
    late = LOADED_EARLY.get(launch.kernel, set()) - found.before
    return f"{sorted(late)} after the wait" if late else None


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_kernels_prefetch_only_weights_before_the_wait(arch: str) -> None:
    kernels = set()
    for op in OPS.values():
        one_dtype = replace(op, dtypes=(BF16,)) if BF16 in op.dtypes else op
        for launch in (launch for _, launch in collect([one_dtype], arch).values() if has_wait(launch)):
            compiled = compile_launch(launch, arch)
            found = order(compiled)
            assert find_fault(launch, found) is None, (op.name, launch)
            assert found.after
            resident = ARCHS[arch].shared_bytes // max(1, compiled.shared_bytes)
            programs = min(prod(launch.grid or ()), resident * ARCHS[arch].sms)
            rows = launch.constexprs.get("BLOCK_N", 0)
            assert prefetched(launch) * rows * programs <= ARCHS[arch].l2_bytes // 2, launch
            kernels.add(launch.kernel)
    assert kernels >= {*LOADED_EARLY, "attention_decode_kernel", "attention_combine_kernel", "experts_combine_kernel"}
    assert kernels >= {UP, DOWN}


LINEAR, GATE = {"T": 1, "H": 4096, "N": 4096}, {"T": 1, "H": 4096, "E": 8, "K": 2}
NO_WAIT, WAIT = ("    pdl_wait(PDL)\n", ""), "    pdl_wait(PDL)\n"
LINEAR_WAIT = ("0, H, EVEN, H, LAYOUT, PDL)", "0, H, EVEN, H, LAYOUT)")
IMPORT = ("from ..launching.launch import", "from ..launching.pdl import pdl_wait\nfrom ..launching.launch import")
NORM_GATE = (router, "rms_norm_gate_route", GATE)
FAULTS = [  # the operation, the message, and changes of the source
    (
        *((linear, "linear", LINEAR), r"\['weight'\] after the wait", IMPORT, LINEAR_WAIT),
        ("    acc = add_products(", f"{WAIT}    acc = add_products("),
    ),
    (
        NORM_GATE,
        r"\['norm.residual', 'x'\] before the wait",
        NO_WAIT,
        ("offs_h, H), 1.0\n", f"offs_h, H), 1.0\n{WAIT}"),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[1] for fault in FAULTS])
def test_misplaced_wait_is_caught(fault: Any, tmp_path: Path) -> None:
    (module, name, sizes), message, *changes = fault
    faulty = module_with_fault(module, tmp_path, *changes)
    with record_launches() as launches:
        getattr(faulty, name).op.run(**inputs(name, sizes, "meta", BF16))
    (launch,) = launches
    assert re.search(message, find_fault(launch, order(compile_launch(launch, "sm_90"))) or "")


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "gfx942"])
def test_no_pdl_on_older_or_other_gpus(arch: str) -> None:
    with pdl_region(), record_launches(arch) as launches:
        OPS["linear"].run(**inputs("linear", LINEAR, "meta", BF16))
    (launch,) = launches
    assert launch.constexprs["PDL"] is False and not launch.dependent
    stages = compile_launch(launch, arch).stages
    assert "griddepcontrol" not in stages["amdgcn" if arch.startswith("gfx") else "ptx"].read_text()


def record_step(arch: str, ranks: Any = None, **sizes: Any) -> list[Launch]:
    """The launches of one decode step."""
    model = random_model("meta", num_hidden_layers=2, **sizes)
    model.ranks = ranks
    cache = cache_of(model, 2)
    with record_launches(arch) as launches:
        model(torch.empty(2, 1, dtype=torch.int64, device="meta"), cache=cache)
    return launches


@pytest.mark.parametrize("arch", ["sm_90", "sm_100"])
def test_layers_of_a_model_use_pdl(arch: str) -> None:
    """The first launch does not, so weights that were written before the step are complete."""
    launches = record_step(arch)
    dependent = [launch.dependent for launch in launches]
    layers = [at for at, launch in enumerate(launches) if launch.kernel.startswith(("linear", "attention", "experts"))]
    assert not dependent[0] and launches[0].kernel != "linear_decode_kernel"
    assert all(dependent[at] for at in layers[:-1]) and not dependent[layers[-1]]  # all but the head
    assert not any(launch.dependent for launch in launches if not has_wait(launch))


def test_compiled_launches_use_pdl(gpu: Any) -> None:
    gpu.driver.executes = False
    model = random_model("cuda:0", num_hidden_layers=2)
    cache = cache_of(model, 2)
    want = [launch.dependent for launch in record_step("sm_90") if launch.fn is not None]
    for _ in range(3):  # run, and launched from plans
        gpu.driver.launches.clear()
        model(torch.zeros(2, 1, dtype=torch.int64).to("cuda:0"), cache=cache)
        got = [bool(launched.launcher.metadata.launch_pdl) for launched in gpu.driver.launches]
        assert got == want and any(got)


@pytest.mark.parametrize("call", [ops.linear, torch.ops.mixtral_triton.linear])
def test_public_operations_launch_ordinarily_between_layers(call: Any, gpu: Any) -> None:
    """Code that a layer calls may just have computed the weight, which a dependent launch reads before its wait."""
    gpu.driver.executes = False
    x = torch.zeros(1, 64).to("cuda:0")
    with pdl_region():
        for _ in range(2):  # run, and launched from a plan
            call(x, torch.zeros(32, 64).to("cuda:0"))
        ops.linear.unchecked(x, torch.zeros(32, 64).to("cuda:0"))
    assert [bool(x.launcher.metadata.launch_pdl) for x in gpu.driver.launches] == [False, False, True]


def test_launches_without_pdl(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight of a single operation may just have been written; other streams run the collectives of a mesh; and
    compiled code may launch its kernels between these."""

    def same(part: Any, *args: Any, **kwargs: Any) -> Any:
        return part

    with record_launches() as launches:
        ops.linear(**inputs("linear", LINEAR, "meta", BF16))
    launches += record_step("sm_90", SimpleNamespace(all_reduce=same, local_ids=same, all_gather=same))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    launches += record_step("sm_90")
    assert not any(launch.dependent for launch in launches) and any(map(has_wait, launches))
