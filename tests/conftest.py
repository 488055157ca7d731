"""Shared fixtures: guarded tensors around every interpreted launch, and the summary of what tests measured.

A guarded launch runs twice on copies of its tensors, each in the middle of a larger buffer filled with a canary. The
second run has another canary and takes the programs in reverse order. Faults: a store outside a tensor (or into the
gaps between its rows), a load outside every tensor, results that differ between the runs, integer overflow. Memory that
nobody wrote is NaN.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: more threads would wait for each other
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ.setdefault(f"{library}_NUM_THREADS", "1")

import pytest
import torch
from torch import Tensor
from triton import knobs

from mixtral_triton.checkpoint.config import SMALL
from mixtral_triton.kernels.launching import launch
from mixtral_triton.kernels.launching.interpret import interpreting
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.operation import call
from mixtral_triton.kernels.weights.offload import OffloadedWeight
from tests.support.calls import find_weight, memory_of, replace_tensors, tensors_of_launch
from tests.support.traffic import active_addresses

pytest_plugins = ["tests.support.selection"]
if "PYTEST_XDIST_WORKER" in os.environ:  # a plugin may have imported torch before the variables were set
    torch.set_num_threads(1)

INTERPRET = launch.interpret
KNOBS = (knobs.cache, knobs.compilation, knobs.runtime, knobs.nvidia, knobs.amd)
MARGIN = 64  # elements on either side
# Of both runs. Integers are small: a kernel that used one as an index must not reach foreign memory.
CANARIES = {True: (float("nan"), 1.0e4), False: (0, 1)}


class GuardedTensor:
    """A copy of a tensor with the same strides, amid canaries."""

    def __init__(self, tensor: Tensor, iteration: int) -> None:
        self.tensor, extent = tensor, memory_of(tensor).numel()
        self.indices = MARGIN + torch.arange(extent).as_strided(tensor.shape, tensor.stride()).flatten()
        self.canary = torch.tensor(CANARIES[tensor.is_floating_point()][iteration]).to(tensor.dtype)
        self.buffer = self.canary.repeat(extent + 2 * MARGIN)
        self.buffer[self.indices] = tensor.flatten()
        self.guarded = self.buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)
        start, size = self.guarded.data_ptr(), tensor.element_size()
        self.addresses = range(start, start + extent * size)  # of its bytes: codes may be read one by one

    def bytes(self) -> Tensor:
        """The bytes of the values: NaN equals NaN, and 0.0 differs from -0.0."""
        return self.buffer[self.indices].view(torch.uint8)

    def intact(self) -> bool:
        outside = torch.ones(len(self.buffer), dtype=torch.bool)
        outside[self.indices] = False
        rest = self.buffer[outside]
        return rest.view(torch.uint8).equal(self.canary.repeat(len(rest)).view(torch.uint8))

    def write_back(self) -> None:
        """As a kernel: it counts as none of torch's writes in place."""
        memory_of(self.tensor).data[self.indices - MARGIN] = self.buffer[self.indices]


def guard_experts(name: str, weight: OffloadedWeight, guards: dict[str, GuardedTensor], iteration: int) -> Tensor:
    """Guard the rows of each expert, and return the table with addresses in the copies. Others stay: they are seen."""
    experts = [weight.rows(expert) for expert in range(len(weight))]
    table = weight.data.clone()
    for number, rows in enumerate(experts):
        guard = guards[f"{name}[{number}]"] = GuardedTensor(rows, iteration)
        inside = (weight.data >= rows.data_ptr()) & (weight.data < rows.data_ptr() + rows.nbytes)
        table += inside * (guard.guarded.data_ptr() - rows.data_ptr())
    return table


