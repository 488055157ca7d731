"""The decode step as an operation of the benchmark: one new token for each of B sequences of S positions, by a model of
L layers and a head of V rows. `verify` checks a model; here its step is timed, beside the floor of its launches."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.config import MixtralConfig
from ..checkpoint.tensors import parameter_shapes
from ..kernels.operation.cases import Cost, OpWithCases, sample_quantized
from ..kernels.weights.offload import OffloadedWeight
from ..kernels.weights.quantized import QuantizedWeight
from ..model.cache import KVCache
from ..model.generate import can_capture, capture
from ..model.memory_plan import Placement, select_experts
from ..model.mixtral import Mixtral
from ..quantize import QuantSpec, select_specs
from ..terminal import check_range, table_of
from .fit import KNOWN, layer_launches, step_costs
from .gpus import GPU, floor

STEPS_MOST = 4096  # positions beyond S that repeated steps may reach
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
    offload: int | None = None  # experts of the whole model in host memory, and the embedding with them
    cache: str | None = None  # "int8"
    weights: str | None = None  # "int4", or "experts=int4,linear=int8"; None: dense
    model_type: str | None = None  # of FAMILIES; None: mixtral


def config(case: StepCase) -> MixtralConfig:
    fields: dict[str, Any] = {field: getattr(case, letter) for field, letter in FIELDS.items()}
    fields["model_type"] = case.model_type or "mixtral"
    return MixtralConfig(**fields, rope_theta=1e6, max_position_embeddings=case.S + STEPS_MOST)


def specs(case: StepCase) -> dict[str, QuantSpec]:
    """Return the specs of the quantized parameters, by name."""
    weights: Any = case.weights
    if weights and "=" in weights:
        weights = dict(part.split("=", 1) for part in weights.split(","))
    return select_specs(weights, parameter_shapes(config(case)), "bench")


def of_model(case: StepCase, name: str) -> StepCase:
    """Return the case with the sizes and the family of a model that `fit` knows."""
    known = KNOWN[name]
    sizes = {letter: getattr(known, field) for field, letter in FIELDS.items() if letter != "L"}
    return replace(case, **sizes, model_type=known.model_type)


def experts_on_host(case: StepCase) -> list[Any]:
    """Return the experts of each layer in host memory."""
    count = case.offload or 0
    check_range("offload of --sizes", count, 0, case.L * (case.E - 1), "since one expert of each layer stays")
    return select_experts(config(case), count)


def inputs(case: StepCase, dtype: torch.dtype, device: Any, generator: Any = None) -> dict[str, Any]:
    """Return the model, a cache that holds S - 1 positions, and the next tokens [B,1], all of random values."""
    away = experts_on_host(case)
    model = Mixtral(config(case), device, dtype, specs=specs(case), placement=Placement(away, any(away)))
    for weight in model.named_weights().values():
        if isinstance(weight, OffloadedWeight) and weight.name is not None:
            raise ValueError(f"bench: weights is {case.weights!r} with offload of {case.offload}, needs one of the two")
        experts = map(weight.rows, range(len(weight))) if isinstance(weight, OffloadedWeight) else [weight]
        for part in experts:
            if isinstance(part, QuantizedWeight):
                drawn = sample_quantized(part.name, *part.shape, device=device, generator=generator)
                part.data.copy_(drawn.data)
                part.scales.copy_(drawn.scales)
            else:
                part.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    cache = KVCache(model.config, case.B, case.S, device, torch.int8 if case.cache else dtype)
    cache.max_len = model.config.max_position_embeddings  # repeated steps wrap around the ring
    sequences = range(case.B) if cache.lengths.device.type != "meta" else ()  # there, no value is kept
    for buffer, b in product((*cache.keys, *cache.values), sequences):
        # One sequence at a time: a draw for all of them may not fit beside them.
        buffer[b] = torch.randn(buffer.shape[1:], generator=generator, device=device, dtype=dtype)
    cache.lengths.fill_(cache.slots - 1)  # steps beyond the last slot wrap around the ring, which then stays full
    return {"model": model, "cache": cache, "token": torch.arange(case.B, device=device)[:, None] % case.V}


def decode_step(model: Mixtral, cache: KVCache, token: Tensor) -> Tensor:
    """Return the logits, fp32 [B,V]."""
    return model.head(model.hidden(token, cache)[:, 0])


def replayed_step(args: dict[str, Any]) -> Callable[..., Tensor]:
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


def costs(case: StepCase, dtype: torch.dtype) -> list[Cost]:
    """Return the work of each launch, with uniform routing."""
    hosted = [*map(len, experts_on_host(case))]
    return step_costs(config(case), case.B, case.S, dtype, specs(case), case.cache, hosted)


def layer_rows(case: StepCase, dtype: torch.dtype, gpu: GPU) -> list[dict[str, Any]]:
    """Each launch of a layer with its programs; the first of an operation has its bytes and floor."""
    one = replace(case, L=1, offload=None)
    launches = layer_launches(config(one), case.B, case.S, dtype, specs(one), case.cache, gpu.arch)
    kind = lambda launch: launch["kernel"].split("_")[0].replace("route", "gate")  # noqa: E731
    groups, work = [[*group] for _, group in groupby(launches, kind)], costs(one, dtype)[1:-1]
    if len(work) > len(groups):  # the norms of queries and keys
        work[1:3] = [work[1] + work[2]]
    for group, cost in zip(groups, work, strict=True):
        group[0] |= {"bytes": cost.bytes, "floor_s": floor([cost], gpu)[0]}
    return launches


def layer_table(case: StepCase, rows: list[dict[str, Any]], gpu: GPU) -> Any:
    """Tabulate a layer launch by launch."""
    cells = list[tuple[dict[str, str], str]]()
    for row in rows:
        floors = (
            {"MB": f"{row['bytes'] / 1e6:.2f}", "floor, us": f"{1e6 * row['floor_s']:.2f}"} if "bytes" in row else {}
        )
        cells.append(
            ({"launch": row["kernel"], "programs": f"{row['programs']:,}", "MB": "", "floor, us": ""} | floors, "")
        )
    total = f"{len(rows)} launches, floor {1e6 * sum(row.get('floor_s', 0) for row in rows):.1f} us"
    return table_of(f"A layer on {gpu.name}, B {case.B}, {case.S:,} keys, weights {case.weights}: {total}", cells)


SMALL = StepCase(B=3, S=12, L=2, H=64, I=96, E=4, K=2, Hq=4, Hkv=2, D=16, V=100)
MIXTRAL = StepCase(B=1, S=1024, L=1, H=4096, I=14336, E=8, K=2, Hq=32, Hkv=8, D=128, V=32000)
# B, S, L: two depths of one step give the time of a layer.
STEPS = [(1, 1024, 1), *product((1, 8, 32), (1024, 4096, 32768), (4,))]
STEP = OpWithCases(
    name="decode_step",
    run=decode_step,
    reference=decode_step,
    case=StepCase,
    draw=inputs,
    count=lambda case, dtype: sum(costs(case, dtype), Cost(0, 0)),
    test_shapes=(SMALL, replace(SMALL, offload=2), replace(SMALL, cache="int8"), replace(SMALL, weights="int8")),
    bench_shapes=tuple(replace(MIXTRAL, B=B, S=S, L=L) for B, S, L in STEPS),
)
