"""The benchmark's cases: every operation and a decode step, at the sizes of Mixtral or at a user's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..kernels.operation.cases import Cost, OpWithCases, as_dict
from ..kernels.operation.checks import dtype_name
from ..kernels.registry import OPS
from ..terminal import check_known
from .compile import check_sizes, parse_sizes
from .decode_step import FIELDS, STEP, costs, of_model
from .fit import KNOWN

TOKENS = (1, 4, 16, 64, 256, 1024, 4096)
FIRST_TOKENS, FIRST_MODELS = (1, 64, 4096), ("mixtral-8x7b", "qwen3-30b-a3b")  # what people run
BENCHED: dict[str, OpWithCases] = {**OPS, STEP.name: STEP}
CPU_FLOPS, CPU_BYTES = 2e10, 1 << 28  # what a CPU checks in seconds, in fp64 and with the torch backend


@dataclass(frozen=True)
class Case:
    """One call of an operation at some sizes in one dtype."""

    op: OpWithCases
    sizes: Any  # a case of the operation
    dtype: torch.dtype = torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes and flags, as `--sizes` takes them: True is 1."""
        return {name: int(value) if isinstance(value, bool) else value for name, value in as_dict(self.sizes).items()}

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments by name. Random values are drawn on the device, where a layer's weights take no time."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        with device:
            args = self.op.inputs(self.sizes, self.dtype, device, generator)
        if "new" in args:
            args["new"] = torch.full_like(args["new"], self.sizes.T)  # no sequence is padded
        return args

    def too_large_for_cpu(self) -> str | None:
        cost = self.op.cost(self.sizes, self.dtype)
        text = f"too large for a CPU ({cost.bytes / 1e6:,.0f} MB, {cost.flops / 1e9:,.0f} GFLOP)"
        return text if cost.flops > CPU_FLOPS or cost.bytes + cost.host_bytes > CPU_BYTES else None

    def costs(self, args: dict[str, Any] | None = None) -> list[Cost]:
        """Return the compulsory work of each operation, of a decode step several, which run one after the other; for
        the experts that `args` select, or those expected of uniform routing."""
        if self.op is STEP:
            return costs(self.sizes, self.dtype)
        routed = {"distinct": len(args["ids"].unique())} if args and hasattr(self.sizes, "distinct") else {}
        return [self.op.cost(replace(self.sizes, **routed), self.dtype)]


def cases(
    names: Sequence[str] = (),
    sizes: Sequence[str] = (),
    dtype: torch.dtype | None = None,
    model: str | None = None,
    weights: str | Mapping[str, str] | None = None,
) -> list[Case]:
    """Return the distinct cases of the operations `names` (empty: all) at Mixtral's sizes. sizes: a case each in their
    place ("T=32,H=1024"), the others as in 8x7B; a decode step's as in the `model` that `fit` knows, with `weights`
    as `from_pretrained` takes them. ValueError for a
    name, sizes or a dtype that there is not."""
    check_known("argument 'OP'", names, BENCHED)
    if sizes and not names:
        raise ValueError("--sizes goes with the operations it is for")
    if model is not None:
        check_known("--model", [model], KNOWN)
        check_known("--model is of the decode step: OP", names or ["none"], [STEP.name])
    all_cases = []
    for op in (BENCHED[name] for name in names or BENCHED):
        if names and dtype is not None:
            check_known(f"{op.name}: --dtype", [dtype_name(dtype)], map(dtype_name, op.dtypes))
        use = next((candidate for candidate in (dtype, torch.bfloat16) if candidate in op.dtypes), op.dtypes[0])
        shapes = [_read_sizes(op, text) for text in sizes] or _table(op)
        shapes = shapes if model is None else [of_model(shape, model) for shape in shapes]
        if weights is not None and op is STEP:
            text = weights if isinstance(weights, str) else ",".join(map("=".join, weights.items()))
            shapes = [replace(shape, weights=text) for shape in shapes]
        all_cases += [Case(op, shape, use) for shape in shapes]
    for case in all_cases if sizes else ():
        check_sizes("--sizes", case.op, case.sizes, case.dtype)
    return all_cases


def _table(op: OpWithCases) -> list[Any]:
    letters, shapes = {field.name for field in fields(op.case)}, [*dict.fromkeys(op.bench_shapes)]
    if "T" in letters and not {"S", "C"} & letters:  # only the tokens vary
        shapes = [*dict.fromkeys(replace(shape, T=T) for shape in shapes for T in TOKENS)]
        shapes.sort(key=lambda shape: (shape.T not in FIRST_TOKENS, not _is_of(shape, FIRST_MODELS)))
    return shapes


def _is_of(shape: Any, models: Sequence[str]) -> bool:
    """Return whether a layer's sizes are those of one of these models that `fit` knows."""
    names = {letter: name for name, letter in FIELDS.items() if letter in "HIEK" and hasattr(shape, letter)}
    sizes = [getattr(shape, letter) for letter in names]
    return sizes in [[getattr(KNOWN[model], name) for name in names.values()] for model in models]


def select_cases(found: Sequence[Case], only: str) -> list[Case]:
    """Return the cases that have all sizes of a text such as "T=64,E=128"; ValueError where none has."""
    sizes = parse_sizes("--only", only.split(","))
    kept = [case for case in found if all(getattr(case.sizes, name, None) == size for name, size in sizes.items())]
    if not kept:
        raise ValueError(f"--only is {only!r}, needs sizes that a case of these operations has")
    return kept


def _read_sizes(op: OpWithCases, text: str) -> Any:
    """Return the case of 8x7B with the sizes that a user wrote."""
    sizes = parse_sizes("--sizes", text.split(","))
    check_known(f"{op.name}: a name of --sizes", sizes, (field.name for field in fields(op.case)))
    flags = {name: bool(size) for name, size in sizes.items() if isinstance(getattr(op.bench_shapes[0], name), bool)}
    return replace(op.bench_shapes[0], **sizes | flags)
