"""A GPU that is not there: `torch.cuda` as the package uses it, beside tensors.py and driver.py.

python -m tests.support.stub -m mixtral_triton generate --prompt "def"
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton

from mixtral_triton import ops
from mixtral_triton.kernels import call

from .driver import Driver
from .tensors import Factories, FakeGPUTensor, indexed, stage

H100 = {
    "name": "NVIDIA H100 80GB HBM3 (stub)",
    "major": 9,
    "minor": 0,
    "multi_processor_count": 132,
    "total_memory": 80 << 30,
    "L2_cache_size": 50 << 20,
    "shared_memory_per_block_optin": 232448,
    "warp_size": 32,
}


class Stream:
    """A queue of work: here all of it is done at once, so it is but a number."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0, number: int | None = None) -> None:
        Stream.made += 1
        self.device = indexed("cuda" if device is None else device)
        self.cuda_stream = Stream.made if number is None else number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stream) and (self.device, self.cuda_stream) == (other.device, other.cuda_stream)

    def __hash__(self) -> int:
        return hash((self.device, self.cuda_stream))

    def synchronize(self) -> None:
        stage.look("Stream.synchronize")

    def wait_stream(self, other: Stream) -> None:
        """All earlier work is done."""


class Event:
    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        stage.look("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return 1e3 * (end.at - self.at)


class Generator(torch.Generator):
    """A GPU's generator. A capture that did not end leaves it waiting for the end."""

    def __new__(cls, device: Any = "cpu") -> Any:
        own = super().__new__(cls, "cpu")
        own.where = indexed(device) if torch.device(device).type == "cuda" else torch.device("cpu")
        own.captured_by = None
        return own

    def __init__(self, device: Any = "cpu") -> None:
        """All was done in __new__."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.where

    def draws(self, capture: Any) -> None:
        if self.captured_by is not None and capture is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if capture is not None and self.captured_by is not capture:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")


class Graph:
    """A CUDA graph: what is captured does not run, a replay runs it on the same memory.

    A capture that something invalidated cannot end: the end raises, and leaves its generators and its pool captured.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Callable[[], Any]] = []
        self.generators: list[Generator] = []
        self.valid, self.ended, self.stream, self.own_pool = True, False, None, (0, 0)

    def register_generator_state(self, generator: Generator) -> None:
        self.generators.append(generator)

    def capture_begin(self, pool: Any = (0, 0), capture_error_mode: str = "global", **kwargs: Any) -> None:
        gpu = active()
        self.stream, self.mode, self.own_pool = torch.cuda.current_stream(), capture_error_mode, pool
        if self.stream.cuda_stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.device = gpu.current
        gpu.captures.append(self)
        gpu.pools.add(pool)
        for generator in self.generators:
            generator.captured_by = self
        stage.capture = self

    def record(self, call: Callable[[], Any]) -> None:
        if active().current != self.device:
            self.invalidate()
            raise RuntimeError("CUDA error: work of another device in a capture")
        self.calls.append(call)

    def invalidate(self) -> None:
        self.valid = False

    def capture_end(self) -> None:
        stage.capture = None
        if not self.valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if torch.cuda.current_stream() != self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        active().pools.discard(self.own_pool)
        for generator in self.generators:
            generator.captured_by = None
        self.ended = True

    def replay(self) -> None:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        active().replays += 1
        for operation in self.calls:
            operation()

    def reset(self) -> None:
        self.calls.clear()


_active: list[GPU] = []


def active() -> GPU:
    return _active[-1]


