"""The command `fit`: what a model takes of a GPU's memory, by the shapes that are allocated. No weight is read."""

from __future__ import annotations

import argparse
import functools
import json
import math
import shlex
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from ..checkpoint.arguments import default_dtype
from ..checkpoint.config import PREFILL_CHUNK, MixtralConfig, checkpoint_folder
from ..checkpoint.tensors import parameter_shapes
from ..kernels.operation.cases import Cost
from ..kernels.ops.attention.op import CachedCase
from ..kernels.ops.experts.op import ExpertCase
from ..kernels.ops.linear import LinearSizes
from ..kernels.ops.norm import EmbedSizes, NormSizes
from ..kernels.ops.router import GateSizes
from ..kernels.ops.sort import expected_distinct_experts
from ..kernels.record import record_launches
from ..kernels.registry import OPS
from ..model.cache import KVCache
from ..model.memory_plan import (
    MARGIN,
    estimated_free,
    fewest,
    in_decimal,
    movable_bytes,
    running_bytes,
    table_bytes,
    usable_bytes,
    weight_bytes,
)
from ..model.mixtral import Mixtral
from ..quantize import QUANTIZED_PARTS, QuantSpec, formats_text, hub, select_specs
from ..quantize.layouts import read_scheme
from ..terminal import check_range, console, table_of
from .gpus import GPU, GPUS, MIB, find_gpu, floor, parse_gpu

# mistralai/Mixtral-8x7B-v0.1, Mixtral-8x22B-Instruct-v0.1, Qwen/Qwen3-30B-A3B and allenai/OLMoE-1B-7B-0924, by
# their config.json
SAME: dict[str, Any] = {"rope_theta": 1e6, "dtype": "bfloat16"}
LARGER: dict[str, Any] = {"vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, **SAME}
LARGER |= {"num_hidden_layers": 56, "num_attention_heads": 48, "max_position_embeddings": 65536}
QWEN3: dict[str, Any] = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 768, "num_hidden_layers": 48}
QWEN3 |= {"num_key_value_heads": 4, "head_dim": 128, "num_local_experts": 128, "num_experts_per_tok": 8, **SAME}
QWEN3 |= {"model_type": "qwen3_moe", "rms_norm_eps": 1e-6, "max_position_embeddings": 40960}
OLMOE: dict[str, Any] = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16}
OLMOE |= {"num_attention_heads": 16, "num_key_value_heads": 16, "num_local_experts": 64, "num_experts_per_tok": 8}
OLMOE |= {
    "model_type": "olmoe",
    "renormalize": False,
    "rope_theta": 1e4,
    "dtype": "bfloat16",
    "max_position_embeddings": 4096,
}
KNOWN = {"mixtral-8x7b": MixtralConfig(**SAME), "mixtral-8x22b": MixtralConfig(**LARGER)}
KNOWN["qwen3-30b-a3b"] = MixtralConfig(**QWEN3)
KNOWN["olmoe-1b-7b"] = MixtralConfig(**OLMOE)
LAYERS_MAX = 10_000  # a config with more is broken, and its parameters take too long to list
QuantSpecs = Mapping[str, QuantSpec]  # of the parameters that are quantized, by name
STORED = "as stored"
WEIGHT_FORMATS: dict[str, Any] = {STORED: None, "fp8": "fp8", "int8": "int8"}  # values of `weights`
WEIGHT_FORMATS |= {"int4, linear int8": {"experts": "int4", "linear": "int8"}, "int4": "int4"}
StepFormats = tuple[str | None, str | None, str | None, str | None]  # of qkv, o, gate_up, down
FORMAT_NOTE = (
    "offload counts experts in host memory, where the embedding lies, too. The formats fp8, int8 and int4 are "
)
FORMAT_NOTE += "the experts'; linear is of attention and the head, too."
BOUND = "tokens/s bounds all sequences together, by bytes over the data sheet's bandwidth and over the link; blank "
BOUND += "where a GPU's rates are not known (--memory), and for a format that does not fit."
CELLS = "A number alone is of a format that fits. 20 (62) has 62 of all experts in host memory, and the embedding."
COLOURS = {"no": "red", "fits": "green"}


