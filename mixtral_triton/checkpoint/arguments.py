"""Checks of a caller's arguments: devices, dtypes, token ids, lengths."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from ..kernels.launching.launch import INTERPRETED
from ..kernels.operation.checks import FLOATS, INTS, fail, readable
from .config import DTYPES, MixtralConfig


def is_int(value: Any, least: int) -> bool:
    """Return whether `value` is an integer, or a compiler's symbolic one, of at least `least`."""
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool) and bool(value >= least)


def is_id(value: Any) -> bool:
    """Return whether `value` is an integer that a token id's int64 holds."""
    return is_int(value, 0) and value < 1 << 63


def default_device() -> str:
    """Return "cuda" where there is a GPU and the kernels are compiled, else "cpu": the interpreter runs there."""
    return "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def usable_device(device: torch.device | str | None, meta: bool = True) -> torch.device:
    """Return the device; None means `default_device()`. Raise ValueError if it does not exist. meta: whether one that
    holds no numbers is offered."""
    usable = None
    with suppress(RuntimeError, TypeError):  # what torch does not know
        usable = torch.device(default_device() if device is None else device)
    known = usable is not None and usable.type in ("cpu", "cuda", "meta")
    # GPUs are counted, by the driver, only where one is meant.
    if usable is None or not known or (usable.type == "cuda" and (usable.index or 0) >= torch.cuda.device_count()):
        others = "cpu, meta" if meta else "cpu"
        need = f"{others}, or cuda, cuda:1, ... (CUDA or ROCm) of {torch.cuda.device_count()} GPUs"
        raise ValueError(f"device {device!r} does not exist here: needs {need}")
    return usable


def named_dtype(dtype: Any) -> Any:
    """Return the dtype of a name ("bfloat16"), None for "auto", anything else as it is."""
    if not isinstance(dtype, str):
        return dtype
    name = dtype.removeprefix("torch.")
    return None if name == "auto" else getattr(torch, name) if name in DTYPES else dtype


def reject_unknown(caller: str, unknown: Mapping[str, Any], hints: Mapping[str, str]) -> None:
    """Raise ValueError for arguments that there are not, with what does the same here."""
    for name in unknown:
        need = hints.get(name, f"one of those that help({caller}) lists")
        raise ValueError(f"{caller}: there is no argument {name!r}, needs {need}")


def drop_padding(rows: Sequence[Tensor], mask: Any) -> list[Tensor]:
    """Return of each row [T] the tokens that an attention mask [B,T] or a list of lists has: not the padding on either
    side. ValueError for a mask of another shape, a row without a token, and padding between tokens."""
    masks = mask.tolist() if isinstance(mask, Tensor) else mask
    kept, need = list[Tensor](), "1 for the tokens of each prompt and 0 for padding on one side, or both"
    fits = isinstance(masks, (list, tuple)) and len(masks) == len(rows)
    for row, values in zip(rows, masks if fits else (), strict=False):
        ones = [index for index, value in enumerate(values) if value] if isinstance(values, (list, tuple)) else []
        fits = fits and bool(ones) and len(values) == len(row) and ones[-1] - ones[0] == len(ones) - 1
        if fits:
            kept.append(row[ones[0] : ones[-1] + 1])
    if not fits:
        raise ValueError(f"generate: attention_mask is {describe(mask)}, needs {need}")
    return kept


def check_dtype(argument: str, dtype: Any, *others: Any) -> None:
    """Raise ValueError for a dtype that nothing computes in, except `others`. `argument`: as in "KVCache: dtype"."""
    if dtype not in FLOATS and dtype not in others:
        raise ValueError(f"{argument} is {dtype!r}, needs one of {', '.join(map(str, (*FLOATS, *others)))}")


def default_dtype(config: MixtralConfig) -> torch.dtype:
    """Return the dtype that config.json names, else bfloat16: what is known before the tensors are read."""
    return getattr(torch, config.dtype or "bfloat16")


def check_ids(caller: str, input_ids: Any, vocab_size: int, device: torch.device) -> None:
    """Raise ValueError unless input_ids is int64 [B,T], not empty, on `device`, and on a CPU within the vocabulary."""
    fits = _is_dense(input_ids) and input_ids.dtype == torch.int64 and input_ids.dim() == 2 and 0 not in input_ids.shape
    if not fits or input_ids.device != device:
        raise fail(caller, "input_ids", describe(input_ids), f"an int64 tensor [B, T], not empty, on {device}")
    if readable(input_ids):
        check_vocabulary(caller, input_ids, vocab_size)


def check_vocabulary(caller: str, ids: Tensor, vocab_size: int) -> None:
    """Read all ids, with one synchronization on a GPU; raise ValueError where one is not in 0..vocab_size - 1."""
    for token in torch.stack(torch.aminmax(ids)).tolist():
        if not 0 <= token < vocab_size:
            raise ValueError(f"{caller}: argument 'input_ids' holds token {token}, needs ids in 0..{vocab_size - 1}")


def check_lengths(op: str, lengths: Any, B: int | None, device: torch.device | None) -> None:
    """Raise ValueError unless lengths is int [B] on `device`. None: any B, any device."""
    fits = _is_dense(lengths) and lengths.dtype in INTS and lengths.dim() == 1
    if not (fits and B in (None, len(lengths)) and device in (None, lengths.device)):
        on = "" if device is None else f" on {device}"
        raise fail(op, "lengths", describe(lengths), f"an int32 or int64 tensor [{'B' if B is None else B}]{on}")


def check_positions(what: str, tokens: int, config: MixtralConfig) -> None:
    """Raise ValueError, which begins with `what`, where a sequence of `tokens` exceeds the model's positions."""
    if tokens > config.max_position_embeddings:
        raise ValueError(f"{what} go beyond max_position_embeddings, {config.max_position_embeddings}")


def _is_dense(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested


def describe(x: Any) -> str:
    """Return dtype, shape and device of a tensor, else the class, for a message."""
    if not isinstance(x, Tensor):
        return "None" if x is None else f"a {type(x).__name__}"
    layout = f"{list(x.shape)} on {x.device}" if _is_dense(x) else "of a nested or sparse layout"
    return f"{x.dtype} {layout}"
