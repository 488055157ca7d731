"""Simulated GPUs: the part of `torch.cuda` that a program needs, with the tensors and the driver of this package."""

import itertools
import time
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton

from .adapter import patches as project_patches
from .driver import Driver, LaunchError
from .tensors import Factories, FakeGPUTensor, indexed, stage

H100 = {"name": "NVIDIA H100 80GB HBM3 (stub)", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32}
H100 |= {"total_memory": 80 << 30, "L2_cache_size": 50 << 20, "shared_memory_per_block_optin": 232448}
MI300X = {"name": "AMD Instinct MI300X (stub)", "gcnArchName": "gfx942:sramecc+:xnack-", "major": 9, "minor": 4}
MI300X |= {"multi_processor_count": 304, "warp_size": 64, "total_memory": 192 << 30, "L2_cache_size": 4 << 20}
MI300X |= {"shared_memory_per_block_optin": 65536}
POOL = 32  # streams of a device, which torch hands out in turn
_handles = itertools.count(1)
_active: list["GPU"] = []


class Stream(namedtuple("Stream", "device cuda_stream")):
    """A stream, on which all work completes at once; `stage` knows which order it would have to wait for."""

    def __new__(cls, device: Any = None, priority: int = 0, number: int | None = None) -> Any:
        number = 1 + next(_handles) % POOL if number is None else number
        return super().__new__(cls, indexed("cuda" if device is None else device), number)

    def synchronize(self) -> None:
        stage.sync("Stream.synchronize")

    def wait_stream(self, other: "Stream") -> None:
        stage.wait(self.cuda_stream, stage.clocks[other.cuda_stream])

    def wait_event(self, event: "Event") -> None:
        stage.wait(self.cuda_stream, event.clock)


class Event:
    def __init__(self, enable_timing: bool = False, **kwargs: Any) -> None:
        self.at, self.clock = 0.0, dict[int, int]()

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()
        self.clock = dict(stage.clocks[(stream or torch.cuda.current_stream()).cuda_stream])

    def synchronize(self) -> None:
        stage.sync("Event.synchronize")

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "Event") -> float:
        return 1e3 * (end.at - self.at)


class Generator(torch.Generator):
    """A GPU's random generator, which a capture that did not end leaves in capture mode."""

    def __new__(cls, device: Any = "cpu") -> Any:
        generator = super().__new__(cls, "cpu")
        generator.fake_device = indexed(device) if torch.device(device).type == "cuda" else torch.device("cpu")
        generator.captured_by, generator.seed_device = None, None
        return generator

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.fake_device

    def check_draw(self, capture: Any) -> None:
        if self.captured_by is not None and capture is None:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        if capture is not None and self.captured_by is not capture:
            raise RuntimeError("Attempt to increase offset for a CUDA generator not in capture mode.")
        if capture is not None and self.seed_device != self.device.index:
            capture.record(self._read_seed)

    def _read_seed(self) -> None:
        raise LaunchError(f"illegal memory access: the seed of {self.device} is on cuda:{self.seed_device}")


class MemPool:
    """A pool of memory, which keeps what captures took from it while it lives."""

    def __init__(self) -> None:
        self.id = (0, next(_handles))
        memory = _active[-1].pool_bytes
        memory[self.id] = 0
        weakref.finalize(self, memory.pop, self.id, None)


