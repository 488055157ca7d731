"""What is benchmarked: every operation of the registry and a decode step, at the sizes of Mixtral 8x7B and 8x22B."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...config import MixtralConfig
from ...kernels.checks import dtype_name
from ...kernels.op import Cost, Op, Shape, Sizes
from ...kernels.quantized import BITS
from ...kernels.registry import OPS
from ..tolerance import Tolerance
from . import decode_step
from .model import letters, resized

MODELS: dict[str, dict[str, int]] = {
    "8x7B": {"H": 4096, "I": 14336, "E": 8, "K": 2, "Hq": 32, "Hkv": 8, "D": 128},
    "8x22B": {"H": 6144, "I": 16384, "E": 8, "K": 2, "Hq": 48, "Hkv": 8, "D": 128},
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = 6  # cases an operation, of 8x7B
BENCHED: dict[str, Op] = {**OPS, decode_step.STEP.name: decode_step.STEP}

# Peers round in other places than plain torch does: they may err this many times as much as our own limit.
SLACK = 2.0
# A long attention is checked in blocks of queries: the scores of all would not fit any GPU.
CHECKED_WHOLE, BLOCK = 1024, 256

# What a CPU checks in seconds, in fp64 and in the plain way.
CPU_FLOPS, CPU_VALUES = 2e10, 1 << 27


class _Wrong(Exception):
    """What a call does that its operation does not."""


def _values(argument: Any) -> int:
    if isinstance(argument, torch.nn.Module):
        return sum(parameter.numel() for parameter in argument.parameters())
    return argument.numel() if isinstance(argument, torch.Tensor) else 0


@dataclass(frozen=True)
class Case:
    op: Op
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    def as_dict(self) -> dict[str, Any]:
        """Its sizes and switches, as `--sizes` takes them."""
        return Shape(self.sizes).as_dict()

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments by name; random ones are drawn on the device, where the weights of a layer take no time."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        with device:
            args = self.op.inputs(self.sizes, self.dtype, device, generator)
        if "new" in args:
            args["new"] = torch.full_like(args["new"], self.sizes["T"])  # every sequence is there in full
        return args

    def too_large_for_a_cpu(self) -> str | None:
        """Why nobody would wait for this case to be checked on a CPU; None where it is small enough."""
        flops, values = self.cost().flops, sum(map(_values, self.inputs(torch.device("meta")).values()))
        if flops <= CPU_FLOPS and values <= CPU_VALUES:
            return None
        return f"too large for a CPU ({values / 1e6:,.0f} million values, {flops / 1e9:,.0f} GFLOP)"

    def cost(self, args: dict[str, Any] | None = None) -> Cost:
        """Compulsory work, by the experts that `args` chose; without them, by those expected of uniform routing."""
        routed: dict[str, Any] = {}
        if args is not None and "ids" in args:
            routed["chosen"] = len(args["ids"].unique())
        elif args is not None and self.op is decode_step.STEP:
            routed["chosen"] = decode_step.expected_distinct_experts(args)
        return self.op.cost(Shape(self.sizes) | routed, self.dtype)


def _dtype(op: Op, wanted: torch.dtype | None = None) -> torch.dtype:
    """What is asked for, where the operation has it; ids stay integers."""
    if wanted in op.dtypes:
        return wanted
    return torch.bfloat16 if torch.bfloat16 in op.dtypes else op.dtypes[0]


def _shapes(op: Op, model: Mapping[str, int]) -> Iterator[Sizes]:
    """The bench shapes with the model's sizes; where tokens are all that varies, over all of TOKENS.

    Sizes that an operation lists for both models stay as they are listed.
    """
    first = MODELS["8x7B"]
    both = {
        letter for sizes in op.bench_shapes for letter in sizes if sizes[letter] != first.get(letter, sizes[letter])
    }
    other = {letter: first[letter] for letter in both if model is first}
    for sizes in op.bench_shapes:
        if any(sizes[letter] != size for letter, size in other.items()):
            continue
        sized = Shape(sizes) if both else Shape(sizes) | {name: model[name] for name in sizes if name in model}
        sweep = TOKENS if "T" in sized and not {"S", "C"} & set(sized) else (sized.get("T"),)
        yield from (sized if T is None else sized | {"T": T} for T in sweep)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def few(found: Sequence[Case]) -> list[Case]:
    """At most QUICK cases an operation, evenly spread by their bytes."""
    chosen: list[Case] = []
    for name in dict.fromkeys(case.op.name for case in found):
        own = [case for case in found if case.op.name == name]
        chosen += spread(sorted(own, key=lambda case: case.cost().bytes), QUICK)
    return chosen


def cases(
    names: Sequence[str] = (),
    quick: bool = False,
    at: Sequence[str] = (),
    sizes: Sequence[str | Sizes] = (),
    dtype: torch.dtype | None = None,
    model: MixtralConfig | None = None,
) -> list[Case]:
    """The cases of the operations `names` (none: all), each once; `at`: only those of given sizes ("T=4096").

    `sizes`: instead of the tabled ones, cases of these sizes ("T=32,H=1024,I=512,E=8,K=2", or a dictionary).
    `dtype`: None is bf16. `model`: its sizes instead of Mixtral's, also for what `sizes` do not say.
    ValueError: an unknown name, sizes that no case has, or that an operation lacks or needs, a dtype it has not.
    """
    if unknown := [name for name in names if name not in BENCHED]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(BENCHED)}")
    if dtype is not None:
        _check_dtype(names, dtype)
    if sizes:
        if not names or quick or at:
            raise ValueError("--sizes goes with the operations it is for, and without --quick and --at")
        said = {} if model is None else letters(model)
        return [_sized(BENCHED[name], one, _dtype(BENCHED[name], dtype), said) for name in names for one in sizes]
    wanted = dict(_size("--at", text) for text in at)
    found: list[Case] = []
    for op in (op for name, op in BENCHED.items() if name in names or not names):
        shapes = [sizes for sizes in _tabled(op, quick, model) if _has(sizes, wanted)]
        found += [Case(op, sizes, _dtype(op, dtype)) for sizes in shapes]
    if not found:
        raise ValueError(f"--at {' '.join(at)}: no case of the benchmark has these sizes")
    return few(found) if quick else found


def _has(sizes: Sizes, wanted: Sizes) -> bool:
    return all(Shape(sizes).as_dict().get(letter) == size for letter, size in wanted.items())


def _tabled(op: Op, quick: bool, model: MixtralConfig | None) -> list[Sizes]:
    """Distinct sizes: those of Mixtral 8x7B and, unless `quick`, of 8x22B; or those of `model`."""
    shapes: Sequence[Sizes]
    mixtral = _shapes(op, MODELS["8x7B"])
    if model is not None:
        shapes = [one for sizes in mixtral if (one := resized(sizes, model)) is not None]
    else:
        shapes = [*mixtral, *(() if quick else _shapes(op, MODELS["8x22B"]))]
    return list({tuple(Shape(sizes).as_dict().items()): sizes for sizes in shapes}.values())


def _check_dtype(names: Sequence[str], dtype: torch.dtype) -> None:
    for op in (BENCHED[name] for name in names):
        if dtype not in op.dtypes:
            known = ", ".join(map(dtype_name, op.dtypes))
            raise ValueError(f"--dtype is {dtype_name(dtype)!r}, and {op.name} has {known}: leave --dtype out")


def _size(option: str, text: str) -> tuple[str, Any]:
    letter, _, size = text.partition("=")
    if letter in _WEIGHTS:
        if not re.fullmatch(rf"({'|'.join(BITS)})(:\d+)?", size):
            formats = ", ".join(BITS)
            raise ValueError(f"{option} is {text!r}, needs one of {formats}, and maybe its group: {letter}=int4:128")
        return letter, size
    if not letter or not size.isdecimal():
        raise ValueError(f"{option} is {text!r}, needs a size letter and a number: T=4096")
    return letter, int(size)


_WEIGHTS = {"weight", "gate_up", "down"}  # switches that name the form of a quantized weight
# Of what an operation asks for beside its shapes, when nothing is said: no window, an empty cache.
_UNSAID = {"window": 0, "past": 0}


def _sized(op: Op, sizes: str | Sizes, dtype: torch.dtype, model: Sizes) -> Case:
    """The case of `op` at the sizes that somebody wrote down, and of the letters that they left out at the model's."""
    given = _parsed(sizes) if isinstance(sizes, str) else Shape(sizes).as_dict()
    shapes = [Shape(sizes).as_dict() for sizes in (*op.test_shapes, *op.bench_shapes)]
    known = list(dict.fromkeys(letter for sizes in shapes for letter in sizes))
    needed = [letter for letter in known if all(letter in sizes for sizes in shapes)]
    if foreign := [letter for letter in given if letter not in known]:
        raise ValueError(f"--sizes has {foreign[0]}, and {op.name} has {', '.join(known)}")
    said = {**_UNSAID, **model, **given}
    if missing := [letter for letter in needed if letter not in said]:
        raise ValueError(f"--sizes lacks {', '.join(missing)}: {op.name} needs {', '.join(needed)}")
    case = Case(op, Shape({letter: said[letter] for letter in known if letter in {*given, *needed}}), dtype)
    if none := [letter for letter in ("B", "T", "H", "I", "E", "V", "N") if case.sizes.get(letter) == 0]:
        raise ValueError(f"--sizes has {none[0]}=0, needs at least 1: there is nothing to time")
    if case.sizes.get("K", 0) > case.sizes.get("E", case.sizes.get("K", 0)):
        raise ValueError(
            f"--sizes has K={case.sizes['K']}, needs at most E={case.sizes['E']}: a token's experts differ"
        )
    op.check(**case.inputs(torch.device("meta")))
    return case


