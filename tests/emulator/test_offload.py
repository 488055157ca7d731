"""The PTX emulator executes the experts' kernels on offloaded weights: two memories, whose bytes it counts apart."""

from typing import Any

import pytest
import torch

from mixtral_triton.kernels.op import Shape
from mixtral_triton.kernels.registry import OPS
from tests.compile.test_jit import on_fake_gpu
from tests.support.calls import offloaded

from .memory import Fault

pytestmark = pytest.mark.emulator

ON_HOST = (1, 3)
PROJECTIONS = ("gate_up_proj", "down_proj")
ARCHS, FORMATS = ("sm_90", "sm_80"), [None, "int4", "int8", "fp8"]


def arguments(T: int, format: str | None) -> dict[str, Any]:
    sizes = Shape(T=T, H=256, I=128, E=4, K=2, gate_up=format, down=format)
    args = OPS["expert_swiglu"].inputs(sizes, torch.bfloat16, "cpu", torch.Generator().manual_seed(T))
    return on_fake_gpu(args)


def with_offload(args: dict[str, Any]) -> dict[str, Any]:
    return args | {name: offloaded(args[name], ON_HOST) for name in PROJECTIONS}


def run(args: dict[str, Any]) -> torch.Tensor:
    return OPS["expert_swiglu"].run(**args).held


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("arch", ARCHS)
def test_same_bits_and_each_selected_byte_once(arch: str, format: str | None, ptx_emulator: Any) -> None:
    with ptx_emulator(arch) as gpu:
        for T in (1, 16):
            args = arguments(T, format)
            with_host = with_offload(args)
            loaded = gpu.driver.execute.loaded
            want = run(args)
            loaded.clear()
            assert torch.equal(run(with_host), want)
            selected = set(args["ids"].held.unique().tolist())
            for name in PROJECTIONS:
                of_expert, argument = with_host[name].host[0].nbytes, name.replace("_proj", "_ptr")
                assert loaded[f"{argument} host"] == len(selected & {*ON_HOST}) * of_expert
                assert loaded[f"{argument} resident"] == len(selected - {*ON_HOST}) * of_expert


@pytest.mark.parametrize("arch", ARCHS)
def test_prefill_reads_the_copy(arch: str, ptx_emulator: Any) -> None:
    for format in (None, "int4"):
        with ptx_emulator(arch):
            args = arguments(70, format)
            want, with_host = run(args), with_offload(args)
            assert torch.equal(run(with_host), want)
            with_host["down_proj"].host.zero_()
            assert not torch.equal(run(with_host), want)


@pytest.mark.parametrize("fault", ["beyond the expert", "freed memory", "misaligned"])
def test_wrong_address_is_a_fault(fault: str, ptx_emulator: Any) -> None:
    """Of the last expert in its memory, so that what lies beyond is no other expert."""
    with ptx_emulator("sm_90"):
        args = with_offload(arguments(1, None))
        args["ids"] = torch.tensor([[3, 0]], dtype=torch.int32).cuda()
        table = args["down_proj"].data.held
        table[3] = {
            "beyond the expert": table[3] + 16,
            "freed memory": torch.empty(1 << 20).data_ptr(),
            "misaligned": table[3] - 8,
        }[fault]
        with pytest.raises(Fault, match="misaligned" if fault == "misaligned" else "illegal address"):
            run(args)
