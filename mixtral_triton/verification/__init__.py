"""verify: the runtime against torch on the user's own weights: operations, layers, logits and loaded tensors.

Errors are measured against fp64, and the error of torch in the weights' dtype sets their limits (tools/tolerance.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from importlib.util import find_spec
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..config import checkpoint_folder
from ..generate import PREFILL_CHUNK
from ..inputs import check_ids, check_vocabulary
from ..kernels.checks import dtype_name
from ..kernels.launch import INTERPRETED, multiprocessors, target_arch
from ..model import Mixtral
from ..tools.tolerance import Fp64Reference, to_fp64
from .calls import SizedCalls
from .generation import check_generate
from .layers import LayerProbe, Target, compare_in_fp32, compare_layers
from .report import END_RATIO, TORCH, Report, Row, worst_rows
from .targets import MeshTarget, TransformersTarget, compare_with_transformers
from .weights import check_weights, estimate, held_out, perplexity

__all__ = ["Report", "Row", "estimate", "held_out", "perplexity", "verify"]

TEXT_TOKENS = 144

Progress = Callable[[int, int], None] | None


def verify(
    target: Mixtral | nn.Module | str | os.PathLike[str],
    input_ids: Tensor | None = None,
    progress: Progress = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    peer: str | None = None,
    quick: bool = False,
    tokens: int | None = None,
) -> Report:
    """Compare `target` with torch, or a transformers Mixtral with transformers' own modules -> Report.

    target: a Mixtral, a checkpoint folder, or a transformers model, which is left as it is: applied or not.
    input_ids int64 [B,T]; None: a fixed pseudo-random text. `progress` is called with (steps done, steps).
    folder: the checkpoint of a Mixtral, to compare its tensors with, and to report the cost of quantizing them.
    peer "transformers": layers and logits are also compared with transformers' model of the same folder, in fp32 and
    one of its layers at a time. What the model quantized is dequantized for it.
    quick: layers of 16-bit weights are not also compared in fp32, which shows what 16 bits hide.
    tokens: of the pseudo-random text, and of the longest call of an operation.
    On a mesh every rank calls `verify` and returns the same report, with the worst row of each comparison.
    """
    check_peer(peer, isinstance(target, Mixtral) and target.ranks is not None)
    is_theirs = isinstance(target, nn.Module) and not isinstance(target, Mixtral)
    if is_theirs and (folder is not None or peer is not None):
        raise ValueError("verify: target is a transformers model, which takes neither folder nor peer: needs None")
    if isinstance(target, (str, os.PathLike)):
        folder = checkpoint_folder(target)
        target = Mixtral.from_pretrained(folder)
    if not isinstance(target, nn.Module):
        got = type(target).__name__
        raise ValueError(f"verify: target is a {got}, needs a Mixtral, a checkpoint folder or transformers' Mixtral")
    if peer is not None and folder is None:
        raise ValueError(f"verify: peer is {peer!r}, and it is loaded from the model's folder: needs folder")
    folder = None if folder is None else checkpoint_folder(folder)
    ranks = getattr(target, "ranks", None)
    kind: Any = TransformersTarget if is_theirs else Target if ranks is None else MeshTarget
    with torch.no_grad(), nullcontext() if ranks is None else ranks.raise_on_any_rank():
        return _verify(kind(target), input_ids, progress, folder, peer, quick, tokens)


def check_peer(peer: str | None, on_mesh: bool) -> None:
    """ValueError for an unknown peer, one that is not installed, and any on a mesh."""
    if peer not in (None, "transformers"):
        raise ValueError(f"verify: peer is {peer!r}, needs 'transformers' or None")
    if peer is not None and on_mesh:
        raise ValueError(f"verify: peer is {peer!r}, and no rank of a mesh has all weights for it: needs None")
    if peer is not None and find_spec(peer) is None:
        raise ValueError("verify: peer 'transformers' is not installed: pip install 'mixtral-triton[hf]'")


def default_text(ids: Tensor | None, config: Any, device: torch.device, tokens: int | None = None) -> Tensor:
    """`ids` int64 [B,T], checked; None: two sequences of a fixed pseudo-random text of `tokens` tokens."""
    if device.type == "meta":
        raise ValueError("verify: the model is on the meta device, which holds no numbers, needs a CPU or a GPU")
    limit = config.max_position_embeddings
    if ids is None:
        if tokens is not None and not 2 <= tokens <= 2 * limit:
            raise ValueError(
                f"verify: tokens is {tokens}, needs 2 to {2 * limit}, in two sequences of {limit} positions"
            )
        length, generator = min((tokens or TEXT_TOKENS) // 2, limit), torch.Generator().manual_seed(0)
        return torch.randint(config.vocab_size, (2, length), generator=generator).to(device)
    check_ids(ids, config.vocab_size, device)
    check_vocabulary(ids, config.vocab_size)
    if ids.shape[1] > limit:
        raise ValueError(f"verify: input_ids has {ids.shape[1]} tokens, needs at most {limit}, the model's positions")
    return ids


def _verify(
    target: Any, input_ids: Tensor | None, progress: Progress, folder: Any, peer: str | None, quick: bool, tokens: Any
) -> Report:
    config, device, dtype = target.config, target.embed_tokens.device, target.embed_tokens.dtype
    ids = default_text(input_ids, config, device, tokens)
    fp32 = not quick and dtype != torch.float32
    readings = len(list(target.readings(config, *ids.shape)))
    total = config.num_hidden_layers * (1 + readings + (folder is not None) + (peer is not None) + fp32)
    done = count(1)

    def step() -> None:
        if progress is not None:
            progress(next(done), total)

    kernels = INTERPRETED or device.type == "cuda"
    longest = tokens or (PREFILL_CHUNK if device.type == "cuda" else TEXT_TOKENS)
    sized = SizedCalls(longest, (target_arch(device), multiprocessors(device)))
    rows, cost = check_weights(target, folder, ids, step)
    found, expected, exact = compare_layers(target, ids, sized if kernels else None, step)
    if fp32:
        found += compare_in_fp32(target, expected, step)
    rows += sorted(found, key=lambda row: -1 if row.layer is None else row.layer)
    rows += target.measure(
        None, "rms_norm", "final", {"x": expected.x, "weight": target.norm, "eps": config.rms_norm_eps}
    )
    logits = target.head(exact, to_fp64), target.head(expected.x)
    reference, routes = Fp64Reference.from_baseline(*logits, END_RATIO), LayerProbe(expected.layers)
    routes.start("end to end")
    out = torch.empty(0)
    with target.catch_faults(routes.fail), target.forward(target.model.config, routes) as forward:
        out = target.model_head(forward(ids))
    rows.append(Row(None, target.output, "end to end", *reference.measure(out)))
    if peer is not None:
        rows += compare_with_transformers(folder, target.model, ids, expected.layers, reference, step)
    if target.generates:
        with target.catch_faults(lambda note: rows.append(Row(None, "generate", "", math.inf, 0.0, note))):
            rows += check_generate(target, ids, *logits)
    if isinstance(target, MeshTarget):
        rows = worst_rows(row for same in target.ranks.all_gather_object(rows) for row in same)
    backend = "Triton, interpreted" if kernels else TORCH
    if device.type == "cuda":
        backend = f"Triton on {torch.cuda.get_device_name(device)}"
    not_run = sized.not_run if kernels else []
    if quick and dtype != torch.float32:
        not_run.append("layers in fp32, which shows what 16 bits hide (without --quick)")
    elif fp32 and not target.widens:
        not_run.append("layers in fp32: only those of a Mixtral on one device can be taken out")
    routed = config.num_hidden_layers * ids.numel()
    return Report(tuple(rows), routes.flips, routed, backend, dtype_name(dtype), target.peer, cost, tuple(not_run))
