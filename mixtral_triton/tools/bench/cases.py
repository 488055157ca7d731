"""The benchmark's cases (every operation and a decode step, at the sizes of Mixtral) and the check of a result."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from ...config import MixtralConfig
from ...kernels.checks import dtype_name
from ...kernels.op import Cost, Op, Shape, Sizes, switches
from ...kernels.quantized import BITS
from ...kernels.registry import OPS
from ..fit import KNOWN
from ..tolerance import Tolerance
from . import decode_step

Check = Callable[[Callable[..., Any]], "str | None"]  # of a function: what is wrong with its results

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = 6  # cases per operation with --quick
BENCHED: dict[str, Op] = {**OPS, decode_step.STEP.name: decode_step.STEP}
# What a CPU checks in seconds, in fp64 and with the torch backend.
CPU_FLOPS, CPU_VALUES = 2e10, 1 << 27
QUANTIZED = {"weight", "gate_up", "down"}  # switches that hold the format of a quantized weight
DEFAULTS = {"window": 0, "past": 0}  # of sizes that `--sizes` may leave out: no window, an empty cache
# Peers round at other points than the reference: they may err this many times as much as our own limit.
PEER_SLACK = 2.0
# The error of fp32 products in TF32, Triton's default; these operations have none.
TF32 = 2.0**-9
NO_PRODUCT = {"rms_norm", "add_rms_norm", "embed_rms_norm", "rope", "append", "route", "sort_by_expert"}
# A longer attention is checked in blocks of queries: the scores of all would not fit any GPU.
UNBLOCKED_MOST, BLOCK = 1024, 256


class WrongResult(Exception):
    """A peer does something that its operation does not; the message says what."""


@dataclass(frozen=True)
class Case:
    """One call of an operation at some sizes in one dtype."""

    op: Op
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Return the sizes and switches, as `--sizes` takes them."""
        return Shape(self.sizes).as_dict()

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments by name. Random values are drawn on the device, where a layer's weights take no time."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        with device:
            args = self.op.inputs(self.sizes, self.dtype, device, generator)
        if "new" in args:
            args["new"] = torch.full_like(args["new"], self.sizes["T"])  # no sequence is padded
        return args

    def too_large_for_cpu(self) -> str | None:
        """Return why a check on a CPU would take too long, or None for a case that is small enough."""
        flops, args = self.cost().flops, self.inputs(torch.device("meta")).values()
        tensors = [x for arg in args for x in (arg.parameters() if isinstance(arg, torch.nn.Module) else [arg])]
        values = sum(x.numel() for x in tensors if isinstance(x, torch.Tensor))
        if flops <= CPU_FLOPS and values <= CPU_VALUES:
            return None
        return f"too large for a CPU ({values / 1e6:,.0f} million values, {flops / 1e9:,.0f} GFLOP)"

    def cost(self, args: dict[str, Any] | None = None) -> Cost:
        """Return the compulsory work, for the experts that `args` select, or those expected of uniform routing."""
        routed: dict[str, Any] = {}
        if args is not None and "ids" in args:
            routed["chosen"] = len(args["ids"].unique())
        elif args is not None and self.op is decode_step.STEP:
            routed["chosen"] = decode_step.expected_distinct_experts(args)
        return self.op.cost(Shape(self.sizes) | routed, self.dtype)


