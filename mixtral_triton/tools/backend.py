"""Which way a command goes on this machine, and how long that takes: decided before any kernel is imported.

Triton reads its switch as it decorates.
"""

from __future__ import annotations

import argparse
import os

from ..config import MixtralConfig

SWITCH = "TRITON_INTERPRET"


def choose(args: argparse.Namespace, interpret: bool) -> str:
    """Set Triton's switch -> what to say about the way before the work; nothing where it is a GPU's, or the user's.

    `interpret`: without a GPU this command interprets the kernels, and does not run plain torch.
    """
    on_request = getattr(args, "interpret", False)
    if on_request and not (args.device or "cpu").startswith("cpu"):
        raise ValueError(f"--interpret runs on the CPU, and --device is {args.device!r}: needs one of the two")
    if interpret or on_request or SWITCH in os.environ:
        # Interpreted tiles are small products, where the threads of numpy's OpenBLAS wait for each other.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if on_request:
        args.device = args.device or "cpu"
    if SWITCH in os.environ:
        _check_switch(on_request)
        return ""
    reason = "--interpret" if on_request else _no_gpu(args.device)
    if reason is None:
        return ""
    if not (interpret or on_request):
        return f"{reason}: plain torch, on the CPU. --interpret runs the Triton kernels, interpreted: far slower."
    os.environ[SWITCH] = "1"
    return f"{reason}: the Triton kernels run interpreted, on the CPU. Right, and slow."


def _no_gpu(device: str | None) -> str | None:
    """Why no GPU is used; None: one is."""
    import torch

    if device is not None and device.startswith("cpu"):
        return "--device cpu"
    return None if torch.cuda.is_available() else "No GPU found"


def _check_switch(on_request: bool) -> None:
    from ..kernels.launch import INTERPRETED

    if on_request and not INTERPRETED:
        value = f"{SWITCH}={os.environ[SWITCH]}"
        raise ValueError(f"--interpret is given, and the environment has {value}: needs one of the two")


def with_verify_time(note: str, config: MixtralConfig, dtype: str, tokens: int) -> str:
    """The note, and how long `verify` will take, where it is interpreted."""
    from ..kernels.launch import INTERPRETED

    if not INTERPRETED:
        return note
    time = about(verify_seconds(config, dtype, tokens))
    return f"{note} {config.num_hidden_layers} layers with {tokens} tokens: {time} on two cores.".lstrip()


def verify_seconds(config: MixtralConfig, dtype: str, tokens: int) -> float:
    """Of an interpreted `verify`: fitted to runs with up to 64 times the small checkpoint's experts and 900 tokens.

    A layer takes some seconds whatever its size, some for every token and some for every tile of the experts' weights.
    """
    tiles = config.num_local_experts * config.hidden_size * config.intermediate_size / 2**18
    slower, heavier = (1.4, 4.5) if dtype.endswith("float32") else (1.0, 1.0)
    a_layer = slower * (3.0 + 0.045 * tokens) + heavier * tiles
    return 4.0 + config.num_hidden_layers * a_layer


def about(seconds: float) -> str:
    """As precise as it is: one digit."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {float(f'{seconds / length:.1g}'):,.0f} {unit}"
    return f"about {max(10, round(seconds, -1)):.0f} s"
