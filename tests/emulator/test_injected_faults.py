"""Faults of a person, planted into compiled kernels: the PTX emulator does not let them pass. And a whole model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS
from mixtral_triton.tools.tolerance import measure
from tests.compile.test_jit import on_fake_gpu
from tests.support.models import random_model

from . import launch
from .machine import SCHEDULES, Code
from .memory import Fault
from .mutate import mutations
from .parser import Unmodelled, parse

pytestmark = pytest.mark.emulator

GPU_DEVICE, BF16 = torch.device("cuda", 0), torch.bfloat16
SMALL = Path(__file__).parents[2] / "mixtral_triton" / "small"


def run(name: str, sizes: Any) -> None:
    """An operation, which errs at most twice as much as plain torch."""
    args = OPS[name].inputs(sizes, BF16, "cpu", torch.Generator().manual_seed(0))
    error, limit = measure(name, on_fake_gpu(args))
    assert error <= limit, f"{name}: {error} of {limit}"


def without(kind: str, opcode: str) -> Callable[[str], Code]:
    """PTX -> a program without any such thing; of predicates, without the first of each."""

    def build(ptx: str) -> Code:
        program = parse(ptx)
        for site in mutations(program):
            if site.kind == kind and program.instructions[site.at].opcode.startswith(opcode):
                program = site.apply(program)
        return Code(program)

    return build


EXPERTS = Shape(T=70, H=64, I=48, E=2, K=2)


@pytest.mark.parametrize("schedule", [None, *SCHEDULES], ids=lambda one: one.name if one else "all")
def test_a_wrong_swizzle_is_seen(schedule: Any, ptx_emulator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what TMA brings: the numbers are wrong in each schedule."""
    with ptx_emulator(schedules=[schedule] if schedule else None):
        run("expert_swiglu", EXPERTS)
        monkeypatch.setattr(launch, "SWIZZLE_SPANS", (None, 64, 128, 64))
        with pytest.raises((AssertionError, Fault)):
            run("expert_swiglu", EXPERTS)


@pytest.mark.parametrize(
    ("name", "sizes", "kind", "opcode"),
    [
        ("linear", Shape(T=2, H=1536, N=32), "wait", "cp.async.wait_group"),
        ("expert_swiglu", EXPERTS, "wait", "wgmma.wait_group"),
        ("expert_swiglu", EXPERTS, "wait", "mbarrier.try_wait"),
        ("linear", Shape(T=16, H=3072, N=32), "fence", "fence.proxy.async"),
        ("expert_swiglu", EXPERTS, "fence", "wgmma.fence"),
        ("expert_swiglu", EXPERTS, "expect_tx", "mbarrier.arrive"),
        ("rms_norm", {"T": 2, "H": 1000}, "barrier", "bar.sync"),
        ("rms_norm", {"T": 1, "H": 1000}, "predicate", "st.global"),
        ("rms_norm", {"T": 1, "H": 1000}, "predicate", "ld.global"),
        ("attention", {"B": 1, "T": 40, "S": 40, "Hq": 1, "Hkv": 1, "D": 64, "window": 0}, "predicate", "cp.async"),
    ],
)
def test_what_somebody_left_out_is_seen(name: str, sizes: Any, kind: str, opcode: str, ptx_emulator: Any) -> None:
    with ptx_emulator() as gpu:
        run(name, sizes)
        gpu.driver.execute.build = without(kind, opcode)
        with pytest.raises((AssertionError, Fault)):
            run(name, sizes)


@triton.jit
def double_kernel(x_ptr, y_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if MASKED:
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs, mask=offs < N, other=0.0), mask=offs < N)
    else:
        tl.store(y_ptr + offs, 2 * tl.load(x_ptr + offs))


@triton.jit
def count_kernel(y_ptr, BLOCK: tl.constexpr):
    tl.atomic_add(y_ptr + tl.arange(0, BLOCK), 1)


