"""The command `fit`: which formats of a model fit a GPU, how long a text, and what would do otherwise."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from ..config import MixtralConfig
from ..parallel import Traffic, traffic
from ..quantize import hub
from ..quantize.schemes import read_scheme
from ..weights import read_headers
from . import scaling_command as scaling
from .fit import (
    FORMATS,
    KNOWN,
    MOST_GPUS,
    MOST_LAYERS,
    STORED,
    Plan,
    QuantSpecs,
    format_options,
    parameters,
    plan,
    smallest_gpu,
    stored_dtype,
    token_flops,
)
from .gpus import GPU, GPUS, MIB, named
from .tables import Column, Table, console

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FORMAT_NOTE = "fp8, int8, int4: of the experts' weights; linear: of attention and the head, too."
SEVERAL = "Several GPUs: weights and cache in even parts, the rest on each, by estimate; see docs/scaling.md."
COLOURS = {"no": "red", "tight": "yellow", "fits": "green"}


@dataclass(frozen=True)
class Asked:
    """A model, the forms that its weights can have, by the names of FORMATS, and what STORED stands for."""

    name: str
    config: MixtralConfig
    specs: Mapping[str, QuantSpecs]
    stored: str
    batch: int
    context: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Asked:
        name = str(args.model)
        known = KNOWN.get(name.lower())
        config = known or MixtralConfig.from_pretrained(name)
        if config.num_hidden_layers > MOST_LAYERS:
            raise ValueError(f"{name}: num_hidden_layers is {config.num_hidden_layers}, needs at most {MOST_LAYERS}")
        scheme = None if known else read_scheme(Path(name))
        if scheme is None:
            specs, stored = format_options(config), SHORT[stored_dtype(config)]
        else:  # which of its tensors are quantized, the files alone tell
            specs, stored = {STORED: hub.plan(read_headers(name), config).specs}, scheme.name
        context = config.max_position_embeddings if args.context is None else args.context
        return cls(name, config, specs, stored, args.batch, context)

    def plans(self, gpu: GPU, gpus: int = 1) -> dict[str, Plan]:
        sizes = (gpu.bytes, self.batch, self.context, gpus)
        return {name: plan(self.config, specs, *sizes) for name, specs in self.specs.items()}

    def sent(self, gpus: int) -> Traffic:
        """Bytes that each of so many GPUs sends for a token."""
        return traffic(self.config, gpus, itemsize=stored_dtype(self.config).itemsize)

    def label(self, format: str) -> str:
        return self.stored if format == STORED else format

    def counts(self) -> dict[str, Any]:
        total, active = parameters(self.config)
        flops = token_flops(self.config, self.context)
        counts = {"parameters": total, "active_parameters": active, "flop_per_token": flops}
        return {"model": self.name, **counts, "batch": self.batch, "context": self.context}

    def sentence(self) -> str:
        total, active = (_scaled(count, "B") for count in parameters(self.config))
        return (
            f"{self.name}: {total} parameters, {active} active a token; {self.batch} "
            f"{'sequence' if self.batch == 1 else 'sequences'} of {self.context:,} tokens, the last one of them "
            f"{_scaled(token_flops(self.config, self.context), 'G')}FLOP."
        )


def run(args: argparse.Namespace) -> int:
    """-> exit status: 1 where no format fits."""
    asked = Asked.of(args)
    _check(args, asked)
    gpu = _gpu(args)
    if gpu is None and args.gpus is not None:
        raise ValueError("--gpus is given and there is no GPU here, needs --gpu or --memory, too")
    out = console(stderr=args.json)
    if args.scaling is not None and gpu is None:
        raise ValueError("--scaling is given and there is no GPU here, needs --gpu, too")
    if gpu is None:
        return _all_gpus(asked, args.json, out)
    if args.scaling is not None:
        return scaling.run(asked, args.scaling or STORED, gpu, args.json, out)
    gpus = args.gpus or 1
    plans = asked.plans(gpu, gpus)
    if args.json:
        told = {"name": gpu.name, "bytes": gpu.bytes, "gpus": gpus}
        formats = [_as_dict(name, one) for name, one in plans.items()]
        sent = asdict(asked.sent(gpus))
        print(json.dumps({**asked.counts(), "gpu": told, "sends_a_token": sent, "formats": formats}))
    else:
        _print(out, asked, gpu, gpus, plans)
    return 0 if any(one.verdict != "no" for one in plans.values()) else 1


def _check(args: argparse.Namespace, asked: Asked) -> None:
    limit = asked.config.max_position_embeddings
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}, needs at least 1")
    if not 1 <= asked.context <= limit:
        raise ValueError(f"--context is {asked.context}, needs 1 to {limit}, the model's positions")
    if args.gpus is not None and not 1 <= args.gpus <= MOST_GPUS:
        raise ValueError(f"--gpus is {args.gpus}, needs 1 to {MOST_GPUS}")
    if args.memory is not None and not 1 <= args.memory < float("inf"):
        raise ValueError(f"--memory is {args.memory}, needs GiB, at least 1")


def _gpu(args: argparse.Namespace) -> GPU | None:
    """The one asked for, else the one at hand, by its driver; None where there is none."""
    if args.memory is not None:
        return GPU(f"{args.memory:g} GiB", int(args.memory * 1024))
    if args.gpu is not None:
        return named(args.gpu)
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return GPU(properties.name, properties.total_memory // MIB)


def _as_dict(format: str, one: Plan) -> dict[str, Any]:
    need = {**asdict(one.need), "total": one.need.total}
    answers = {"verdict": one.verdict, "longest_context": one.longest, "gpus_needed": one.needs}
    return {"format": format, "weights": FORMATS[format], "bytes": need, **answers}


def _print(out: Console, asked: Asked, gpu: GPU, gpus: int, plans: dict[str, Plan]) -> None:
    need = plans[STORED].need
    parts = {"tables": need.tables, "cache": need.cache, "workspace": need.workspace, "logits": need.logits}
    out.print(Text(asked.sentence()))
    out.print(
        f"Beside the weights: {', '.join(f'{name} {decimal(size)}' for name, size in parts.items())}, and by estimate "
        f"{decimal(need.overhead)} for the driver, a CUDA context and a graph."
    )
    if gpus > 1:
        sent = asked.sent(gpus)
        out.print(f"For each token a GPU sends {decimal(sent.layer)} a layer, and {decimal(sent.head)} of logits.")
    columns = [Column("format", right=False), *map(Column, ("weights", "in all", "used", "longest", "gpus"))]
    caption = "longest: tokens a sequence, and GPUs: how many, with 2 % of the memory to spare; tight: less to spare. "
    title = f"{gpus} x {gpu.name}: {gpu.mib:,} MiB"
    table = Table(title, [*columns, Column("", right=False)], f"{caption}{FORMAT_NOTE} {SEVERAL}")
    for name, one in plans.items():
        sizes = (decimal(one.need.weights), decimal(one.need.total), f"{100 * one.need.total / one.memory:.0f} %")
        longest = f"{one.longest:,}" if one.longest else "-"
        table.add(asked.label(name), *sizes, longest, _gpus(one.needs), one.verdict, style=COLOURS[one.verdict])
    out.print(table)
    fits = any(one.verdict != "no" for one in plans.values())
    text = _good(asked, plans) if fits else _bad(asked, gpu, plans)
    out.print(Text(text, style="bold green" if fits else "bold red"))


def _good(asked: Asked, plans: dict[str, Plan]) -> str:
    good = {name: one.verdict for name, one in plans.items() if one.verdict != "no"}
    return "FITS: " + "; ".join(asked.label(name) + " (tight)" * (word == "tight") for name, word in good.items())


def _bad(asked: Asked, gpu: GPU, plans: dict[str, Plan]) -> str:
    """What takes the least, and what would do for it."""
    name, least = min(plans.items(), key=lambda item: item[1].need.total)
    alone = smallest_gpu(asked.config, asked.specs[name], asked.batch, asked.context)
    would = [f"{least.needs} x {gpu.name}"] if least.needs else []
    would += [f"one {alone.name}"] if alone else []
    would += [f"a text of {least.longest:,} tokens"] if least.longest else []
    total = decimal(least.need.total)
    what = ", or ".join(would) or "no listed GPU"
    return f"NO FORMAT FITS: {asked.label(name)} takes the least, {total}. What would do: {what}"


def _all_gpus(asked: Asked, as_json: bool, out: Console) -> int:
    """How many of each listed GPU hold each format."""
    rows = [(gpu, {name: one.needs for name, one in asked.plans(gpu).items()}) for gpu in GPUS]
    if as_json:
        gpus = [{"name": gpu.name, "bytes": gpu.bytes, "gpus_needed": needs} for gpu, needs in rows]
        print(json.dumps({**asked.counts(), "gpus": gpus}))
        return 0
    out.print(Text(asked.sentence()))
    columns = [Column("gpu", right=False), Column("MiB"), *(Column(asked.label(name)) for name in asked.specs)]
    caption = f"-: more than {MOST_GPUS}. MiB: by its driver, of which 2 % stay free. {FORMAT_NOTE} {SEVERAL}"
    table = Table("How many GPUs hold it, by the format of its weights", columns, caption)
    for gpu, needs in rows:
        table.add(gpu.name, f"{gpu.mib:,}", *map(_gpus, needs.values()))
    out.print(table)
    return 0


def _scaled(count: int, billions: str) -> str:
    return f"{count / 1e9:.2f} {billions}" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _gpus(count: int | None) -> str:
    return "-" if count is None else str(count)
