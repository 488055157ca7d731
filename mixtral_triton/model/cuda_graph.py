"""Capturing launches in a CUDA graph beside other threads, and the memory that a graph keeps.

A capture allocates from a pool of its own. torch releases the pool of a graph that has ended only where an ordinary
allocation finds no memory, never in a capture: the pools are therefore kept here, for the next graphs.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from ..kernels.launching.cuda_runtime import call_runtime as _call_runtime

_lock = threading.Lock()  # captures take turns, as they share a stream
_streams: dict[int, torch.cuda.Stream] = {}  # by device: torch draws streams from a pool, where others get the same
_pools: dict[int, list[Any]] = defaultdict(list)  # by device, so of its one stream: MemPools that no graph uses
_lost: list[Any] = []  # graphs whose capture did not end: torch's allocators still call them
_INVALIDATED, _THREAD_LOCAL = 2, 1  # cudaStreamCaptureStatus, cudaStreamCaptureMode
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
atexit.register(_pools.clear)  # while the driver still answers


class CaptureLost(RuntimeError):
    """A capture failed, and its side effects could not be reverted."""


class CapturedGraph:
    """Launches that a call replays, with the pool of memory that is theirs until `reset`."""

    def __init__(self, graph: torch.cuda.CUDAGraph, pool: Any, free: list[Any]) -> None:
        self.graph, self.pool, self._free = graph, pool, free

    def __call__(self) -> None:
        self.graph.replay()

    def reset(self) -> None:
        """End the graph; the next capture on the device may take its memory."""
        self.graph.reset()
        if self.pool is not None:
            self._free.append(self.pool)
            self.pool = None


def capture(step: Callable[[], object], generator: torch.Generator | None, device: torch.device) -> CapturedGraph:
    """Capture the launches of `step` on `device`. Nothing runs; `step` must have run before.

    `generator`: the one that the step draws from, if any. Other threads may use the device, but not synchronize it as
    `torch.cuda.graph` does. Where memory runs out, what torch and earlier graphs hold unused is released, and the
    capture is tried once more. Raises RuntimeError where the step cannot be captured, as one that reads a value, or the
    graph not instantiated: stream, allocators and generators are then as before. Raises CaptureLost where they are not.
    """
    with _lock, torch.cuda.device(device), no_collection():
        try:
            return _capture(step, generator, device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        _release_unused()  # here, where no traceback holds tensors of the capture
        try:
            return _capture(step, generator, device)
        except RuntimeError:
            _release_unused()
            raise


def _release_unused() -> None:
    """Return to the driver what the current device's ended graphs and torch hold unused."""
    _pools[torch.cuda.current_device()].clear()
    torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch's allocator or the driver found no memory."""
    return isinstance(error, torch.OutOfMemoryError) or getattr(error, "error_code", None) == _OUT_OF_MEMORY


def _capture(step: Callable[[], object], generator: torch.Generator | None, device: torch.device) -> CapturedGraph:
    graph = torch.cuda.CUDAGraph(keep_graph=True)  # the end of a capture then instantiates nothing, which may fail
    if generator is not None:  # here, because torch up to 2.12 allocates its seed on the current device
        graph.register_generator_state(generator)
    current = torch.cuda.current_device()
    if current not in _streams:
        _streams[current] = torch.cuda.Stream()
    with torch.cuda.stream(stream := _streams[current]):
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("another capture has the stream")
        free = _pools[current]
        captured = CapturedGraph(graph, free.pop() if free else torch.cuda.MemPool(), free)
        graph.capture_begin(pool=captured.pool.id, capture_error_mode="thread_local")
        try:
            step()
        except BaseException:
            _end(captured, stream, device, failed=True)
            raise
        _end(captured, stream, device, failed=False)
    try:
        graph.instantiate()
    except RuntimeError:  # no memory is left, or the driver has no such edges: nothing is captured any more
        captured.reset()
        raise
    return captured


@contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage within the block: a finalizer that synchronizes would invalidate a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _end(captured: CapturedGraph, stream: torch.cuda.Stream, device: torch.device, failed: bool) -> None:
    """End a capture; raise RuntimeError where it was invalidated although the step did not fail.

    The end of an invalidated capture raises before torch has closed its pools of device and host memory and released
    the generators. An empty capture therefore takes its place, which torch ends completely.
    """
    handle, status, invalid_graph = ctypes.c_void_p(stream.cuda_stream), ctypes.c_int(), ctypes.c_void_p()
    with suppress(AttributeError, OSError):  # a valid capture needs none of these calls
        _call_runtime("StreamIsCapturing", handle, ctypes.byref(status))
    try:
        if invalid := failed or status.value == _INVALIDATED:
            _call_runtime("StreamEndCapture", handle, ctypes.byref(invalid_graph))
            _call_runtime("GetLastError")  # else torch raises it at its next launch
            if invalid_graph.value is not None:
                _call_runtime("GraphDestroy", invalid_graph)
            _call_runtime("StreamBeginCapture", handle, ctypes.c_int(_THREAD_LOCAL))
        captured.graph.capture_end()
    except (AttributeError, OSError, RuntimeError) as error:
        _lost.append(captured)
        raise CaptureLost(
            f"the capture of a CUDA graph failed, and {device} is still in it: memory that it allocated is lost, and "
            f"random numbers cannot be drawn there. Restart the process without a graph. ({error})"
        ) from error
    if invalid:
        captured.reset()
    if invalid and not failed:
        raise RuntimeError("the capture was invalidated, perhaps by a synchronization in another thread")
