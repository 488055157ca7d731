"""Device kernels of a decode layer of transformers' models with `apply`, recorded in 16 bits without a GPU."""

import pytest
import torch

from mixtral_triton import apply
from mixtral_triton.hf.masks import CACHE
from mixtral_triton.kernels.record import record_launches
from tests.support.families import build


@pytest.mark.compiled
@pytest.mark.parametrize(("family", "most"), [("mixtral", 17), ("qwen3_moe", 19)])
@torch.no_grad()
def test_launches_of_a_decode_layer(family: str, most: int) -> None:
    counts = list[int]()
    for layers in (2, 3):
        model = apply(build(family, num_hidden_layers=layers).to(torch.bfloat16).to("meta"))
        ids = torch.zeros(1, 5, dtype=torch.int64, device="meta")
        with record_launches(arch="sm_90"):
            cache = model(ids, use_cache=True)[1]
        with record_launches(arch="sm_90") as launches:
            model(ids[:, :1], use_cache=True, **{CACHE: cache})
        counts.append(len(launches))
    assert counts[1] - counts[0] <= most
