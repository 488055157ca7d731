"""`fit --scaling`: what a model gains from more GPUs, on paper, by tensor and by expert parallel."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from .gpus import GPU
from .scaling import AS_FAST, NODE, PAYS, Split, Step, batch_most, ep_from, known, splits, tp_pays_to
from .tables import Column, Table

CAPTION = (
    "Predicted by data sheets, not measured. Decode: one token for each sequence; prefill: the last chunk of a prompt. "
    f"sent: the share of the time in which the ranks wait for each other. Up to {NODE} GPUs are one node."
)


@dataclass(frozen=True)
class Answers:
    """What the table says in words.

    pays_to  GPUs up to which "tp" pays
    ep_from  the least batch from which "ep" is as fast as "tp" in a decode step of `GPUs` GPUs
    most     sequences that those hold, and the best split for all of them
    """

    gpus: int
    pays_to: int
    ep_from: int | None
    most: int
    full: Split | None

    def as_dict(self) -> dict[str, Any]:
        most = {"gpus": self.gpus, "batch": self.most, "split": None if self.full is None else _as_dict(self.full)}
        return {"tp_pays_to_gpus": self.pays_to, "ep_from_batch": self.ep_from, "most": most}


def run(asked: Any, format: str, gpu: GPU, as_json: bool, out: Console) -> int:
    """`asked`: a model, its forms, batch and context (tools/fit_command.py) -> exit status: 1 where no number of GPUs holds
    it."""
    if format not in asked.specs:
        raise ValueError(f"--scaling is {format!r}, needs one of {', '.join(asked.specs)}")
    sheet, link = known(gpu.names)
    config, specs, batch, context = asked.config, asked.specs[format], asked.batch, asked.context
    found = list(splits(config, specs, sheet, link, batch, context))
    fitting = [split for split in found if split.need.total <= gpu.bytes]
    gpus = NODE if any(split.gpus == NODE for split in found) else max(split.gpus for split in found)
    most = batch_most(config, specs, gpu.bytes, context, gpus)
    full = list(splits(config, specs, sheet, link, most, context, (gpus,))) if most else []
    fastest = min((split.decode.seconds for split in full), default=0.0)
    best = next((split for split in full if split.decode.seconds <= AS_FAST * fastest), None)  # most of "tp" first
    answers = Answers(gpus, tp_pays_to(found), ep_from(config, specs, sheet, link, context, gpus), most, best)
    if as_json:
        rows = [{**_as_dict(split), "fits": split in fitting} for split in found]
        told = {"format": format, "gpu": gpu.name, "splits": rows, **answers.as_dict()}
        print(json.dumps({**asked.counts(), **told, "predicted": True}))
    else:
        out.print(_table(asked, format, gpu, found))
        out.print(Text(_words(answers, context)))
    return 0 if fitting else 1


def _as_dict(split: Split) -> dict[str, Any]:
    def told(step: Step) -> dict[str, float]:
        return {"time_us": step.seconds * 1e6, "sending_us": step.sending * 1e6}

    sizes = {"gpus": split.gpus, "tp": split.tp, "ep": split.ep, "batch": split.batch, "chunk": split.chunk}
    rates = {"tokens_per_second": split.tokens_per_second, "prefill_tokens_per_second": split.prefill_tokens_per_second}
    return {**sizes, "bytes": split.need.total, "decode": told(split.decode), "prefill": told(split.prefill), **rates}


def _table(asked: Any, format: str, gpu: GPU, found: Sequence[Split]) -> Table:
    size = f"{asked.batch} {'sequence' if asked.batch == 1 else 'sequences'} of {asked.context:,} tokens"
    title = f"{asked.name}, {asked.label(format)}, on {gpu.name}, predicted: {size}"
    columns = [Column("gpus"), Column("tp"), Column("ep"), Column("decode, ms"), Column("sent"), Column("tokens/s")]
    columns += [Column("prefill, ms"), Column("sent"), Column("tokens/s"), Column("", right=False)]
    table = Table(title, columns, CAPTION)
    for split in found:
        times = (
            *_cells(split.decode, split.tokens_per_second),
            *_cells(split.prefill, split.prefill_tokens_per_second),
        )
        fits = split.need.total <= gpu.bytes
        numbers = (str(split.gpus), str(split.tp), str(split.ep))
        table.add(*numbers, *times, "" if fits else "does not fit", style="" if fits else "dim")
    return table


def _cells(step: Step, rate: float) -> tuple[str, str, str]:
    return f"{step.seconds * 1e3:,.2f}", f"{100 * step.sending / step.seconds:.0f} %", f"{rate:,.0f}"


def _words(answers: Answers, context: int) -> str:
    tp = f"Split by tp alone, twice the GPUs make a decode step {PAYS} times as fast up to {answers.pays_to} GPUs."
    start = f"from a batch of {answers.ep_from} on" if answers.ep_from else "at no batch"
    ep = f"On {answers.gpus} GPUs ep is as fast as tp {start}."
    if answers.full is None:
        return f"{tp} {ep} They do not hold one sequence of {context:,} tokens."
    full = answers.full
    most = f"They hold {answers.most} sequences of {context:,} tokens: {full.tokens_per_second:,.0f} tokens/s in all"
    return f"{tp} {ep} {most}, by tp {full.tp} x ep {full.ep}."
