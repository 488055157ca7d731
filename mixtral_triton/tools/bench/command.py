"""The command `bench`: measured on the GPU at hand, or what is known without one."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...config import MixtralConfig
from ...kernels.launch import INTERPRETED
from ...kernels.op import Op
from ...kernels.registry import OPS
from ..compiled import as_json, resources_table
from ..gpus import GPU, RATED
from ..offline import compile_shapes
from ..predict import family_note
from ..terminal import check_plot, console
from .cases import Case, cases, few
from .measure import DEFAULT_GPU, NO_GPU, Bench, DeviceLost, Row, checked_row
from .own_peer import imported
from .peers import PEERS, Peer
from .plot import plot
from .report import gpu_line, op_table, traffic_table


def run(args: argparse.Namespace, bar: Callable[..., Any]) -> int:
    """-> exit status: 1 where an operation, or a peer that the user gave, is wrong or fails; a case too large for the
    GPU is neither, and another peer's trouble is its own.

    A case that leaves the GPU in an error ends the process: a new one goes on behind it by --first.
    """
    if args.first < 0:
        raise ValueError(f"--first is {args.first}, needs the number of a case")
    chosen, own = _chosen(args)[args.first :], _own_peers(args)
    if args.gpu is not None and args.gpu not in RATED:
        raise ValueError(f"--gpu is {args.gpu!r}, needs one of {', '.join(RATED)}")
    if unknown := set(args.without) - {peer.name for peer in PEERS}:
        raise ValueError(f"--without is {min(unknown)!r}, needs one of {', '.join(sorted({p.name for p in PEERS}))}")
    if args.plot is not None:
        check_plot(args.plot)
    out = console(stderr=args.json)
    measuring = args.gpu is None and torch.cuda.is_available()
    if measuring:
        bench = Bench.of(torch.device("cuda"))
        gpu, sheet = bench.gpu, bench.sheet
        source = bench.rows(chosen, args.without, partial(_begins, args, chosen), own)
    else:
        gpu, sheet = RATED[args.gpu or DEFAULT_GPU], None
        reason = "--gpu asks for a data sheet" if args.gpu else NO_GPU
        source = (checked_row(case, gpu, own, reason) for case in chosen)
        told = "Floors" if gpu.chip is None else "Predicted times and floors"
        out.print(f"No time was measured: {reason}. {told} are those of the GPU below.")
    out.print(gpu_line(gpu, sheet))
    if note := family_note(gpu.arch):
        out.print(note)
    if args.json:
        print(json.dumps({"kind": "gpu", **_gpu(gpu, sheet)}), flush=True)
    try:
        rows = list(_shown(source, chosen, args.json, out, bar))
    except DeviceLost as error:
        print(f"mixtral-triton bench: {error}", file=sys.stderr)
        return 1
    if args.json and measuring:
        print(json.dumps({"kind": "end"}), flush=True)
    if not measuring:
        _unmeasured(args, chosen, gpu, out, bar)
    if args.plot is not None:
        plot(rows, gpu, args.plot)
        out.print(f"plot: {args.plot}")
    return 1 if any(_is_wrong(row, own) for row in rows) else 0


def _is_wrong(row: Row, own: Sequence[Peer]) -> bool:
    answerable = [row.ours, *(outcome for name, outcome in row.peers.items() if name in {peer.name for peer in own})]
    return any(outcome.right is False for outcome in answerable)


def _chosen(args: argparse.Namespace) -> list[Case]:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = MixtralConfig.from_pretrained(args.model) if args.model is not None else None
    return cases(args.ops, args.quick, args.at, args.sizes, dtype, model)


def _own_peers(args: argparse.Namespace) -> list[Peer]:
    if args.peer and len(args.ops) != 1:
        raise ValueError("--peer goes with the one operation that it does: bench expert_swiglu --peer MODULE:FUNCTION")
    return [imported(text) for text in dict.fromkeys(args.peer)]


def _gpu(gpu: GPU, sheet: GPU | None) -> dict[str, Any]:
    def rates(of: GPU) -> dict[str, Any]:
        return {"name": of.name, "source": of.source, "bandwidth": of.bandwidth, "matmul": of.matmul}

    versions = {"torch": torch.__version__, "arch": gpu.arch}
    return {**rates(gpu), **versions, "data_sheet": None if sheet is None else rates(sheet)}


def _begins(args: argparse.Namespace, chosen: Sequence[Case], number: int) -> None:
    """A line before a case is measured: whoever started this process knows what it died of."""
    if args.json:
        case = {"op": chosen[number].op.name, "sizes": chosen[number].as_dict()}
        print(json.dumps({"kind": "begin", "number": args.first + number, **case}), flush=True)


def _shown(
    source: Iterator[Row], chosen: Sequence[Case], as_lines: bool, out: Console, bar: Callable[..., Any]
) -> Iterator[Row]:
    """The rows as they come: a line of JSON each, or a table an operation."""

    def counted() -> Iterator[Row]:
        with bar("benchmarking", len(chosen)) as progress:
            for done, row in enumerate(source, 1):
                progress.update(done, len(chosen))
                yield row

    for _, group in groupby(counted(), key=lambda row: row.case.op.name):
        rows = []
        for row in group:
            rows.append(row)
            if as_lines:
                print(json.dumps({"kind": "row", **row.as_dict()}), flush=True)
        if not as_lines:
            out.print(op_table(rows))
        yield from rows


@contextmanager
def _interpreting(chosen: Sequence[Case], arch: str) -> Iterator[subprocess.Popen[str]]:
    """A process beside this one that counts the traffic of a few of the cases, while we compile."""
    package = str(Path(__file__).parents[3])
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1"}  # see way.py
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    told = json.dumps([[case.op.name, case.as_dict(), case.dtype_name] for case in few(chosen)])
    command = [sys.executable, "-m", f"{__package__}.traffic", arch, told]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def _unmeasured(
    args: argparse.Namespace, chosen: Sequence[Case], gpu: GPU, out: Console, bar: Callable[..., Any]
) -> None:
    """What is known of the kernels that the chosen cases launch: resources once compiled, and traffic."""
    launching = [case for case in chosen if case.op.name in OPS]
    if not launching:
        return
    with _interpreting(launching, gpu.arch) as counting:
        kernels = [] if INTERPRETED else _compiled(launching, gpu.arch, bar)
        if INTERPRETED:
            out.print("No compiled resources: this process interprets its kernels (TRITON_INTERPRET is set).")
        told, complaint = counting.communicate()
    traffic = [json.loads(line) for line in told.splitlines()]
    if args.json:
        for line in (*kernels, *traffic):
            print(json.dumps(line), flush=True)
    else:
        if kernels:
            out.print(resources_table(gpu.arch, kernels))
        out.print(traffic_table(gpu.arch, traffic))
    if counting.returncode:
        raise ValueError(f"the traffic could not be counted: {(complaint.strip().splitlines() or ['no reason'])[-1]}")


def _compiled(chosen: Sequence[Case], arch: str, bar: Callable[..., Any]) -> list[dict[str, Any]]:
    with bar(f"compiling for {arch}", None) as progress:
        kernels = compile_shapes(_as_listed(chosen), arch, progress=progress.update)
        return [{"kind": "kernel", **as_json(kernel)} for kernel in kernels]


def _as_listed(chosen: Sequence[Case]) -> list[Op]:
    """The operations of the cases, with the sizes and dtypes of these in the place of what the registry lists."""
    listed: dict[str, list[Case]] = {}
    for case in chosen:
        listed.setdefault(case.op.name, []).append(case)
    return [
        replace(
            own[0].op,
            bench_shapes=tuple(case.sizes for case in own),
            dtypes=tuple(dict.fromkeys(case.dtype for case in own)),
        )
        for own in listed.values()
    ]
