"""What a run of the PTX emulator covered: instructions run of those compiled, by kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

BOUND = 0.90  # of all instructions of all variants


def noted(executor: Any) -> Iterator[tuple[str, str]]:
    """What the summary needs to know of an executor, as (kind, line)."""
    for kernel, codes in executor.codes.items():
        for code in codes:
            if code.key:  # else it is no compiler's
                ran = np.packbits(code.ran).tobytes().hex()
                yield "GPU code", f"{kernel} {code.program.target} {code.key} {len(code.ran)} {ran}"
    for kernel, times in executor.launches.items():
        yield "GPU launch", f"{kernel} {times} {id(executor)}"


def variants(codes: Iterable[str]) -> dict[tuple[str, str, str], np.ndarray]:
    """By kernel, target and variant: which instructions ran in any of the runs."""
    found: dict[tuple[str, str, str], np.ndarray] = {}
    for line in codes:
        kernel, target, key, count, bits = line.split()
        ran = np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[: int(count)].astype(bool)
        before = found.get((kernel, target, key))
        found[kernel, target, key] = ran if before is None else before | ran
    return found


def share(runs: Iterable[np.ndarray]) -> float:
    runs = list(runs)
    return sum(int(run.sum()) for run in runs) / max(1, sum(len(run) for run in runs))


def summary(found: Mapping[str, set[str]]) -> Iterator[str]:
    """Of what the tests wrote down, by kind."""
    runs, times = variants(found["GPU code"]), Counter[str]()
    for line in found.get("GPU launch", ()):
        kernel, count, _ = line.split()
        times[kernel] += int(count)
    for kernel in sorted({kernel for kernel, *_ in runs}):
        own = [run for (name, *_), run in runs.items() if name == kernel]
        best = max(share([run]) for run in own)
        yield (
            f"{kernel}: {times[kernel]} launches of {len(own)} variants, {share(own):.1%} of {sum(map(len, own)):,} "
            f"instructions run, {best:.1%} of the variant that ran most"
        )
    yield f"in all: {share(runs.values()):.1%} of {sum(map(len, runs.values())):,} instructions, needs {BOUND:.0%}"
    yield from missed(found.get("GPU mutation", set()))
    worst: dict[str, tuple[float, str, str]] = {}
    for line in found.get("GPU error", ()):
        op, dtype, error, limit = line.split()
        case = float(error) / max(float(limit), 1e-30), error, limit
        worst[f"{op} {dtype}"] = max(case, worst.get(f"{op} {dtype}", case))
    for case, (_, error, limit) in sorted(worst.items()):
        yield f"{case}: worst error {error}, at most {limit}"


def missed(sites: Iterable[str]) -> Iterator[str]:
    """By kind how many of those that were taken out were seen, and which were not."""
    by_kind: dict[str, Counter[str]] = {}
    for line in sites:
        kind, what, _ = line.split(" ", 2)
        by_kind.setdefault(kind, Counter())[what] += 1
    for kind, counts in sorted(by_kind.items()):
        rest = "".join(f", {counts[what]} {what}" for what in ("idle", "redundant", "missed") if counts[what])
        yield f"{kind} taken out: {counts['seen'] / counts.total():.0%} of {counts.total()} seen{rest}"
    for line in sorted(sites):
        kind, what, rest = line.split(" ", 2)
        if what != "seen":
            yield f"  {kind} {what}: {rest}"


def too_little(found: Mapping[str, set[str]]) -> bool:
    """Whether a run of everything ran less than it has to."""
    return share(variants(found.get("GPU code", ())).values()) < BOUND
