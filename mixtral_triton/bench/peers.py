"""What an operation is timed beside: plain torch, transformers' experts, and a user's own function."""

import os
import pkgutil
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..kernels.operation.declaration import Op
from ..kernels.weights.quantized import QuantizedWeight

Args = dict[str, Any]
Function = Callable[..., Any]  # of the operation's arguments by name
Peer = Callable[[Op, Args], Function]  # prepares what need not be timed; raises Unsupported


class Unsupported(Exception):
    """The peer cannot do this case."""


def _torch(op: Op, args: Args) -> Function:
    return op.call_reference


def _transformers(op: Op, args: Args) -> Function:
    if op.name != "expert_swiglu" or any(isinstance(value, QuantizedWeight) for value in args.values()):
        raise Unsupported("it has no such operation" if op.name != "expert_swiglu" else "its weights are dense")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    E, H, I = args["down_proj"].shape
    config = MixtralConfig(hidden_size=H, intermediate_size=I, num_local_experts=E)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, torch.nn.Parameter(args[name], requires_grad=False))
    ids = args["ids"].long()
    return lambda x, weights, **_: module(x, ids, weights)


PEERS: dict[str, Peer] = {"torch": _torch, "transformers": _transformers}


def user_peer(function: Function, op: Op, args: Args) -> Function:
    """Return `function`, which is called by position with the arguments, up to the last that is not at its default."""
    defaults = {name: parameter.default for name, parameter in op.signature.parameters.items()}
    count = 1 + max(op.names.index(name) for name, x in args.items() if isinstance(x, Tensor) or x != defaults[name])
    return lambda **kwargs: function(*op.bind(**kwargs)[:count])


def find_peer(text: str) -> Peer:
    """Return the peer that `--peer` names; ValueError where there is none."""
    if text in PEERS:
        return PEERS[text]
    sys.path.insert(0, os.getcwd())
    try:
        function = pkgutil.resolve_name(text if ":" in text else f"{text}:")
        if not callable(function):
            raise TypeError(f"it is a {type(function).__name__}, needs a function")
    except Exception as error:  # the module's own code may raise anything
        cause = f"{type(error).__name__}: {error}"
        needs = f"{', '.join(PEERS)}, or MODULE:FUNCTION, in this folder or installed"
        raise ValueError(f"--peer is {text!r}, needs {needs}: {cause}") from error
    return partial(user_peer, function)