class GPU:
    """One machine's GPUs. `driver` has the launches; `captures` and `replays` what became of graphs."""

    def __init__(self, count: int = 1, **properties: Any) -> None:
        self.count, self.current = count, 0
        self.properties = SimpleNamespace(**H100 | properties)
        self.streams = [Stream(torch.device("cuda", i), number=0) for i in range(count)]
        self.captures: list[Graph] = []
        self.pools: set[Any] = set()
        self.replays = 0
        self.driver = Driver(self)

    @property
    def looks(self) -> list[str]:
        return stage.looks

    @contextmanager
    def no_looks(self) -> Iterator[None]:
        """Within the block the host may read nothing."""
        stage.forbidden = True
        try:
            yield
        finally:
            stage.forbidden = False

    def exchange(self, index: int) -> int:
        before = self.current
        if index >= 0:
            self._check(index)
            self.current = index
        return before

    def _check(self, index: int) -> None:
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")

    def _index(self, device: Any = None) -> int:
        index = self.current if device is None else device if isinstance(device, int) else indexed(device).index
        self._check(index)
        return index

    def set_stream(self, stream: Stream) -> None:
        self.current = stream.device.index
        self.streams[self.current] = stream

    def functions(self) -> dict[str, Any]:
        """What stands in the place of `torch.cuda`'s functions."""

        def wait(device: Any = None) -> None:
            stage.look("synchronize")
            self.driver.check_alive()

        def forbid_looks(mode: Any) -> None:
            stage.forbidden = mode in (2, "error")

        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "device_count": lambda: self.count,
            "current_device": lambda: self.current,
            "set_device": lambda device: self.exchange(self._index(device)) and None,
            "_exchange_device": self.exchange,
            "_maybe_exchange_device": self.exchange,
            "get_device_properties": lambda device=None: self._index(device) * 0 or self.properties,
            "get_device_name": lambda device=None: self.properties.name,
            "get_device_capability": lambda device=None: (self.properties.major, self.properties.minor),
            "synchronize": wait,
            "set_sync_debug_mode": forbid_looks,
            "empty_cache": self.empty_cache,
            "mem_get_info": lambda device=None: (self.properties.total_memory, self.properties.total_memory),
            "memory_allocated": lambda device=None: 0,
            "max_memory_allocated": lambda device=None: 0,
            "reset_peak_memory_stats": lambda device=None: None,
            "current_stream": lambda device=None: self.streams[self._index(device)],
            "default_stream": lambda device=None: Stream(torch.device("cuda", self._index(device)), number=0),
            "set_stream": self.set_stream,
            "is_current_stream_capturing": lambda: stage.capture is not None,
            "graph_pool_handle": self.pool,
            "Stream": Stream,
            "Event": Event,
            "CUDAGraph": Graph,
        }

    def pool(self) -> tuple[int, int]:
        Stream.made += 1
        return (0, Stream.made)

    def empty_cache(self) -> None:
        if self.pools:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED: an earlier capture did not end")

    def end_pool(self, device: int, pool: Any) -> None:
        if pool not in self.pools:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.pools.remove(pool)


@contextmanager
def gpu(count: int = 1, **properties: Any) -> Iterator[GPU]:
    """Within the block, this machine has `count` GPUs, an H100 each unless `properties` say otherwise."""
    made = GPU(count, **properties)
    with ExitStack() as stack:
        for name, function in made.functions().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, function))
        stack.enter_context(mock.patch.object(torch.cuda.graphs.graph, "default_capture_stream", None))
        stack.enter_context(mock.patch.object(torch, "Generator", Generator))
        for name, function in {"_host_emptyCache": lambda: None, "_cuda_releasePool": lambda *_: None}.items():
            stack.enter_context(mock.patch.object(torch._C, name, function, create=True))
        stack.enter_context(mock.patch.object(torch._C, "_cuda_endAllocateToPool", made.end_pool, create=True))
        for module in (call, ops):
            types = (*module.PLAIN_TYPES, FakeGPUTensor)
            stack.enter_context(mock.patch.object(module, "PLAIN_TYPES", types))
        # A module's parameters are new ones once it has moved: ours cannot take another tensor's place.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        before = triton.runtime.driver._active
        triton.runtime.driver.set_active(made.driver)
        _active.append(made)
        stack.callback(_active.pop)
        stack.callback(setattr, triton.runtime.driver, "_active", before)
        stack.callback(made.driver.forget)
        stage.looks.clear()
        stack.enter_context(Factories())
        yield made
