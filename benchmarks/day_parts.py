"""What a GPU day consists of: parts, each of commands that run in processes of their own, an operation a process."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STUB = ("-m", "tests.support.stub")


@dataclass(frozen=True)
class Command:
    """Arguments for Python. `resumes`: "tests" or "cases", where a new process goes on behind what ended one."""

    name: str
    args: tuple[str, ...]
    resumes: str | None = None


@dataclass(frozen=True)
class Part:
    """`budget_s`: seconds for all commands together, of the default whole; `at_once`: how many side by side."""

    name: str
    budget_s: float
    commands: tuple[Command, ...]
    at_once: int = 1


def parts(dry: bool = False, breaks: str = "") -> tuple[Part, ...]:
    """The parts of a day, what matters most first; every operation of the registry is in one of the benchmarks.

    dry: on a simulated GPU, small sizes and few tests; `breaks`: a kernel that fails on it.
    """
    from mixtral_triton.kernels.registry import OPS

    experts = [name for name in OPS if name.startswith("expert")]
    cache = [name for name in OPS if "attention" in name or name == "append"]
    others = [name for name in OPS if name not in (*experts, *cache)]
    step = ("--at", "S=1024", "--at", "H=4096")
    slow = ("--without", "torch.compile", "--without", "HF static cache")
    quick = ("--quick", "--without", "torch.compile")
    bench = _DryBench() if dry else _bench
    found = (
        # Nobody waits for a compiler, or is timed beside one, once the cache holds every kernel.
        Part("compile", 90, (Command("all", ("-m", "benchmarks.compile_ahead", *(("--most", "4") if dry else ()))),)),
        Part("tests", 110, _tests(most=1 if dry else None), max(1, min(8, (os.cpu_count() or 2) // 2))),
        Part("experts", 90, tuple(bench(name, *quick) for name in experts)),
        Part("attention", 70, tuple(bench(name, *quick) for name in cache)),
        # Ours and transformers' eager step come before any torch.compile, which may leave a GPU as no timing likes it.
        Part("decode", 60, (bench("decode_step", "--at", "B=1", *step, *slow),)),
        Part("decode batches", 30, (bench("decode_step", "--quick", "--at", "L=4", *slow),)),
        Part("applied", 40, (_drop_in(*(("1", "--small") if dry else ("100",))),)),
        Part("decode compiled", 40, (bench("decode_step", "--at", "B=1", *step, "--without", "torch.compile"),)),
        Part("one token", 30, tuple(bench(name, "--quick", "--at", "T=1") for name in others)),
        Part("many tokens", 30, tuple(bench(name, "--quick", "--at", "T=4096") for name in others)),
    )
    return tuple(_stubbed(part, breaks) for part in found) if dry else found


def _bench(name: str, *options: str) -> Command:
    return Command(name, ("-m", "mixtral_triton", "bench", name, "--json", *options), "cases")


def _drop_in(*rounds: str) -> Command:
    return Command("drop_in", ("benchmarks/drop_in.py", "--json", "--device", "cuda", "--rounds", *rounds))


class _DryBench:
    """The same command at the smallest sizes that the tests run, beside plain torch alone."""

    def __call__(self, name: str, *options: str) -> Command:
        from mixtral_triton.kernels.op import Shape
        from mixtral_triton.tools.bench.cases import BENCHED
        from mixtral_triton.tools.bench.peers import PEERS

        op = BENCHED[name]
        sizes = min(op.test_shapes, key=lambda sizes: op.cost(sizes, op.dtypes[0]).bytes)
        others = sorted({peer.name for peer in PEERS} - {"torch"})
        without = [word for peer in others for word in ("--without", peer)]
        written = ",".join(f"{letter}={size}" for letter, size in Shape(sizes).as_dict().items())
        return _bench(name, "--sizes", written, *without)


def _stubbed(part: Part, breaks: str) -> Part:
    """Kernels do their work, which takes long, for those that check it: the tests and the benchmarks."""

    def stub(command: Command) -> Command:
        options = ("--executes",) if command.resumes else ()
        options += ("--breaks", breaks) if breaks else ()
        return Command(command.name, (*STUB, *options, *command.args), command.resumes)

    return Part(part.name, part.budget_s, tuple(map(stub, part.commands)), part.at_once)


def _tests(most: int | None) -> tuple[Command, ...]:
    """The registry's tests, an operation a process; and each other file of tests that has some for a GPU."""
    from mixtral_triton.kernels.registry import OPS

    pytest = ("-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-p", "benchmarks.progress")
    limit = () if most is None else ("--most", str(most))
    registry = ROOT / "tests" / "test_registry.py"
    found = [Command(name, (*pytest, *limit, "--operation", name, str(registry)), "tests") for name in OPS]
    for file in sorted((ROOT / "tests").glob("test_*.py")):
        text = file.read_text()
        if file != registry and ("mark.gpu" in text or "device: torch.device" in text):
            found.append(Command(file.stem, (*pytest, *limit, str(file)), "tests"))
    return tuple(found)
