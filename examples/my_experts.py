"""Experts written in a few lines of torch, to stand beside the kernels.

mixtral-triton bench expert_swiglu --sizes T=16,H=256,I=512,E=8,K=2 --peer examples.my_experts:swiglu
"""

import torch.nn.functional as F
from torch import Tensor


def swiglu(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x [T,H], gate_up_proj [E,2I,H], down_proj [E,H,I], ids int32 [T,K], weights fp32 [T,K] -> [T,H]."""
    out = x.new_zeros(x.shape, dtype=weights.dtype)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = F.linear(x[token], gate_up_proj[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate) * up, down_proj[expert])
        out.index_add_(0, token, y * weights[token, slot, None])
    return out.to(x.dtype)