def cases(
    names: Sequence[str] = (),
    quick: bool = False,
    at: Sequence[str] = (),
    sizes: Sequence[str | Sizes] = (),
    dtype: torch.dtype | None = None,
    model: MixtralConfig | None = None,
) -> list[Case]:
    """Return the distinct cases of the operations `names` (empty: all).

    quick  at most QUICK cases per operation, of Mixtral 8x7B
    at     only the cases of these sizes ("T=4096")
    sizes  these sizes in place of the table's ("T=32,H=1024,I=512,E=8,K=2", or a dictionary)
    dtype  None: bf16
    model  its sizes in place of Mixtral's, also for what `sizes` leave out

    ValueError for an unknown name, sizes that no case has, that an operation lacks or needs, or a dtype it lacks.
    """
    if unknown := [name for name in names if name not in BENCHED]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(BENCHED)}")
    for op in (BENCHED[name] for name in names):
        if dtype is not None and dtype not in op.dtypes:
            known = ", ".join(map(dtype_name, op.dtypes))
            raise ValueError(f"--dtype is {dtype_name(dtype)!r}, and {op.name} has {known}: leave --dtype out")
    if sizes:
        if not names or quick or at:
            raise ValueError("--sizes goes with the operations it is for, and without --quick and --at")
        defaults = {**DEFAULTS, **({} if model is None else model_sizes(model))}
        pairs = ((BENCHED[name], text) for name in names for text in sizes)
        return [_parse_case(op, text, _dtype(op, dtype), defaults) for op, text in pairs]
    wanted = dict(_parse_size("--at", text) for text in at)
    found = [
        Case(op, shape, _dtype(op, dtype))
        for name, op in BENCHED.items()
        if name in names or not names
        for shape in _table_shapes(op, quick, model)
        if wanted.items() <= shape.as_dict().items()
    ]
    if not found:
        raise ValueError(f"--at {' '.join(at)}: no case of the benchmark has these sizes")
    return select_quick(found) if quick else found


def _dtype(op: Op, wanted: torch.dtype | None) -> torch.dtype:
    """Return `wanted` or bf16 where the operation has it; ids stay integers."""
    return next((dtype for dtype in (wanted, torch.bfloat16) if dtype in op.dtypes), op.dtypes[0])  # type: ignore[return-value]


def select_quick(found: Sequence[Case]) -> list[Case]:
    """Return at most QUICK cases per operation, evenly spread by their bytes, with the first and the last."""
    selected = []
    for op in dict.fromkeys(case.op.name for case in found):
        ordered = sorted((case for case in found if case.op.name == op), key=lambda case: case.cost().bytes)
        step = max(1.0, (len(ordered) - 1) / (QUICK - 1))
        selected += [ordered[round(at * step)] for at in range(min(QUICK, len(ordered)))]
    return selected


def _table_shapes(op: Op, quick: bool, model: MixtralConfig | None) -> list[Shape]:
    """Return the distinct sizes of Mixtral 8x7B and, unless `quick`, of 8x22B; or those of `model`."""
    shapes: list[Shape] = []
    for sizes in op.bench_shapes:
        if sizes.get("H") != KNOWN["mixtral-8x22b"].hidden_size:
            swept = "T" in sizes and not {"S", "C"} & set(sizes)  # only tokens vary
            shapes += [Shape(sizes) | {"T": T} for T in TOKENS] if swept else [Shape(sizes)]
    other = model or (None if quick else KNOWN["mixtral-8x22b"])
    resized = [] if other is None else [one for sizes in shapes if (one := resize(sizes, other)) is not None]
    return list({str(sizes.as_dict()): sizes for sizes in ([] if model else shapes) + resized}.values())


def model_sizes(model: MixtralConfig) -> dict[str, int]:
    """Return the sizes of a checkpoint's config by the letters of the operations; window 0: none."""
    return {
        **{"H": model.hidden_size, "I": model.intermediate_size, "V": model.vocab_size, "L": model.num_hidden_layers},
        **{"E": model.num_local_experts, "K": model.num_experts_per_tok, "P": model.max_position_embeddings},
        **{"Hq": model.num_attention_heads, "Hkv": model.num_key_value_heads, "D": model.head_dim},
        "window": model.sliding_window or 0,
    }


