"""Capturing a step in a CUDA graph on its device. A failed capture leaves torch usable, or raises CaptureLost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CaptureLost(RuntimeError):
    """A capture failed, and its side effects could not be reverted."""


def capture(step: Callable[[], object], generator: torch.Generator | None, device: torch.device) -> Callable[[], None]:
    """Capture the launches of `step` on `device` and return the replay. Nothing runs; `step` must have run before.

    `generator`: the one that the step draws from, if any. Raises RuntimeError where the step cannot be captured (it
    reads a value, say), with stream, allocator and generators as before, and CaptureLost where they are not.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            _capture(step, graph, generator, pool=pool)
        finally:
            # The end of an invalidated capture raises, which skips the rest of torch's clean-up.
            if torch.cuda.current_stream() != before:
                torch.cuda.set_stream(before)
                _revert(graph, pool, generator, before.device)
    return graph.replay


def _capture(step: Callable[[], object], graph: Any, generator: torch.Generator | None, **pool: Any) -> None:
    """Capture on a stream of the current device: torch's default is one stream, of the device captured first."""
    if generator is not None:
        graph.register_generator_state(generator)
    # Other threads may continue: their streams are not part of this capture.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local", **pool):
        step()


def _revert(graph: Any, pool: Any, generator: torch.Generator | None, device: torch.device) -> None:
    """End the allocations to the failed capture's pool, and the capture state of the generators."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
        graph.reset()
        # A generator leaves its capture state only at the end of a capture.
        held = torch.zeros(1, device=device)
        _capture(held.zero_, torch.cuda.CUDAGraph(), generator)
    except (AttributeError, RuntimeError) as error:
        raise CaptureLost(
            f"the capture of a CUDA graph failed, and {device} is still in it: memory that it allocated is lost, and "
            f"random numbers cannot be drawn there. Restart the process without a graph. ({error})"
        ) from error