def format_specs(config: MixtralConfig) -> dict[str, QuantSpecs]:
    """The specs of each of WEIGHT_FORMATS for a model, without the formats that its columns do not take."""
    shapes, specs = parameter_shapes(config), dict[str, QuantSpecs]()
    for name, weights in WEIGHT_FORMATS.items():
        with suppress(ValueError):  # int4, whose groups have to divide the columns
            specs[name] = select_specs(weights, shapes)
    return specs


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """Count all parameters, and those that a token meets: K of E experts."""
    counts = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    experts = sum(count for name, count in counts.items() if name.endswith(QUANTIZED_PARTS["experts"]))
    total = sum(counts.values())
    return total, total - experts + experts * config.num_experts_per_tok // config.num_local_experts


def memory_need(
    config: MixtralConfig, specs: QuantSpecs, batch: int, context: int, cache: str | None = None
) -> dict[str, int]:
    """Bytes of a model on one GPU, by what they hold, and "total". cache: "int8", or None: in the model's dtype."""
    weights = weight_bytes(parameter_shapes(config), specs, default_dtype(config))
    need = {"weights": weights, "tables": table_bytes(config)}
    need |= running_bytes(config, batch, context, PREFILL_CHUNK, getattr(torch, cache) if cache else None)
    return need | {"total": sum(need.values())}


def free_bytes(gpu: GPU) -> int:
    """The free bytes of a GPU beside its driver and a context: measured where it is at hand, else by estimate."""
    return gpu.free or estimated_free(gpu.bytes)


@dataclass(frozen=True)
class MemoryPlan:
    """One format on one GPU."""

    format: str
    weights: Any  # its value in WEIGHT_FORMATS
    bytes: dict[str, int]  # `memory_need`
    verdict: str  # "fits" or "no"
    longest_context: int  # tokens a sequence that it holds, at most the model's positions; 0: none
    offload: dict[str, Any] | None  # how experts in host memory make it fit
    tokens_per_second_bound: float | None  # at most, of all sequences; None: it does not fit, or rates are unknown


