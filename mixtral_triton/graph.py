"""Capturing a step in a CUDA graph on its device. A failed capture leaves torch usable, or raises CaptureLost."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

_lock = threading.Lock()  # captures take turns, as they share a stream
_streams: dict[int, torch.cuda.Stream] = {}  # by device: torch draws streams from a pool, where others get the same
_lost: list[Any] = []  # graphs whose capture did not end: torch's allocators still call them
_INVALIDATED, _THREAD_LOCAL = 2, 1  # cudaStreamCaptureStatus, cudaStreamCaptureMode


class CaptureLost(RuntimeError):
    """A capture failed, and its side effects could not be reverted."""


def capture(step: Callable[[], object], generator: torch.Generator | None, device: torch.device) -> Callable[[], None]:
    """Capture the launches of `step` on `device` and return the replay. Nothing runs; `step` must have run before.

    `generator`: the one that the step draws from, if any. Other threads may use the device, but not synchronize it as
    `torch.cuda.graph` does. Raises RuntimeError where the step cannot be captured (it reads a value, say), with stream,
    allocators and generators as before, and CaptureLost where they are not.
    """
    graph = torch.cuda.CUDAGraph()
    if generator is not None:
        graph.register_generator_state(generator)
    with _lock, torch.cuda.device(device):
        current = torch.cuda.current_device()
        if current not in _streams:
            _streams[current] = torch.cuda.Stream()
        stream = _streams[current]
        with torch.cuda.stream(stream):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError("another capture has the stream")
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                _end(graph, stream, device, failed=True)
                raise
            _end(graph, stream, device, failed=False)
    return graph.replay


def _end(graph: Any, stream: torch.cuda.Stream, device: torch.device, failed: bool) -> None:
    """End a capture; raise RuntimeError where it was invalidated although the step did not fail.

    The end of an invalidated capture raises before torch has closed its pools of device and host memory and released
    the generators. An empty capture therefore takes its place, which torch ends completely.
    """
    handle, status, captured = ctypes.c_void_p(stream.cuda_stream), ctypes.c_int(), ctypes.c_void_p()
    with suppress(AttributeError, OSError):  # a valid capture needs none of these calls
        _call_runtime("StreamIsCapturing", handle, ctypes.byref(status))
    try:
        if invalid := failed or status.value == _INVALIDATED:
            _call_runtime("StreamEndCapture", handle, ctypes.byref(captured))
            _call_runtime("GetLastError")  # else torch raises it at its next launch
            if captured.value is not None:
                _call_runtime("GraphDestroy", captured)
            _call_runtime("StreamBeginCapture", handle, ctypes.c_int(_THREAD_LOCAL))
        graph.capture_end()
    except (AttributeError, OSError, RuntimeError) as error:
        _lost.append(graph)
        raise CaptureLost(
            f"the capture of a CUDA graph failed, and {device} is still in it: memory that it allocated is lost, and "
            f"random numbers cannot be drawn there. Restart the process without a graph. ({error})"
        ) from error
    if invalid:
        graph.reset()
    if invalid and not failed:
        raise RuntimeError("the capture was invalidated, perhaps by a synchronization in another thread")


def _call_runtime(function: str, *args: Any) -> None:
    """Call the CUDA or HIP runtime that torch uses, for what torch does not offer. Its errors show in what follows."""
    runtime = ctypes.CDLL(torch._C.__file__)  # symbols of a library's dependencies count
    getattr(runtime, ("hip" if torch.version.hip else "cuda") + function)(*args)
