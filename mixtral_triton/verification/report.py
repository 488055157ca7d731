"""The results of `verify`: rows, a report that rich prints as a table, and a dictionary for JSON."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from ..tools.tolerance import share_of_limit

FP32 = ", fp32"  # the end of a case whose weights were widened from 16 bits
TORCH = "plain torch"  # the backend without kernels
BITS, REPEATED = "bits in any batch", "repeated"
PEER = "transformers"  # the case of a row that compares with another implementation
END_RATIO = 4.0  # in the place of RATIO for a whole model, where rounding errors have grown from layer to layer


@dataclass(frozen=True)
class Row:
    """One comparison: of an operation of a layer, of a layer (op "layer"), of loaded tensors (op "weights").

    layer  None: before or after the layers
    case   which input, or how the text is split into calls
    error  of an operation relative to its largest result; of a layer and of logits that of the worst token relative to
           its norm; of loaded tensors the largest difference
    limit  the largest right error: mostly twice that of torch in the weights' dtype
    note   the error that the runtime raised, which is wrong
    """

    layer: int | None
    op: str
    case: str
    error: float
    limit: float
    note: str = ""

    @property
    def ok(self) -> bool:
        """NaN in a result is an infinite error, which is wrong even where torch has NaN, too."""
        return math.isfinite(self.error) and self.error <= self.limit

    @property
    def overflows(self) -> bool:
        """Whether torch itself has no finite result, so that nothing can be said of the runtime's."""
        return not math.isfinite(self.limit)

    @property
    def where(self) -> str:
        return self.op if self.layer is None else f"{self.op} in layer {self.layer}"

    @property
    def share(self) -> float:
        """The error as a share of its limit."""
        return share_of_limit(self.error, self.limit)


