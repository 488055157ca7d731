"""Several processes, a GPU each, as torchrun starts them: the mesh that --tp and --ep ask for."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def mesh_of(args: argparse.Namespace) -> Iterator[Any]:
    """A DeviceMesh [ep, tp] of all processes; None where this is the only one.

    ValueError unless torchrun started tp * ep of them, with a GPU or a part of the CPU for each.
    """
    for name in ("tp", "ep"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, needs at least 1")
    need, started = args.tp * args.ep, int(os.environ.get("WORLD_SIZE", 1))
    if need != started:
        raise ValueError(
            f"{_this()}--tp {args.tp} times --ep {args.ep} needs {need} processes, and torchrun started {started}: "
            f"torchrun --nproc-per-node {need} -m mixtral_triton {args.command} ..."
        )
    if started == 1:
        yield None
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from ..parallel import TIMEOUT

    kind = getattr(args, "device", None) or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{_this()}--device is {kind!r}, needs cpu or cuda: of several processes each has its own")
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"{_this()}this machine has {torch.cuda.device_count()} GPUs, needs one a process")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
        mesh = init_device_mesh(kind, (args.ep, args.tp), mesh_dim_names=("ep", "tp"))
    except RuntimeError as error:
        raise ConnectionError(f"{_this()}the ranks do not find each other: {error}") from error
    try:
        yield mesh
    except (ValueError, FileNotFoundError) as error:  # one line for each rank, and which is whose
        if str(error).startswith("rank "):
            raise
        raise ValueError(f"{_this()}{error}") from error
    dist.destroy_process_group()  # not behind an error: it could wait for a rank that is gone


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", 1)) == 1


def _this() -> str:
    rank = os.environ.get("RANK")
    return "" if rank is None else f"rank {rank} of {os.environ.get('WORLD_SIZE')}: "
