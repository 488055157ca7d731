"""The decode step as an operation of the benchmark: one new token for each of B sequences of S positions, by a model of
L layers and a head of V rows. On average `offload` experts of each layer are in host memory, and the embedding, too."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...cache import KVCache
from ...config import MixtralConfig
from ...generate import can_capture, capture
from ...kernels import reference
from ...kernels.offload import OffloadedWeight
from ...kernels.op import Cost, Op
from ...model import Mixtral
from ...offload_plan import Placement, select_experts
from ...reference import block
from ..step import step_costs
from ..trace import RouteRecorder

Args = dict[str, Any]
STEPS_MOST = 4096  # positions beyond S that repeated steps may reach
LOGITS_ERROR = 0.05  # of the norm of a row of logits: the limit of its distance from the torch backend
FIELDS = {"vocab_size": "V", "hidden_size": "H", "intermediate_size": "I", "num_hidden_layers": "L", "head_dim": "D"}
FIELDS |= {"num_attention_heads": "Hq", "num_key_value_heads": "Hkv", "num_local_experts": "E"}
FIELDS |= {"num_experts_per_tok": "K"}


@dataclass(frozen=True)
class StepCase:
    B: int
    S: int
    L: int
    H: int
    I: int
    E: int
    K: int
    Hq: int
    Hkv: int
    D: int
    V: int
    offload: float | None = None  # on average, so many experts of each layer are in host memory
    cache: str | None = None  # "int8"
    distinct: float | None = None  # means per layer of the experts in use, and of those in host memory; None: as
    distinct_on_host: float | None = None  # expected under uniform routing


def config(case: StepCase) -> MixtralConfig:
    fields: dict[str, Any] = {field: getattr(case, letter) for field, letter in FIELDS.items()}
    return MixtralConfig(**fields, rope_theta=1e6, max_position_embeddings=case.S + STEPS_MOST)


def inputs(case: StepCase, dtype: torch.dtype, device: Any, generator: Any = None) -> Args:
    """Return the model, a cache that holds S - 1 positions, and the next tokens [B,1]. Experts of a layer are equal: a
    near tie in a 16-bit router changes no logits."""
    settings = config(case)
    on_host = select_experts(settings, round((case.offload or 0) * case.L))
    model = Mixtral(settings, device, dtype, placement=Placement(on_host, any(on_host)))
    for name, weight in model.named_weights().items():
        experts = map(weight.rows, range(len(weight))) if isinstance(weight, OffloadedWeight) else weight
        first, *copies = experts if len(weight.shape) == 3 else [weight]
        if len(weight.shape) == 1:
            first.fill_(1.0)
        else:
            first.normal_(std=1.0 if name == "embed_tokens" else weight.shape[-1] ** -0.5, generator=generator)
        for copy in copies:
            copy.copy_(first)
    cache = KVCache(model.config, case.B, case.S, device, torch.int8 if case.cache else dtype)
    cache.max_len = model.config.max_position_embeddings  # repeated steps wrap around the ring
    sequences = range(case.B) if cache.lengths.device.type != "meta" else ()  # there, no value is kept
    for buffer, b in product((*cache.keys, *cache.values), sequences):
        # One sequence at a time: a draw for all of them may not fit beside them.
        buffer[b] = torch.randn(buffer.shape[1:], generator=generator, device=device, dtype=dtype)
    rewind(cache)
    return {"model": model, "cache": cache, "token": torch.arange(case.B, device=device)[:, None] % case.V}


def rewind(cache: KVCache) -> None:
    """Fill all slots but the last. Steps beyond the last slot wrap around the ring, which then stays full."""
    cache.lengths.fill_(cache.slots - 1)


def decode_step(model: Mixtral, cache: KVCache, token: Tensor) -> Tensor:
    """Return the logits, fp32 [B,V]."""
    return model.head(model.hidden(token, cache)[:, 0])


def replayed_step(args: Args) -> Callable[..., Tensor]:
    """Return the step as a decode loop runs it: on a GPU in a CUDA graph, whose logits each call overwrites."""
    once = partial(decode_step, **args)
    if not can_capture(args["model"]):
        return lambda **_: once()
    once()  # every kernel is compiled before the capture
    logits: list[Tensor] = []
    replay = capture(lambda: logits.append(once()), None, args["model"].device)

    def run(**_: Any) -> Tensor:
        replay()
        return logits[0]

    return run


def plain_step(model: Mixtral, cache: KVCache, token: Tensor) -> Tensor:
    """Run `decode_step` with the torch backend."""
    past, new = cache.lengths, torch.ones_like(cache.lengths)
    x = F.embedding(token, model.embed_tokens)
    for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True):
        kv_cache: Args = {"k_cache": keys, "v_cache": values, "past": past, "new": new}
        kv_cache["window"] = model.config.sliding_window
        attend = partial(reference.rope_append_attention, cos=model.cos, sin=model.sin, **kv_cache)
        x = block(layer, model.config, x, attend).output
    cache.advance(new, 1)
    return model.head(reference.rms_norm(x, model.norm, model.config.rms_norm_eps)[:, 0])


def fault(function: Callable[..., Any], args: Args) -> str | None:
    """Return what is wrong with the logits of `function`'s first step compared with the torch backend's, or None."""
    results = []
    for step in (plain_step, function):
        rewind(args["cache"])
        results.append(step(**args))
    rewind(args["cache"])
    want, got = results
    if got.shape != want.shape:
        return f"wrong: logits of shape {list(got.shape)}, where {list(want.shape)} would be right"
    wrong = ~((got - want).norm(dim=-1) <= LOGITS_ERROR * want.norm(dim=-1))  # also where a logit is NaN
    rows = f"{int(wrong.sum())} of {len(wrong)} rows of logits"
    return f"wrong: {rows} are farther than {LOGITS_ERROR} of their norm from plain torch" if wrong.any() else None


def routed(args: Args) -> dict[str, float]:
    """Return the means per layer of the distinct experts that the next step's tokens select, in host memory and all."""
    rewind(args["cache"])
    with RouteRecorder() as routes:
        decode_step(**args)
    rewind(args["cache"])
    selected = [set(ids.unique().tolist()) for ids in routes.ids]
    on_host = [set(getattr(layer.down_proj, "on_host", ())) for layer in args["model"].layers]
    counts = {"distinct": map(len, selected), "distinct_on_host": map(len, map(set.intersection, selected, on_host))}
    return {name: sum(each) / len(selected) for name, each in counts.items()}


