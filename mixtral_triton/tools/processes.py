"""How a command runs: on a GPU, in plain torch or interpreted, and in how many processes.

`select_backend` runs before any kernel is imported: Triton reads TRITON_INTERPRET when it decorates.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SWITCH = "TRITON_INTERPRET"


def select_backend(args: argparse.Namespace, interpret: bool) -> str:
    """Set TRITON_INTERPRET -> a note to print before the work; empty on a GPU, and where the user has set it.

    `interpret`: without a GPU this command interprets the kernels rather than run the torch backend.
    """
    requested, switch = getattr(args, "interpret", False), os.environ.get(SWITCH)
    on_cpu = args.device is not None and args.device.startswith("cpu")
    if requested and args.device is not None and not on_cpu:
        raise ValueError(f"--interpret runs on the CPU, and --device is {args.device!r}: needs one of the two")
    if interpret or requested or switch is not None:
        # Interpreted tiles are small products, for which the threads of numpy's OpenBLAS wait for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if requested:
        args.device = args.device or "cpu"
    if switch is not None:
        from ..kernels.launch import INTERPRETED

        if requested and not INTERPRETED:
            raise ValueError(f"--interpret is given, and {SWITCH}={switch} is set: needs one of the two")
        return ""
    import torch  # after OPENBLAS_NUM_THREADS

    if not requested and not on_cpu and torch.cuda.is_available():
        return ""
    reason = "--interpret" if requested else "--device cpu" if on_cpu else "No GPU found"
    if not (interpret or requested):
        return f"{reason}: plain torch, on the CPU. --interpret runs the Triton kernels, interpreted: far slower."
    os.environ[SWITCH] = "1"
    return f"{reason}: the Triton kernels run interpreted, on the CPU. Right, and slow."


@contextmanager
def open_mesh(args: argparse.Namespace) -> Iterator[Any]:
    """Open a DeviceMesh [ep, tp] of the processes that torchrun started; None where this is the only process.

    ValueError unless torchrun started tp * ep of them, with a GPU or a part of the CPU for each.
    """
    for name in ("tp", "ep"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}, needs at least 1")
    needed, started = args.tp * args.ep, int(os.environ.get("WORLD_SIZE", 1))
    rank = f"rank {os.environ['RANK']} of {started}: " if "RANK" in os.environ else ""
    if needed != started:
        raise ValueError(
            f"{rank}--tp {args.tp} times --ep {args.ep} needs {needed} processes, and torchrun started {started}: "
            f"torchrun --nproc-per-node {needed} -m mixtral_triton {args.command} ..."
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


class TimedSteps:
    """The tokens of one sequence of `generate.stream`: how fast they came, and the peak of memory."""

    def __init__(self, steps: Iterator[Any], prompt_tokens: int, device: Any) -> None:
        self.prompt_tokens, self.device, self.tokens = prompt_tokens, device, 0
        self.prefill = self.decode = 0.0  # seconds to the first token, and from there to the last
        self._iterator = self._measure(steps)

    def __iter__(self) -> Iterator[int]:
        return self._iterator

    def _measure(self, steps: Iterator[Any]) -> Iterator[int]:
        start = time.perf_counter()
        for step in steps:
            token = int(step[0])  # waits for the GPU
            self.tokens += 1
            seconds = time.perf_counter() - start
            self.prefill = self.prefill or seconds
            self.decode = seconds - self.prefill
            yield token

    def peak_bytes(self) -> int:
        """What torch allocated on the GPU, or what a process on the CPU had resident; 0: unknown."""
        if self.device.type == "cuda":
            import torch

            return torch.cuda.max_memory_allocated(self.device)
        try:
            import resource
        except ImportError:  # not a Unix
            return 0
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def as_dict(self) -> dict[str, Any]:
        """Rates in tokens per second; None where there is no token to count."""
        count, whole = self.tokens, self.prefill + self.decode
        return {
            "prompt_tokens": self.prompt_tokens,
            "tokens_per_second": count / whole if count else None,
            "prefill_tokens_per_second": self.prompt_tokens / self.prefill if count else None,
            "decode_tokens_per_second": (count - 1) / self.decode if count > 1 else None,
            "peak_bytes": self.peak_bytes(),
        }

    def __str__(self) -> str:
        rates = self.as_dict()
        parts = {"prefill": (self.prompt_tokens, self.prefill), "decode": (max(0, self.tokens - 1), self.decode)}
        text = (
            f"{name}: {count} tokens in {seconds:.2f} s, {rates[f'{name}_tokens_per_second'] or 0:.1f} tokens/s"
            for name, (count, seconds) in parts.items()
        )
        return f"{'; '.join(text)}; peak of memory: {rates['peak_bytes'] / 1e9:.2f} GB"


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return os.environ.get("RANK", "0") == "0" or int(os.environ.get("WORLD_SIZE", 1)) == 1
