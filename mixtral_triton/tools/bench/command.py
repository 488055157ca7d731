"""The command `bench`: measured on the current GPU, or what is known without one; a decode step on a mesh.

As a process of its own, since Triton either interprets or compiles, it counts the traffic of cases, as JSON lines:

    TRITON_INTERPRET=1 python -m mixtral_triton.tools.bench.command sm_90 '[["route", {"T": 64, "E": 8, "K": 2}, "bfloat16"]]'
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...config import MixtralConfig
from ...kernels.experts.tiles import DECODE_TOKENS
from ...kernels.launch import INTERPRETED, launch_context
from ...kernels.op import Op, Shape, Sizes
from ...kernels.registry import OPS
from ...parallel import Ranks
from ..compiled import as_json, resources_table
from ..gpus import GPU, RATED, data_sheet
from ..offline import compile_ops
from ..predict import family_note
from ..processes import is_first
from ..scaling import Step, step
from ..terminal import Column, Table, check_plot, console
from ..traffic import count_traffic
from . import decode_step
from .cases import BENCHED, Case, cases, select_quick
from .measure import DEFAULT_GPU, NO_GPU, Bench, DeviceLost, Row, StepTimer, checked_row
from .peers import PEERS, import_peer
from .report import PREDICTED, gpu_line, micro, op_table, plot, sizes_text, traffic_table

# The largest sizes at which traffic is counted.
REDUCED = {"H": 512, "I": 512, "N": 1024, "T": 128, "B": 2, "S": 1024, "C": 1024, "Hkv": 2}
MESH_ROUNDS, MESH_RUNS = 3, 20  # the same on every rank, since each step synchronizes them
NOT_ON_A_MESH = ("peer", "plot", "model", "quick", "first", "without")


def run(args: argparse.Namespace, bar: Callable[..., Any]) -> int:
    """Run the command and return its exit status: 1 where an operation or a user's peer is wrong or fails.

    A case too large for the GPU and an installed peer's failure are not errors. A case that leaves the GPU in an error
    ends the process; another one continues after it with --first.
    """
    if args.first < 0:
        raise ValueError(f"--first is {args.first}, needs the number of a case")
    selected = _select_cases(args)[args.first :]
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
        gpu, sheet = bench.gpu, bench.sheet
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
        rows = list(_print_rows(source, len(selected), args.json, out, bar))
    except DeviceLost as error:
        print(f"mixtral-triton bench: {error}", file=sys.stderr)
        return 1
    if args.json and measuring:
        print(json.dumps({"kind": "end"}), flush=True)
    if not measuring:
        _print_compiled(args.json, selected, gpu, out, bar)
    if args.plot is not None:
        plot(rows, gpu, args.plot)
        out.print(f"plot: {args.plot}")
    names = {peer.name for peer in user_peers}
    outcomes = [one for row in rows for one in (row.ours, *(row.peers[name] for name in names & row.peers.keys()))]
    return 1 if any(one.right is False for one in outcomes) else 0


def _select_cases(args: argparse.Namespace) -> list[Case]:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = MixtralConfig.from_pretrained(args.model) if args.model is not None else None
    return cases(args.ops, args.quick, args.at, args.sizes, dtype, model)


def _rates(gpu: GPU) -> dict[str, Any]:
    return {name: getattr(gpu, name) for name in ("name", "source", "bandwidth", "matmul")}


def _print_rows(
    source: Iterator[Row], total: int, as_lines: bool, out: Console, bar: Callable[..., Any]
) -> Iterator[Row]:
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


def _print_compiled(as_lines: bool, selected: Sequence[Case], gpu: GPU, out: Console, bar: Callable[..., Any]) -> None:
    """Print the compiled resources of the kernels that these cases launch, and the traffic of a few cases."""
    launching = [case for case in selected if case.op.name in OPS]
    if not launching:
        return
    with _traffic_process(launching, gpu.arch) as process:
        kernels: list[dict[str, Any]] = []
        if INTERPRETED:
            out.print("No compiled resources: this process interprets its kernels (TRITON_INTERPRET is set).")
        else:
            with bar(f"compiling for {gpu.arch}", None) as progress:
                compiled = compile_ops(_as_ops(launching), gpu.arch, progress=progress.update)
                kernels = [{"kind": "kernel", **as_json(kernel)} for kernel in compiled]
        printed, complaint = process.communicate()
    traffic = [json.loads(line) for line in printed.splitlines()]
    if as_lines:
        for line in (*kernels, *traffic):
            print(json.dumps(line), flush=True)
    else:
        if kernels:
            out.print(resources_table(gpu.arch, kernels))
        out.print(traffic_table(gpu.arch, traffic))
    if process.returncode:
        raise ValueError(f"the traffic could not be counted: {(complaint.strip().splitlines() or ['no reason'])[-1]}")


def _as_ops(selected: Sequence[Case]) -> list[Op]:
    """Return the operations of the cases, with these sizes and dtypes in place of the registry's."""
    by_op: dict[str, list[Case]] = {}
    for case in selected:
        by_op.setdefault(case.op.name, []).append(case)
    return [
        replace(
            group[0].op,
            bench_shapes=tuple(case.sizes for case in group),
            dtypes=tuple(dict.fromkeys(case.dtype for case in group)),
        )
        for group in by_op.values()
    ]


