"""The command `fit`: which formats of a model fit a card, how long a text, and what would do otherwise."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from ..cards import CARDS, MIB, Card, named
from ..config import MixtralConfig
from ..fit import FORMATS, KNOWN, MOST_GPUS, Need, Plan, parameters, plan, smallest_card, stored_dtype, token_flops
from .tables import Column, Table, console

SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
FORMAT_NOTE = "fp8, int8, int4: of the experts' weights; linear: of attention and the head, too."
SEVERAL = "Weights and cache in even parts, the rest on each: several cards are an estimate, this runtime uses one."


def run(args: argparse.Namespace) -> int:
    """-> exit status: 1 where no format fits."""
    config = KNOWN.get(str(args.model).lower()) or MixtralConfig.from_pretrained(args.model)
    context = config.max_position_embeddings if args.context is None else args.context
    _check(args, config, context)
    chosen = _card(args)
    if chosen is None and args.gpus is not None:
        raise ValueError("--gpus is given and there is no GPU here, needs --gpu or --memory, too")
    head = _about(str(args.model), config, args.batch, context)
    out = console(stderr=args.json)
    if chosen is None:
        return _all_cards(head, config, args.json, out)
    gpus = args.gpus or 1
    plans = [plan(config, format, chosen.bytes, args.batch, context, gpus) for format in FORMATS]
    if args.json:
        card = {"name": chosen.name, "bytes": chosen.bytes, "gpus": gpus}
        print(json.dumps({**head, "card": card, "formats": [_as_dict(one) for one in plans]}))
    else:
        _print(out, head, config, chosen, gpus, plans)
    return 0 if any(one.verdict != "no" for one in plans) else 1


def _check(args: argparse.Namespace, config: MixtralConfig, context: int) -> None:
    limit = config.max_position_embeddings
    if args.batch < 1:
        raise ValueError(f"--batch is {args.batch}, needs at least 1")
    if not 1 <= context <= limit:
        raise ValueError(f"--context is {context}, needs 1 to {limit}, the model's positions")
    if args.gpus is not None and not 1 <= args.gpus <= MOST_GPUS:
        raise ValueError(f"--gpus is {args.gpus}, needs 1 to {MOST_GPUS}")
    if args.memory is not None and not 1 <= args.memory < float("inf"):
        raise ValueError(f"--memory is {args.memory}, needs GiB, at least 1")


def _card(args: argparse.Namespace) -> Card | None:
    """The one asked for, else the one at hand, by its driver; None where there is none."""
    if args.memory is not None:
        return Card(f"{args.memory:g} GiB", int(args.memory * 1024))
    if args.gpu is not None:
        return named(args.gpu)
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return Card(properties.name, properties.total_memory // MIB)


def _about(model: str, config: MixtralConfig, batch: int, context: int) -> dict[str, Any]:
    total, active = parameters(config)
    counts = {"parameters": total, "active_parameters": active, "flop_per_token": token_flops(config, context)}
    return {"model": model, **counts, "batch": batch, "context": context}


def _as_dict(one: Plan) -> dict[str, Any]:
    need = {**asdict(one.need), "total": one.need.total}
    answers = {"verdict": one.verdict, "longest_context": one.longest, "gpus_needed": one.needs}
    return {"format": one.format, "weights": one.weights, "bytes": need, **answers}


def _print(out: Console, head: dict[str, Any], config: MixtralConfig, card: Card, gpus: int, plans: list[Plan]) -> None:
    need = plans[0].need
    parts = {"tables": need.tables, "cache": need.cache, "workspace": need.workspace, "logits": need.logits}
    out.print(Text(_sentence(head)))
    out.print(
        f"Beside the weights: {', '.join(f'{name} {decimal(size)}' for name, size in parts.items())}, and by estimate "
        f"{decimal(need.overhead)} for the driver, a CUDA context and a graph."
    )
    columns = [Column("format", right=False), *map(Column, ("weights", "in all", "used", "longest", "cards"))]
    caption = "longest: tokens a sequence, and cards: how many, with 2 % of the memory to spare; tight: less to spare. "
    title = f"{gpus} x {card.name}: {card.mib:,} MiB"
    table = Table(title, [*columns, Column("", right=False)], f"{caption}{FORMAT_NOTE} {SEVERAL}")
    for one in plans:
        sizes = (decimal(one.need.weights), decimal(one.need.total), f"{100 * one.need.total / one.memory:.0f} %")
        longest = f"{one.longest:,}" if one.longest else "-"
        style = {"no": "red", "tight": "yellow", "fits": "green"}[one.verdict]
        table.add(_label(one.format, config), *sizes, longest, _cards(one.needs), one.verdict, style=style)
    out.print(table)
    fits = any(one.verdict != "no" for one in plans)
    text = _good(config, plans) if fits else _bad(head, config, card, plans)
    out.print(Text(text, style="bold green" if fits else "bold red"))


def _good(config: MixtralConfig, plans: list[Plan]) -> str:
    good = (one for one in plans if one.verdict != "no")
    return "FITS: " + "; ".join(_label(one.format, config) + " (tight)" * (one.verdict == "tight") for one in good)


def _bad(head: dict[str, Any], config: MixtralConfig, card: Card, plans: list[Plan]) -> str:
    """What takes the least, and what would do for it."""
    least = min(plans, key=lambda one: one.need.total)
    alone = smallest_card(Need.of(config, least.weights, head["batch"], head["context"]))
    would = [f"{least.needs} x {card.name}"] if least.needs else []
    would += [f"one {alone.name}"] if alone else []
    would += [f"a text of {least.longest:,} tokens"] if least.longest else []
    label, total = _label(least.format, config), decimal(least.need.total)
    return f"NO FORMAT FITS: {label} takes the least, {total}. What would do: {', or '.join(would) or 'no listed card'}"


def _all_cards(head: dict[str, Any], config: MixtralConfig, as_json: bool, out: Console) -> int:
    """How many of each listed card hold each format."""
    rows = [
        (card, {format: plan(config, format, card.bytes, head["batch"], head["context"]).needs for format in FORMATS})
        for card in CARDS
    ]
    if as_json:
        cards = [{"name": card.name, "bytes": card.bytes, "gpus_needed": needs} for card, needs in rows]
        print(json.dumps({**head, "cards": cards}))
        return 0
    out.print(Text(_sentence(head)))
    columns = [Column("card", right=False), Column("MiB"), *(Column(_label(format, config)) for format in FORMATS)]
    caption = f"-: more than {MOST_GPUS}. MiB: by its driver, of which 2 % stay free. {FORMAT_NOTE} {SEVERAL}"
    table = Table("How many cards hold it, by the format of its weights", columns, caption)
    for card, needs in rows:
        table.add(card.name, f"{card.mib:,}", *map(_cards, needs.values()))
    out.print(table)
    return 0


def _sentence(head: dict[str, Any]) -> str:
    sequences = "sequence" if head["batch"] == 1 else "sequences"
    total, active = (_scaled(head[name], "B") for name in ("parameters", "active_parameters"))
    return (
        f"{head['model']}: {total} parameters, {active} active a token; {head['batch']} {sequences} of "
        f"{head['context']:,} tokens, the last one of them {_scaled(head['flop_per_token'], 'G')}FLOP."
    )


def _scaled(count: int, billions: str) -> str:
    return f"{count / 1e9:.2f} {billions}" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _label(format: str, config: MixtralConfig) -> str:
    return SHORT[stored_dtype(config)] if FORMATS[format] is None else format


def _cards(count: int | None) -> str:
    return "-" if count is None else str(count)