def resize(sizes: Sizes, model: MixtralConfig) -> Shape | None:
    """Return the sizes of a case of Mixtral 8x7B as `model` has them; None where it has no such case."""
    target = model_sizes(model)
    positions, slots = target["P"], target["window"] or target["P"]
    if not switches(sizes).causal:
        return None
    if not {"S", "C"} & set(sizes) and sizes["T"] + sizes.get("past", 0) > positions:
        return None
    shape = Shape(sizes) | {name: target[name] for name in sizes if name in target}
    if "N" in sizes:  # one of three products: to q, k and v, from the heads, or to the vocabulary
        heads, keys = target["Hq"] * target["D"], 2 * target["Hkv"] * target["D"]
        products = {4096: {"H": heads, "N": target["H"]}, 6144: {"N": heads + keys}}
        shape |= products.get(sizes["N"], {"N": target["V"]})
    if "L" in sizes:  # a decode step
        shape |= {"L": min(sizes["L"], target["L"]), "S": min(sizes["S"], slots)}
    elif "S" in sizes:
        shape["S"] = min(sizes["S"], positions)
        shape["T"] = shape["S"] if sizes["T"] == sizes["S"] else min(sizes["T"], shape["S"])
    if "C" in sizes:
        shape["C"] = min(sizes["C"], slots)
        shape |= {"T": min(sizes["T"], shape["C"]), "past": min(sizes["past"], shape["C"] - 1)}
    return shape


def sizes_of(op: Op) -> tuple[list[str], list[str]]:
    """Return the sizes and switches of an operation, and those that each of its cases has."""
    shapes = [Shape(sizes).as_dict() for sizes in (*op.test_shapes, *op.bench_shapes)]
    known = list(dict.fromkeys(name for sizes in shapes for name in sizes))
    return known, [name for name in known if all(name in sizes for sizes in shapes)]


def _parse_case(op: Op, sizes: str | Sizes, dtype: torch.dtype, defaults: Sizes) -> Case:
    """Return the case of `op` at the sizes that a user wrote, the missing ones from `defaults`."""
    wanted = _parse_sizes(sizes) if isinstance(sizes, str) else Shape(sizes).as_dict()
    known, needed = sizes_of(op)
    if foreign := [name for name in wanted if name not in known]:
        raise ValueError(f"--sizes has {foreign[0]}, and {op.name} has {', '.join(known)}")
    values = {**defaults, **wanted}
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"--sizes lacks {', '.join(missing)}: {op.name} needs {', '.join(needed)}")
    case = Case(op, Shape({name: values[name] for name in known if name in {*wanted, *needed}}), dtype)
    if empty := [name for name in ("B", "T", "H", "I", "E", "V", "N") if case.sizes.get(name) == 0]:
        raise ValueError(f"--sizes has {empty[0]}=0, needs at least 1: there is nothing to time")
    K, E = case.sizes.get("K", 0), case.sizes.get("E")
    if E is not None and K > E:
        raise ValueError(f"--sizes has K={K}, needs at most E={E}: a token's experts differ")
    op.check(**case.inputs(torch.device("meta")))
    return case


def _parse_sizes(text: str) -> dict[str, Any]:
    pairs = [_parse_size("--sizes", part) for part in text.split(",")]
    if len(dict(pairs)) < len(pairs):
        raise ValueError(f"--sizes is {text!r}, needs each letter once")
    return dict(pairs)


def _parse_size(option: str, text: str) -> tuple[str, Any]:
    name, _, size = text.partition("=")
    if name in QUANTIZED:
        if not re.fullmatch(rf"({'|'.join(BITS)})(:\d+)?", size):
            raise ValueError(
                f"{option} is {text!r}, needs one of {', '.join(BITS)}, and maybe a group: {name}=int4:128"
            )
        return name, size
    if not name or not size.isdecimal():
        raise ValueError(f"{option} is {text!r}, needs a size letter and a number: T=4096")
    return name, int(size)


