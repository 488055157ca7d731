"""A model on several GPUs, on paper: how long a rank computes by the cost model, and how long the ranks wait for what
they send each other. A prediction, not a measurement: no such machine has run it.

n ranks, tp x ep of them; B sequences, T tokens of each that come in one step, S positions of each with these
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from ..cache import KVCache
from ..config import MixtralConfig
from ..generate import PREFILL_CHUNK
from ..kernels.op import Cost
from ..kernels.record import record_launches
from ..model import Mixtral
from ..parallel import Shard, traffic
from . import fit
from .predict import Part, predicted
from .roofline import GPU, GPUS

NODE = 8  # GPUs that reach each other without the network
COUNTS = (1, 2, 4, 8, 16)
PAYS = 1.25  # times as fast with twice the GPUs: less is not worth them
AS_FAST = 1.02  # of the time: nearer than that, the prediction does not tell them apart
BATCH_MOST = 1024
# Of a link's data sheet: 370 of 450 GB/s between H100, 46 to 48 of 50 GB/s of a 400 Gb/s network GPU (NVIDIA's answers
# in nccl-tests' issues 212 and 290).
NEAR_REACHED, FAR_REACHED = 0.82, 0.94
# Of a small all-reduce by a tree, to begin and for each hop inside a node and between two: what NCCL's own tuner
# assumes (src/graph/tuning.cc, tree, LL).
BEGIN, NEAR_HOP, FAR_HOP = 6.8e-6, 0.6e-6, 5.0e-6
TEXTS, TOKENS_MOST = 256, 2048  # that are dealt out to see how uneven routes are; more tokens are as even


@dataclass(frozen=True)
class Link:
    """bytes/s that a GPU sends, by data sheets: `near` inside a node, `far` by its share of the network."""

    near: float
    far: float


# NVLink's and Infinity Fabric's totals count both directions; one 200 or 400 Gb/s network GPU for each of eight.
_HOPPER = Link(450e9, 50e9)
LINKS = {
    "a100": Link(300e9, 25e9),
    "h100": _HOPPER,
    "h200": _HOPPER,
    "b200": Link(900e9, 50e9),
    "mi300x": Link(448e9, 50e9),
}


@dataclass(frozen=True)
class Step:
    """One forward of the slowest rank: seconds of its kernels, and of what the ranks send."""

    computing: float
    sending: float

    @property
    def seconds(self) -> float:
        return self.computing + self.sending


@dataclass(frozen=True)
class Split:
    """tp x ep GPUs: one decode step of B sequences, and one chunk of a prompt of each.

    chunk  tokens a sequence of the chunk, the last one of S
    """

    tp: int
    ep: int
    batch: int
    chunk: int
    need: fit.Need
    decode: Step
    prefill: Step

    @property
    def gpus(self) -> int:
        return self.tp * self.ep

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.decode.seconds

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.batch * self.chunk / self.prefill.seconds


def known(names: set[str]) -> tuple[GPU, Link]:
    """The rates of the GPU that has one of these names (gpus.py); ValueError where they are not known."""
    for key, link in LINKS.items():
        if key in names:
            return GPUS[key], link
    raise ValueError(f"--scaling has the rates of {', '.join(LINKS)}: needs --gpu with one of them")


def splits(
    config: MixtralConfig, specs: fit.QuantSpecs, gpu: GPU, link: Link, batch: int, context: int, counts: Any = COUNTS
) -> Iterator[Split]:
    """Every way to split the model over so many GPUs that its sizes take, and the groups of its weights' `forms`."""
    chunk = min(context, PREFILL_CHUNK)
    for n in counts:
        need = fit.Need.of(config, specs, batch, context, n)
        for shard, own in _shards(config, specs, n):
            decode, prefill = (step(config, own, shard, gpu, link, batch, T, context) for T in (1, chunk))
            yield Split(shard.tp, shard.ep, batch, chunk, need, decode, prefill)