class Graph:
    """A CUDA graph: captured work does not run; a replay runs it on the same memory.

    The end of an invalidated capture raises and leaves its generators and its memory pool in capture mode. The end of
    another one instantiates the graph, unless it is kept.
    """

    def __init__(self, keep_graph: bool = False) -> None:
        self.calls: list[Callable[[], Any]] = []
        self.keep_graph, self.generators = keep_graph, list[Generator]()
        self.size = 0  # operations and launches at the end of the capture
        self.valid, self.ended, self.stream, self.memory_pool = True, False, None, (0, 0)

    def register_generator_state(self, generator: Generator) -> None:
        """Allocate the seed on the current device, as torch up to 2.12 does."""
        generator.seed_device = _active[-1].current
        self.generators.append(generator)

    def capture_begin(self, pool: Any = (0, 0), capture_error_mode: str = "global", **kwargs: Any) -> None:
        machine = _active[-1]
        self.stream, self.mode = torch.cuda.current_stream(), capture_error_mode
        if self.stream.cuda_stream == 0:
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        self.device = machine.current
        machine.captures.append(self)
        self.first = len(machine.driver.launches)
        pool = self.memory_pool = (0, next(_handles)) if pool == (0, 0) else pool
        self.held = set[int]()  # addresses of memory that the capture took, and their bytes
        self.bytes = 0
        machine.pools.add(pool)
        machine.host_pools.add(pool)
        for generator in self.generators:
            generator.captured_by = self
        stage.capture = self

    def allocate(self, memory: torch.Tensor) -> None:
        """Take memory from the pool, of which nothing is used twice in one capture."""
        storage, machine = memory.untyped_storage(), _active[-1]
        if storage.data_ptr() in self.held:
            return
        self.held.add(storage.data_ptr())
        self.bytes += storage.nbytes()
        pools = machine.pool_bytes
        pools[self.memory_pool] = max(pools.get(self.memory_pool, 0), self.bytes)
        if sum(pools.values()) > machine.pool_bytes_most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def record(self, call: Callable[[], Any]) -> None:
        if _active[-1].current != self.device:
            self.valid = False
            raise RuntimeError("CUDA error: work of another device in a capture")
        self.calls.append(call)

    def capture_end(self) -> None:
        stage.capture = None
        if not self.valid:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        if torch.cuda.current_stream() != self.stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        _active[-1].pools.discard(self.memory_pool)
        _active[-1].host_pools.discard(self.memory_pool)
        for generator in self.generators:
            generator.captured_by = None
        self.ended, self.size = True, len(self.calls)
        self.launches = _active[-1].driver.launches[self.first :]
        if not self.keep_graph:
            self.instantiate()

    def instantiate(self) -> None:
        if code := int(_active[-1].refuses(self)):
            error = RuntimeError("CUDA error: operation not supported, or out of memory")
            error.error_code = code  # type: ignore[attr-defined]
            raise error

    def replay(self) -> None:
        if not self.ended:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        _active[-1].replays += 1
        for operation in self.calls:
            operation()

    def reset(self) -> None:
        self.calls.clear()
        self.ended = False


