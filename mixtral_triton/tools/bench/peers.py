"""What an operation is timed beside: plain torch, transformers, and a user's own function."""

import inspect
import os
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from ...checkpoint import table
from ...kernels.op import Op
from ...kernels.quantized import QuantizedWeight
from ...kernels.quantized_cache import QuantizedCache
from .decode_step import Args

Function = Callable[..., Any]  # of the operation's arguments by name
Peer = Callable[[Op, Args], Function]  # prepares what need not be timed; raises Unsupported


class Unsupported(Exception):
    """The peer cannot do this case."""


def _torch(op: Op, args: Args) -> Function:
    return op.call_reference


def _transformers(op: Op, args: Args) -> Function:
    """Return its experts, or its eager decode step."""
    dense = {**args, **(args["model"].named_weights() if "model" in args else {})}
    quantized = any(isinstance(value, (QuantizedWeight, QuantizedCache)) for value in dense.values())
    if quantized or (op.name == "decode_step" and isinstance(args["cache"].keys[0], QuantizedCache)):
        raise Unsupported("its weights and its cache are dense")
    if op.name == "expert_swiglu":
        return _experts(args)
    if op.name == "decode_step":
        return _step(args)
    raise Unsupported("it has no such operation")


def _experts(args: Args) -> Function:
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


def _step(args: Args) -> Function:
    from transformers import DynamicCache, MixtralConfig, MixtralForCausalLM
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    from ...hf.attention import CACHE

    model, cache = args["model"], args["cache"]
    fields = asdict(model.config)
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    settings = MixtralConfig(**fields, rope_parameters=rope)
    with torch.device("meta"):
        hf = MixtralForCausalLM(settings).eval()
    parameters, targets = dict(model.named_parameters()), table(model.config, "fused")
    hf.load_state_dict({name: parameters[one.parameter][one.index] for name, one in targets.items()}, assign=True)
    hf.model.rotary_emb = MixtralRotaryEmbedding(settings).to(model.device)
    copy = DynamicCache()
    for index, layer in enumerate(zip(cache.keys, cache.values, strict=True)):
        copy.update(*(x[:, :, : cache.slots - 1].clone() for x in layer), index)
    return lambda token, **_: hf(token, use_cache=True, **{CACHE: copy}).logits[:, -1].float()


PEERS: dict[str, Peer] = {"torch": _torch, "transformers": _transformers}


def user_peer(function: Function, op: Op, args: Args) -> Function:
    """Return `function`, which is called by position with the arguments, up to the last one that the case sets."""
    count = 1 + max(map(op.names.index, args))
    try:
        inspect.signature(function).bind(*op.names[:count])
    except TypeError as error:
        raise TypeError(f"{error}; it is called with ({', '.join(op.names[:count])})") from error
    except ValueError:  # a C function without a signature
        pass
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
