"""verify: this runtime beside plain torch, on the user's own weights: each operation, each layer's own forward, the
logits, and where there is a folder the loaded tensors.

A fault shows where it is. The loaded tensors are held against the files by a table of their own (loaded.py). The
reference's activations go into every operation (layer_check.py) and into every layer of the model's own forward
(shell.py); what comes out is measured against fp64, next to plain torch in the weights' dtype, which sets the limit.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from . import reference
from .kernels.launch import INTERPRETED
from .layer_check import LayerCheck, check_layers, norm_args
from .layer_truth import Values
from .loaded import check_loaded
from .model import Mixtral, check_ids, check_vocabulary
from .report import PLAIN, Report, Row
from .shell import end_to_end, forwards, tried, watched
from .yardstick import measure, widen

TOKENS = 96  # of the default input: beyond the sort-free experts, and beyond the small checkpoint's window
MEMORY = Path("/proc/meminfo")  # of Linux; elsewhere nobody is asked
END_RATIO = 4.0  # as RATIO, of a whole model: what two ways round differently has grown from layer to layer

Progress = Callable[[int, int], None] | None


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
    that one). peer "transformers": its model, loaded from the same folder, has to have the same logits.
    """
    if peer not in (None, "transformers"):
        raise ValueError(f"verify: peer is {peer!r}, needs 'transformers' or None")
    if peer is not None and find_spec(peer) is None:
        raise ValueError("verify: peer 'transformers' is not installed: pip install 'mixtral-triton[hf]'")
    if isinstance(target, nn.Module) and not isinstance(target, Mixtral):
        if folder is not None or peer is not None:
            raise ValueError(
                "verify: folder and peer go with a Mixtral or a folder: a model of transformers is its own"
            )
        from .hf_verification import verify_hf

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
        return _verify(model, ids, progress, folder, peer)


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


def _verify(model: Mixtral, ids: Tensor, progress: Progress, folder: Any, peer: str | None) -> Report:
    if peer is not None:
        fits_twice(model)
    rows = [] if folder is None else check_loaded(folder, model)
    config, shell = model.config, tried(model.config, ids.shape[1])
    steps = Steps(len(model.layers) * (1 + forwards(ids.shape[1])), progress)
    make, x = partial(LayerCheck, model), F.embedding(ids, model.embed_tokens)
    found = check_layers(make, model.layers, x, config, shell, steps.one_more)
    watch = watched(model, shell, ids, found.tried.expected, steps.one_more)
    rows += by_layer(found.rows, watch.rows())
    rows.append(Row(None, "rms_norm", "final", *measure("rms_norm", norm_args(config, found.chain.x, model.norm))))
    truth = Values.beside(_logits(model, found.wide), _logits(model, found.chain.x), END_RATIO)
    logits, flips = end_to_end(model, ids, found.chain.expected)
    rows.append(end_row("logits", "end to end", logits, truth))
    if peer is not None:
        from .hf_verification import transformers_logits

        rows.append(end_row("logits", peer, transformers_logits(folder, model, ids, found.chain.expected), truth))
    return finish(rows, flips, model.device, model.dtype, len(model.layers) * ids.numel())


def fits_twice(model: Mixtral) -> None:
    """ValueError where another copy of the weights does not fit beside the model."""
    need = sum(parameter.nbytes for parameter in model.parameters())
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
    else:
        known = MEMORY.read_text().split() if MEMORY.exists() else []
        free = 1024 * int(known[known.index("MemAvailable:") + 1]) if "MemAvailable:" in known else need
    if need > free:
        raise ValueError(f"verify: a peer is a second copy, {need / 2**30:.1f} GiB, and {free / 2**30:.1f} are free")


def by_layer(*groups: list[Row]) -> list[Row]:
    """The groups' rows, layer after layer; in each layer as the groups stand."""
    return sorted((row for group in groups for row in group), key=lambda row: -1 if row.layer is None else row.layer)


def _logits(model: Mixtral, x: Tensor) -> Tensor:
    """The final norm and the head in plain torch, in fp64 where x [B,T,H] is -> [B,T,V] in x's dtype."""
    norm, head = ((widen(w) if x.dtype == torch.float64 else w) for w in (model.norm, model.lm_head))
    return F.linear(reference.rms_norm(x, norm, model.config.rms_norm_eps), head)


def end_row(name: str, case: str, got: Tensor, truth: Values) -> Row:
    return Row(None, name, case, *truth.measure(got, torch.arange(got.shape[1])))


def finish(
    rows: list[Row], flips: int, device: torch.device, dtype: torch.dtype, routed: int, peer: str = PLAIN
) -> Report:
    way = PLAIN if device.type == "cpu" and not INTERPRETED else "Triton, interpreted"
    if device.type == "cuda":
        way = f"Triton on {torch.cuda.get_device_name(device)}"
    return Report(tuple(rows), flips, routed, way, str(dtype).removeprefix("torch."), peer)


class Routes(TorchDispatchMode):
    """Collects the experts that every `gate_route` call chose."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.mixtral_triton.gate_route.default:
            self.ids.append(out[2])
        return out