class GPU:
    """The GPUs of one machine. `driver` records launches, `captures` and `replays` graphs."""

    def __init__(self, count: int = 1, **properties: Any) -> None:
        self.count, self.current = count, 0
        self.properties = SimpleNamespace(**H100 | properties)
        self.streams = [Stream(torch.device("cuda", i), number=0) for i in range(count)]
        self.captures: list[Graph] = []
        self.pool_bytes: dict[Any, int] = {}  # what captures took from each pool, which its graph's end does not return
        self.pool_bytes_most = 1 << 40
        self.pools: set[Any] = set()  # of the device's memory, and of the host's, that a capture allocates from
        self.host_pools: set[Any] = set()
        self.pinned: dict[int, int] = {}  # bytes of host memory, by address
        self.pinned_most = 1 << 40
        self.mapped_at = 0  # how far pinned memory's device address is from its host address
        self.refuses: Callable[[Graph], int] = lambda graph: 0  # to instantiate this graph: the error's code, or 0
        self.replays, self.syncs, self.work = 0, stage.syncs, stage.work
        self.driver = Driver(self)

    def no_syncs(self) -> Any:
        """Raise HostSync if the host reads a value within the block."""
        return mock.patch.object(stage, "forbidden", True)

    def exchange(self, index: int) -> int:
        before = self.current
        self.current = self._index(index) if index >= 0 else before
        return before

    def _index(self, device: Any = None) -> int:
        index = self.current if device is None else device if isinstance(device, int) else indexed(device).index
        if index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return index

    def _stream(self, device: Any = None) -> Stream:
        return self.streams[self._index(device)]

    def _set_stream(self, stream: Stream) -> None:
        self.current = stream.device.index
        self.streams[self.current] = stream

    def _synchronize(self, device: Any = None) -> None:
        stage.sync("synchronize")
        self.driver.check_alive()

    def _pin(self, address: int, size: int, flags: int) -> int:
        """Return 0, or cudaErrorMemoryAllocation."""
        if sum(self.pinned.values()) + size > self.pinned_most:
            stage.last_error = 2
            return 2
        self.pinned[address] = size
        return 0

    def _empty_cache(self) -> None:
        if self.pools:
            raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED: an earlier capture did not end")

    def call_runtime(self, function: str, *args: Any) -> int:
        """Call the CUDA runtime, on the stream of the newest capture where it takes one."""
        if function == "GetLastError":
            stage.last_error = 0
        elif function == "HostGetDevicePointer":
            args[0]._obj.value = args[1].value + self.mapped_at
        if not self.captures:
            return 0
        capture = self.captures[-1]
        if function == "StreamIsCapturing":
            args[1]._obj.value = 1 if capture.valid else 2
        elif function == "StreamEndCapture":
            stage.capture = None
        elif function == "StreamBeginCapture":
            capture.calls.clear()
            capture.valid, stage.capture = True, capture
        return 0

    def functions(self) -> dict[str, Any]:
        properties = self.properties
        return {
            **dict.fromkeys(("is_available", "is_initialized"), lambda: True),
            **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), self.exchange),
            **dict.fromkeys(("memory_allocated", "max_memory_allocated"), lambda device=None: 0),
            **{"Stream": Stream, "Event": Event, "CUDAGraph": Graph, "MemPool": MemPool},
            "_lazy_init": lambda: None,
            "device_count": lambda: self.count,
            "current_device": lambda: self.current,
            "set_device": lambda device: self.exchange(self._index(device)) and None,
            "get_device_properties": lambda device=None: self._index(device) * 0 or properties,
            "get_device_name": lambda device=None: properties.name,
            "get_device_capability": lambda device=None: (properties.major, properties.minor),
            "synchronize": self._synchronize,
            "set_sync_debug_mode": lambda mode: setattr(stage, "forbidden", mode in (2, "error")),
            "empty_cache": self._empty_cache,
            "mem_get_info": lambda device=None: (properties.total_memory, properties.total_memory),
            "reset_peak_memory_stats": lambda device=None: None,
            "current_stream": self._stream,
            "default_stream": lambda device=None: Stream(torch.device("cuda", self._index(device)), number=0),
            "set_stream": self._set_stream,
            "is_current_stream_capturing": lambda: stage.capture is not None,
            "graph_pool_handle": lambda: (0, next(_handles)),
            "cudart": lambda: SimpleNamespace(cudaHostRegister=self._pin, cudaHostUnregister=self.pinned.pop),
        }


@contextmanager
def gpu(count: int = 1, **properties: Any) -> Iterator[GPU]:
    """Simulate `count` GPUs within the block: H100s with these changes of their properties, or MI300X by `MI300X`."""
    machine = GPU(count, **properties)
    patches = [(torch.cuda, name, function) for name, function in machine.functions().items()]
    patches += [(torch.version, "hip", "6.4" if hasattr(machine.properties, "gcnArchName") else None)]
    patches += [(torch.cuda.graphs.graph, "default_capture_stream", None), (torch, "Generator", Generator)]
    patches += project_patches(FakeGPUTensor, machine.call_runtime)
    patches += [(stage, "last_error", 0), (stage, "pinned", machine.pinned)]
    patches += [(torch._C, "_host_emptyCache", lambda: None), (triton.runtime.driver, "_active", machine.driver)]
    with ExitStack() as stack:
        for module, name, value in patches:
            stack.enter_context(mock.patch.object(module, name, value, create=module is torch._C))
        # Module.to must create new parameters, because a simulated GPU's tensor cannot replace another tensor's data.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        _active.append(machine)
        stack.callback(_active.pop)
        stack.callback(machine.driver.forget)
        for record in (stage.syncs, stage.work, stage.clocks):
            record.clear()
        stack.enter_context(Factories())
        yield machine