@dataclass(frozen=True)
class Request:
    """A model, and the specs of each of WEIGHT_FORMATS."""

    name: str
    config: MixtralConfig
    specs: Mapping[str, QuantSpecs]
    batch: int
    context: int
    cache: str | None = None  # of `memory_need`
    has_speeds, note = True, f"{BOUND} {FORMAT_NOTE}"
    title, caption = "Tokens/s at most, by format", f"{CELLS} {note}"  # of a table of several GPUs

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        """Read the config of a folder, of a name on the hub, or in KNOWN. ValueError for a wrong option."""
        name, known = str(args.model), KNOWN.get(str(args.model).lower())
        if known is None and "/" not in name and name != "small" and not Path(name).exists():
            raise FileNotFoundError(f"{name}: no such folder, needs one, a name on the hub, or {' or '.join(KNOWN)}")
        config = known or MixtralConfig.from_pretrained(name)
        limit, layers = config.max_position_embeddings, config.num_hidden_layers
        context = limit if args.context is None else args.context
        check_range(f"{name}: num_hidden_layers", layers, 1, LAYERS_MAX)
        check_range("--batch", args.batch, 1)
        check_range("--context", context, 1, limit, "the model's positions")
        specs = format_specs(config)
        if not known and read_scheme(checkpoint_folder(name, tensors=False)) is not None:
            # The files alone say which tensors are quantized.
            specs = {STORED: hub.plan_load(hub.read_headers(name), config).specs}
        return cls(name, config, specs, args.batch, context, args.cache_dtype)

    def memory_plan(self, format: str, gpu: GPU) -> MemoryPlan:
        config, specs, limit, dtype = (
            self.config,
            self.specs[format],
            usable_bytes(free_bytes(gpu)),
            default_dtype(self.config),
        )
        need = memory_need(config, specs, self.batch, self.context, self.cache)
        excess, held = need["total"] - limit, need["weights"] + need["tables"]  # whatever the context is
        contexts = range(1, config.max_position_embeddings + 1)
        settings = PREFILL_CHUNK, getattr(torch, self.cache) if self.cache else None
        running = lambda context: sum(running_bytes(config, self.batch, context, *settings).values())  # noqa: E731
        longest = bisect_right(contexts, limit - held, key=running)
        sizes = movable_bytes(config, parameter_shapes(config), specs, dtype)
        placement, hosted, bound = fewest(config, sizes, need["total"], limit), None, None
        if placement is not None and excess > 0:
            hosted = {**vars(placement), "experts": placement.count, "link": gpu.link}
            hosted |= {"of": config.num_hidden_layers * config.num_local_experts}
            hosted |= {"device_bytes": need["total"] - placement.freed_bytes}
        if placement is not None and gpu.bandwidth:
            counts = [*map(len, placement.experts)]
            costs = step_costs(config, self.batch, self.context, dtype, specs, self.cache, counts)
            bound = self.batch / floor(costs, gpu)[0]
        verdict = "fits" if excess <= 0 else "no"
        return MemoryPlan(format, WEIGHT_FORMATS[format], need, verdict, longest, hosted, bound)

    def plan_dict(self, plan: MemoryPlan, gpu: GPU) -> dict[str, Any]:
        """Return what `--json` prints of a plan: with the launches of a decode step's layer on that GPU."""
        if not gpu.arch:
            return vars(plan)
        sizes = self.config, self.batch, self.context, default_dtype(self.config)
        return vars(plan) | {"launches": layer_launches(*sizes, self.specs[plan.format], self.cache, gpu.arch)}

    def as_dict(self) -> dict[str, Any]:
        total, active = parameters(self.config)
        values = {"model": self.name, "parameters": total, "active_parameters": active}
        values |= {"batch": self.batch, "context": self.context}
        return values | ({"cache_dtype": self.cache} if self.cache else {})

    def __str__(self) -> str:
        text = "{model}: {parameters:,} parameters, {active_parameters:,} active a token; {batch} x {context:,} tokens."
        return text.format_map(self.as_dict())

    def cell(self, plan: MemoryPlan) -> str:
        """Return what a table of several GPUs shows of a plan."""
        return _speed(plan.tokens_per_second_bound) + (f" ({plan.offload['experts']})" if plan.offload else "")

    def command(self, plan: MemoryPlan) -> str:
        """Return the command that runs a plan. A model of KNOWN is run from its folder."""
        weights = plan.weights and formats_text(plan.weights)
        name = "FOLDER" if self.name.lower() in KNOWN else shlex.quote(self.name)
        options = {"--weights": weights, "--cache-dtype": self.cache, "--offload": "auto" if plan.offload else None}
        fewer = self.context < self.config.max_position_embeddings  # than a chat has where it is not told
        options["--context"] = str(self.context) if fewer or plan.offload else None
        words = (f"{option} {value}" for option, value in options.items() if value)
        return " ".join(["mixtral-triton chat", name, *words])


