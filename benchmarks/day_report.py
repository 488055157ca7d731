"""What the parts of a GPU day printed, as one JSON object and one Markdown page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.progress import died, events

FULL_LAYERS = {4096: 32, 6144: 56}  # of Mixtral 8x7B and 8x22B, by hidden size


def stem(part: str, command: str) -> str:
    """The name of the files that a command of a part writes, without what tells its kinds apart."""
    return f"{part}-{command}".replace(" ", "_")


def _events(out: Path, name: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """What each command of a part wrote, by its name."""
    for file in sorted(out.glob(f"{stem(name, '*')}.out")):
        command = file.stem.removeprefix(stem(name, ""))
        yield command, events(file, file.with_suffix(".jsonl"))


def _tests(out: Path, name: str) -> dict[str, Any]:
    """Counts of outcomes over all processes, and the names of the tests that failed or that a process died of."""
    outcomes: dict[str, str] = {}
    for _, found in _events(out, name):
        outcomes |= {event["test"]: event["outcome"] for event in found if event.get("kind") == "outcome"}
        outcomes |= {begin["test"]: "died" for begin in died(found)}
    counts = Counter(outcomes.values())
    return {"counts": dict(counts), "failed": [test for test, how in outcomes.items() if how in ("failed", "died")]}


def results(state: dict[str, Any], out: Path) -> dict[str, Any]:
    """Everything that is known so far."""
    found: dict[str, Any] = {**state, "tests": None, "gpu": None, "rows": [], "died": [], "applied": None}
    seen: list[tuple[str, dict[str, int]]] = []
    for name, part in state["parts"].items():
        if part["status"] == "not started":
            continue
        if name == "tests":
            found["tests"] = _tests(out, name)
            continue
        for _, lines in _events(out, name):
            found["died"] += [{"op": begin["op"], "sizes": begin["sizes"]} for begin in died(lines)]
            for line in lines:
                if line.get("kind") == "gpu":
                    found["gpu"] = line
                elif "kernels_a_layer" in line:
                    found["applied"] = line
                elif line.get("kind") == "row" and (line["op"], line["sizes"]) not in seen:
                    seen.append((line["op"], line["sizes"]))
                    found["rows"].append(line)
    found["whole_models"] = whole_models(found["rows"])
    return found


def whole_models(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Decode steps of whole models, from two depths of the same step: what a layer adds, for every layer."""
    found = []
    steps = [row for row in rows if row["op"] == "decode_step"]
    for shallow in steps:
        for deep in steps:
            same = {**shallow["sizes"], "L": deep["sizes"]["L"]} == deep["sizes"]
            if not same or deep["sizes"]["L"] <= shallow["sizes"]["L"]:
                continue
            layers = FULL_LAYERS.get(deep["sizes"]["H"], deep["sizes"]["L"])
            ways = {"ours": (shallow["time_us"], deep["time_us"]), "floor": (shallow["floor_us"], deep["floor_us"])}
            if shallow.get("predicted") and deep.get("predicted"):
                ways["predicted"] = (shallow["predicted"]["time_us"], deep["predicted"]["time_us"])
            for peer in shallow["peers"].keys() & deep["peers"].keys():
                ways[peer] = (shallow["peers"][peer]["time_us"], deep["peers"][peer]["time_us"])
            for way, (few, many) in sorted(ways.items()):
                if few is None or many is None:
                    continue
                layer = (many - few) / (deep["sizes"]["L"] - shallow["sizes"]["L"])
                step = few + layer * (layers - shallow["sizes"]["L"])
                sizes = {letter: deep["sizes"][letter] for letter in ("B", "S", "H")}
                found.append(
                    {**sizes, "layers": layers, "way": way, "layer_us": layer, "step_us": step}
                    | {"tokens_per_second": deep["sizes"]["B"] * 1e6 / step}
                )
    return found


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return [*lines, *("| " + " | ".join(cells) + " |" for cells in rows), ""]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _sizes(sizes: dict[str, int]) -> str:
    return " ".join(f"{letter}{size}" for letter, size in sizes.items())


