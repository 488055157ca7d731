"""The command `fit`: what a model takes of a GPU's memory; which formats fit, how long a text, what would do otherwise.

B sequences, S tokens each, H hidden, I intermediate, E experts, K experts per token

All bytes but OVERHEAD are counted, by the shapes that the code allocates. Only a config is read, never weights.
"""

from __future__ import annotations

import argparse
import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.text import Text

from ..config import MixtralConfig, checkpoint_folder
from ..generate import PREFILL_CHUNK
from ..inputs import WEIGHT_FORMATS, weight_bytes
from ..parallel import Shard, Traffic, traffic
from ..quantize import hub
from ..quantize.schemes import read_scheme
from ..quantize.spec import PARTS, QuantSpec, select_specs
from ..weights import parameter_shapes
from .gpus import GPU, GPUS, MIB, find_gpu
from .terminal import Column, Table, console

# mistralai/Mixtral-8x7B-v0.1 and mistralai/Mixtral-8x22B-Instruct-v0.1, by their config.json
SAME: dict[str, Any] = {"rope_theta": 1e6, "dtype": "bfloat16"}
LARGER: dict[str, Any] = {"vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, **SAME}
LARGER |= {"num_hidden_layers": 56, "num_attention_heads": 48, "max_position_embeddings": 65536}
KNOWN = {"mixtral-8x7b": MixtralConfig(**SAME), "mixtral-8x22b": MixtralConfig(**LARGER)}
# An estimate, not a count: what the driver keeps of the total that its tool prints, a CUDA context with the kernels of
# torch and Triton, a library's workspace for matrix products, the graph of a decode step and that step's own buffers.
OVERHEAD = 5 * 2**28
LAYERS_MAX = 10_000  # a config with more is broken, and its parameters take too long to list
TIGHT = 0.02  # of the memory: the error of the estimate
GPUS_MAX = 16
# Of each logit: in the model's dtype, in fp32, and what a draw by temperature and top_p makes of it, its sort included.
LOGIT_BYTES = 64

QuantSpecs = Mapping[str, QuantSpec]  # of the parameters that are quantized, by name
STORED = "as stored"
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FORMAT_NOTE = "fp8, int8, int4: of the experts' weights; linear: of attention and the head, too."
SEVERAL = "Several GPUs: weights and cache in even parts, the rest on each, by estimate; see docs/scaling.md."
COLOURS = {"no": "red", "tight": "yellow", "fits": "green"}


def format_specs(config: MixtralConfig) -> dict[str, QuantSpecs]:
    """The specs of each of WEIGHT_FORMATS for a model, without the formats that its columns do not take."""
    shapes = parameter_shapes(config)
    specs: dict[str, QuantSpecs] = {}
    for name, weights in WEIGHT_FORMATS.items():
        try:
            specs[name] = select_specs(weights, shapes)
        except ValueError:  # int4, whose groups have to divide the columns
            continue
    return specs


def shard_specs(config: MixtralConfig, specs: QuantSpecs, shard: Shard) -> QuantSpecs:
    """The specs of a rank's parts; ValueError where a group of columns would be cut."""
    return shard.specs(specs, parameter_shapes(config), parameter_shapes(config, shard))


def stored_dtype(config: MixtralConfig) -> torch.dtype:
    return getattr(torch, config.dtype or "bfloat16")


def model_bytes(config: MixtralConfig, specs: QuantSpecs, dtype: torch.dtype | None = None) -> int:
    """Bytes of all parameters; `dtype`: of those that are not quantized, None: as stored."""
    return weight_bytes(parameter_shapes(config), specs, dtype or stored_dtype(config))


def table_bytes(config: MixtralConfig) -> int:
    """Bytes of the rotary tables, fp32."""
    return 4 * config.max_position_embeddings * config.head_dim


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """How many there are, and how many a token meets: K of E experts."""
    counts = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    experts = sum(count for name, count in counts.items() if name.endswith(PARTS["experts"]))
    total = sum(counts.values())
    return total, total - experts + experts * config.num_experts_per_tok // config.num_local_experts


def cache_bytes(config: MixtralConfig, batch: int, context: int) -> int:
    """Bytes of a KVCache: a ring of the window where there is one."""
    slots = config.sliding_window or context
    heads = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * batch * heads * slots * stored_dtype(config).itemsize


def workspace_bytes(config: MixtralConfig, batch: int, context: int) -> int:
    """The most that `generate` holds at one time while it reads prompts, in chunks of PREFILL_CHUNK tokens.

    A layer's experts hold their input and its norm, attention's result, the sum and its norm, the next sum and its
    norm; for each slot its row in sorted order, the experts' inner values and result: a cached launch plan allocates
    all of these before its first launch. Attention holds its input and its norm, queries, keys and values, those
    rotated, and the heads' result.
    """
    hidden, inner, slots = config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    heads = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    row = max(7 * hidden + slots * (2 * hidden + inner), 2 * hidden + 3 * heads) + config.num_local_experts
    row += hidden if context > PREFILL_CHUNK else 0  # the chunk before it is still there
    counters = 16 + 12 * slots  # positions; routes, their weights and order
    rows = batch * min(context, PREFILL_CHUNK)
    return rows * (row * stored_dtype(config).itemsize + counters) + 8 * batch * context


@dataclass(frozen=True)
class Need:
    """Bytes of a model on one GPU, or on each of several."""

    weights: int
    tables: int
    cache: int
    workspace: int
    logits: int
    overhead: int = OVERHEAD

    @classmethod
    def of(cls, config: MixtralConfig, specs: QuantSpecs, batch: int, context: int, gpus: int = 1) -> Need:
        """Several GPUs: weights and cache in even parts, as if those divided them; embedding and the rest on each."""
        embedding = config.vocab_size * config.hidden_size * stored_dtype(config).itemsize
        return cls(
            embedding - (embedding - model_bytes(config, specs)) // gpus,
            table_bytes(config),
            -(-cache_bytes(config, batch, context) // gpus),
            workspace_bytes(config, batch, context),
            LOGIT_BYTES * batch * config.vocab_size,
        )

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Plan:
    """One set of specs on GPUs of `memory` bytes.

    verdict  "fits"; "tight": by less than TIGHT of the memory; "no"
    longest  tokens a sequence that it holds without being tight, at most the model's positions; 0: not one
    needs    the least number of such GPUs that hold it without being tight, at most GPUS_MAX; None: more
    """

    need: Need
    memory: int
    verdict: str
    longest: int
    needs: int | None


def plan(config: MixtralConfig, specs: QuantSpecs, memory: int, batch: int, context: int, gpus: int = 1) -> Plan:
    """On `gpus` GPUs of `memory` bytes each, `batch` sequences of `context` tokens."""
    need, limit = Need.of(config, specs, batch, context, gpus), memory - math.ceil(memory * TIGHT)
    verdict = "fits" if need.total <= limit else "tight" if need.total <= memory else "no"
    lengths, counts = range(config.max_position_embeddings + 1), range(1, GPUS_MAX + 1)
    longest = bisect_right(lengths, limit, key=lambda S: Need.of(config, specs, batch, S, gpus).total) - 1
    needs = next((n for n in counts if Need.of(config, specs, batch, context, n).total <= limit), None)
    return Plan(need, memory, verdict, max(0, longest), needs)


@dataclass(frozen=True)
class Request:
    """A model, the specs of each of WEIGHT_FORMATS, and what STORED means for it."""

    name: str
    config: MixtralConfig
    specs: Mapping[str, QuantSpecs]
    stored: str
    batch: int
    context: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Request:
        """Read the model's config. ValueError for a wrong option."""
        name = str(args.model)
        known = KNOWN.get(name.lower())
        if known is None and "/" not in name and not Path(name).exists():
            raise FileNotFoundError(f"{name}: no such folder, needs one, a name on the hub, or {' or '.join(KNOWN)}")
        config = known or MixtralConfig.from_pretrained(name)
        limit = config.max_position_embeddings
        context = limit if args.context is None else args.context
        if config.num_hidden_layers > LAYERS_MAX:
            raise ValueError(f"{name}: num_hidden_layers is {config.num_hidden_layers}, needs at most {LAYERS_MAX}")
        if args.batch < 1:
            raise ValueError(f"--batch is {args.batch}, needs at least 1")
        if not 1 <= context <= limit:
            raise ValueError(f"--context is {context}, needs 1 to {limit}, the model's positions")
        if args.gpus is not None and not 1 <= args.gpus <= GPUS_MAX:
            raise ValueError(f"--gpus is {args.gpus}, needs 1 to {GPUS_MAX}")
        scheme = None if known else read_scheme(checkpoint_folder(name, tensors=False))
        if scheme is None:
            return cls(name, config, format_specs(config), SHORT[stored_dtype(config)], args.batch, context)
        specs = hub.plan(hub.read_headers(name), config).specs  # the files alone say which tensors are quantized
        return cls(name, config, {STORED: specs}, scheme.name, args.batch, context)

    def plans(self, gpu: GPU, gpus: int = 1) -> dict[str, Plan]:
        sizes = (gpu.bytes, self.batch, self.context, gpus)
        return {name: plan(self.config, specs, *sizes) for name, specs in self.specs.items()}

    def label(self, format: str) -> str:
        return self.stored if format == STORED else format

    @property
    def size(self) -> str:
        return f"{self.batch} {'sequence' if self.batch == 1 else 'sequences'} of {self.context:,} tokens"

    def as_dict(self) -> dict[str, Any]:
        total, active = parameters(self.config)
        counts = {"parameters": total, "active_parameters": active}
        return {"model": self.name, **counts, "batch": self.batch, "context": self.context}

    def sentence(self) -> str:
        total, active = parameters(self.config)
        return f"{self.name}: {total:,} parameters, {active:,} active a token; {self.size}."


def run(args: argparse.Namespace) -> int:
    """Run the command -> exit status: 1 where no format fits."""
    request, gpu, gpus = Request.of(args), select_gpu(args), args.gpus or 1
    if gpu is None and args.gpus is not None:
        raise ValueError("--gpus is given and there is no GPU here, needs --gpu, too")
    if gpu is None:
        return _run_all_gpus(request, args.json)
    plans = request.plans(gpu, gpus)
    sent = traffic(request.config, gpus, itemsize=stored_dtype(request.config).itemsize)
    if args.json:
        formats = []
        for name, one in plans.items():
            need = {**asdict(one.need), "total": one.need.total}
            answers = {"verdict": one.verdict, "longest_context": one.longest, "gpus_needed": one.needs}
            formats.append({"format": name, "weights": WEIGHT_FORMATS[name], "bytes": need, **answers})
        sizes = {"name": gpu.name, "bytes": gpu.bytes, "gpus": gpus}
        print(json.dumps({**request.as_dict(), "gpu": sizes, "sends_a_token": asdict(sent), "formats": formats}))
    else:
        _print(request, gpu, gpus, plans, sent)
    return 0 if any(one.verdict != "no" for one in plans.values()) else 1


def select_gpu(args: argparse.Namespace) -> GPU | None:
    """The one of the options, else the one at hand, by its driver; None where there is none."""
    if args.memory is not None:
        if args.gpu is not None:
            raise ValueError("--gpu is given, and --memory, too: needs one of the two")
        if not 1 <= args.memory < float("inf"):
            raise ValueError(f"--memory is {args.memory}, needs GiB, at least 1")
        return GPU("", f"{args.memory:g} GiB", int(args.memory * 1024))
    if args.gpu is not None:
        return find_gpu(args.gpu)
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return GPU("", properties.name, properties.total_memory // MIB)


def _print(request: Request, gpu: GPU, gpus: int, plans: dict[str, Plan], sent: Traffic) -> None:
    out, need = console(), plans[STORED].need
    parts = (f"{name} {decimal(getattr(need, name))}" for name in ("tables", "cache", "workspace", "logits"))
    out.print(Text(request.sentence()))
    out.print(f"Beside the weights: {', '.join(parts)}, and by estimate {decimal(need.overhead)} for driver and graph.")
    if gpus > 1:
        out.print(f"For each token a GPU sends {decimal(sent.layer)} a layer, and {decimal(sent.head)} of logits.")
    columns = [Column("format", number=False), *map(Column, ("weights", "in all", "used", "longest", "gpus", ""))]
    caption = "longest: tokens a sequence, and gpus: how many, with 2 % of the memory to spare; tight: less to spare. "
    table = Table(f"{gpus} x {gpu.name}: {gpu.mib:,} MiB", columns, f"{caption}{FORMAT_NOTE} {SEVERAL}")
    for name, one in plans.items():
        sizes = (decimal(one.need.weights), decimal(one.need.total), f"{100 * one.need.total / one.memory:.0f} %")
        longest = f"{one.longest:,}" if one.longest else "-"
        table.add(request.label(name), *sizes, longest, str(one.needs or "-"), one.verdict, style=COLOURS[one.verdict])
    out.print(table)
    fitting = [request.label(name) for name, one in plans.items() if one.verdict != "no"]
    verdict = "FITS: " + "; ".join(fitting) if fitting else "NO FORMAT FITS"
    out.print(Text(verdict, style="bold green" if fitting else "bold red"))


def _run_all_gpus(request: Request, as_json: bool) -> int:
    """How many of each listed GPU hold each format."""
    rows = [(gpu, {name: one.needs for name, one in request.plans(gpu).items()}) for gpu in GPUS.values()]
    if as_json:
        gpus = [{"name": gpu.name, "bytes": gpu.bytes, "gpus_needed": needs} for gpu, needs in rows]
        print(json.dumps({**request.as_dict(), "gpus": gpus}))
        return 0
    out = console()
    out.print(Text(request.sentence()))
    columns = [Column("gpu", number=False), Column("MiB"), *(Column(request.label(name)) for name in request.specs)]
    caption = f"-: more than {GPUS_MAX}. MiB: by its driver, of which 2 % stay free. {FORMAT_NOTE} {SEVERAL}"
    table = Table("How many GPUs hold it, by the format of its weights", columns, caption)
    for gpu, needs in rows:
        table.add(gpu.name, f"{gpu.mib:,}", *(str(n or "-") for n in needs.values()))
    out.print(table)
    return 0