def step_costs(
    config: MixtralConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    specs: Mapping[str, QuantSpec] | None = None,
    cache: str | None = None,
    hosted: Sequence[int] = (),
) -> list[Cost]:
    """Return the work of each launch of a decode step of `batch` sequences of `context` positions, the new one counted,
    with uniform routing.

    specs   of the quantized parameters, by name
    cache   "int8", or None: in `dtype`
    hosted  how many experts of each layer are in host memory; (): none
    """
    specs, H, L = specs or {}, config.hidden_size, config.num_hidden_layers
    E, K, V = config.num_local_experts, config.num_experts_per_tok, config.vocab_size
    distinct = expected_distinct_experts(batch, K / E, E)
    expert_bytes = movable_bytes(config, parameter_shapes(config), specs, dtype)[0] if hosted else ()

    def format_of(name: str, columns: int) -> str | None:
        spec = specs.get(name)
        return None if spec is None else spec.format if spec.group == columns else f"{spec.format}:{spec.group}"

    @functools.cache  # layers are few of a kind
    def layer(formats: StepFormats, hosted_bytes: int) -> list[Cost]:
        qkv, o, gate_up, down = formats
        D, Hq, Hkv = config.head_dim, config.num_attention_heads, config.num_key_value_heads
        I = config.intermediate_size
        window, norms = config.sliding_window or 0, config.family.norms
        attention = CachedCase(batch, 1, Hq, Hkv, D, context, window, context - 1, cache=cache, norms=norms == "head")
        rows = [NormSizes(batch, heads * D) for heads in (Hq, Hkv)] if norms == "row" else []
        case = ExpertCase(batch, H, I, E, K, gate_up, down, distinct=distinct)
        experts = OPS["experts_add_rms_norm"].cost(case, dtype)
        host = int(distinct / E * hosted_bytes)
        return [
            OPS["linear"].cost(LinearSizes(batch, H, (Hq + 2 * Hkv) * D, weight=qkv), dtype),
            *(OPS["rms_norm"].cost(sizes, dtype) for sizes in rows),
            OPS["rope_append_attention"].cost(attention, dtype),
            OPS["linear"].cost(LinearSizes(batch, Hq * D, H, weight=o), dtype),
            OPS["rms_norm_gate_route"].cost(GateSizes(batch, H, E, K), dtype),
            replace(experts, bytes=experts.bytes - host, host_bytes=host),
        ]

    widths = {"qkv_proj": H, "o_proj": config.num_attention_heads * config.head_dim, "gate_up_proj": H}
    widths["down_proj"] = config.intermediate_size
    costs = [OPS["embed_rms_norm"].cost(EmbedSizes(batch, 1, V, H), dtype)]
    for index in range(L):
        formats = tuple(format_of(f"layers.{index}.{name}", columns) for name, columns in widths.items())
        costs += layer(formats, hosted[index] * expert_bytes[index] if hosted else 0)  # type: ignore[arg-type]
    return [*costs, OPS["linear"].cost(LinearSizes(batch, H, V, weight=format_of("lm_head", H)), dtype)]


def layer_launches(
    config: MixtralConfig,
    batch: int,
    context: int,
    dtype: torch.dtype,
    specs: QuantSpecs,
    cache: str | None,
    arch: str,
) -> list[dict[str, Any]]:
    """Record the launches of a layer of a decode step, as `step_costs` counts it: the kernel and its programs."""
    config = replace(config, num_hidden_layers=1)
    specs = {name: specs[name] for name in parameter_shapes(config) if name in specs}
    model = Mixtral(config, "meta", dtype, specs=specs)
    slots = KVCache(config, batch, context, "meta", getattr(torch, cache) if cache else dtype)
    with record_launches(arch) as launches, torch.no_grad():
        model.hidden(torch.empty((batch, 1), dtype=torch.int64, device="meta"), slots)
    kernels = [launch for launch in launches if launch.grid is not None][1:]  # the first is the embedding's
    return [{"kernel": x.kernel, "programs": math.prod(x.grid or ())} for x in kernels]


def run(args: argparse.Namespace, request: Any = None) -> int:
    """Run the command -> exit status: 1 where no format fits, with experts in host memory neither. request: of the
    arguments; None: a Request."""
    request, gpus = request or Request.of(args), select_gpus(args)
    plans = {device: [request.memory_plan(format, device) for format in request.specs] for device in gpus}
    if args.json:
        entries = list[dict[str, Any]]()
        for device, of_gpu in plans.items():
            sizes = {"name": device.name, "bytes": device.bytes, "free": free_bytes(device)}
            entries.append({"gpu": sizes, "formats": [request.plan_dict(plan, device) for plan in of_gpu]})
        print(json.dumps(request.as_dict() | (entries[0] if len(gpus) == 1 else {"gpus": entries})))
    elif len(gpus) > 1:
        _print_all(request, plans)
    else:
        _print(request, gpus[0], plans[gpus[0]])
    fitting = (plan for of_gpu in plans.values() for plan in of_gpu if plan.verdict == "fits" or plan.offload)
    return 0 if any(fitting) else 1


