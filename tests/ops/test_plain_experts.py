"""examples/expert_swiglu.py: its plain kernels beside its reference, and that beside the package's."""

import pytest
import torch

from examples import expert_swiglu as example
from mixtral_triton import reference

pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize(("T", "K", "E", "H", "I"), [(20, 2, 4, 80, 48), (1, 3, 5, 33, 17), (40, 1, 3, 32, 64)])
def test_plain_kernels_equal_both_references(T: int, K: int, E: int, H: int, I: int) -> None:
    generator = torch.Generator().manual_seed(T)
    x, gate_up, down = (torch.randn(s, generator=generator) / 4 for s in ((T, H), (E, 2 * I, H), (E, H, I)))
    weights, ids = torch.randn(T, E, generator=generator).softmax(-1).topk(K)
    want = reference.expert_swiglu(x, gate_up, down, ids, weights)
    for found in (example.reference, example.expert_swiglu):
        assert (found(x, gate_up, down, ids, weights) - want).abs().max() <= 1e-5 * want.abs().max()
