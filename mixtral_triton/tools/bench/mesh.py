"""`bench decode_step` under torchrun: one step of a model on a mesh, measured on its slowest rank, beside what the cost
model predicts of the split. Without GPUs, what is predicted."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ...config import MixtralConfig
from ...parallel import Ranks
from ..gpus import GPU, RATED, data_sheet
from ..processes import is_first
from ..scaling import Step, step
from ..terminal import Column, Table, console
from . import decode_step
from .cases import Case, cases
from .measure import DEFAULT_GPU
from .report import PREDICTED, micro, sizes_text
from .timing import StepTimer

ROUNDS, RUNS = 3, 20  # the same on every rank: they wait for each other in each step
WITHOUT = ("peer", "plot", "model", "quick", "first", "without")  # options that this has no use for


@dataclass(frozen=True)
class Row:
    """A case on the mesh: predicted for a GPU with known links, measured where there are GPUs."""

    case: Case
    predicted: Step | None
    seconds: float | None

    def as_dict(self) -> dict[str, Any]:
        told = self.predicted
        predicted = None if told is None else {"time_us": told.seconds * 1e6, "sending_us": told.sending * 1e6}
        time = None if self.seconds is None else self.seconds * 1e6
        return {
            "kind": "row",
            "op": "decode_step",
            "sizes": self.case.as_dict(),
            "time_us": time,
            "predicted": predicted,
        }


def run(args: argparse.Namespace, mesh: Any) -> int:
    """On every rank -> exit status; the first one prints."""
    if args.ops not in ([], ["decode_step"]):
        raise ValueError(f"bench: on a mesh it times decode_step, and got {' '.join(args.ops)}")
    if given := [name for name in WITHOUT if getattr(args, name)]:
        raise ValueError(f"--{given[0]} is given, and a mesh has no use for it")
    linked = [key for key, gpu in RATED.items() if gpu.link is not None]
    if args.gpu is not None and args.gpu not in linked:
        raise ValueError(f"--gpu is {args.gpu!r}, needs one of {', '.join(linked)}: of others no links are known")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    ranks = Ranks(mesh)
    measuring = mesh.device_type == "cuda" and args.gpu is None
    gpu = _gpu(args.gpu, measuring)
    rows = []
    for case in cases(["decode_step"], False, args.at, args.sizes, dtype, None):
        with ranks.raise_on_any_rank():
            config = _config(case, ranks)
        rows.append(Row(case, predicted(case, config, ranks, gpu), measured(case, ranks) if measuring else None))
    if is_first():
        _print(args.json, rows, ranks, gpu)
    return 0


def _gpu(name: str | None, measuring: bool) -> GPU | None:
    """The requested GPU, the one at hand if its links are known, or the default one."""
    if not measuring:
        return RATED[name or DEFAULT_GPU]
    sheet = data_sheet(torch.cuda.get_device_properties(torch.cuda.current_device()).name)
    return sheet if sheet is not None and sheet.link is not None else None


def _config(case: Case, ranks: Ranks) -> MixtralConfig:
    """The model's; ValueError where the ranks do not divide it."""
    config = replace(decode_step.config(case.sizes), dtype=case.dtype_name)
    ranks.shard.check(config)
    return config


def predicted(case: Case, config: MixtralConfig, ranks: Ranks, gpu: GPU | None) -> Step | None:
    if gpu is None:
        return None
    return step(config, {}, ranks.shard, gpu, case.sizes["B"], 1, case.sizes["S"])


def measured(case: Case, ranks: Ranks) -> float:
    """Mean seconds of a step in a row of them, as a decode loop runs it: the median of ROUNDS, on the slowest rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)  # the same gate on all ranks
    with torch.no_grad(), device:
        args = decode_step.inputs(case.sizes, case.dtype, device, generator, ranks)
        once = decode_step.replayed_step(args)
        timer = StepTimer(device)
        timer.row(once, ROUNDS)
        own = statistics.median(timer.row(once, RUNS) for _ in range(ROUNDS))
    return max(ranks.all_gather_object(own))


def _print(as_json: bool, rows: Sequence[Row], ranks: Ranks, gpu: GPU | None) -> None:
    shard = ranks.shard
    name = "a GPU without known links" if gpu is None else gpu.name
    if as_json:
        print(json.dumps({"kind": "mesh", "tp": shard.tp, "ep": shard.ep, "gpu": name}))
        for row in rows:
            print(json.dumps(row.as_dict()))
        return
    columns = [Column("sizes", number=False), Column("predicted, us"), Column("sent"), Column("us"), Column("tokens/s")]
    table = Table(f"decode_step, tp {shard.tp} x ep {shard.ep}, on {name}", columns, PREDICTED)
    for row in rows:
        told = row.predicted
        share = "-" if told is None else f"{100 * told.sending / told.seconds:.0f} %"
        rate = "-" if row.seconds is None else f"{row.case.sizes['B'] / row.seconds:,.0f}"
        guess = micro(None if told is None else told.seconds)
        table.add(sizes_text(row.case.as_dict()), guess, share, micro(row.seconds), rate)
    out = console()
    if all(row.seconds is None for row in rows):
        out.print("No time was measured: needs a GPU a process, and no --gpu.")
    out.print(table)
