"""The PTX emulator executes the experts' kernels on offloaded weights: two memories, whose bytes it counts apart."""

from typing import Any

import pytest
import torch

from mixtral_triton.kernels.registry import OPS
from tests.support.calls import inputs, offloaded

from .memory import Fault

pytestmark = pytest.mark.emulator

ON_HOST = (0, 3)
PROJECTIONS = ("gate_up_proj", "down_proj")


def arguments(T: int, format: str | None) -> dict[str, Any]:
    sizes = {"T": T, "H": 256, "I": 128, "E": 4, "K": 2, "gate_up": format, "down": format}
    return inputs("expert_swiglu", sizes, "cuda:0", torch.bfloat16)


def with_offload(args: dict[str, Any]) -> dict[str, Any]:
    return args | {name: offloaded(args[name], ON_HOST) for name in PROJECTIONS}


def run(args: dict[str, Any]) -> torch.Tensor:
    return OPS["expert_swiglu"].run(**args).held


@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
@pytest.mark.parametrize("arch", ["sm_90", "sm_80"])
def test_same_bits_and_each_selected_byte_once(arch: str, format: str | None, ptx_emulator: Any) -> None:
    """In prefill, kernels read a copy of what lies in host memory, and more than once."""
    with ptx_emulator(arch) as gpu:
        for T in (1, 16, 70):
            args, loaded = arguments(T, format), gpu.driver.execute.loaded
            with_host, want = with_offload(args), run(args)
            loaded.clear()
            assert torch.equal(run(with_host), want)
            selected = set(args["ids"].held.unique().tolist())
            for name in PROJECTIONS if T < 70 else ():
                of_expert, argument = with_host[name].host[0].nbytes, name.replace("_proj", "_ptr")
                assert loaded[f"{argument} host"] == len(selected & {*ON_HOST}) * of_expert
                assert loaded[f"{argument} resident"] == len(selected - {*ON_HOST}) * of_expert
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
