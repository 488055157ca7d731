"""The command `bench`: measured on the current GPU, or what is known without one; a decode step on a mesh."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from rich.console import Console

from ...config import MixtralConfig
from ...kernels.launch import INTERPRETED
from ...kernels.op import Shape
from ...kernels.registry import OPS
from ...parallel import Ranks
from ..compiled import as_json, resources_table
from ..gpus import GPU, RATED, data_sheet
from ..offline import compile_ops
from ..predict import family_note
from ..processes import is_first
from ..terminal import bar, check_plot, console, save_plot
from . import decode_step
from .cases import Case, cases, sizes_of
from .measure import DEFAULT_GPU, NO_GPU, Bench, DeviceLost, Row, checked_row, step_timer
from .peers import PEERS, import_peer
from .report import figure_of, gpu_line, number, op_table, sizes_text

MESH_RUNS = 20  # the same on every rank, since each step synchronizes them
NOT_ON_A_MESH = ("peer", "plot", "gpu", "model", "quick", "first", "without")


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status: 1 where an operation or a user's peer is wrong or fails.

    A case too large for the GPU and an installed peer's failure are not errors. A case that leaves the GPU in an error
    ends the process; another one continues after it with --first.
    """
    if args.first < 0:
        raise ValueError(f"--first is {args.first}, needs the number of a case")
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = MixtralConfig.from_pretrained(args.model) if args.model is not None else None
    selected = cases(args.ops, args.quick, args.at, args.sizes, dtype, model)[args.first :]
    if args.peer and len(args.ops) != 1:
        raise ValueError("--peer goes with the one operation that it does: bench expert_swiglu --peer MODULE:FUNCTION")
    user_peers = [import_peer(text) for text in dict.fromkeys(args.peer)]
    if args.gpu is not None and args.gpu not in RATED:
        raise ValueError(f"--gpu is {args.gpu!r}, needs one of {', '.join(RATED)}")
    if unknown := set(args.without) - {peer.name for peer in PEERS}:
        raise ValueError(f"--without is {min(unknown)!r}, needs one of {', '.join(sorted({p.name for p in PEERS}))}")
    if args.plot is not None:
        check_plot(args.plot)
    out = console(stderr=args.json)
    measuring = args.gpu is None and torch.cuda.is_available()

    def announce(number: int) -> None:
        """Print a line before a case, for whoever started this process and must know what ended it."""
        if args.json:
            case = {"op": selected[number].op.name, "sizes": selected[number].as_dict()}
            print(json.dumps({"kind": "begin", "number": args.first + number, **case}), flush=True)

    if measuring:
        bench = Bench.of(torch.device("cuda"))
        gpu, sheet = bench.gpu, data_sheet(bench.gpu.name)
        source = bench.rows(selected, args.without, announce, user_peers)
    else:
        gpu, sheet = RATED[args.gpu or DEFAULT_GPU], None
        reason = "--gpu asks for a data sheet" if args.gpu else NO_GPU
        source = (checked_row(case, gpu, user_peers, reason) for case in selected)
        known = "Floors" if gpu.chip is None else "Predicted times and floors"
        out.print(f"No time was measured: {reason}. {known} are those of the GPU below.")
    out.print(gpu_line(gpu, sheet))
    if note := family_note(gpu.arch):
        out.print(note)
    if args.json:
        versions = {"torch": torch.__version__, "arch": gpu.arch}
        print(json.dumps({"kind": "gpu", **_rates(gpu), **versions, "data_sheet": sheet and _rates(sheet)}), flush=True)
    try:
        rows = list(_print_rows(source, len(selected), args.json, out))
    except DeviceLost as error:
        print(f"mixtral-triton bench: {error}", file=sys.stderr)
        return 1
    if args.json and measuring:
        print(json.dumps({"kind": "end"}), flush=True)
    if not measuring:
        _print_compiled(args.json, selected, gpu, out)
    if args.plot is not None:
        save_plot(figure_of(rows, gpu), args.plot)
        out.print(f"plot: {args.plot}")
    names = {peer.name for peer in user_peers}
    outcomes = [one for row in rows for one in (row.ours, *(row.peers[name] for name in names & row.peers.keys()))]
    return 1 if any(one.right is False for one in outcomes) else 0