class Oracle:
    """The reference's results of one call, for ours and for every peer."""

    def __init__(self, op: Op, args: dict[str, Any], least: float = 0.0) -> None:
        """least: an error that is right in any case."""
        self.args, self.least = args, least
        self.parts = [
            (Tolerance(op.name, {**args, **part}), rows)
            for part, rows in (_blocks(args) if op.name == "attention" else [({}, None)])
        ]

    def fault(self, function: Callable[..., Any]) -> str | None:
        """Return what is wrong with `function` on these arguments, or None."""
        for tolerance, rows in self.parts:
            part = function if rows is None else lambda rows=rows, **_: function(**self.args)[:, rows]
            try:
                error, limit = tolerance.measure(partial(_check_call, part, tolerance))
            except WrongResult as wrong:
                return f"wrong: {wrong}"
            limit = max(PEER_SLACK * limit, self.least)
            if not error <= limit:
                return f"wrong: an error of {error:.1e}, where {limit:.1e} would be right"
        return None


def stricter_oracles(case: Case, args: dict[str, Any]) -> Iterator[tuple[str, Oracle]]:
    """Yield the oracles of what random values in 16 bits hide: ties of `route`, and rounding, which fp32 shows."""
    if case.op.name == "route":
        yield "with ties", Oracle(case.op, args | {"logits": args["logits"].clamp(-1, 1).round()})
    if case.dtype != torch.float32 and case.op.name in OPS and torch.float32 in case.op.dtypes:
        device = next(x.device for x in args.values() if isinstance(x, torch.Tensor))
        wide = replace(case, dtype=torch.float32).inputs(device)
        yield "in float32", Oracle(case.op, wide, 0.0 if case.op.name in NO_PRODUCT else TF32)


def check_of(op: Op, args: dict[str, Any]) -> Check:
    """Return the check of a function's results for these arguments."""
    return partial(decode_step.fault, args=args) if op is decode_step.STEP else Oracle(op, args).fault


def _blocks(args: dict[str, Any]) -> list[tuple[dict[str, Any], slice | None]]:
    """Return the parts of an attention call to check: the first, middle and last queries where it is long."""
    T = args["q"].shape[1]
    whole = args["k"].shape[1] != T or not args.get("causal", True) or args.get("lengths") is not None
    if T <= UNBLOCKED_MOST or whole:
        return [({}, None)]
    blocks = [slice(start, start + BLOCK) for start in (0, (T - BLOCK) // 2, T - BLOCK)]
    # Queries align with the end of the keys: those of a block see no key beyond it.
    keys = [{name: args[name][:, : rows.stop] for name in "kv"} for rows in blocks]
    return [({"q": args["q"][:, rows], **kv}, rows) for rows, kv in zip(blocks, keys, strict=True)]


def _check_call(function: Callable[..., Any], tolerance: Tolerance, /, **args: Any) -> Any:
    """Call `function` and check what an error does not show: number and shapes of the results, unchanged arguments.

    An argument that it writes into is restored.
    """
    tensors = {name: x for name, x in args.items() if isinstance(x, torch.Tensor) and name not in tolerance.mutates}
    before = {name: x.clone() for name, x in tensors.items()}
    out = function(**args)
    if written := [name for name, x in before.items() if not _equal(x, args[name])]:
        for name in written:
            args[name].copy_(before[name])
        raise WrongResult(f"it writes into {', '.join(written)}")
    results = () if out is None else tuple(out) if isinstance(out, (tuple, list)) else (out,)
    wanted = tolerance.exact[: len(tolerance.exact) - len(tolerance.mutates)]
    if foreign := [type(result).__name__ for result in results if not isinstance(result, torch.Tensor)]:
        raise WrongResult(f"a result is a {foreign[0]}, needs a tensor")
    got, needed = (" and ".join(str(list(x.shape)) for x in tensors) or "none" for tensors in (results, wanted))
    if got != needed:
        raise WrongResult(f"results of shape {got}, where {needed} would be right")
    pairs = zip(results, wanted, strict=True)
    return tuple(result if want.dtype.is_floating_point else result.to(want.dtype) for result, want in pairs)


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal, where NaN in uninitialized memory equals NaN."""
    return torch.equal(a, b) or torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