def _parsed(text: str) -> dict[str, Any]:
    pairs = [_size("--sizes", part) for part in text.split(",")]
    if len(given := dict(pairs)) < len(pairs):
        raise ValueError(f"--sizes is {text!r}, needs each letter once")
    return given


def _blocks(args: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Query ranges to check of a long causal `attention` over its own tokens: first, middle and last. Else none."""
    T, ragged = args["q"].shape[1], args.get("lengths") is not None
    if T > CHECKED_WHOLE and args["k"].shape[1] == T and args.get("causal", True) and not ragged:
        yield from ((begin, begin + BLOCK) for begin in (0, (T - BLOCK) // 2, T - BLOCK))


def _held(function: Any, stick: Tolerance, /, **given: Any) -> Any:
    """A call of `function`, held to what a number does not tell: as many results, of these shapes, and its arguments
    as they were (what it wrote into is put back)."""
    before = {
        name: value.clone()
        for name, value in given.items()
        if isinstance(value, torch.Tensor) and name not in stick.mutates
    }
    out = function(**given)
    written = [name for name, value in before.items() if not _same(value, given[name])]
    for name in written:
        given[name].copy_(before[name])
    if written:
        raise _Wrong(f"it writes into {', '.join(written)}")
    results = () if out is None else tuple(out) if isinstance(out, (tuple, list)) else (out,)
    wanted = stick.exact[: len(stick.exact) - len(stick.mutates)]
    if strange := [type(result).__name__ for result in results if not isinstance(result, torch.Tensor)]:
        raise _Wrong(f"a result is a {strange[0]}, needs a tensor")
    shapes, needed = ([list(result.shape) for result in found] for found in (results, wanted))
    if shapes != needed:
        raise _Wrong(f"results of shape {_shown(shapes)}, where {_shown(needed)} would be right")
    return tuple(
        got if want.dtype.is_floating_point else got.to(want.dtype) for got, want in zip(results, wanted, strict=True)
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN, as memory may hold that nobody wrote, is like NaN."""
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())