def select_gpus(args: argparse.Namespace) -> list[GPU]:
    """Return the GPUs of the options, else the one at hand with what is free on it, else all that are known."""
    if args.memory is not None:
        if args.gpu is not None:
            raise ValueError("--gpu is given, and --memory, too: needs one of the two")
        check_range("--memory", args.memory, 1, 2**40, "in GiB")
        return [GPU("", f"{args.memory:g} GiB", int(args.memory * 1024))]
    if args.gpu is not None:
        return [*dict.fromkeys(map(parse_gpu, args.gpu))]
    if not torch.cuda.is_available():
        return [*GPUS.values()]
    properties = torch.cuda.get_device_properties(0)
    gpu, free = find_gpu(properties.name) or GPU("", ""), torch.cuda.mem_get_info(0)[0]
    return [replace(gpu, name=properties.name, mib=properties.total_memory // MIB, free=free)]


def _speed(bound: float | None) -> str:
    return "" if bound is None else f"{bound:,.{int(bound < 10)}f}"


def _print(request: Any, gpu: GPU, plans: list[MemoryPlan]) -> None:
    out, need = console(), plans[0].bytes
    parts = (f"{name} {in_decimal(size)}" for name, size in need.items() if name not in ("weights", "total"))
    out.print(Text(str(request)))
    free = free_bytes(gpu)
    held = "" if gpu.free else "; the driver and a context take the rest, by estimate"
    out.print(f"Beside the weights: {', '.join(parts)}. {in_decimal(free)} of {in_decimal(gpu.bytes)} are free{held}.")
    caption = f"used is the share of what is free, of which a format that fits leaves {100 * MARGIN:.0f} %. longest is "
    caption += "the most tokens of a sequence without offload; no: too large, with experts in host memory, too. "
    rows, plans = [], sorted(plans, key=lambda plan: plan.bytes["weights"])
    for plan in plans:
        weights, total, longest = plan.bytes["weights"], plan.bytes["total"], plan.longest_context
        cells = {"format": plan.format, "weights": in_decimal(weights), "in all": in_decimal(total)}
        cells |= {"used": f"{100 * total / free:.0f} %", "longest": f"{longest:,}" if longest else "-"}
        cells |= {"tokens/s": _speed(plan.tokens_per_second_bound)} if request.has_speeds else {}
        word = plan.verdict
        if offload := plan.offload:
            word = f"offload {offload['experts']} of {offload['of']}, {in_decimal(offload['host_bytes'])}"
        rows.append((cells | {"verdict": word}, COLOURS[plan.verdict]))
    out.print(table_of(f"{gpu.name}: {gpu.mib:,} MiB", rows, f"{caption}{request.note}"))
    if request.batch == 1 and (plans[0].verdict == "fits" or plans[0].offload):
        out.print(Text(f"To run it: {request.command(plans[0])}"))


def _print_all(request: Any, plans: Mapping[GPU, list[MemoryPlan]]) -> None:
    """Print which formats each listed GPU holds, and the bounds of their tokens/s."""
    rows = []
    for gpu, of_gpu in plans.items():
        cells = {"gpu": gpu.name}
        for plan in sorted(of_gpu, key=lambda plan: plan.bytes["weights"]):
            cells[plan.format] = request.cell(plan)
        rows.append((cells, ""))
    table = table_of(request.title, rows, request.caption)
    console().print(Text(str(request)), table, sep="\n")