def _shards(config: MixtralConfig, specs: fit.QuantSpecs, n: int) -> Iterator[tuple[Shard, fit.QuantSpecs]]:
    """The splits over n GPUs that are possible, most of "tp" first, each with the forms of its parts."""
    for tp in (n >> power for power in range(n.bit_length())):
        shard = Shard(tp=tp, ep=n // tp)
        try:
            shard.check(config)
            yield shard, fit.shard_specs(config, specs, shard)
        except ValueError:
            continue


def tp_pays_to(found: Iterable[Split]) -> int:
    """The most GPUs at which twice as many as before make a decode step PAYS times as fast, split over "tp" alone."""
    alone = {split.gpus: split.decode.seconds for split in found if split.ep == 1}
    pays = [n for n, seconds in alone.items() if n // 2 in alone and alone[n // 2] >= PAYS * seconds]
    return max(pays, default=1)


def ep_from(config: MixtralConfig, specs: fit.QuantSpecs, gpu: GPU, link: Link, context: int, n: int) -> int | None:
    """The least batch, a power of two, from which a decode step of n GPUs with "ep" is AS_FAST as by "tp" alone."""
    shards = list(_shards(config, specs, n))
    found = None
    for batch in (1 << power for power in reversed(range(BATCH_MOST.bit_length()))):
        times = [(shard.ep, step(config, own, shard, gpu, link, batch, 1, context).seconds) for shard, own in shards]
        alone = min((seconds for ep, seconds in times if ep == 1), default=math.inf)
        if min((seconds for ep, seconds in times if ep > 1), default=math.inf) > AS_FAST * alone:
            break
        found = batch
    return found


def batch_most(config: MixtralConfig, specs: fit.QuantSpecs, memory: int, context: int, n: int) -> int:
    """Sequences of `context` tokens that n GPUs of `memory` bytes hold without being tight, at most BATCH_MOST."""
    room = fit.comfortable(memory)
    return bisect_right(range(1, BATCH_MOST + 1), room, key=lambda B: fit.Need.of(config, specs, B, context, n).total)


def step(
    config: MixtralConfig, specs: fit.QuantSpecs, shard: Shard, gpu: GPU, link: Link, B: int, T: int, S: int
) -> Step:
    """T tokens for each of B sequences, behind S - T others, through a rank of `shard`, whose `forms` these are.

    Routes are uniform and independent. A rank of "ep" computes what the busiest one has to, on average over texts.
    """
    shares = busiest(B * T, config.num_experts_per_tok, config.num_local_experts, shard.ep)
    one, two = (_computing(replace(config, num_hidden_layers=L), specs, shard, gpu, B, T, S, shares) for L in (1, 2))
    return Step(one + (config.num_hidden_layers - 1) * (two - one), _sending(config, shard, link, B, T))


def _computing(
    config: MixtralConfig,
    specs: fit.QuantSpecs,
    shard: Shard,
    gpu: GPU,
    B: int,
    T: int,
    S: int,
    shares: tuple[float, float],
) -> float:
    """Seconds of a rank's kernels, of which the experts' take `shares`."""
    ranks = _Paper(_EveryExpert(**vars(shard)))
    model = Mixtral(config, "meta", fit.stored_dtype(config), specs=specs, ranks=ranks)  # type: ignore[arg-type]
    cache = KVCache(model.config, B, S, "meta", fit.stored_dtype(config))
    ids = torch.empty(B, T, dtype=torch.int64, device="meta")
    with record_launches(gpu.arch) as launches, torch.no_grad():
        model.head(model.hidden(ids, cache)[:, -1])
    found = predicted(launches, gpu, Cost(0, 0))
    return found.seconds - sum((1 - _share(part, *shares)) * part.seconds for part in found.parts)


class _EveryExpert(Shard):
    """A shard with the experts of all ranks along "ep": what one of them has to do of it, `busiest` says."""

    def experts(self, config: MixtralConfig) -> slice:
        return slice(0, config.num_local_experts)


class _Paper:
    """What `Ranks` is to a model, where nobody is there to send anything to."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard

    def local_ids(self, ids: torch.Tensor, experts: int) -> torch.Tensor:
        return ids

    def all_reduce(self, part: torch.Tensor, in_order: bool) -> torch.Tensor:
        return part

    def all_gather(self, part: torch.Tensor, size: int) -> torch.Tensor:
        return part


def _share(part: Part, experts: float, routes: float) -> float:
    """Of the time of a launch over all experts, what the busiest rank has of it: what streams weights goes by the
    experts that anybody chose, what multiplies many rows by the routes."""
    if not part.kernel.startswith(("experts_up", "experts_down")):
        return 1.0
    return experts if part.limit == "memory" or "decode" in part.kernel else routes


@lru_cache(maxsize=256)
def busiest(tokens: int, K: int, E: int, ep: int) -> tuple[float, float]:
    """Of the distinct experts that `tokens` choose, and of their routes, the parts of the rank that has the most, on
    average over TEXTS texts of random routes; of E experts, K a token, E / ep a rank."""
    if ep == 1:
        return 1.0, 1.0
    tokens = min(tokens, TOKENS_MOST)
    generator = torch.Generator().manual_seed(0)
    experts = routes = 0.0
    for _ in range(TEXTS):
        ids = torch.rand(tokens, E, generator=generator).topk(K, dim=-1).indices
        counts = ids.flatten().bincount(minlength=E).view(ep, E // ep)
        taken = (counts > 0).sum(1)
        experts += float(taken.max() / taken.sum()) / TEXTS
        routes += float(counts.sum(1).max() / counts.sum()) / TEXTS
    return experts, routes


def _sending(config: MixtralConfig, shard: Shard, link: Link, B: int, T: int) -> float:
    """Seconds: two sums a layer, and the logits of each sequence's last token."""
    sent = traffic(config, shard.tp, shard.ep, fit.stored_dtype(config).itemsize)
    a_sum = _collective(sent.layer // 2 * B * T, shard.ranks, link)
    return 2 * config.num_hidden_layers * a_sum + (_collective(sent.head * B, shard.ranks, link) if sent.head else 0.0)


def _collective(sent: int, n: int, link: Link) -> float:
    """Seconds until n ranks, each of which sends so many bytes, are through.

    Between nodes each GPU's ring has a part of it: its network GPU carries one of as many as the node has GPUs.
    """
    if n == 1:
        return 0.0
    near, nodes = min(n, NODE), math.ceil(n / NODE)
    begin = BEGIN + 2 * ((near - 1) * NEAR_HOP + math.log2(nodes) * FAR_HOP)
    carried = sent / (link.near * NEAR_REACHED)
    return begin + (max(carried, sent / near / (link.far * FAR_REACHED)) if nodes > 1 else carried)