def _shown(shapes: Sequence[Sequence[int]]) -> str:
    return " and ".join(map(str, shapes)) or "none"


class Oracle:
    """Plain torch's results of one call, for us and for every peer."""

    def __init__(self, op: Op, args: dict[str, Any]) -> None:
        self.args = args
        self.parts: list[tuple[Tolerance, slice | None]] = []
        for begin, end in _blocks(args) if op.name == "attention" else ():
            # Queries stand at the end of the keys: those of a block see none beyond it.
            cut = {"q": args["q"][:, begin:end], "k": args["k"][:, :end], "v": args["v"][:, :end]}
            self.parts.append((Tolerance(op.name, {**args, **cut}), slice(begin, end)))
        if not self.parts:
            self.parts.append((Tolerance(op.name, args), None))

    def fault(self, function: Any) -> str | None:
        """What is wrong with `function` on these arguments; None if nothing is."""
        for stick, rows in self.parts:
            whole = function if rows is None else lambda rows=rows, **_: self._rows(function, rows)
            try:
                error, limit = stick.measure(partial(_held, whole, stick))
            except _Wrong as wrong:
                return f"wrong: {wrong}"
            if not error <= SLACK * limit:
                return f"wrong: an error of {error:.1e}, where {SLACK * limit:.1e} would be right"
        return None

    def _rows(self, function: Any, rows: slice) -> Any:
        return function(**self.args)[:, rows]


class StepOracle:
    """The same for a decode step, which changes its cache."""

    def __init__(self, args: dict[str, Any]) -> None:
        self.fault = partial(decode_step.fault, args=args)


def oracle(op: Op, args: dict[str, Any]) -> Oracle | StepOracle:
    return StepOracle(args) if op is decode_step.STEP else Oracle(op, args)
