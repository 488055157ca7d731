"""The command `bench`: measured on the GPU at hand, or what is known without one."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .bench import OUT_OF_MEMORY, Bench, CardLost, Row, known
from .bench_cases import Case, cases
from .bench_report import WIDTH, card_line, op_table, plot, resources_table, traffic_table
from .kernels.launch import INTERPRETED
from .kernels.offline import as_json, compile_ops
from .kernels.registry import OPS
from .kernels.roofline import CARDS, Card, table_note
from .peers import PEERS
from .plotting import check_plot

DEFAULT_CARD = "h100"


def run(args: argparse.Namespace, bar: Callable[..., Any]) -> int:
    """-> exit status: 1 where an operation is wrong or fails; a case too large for the card is neither.

    A case that leaves the card in an error ends the process: a new one goes on behind it by --first.
    """
    if args.first < 0:
        raise ValueError(f"--first is {args.first}, needs the number of a case")
    chosen = cases(args.ops, args.quick, args.at, args.sizes)[args.first :]
    if args.card is not None and args.card not in CARDS:
        raise ValueError(f"--card is {args.card!r}, needs one of {', '.join(CARDS)}")
    if unknown := set(args.without) - {peer.name for peer in PEERS}:
        raise ValueError(f"--without is {min(unknown)!r}, needs one of {', '.join(sorted({p.name for p in PEERS}))}")
    if args.plot is not None:
        check_plot(args.plot)
        plot([], CARDS[DEFAULT_CARD], args.plot)  # can it be written there?
    out = Console(stderr=args.json, highlight=False)
    if not out.is_terminal:
        out.width = WIDTH
    measuring = args.card is None and torch.cuda.is_available()
    if measuring:
        bench = Bench.of(torch.device("cuda"))
        card, sheet, source = bench.card, bench.sheet, bench.rows(chosen, args.without, partial(_begins, args, chosen))
    else:
        card, sheet = CARDS[args.card or DEFAULT_CARD], None
        source = (known(case, card) for case in chosen)
        reason = "--card asks for a data sheet" if args.card else "there is no GPU"
        out.print(f"No time was measured: {reason}. Floors are those of the card below.")
    out.print(card_line(card, sheet))
    if note := table_note(card.arch):
        out.print(note)
    if args.json:
        print(json.dumps({"kind": "card", **_card(card, sheet)}), flush=True)
    try:
        rows = list(_shown(source, chosen, args.json, out, bar))
    except CardLost as error:
        print(f"mixtral-triton bench: {error}", file=sys.stderr)
        return 1
    if args.json and measuring:
        print(json.dumps({"kind": "end"}), flush=True)
    if not measuring:
        _unmeasured(args, card, out, bar)
    if args.plot is not None:
        plot(rows, card, args.plot)
        out.print(f"roofline: {args.plot}")
    return 1 if any(row.ours.said not in (None, OUT_OF_MEMORY) for row in rows) else 0


def _card(card: Card, sheet: Card | None) -> dict[str, Any]:
    def rates(of: Card) -> dict[str, Any]:
        return {"name": of.name, "source": of.source, "bandwidth": of.bandwidth, "matmul": of.matmul}

    versions = {"torch": torch.__version__, "arch": card.arch}
    return {**rates(card), **versions, "data_sheet": None if sheet is None else rates(sheet)}


def _begins(args: argparse.Namespace, chosen: Sequence[Case], number: int) -> None:
    """A line before a case is measured: whoever started this process knows what it died of."""
    if args.json:
        case = {"op": chosen[number].op.name, "sizes": dict(chosen[number].sizes)}
        print(json.dumps({"kind": "begin", "number": args.first + number, **case}), flush=True)


def _shown(
    source: Iterator[Row], chosen: Sequence[Case], as_lines: bool, out: Console, bar: Callable[..., Any]
) -> Iterator[Row]:
    """The rows as they come: a line of JSON each, or a table an operation."""

    def counted() -> Iterator[Row]:
        with bar("benchmarking", len(chosen)) as progress:
            for done, row in enumerate(source, 1):
                progress.of(done, len(chosen))
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
def _interpreting(names: Sequence[str], arch: str) -> Iterator[subprocess.Popen[str]]:
    """A process beside this one that counts the traffic of the operations `names`, while we compile."""
    package = str(Path(__file__).parents[1])
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", f"{__package__}.bench_traffic", arch, *names]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, text=True, stdout=pipe, stderr=pipe) as process:
        try:
            yield process
        finally:
            process.kill()


def _unmeasured(args: argparse.Namespace, card: Card, out: Console, bar: Callable[..., Any]) -> None:
    """What is known of the kernels that the chosen operations launch in bf16: resources once compiled, and traffic."""
    names = [name for name in args.ops or OPS if name in OPS]
    if not names:
        return
    with _interpreting(names, card.arch) as counting:
        kernels = [] if INTERPRETED else _compiled(names, card.arch, bar)
        if INTERPRETED:
            out.print("No compiled resources: this process interprets its kernels (TRITON_INTERPRET is set).")
        told, complaint = counting.communicate()
    traffic = [json.loads(line) for line in told.splitlines()]
    if args.json:
        for line in (*kernels, *traffic):
            print(json.dumps(line), flush=True)
    else:
        if kernels:
            out.print(resources_table(card.arch, _worst(kernels)))
        out.print(traffic_table(card.arch, traffic))
    if counting.returncode:
        raise ValueError(f"the traffic could not be counted: {(complaint.strip().splitlines() or ['no reason'])[-1]}")


def _compiled(names: Sequence[str], arch: str, bar: Callable[..., Any]) -> list[dict[str, Any]]:
    with bar(f"compiling for {arch}", None) as progress:
        kernels = compile_ops(names, arch, progress=progress.of, dtypes=[torch.bfloat16])
        return [{"kind": "kernel", **as_json(kernel)} for kernel in kernels]


def _worst(kernels: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One for each kernel, dtype and launch configuration: what differs in sizes alone shows as the worst of them."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for kernel in kernels:
        tile = tuple((name, size) for name, size in kernel["constexprs"].items() if name.startswith("BLOCK_"))
        key = (kernel["kernel"], kernel["dtype"], kernel["num_warps"], kernel["num_stages"], tile)
        other = found.setdefault(key, kernel)
        found[key] = other | {name: max(other[name], kernel[name]) for name in ("registers", "spills", "shared_bytes")}
        figures = [each["loop_flop_per_instruction"] for each in (other, kernel)]
        found[key]["loop_flop_per_instruction"] = min(filter(None, figures), default=None)
        found[key]["fault"] = other["fault"] or kernel["fault"]
    return list(found.values())
