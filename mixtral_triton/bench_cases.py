"""What is benchmarked: every operation of the registry and a decode step, at the sizes of Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from . import decode_step
from .kernels.op import Cost, Op, Sizes
from .kernels.registry import OPS
from .yardstick import Yardstick

MODELS: dict[str, dict[str, int]] = {
    "8x7B": {"H": 4096, "I": 14336, "E": 8, "K": 2, "Hq": 32, "Hkv": 8, "D": 128},
    "8x22B": {"H": 6144, "I": 16384, "E": 8, "K": 2, "Hq": 48, "Hkv": 8, "D": 128},
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
QUICK = 6  # cases an operation, of 8x7B
BENCHED: dict[str, Op] = {**OPS, decode_step.STEP.name: decode_step.STEP}

# Peers round in other places than plain torch does: they may err this many times as much as our own limit.
SLACK = 2.0
# A long attention is checked in blocks of queries: the scores of all would not fit any card.
CHECKED_WHOLE, BLOCK = 1024, 256


@dataclass(frozen=True)
class Case:
    op: Op
    sizes: Sizes
    dtype: torch.dtype = torch.bfloat16

    def inputs(self, device: torch.device) -> dict[str, Any]:
        """Arguments by name; random ones are drawn on the device, where the weights of a layer take no time."""
        generator = None if device.type == "meta" else torch.Generator(device).manual_seed(0)
        with device:
            args = self.op.inputs(self.sizes, self.dtype, device, generator)
        if "new" in args:
            args["new"] = torch.full_like(args["new"], self.sizes["T"])  # every sequence is there in full
        return args

    def cost(self, args: dict[str, Any] | None = None) -> Cost:
        """Compulsory work, by the experts that `args` chose; without them, by those expected of uniform routing."""
        routed: dict[str, Any] = {}
        if args is not None and "ids" in args:
            routed["chosen"] = len(args["ids"].unique())
        elif args is not None and self.op is decode_step.STEP:
            routed["chosen"] = decode_step.experts_chosen(args)
        return self.op.cost({**self.sizes, **routed}, self.dtype)


def _dtype(op: Op) -> torch.dtype:
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
        sized = sizes if both else {letter: model.get(letter, size) for letter, size in sizes.items()}
        sweep = TOKENS if "T" in sized and not {"S", "C"} & set(sized) else (sized.get("T"),)
        yield from (sized if T is None else {**sized, "T": T} for T in sweep)


def spread(items: Sequence[Any], most: int) -> list[Any]:
    """At most `most` of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(at * (len(items) - 1) / (most - 1))] for at in range(most)]


def cases(
    names: Sequence[str] = (), quick: bool = False, at: Sequence[str] = (), sizes: Sequence[str] = ()
) -> list[Case]:
    """The cases of the operations `names` (none: all), each once; `at`: only those of given sizes ("T=4096").

    `sizes`: instead of the tabled ones, cases of these sizes ("T=32,H=1024,I=512,E=8,K=2").
    ValueError: an unknown name, sizes that no case has, or that an operation lacks or needs.
    """
    if unknown := [name for name in names if name not in BENCHED]:
        raise ValueError(f"argument 'OP' is {unknown[0]!r}, needs one of {', '.join(BENCHED)}")
    if sizes:
        if not names or quick or at:
            raise ValueError("--sizes goes with the operations it is for, and without --quick and --at")
        return [_sized(BENCHED[name], text) for name in names for text in sizes]
    wanted = dict(_size("--at", text) for text in at)
    found: list[Case] = []
    for op in (op for name, op in BENCHED.items() if name in names or not names):
        models = [MODELS["8x7B"]] if quick else list(MODELS.values())
        unique = {tuple(sizes.items()): sizes for model in models for sizes in _shapes(op, model)}
        shapes = [sizes for sizes in unique.values() if all(sizes.get(letter) == n for letter, n in wanted.items())]
        if quick:
            shapes = spread(sorted(shapes, key=lambda sizes: op.cost(sizes, _dtype(op)).bytes), QUICK)
        found += [Case(op, sizes, _dtype(op)) for sizes in shapes]
    if not found:
        raise ValueError(f"--at {' '.join(at)}: no case of the benchmark has these sizes")
    return found


def _size(option: str, text: str) -> tuple[str, int]:
    letter, _, size = text.partition("=")
    if not letter or not size.isdecimal():
        raise ValueError(f"{option} is {text!r}, needs a size letter and a number: T=4096")
    return letter, int(size)


# Of what an operation asks for beside its shapes, when nothing is said: no window, an empty cache, a chunk's own keys.
_UNSAID = {"window": 0, "past": 0, "fresh": 1}


def _sized(op: Op, text: str) -> Case:
    """The case of `op` at the sizes that somebody wrote down."""
    given = dict(_size("--sizes", part) for part in text.split(","))
    shapes = (*op.test_shapes, *op.bench_shapes)
    known = list(dict.fromkeys(letter for sizes in shapes for letter in sizes))
    needed = [letter for letter in known if all(letter in sizes for sizes in shapes)]
    if foreign := [letter for letter in given if letter not in known]:
        raise ValueError(f"--sizes has {foreign[0]}, and {op.name} has {', '.join(known)}")
    if missing := [letter for letter in needed if letter not in given and letter not in _UNSAID]:
        raise ValueError(f"--sizes lacks {', '.join(missing)}: {op.name} needs {', '.join(needed)}")
    said = {**_UNSAID, **given}
    case = Case(op, {letter: said[letter] for letter in known if letter in {*given, *needed}})
    op.check(**case.inputs(torch.device("meta")))
    return case


def _blocks(args: dict[str, Any]) -> Iterator[tuple[int, int]]:
    """Query ranges to check of a long causal `attention` over its own tokens: first, middle and last. Else none."""
    T, ragged = args["q"].shape[1], args.get("lengths") is not None
    if T > CHECKED_WHOLE and args["k"].shape[1] == T and args.get("causal", True) and not ragged:
        yield from ((begin, begin + BLOCK) for begin in (0, (T - BLOCK) // 2, T - BLOCK))


class Oracle:
    """Plain torch's results of one call, for us and for every peer."""

    def __init__(self, op: Op, args: dict[str, Any]) -> None:
        self.args = args
        self.parts: list[tuple[Yardstick, slice | None]] = []
        for begin, end in _blocks(args) if op.name == "attention" else ():
            # Queries stand at the end of the keys: those of a block see none beyond it.
            cut = {"q": args["q"][:, begin:end], "k": args["k"][:, :end], "v": args["v"][:, :end]}
            self.parts.append((Yardstick(op.name, {**args, **cut}), slice(begin, end)))
        if not self.parts:
            self.parts.append((Yardstick(op.name, args), None))

    def fault(self, function: Any) -> str | None:
        """What is wrong with `function` on these arguments; None if nothing is."""
        for stick, rows in self.parts:
            error, limit = stick.measure(
                function if rows is None else lambda rows=rows, **_: self._rows(function, rows)
            )
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
