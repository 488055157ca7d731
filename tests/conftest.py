"""The gates: guarded tensors around every interpreted launch, and what the run covered, in its summary.

A guarded launch runs twice on copies of its tensors, each in the middle of a larger buffer filled with a canary:
- a canary that changed is a store outside the tensor (or into the gaps between its rows);
- the second run has another canary and takes the programs in reverse order: a result that differs, bit for bit, comes
  from a read outside a tensor or from a race;
- a load of an address outside every tensor is an error, whatever becomes of the value;
- what nobody wrote is NaN, since `torch.empty` is filled with NaN before;
- integer arithmetic that overflows its type is an error.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_triton.kernels import call, interpret, launch
from mixtral_triton.kernels.interpret import active_addresses, interpreting
from mixtral_triton.kernels.launch import INTERPRETED

MARGIN = 64  # elements on either side
FLOAT_CANARIES = (float("nan"), 1.0e4)
INT_CANARIES = (0, 1)  # small: a kernel that used one as an index must not reach foreign memory

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# What tests measured against a bound and wrote down by `covers(kind, line)`, and the heading it is printed under.
FIGURES = {
    "traffic": "bytes and FLOP, counted in interpreted kernels",
    "launches": "device kernels a layer, recorded on meta tensors",
    "host": "what the host does in a layer, and how many kernels prompts compile",
    "jit": "launches by Triton's own JIT, compiled for sm_90 and checked as CUDA would check them",
    "main loops": "main loops, counted in compiled kernels",
    "quantized": "the small checkpoint's held-out text with its experts quantized, beside fp32",
    "parity": "transformers' Mixtral with mixtral_triton.apply beside eager",
}
_covered: set[tuple[str, str]] = set()


class Fence:
    """A copy of a tensor with the same strides, amid canaries."""

    def __init__(self, tensor: Tensor, turn: int) -> None:
        self.tensor = tensor
        self.places = torch.zeros(1, dtype=torch.long)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
            self.places = (self.places[:, None] + torch.arange(size) * stride).flatten()
        extent = int(self.places.max()) + 1 if tensor.numel() else 0
        canary = (FLOAT_CANARIES if tensor.is_floating_point() else INT_CANARIES)[turn]
        self.canary = torch.tensor(canary).to(tensor.dtype)
        self.buffer = self.canary.repeat(extent + 2 * MARGIN)
        self.buffer[MARGIN + self.places] = tensor.flatten()
        self.guarded = self.buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)

    def values(self) -> Tensor:
        return self.buffer[MARGIN + self.places]

    def holds(self, low: int, high: int) -> bool:
        """Whether these addresses lie between its first element and its last."""
        start, size = self.guarded.data_ptr(), self.guarded.element_size()
        return start <= low and high <= start + int(self.places.max()) * size

    def intact(self) -> bool:
        outside = torch.ones(len(self.buffer), dtype=torch.bool)
        outside[MARGIN + self.places] = False
        rest = self.buffer[outside]
        return bits(rest).equal(bits(self.canary.expand_as(rest).contiguous()))

    def write_back(self) -> None:
        if self.tensor.numel():
            base = self.tensor.as_strided((int(self.places.max()) + 1,), (1,), self.tensor.storage_offset())
            base[self.places] = self.values()


def bits(x: Tensor) -> Tensor:
    """A float's bits as an integer of its size, so that NaN equals NaN and 0.0 differs from -0.0."""
    return x.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]) if x.is_floating_point() else x


def _reverse_programs(builder: Any) -> None:
    def set_grid_idx(x: int, y: int, z: int) -> None:
        builder.grid_idx = tuple(n - 1 - i for n, i in zip(builder.grid_dim, (x, y, z), strict=True))

    builder.set_grid_idx = set_grid_idx


def _checked_load(load: Any, name: str, fences: list[Fence]) -> Any:
    """The interpreter's load, which refuses addresses that are in no tensor of the launch."""

    def checked(pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        addresses = active_addresses(pointers, mask)
        if addresses.size:
            low, high = int(addresses.min()), int(addresses.max())
            if not any(fence.holds(low, high) for fence in fences if fence.tensor.numel()):
                raise AssertionError(f"{name} loads from outside its tensors")
        return load(pointers, mask, *args, **kwargs)

    return checked


def guarded(kernel: Any, grid: tuple[int, ...], args: dict[str, Any]) -> None:
    """`launch.interpret` under guard."""
    runs = []
    for turn in (0, 1):
        fences = {name: Fence(tensor, turn) for name, tensor in launch.tensors(args).items()}
        fenced = {name: launch.replace_base(args[name], fence.guarded) for name, fence in fences.items()}
        with interpreting(check_overflow=True) as builder:
            builder.create_masked_load = _checked_load(
                builder.create_masked_load, kernel.__name__, list(fences.values())
            )
            if turn == 1:
                _reverse_programs(builder)
            try:
                kernel[grid](**args | fenced)
            finally:
                builder.__dict__.pop("set_grid_idx", None)
                del builder.create_masked_load
        for name, fence in fences.items():
            if not fence.intact():
                raise AssertionError(f"{kernel.__name__} stored outside {name}")
        runs.append(fences)
    for name, fence in runs[0].items():
        if not bits(fence.values()).equal(bits(runs[1][name].values())):
            raise AssertionError(f"{kernel.__name__}: {name} depends on program order or on what lies outside a tensor")
        fence.write_back()
    _covered.add(("interpreted", kernel.__name__))


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a call of the command line in this process, which has imported its kernels: it selects no backend. If it did,
    the processes of later tests would inherit its TRITON_INTERPRET."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")


