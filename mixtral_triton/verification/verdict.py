"""What `verify` shares between this package's model and that of transformers: the text, its progress, the last rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..inputs import check_ids, check_vocabulary
from ..kernels.checks import dtype_name
from ..kernels.launch import INTERPRETED
from .fp64 import Fp64Reference
from .report import PLAIN, Report, Row

TOKENS = 96  # of the default input: beyond the sort-free experts, and beyond the small checkpoint's window
END_RATIO = 4.0  # as RATIO, of a whole model: what two ways round differently has grown from layer to layer

Progress = Callable[[int, int], None] | None


def text_or_default(ids: Tensor | None, config: Any, device: torch.device) -> Tensor:
    if device.type == "meta":
        raise ValueError("verify: the model is on the meta device, which holds no numbers, needs a CPU or a GPU")
    if ids is None:
        generator = torch.Generator().manual_seed(0)
        length = min(TOKENS, config.max_position_embeddings)
        return torch.randint(config.vocab_size, (1, length), generator=generator).to(device)
    check_ids(ids, config.vocab_size, device)
    check_vocabulary(ids, config.vocab_size)
    if ids.shape[1] > config.max_position_embeddings:
        raise ValueError(f"verify: input_ids has {ids.shape[1]} tokens, more than max_position_embeddings")
    return ids


class Steps:
    """Counts what is done."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.done, self.total, self.progress = 0, total, progress

    def one_more(self) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total)


def by_layer(*groups: list[Row]) -> list[Row]:
    """The groups' rows, layer after layer; in each layer as the groups stand."""
    return sorted((row for group in groups for row in group), key=lambda row: -1 if row.layer is None else row.layer)


def end_row(name: str, case: str, got: Tensor, truth: Fp64Reference) -> Row:
    return Row(None, name, case, *truth.measure(got, torch.arange(got.shape[1])))


def finish(
    rows: list[Row], flips: int, device: torch.device, dtype: torch.dtype, routed: int, peer: str = PLAIN
) -> Report:
    way = PLAIN if device.type == "cpu" and not INTERPRETED else "Triton, interpreted"
    if device.type == "cuda":
        way = f"Triton on {torch.cuda.get_device_name(device)}"
    return Report(tuple(rows), flips, routed, way, dtype_name(dtype), peer)
