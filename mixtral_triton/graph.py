"""A step as a CUDA graph, captured on the device it runs on. A capture that fails leaves torch usable, or says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class CaptureLost(RuntimeError):
    """A capture failed, and what it left behind could not be put right."""


def captured(step: Callable[[], object], generator: torch.Generator | None, device: torch.device) -> Callable[[], None]:
    """What `step` launches on `device` as one graph -> its replay. Nothing runs yet; `step` has to have run before.

    `generator`: the one that the step draws from, if any. RuntimeError where the step cannot be captured (it looks at a
    value, say): stream, allocator and generators are then as before. `CaptureLost` where they are not.
    """
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            _capture(step, graph, generator, pool=pool)
        finally:
            # The end of a capture that CUDA gave up raises, and nothing behind it in torch's own clean-up is done.
            if torch.cuda.current_stream() != before:
                torch.cuda.set_stream(before)
                _put_right(graph, pool, generator, before.device)
    return graph.replay


def _capture(step: Callable[[], object], graph: Any, generator: torch.Generator | None, **pool: Any) -> None:
    """On a stream of the current device: torch keeps one for all captures, of the device that came first."""
    if generator is not None:
        graph.register_generator_state(generator)
    # Other threads may go on: what they do on streams of their own has no part in this capture.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(), capture_error_mode="thread_local", **pool):
        step()


def _put_right(graph: Any, pool: Any, generator: torch.Generator | None, device: torch.device) -> None:
    """End what the failed capture did not: allocations to its pool, and the generators' belief in a capture."""
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
        torch._C._cuda_releasePool(device.index, pool)
        graph.reset()
        # A generator leaves a capture at the end of one, and at nothing else.
        held = torch.zeros(1, device=device)
        _capture(held.zero_, torch.cuda.CUDAGraph(), generator)
    except (AttributeError, RuntimeError) as error:
        raise CaptureLost(
            f"the capture of a CUDA graph failed, and {device} is left in it: memory that it allocated is lost, and "
            f"random numbers cannot be drawn there. Start the process anew, without a graph. ({error})"
        ) from error