@pytest.fixture(autouse=True)
def gates(monkeypatch: pytest.MonkeyPatch, record_property: Any) -> Iterator[None]:
    """Every test runs with guarded launches, and with NaN in memory that nobody wrote."""
    monkeypatch.setattr(launch, "interpret", guarded)
    _covered.clear()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    for kind, what in sorted(_covered):
        record_property(kind, what)


def in_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b, each element summed from the first column of a to the last."""
    total = np.zeros((a.shape[0], b.shape[1]), a.dtype)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[None, k]
    return total


@pytest.fixture
def ordered(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Interpreted products sum in one order wherever a row stands in its tile, as numpy's do not -> that product."""
    monkeypatch.setattr(interpret, "product", in_order)
    return in_order


@pytest.fixture
def inject_fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """inject_fault(name): change the largest element of the operation's result by 3 %, or by 1. The reference stays."""
    call_checked = call.call_checked

    def inject(name: str) -> None:
        def faulty(op: Any, args: Any) -> Any:
            out = call_checked(op, args)
            if op.name == name:
                changed = args[3] if out is None else out  # append has no result: the key cache
                first = changed[0] if isinstance(changed, tuple) else changed
                flat = first.view(-1)
                place = int(flat.abs().argmax())
                flat[place] = flat[place] * 1.03 if first.is_floating_point() else flat[place] + 1
            return out

        monkeypatch.setattr(call, "call_checked", faulty)

    return inject


@pytest.fixture
def gpu() -> Iterator[Any]:
    """A machine of two GPUs that are not there (tests/support/stub), whose launches Triton's own JIT prepares."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("stands in for a GPU in a compiling process that has none")
    from tests.support.stub.gpu import gpu

    with gpu(2) as simulated:
        yield simulated


@pytest.fixture
def covers() -> Any:
    """covers(kind, what): count something in the summary of the run."""
    return lambda kind, what: _covered.add((kind, what))


@pytest.fixture
def parity(covers: Any) -> Any:
    """parity(feature, result): a row of the table of transformers' features, in the summary of the run."""
    return lambda feature, result: covers("parity", f"{feature:50} {result}")


HF_SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1 if INTERPRETED else 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 96,
    "sliding_window": 6,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "attn_implementation": "eager",
    "experts_implementation": "eager",
}


@pytest.fixture
def make_hf() -> Any:
    """make_hf(kind="MixtralForCausalLM", seed=1, **sizes) -> transformers' model, fp32, random, in evaluation mode."""
    transformers = pytest.importorskip("transformers")

    def make(kind: str = "MixtralForCausalLM", seed: int = 1, **sizes: Any) -> Any:
        model = getattr(transformers, kind)(transformers.MixtralConfig(**HF_SIZES | sizes)).eval()
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():  # large enough that neither a route nor a greedy token is a close call
            values = torch.randn(parameter.shape, generator=generator)
            parameter.data = 1 + 0.3 * values if values.dim() == 1 else values * 2 * values.shape[-1] ** -0.5
        return model

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The operations that have run."""
    checked: set[str] = set()
    go = call.call_checked

    def record(op: Any, args: Any) -> Any:
        checked.add(op.name)
        return go(op, args)

    monkeypatch.setattr(call, "call_checked", record)
    return checked


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def pytest_configure(config: pytest.Config) -> None:
    """Worker processes have the cores among them: threads of each one's libraries would only wait for another's."""
    if config.getoption("numprocesses", default=None):
        for library in ("OMP", "OPENBLAS", "MKL"):
            os.environ.setdefault(f"{library}_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = "needs a GPU" if not INTERPRETED else "interpreted process: GPU tests run compiled"
    if torch.cuda.is_available() and not INTERPRETED:
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def jit_lines(cases: set[str]) -> list[str]:
    """Of "kernel, how often, the case": how many launches each kernel had."""
    launches: Counter[str] = Counter()
    for kernel, times, *_ in map(str.split, cases):
        launches[kernel] += int(times)
    total = [f"in all: {launches.total()} launches of {len(launches)} kernels"] if launches else []
    return [f"{kernel}: {times} launches" for kernel, times in sorted(launches.items())] + total


def written_down(terminalreporter: Any) -> dict[str, set[str]]:
    """What tests covered, by kind."""
    found: dict[str, set[str]] = {}
    for report in terminalreporter.stats.get("", []):  # teardowns: where the gates write it down
        for kind, what in report.user_properties:
            found.setdefault(kind, set()).add(str(what))
    return found


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The whole of `-m emulator` fails where it ran too few of the instructions."""
    from tests.emulator.report import below_bound

    config, reporter = session.config, session.config.pluginmanager.get_plugin("terminalreporter")
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.getoption("keyword")
    if whole and reporter and config.getoption("markexpr") == "emulator" and below_bound(written_down(reporter)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = written_down(terminalreporter)
    count = {kind: len(names) for kind, names in found.items()}.get
    say = terminalreporter.write_line
    terminalreporter.section("what was covered")
    say(f"{count('interpreted', 0)} kernels interpreted under guard")
    say(f"{count('case', 0)} shapes and dtypes of operations within their limits")
    say(f"{count('compiled', 0)} kernel variants compiled for {count('target', 0)} targets")
    if "GPU code" in found:
        from tests.emulator.report import summary

        terminalreporter.section("PTX executed on a PTX emulator, under three schedules that agree bit for bit")
        for line in summary(found):
            say(line)
    for kind, title in FIGURES.items():
        if lines := jit_lines(found.get("jit case", set())) if kind == "jit" else sorted(found.get(kind, ())):
            terminalreporter.section(title)
            for line in lines:
                say(line)
