"""`fit --scaling`: predicted times of a model on 1 to 16 GPUs, by tensor ("tp") and expert ("ep") parallelism.

The cost model (predict.py) gives the time that a rank computes; data sheets of links and NCCL's own figures give the
time that the ranks communicate. A prediction, not a measurement: no such machine has run it.

n ranks, tp x ep of them; B sequences, T tokens of each that come in one step, S positions of each with these
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..config import MixtralConfig
from ..generate import PREFILL_CHUNK
from ..parallel import Shard, traffic
from . import fit
from .gpus import GPU, MESHED, Chip
from .predict import Part, predict_forward
from .terminal import Column, Table, console

NODE = 8  # GPUs that reach each other without the network
COUNTS = (1, 2, 4, 8, 16)
# Of a link's data sheet: 370 of 450 GB/s between H100, 46 to 48 of 50 GB/s of a 400 Gb/s network adapter (NVIDIA's
# answers in nccl-tests' issues 212 and 290).
NODE_REACHED, NETWORK_REACHED = 0.82, 0.94
# Of a small all-reduce by a tree, to begin and for each hop inside a node and between two: what NCCL's own tuner
# assumes (src/graph/tuning.cc, tree, LL).
BEGIN, NODE_HOP, NETWORK_HOP = 6.8e-6, 0.6e-6, 5.0e-6
TEXTS, TOKENS_MAX = 256, 2048  # random routes that `busiest` averages over; more tokens are as even
CAPTION = (
    "Predicted by data sheets, not measured. Decode: one token for each sequence; prefill: the last chunk of a prompt. "
    f"sent: the share of the time in which the ranks wait for each other. Up to {NODE} GPUs are one node."
)


@dataclass(frozen=True)
class Step:
    """One forward of the slowest rank: seconds of its kernels, and of what the ranks send."""

    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        return self.computing + self.sending


def step(config: MixtralConfig, specs: fit.QuantSpecs, shard: Shard, gpu: GPU, B: int, T: int, S: int) -> Step:
    """Predict T tokens for each of B sequences, after S - T others, through the slowest rank of `shard`.

    Routes are uniform and independent. A rank of "ep" computes what the busiest one has, on average over texts.
    """
    shares = busiest(B * T, config.num_experts_per_tok, config.num_local_experts, shard.ep)
    specs, dtype, L = fit.shard_specs(config, specs, shard), fit.stored_dtype(config), config.num_hidden_layers
    vocabulary, inner = -(-config.vocab_size // shard.ranks), config.intermediate_size // shard.tp
    rank = replace(shard.config(config), vocab_size=vocabulary, intermediate_size=inner)  # with all experts

    def computing(layers: int) -> float:
        found = predict_forward(replace(rank, num_hidden_layers=layers), specs, gpu, B, T, S)
        return found.seconds - sum((1 - _share(part, *shares)) * part.seconds for part in found.parts)

    sent, chip = traffic(config, shard.tp, shard.ep, dtype.itemsize), gpu.chip
    assert chip is not None
    all_reduce = _collective(sent.layer // 2 * B * T, shard.ranks, chip)
    logits = _collective(sent.head * B, shard.ranks, chip) if sent.head else 0.0  # of each sequence's last token
    one, two = computing(1), computing(2)
    return Step(one + (L - 1) * (two - one), 2 * L * all_reduce + logits)


def _share(part: Part, experts: float, routes: float) -> float:
    """Return the busiest rank's part of a launch over all experts: of a launch that streams weights its part of the
    distinct experts, of one that multiplies many rows its part of the routes."""
    if not part.kernel.startswith(("experts_up", "experts_down")):
        return 1.0
    return experts if part.limit == "memory" or "decode" in part.kernel else routes


@lru_cache(maxsize=256)
def busiest(tokens: int, K: int, E: int, ep: int) -> tuple[float, float]:
    """Return the largest part that a rank has of the distinct experts of `tokens` and of their routes, on average
    over TEXTS texts of random routes; E experts, K a token, E / ep a rank."""
    if ep == 1:
        return 1.0, 1.0
    tokens = min(tokens, TOKENS_MAX)
    generator = torch.Generator().manual_seed(0)
    experts = routes = 0.0
    for _ in range(TEXTS):
        ids = torch.rand(tokens, E, generator=generator).topk(K, dim=-1).indices
        counts = ids.flatten().bincount(minlength=E).view(ep, E // ep)
        distinct = (counts > 0).sum(1)
        experts += float(distinct.max() / distinct.sum()) / TEXTS
        routes += float(counts.sum(1).max() / counts.sum()) / TEXTS
    return experts, routes


def _collective(sent: int, n: int, chip: Chip) -> float:
    """Return the seconds of a collective of n ranks, each of which sends so many bytes.

    Between nodes each GPU's network adapter carries a part of it, as many as a node has GPUs.
    """
    if n == 1:
        return 0.0
    gpus, nodes = min(n, NODE), math.ceil(n / NODE)
    begin = BEGIN + 2 * ((gpus - 1) * NODE_HOP + math.log2(nodes) * NETWORK_HOP)
    carried = sent / (chip.node * NODE_REACHED)
    return begin + (max(carried, sent / gpus / (chip.network * NETWORK_REACHED)) if nodes > 1 else carried)


def run(args: argparse.Namespace) -> int:
    """Run the command `fit --scaling` -> exit status: 1 where no number of GPUs holds the model."""
    request, gpu, format = fit.Request.of(args), fit.select_gpu(args), args.scaling or fit.STORED
    if gpu is None:
        raise ValueError("--scaling is given and there is no GPU here, needs --gpu, too")
    if format not in request.specs:
        raise ValueError(f"--scaling is {format!r}, needs one of {', '.join(request.specs)}")
    if gpu.key not in MESHED:
        raise ValueError(f"--scaling has the rates of {', '.join(MESHED)}: needs --gpu with one of them")
    config, specs, B, S = request.config, request.specs[format], request.batch, request.context
    headings = ("gpus", "tp", "ep", "decode, ms", "sent", "tokens/s", "prefill, ms", "sent", "tokens/s", "fits")
    title = f"{request.name}, {request.label(format)}, on {gpu.name}, predicted: {request.size}"
    table, rows = Table(title, list(map(Column, headings)), CAPTION, keys=3), []
    for shard in (Shard(tp=n >> power, ep=1 << power) for n in COUNTS for power in range(n.bit_length())):
        try:
            shard.check(config)
            fit.shard_specs(config, specs, shard)
        except ValueError:  # the ranks do not divide a size of the model, or would cut a group of columns
            continue
        need = fit.Need.of(config, specs, B, S, shard.ranks).total
        row: dict[str, Any] = {"gpus": shard.ranks, "tp": shard.tp, "ep": shard.ep, "bytes": need}
        cells, row["fits"] = [str(size) for size in (shard.ranks, shard.tp, shard.ep)], need <= gpu.bytes
        for name, T in ("decode", 1), ("prefill", min(S, PREFILL_CHUNK)):
            one = step(config, specs, shard, gpu, B, T, S)
            row[name] = {"time_us": one.seconds * 1e6, "sending_us": one.sending * 1e6, "tokens": B * T}
            cells += [f"{one.seconds * 1e3:,.2f}", f"{100 * one.sending / one.seconds:.0f} %"]
            cells.append(f"{B * T / one.seconds:,.0f}")
        table.add(*cells, "yes" if row["fits"] else "no", style="" if row["fits"] else "dim")
        rows.append(row)
    if args.json:
        print(json.dumps({**request.as_dict(), "format": format, "gpu": gpu.name, "splits": rows, "predicted": True}))
    else:
        console().print(table)
    return 0 if any(row["fits"] for row in rows) else 1
