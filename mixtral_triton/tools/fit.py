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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.filesize import decimal
from rich.text import Text

from ..config import MixtralConfig, checkpoint_folder
from ..inputs import WEIGHT_FORMATS, weight_bytes
from ..load import (
    LOGIT_BYTES,
    OVERHEAD,
    TIGHT,
    cache_bytes,
    experts_to_offload,
    offloaded_bytes,
    stored_dtype,
    table_bytes,
    workspace_bytes,
)
from ..parallel import Traffic, traffic
from ..quantize import hub
from ..quantize.schemes import read_scheme
from ..quantize.spec import PARTS, QuantSpec, select_specs
from ..weights import parameter_shapes
from .gpus import GPU, GPUS, LINKS, MIB, data_sheet, find_gpu
from .predict import predict_forward
from .terminal import Column, Table, console

# mistralai/Mixtral-8x7B-v0.1 and mistralai/Mixtral-8x22B-Instruct-v0.1, by their config.json
SAME: dict[str, Any] = {"rope_theta": 1e6, "dtype": "bfloat16"}
LARGER: dict[str, Any] = {"vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384, **SAME}
LARGER |= {"num_hidden_layers": 56, "num_attention_heads": 48, "max_position_embeddings": 65536}
KNOWN = {"mixtral-8x7b": MixtralConfig(**SAME), "mixtral-8x22b": MixtralConfig(**LARGER)}
LAYERS_MAX = 10_000  # a config with more is broken, and its parameters take too long to list
GPUS_MAX = 16
QuantSpecs = Mapping[str, QuantSpec]  # of the parameters that are quantized, by name
STORED = "as stored"
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FORMAT_NOTE = "fp8, int8, int4: of the experts' weights; linear: of attention and the head, too."
OFFLOADED = "Experts of each layer in host memory: tokens/s, by an optimistic prediction, not measured. "
OFFLOADED += "?: no rates are known. -: the GPU holds all experts, or not even one."
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


def model_bytes(config: MixtralConfig, specs: QuantSpecs, dtype: torch.dtype | None = None) -> int:
    """Bytes of all parameters; `dtype`: of those that are not quantized, None: as stored."""
    return weight_bytes(parameter_shapes(config), specs, dtype or stored_dtype(config))


def parameters(config: MixtralConfig) -> tuple[int, int]:
    """How many there are, and how many a token meets: K of E experts."""
    counts = {name: math.prod(shape) for name, shape in parameter_shapes(config).items()}
    experts = sum(count for name, count in counts.items() if name.endswith(PARTS["experts"]))
    total = sum(counts.values())
    return total, total - experts + experts * config.num_experts_per_tok // config.num_local_experts


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
class Offload:
    """The fewest experts of each layer in host memory with which one GPU holds a format without being tight.

    tokens_per_second  cautious and optimistic: a prediction; () for a GPU whose rates are unknown
    """

    experts: int
    of: int
    host_bytes: int
    link: str
    tokens_per_second: tuple[float, ...]
    command: str

    @property
    def speed(self) -> str:
        return "-".join(dict.fromkeys(f"{each:,.{int(each < 10)}f}" for each in self.tokens_per_second))

    def __str__(self) -> str:
        speed = f"{self.speed} tokens/s predicted" if self.speed else "no prediction, the GPU's rates are unknown"
        return f"{self.experts} of {self.of} offloaded: {speed} ({decimal(self.host_bytes)} across {self.link})"


@dataclass(frozen=True)
class Request:
    """A model, the specs of each of WEIGHT_FORMATS, and what STORED means for it."""

    name: str
    config: MixtralConfig
    specs: Mapping[str, QuantSpecs]
    stored: str
    batch: int
    context: int
    host_memory: float  # bytes

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
        host = math.inf if args.host_memory is None else args.host_memory * 2**30
        if args.host_memory is not None and not 0 <= host < math.inf:
            raise ValueError(f"--host-memory is {args.host_memory:g}, needs GiB, at least 0")
        if args.link not in (None, *LINKS):
            raise ValueError(f"--link is {args.link!r}, needs one of {', '.join(LINKS)}")
        if (args.gpus or 1) > 1 and (args.host_memory is not None or args.link):
            raise ValueError(f"--gpus is {args.gpus}, and a mesh takes no experts from host memory: needs 1")
        scheme = None if known else read_scheme(checkpoint_folder(name, tensors=False))
        if scheme is None:
            return cls(name, config, format_specs(config), SHORT[stored_dtype(config)], args.batch, context, host)
        specs = hub.plan(hub.read_headers(name), config).specs  # the files alone say which tensors are quantized
        return cls(name, config, {STORED: specs}, scheme.name, args.batch, context, host)

    def plans(self, gpu: GPU, gpus: int = 1) -> dict[str, Plan]:
        sizes = (gpu.bytes, self.batch, self.context, gpus)
        return {name: plan(self.config, specs, *sizes) for name, specs in self.specs.items()}

    def offloads(self, gpu: GPU, plans: Mapping[str, Plan]) -> dict[str, Offload]:
        """Of the formats that `gpu` does not hold, by name, those that it holds with experts in host memory."""
        config, dtype, found = self.config, stored_dtype(self.config), {}
        E, limit = config.num_local_experts, gpu.bytes - math.ceil(gpu.bytes * TIGHT)
        for name in (name for name, one in plans.items() if one.verdict == "no"):
            specs = self.specs[name]
            each = offloaded_bytes(parameter_shapes(config), specs, dtype)
            experts = experts_to_offload(config, plans[name].need.total, limit, each)
            if experts < E and experts * each <= self.host_memory:
                speed = self.speed(gpu, specs, experts) if gpu.chip else ()
                found[name] = Offload(experts, E, experts * each, gpu.link, speed, self.command(name, experts))
        return found

    def speed(self, gpu: GPU, specs: QuantSpecs, offload: int) -> tuple[float, float]:
        """Predict tokens/s, cautious and optimistic, by the times of one layer and of two."""
        sizes = (specs, gpu, self.batch, 1, self.context, offload)
        one, two = (predict_forward(replace(self.config, num_hidden_layers=L), *sizes) for L in (1, 2))
        more = self.config.num_hidden_layers - 1
        ends = (one.cautious, two.cautious), (one.seconds, two.seconds)
        cautious, optimistic = (self.batch / (time + more * (longer - time)) for time, longer in ends)
        return cautious, optimistic

    def command(self, format: str, offload: int) -> str:
        formats = WEIGHT_FORMATS[format]
        weights = ",".join(f"{part}={each}" for part, each in formats.items()) if isinstance(formats, dict) else formats
        folder = "FOLDER" if self.name.lower() in KNOWN else self.name
        return f"mixtral-triton generate {folder}{f' --weights {weights}' if weights else ''} --offload {offload}"

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
        return _run_all_gpus(request, args)
    plans = request.plans(gpu, gpus)
    offloads = request.offloads(gpu, plans) if gpus == 1 else {}
    fits = any(one.verdict != "no" for one in plans.values())
    if not fits and not offloads and (more := replace(request, host_memory=math.inf).offloads(gpu, plans)):
        name, least = min(more.items(), key=lambda item: item[1].host_bytes)
        needed = f"{name} with {least.experts} of {least.of} experts offloaded needs {decimal(least.host_bytes)}"
        raise ValueError(f"--host-memory is {decimal(int(request.host_memory))}, and {needed}")
    sent = traffic(request.config, gpus, itemsize=stored_dtype(request.config).itemsize)
    if args.json:
        formats = []
        for name, one in plans.items():
            need = {**asdict(one.need), "total": one.need.total}
            answers: dict[str, Any] = {"verdict": one.verdict, "longest_context": one.longest, "gpus_needed": one.needs}
            answers |= {"offload": offloads.get(name)}
            formats.append({"format": name, "weights": WEIGHT_FORMATS[name], "bytes": need, **answers})
        sizes = {"name": gpu.name, "bytes": gpu.bytes, "gpus": gpus}
        found = {**request.as_dict(), "gpu": sizes, "sends_a_token": asdict(sent), "formats": formats}
        print(json.dumps(found, default=asdict))
    else:
        _print(request, gpu, gpus, plans, sent, offloads)
    return 0 if fits else 1


def select_gpu(args: argparse.Namespace) -> GPU | None:
    """The one of the options, else the one at hand, by its driver; None where there is none."""
    link = {"link": args.link} if args.link else {}
    if args.memory is not None:
        if args.gpu is not None:
            raise ValueError("--gpu is given, and --memory, too: needs one of the two")
        if not 1 <= args.memory < float("inf"):
            raise ValueError(f"--memory is {args.memory}, needs GiB, at least 1")
        return GPU("", f"{args.memory:g} GiB", int(args.memory * 1024), **link)
    if args.gpu is not None:
        return replace(find_gpu(args.gpu), **link)
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    gpu = data_sheet(properties.name) or GPU("", "")
    return replace(gpu, name=properties.name, mib=properties.total_memory // MIB, **link)


def _print(
    request: Request, gpu: GPU, gpus: int, plans: dict[str, Plan], sent: Traffic, offloads: dict[str, Offload]
) -> None:
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
    for name, offload in offloads.items():
        out.print(Text(f"{request.label(name)}, {offload}"))
    verdict = "FITS: " + "; ".join(fitting) if fitting else "NO FORMAT FITS"
    out.print(Text(verdict, style="bold green" if fitting else "bold red"))
    if offloads and not fitting:
        best = max(offloads.values(), key=lambda one: (one.tokens_per_second, -one.host_bytes))
        out.print(Text(f"With experts in host memory: {best.command}"), soft_wrap=True)


def _run_all_gpus(request: Request, args: argparse.Namespace) -> int:
    """How many of each listed GPU hold each format, and what one of them holds with experts in host memory."""
    rows = []
    for gpu in GPUS.values():
        gpu, plans = replace(gpu, link=args.link or gpu.link), request.plans(gpu)
        rows.append((gpu, {name: one.needs for name, one in plans.items()}, request.offloads(gpu, plans)))
    if args.json:
        gpus = [{"name": g.name, "bytes": g.bytes, "gpus_needed": needs, "offload": one} for g, needs, one in rows]
        print(json.dumps({**request.as_dict(), "gpus": gpus}, default=asdict))
        return 0
    out = console()
    out.print(Text(request.sentence()))
    columns = [Column("gpu", number=False), Column("MiB"), *(Column(request.label(name)) for name in request.specs)]
    caption = f"-: more than {GPUS_MAX}. MiB: by its driver, of which 2 % stay free. {FORMAT_NOTE} {SEVERAL}"
    table = Table("How many GPUs hold it, by the format of its weights", columns, caption)
    columns[1] = Column("link", number=False)
    offloaded = Table("What one GPU holds with experts in host memory", columns, OFFLOADED)
    for gpu, needs, offloads in rows:
        table.add(gpu.name, f"{gpu.mib:,}", *(str(n or "-") for n in needs.values()))
        cells = [offloads.get(name) for name in needs]
        shown = (f"{one.experts}: {one.speed.split('-')[-1] or '?'}" if one else "-" for one in cells)
        if any(cells):
            offloaded.add(gpu.name, gpu.link, *shown)
    out.print(table)
    out.print(offloaded)
    return 0