def _applied(found: dict[str, Any]) -> list[str]:
    """What `benchmarks/drop_in.py` said."""
    head = ("applied to transformers' model", "applied, ms", "eager, ms", "eager / applied")
    rows = [
        (row["model"], _number(row["applied_ms"]), _number(row["eager_ms"]), f"{row['ratio']:.2f}")
        for row in found["rows"]
    ]
    return ["## transformers' model with `apply`", "", *_table(head, rows)]


def _predicted(row: dict[str, Any]) -> list[str]:
    said = row.get("predicted")
    return [_number(said["time_us"]), said["limit"]] if said else ["-", "-"]


def _op(name: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    peers = list(dict.fromkeys(peer for row in rows for peer in row["peers"]))
    foreseen = any(row.get("predicted") for row in rows)
    head = ["sizes", "time, us", *(["predicted, us", "limit"] if foreseen else []), "floor, us", "of floor"]
    head += [f"{peer} / ours" for peer in peers]
    body, notes = [], {}
    for row in rows:
        sizes = _sizes(row["sizes"])
        share = "-" if row["of_floor"] is None else f"{100 * row['of_floor']:.0f} %"
        ratios = [row["peers"].get(peer, {}).get("ratio") for peer in peers]
        cells = [_number(row["time_us"]), *(_predicted(row) if foreseen else []), _number(row["floor_us"]), share]
        body.append([sizes, *cells, *("-" if ratio is None else f"{ratio:.2f}" for ratio in ratios)])
        for way, said in (("ours", row["note"]), *((peer, told["note"]) for peer, told in row["peers"].items())):
            if said:
                notes[f"- {way}, {sizes}: {said}"] = None
    return [f"## {name}", "", *_table(head, body), *notes, *([""] if notes else [])]


def markdown(found: dict[str, Any]) -> str:
    """The page: where and when, then tests, a table an operation, whole models."""
    before, after = found["before"], found["after"]
    lines = [
        "# A GPU day",
        "",
        "Written by `python benchmarks/gpu_day.py`; a ratio above 1 means that ours is faster. What is predicted",
        "follows from the launches and the GPU's data sheet, and is no measurement.",
        "",
    ]
    gpu = before["gpu"] or {}
    changed = after["gpu"] or {}
    about = [(name, value, changed.get(name, "-")) for name, value in gpu.items()]
    lines += _table(("gpu", "before", "after"), about) if about else ["nvidia-smi told nothing.", ""]
    about = [*before["versions"].items(), ("commit", before["commit"] or "-")]
    lines += _table(("software", "version"), about)
    if found["gpu"]:
        rates, sheet = found["gpu"], found["gpu"]["data_sheet"] or {}
        shown = [
            (what, _number(rates[key] / 1e12), _number(sheet[key] / 1e12 if sheet else None))
            for what, key in (("bandwidth, TB/s", "bandwidth"), ("bf16 matrix products, TFLOP/s", "matmul"))
        ]
        lines += _table((rates["name"], "measured", "data sheet"), shown)
    parts = [
        (name, part["status"], f"{part['seconds']:.0f}", f"{part['limit_s']:.0f}")
        for name, part in found["parts"].items()
    ]
    lines += _table(("part", "status", "seconds", "limit"), parts)
    if found["tests"]:
        counts = ", ".join(f"{number} {word}" for word, number in found["tests"]["counts"].items())
        lines += ["## Compiled tests", "", counts or "no test came to its end", ""]
        lines += [*(f"- {name}" for name in found["tests"]["failed"]), *([""] if found["tests"]["failed"] else [])]
    if found["died"]:
        lines += ["## What a process died of", ""]
        lines += [f"- {each['op']}, {_sizes(each['sizes'])}" for each in found["died"]] + [""]
    if found["applied"]:
        lines += _applied(found["applied"])
    for name in dict.fromkeys(row["op"] for row in found["rows"]):
        lines += _op(name, [row for row in found["rows"] if row["op"] == name])
    if found["whole_models"]:
        head = ("batch", "context", "layers", "way", "a layer, us", "a step, us", "tokens/s")
        keys = ("B", "S", "layers", "way", "layer_us", "step_us", "tokens_per_second")
        body = [[each[k] if k == "way" else _number(each[k]) for k in keys] for each in found["whole_models"]]
        lines += ["## Whole models", "", "Scaled: what one more layer adds, as often as the model has layers.", ""]
        lines += _table(head, body)
    return "\n".join(lines).rstrip() + "\n"
