"""Write the page of a card's measurements, with a picture, from the JSON lines in a folder of gpu_day.

python benchmarks/measured.py benchmarks/results/NAME
"""

import io
import json
import re
import sys
from dataclasses import fields
from datetime import date
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))  # a script's own path holds only its folder
from mixtral_triton.bench.cases import BENCHED, Case
from mixtral_triton.bench.command import figure_of, op_table
from mixtral_triton.bench.gpus import GPU
from mixtral_triton.bench.measure import Outcome, Row
from mixtral_triton.kernels.operation.cases import Cost

ROOT = Path(__file__).resolve().parents[1]


def read_row(values: Any) -> Row:
    """Return the row of a line that `bench --json` printed."""
    op = BENCHED[values["op"]]
    flags = {field.name for field in fields(op.case) if field.type == "bool"}
    sizes = {name: bool(value) if name in flags else value for name, value in values["sizes"].items()}
    outcomes = {
        name: Outcome(x["time_us"] and x["time_us"] / 1e6, x["note"], x["right"])
        for name, x in {"ours": values, **values["peers"]}.items()
    }
    case, cost = Case(op, op.case(**sizes), getattr(torch, values["dtype"])), Cost(values["flops"], values["bytes"])
    launches, ours = tuple(values["launches"]), outcomes.pop("ours")
    return Row(case, cost, values["floor_us"] / 1e6, values["bound"], launches, ours, outcomes)


def read_rows(folder: Path) -> tuple[GPU | None, list[Row]]:
    """Return the GPU that the lines in a folder name, None where there are none, and the rows by operation."""
    lines = [line for file in sorted(folder.glob("bench_*.out")) for line in file.read_text().splitlines()]
    values = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    names = "name", "source", "bandwidth", "matmul", "arch"
    gpus = [GPU("", **{name: x[name] for name in names}) for x in values if x["kind"] == "gpu"]
    rows = {json.dumps([x["op"], x["sizes"], x["dtype"]]): read_row(x) for x in values if x["kind"] == "row"}
    return gpus[-1] if gpus else None, sorted(rows.values(), key=lambda row: [*BENCHED].index(row.case.op.name))


def write_page(folder: Path, pages: Path, card: str) -> Path:
    """Write the page and the picture of what was timed -> the page's file."""
    gpu, rows = read_rows(folder)
    summary: dict[str, Any] = json.loads((folder / "gpu_day.json").read_text())
    name = re.sub(r"\W+", "-", card.lower())
    page = io.StringIO()
    page.write(
        f"# {card}\n\nMeasured on {date.today()} by `python benchmarks/gpu_day.py`, torch {summary['torch']}.\n\n"
    )
    page.write("| step | ended | seconds | finding |\n| --- | --- | --- | --- |\n")
    for step, outcome in summary["steps"].items():
        finding = outcome["finding"].replace("|", "\\|")
        page.write(f"| {step} | {outcome['status']} | {outcome['seconds']} | {finding} |\n")
    pages.mkdir(parents=True, exist_ok=True)
    timed = [row for row in rows if row.ours.seconds]
    if gpu is not None and timed:
        figure_of(timed, gpu).savefig(pages / f"{name}.png", dpi=100)
        rates = f"{gpu.bandwidth / 1e12:.2f} TB/s, {gpu.matmul / 1e12:.0f} TFLOP/s of bf16 matrix products"
        page.write(f"\nFloors by {rates}, {gpu.source}.\n\n![times beside floors and peers]({name}.png)\n")
    for _, group in groupby(rows, key=lambda row: row.case.op.name):
        text = io.StringIO()
        Console(file=text, width=1000).print(op_table([*group]))
        page.write("\n```\n" + "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n```\n")
    file = pages / f"{name}.md"
    file.write_text(page.getvalue(), encoding="utf-8")
    return file


if __name__ == "__main__":
    print(write_page(Path(sys.argv[1]), ROOT / "docs" / "measured", Path(sys.argv[1]).name))