def costs(case: StepCase, dtype: torch.dtype) -> list[Cost]:
    """Return the work of each launch, for the experts that are in use, or those expected of uniform routing."""
    hosted, distinct = [case.offload or 0] * case.L, (case.distinct, case.distinct_on_host)
    return step_costs(config(case), case.B, case.S, dtype, None, case.cache, hosted, *distinct)


def cost(case: StepCase, dtype: torch.dtype) -> Cost:
    return sum(costs(case, dtype), Cost(0, 0))


SMALL = StepCase(B=3, S=12, L=2, H=64, I=96, E=4, K=2, Hq=4, Hkv=2, D=16, V=100)
MIXTRAL = StepCase(B=1, S=1024, L=1, H=4096, I=14336, E=8, K=2, Hq=32, Hkv=8, D=128, V=32000)
# B, S, L: two depths of one step give the time of a layer.
STEPS = [(1, 1024, 1), *product((1, 8, 32), (1024, 4096, 32768), (4,))]
STEP = Op(
    name="decode_step",
    run=decode_step,
    reference=plain_step,
    case=StepCase,
    multiplies=True,
    inputs=inputs,
    configs=lambda sizes, dtype, arch: {},
    cost=cost,
    test_shapes=(SMALL, replace(SMALL, offload=1.0), replace(SMALL, cache="int8")),
    bench_shapes=tuple(replace(MIXTRAL, B=B, S=S, L=L) for B, S, L in STEPS),
)
