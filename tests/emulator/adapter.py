"""What the emulator knows of this project. The other files of this folder but its tests run any Triton kernel."""

from __future__ import annotations

import torch

from mixtral_triton.kernels.launch import INTERPRETED as INTERPRETED
from mixtral_triton.kernels.offload import find_weight


def memories_of(table: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return where the experts lie whose addresses a table holds: those on the device, and in host memory or a copy."""
    weight = find_weight(table)
    return getattr(table, "memories", ()) if weight is None else (weight.resident, weight.host)
