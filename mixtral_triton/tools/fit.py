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

from ..cache import KVCache
from ..config import MixtralConfig, checkpoint_folder
from ..inputs import WEIGHT_FORMATS, weight_bytes
from ..kernels.op import Cost
from ..kernels.record import record_launches
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
from ..model import Mixtral
from ..parallel import Traffic, traffic
from ..quantize import hub
from ..quantize.schemes import read_scheme
from ..quantize.spec import PARTS, QuantSpec, select_specs
from ..weights import parameter_shapes
from .gpus import GPU, GPUS, LINKS, MIB, data_sheet, find_gpu
from .predict import predict
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


def memory_need(config: MixtralConfig, specs: QuantSpecs, batch: int, context: int, gpus: int = 1) -> dict[str, int]:
    """Bytes of a model on one GPU, or on each of several, by what they hold, and "total".

    Several GPUs: weights and cache in even parts, as if those divided them; embedding and the rest on each.
    """
    embedding = config.vocab_size * config.hidden_size * stored_dtype(config).itemsize
    need = {
        "weights": embedding - (embedding - model_bytes(config, specs)) // gpus,
        "tables": table_bytes(config),
        "cache": -(-cache_bytes(config, batch, context) // gpus),
        "workspace": workspace_bytes(config, batch, context),
        "logits": LOGIT_BYTES * batch * config.vocab_size,
        "overhead": OVERHEAD,
    }
    return need | {"total": sum(need.values())}


@dataclass(frozen=True)
class Plan:
    """One set of specs on GPUs.

    need     see `memory_need`
    verdict  "fits"; "tight": by less than TIGHT of the memory; "no"
    longest  tokens a sequence that it holds without being tight, at most the model's positions; 0: not one
    needs    the least number of such GPUs that hold it without being tight, at most GPUS_MAX; None: more
    """

    need: dict[str, int]
    verdict: str
    longest: int
    needs: int | None


def usable_bytes(memory: int) -> int:
    return memory - math.ceil(memory * TIGHT)


def plan(config: MixtralConfig, specs: QuantSpecs, memory: int, batch: int, context: int, gpus: int = 1) -> Plan:
    """On `gpus` GPUs of `memory` bytes each, `batch` sequences of `context` tokens."""

    def total(S: int, n: int) -> int:
        return memory_need(config, specs, batch, S, n)["total"]

    need, limit = memory_need(config, specs, batch, context, gpus), usable_bytes(memory)
    verdict = "fits" if need["total"] <= limit else "tight" if need["total"] <= memory else "no"
    longest = bisect_right(range(config.max_position_embeddings + 1), limit, key=lambda S: total(S, gpus)) - 1
    needs = next((n for n in range(1, GPUS_MAX + 1) if total(context, n) <= limit), None)
    return Plan(need, verdict, max(0, longest), needs)


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
    def rates(self) -> list[str]:
        return [f"{each:,.{int(each < 10)}f}" for each in self.tokens_per_second]

    def __str__(self) -> str:
        speed = "-".join(dict.fromkeys(self.rates))
        speed = f"{speed} tokens/s predicted" if speed else "no prediction, the GPU's rates are unknown"
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
        limit, layers, gpus = config.max_position_embeddings, config.num_hidden_layers, args.gpus or 1
        context = limit if args.context is None else args.context
        host = math.inf if args.host_memory is None else args.host_memory * 2**30
        no_mesh = gpus == 1 or (args.host_memory is None and not args.link)
        for right, error in (
            (layers <= LAYERS_MAX, f"{name}: num_hidden_layers is {layers}, needs at most {LAYERS_MAX}"),
            (args.batch >= 1, f"--batch is {args.batch}, needs at least 1"),
            (1 <= context <= limit, f"--context is {context}, needs 1 to {limit}, the model's positions"),
            (args.gpus is None or 1 <= args.gpus <= GPUS_MAX, f"--gpus is {args.gpus}, needs 1 to {GPUS_MAX}"),
            (
                args.host_memory is None or 0 <= host < math.inf,
                f"--host-memory is {host / 2**30:g}, needs GiB, at least 0",
            ),
            (args.link in (None, *LINKS), f"--link is {args.link!r}, needs one of {', '.join(LINKS)}"),
            (no_mesh, f"--gpus is {gpus}, and a mesh takes no experts from host memory: needs 1"),
        ):
            if not right:
                raise ValueError(error)
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
        config, found, E = self.config, {}, self.config.num_local_experts
        folder = "FOLDER" if self.name.lower() in KNOWN else self.name
        for name in (name for name, one in plans.items() if one.verdict == "no"):
            each = offloaded_bytes(parameter_shapes(config), self.specs[name], stored_dtype(config))
            experts = experts_to_offload(config, plans[name].need["total"], usable_bytes(gpu.bytes), each)
            if experts < E and experts * each <= self.host_memory:
                speed = self.speed(gpu, self.specs[name], experts) if gpu.chip else ()
                formats = WEIGHT_FORMATS[name] or ""
                if isinstance(formats, dict):
                    formats = ",".join(f"{part}={format}" for part, format in formats.items())
                option = f" --weights {formats}" if formats else ""
                command = f"mixtral-triton generate {folder}{option} --offload {experts}"
                found[name] = Offload(experts, E, experts * each, gpu.link, speed, command)
        return found

    def speed(self, gpu: GPU, specs: QuantSpecs, offload: int) -> tuple[float, float]:
        """Predict tokens/s, cautious and optimistic, by the times of a decode step of one layer and of two."""
        dtype, E, times = stored_dtype(self.config), self.config.num_local_experts, []
        token = torch.empty(self.batch, 1, dtype=torch.int64, device="meta")
        for L in (1, 2):
            config = replace(self.config, num_hidden_layers=L)
            model = Mixtral(config, "meta", dtype, specs=specs, on_host=[range(E - offload, E)] * L)
            cache = KVCache(config, self.batch, self.context, "meta", dtype)
            with record_launches(gpu.arch) as launches, torch.no_grad():
                model.head(model.hidden(token, cache)[:, -1])
            found = predict(launches, gpu, Cost(0, 0))
            times.append((found.cautious, found.seconds))
        more = self.config.num_hidden_layers - 1
        cautious, optimistic = (self.batch / (one + more * (two - one)) for one, two in zip(*times, strict=True))
        return cautious, optimistic

    def label(self, format: str) -> str:
        return self.stored if format == STORED else format

    def as_dict(self) -> dict[str, Any]:
        total, active = parameters(self.config)
        counts = {"parameters": total, "active_parameters": active}
        return {"model": self.name, **counts, "batch": self.batch, "context": self.context}

    def __str__(self) -> str:
        total, active = parameters(self.config)
        size = f"{self.batch} {'sequence' if self.batch == 1 else 'sequences'} of {self.context:,} tokens"
        return f"{self.name}: {total:,} parameters, {active:,} active a token; {size}."


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
            answers = {"verdict": one.verdict, "longest_context": one.longest, "gpus_needed": one.needs}
            format = {"format": name, "weights": WEIGHT_FORMATS[name], "bytes": one.need}
            formats.append({**format, **answers, "offload": offloads.get(name)})
        sizes = {"name": gpu.name, "bytes": gpu.bytes, "gpus": gpus}
        found = {**request.as_dict(), "gpu": sizes, "sends_a_token": sent, "formats": formats}
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
    parts = (f"{name} {decimal(need[name])}" for name in ("tables", "cache", "workspace", "logits"))
    out.print(Text(str(request)))
    out.print(f"Beside the weights: {', '.join(parts)}, and by estimate {decimal(OVERHEAD)} for driver and graph.")
    if gpus > 1:
        out.print(f"For each token a GPU sends {decimal(sent.layer)} a layer, and {decimal(sent.head)} of logits.")
    columns = [Column("format", number=False), *map(Column, ("weights", "in all", "used", "longest", "gpus", ""))]
    caption = "longest: tokens a sequence, and gpus: how many, with 2 % of the memory to spare; tight: less to spare. "
    table = Table(f"{gpus} x {gpu.name}: {gpu.mib:,} MiB", columns, f"{caption}{FORMAT_NOTE} {SEVERAL}")
    for name, one in plans.items():
        total = one.need["total"]
        sizes = (decimal(one.need["weights"]), decimal(total), f"{100 * total / gpu.bytes:.0f} %")
        longest = f"{one.longest:,}" if one.longest else "-"
        table.add(request.label(name), *sizes, longest, str(one.needs or "-"), one.verdict, style=COLOURS[one.verdict])
    out.print(table)
    for name, offload in offloads.items():
        out.print(Text(f"{request.label(name)}, {offload}"))
    fitting = [request.label(name) for name, one in plans.items() if one.verdict != "no"]
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
    formats = [Column(request.label(name)) for name in request.specs]
    caption = f"-: more than {GPUS_MAX}. MiB: by its driver, of which 2 % stay free. {FORMAT_NOTE} {SEVERAL}"
    first, title = Column("gpu", number=False), "How many GPUs hold it, by the format of its weights"
    table = Table(title, [first, Column("MiB"), *formats], caption)
    title = "What one GPU holds with experts in host memory"
    offloaded = Table(title, [first, Column("link", number=False), *formats], OFFLOADED)
    for gpu, needs, offloads in rows:
        table.add(gpu.name, f"{gpu.mib:,}", *(str(n or "-") for n in needs.values()))
        cells = (f"{one.experts}: {(one.rates or '?')[-1]}" if one else "-" for one in map(offloads.get, needs))
        if offloads:
            offloaded.add(gpu.name, gpu.link, *cells)
    console().print(Text(str(request)), table, offloaded, sep="\n")
    return 0