def worst_rows(rows: Iterable[Row]) -> list[Row]:
    """Of the rows with the same layer, op and case, the one that is nearest to its limit, or farthest beyond it."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.layer, row.op, row.case), []).append(row)
    return [max(same, key=lambda row: (row.share, row.note)) for same in groups.values()]


# Kinds of rows: what they compare, what runs them, the attribute of what was verified that they need, and whether a row
# is one of them.
KINDS: tuple[tuple[str, str, str, Callable[[Row, Any], bool]], ...] = (
    ("kernels", "TRITON_INTERPRET=1 before the import, or a GPU", "", lambda row, on: on.kernels),
    ("config.json, tensors and tokenizer", "folder=, the checkpoint", "mixtral", lambda row, on: row.op == "config"),
    ("transformers' model of the files", "--peer transformers", "mixtral", lambda row, on: PEER in row.case),
    (
        "layers in fp32",
        "a Mixtral on one device, no --quick or --cache-dtype",
        "half",
        lambda row, on: row.case.endswith(FP32),
    ),
    ("caches of 8 bits", "--cache-dtype int8", "mixtral", lambda row, on: on.quantized_cache),
    ("caches of the model's dtype", "no --cache-dtype", "mixtral", lambda row, on: not on.quantized_cache),
    ("experts alone in each layer", "24 tokens of text", "", lambda row, on: row.case.startswith("experts,")),
    ("generate", "a Mixtral, and positions for new tokens", "", lambda row, on: row.op == "generate"),
    ("captured and repeated steps, staging", "a GPU", "mixtral", lambda row, on: row.case == REPEATED),
    ("deterministic mode", "--deterministic", "mixtral", lambda row, on: (row.op, row.case) == ("generate", BITS)),
)


def kinds_not_run(rows: Sequence[Row], on: Any) -> list[str]:
    """A line for each kind of row that `on` could have and `rows` do not. on: attributes kernels,
    mixtral, half and quantized_cache."""
    kinds = (kind for kind in KINDS if not kind[2] or getattr(on, kind[2]))
    return [f"{what}; needs {needs}" for what, needs, _, fits in kinds if not any(fits(row, on) for row in rows)]


def for_json(value: Any) -> Any:
    """`value` with null for a number that JSON does not have, and beside it, as "NAME_text", "inf" or "nan"."""
    if isinstance(value, dict):
        odd = {key: x for key, x in value.items() if isinstance(x, float) and not math.isfinite(x)}
        texts = {f"{key}_text": str(x) for key, x in odd.items()}
        return {**{key: None if key in odd else for_json(x) for key, x in value.items()}, **texts}
    return [for_json(x) for x in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class QuantizationCost:
    """Both models in fp64: on the dequantized weights, and on the weights of the files; or over both caches.

    formats  of the quantized parts of the model, by their names in QUANTIZED_PARTS, or of the cache
    cosine   between the logits of a token in both, the mean over all tokens; `min_cosine`: the smallest
    flips    of `routed` routes (a token in a layer), those that differ
    perplexity, stored_perplexity  of the folder's held-out text; None where it has none
    """

    formats: dict[str, str]
    cosine: float
    min_cosine: float
    flips: int
    routed: int
    perplexity: float | None = None
    stored_perplexity: float | None = None

    def __str__(self) -> str:
        kinds = ", ".join(f"{part} {format}" for part, format in self.formats.items())
        against, short = "the weights as stored", "as stored"
        if "cache" in self.formats:
            against, short = "keys and values that are not quantized", "without"
        text = (
            f"Quantized: {kinds}. Cost against {against}, in fp64: cosine of the logits {self.cosine:.5f}, "
            f"of the worst token {self.min_cosine:.5f}; routes that differ: {self.flips} of {self.routed}"
        )
        if self.perplexity is None or self.stored_perplexity is None:
            return f"{text}."
        percent = 100 * (self.perplexity / self.stored_perplexity - 1)
        return f"{text}; perplexity {self.perplexity:.3f}, {short} {self.stored_perplexity:.3f} ({percent:+.2f} %)."


@dataclass(frozen=True)
class Report:
    """All rows of a `verify`.

    flips         of `routed` routes (a token in a layer), those that differ end to end: near ties of a 16-bit type
    quantization  the cost of quantizing while loading; the rows compare with the dequantized weights
    not_run       what this report says nothing about
    cache         the cost of 8 bits for keys and values; the rows compare with torch over such a cache
    None of the four is part of the verdict.
    """

    rows: tuple[Row, ...]
    flips: int
    routed: int
    backend: str
    dtype: str
    peer: str = TORCH
    quantization: QuantizationCost | None = None
    not_run: tuple[str, ...] = ()
    cache: QuantizationCost | None = None

    @property
    def compared(self) -> bool:
        """False where torch was compared with itself, which is always right."""
        return (self.backend, self.peer) != (TORCH, TORCH) or any(row.case == PEER for row in self.rows)

    @property
    def wrong(self) -> list[Row]:
        return [row for row in self.rows if not (row.ok or row.overflows)]

    @property
    def ok(self) -> bool:
        """Whether something was compared and every comparison is within its limit."""
        return self.compared and all(row.ok and not row.overflows for row in self.rows)

    @property
    def verdict(self) -> str:
        if self.wrong:
            first, count = self.wrong[0], f"{len(self.wrong)} of {len(self.rows)} comparisons fail"
            return f"WRONG: {count}, the first is {first.where} ({first.case})"
        overflow = next((row for row in self.rows if row.overflows), None)
        if overflow is not None:
            where = f"{overflow.where} ({overflow.case})"
            return f"OVERFLOW: plain torch overflows in {self.dtype} in {where}: use bfloat16"
        if not self.compared:
            return "NOTHING WAS COMPARED: no kernel ran, so plain torch was compared with itself"
        return f"RIGHT: all {len(self.rows)} comparisons are within their limits"

    def as_dict(self) -> dict[str, Any]:
        verdict = {key: getattr(self, key) for key in ("ok", "compared", "verdict")}
        rows = [{**asdict(row), "ok": row.ok} for row in self.rows]
        return for_json({**verdict, **asdict(self), "rows": rows})  # type: ignore[no-any-return]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """One line per operation and case, with its worst layer, then every failing row."""
        yield Text(f"{self.backend}, compared with {self.peer}; {self.dtype}; the worst of all layers")
        yield self._table()
        yield Text(f"routes that differ end to end: {self.flips} of {self.routed}")
        yield from (Text(str(cost)) for cost in (self.quantization, self.cache) if cost is not None)
        for row in self.wrong:
            error = row.note or f"error {row.error:.2e}, limit {row.limit:.2e}"
            yield Text(f"{row.where} ({row.case}): {error}", style="red")
        for line in self.not_run:
            yield Text(f"not run: {line}")
        yield Text(self.verdict, style="bold green" if self.ok else "bold red" if self.wrong else "bold yellow")

    def _table(self) -> Table:
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.op, row.case.removesuffix(FP32)), []).append(row)
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        for name in ("operation", "case", "error", "limit", "layer", "right"):
            table.add_column(name, justify="left" if name in ("operation", "case") else "right", no_wrap=True)
        for (op, case), rows in groups.items():
            worst, right = max(rows, key=lambda row: row.share), sum(row.ok for row in rows)
            layer = "-" if worst.layer is None else str(worst.layer)
            count = Text(f"{right}/{len(rows)}", style="green" if right == len(rows) else "bold red")
            table.add_row(op, case, f"{worst.error:.1e}", f"{worst.limit:.1e}", layer, count)
        return table

    def __str__(self) -> str:
        text = io.StringIO()
        Console(file=text, width=110, color_system=None).print(self)
        return text.getvalue().rstrip()
