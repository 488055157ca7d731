"""The benchmark's cases: every operation and a decode step, at the sizes of Mixtral."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from typing import Any

import torch

from ...checkpoint import parameter_shapes
from ...kernels.checks import dtype_name
from ...kernels.fp8 import W8A8
from ...kernels.op import Cost, Op, as_dict
from ...kernels.registry import OPS
from ...model import SIXTEEN_BIT_ROWS
from ...offload_plan import MemoryRequest, movable_bytes, place, usable_bytes
from ..fit import KNOWN, free_bytes, placement
from ..gpus import GPU
from ..terminal import parse_choices, parse_sizes
from . import decode_step

Texts = Sequence[str]

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = 6  # cases per operation with --quick
BENCHED: dict[str, Op] = {**OPS, decode_step.STEP.name: decode_step.STEP}
CPU_FLOPS, CPU_BYTES = 2e10, 1 << 28  # what a CPU checks in seconds, in fp64 and with the torch backend
FROM_VALUES = {"distinct", "distinct_on_host"}  # what the values of a call decide: `--sizes` does not set them


@dataclass(frozen=True)
class Case:
    """One call of an operation at some sizes in one dtype."""

    op: Op
    sizes: Any  # a case of the operation
    dtype: torch.dtype = torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes and flags, as `--sizes` takes them: True is 1."""
        return {name: int(value) if isinstance(value, bool) else value for name, value in as_dict(self.sizes).items()}

    def offloaded(self, experts: int | str, gpu: GPU | None = None) -> Case:
        """Return this decode step with so many experts of each layer in host memory; "auto": what `fit` says."""
        config, sizes = replace(decode_step.config(self.sizes), dtype=self.dtype_name), self.sizes
        most = (config.num_local_experts - 1) * config.num_hidden_layers
        if experts == "auto" and gpu is not None:
            cache_dtype = torch.int8 if sizes.cache else None
            found = placement(config, {}, sizes.B, sizes.S, cache_dtype, usable_bytes(free_bytes(gpu)))
            count = found.count if found else most  # where no number is enough, as in loading
        else:
            movable = movable_bytes(config, parameter_shapes(config), {}, self.dtype)
            count = place(MemoryRequest(experts), config, None, torch.device("meta"), 0, movable).count
        return replace(self, sizes=replace(sizes, offload=count / config.num_hidden_layers))

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments by name. Random values are drawn on the device, where a layer's weights take no time."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        with device:
            args = self.op.inputs(self.sizes, self.dtype, device, generator)
        if "new" in args:
            args["new"] = torch.full_like(args["new"], self.sizes.T)  # no sequence is padded
        return args

    def too_large_for_cpu(self) -> str | None:
        cost = self.cost()
        text = f"too large for a CPU ({cost.bytes / 1e6:,.0f} MB, {cost.flops / 1e9:,.0f} GFLOP)"
        return text if cost.flops > CPU_FLOPS or cost.bytes + cost.host_bytes > CPU_BYTES else None

    def cost(self, args: dict[str, Any] | None = None) -> Cost:
        """Return the compulsory work, for the experts that `args` select, or those expected of uniform routing."""
        return sum(self.costs(args), Cost(0, 0))

    def costs(self, args: dict[str, Any] | None = None) -> list[Cost]:
        """Return the work of each operation: of a decode step several, which run one after the other."""
        routed: dict[str, Any] = decode_step.routed(args) if args and self.op is decode_step.STEP else {}
        if args and "ids" in args and hasattr(self.sizes, "distinct"):
            routed["distinct"] = len(args["ids"].unique())
        sizes = replace(self.sizes, **routed)
        step = self.op is decode_step.STEP
        return decode_step.costs(sizes, self.dtype) if step else [self.op.cost(sizes, self.dtype)]


