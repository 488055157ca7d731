"""The report of an emulator run: which of the compiled instructions ran, by kernel, and which mutations were caught."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

BOUND = 0.90  # of all instructions of all variants


def coverage(executor: Any) -> Iterator[tuple[str, str]]:
    """Yield (kind, line) records of what an executor ran."""
    for kernel, codes in executor.codes.items():
        for code in codes:
            if code.key:  # a variant as the compiler made it
                ran = np.packbits(code.ran).tobytes().hex()
                yield "GPU code", f"{kernel} {code.program.target} {code.key} {len(code.ran)} {ran}"
    for kernel, times in executor.launches.items():
        yield "GPU launch", f"{kernel} {times} {id(executor)}"


def variants(codes: Iterable[str]) -> dict[tuple[str, str, str], np.ndarray]:
    """Return by kernel, target and variant which instructions ran in any of the runs."""
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for line in codes:
        kernel, target, key, count, bits = line.split()
        ran = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[: int(count)].astype(bool)
        found[kernel, target, key] = ran | found.get((kernel, target, key), False)
    return found


def share(runs: Iterable[np.ndarray]) -> float:
    runs = list(runs)
    return sum(int(run.sum()) for run in runs) / max(1, sum(len(run) for run in runs))


def summary(records: Mapping[str, set[str]]) -> Iterator[str]:
    """Yield the lines of the summary of all records, by kind."""
    runs, times = variants(records["GPU code"]), Counter[str]()
    for line in records.get("GPU launch", ()):
        kernel, count, _ = line.split()
        times[kernel] += int(count)
    for kernel in sorted({kernel for kernel, *_ in runs}):
        found = [run for (name, *_), run in runs.items() if name == kernel]
        yield (
            f"{kernel}: {times[kernel]} launches of {len(found)} variants, {share(found):.1%} of "
            f"{sum(map(len, found)):,} instructions run, {max(share([run]) for run in found):.1%} of the best variant"
        )
    yield f"in all: {share(runs.values()):.1%} of {sum(map(len, runs.values())):,} instructions, needs {BOUND:.0%}"
    yield from mutations(records.get("GPU mutation", set()))
    worst: dict[str, tuple[float, str, str]] = {}
    for line in records.get("GPU error", ()):
        op, dtype, error, limit = line.split()
        case = float(error) / max(float(limit), 1e-30), error, limit
        worst[f"{op} {dtype}"] = max(case, worst.get(f"{op} {dtype}", case))
    for name, (_, error, limit) in sorted(worst.items()):
        yield f"{name}: worst error {error}, at most {limit}"


def mutations(sites: Iterable[str]) -> Iterator[str]:
    """Yield by kind how many mutations were caught, and each one that was not."""
    by_kind: dict[str, Counter[str]] = {}
    for line in sites:
        kind, verdict, _ = line.split(" ", 2)
        by_kind.setdefault(kind, Counter())[verdict] += 1
    for kind, counts in sorted(by_kind.items()):
        rest = "".join(
            f", {counts[verdict]} {verdict}" for verdict in ("idle", "redundant", "missed") if counts[verdict]
        )
        yield f"{kind} removed: {counts['caught'] / counts.total():.0%} of {counts.total()} caught{rest}"
    for line in sorted(sites):
        kind, verdict, rest = line.split(" ", 2)
        if verdict != "caught":
            yield f"  {kind} {verdict}: {rest}"


def below_bound(records: Mapping[str, set[str]]) -> bool:
    """Return whether a complete run executed too few of the instructions."""
    return share(variants(records.get("GPU code", ())).values()) < BOUND