def test_an_unmasked_edge_is_seen_and_an_atomic_is_refused(ptx_emulator: Any) -> None:
    with ptx_emulator():
        x, y = (torch.arange(n).float().to(GPU_DEVICE) for n in (100, 100))
        double_kernel[(2,)](x, y, 100, BLOCK=64, MASKED=True)
        assert y.cpu().equal(2 * torch.arange(100).float())
        with pytest.raises(Fault, match=r"double_kernel .*illegal address.* block \(1, 0, 0\), thread"):
            double_kernel[(2,)](x, y, 100, BLOCK=64, MASKED=False)
        with pytest.raises(Unmodelled, match=r"count_kernel: not modelled: atom\.global"):
            count_kernel[(1,)](torch.zeros(64, dtype=torch.int32).to(GPU_DEVICE), BLOCK=64)


@triton.jit
def early_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr, WAITS: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    if WAITS == "first":
        gdc_wait()
    x = tl.load(x_ptr + offs)
    if WAITS == "before it stores":
        gdc_wait()
    tl.store(y_ptr + offs, 2 * x)
    if WAITS == "at last":
        gdc_wait()


@pytest.mark.parametrize(
    ("early", "reads", "waits", "said"),
    [
        (True, "written", "first", ""),
        (True, "written", "before it stores", r"before the wait for the launch that writes there: ld\.global"),
        (True, "written", "at last", "before the wait"),
        (True, "written", "never", "before the wait"),
        (False, "written", "never", ""),
        (True, "kept", "before it stores", ""),
        (True, "kept", "at last", r"before the wait .* st\.global"),
        (True, "kept", "never", r"before the wait .* st\.global"),
    ],
)
def test_a_launch_that_begins_early_waits(early: bool, reads: str, waits: str, said: str, ptx_emulator: Any) -> None:
    """To read what the launch in front of it has `written`, and to store anything."""
    with ptx_emulator():
        kept, written, out = (torch.ones(64).to(GPU_DEVICE) for _ in range(3))
        double_kernel[(1,)](kept, written, 64, BLOCK=64, MASKED=True)
        x, want = (kept, 2.0) if reads == "kept" else (written, 4.0)
        with pytest.raises(Fault, match=said) if said else nullcontext():
            early_kernel[(1,)](x, out, BLOCK=64, WAITS=waits, launch_pdl=early)
            assert out.cpu().equal(torch.full((64,), want))


def unwaiting(ptx: str) -> Code:
    """A program that does not wait for earlier launches."""
    return Code(parse("\n".join(line for line in ptx.splitlines() if "griddepcontrol.wait" not in line)))


def test_a_model_whose_kernels_do_not_wait_for_each_other_is_seen(ptx_emulator: Any) -> None:
    with ptx_emulator(schedules=SCHEDULES[:1]) as gpu:
        model, ids = random_model(GPU_DEVICE, num_hidden_layers=1), torch.zeros(1, 1, dtype=torch.int64).to(GPU_DEVICE)
        cache = KVCache(model.config, 1, max_len=9, device=GPU_DEVICE, dtype=torch.float32)
        model(ids, cache=cache)
        gpu.driver.execute.build = unwaiting
        with pytest.raises(Fault, match="before the wait for the launch that writes there"):
            model(ids, cache=cache)


def test_the_small_checkpoint_writes_the_same_text(ptx_emulator: Any) -> None:
    """Prefill of 70 tokens, more than its window, and eight of decode, as a captured graph: plain torch's text."""
    ids = torch.randint(3, 2000, (1, 70), generator=torch.Generator().manual_seed(0))
    with ptx_emulator() as gpu:
        plain, model = (Mixtral.from_pretrained(SMALL, where) for where in ("cpu", GPU_DEVICE))
        want = plain.generate(ids, max_new_tokens=8)
        assert model.generate(ids.to(GPU_DEVICE), max_new_tokens=8).cpu().equal(want)
        assert any(launched.launcher.metadata.launch_pdl for launched in gpu.driver.launches)
        assert gpu.replays > 0 and len(gpu.driver.execute.codes) >= 8
        opcodes = {one.opcode for codes in gpu.driver.execute.codes.values() for one in codes[0].program.instructions}
        assert any(name.startswith("wgmma") for name in opcodes) and any("bulk.tensor" in name for name in opcodes)
        cache = KVCache(model.config, 1, device=GPU_DEVICE, dtype=model.dtype)
        got, logits = model(ids.to(GPU_DEVICE), cache=cache).cpu(), plain(ids)
        assert (got - logits).abs().max() <= 0.05 * logits.abs().max()
