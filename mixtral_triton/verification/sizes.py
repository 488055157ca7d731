"""The model's first layer in every size that `generate` launches.

B sequences, T tokens each, C slots of the cache, N rows
"""

import copy
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint.config import PREFILL_CHUNK
from ..kernels.launching.launch import Launch
from ..kernels.record import record_launches
from ..model.cache import KVCache
from .judge import Calls, Judge, catch_faults
from .report import Row
from .tolerance import Args

SEQUENCES = 64  # of `generate` in one batch, at most
CACHE_SLOTS = 4096  # slots of the caches, of more than MANY sequences a quarter
MANY = 8
EDGE = 8  # rows of a part of a tile: this many are run, and twice as many
Size = tuple[int, int, int]  # B, T, C


def sizes_of_generate(config: Any) -> list[Size]:
    """The sizes of `generate`'s forwards, the smallest first: steps of 1 to 64 sequences, every context, and chunks."""
    limit = config.max_position_embeddings
    contexts = [n + 1 for n in (128 << step for step in range(20)) if n < limit]
    sizes = [(B, 1) for B in range(1, SEQUENCES + 1)] + [(1, T) for T in range(2, SEQUENCES + 1)]
    sizes += [(1, T + extra) for T in range(SEQUENCES, PREFILL_CHUNK + 1, SEQUENCES) for extra in (0, 1)]
    sizes += [(B, T) for B in (2, 3, 5, MANY, SEQUENCES) for T in (2, 17, SEQUENCES, 500, 900, PREFILL_CHUNK)]
    slots = {True: min(limit, CACHE_SLOTS // 4), False: min(limit, CACHE_SLOTS)}
    with_slots = {(B, T, slots[B > MANY]) for B, T in sizes if min(limit, PREFILL_CHUNK) >= T}
    with_slots |= {(B, 1, C) for B in (1, MANY, SEQUENCES) for C in (*contexts, limit)}
    return sorted(with_slots, key=lambda size: (size[0] * size[1], size[2]))


def first_layer(model: Any) -> Any:
    """The model with its first layer alone, which is the model's own, with whatever a caller changed there."""
    single = copy.copy(model)
    single._modules = {**model._modules, "layers": nn.ModuleList(model.layers[:1])}
    single.config = replace(model.config, num_hidden_layers=1)
    return single


def record_forward(model: Any, size: Size, gpu: Any, cache_dtype: Any) -> list[tuple[str, Args, list[Launch]]]:
    """The calls of a forward of a model on the meta device, and what each launches on the GPU: architecture, SMs."""
    (B, T, C), calls = size, list[Any]()

    def run(op: Any, args: Args) -> Any:
        with record_launches(*gpu) as records:
            out = op.run(**args)
        calls.append((op.name, args, records))
        return out

    cache = KVCache(model.config, B, C, "meta", cache_dtype or model.dtype)
    with torch.no_grad(), Calls(run):
        model.head(model.hidden(torch.empty((B, T), dtype=torch.int64, device="meta"), cache)[:, 0])
    return calls


@dataclass
class SizedForwards:
    """Of the forwards of `sizes_of_generate` those that launch what no smaller one does, of at most `limit` tokens.

    Of each launch configuration the smallest and the largest number of rows are run, and those at an EDGE: sizes differ
    in masks, and a row that a mask loses shows there.
    """

    model: Any  # on the meta device, of one layer
    limit: int
    gpu: tuple[str, int | None]
    cache_dtype: torch.dtype | None = None
    rows: dict[Any, set[int]] = field(default_factory=lambda: defaultdict(set))  # that are run, by launch
    not_run: dict[str, None] = field(default_factory=dict)  # each line once

    def select(self) -> Iterator[tuple[Size, set[int]]]:
        """Yield sizes with the positions of the forward's calls that launch something else."""
        calls, needed = list[Any](), defaultdict[Any, set[int]](set)
        for size in sizes_of_generate(self.model.config):
            forward = [*enumerate(record_forward(self.model, size, self.gpu, self.cache_dtype))]
            for position, (op, args, records) in forward:
                launches, N = configurations(args, records), count_rows(args)
                calls.append((size, position, op, N, launches))
                for launch in launches:
                    needed[launch].add(N)
        self._reduce(needed)
        positions = defaultdict[Size, set[int]](set)
        for size, position, op, N, launches in calls:
            new = {launch for launch in launches if N in needed[launch] - self.rows[launch]}
            # More than the most that are needed were run for another launch.
            new -= {launch for launch in new if N == max(needed[launch]) < max(self.rows[launch], default=0)}
            if not new:
                continue
            for launch in launches:
                self.rows[launch].add(N)
            if (tokens := size[0] * size[1] if op != "linear" else N) > self.limit:
                kernels = " and ".join(sorted({kernel for (kernel, *_), *_ in new}))
                needs = f"needs a GPU or --tokens {tokens}"
                self.not_run[f"{op} ({case_of(size)}): {kernels}; {needs}"] = None
            else:
                positions[size].add(position)
        yield from positions.items()

    def _reduce(self, needed: dict[Any, set[int]]) -> None:
        """Reduce the numbers of rows of each launch to those that are run."""
        beyond = defaultdict[tuple[int, int], set[str]](set)  # kernels, by the rows that run and that a chunk reaches
        for launch, sizes in needed.items():
            most, reached = (max((n for n in sizes if n <= m), default=0) for m in (self.limit, PREFILL_CHUNK))
            most = min(most, reached)
            if 0 < most < reached:
                beyond[most, reached].add(launch[0][0])
            tiled = any(name in ("BLOCK_T", "BLOCK_M") for name, _ in launch[0][3])
            needed[launch] = sizes & {min(sizes), most, *((EDGE, 2 * EDGE) if tiled else ())}
        for (most, reached), names in beyond.items():
            line = f"{most + 1} to {reached} rows of {', '.join(sorted(names))}; needs a GPU or --tokens {reached}"
            self.not_run[line] = None


def case_of(size: Size) -> str:
    return f"{size[0]} x {size[1]} tokens" + (f", {size[2]} slots" if size[2] > CACHE_SLOTS else "")


def configurations(args: Args, records: list[Launch]) -> set[Any]:
    """((kernel, warps, stages, constants), shapes of weights) of each launch of Triton's."""
    shapes = tuple(tuple(args[name].shape) for name in ("weight", "gate_up_proj") if name in args)
    kernels = (record for record in records if record.grid is not None)
    return {((x.kernel, x.num_warps, x.num_stages, tuple(sorted(x.constexprs.items()))), shapes) for x in kernels}


def count_rows(args: Args) -> int:
    """The rows that share tiles in a call: tokens of one sequence, or of all, by the shape of its first argument."""
    name, first = next(iter(args.items()))
    return first.shape[1] if name in ("q", "k", "input_ids") else first.shape[:-1].numel()


def judge_sizes(judge: Judge, model: Any, ids: Tensor, text: KVCache, sized: SizedForwards, steps: Any) -> None:
    """Judge the calls of the model's first layer in the sizes of `generate`, on tokens of `ids`, over caches with the
    keys of `text`."""
    single, change = first_layer(model), model.find_change()

    def fail(note: str) -> None:
        if change is None:
            judge.rows.append(Row.exact(0, "layer", judge.case, False, note))
        else:
            sized.not_run[f"sizes of generate; {change}, and the first layer alone raises {note}"] = None

    with catch_faults(fail), torch.no_grad():
        forwards = [*sized.select()]
        step = steps("sizes of generate", len(forwards))
        for (B, T, C), positions in forwards:
            cache = KVCache(single.config, B, C, ids.device, text.dtype)
            fill(cache.keys[0], text.keys[0])
            fill(cache.values[0], text.values[0])
            cache.lengths[:], lengths = lengths_of_size((B, T, C), single)
            rows = ids.flatten()[torch.arange(B * T, device=ids.device) % ids.numel()].view(B, T)
            judge.start(case_of((B, T, C)), positions=positions)
            with judge.watching(single):
                single.head(single.hidden(rows, cache, lengths)[:, 0])
            step()


def fill(slots: Any, text: Any) -> None:
    """Fill the slots [B,Hkv,C,D] of keys or values with those of other slots, in turn."""
    sequences, places = (torch.arange(n, device=slots.device) for n in (slots.shape[0], slots.shape[2]))
    sequences, places = sequences % text.shape[0], places % text.shape[2]
    function = lambda x: x[sequences][:, :, places]  # noqa: E731
    slots.copy_(function(text) if isinstance(text, Tensor) else text.map(function))


def lengths_of_size(size: Size, model: Any) -> tuple[Tensor, Tensor]:
    """The lengths of a forward's cache, and the new tokens of each sequence. The first sequence ends where the cache or
    the positions do, and its padding is beyond."""
    (B, T, C), config, limit = size, model.config, len(model.cos)
    b, slots = torch.arange(B, device=model.device), config.window or min(C, config.max_position_embeddings)
    new = (T - (b + 1) % 3).clamp(min=1)
    last = (limit if config.window else min(limit, slots)) - new
    past = slots - 1 - (b * 37 % slots if T == 1 else slots // 3 + b % 5)
    past = torch.where(b == 0, last, past.minimum(last)).clamp(min=0).int()
    return past, new.int()