@contextmanager
def _traffic_process(selected: Sequence[Case], arch: str) -> Iterator[subprocess.Popen[str]]:
    """Count the traffic of a few of the cases in another process, while this one compiles."""
    package = str(Path(__file__).parents[3])
    environment = {"OPENBLAS_NUM_THREADS": "1", **os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    text = json.dumps([[case.op.name, case.as_dict(), case.dtype_name] for case in select_quick(selected)])
    command, pipe = [sys.executable, "-m", __spec__.name, arch, text], subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def reduce_sizes(sizes: Sizes) -> Shape:
    """Return small sizes with the same query heads per group, share of a window, and fill of the ring."""
    small = Shape(sizes) | {name: min(size, REDUCED.get(name, size)) for name, size in sizes.items()}
    if sizes["T"] > DECODE_TOKENS:  # only the deep tiles of the sort-free experts need more
        small |= {name: min(small[name], 256) for name in ("H", "I") if name in small}
    if "Hq" in sizes:
        small["Hq"] = small["Hkv"] * sizes["Hq"] // sizes["Hkv"]
    if sizes.get("S") == sizes["T"]:
        small["S"] = small["T"] = min(sizes["T"], 512)
    keys = "C" if "C" in sizes else "S"
    if sizes.get("window"):
        small["window"] = max(1, sizes["window"] * small[keys] // sizes[keys])
    if "C" in sizes and "past" in sizes:
        small["past"] = small["C"] - 1
    return small


def count_cases(selected: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Yield bytes and FLOP of interpreted calls relative to the compulsory ones; `issued` None: nothing uses tl.dot."""
    small = [Case(case.op, reduce_sizes(case.sizes), case.dtype) for case in selected]
    for case in {(case.op.name, *case.as_dict().items()): case for case in small}.values():
        args = case.inputs(torch.device("cpu"))
        with count_traffic() as traffic:
            case.op.run(**args)
        if not traffic.kernels:  # a library does the work
            continue
        cost = case.cost(args)
        touched = sum(argument.distinct for kernel in traffic.kernels for argument in kernel.arguments.values())
        ratios = {"touched": touched / cost.bytes, "moved": traffic.moved() / cost.bytes}
        issued = traffic.flops / cost.flops if traffic.flops else None
        yield {"kind": "traffic", "op": case.op.name, "sizes": case.as_dict(), **ratios, "issued": issued}


def run_on_mesh(args: argparse.Namespace, mesh: Any) -> int:
    """Run `bench decode_step` on every rank: predicted by the cost model, measured where there are GPUs."""
    if args.ops not in ([], ["decode_step"]):
        raise ValueError(f"bench: on a mesh it times decode_step, and got {' '.join(args.ops)}")
    if unused := [name for name in NOT_ON_A_MESH if getattr(args, name)]:
        raise ValueError(f"--{unused[0]} is given, and a mesh has no use for it")
    linked = [key for key, gpu in RATED.items() if gpu.chip is not None]
    if args.gpu is not None and args.gpu not in linked:
        raise ValueError(f"--gpu is {args.gpu!r}, needs one of {', '.join(linked)}: of others no links are known")
    ranks, measuring = Ranks(mesh), mesh.device_type == "cuda" and args.gpu is None
    gpu: GPU | None = RATED[args.gpu or DEFAULT_GPU]
    if measuring:
        gpu = data_sheet(torch.cuda.get_device_properties(torch.cuda.current_device()).name)
    rows: list[tuple[Case, Step | None, float | None]] = []
    for case in cases(["decode_step"], at=args.at, sizes=args.sizes, dtype=getattr(torch, args.dtype or "", None)):
        config = replace(decode_step.config(case.sizes), dtype=case.dtype_name)
        with ranks.raise_on_any_rank():
            ranks.shard.check(config)
        expected = None
        if gpu is not None and gpu.chip is not None:
            expected = step(config, {}, ranks.shard, gpu, case.sizes["B"], 1, case.sizes["S"])
        rows.append((case, expected, measure_on_mesh(case, ranks) if measuring else None))
    if is_first():
        _print_mesh(args.json, rows, ranks, gpu.name if gpu and gpu.chip else "a GPU without known links")
    return 0


def measure_on_mesh(case: Case, ranks: Ranks) -> float:
    """Return the mean seconds of a step in a row of steps: the median of MESH_ROUNDS, on the slowest rank."""
    device = torch.device("cuda", torch.cuda.current_device())
    generator = torch.Generator(device).manual_seed(0)  # the same gate on all ranks
    with torch.no_grad(), device:
        args = decode_step.inputs(case.sizes, case.dtype, device, generator, ranks)
        once, timer = decode_step.replayed_step(args), StepTimer(device)
        timer.mean_of(once, MESH_ROUNDS)
        seconds = statistics.median(timer.mean_of(once, MESH_RUNS) for _ in range(MESH_ROUNDS))
    return max(ranks.all_gather_object(seconds))


def _print_mesh(as_json: bool, rows: Sequence[tuple[Case, Step | None, float | None]], ranks: Ranks, gpu: str) -> None:
    shard, out = ranks.shard, console()
    columns = [Column("sizes", number=False), Column("predicted, us"), Column("sent"), Column("us"), Column("tokens/s")]
    table = Table(f"decode_step, tp {shard.tp} x ep {shard.ep}, on {gpu}", columns, PREDICTED)
    lines: list[dict[str, Any]] = [{"kind": "mesh", "tp": shard.tp, "ep": shard.ep, "gpu": gpu}]
    for case, expected, seconds in rows:
        predicted = expected and {"time_us": expected.seconds * 1e6, "sending_us": expected.sending * 1e6}
        line = {"kind": "row", "op": "decode_step", "sizes": case.as_dict()}
        lines.append({**line, "time_us": seconds and seconds * 1e6, "predicted": predicted})
        cells = (
            ["-", "-"]
            if expected is None
            else [micro(expected.seconds), f"{100 * expected.sending / expected.seconds:.0f} %"]
        )
        rate = "-" if seconds is None else f"{case.sizes['B'] / seconds:,.0f}"
        table.add(sizes_text(case.as_dict()), *cells, micro(seconds), rate)
    if as_json:
        for line in lines:
            print(json.dumps(line))
        return
    if all(seconds is None for _, _, seconds in rows):
        out.print("No time was measured: needs a GPU a process, and no --gpu.")
    out.print(table)


if __name__ == "__main__":
    with launch_context(arch=sys.argv[1]):
        for line in count_cases(
            [Case(BENCHED[name], sizes, getattr(torch, dtype)) for name, sizes, dtype in json.loads(sys.argv[2])]
        ):
            print(json.dumps(line), flush=True)