def cases(
    names: Texts = (), quick: bool = False, at: Texts = (), sizes: Texts = (), dtype: torch.dtype | None = None
) -> list[Case]:
    """Return the distinct cases of the operations `names` (empty: all) at Mixtral's sizes. quick: at most QUICK each,
    of 8x7B. at: only those of these sizes ("T=4096"), of several of one letter any. sizes: in place of the table's
    ("T=32,H=1024"). ValueError for a name, sizes or a dtype that there is not, or sizes that are missing."""
    if unknown := [name for name in names if name not in BENCHED]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(BENCHED)}")
    for op in (BENCHED[name] for name in names):
        if dtype is not None and dtype not in op.dtypes:
            known = ", ".join(map(dtype_name, op.dtypes))
            raise ValueError(f"--dtype is {dtype_name(dtype)!r}, and {op.name} has {known}: leave --dtype out")
    if sizes:
        if not names or quick or at:
            raise ValueError("--sizes goes with the operations it is for, and without --quick and --at")
        return [_parse_case(BENCHED[name], text, dtype) for name in names for text in sizes]
    wanted, found = parse_choices("--at", at), list[Case]()
    for op in (op for name, op in BENCHED.items() if name in names or not names):
        shapes, letters = list(op.bench_shapes), set(sizes_of(op)[0])
        if "T" in letters and not {"S", "C"} & letters:  # only the tokens vary
            shapes = [replace(shape, T=T) for shape in shapes for T in TOKENS]
            shapes = [shape for shape in shapes if W8A8 not in vars(shape).values() or shape.T > SIXTEEN_BIT_ROWS]
        distinct = dict.fromkeys(shapes)
        shapes = [shape for shape in distinct if all(getattr(shape, name, None) in wanted[name] for name in wanted)]
        if quick:  # evenly spread by their bytes, with the first and the last
            shapes = [shape for shape in shapes if getattr(shape, "H", None) != KNOWN["mixtral-8x22b"].hidden_size]
            shapes.sort(key=lambda shape: op.cost(shape, _dtype(op, dtype)).bytes)
            step = max(1.0, (len(shapes) - 1) / (QUICK - 1))
            shapes = [shapes[round(index * step)] for index in range(min(QUICK, len(shapes)))]
        found += [Case(op, shape, _dtype(op, dtype)) for shape in shapes]
    if not found:
        raise ValueError(f"--at {' '.join(at)}: no case of the benchmark has these sizes")
    return found


def _dtype(op: Op, wanted: torch.dtype | None) -> torch.dtype:
    """Return `wanted` or bf16 where the operation has it; ids stay integers."""
    return next((dtype for dtype in (wanted, torch.bfloat16) if dtype in op.dtypes), op.dtypes[0])  # type: ignore[return-value]


def sizes_of(op: Op) -> tuple[list[str], list[str]]:
    """Return the sizes and flags of an operation, and those without a default."""
    known = [field for field in fields(op.case) if field.name not in FROM_VALUES]
    return [field.name for field in known], [field.name for field in known if field.default is MISSING]


def _parse_case(op: Op, text: str, dtype: torch.dtype | None) -> Case:
    """Return the case of `op` at the sizes that a user wrote; those with a default may be left out."""
    sizes, (known, needed) = parse_sizes("--sizes", text.split(",")), sizes_of(op)
    if foreign := [name for name in sizes if name not in known]:
        raise ValueError(f"--sizes has {foreign[0]}, and {op.name} has {', '.join(known)}")
    if missing := [name for name in needed if name not in sizes]:
        raise ValueError(f"--sizes lacks {', '.join(missing)}: {op.name} needs {', '.join(needed)}")
    if empty := [name for name in ("B", "T", "H", "I", "E", "V", "N", "P") if sizes.get(name) == 0]:
        raise ValueError(f"--sizes has {empty[0]}=0, needs at least 1: there is nothing to time")
    if "E" in sizes and (K := sizes.get("K", 0)) > sizes["E"]:
        raise ValueError(f"--sizes has K={K}, needs at most E={sizes['E']}: a token's experts differ")
    flags = {field.name for field in fields(op.case) if isinstance(field.default, bool)}
    sizes = {name: bool(size) if name in flags else size for name, size in sizes.items()}
    case = Case(op, op.case(**sizes), _dtype(op, dtype))
    if "offload" in sizes:
        case.offloaded(sizes["offload"])
    try:
        op.check(**case.inputs(torch.device("meta")))
    except (RuntimeError, OverflowError, TypeError):
        raise ValueError(f"--sizes is {text!r:.80}, needs tensors that can be") from None
    return case
