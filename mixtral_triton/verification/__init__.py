"""verify: this runtime beside plain torch, on the user's own weights: each operation, each layer's own forward, the
logits, and where there is a folder the loaded tensors.

A fault shows where it is. The loaded tensors are held against the files by a table of their own (loaded.py). The
reference's activations go into every operation (layers.py) and into every layer of the model's own forward
(shell.py); what comes out is measured against fp64, next to plain torch in the weights' dtype, which sets the limit.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import reference
from ..model import Mixtral
from ..quantize import QuantizedWeight
from ..tools.tolerance import measure, to_fp64
from .fp64 import Fp64Reference
from .hf import transformers_logits, verify_hf
from .layers import LayerCheck, check_layers, norm_args
from .loaded import check_loaded
from .mesh import MeshCheck, Whole, worst_of_all
from .model import end_to_end, forwards, watched, with_small_window
from .quality import held_out as held_out
from .quality import perplexity as perplexity
from .quantization import cost, formats
from .report import Report, Row
from .verdict import END_RATIO, Progress, Steps, by_layer, end_row, finish, text_or_default

MEMORY = Path("/proc/meminfo")  # of Linux; elsewhere nobody is asked


def verify(
    target: Mixtral | nn.Module | str | os.PathLike[str],
    input_ids: Tensor | None = None,
    progress: Progress = None,
    *,
    folder: str | os.PathLike[str] | None = None,
    peer: str | None = None,
) -> Report:
    """Compare `target` with plain torch, or a transformers Mixtral with transformers' own modules -> Report.

    target: a Mixtral, a checkpoint folder, or a model of transformers: as `apply` left it, else as it would be applied.
    input_ids int64 [B,T]; None: a fixed pseudo-random text. `progress` is called with (steps done, steps).
    folder: the checkpoint that a Mixtral was loaded from, to hold its tensors against (of a target that is a folder:
    that one); where its weights were quantized on the way, the report also says what that cost. peer "transformers":
    its model, loaded from the same folder, has to have the same logits.

    On a mesh every rank calls it: each layer is put together for the reference, a rank's operations are measured on its
    own part, its layers with what the ranks send each other. All get one report, the worst of each comparison.
    """
    check_peer(peer, isinstance(target, Mixtral) and target.ranks is not None)
    if isinstance(target, nn.Module) and not isinstance(target, Mixtral):
        if folder is not None or peer is not None:
            raise ValueError(
                "verify: folder and peer go with a Mixtral or a folder: a model of transformers is its own"
            )
        return verify_hf(target, input_ids, progress)
    if not isinstance(target, (Mixtral, str, os.PathLike)):
        got = type(target).__name__
        raise ValueError(f"verify: target is a {got}, needs a Mixtral, a checkpoint folder or transformers' Mixtral")
    model = target if isinstance(target, Mixtral) else Mixtral.from_pretrained(target)
    folder = folder if isinstance(target, Mixtral) else target
    if peer is not None and folder is None:
        raise ValueError("verify: a peer loads the folder that the model came from: give folder=...")
    ids = text_or_default(input_ids, model.config, model.device)
    with torch.no_grad():
        if model.ranks is None:
            return _verify(model, ids, progress, folder, peer)
        with model.ranks.raise_on_any_rank():
            return _verify(model, ids, progress, folder, peer)


def check_peer(peer: str | None, on_mesh: bool) -> None:
    """ValueError where there is no such peer, where it is not installed, and on a mesh."""
    if peer not in (None, "transformers"):
        raise ValueError(f"verify: peer is {peer!r}, needs 'transformers' or None")
    if peer is not None and on_mesh:
        raise ValueError(f"verify: peer is {peer!r}, and no rank of a mesh has all weights for it: needs None")
    if peer is not None and find_spec(peer) is None:
        raise ValueError("verify: peer 'transformers' is not installed: pip install 'mixtral-triton[hf]'")


def _verify(model: Mixtral, ids: Tensor, progress: Progress, folder: Any, peer: str | None) -> Report:
    if peer is not None:
        fits_twice(model)
    ranks = model.ranks
    whole: Any = model if ranks is None else Whole(model, ranks)
    rows = [] if folder is None else check_loaded(folder, whole)
    config, shell = whole.config, with_small_window(whole.config, ids.shape[1])
    priced = bool(formats(model)) and folder is not None
    steps = Steps(len(model.layers) * (1 + forwards(ids.shape[1]) + priced), progress)
    kind = LayerCheck if ranks is None else MeshCheck
    make, x = partial(kind.of_model, whole), F.embedding(ids, model.embed_tokens)
    found = check_layers(make, whole.layers, x, config, shell, steps.one_more)
    our_model = shell if ranks is None else ranks.shard.config(shell)
    watch = watched(model, our_model, ids, found.with_small_window.expected, steps.one_more)
    rows += by_layer(found.rows, watch.rows())
    rows.append(Row(None, "rms_norm", "final", *measure("rms_norm", norm_args(config, found.chain.x, model.norm))))
    truth = Fp64Reference.beside(_logits(whole, found.wide), _logits(whole, found.chain.x), END_RATIO)
    logits, flips = end_to_end(model, ids, found.chain.expected)
    rows.append(end_row("logits", "end to end", logits, truth))
    if peer is not None:
        rows.append(end_row("logits", peer, transformers_logits(folder, model, ids, found.chain.expected), truth))
    if ranks is not None:
        rows = worst_of_all(ranks, rows)
    quantization = cost(whole, folder, ids, steps.one_more) if priced else None
    report = finish(rows, flips, model.device, model.dtype, len(model.layers) * ids.numel())
    return replace(report, quantization=quantization)


def fits_twice(model: Mixtral) -> None:
    """ValueError where another copy of the weights does not fit beside the model, or would not be the same weights."""
    if any(isinstance(module, QuantizedWeight) for module in model.modules()):
        raise ValueError("verify: a peer computes with weights of its own making where they are quantized: peer=None")
    need = sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        known = MEMORY.read_text().split() if MEMORY.exists() else []
        free = 1024 * int(known[known.index("MemAvailable:") + 1]) if "MemAvailable:" in known else need
    if need > free:
        raise ValueError(f"verify: a peer is a second copy, {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")


def _logits(model: Any, x: Tensor) -> Tensor:
    """The final norm and the head in plain torch, in fp64 where x [B,T,H] is -> [B,T,V] in x's dtype."""
    norm, head = ((to_fp64(w) if x.dtype == torch.float64 else w) for w in (model.norm, model.lm_head))
    return reference.linear(reference.rms_norm(x, norm, model.config.rms_norm_eps), head)
