"""What a caller gives the model, checked: devices, token ids, lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .ops import readable

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that operations compute in


def usable_device(device: torch.device | str | None) -> torch.device:
    """None: the GPU if there is one, else the CPU. ValueError for a device that this machine does not have."""
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device {device!r} is not one that torch knows") from error
    if chosen.type not in ("cpu", "cuda", "meta"):
        raise ValueError(f"device {device!r} is not supported: needs cpu, cuda (CUDA or ROCm) or meta")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not there: this machine has {torch.cuda.device_count()} GPUs")
    return chosen


def check_dtype(name: str, dtype: Any) -> None:
    """ValueError for what no operation computes in."""
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype is {dtype}, needs torch.float32, bfloat16 or float16")


def check_ids(input_ids: Any, vocab_size: int, device: torch.device) -> None:
    """int64 [B,T] with B, T at least 1 on the model's device, on a CPU with every id in the vocabulary; ValueError
    otherwise."""
    if not isinstance(input_ids, Tensor) or input_ids.dtype != torch.int64 or input_ids.dim() != 2:
        tensor = isinstance(input_ids, Tensor)
        got = f"{input_ids.dtype} {list(input_ids.shape)}" if tensor else type(input_ids).__name__
        raise ValueError(f"Mixtral: argument 'input_ids' is {got}, needs an int64 tensor [B, T]")
    if 0 in input_ids.shape:
        raise ValueError(f"Mixtral: argument 'input_ids' is empty, {list(input_ids.shape)}: needs at least one token")
    if input_ids.device != device:
        raise ValueError(f"Mixtral: argument 'input_ids' is on {input_ids.device}, needs the model's device, {device}")
    if readable(input_ids):
        check_vocabulary(input_ids, vocab_size)


def check_vocabulary(ids: Tensor, vocab_size: int) -> None:
    """One look at all ids, wherever they are; ValueError where one is not in 0..vocab_size - 1."""
    low, high = torch.stack(torch.aminmax(ids)).tolist()
    if low < 0 or high >= vocab_size:
        bad = low if low < 0 else high
        raise ValueError(f"Mixtral: argument 'input_ids' holds token {bad}, needs ids in 0..{vocab_size - 1}")


def check_lengths(lengths: Any, B: int, T: int, device: torch.device) -> None:
    """int [B] on the model's device, on a CPU with values in 0..T; ValueError otherwise."""
    good = isinstance(lengths, Tensor) and lengths.dtype in (torch.int32, torch.int64) and lengths.shape == (B,)
    if not good or lengths.device != device:
        raise ValueError(f"Mixtral: argument 'lengths' needs to be an int32 or int64 tensor [{B}] on {device}")
    if not readable(lengths):
        return
    low, high = torch.stack(torch.aminmax(lengths)).tolist()
    if low < 0 or high > T:
        raise ValueError(f"Mixtral: argument 'lengths' is from {low} to {high}, needs values in 0..{T}")