def describe(name: str) -> str:
    """Return the sizes of the operation `name` and its arguments; ValueError for an unknown name."""
    op = cases([name])[0].op
    known, needed = sizes_of(op)
    example = ",".join(f"{key}={value}" for key, value in Shape(op.bench_shapes[0]).as_dict().items())
    sizes = f"{name} --sizes {example}\nSizes that may be left out: {', '.join(set(known) - set(needed)) or 'none'}"
    return f"{sizes}\n{op.help()}" if name in OPS else sizes


def _rates(gpu: GPU) -> dict[str, Any]:
    return {name: getattr(gpu, name) for name in ("name", "source", "bandwidth", "matmul")}


def _print_rows(source: Iterator[Row], total: int, as_lines: bool, out: Console) -> Iterator[Row]:
    """Print the rows as they come: a line of JSON each, or a table per operation."""
    with bar("benchmarking", total) as progress:

        def count() -> Iterator[Row]:
            for done, row in enumerate(source, 1):
                progress.update(done, total)
                if as_lines:
                    print(json.dumps({"kind": "row", **row.as_dict()}), flush=True)
                yield row

        for _, group in groupby(count(), key=lambda row: row.case.op.name):
            rows = list(group)
            if not as_lines:
                out.print(op_table(rows))
            yield from rows


def _print_compiled(as_lines: bool, selected: Sequence[Case], gpu: GPU, out: Console) -> None:
    """Print the compiled resources of the kernels that these cases launch."""
    if INTERPRETED:
        out.print("No compiled resources: this process interprets its kernels (TRITON_INTERPRET is set).")
        return
    ops = []
    for name in dict.fromkeys(case.op.name for case in selected if case.op.name in OPS):
        sizes, dtypes = zip(*((case.sizes, case.dtype) for case in selected if case.op.name == name), strict=True)
        ops.append(replace(OPS[name], bench_shapes=sizes, dtypes=tuple(dict.fromkeys(dtypes))))
    with bar(f"compiling for {gpu.arch}", None) as progress:
        kernels = [{"kind": "kernel", **as_json(each)} for each in compile_ops(ops, gpu.arch, progress=progress.update)]
    if as_lines:
        print(*map(json.dumps, kernels), sep="\n", end="\n" * bool(kernels), flush=True)
    elif kernels:
        out.print(resources_table(gpu.arch, kernels))


def run_on_mesh(args: argparse.Namespace, mesh: Any) -> int:
    """Run `bench decode_step` on every rank, measured where there are GPUs."""
    if args.ops not in ([], ["decode_step"]):
        raise ValueError(f"bench: on a mesh it times decode_step, and got {' '.join(args.ops)}")
    if unused := [name for name in NOT_ON_A_MESH if getattr(args, name)]:
        raise ValueError(f"--{unused[0]} is required, and a mesh has no use for it")
    ranks, measuring = Ranks(mesh), mesh.device_type == "cuda"
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device()).name if measuring else ""
    lines: list[dict[str, Any]] = []
    for case in cases(["decode_step"], at=args.at, sizes=args.sizes, dtype=getattr(torch, args.dtype or "", None)):
        with ranks.raise_on_any_rank():
            ranks.shard.check(decode_step.config(case.sizes))
        seconds = measure_on_mesh(case, ranks) if measuring else None
        line = {"kind": "row", "op": "decode_step", "sizes": case.as_dict(), "time_us": seconds and seconds * 1e6}
        lines.append(line)
    if is_first():
        _print_mesh(args.json, lines, ranks, gpu or "a CPU")
    return 0


def measure_on_mesh(case: Case, ranks: Ranks) -> float:
    """Return the mean seconds of a step in a row of MESH_RUNS steps, on the slowest rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)  # the same gate on all ranks
    with torch.no_grad(), device:
        args = decode_step.inputs(case.sizes, case.dtype, device, generator, ranks)
        seconds = step_timer(decode_step.replayed_step(args), MESH_RUNS)
    return max(ranks.all_gather_object(seconds))


def _print_mesh(as_json: bool, lines: Sequence[dict[str, Any]], ranks: Ranks, gpu: str) -> None:
    shard, out = ranks.shard, console()
    if as_json:
        lines = [{"kind": "mesh", "tp": shard.tp, "ep": shard.ep, "gpu": gpu}, *lines]
        print(*map(json.dumps, lines), sep="\n")
        return
    out.print(f"decode_step, tp {shard.tp} x ep {shard.ep}, on {gpu}")
    for line in lines:
        time = line["time_us"]
        measured = f"{number(time)} us, {1e6 * line['sizes']['B'] / time:,.0f} tokens/s" if time else "needs GPUs"
        out.print(f"{sizes_text(line['sizes'])}; measured: {measured}")
