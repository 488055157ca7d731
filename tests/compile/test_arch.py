"""Architectures: the configurations that each GPU gets, and the error for an unknown GPU."""

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_triton.bench.gpus import GPUS
from mixtral_triton.kernels.launching import arch as arch_module
from mixtral_triton.kernels.launching.arch import ARCHS, family, has_less_shared_memory, max_multiprocessors, tma
from mixtral_triton.kernels.launching.launch import launch_context, override_configs, target_arch, tma_can_read
from mixtral_triton.kernels.operation.cases import runs_on
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS

BF16 = torch.bfloat16
ROWS_OF_ITS_OWN = {("expert_swiglu_backward", "sm_120")}  # backward_tiles.py
FALLBACK_FAMILIES = {"sm_75": "sm_80", "sm_130": "sm_80", "gfx1201": "gfx942"}


@pytest.fixture(autouse=True)
def first_time() -> Iterator[None]:
    arch_module.family.cache_clear()
    yield
    arch_module.family.cache_clear()


def launch_configs(arch: str, of_family: str) -> list[Any]:
    """Of every operation at every size it is tested or timed at on both; the splits of a decode follow the
    multiprocessors."""
    found = []
    for op in (op for name, op in OPS.items() if not {(name, arch), (name, of_family)} & ROWS_OF_ITS_OWN):
        shapes = [x for x in (*op.test_shapes[:4], *op.bench_shapes) if runs_on(x, arch) and runs_on(x, of_family)]
        for case, dtype in product(shapes, {op.dtypes[0], op.dtypes[-1]}):
            with launch_context(arch=arch, sms=132), override_configs({}) as selected:
                op.run(**op.inputs(case, dtype, "meta"))
            found.append(selected)
    return found


@pytest.mark.exhaustive
@pytest.mark.parametrize("arch", ARCHS)
def test_known_gpu_uses_its_family_s_launch_configs_without_a_warning(arch: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_family = family(arch)
        same = "sm_86" if has_less_shared_memory(arch) else of_family
        assert launch_configs(arch, same) == launch_configs(same, arch) and family(of_family) == of_family
    reads_by_tma = tma_can_read(torch.empty(4, 64, dtype=torch.bfloat16), arch)
    assert reads_by_tma == tma(arch) == (of_family in ("sm_90", "sm_100"))


def test_the_architecture_is_that_of_the_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """One before sm_80 is refused by name: its tensor cores multiply no bf16, and the kernels would run without any."""
    monkeypatch.setattr(torch.version, "hip", None)
    for number in (70, 75, 103):
        sheet = SimpleNamespace(major=number // 10, minor=number % 10)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, sheet=sheet: sheet)
        message = f"the GPU is sm_{number}, needs one of sm_80, sm_86"
        with pytest.raises(ValueError, match=message) if number < 80 else nullcontext():
            assert family(target_arch(torch.device("cuda", 0))) == "sm_100"


def test_a_family_fits_its_gpus() -> None:
    """Those with less shared memory than sm_80, whose choices they take, have rows of their own where these need it."""
    less = {arch for arch in ARCHS if has_less_shared_memory(arch)}
    assert less == {"sm_86", "sm_89", "sm_120"} and {ARCHS[arch].shared_bytes for arch in less} == {101376}
    assert {family(arch) for arch in less} == {"sm_80"} and {gpu.arch for gpu in GPUS.values()} <= set(ARCHS)


@pytest.mark.compiled
@pytest.mark.parametrize("arch", FALLBACK_FAMILIES)
def test_unknown_gpu_warns_once(arch: str) -> None:
    with pytest.warns(UserWarning, match=f"^{arch} .*{FALLBACK_FAMILIES[arch]}'s$") as said:
        of_family = FALLBACK_FAMILIES[arch]
        same = "sm_86" if of_family == "sm_80" else of_family  # one that is not listed may be the smallest
        assert launch_configs(arch, same) == launch_configs(same, arch)
        assert max_multiprocessors(arch) == ARCHS[FALLBACK_FAMILIES[arch]].sms
    assert len(said) == 1
    with warnings.catch_warnings(), record_launches(arch) as launches:
        warnings.simplefilter("error")
        OPS["attention"].run(**OPS["attention"].inputs(OPS["attention"].test_shapes[0], torch.float16, "meta"))
    assert [launch.kernel for launch in launches if launch.fn] == ["attention_prefill_kernel"]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "gfx942", "gfx950"])
@pytest.mark.parametrize("name", ["linear", "expert_swiglu", "experts_add_rms_norm"])
def test_products_of_fp8_codes_need_their_tensor_cores(name: str, arch: str) -> None:
    sizes = {"T": 70, "H": 128, "N": 64, "I": 64, "E": 4, "K": 2, "weight": "fp8_w8a8", "down": "fp8_w8a8"}
    op = OPS[name]
    args = op.inputs({field.name: sizes[field.name] for field in fields(op.case) if field.name in sizes}, BF16, "meta")
    message = f"fp8_w8a8, and the GPU is {arch}: needs sm_89, sm_90, sm_100, sm_103 or sm_120$"
    with record_launches(arch) as launches, pytest.raises(ValueError, match=message):
        op.run(**args)
    assert not launches
    with record_launches("sm_89"):
        op.run(**args)


@pytest.mark.parametrize("arch", ["h100", 90, "sm_90a", "sm_"])
def test_recording_for_no_gpu_raises_value_error(arch: Any) -> None:
    with pytest.raises(ValueError, match=f"arch is {arch!r}, needs one of sm_80,"), record_launches(arch):
        pass
