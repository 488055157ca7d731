"""The command `bench`: measured on the current GPU, or what is known without one."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby
from typing import Any

import torch
from rich.console import Console

from ...kernels.registry import OPERATIONS
from ..gpus import GPU, RATED, data_sheet, find_gpu
from ..predict import family_note
from ..terminal import bar, check_plot, console
from .cases import Case, cases, sizes_of
from .measure import Row, checked_row, current_gpu, timed_rows
from .peers import PEERS, import_peer
from .report import figure_of, gpu_line, op_table


def run(args: argparse.Namespace) -> int:
    """Run the command and return its exit status: 1 where an operation or a user's peer is wrong or fails.

    A case too large for the GPU and an installed peer's failure are not errors. One that leaves the GPU in an error is
    the last.
    """
    dtype = getattr(torch, args.dtype) if args.dtype else None
    selected = cases(args.ops, args.quick, args.at, args.sizes, dtype)
    if args.peer and len(args.ops) != 1:
        raise ValueError("--peer goes with the one operation that it does: bench expert_swiglu --peer MODULE:FUNCTION")
    for option, value in (("--offload", args.offload), ("--cache-dtype", args.cache_dtype)):
        if value and args.ops != ["decode_step"]:
            raise ValueError(f"{option} is {value!r}, and goes with decode_step: bench decode_step {option} {value}")
    if args.cache_dtype:
        selected = [replace(case, sizes={**case.sizes, "cache": args.cache_dtype}) for case in selected]
    user_peers = [import_peer(text) for text in dict.fromkeys(args.peer)]
    gpu, sheet = find_gpu(args.gpu or "h100"), None
    if not gpu.bandwidth:
        unknown_rates = f"--gpu is {args.gpu!r}, whose bandwidth and matmul rate are unknown"
        raise ValueError(f"{unknown_rates}, needs one of {', '.join(RATED)}")
    if unknown := set(args.without) - {peer.name for peer in PEERS}:
        raise ValueError(f"--without is {min(unknown)!r}, needs one of {', '.join(sorted({p.name for p in PEERS}))}")
    if args.plot is not None:
        check_plot(args.plot)
    out = console(stderr=args.json)
    measuring = args.gpu is None and torch.cuda.is_available()
    if measuring:
        device, gpu, timer = current_gpu()
        sheet = data_sheet(gpu.name)
    if args.offload:
        selected = [case.offloaded(args.offload, gpu) for case in selected]
    if measuring:
        peers = [*(peer for peer in PEERS if peer.name not in args.without), *user_peers]
        source = timed_rows(selected, peers, device, gpu, timer)
    else:
        reason = "--gpu asks for a data sheet" if args.gpu else "there is no GPU"
        source = (checked_row(case, gpu, user_peers, reason) for case in selected)
        known = "Floors (predictions need its rate of L2)" if gpu.chip is None else "Predicted times and floors"
        out.print(f"No time was measured: {reason}. {known} are those of the GPU below.")
    out.print(gpu_line(gpu, sheet))
    out.print(family_note(gpu.arch), end="")
    if args.json:
        versions = {"torch": torch.__version__, "arch": gpu.arch}
        print(json.dumps({"kind": "gpu", **_rates(gpu), **versions, "data_sheet": sheet and _rates(sheet)}), flush=True)
    rows = _print_rows(source, len(selected), args.json, out)
    if args.plot is not None:
        figure_of(rows, gpu).savefig(args.plot, dpi=150)
        out.print(f"plot: {args.plot}")
    outcomes = [row.ours for row in rows]
    outcomes += [outcome for row in rows for name, outcome in row.peers.items() if name in args.peer]
    return 1 if len(rows) < len(selected) or any(one.right is False for one in outcomes) else 0


def describe(name: str) -> str:
    """Return the sizes of the operation `name` and its arguments; ValueError for an unknown name."""
    op = cases([name])[0].op
    known, needed = sizes_of(op)
    example = ",".join(f"{key}={value}" for key, value in Case(op, op.bench_shapes[0]).as_dict().items())
    sizes = f"{name} --sizes {example}\nSizes that may be left out: {', '.join(set(known) - set(needed)) or 'none'}"
    return f"{sizes}\n{inspect.getdoc(OPERATIONS[name])}" if name in OPERATIONS else sizes


def _rates(gpu: GPU) -> dict[str, Any]:
    return {name: getattr(gpu, name) for name in ("name", "source", "bandwidth", "matmul")}


def _print_rows(source: Iterator[Row], total: int, as_lines: bool, out: Console) -> list[Row]:
    """Print the rows as they come, a line of JSON each, or a table per operation, and return them."""
    rows: list[Row] = []
    with bar("benchmarking", total) as progress:
        for _, group in groupby(source, key=lambda row: row.case.op.name):
            start = len(rows)
            for row in group:
                rows.append(row)
                progress.update(len(rows), total)
                if as_lines:
                    print(json.dumps({"kind": "row", **row.as_dict()}), flush=True)
            if not as_lines:
                out.print(op_table(rows[start:]))
    return rows