def run_guarded(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], iteration: int) -> dict[str, GuardedTensor]:
    """Run a kernel on copies amid canaries, in turn 1 with the programs in reverse order; return the copies."""
    tensors = tensors_of_launch(args)
    guards = {name: GuardedTensor(tensor, iteration) for name, tensor in tensors.items()}
    tables = {name: weight for name, x in tensors.items() if (weight := find_weight(x)) is not None}
    for name, weight in tables.items():
        guards[name].guarded.copy_(guard_experts(name, weight, guards, iteration))
    guarded_args = replace_tensors(args, {name: guards[name].guarded for name in tensors})
    with interpreting() as builder:
        # Integer arithmetic that overflows its type raises an error.
        builder.options = replace(builder.options, sanitize_overflow=not iteration, debug=True)
        load = builder.create_masked_load

        def checked_load(pointers: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
            addresses = active_addresses(pointers, mask)
            bounds = (int(addresses.min()), int(addresses.max())) if addresses.size else ()
            if bounds and not any(all(at in guard.addresses for at in bounds) for guard in guards.values()):
                raise AssertionError(f"{kernel.__name__} loads from outside its tensors")
            return load(pointers, mask, *rest, **kwargs)

        def set_grid_idx(*index: int) -> None:
            reverse = (n - 1 - i for n, i in zip(builder.grid_dim, index, strict=True))
            builder.grid_idx = tuple(reverse) if iteration else index

        with mock.patch.multiple(builder, create_masked_load=checked_load, set_grid_idx=set_grid_idx):
            kernel[grid](**guarded_args)
    # The copies are elsewhere in each run, and so are their addresses.
    return {name: guard for name, guard in guards.items() if name not in tables}


def guarded(kernel: Any, grid: tuple[int, ...], args: dict[str, Any]) -> None:
    """Stand in for `launch.interpret` with guarded tensors."""
    runs = [run_guarded(kernel, grid, args, iteration) for iteration in (0, 1)]
    for name, guard in (item for guards in runs for item in guards.items()):
        if not guard.intact():
            raise AssertionError(f"{kernel.__name__} stored outside {name}")
    for name, guard in runs[0].items():
        if not guard.bytes().equal(runs[1][name].bytes()):
            raise AssertionError(f"{kernel.__name__}: {name} depends on program order or on what lies outside a tensor")
        if name in tensors_of_launch(args):  # an expert's rows are only read
            guard.write_back()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A writable copy of the small checkpoint, without its chat template."""
    ignore = shutil.ignore_patterns("chat_template.jinja")
    return Path(shutil.copytree(SMALL, tmp_path / "checkpoint", ignore=ignore))


@pytest.fixture(autouse=True)
def knobs_are_those_of_the_environment() -> Iterator[None]:
    """A knob of Triton that was assigned ignores its environment variable from then on, and monkeypatch restores one by
    an assignment: the cache of later tests would not be theirs, but the user's."""
    yield
    assigned = [name for group in KNOBS for name in vars(group) if hasattr(vars(type(group)).get(name), "key")]
    assert not assigned, "set a knob's environment variable instead"


@pytest.fixture(autouse=True)
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test runs with guarded launches, and with NaN in memory that nobody wrote."""
    monkeypatch.setattr(launch, "interpret", guarded)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def unguarded(gates: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches run without the guard, at more than twice the speed, and on the tensors themselves."""
    monkeypatch.setattr(launch, "interpret", INTERPRET)


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
                index = int(flat.abs().argmax())
                flat[index] = flat[index] * 1.03 if first.is_floating_point() else flat[index] + 1
            return out

        monkeypatch.setattr(call, "call_checked", faulty)

    return inject


@pytest.fixture
def gpu() -> Iterator[Any]:
    """Two simulated GPUs (tests/support/stub), whose launches Triton's JIT prepares."""
    if INTERPRETED or torch.cuda.is_available():
        pytest.skip("simulates a GPU in a compiling process that has none")
    from tests.support.stub.gpu import gpu

    with gpu(2) as simulated:
        yield simulated


@pytest.fixture
def covers(record_property: Any) -> Any:
    """covers(kind, line): a line in that section of the summary of the run."""
    return record_property


@pytest.fixture
def parity(covers: Any) -> Any:
    """parity(feature, result): a row of the table of transformers' features, in the summary of the run."""
    return lambda feature, result: covers("parity", f"{feature:50} {result}")


HF_SIZES: dict[str, Any] = {"vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "sliding_window": 6}
HF_SIZES |= {"num_hidden_layers": 1 if INTERPRETED else 2, "num_attention_heads": 4, "num_key_value_heads": 2}
HF_SIZES |= {"num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 96}
HF_SIZES |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
HF_SIZES |= {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
HF_SIZES |= {"attn_implementation": "eager", "experts_implementation": "eager"}


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
            parameter.requires_grad_(False)  # where gradients are recorded transformers' own functions run
        return model

    return make


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    checked: set[str] = set()
    go = call.call_checked

    def record(op: Any, args: Any) -> Any:
        checked.add(op.name)
        return go(op, args)

    monkeypatch.setattr(call, "call_checked", record)
    return checked


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found: dict[str, set[str]] = {}
    for report in terminalreporter.stats.get("", []):  # the teardowns, which have all properties
        for kind, line in report.user_properties:
            found.setdefault(kind, set()).add(line)
    for kind, lines in sorted(found.items()):
        terminalreporter.section(kind)
        for line in sorted(lines):
            terminalreporter.write_line(line)
