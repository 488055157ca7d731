"""The results of `verify`: rows, a report that rich prints as a table, and a dictionary for JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..kernels.registry import OPS
from .tolerance import share_of_limit

FP64 = ", fp64"  # the end of a case whose operations are computed by their references in fp64
TORCH = "plain torch"  # the backend without kernels
UNCALLED = "; the model never called it"  # the end of a line on a module that selects this package
QUALITY = "; how good the weights are, `perplexity` says"  # since a damaged checkpoint is computed rightly, too
BITS, REPEATED = "bits in any batch", "repeated"
ROUNDED = "as stored, rounded"  # the case of tensors that the model's dtype cannot hold exactly
END_RATIO = 4.0  # in the place of RATIO for a whole model, where rounding errors have grown from layer to layer


@dataclass(frozen=True)
class Row:
    """One comparison. The error is relative to an operation's largest result, of a layer (op "layer") and of logits to
    the norm of the worst token, and of loaded tensors (op "weights") the largest difference."""

    layer: int | None  # None: before or after the layers
    op: str
    case: str  # which input, or how the text is split into calls
    error: float
    limit: float  # the largest right error: mostly twice that of torch in the weights' dtype
    note: str = ""  # the error that the runtime raised, or the values that differ

    @classmethod
    def exact(cls, layer: int | None, op: str, case: str, right: bool, note: str = "") -> Row:
        """A comparison without a tolerance."""
        return cls(layer, op, case, 0.0 if right else math.inf, 0.0, note)

    @property
    def ok(self) -> bool:
        """NaN in a result is an infinite error, which is wrong even where torch has NaN, too."""
        return math.isfinite(self.error) and self.error <= self.limit

    @property
    def overflows(self) -> bool:
        """Whether torch itself has no finite result."""
        return not math.isfinite(self.limit)

    @property
    def where(self) -> str:
        return f"{self.op}{'' if self.layer is None else f' in layer {self.layer}'} ({self.case})"

    @property
    def share(self) -> float:
        return share_of_limit(self.error, self.limit)


def worst_rows(rows: Iterable[Row]) -> list[Row]:
    """Select, of rows with the same layer, op and case, the one nearest to its limit, or farthest beyond it."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.op, row.case), []).append(row)
    return [max(same, key=lambda row: (row.share, row.note)) for same in groups.values()]


def kinds_not_run(rows: Iterable[Row], kernels: bool, quantized: bool, activations: bool) -> list[str]:
    """A line for each kind of row that a Mixtral could have and `rows` do not, with what would run it. quantized: the
    cache has 8 bits; activations: those of the layers' products, too."""
    op_cases = {(row.op, row.case) for row in rows}
    ops, cases = {op for op, _ in op_cases}, {case for _, case in op_cases}
    kinds = (  # the line, and whether it ran
        ("kernels; needs TRITON_INTERPRET=1 before the import, or a GPU", kernels),
        ("config.json and tensors; needs folder=, the checkpoint", "config" in ops),
        ("digits of the files that the model's dtype has not; needs no --dtype", ROUNDED not in cases),
        ("layers in fp64; needs --no-quick", any(case.endswith(FP64) for case in cases)),
        ("caches of 8 bits; needs --cache-dtype int8", quantized),
        ("caches of the model's dtype; needs no --cache-dtype", not quantized),
        ("layers of activations in 16 bits, as in forwards of few rows; needs no --activations", not activations),
        ("generate; needs positions for new tokens", "generate" in ops),
        ("captured and repeated steps, staging, launch plans; needs a GPU", REPEATED in cases),
        ("deterministic mode; needs --deterministic", ("generate", BITS) in op_cases),
    )
    uncalled = [f"{op}; needs a case in other_calls (verification/judge.py)" for op in OPS if op not in ops]
    return uncalled + [line for line, ran in kinds if not ran]


def _for_json(fields: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """The fields with null for a number that JSON does not have."""
    return {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in fields}


@dataclass(frozen=True)
class Report:
    """All rows of a `verify`, which alone make the verdict."""

    rows: tuple[Row, ...]
    flips: int  # of `routed` routes (a token in a layer), those that differ end to end: near ties of a 16-bit type
    routed: int
    backend: str
    dtype: str
    peer: str = TORCH
    not_run: tuple[str, ...] = ()  # what this report says nothing about

    @property
    def compared(self) -> bool:
        """False where torch was compared with itself, which is always right."""
        return (self.backend, self.peer) != (TORCH, TORCH)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if not (row.ok or row.overflows)]

    @property
    def ok(self) -> bool:
        """Whether something was compared and every comparison is within its limit."""
        return self.compared and all(row.ok and not row.overflows for row in self.rows)

    @property
    def verdict(self) -> str:
        if wrong := self.wrong:
            return f"WRONG: {len(wrong)} of {len(self.rows)} comparisons fail, the first is {wrong[0].where}"
        for row in self.rows:
            if row.overflows:
                return f"OVERFLOW: plain torch overflows in {self.dtype} in {row.where}: use bfloat16"
        if not self.compared:
            why = "no kernel ran, so plain torch was compared with itself"
            return f"NOTHING WAS COMPARED: {why}; needs TRITON_INTERPRET=1 before the import, or a GPU"
        ran = f" ({TORCH}; no kernel ran)" if self.backend == TORCH else ""
        uncalled = sum(line.endswith(UNCALLED) for line in self.not_run)
        but = f"; selected modules that never ran: {uncalled}" if uncalled else ""
        return f"RIGHT{ran}: all {len(self.rows)} comparisons are within their limits{but or QUALITY}"

    def as_dict(self) -> dict[str, Any]:
        rows = [asdict(row, dict_factory=_for_json) | {"ok": row.ok} for row in self.rows]
        verdict = {key: getattr(self, key) for key in ("ok", "compared", "verdict")}
        return verdict | asdict(self, dict_factory=_for_json) | {"rows": rows}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line per operation and case, with its worst layer, then every failing row."""
        yield Text(f"{self.backend}, compared with {self.peer}; {self.dtype}; the worst of all layers")
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.case.removesuffix(FP64)), []).append(row)
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        for name in ("operation", "case", "error", "limit", "layer", "right"):
            justify: Any = "left" if name in ("operation", "case") else "right"
            table.add_column(name, justify=justify, no_wrap=name != "case", overflow="fold")  # errors stay whole
        for (op, case), rows in groups.items():
            worst, right = max(rows, key=lambda row: row.share), sum(row.ok for row in rows)
            layer = "-" if worst.layer is None else str(worst.layer)
            count = Text(f"{right}/{len(rows)}", style="green" if right == len(rows) else "bold red")
            table.add_row(op, case, f"{worst.error:.1e}", f"{worst.limit:.1e}", layer, count)
        yield table
        if self.routed:
            yield Text(f"routes that differ end to end: {self.flips} of {self.routed}")
        for row in self.wrong:
            error = row.note or f"error {row.error:.2e}, limit {row.limit:.2e}"
            yield Text(f"{row.where}: {error}", style="red")
        for line in self.not_run:
            yield Text(f"not run: {line}")
        style = "bold green" if self.ok else "bold red" if self.wrong else "bold yellow"
        yield Text(self.verdict, style)

    def __str__(self) -> str:
        console = Console(width=110, color_system=None, soft_wrap=True)  # the verdict is one line
        with console.capture() as text:
            console.print(self)
        return text.get().rstrip()
