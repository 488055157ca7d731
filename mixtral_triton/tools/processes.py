"""The backend of a command (a GPU, plain torch or the interpreter) and its processes."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLE = "TRITON_INTERPRET"


def select_backend(args: argparse.Namespace, interpret: bool) -> str:
    """Set TRITON_INTERPRET, before any kernel is imported -> a note to print; empty on a GPU, and where it was set.
    `interpret`: without a GPU this command interprets the kernels rather than run the torch backend."""
    requested, value = getattr(args, "interpret", False), os.environ.get(VARIABLE)
    on_cpu = args.device is not None and args.device.startswith("cpu")
    if requested and args.device is not None and not on_cpu:
        raise ValueError(f"--interpret runs on the CPU, and --device is {args.device!r}: needs one of the two")
    if interpret or requested or value is not None:
        # Interpreted tiles are small products, for which the threads of numpy's OpenBLAS wait for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if requested:
        args.device = args.device or "cpu"
    if value is not None:
        from ..kernels.launch import INTERPRETED

        if requested and not INTERPRETED:
            raise ValueError(f"--interpret is given, and {VARIABLE}={value} is set: needs one of the two")
        return ""
    import torch  # after OPENBLAS_NUM_THREADS

    if not requested and not on_cpu and torch.cuda.is_available():
        return ""
    reason = "--interpret" if requested else "--device cpu" if on_cpu else "No GPU found"
    if not (interpret or requested):
        return f"{reason}: plain torch, on the CPU. --interpret runs the Triton kernels, interpreted: far slower."
    os.environ[VARIABLE] = "1"
    return f"{reason}: the Triton kernels run interpreted, on the CPU. Right, and slow."


@contextmanager
def open_mesh(args: argparse.Namespace) -> Iterator[Any]:
    """Open a DeviceMesh [ep, tp] of the processes that torchrun started; None where this is the only process.
    ValueError unless torchrun started tp * ep of them, with a GPU or a part of the CPU for each."""
    for name in ("tp", "ep"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, needs at least 1")
    needed, started = args.tp * args.ep, int(os.environ.get("WORLD_SIZE", 1))
    rank = f"rank {os.environ['RANK']} of {started}: " if "RANK" in os.environ else ""
    if needed != started:
        sizes = f"{rank}--tp {args.tp} times --ep {args.ep} needs {needed} processes, and torchrun started {started}"
        raise ValueError(f"{sizes}: torchrun --nproc-per-node {needed} -m mixtral_triton {args.command} ...")
    if started == 1:
        yield None
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    from ..arguments import default_device
    from ..parallel import TIMEOUT

    kind = args.device or default_device()
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"{rank}--device is {kind!r}, needs cpu or cuda: each of several processes has its own GPU")
    if kind == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(f"{rank}this machine has {torch.cuda.device_count()} GPUs, needs one a process")
        torch.cuda.set_device(local)
    try:
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
        mesh = init_device_mesh(kind, (args.ep, args.tp), mesh_dim_names=("ep", "tp"))
    except RuntimeError as error:
        raise ConnectionError(f"{rank}the ranks do not find each other: {error}") from error
    try:
        yield mesh
    except (ValueError, FileNotFoundError) as error:  # a line for each rank names the rank
        if str(error).startswith("rank "):
            raise
        raise ValueError(f"{rank}{error}") from error
    dist.destroy_process_group()  # not after an error: it could wait for a rank that is gone


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", 1)) == 1
