"""OffloadedWeight: the experts of a projection, some of them in host memory, which kernels read in place.

E experts, n of them in host memory, N rows, K columns: the depth of the sum

Pinned host memory is part of a GPU's address space. A kernel loads the address of an expert's rows from a table and
reads them there, across the link where they lie in host memory: each byte once in decode. For many tokens a tile of the
weight is read once for each row tile, so the host's experts are first copied into a buffer on the device, while the
layer before computes.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..launching.cuda_runtime import call_runtime
from ..launching.kernel_args import ALIGNMENT
from .quantized import QuantizedWeight

PORTABLE_MAPPED = 3  # flags of cudaHostRegister: every GPU may read the memory, at an address of its own space
OFFLOADED = "offloaded "  # how `layout` starts
_weights: weakref.WeakValueDictionary[int, OffloadedWeight] = weakref.WeakValueDictionary()  # by id
_copy_streams: dict[torch.device, torch.cuda.Stream] = {}


@dataclass(eq=False)
class _Buffer:
    """A device staging buffer: `contents` names the weight that it holds, `filled` marks the copy as complete."""

    memory: Tensor
    filled: torch.cuda.Event
    contents: Any = None


class _Staging(threading.local):
    """A buffer of `nbytes` for a projection's weights: one is copied once the kernel that reads another has ended.

    Each thread has one for each of its streams, so no other thread can refill it before the kernel is launched.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.buffers: dict[int, _Buffer] = {}  # by stream; the one that was used last is the last

    def begin(self, weight: OffloadedWeight, stream: torch.cuda.Stream) -> _Buffer:
        """Return the buffer with the weight's host experts; the copy begins now, unless it has begun already."""
        buffer = self.buffers.pop(stream.cuda_stream, None)
        if buffer is None:
            memory = torch.empty(self.nbytes, dtype=torch.uint8, device=weight.device)
            buffer = _Buffer(memory, torch.cuda.Event())
        self.buffers = {**dict([*self.buffers.items()][-1:]), stream.cuda_stream: buffer}  # of the last two streams
        # The version counts writes to the host's rows; a tensor made in inference mode has none.
        contents = weakref.ref(weight), None if weight.host.is_inference() else weight.host._version
        if buffer.contents != contents:
            if weight.device not in _copy_streams:
                _copy_streams[weight.device] = torch.cuda.Stream(weight.device)
            copies = _copy_streams[weight.device]
            copies.wait_stream(stream)  # for the kernels that read the buffer
            with torch.cuda.stream(copies):
                rows = buffer.memory[: weight.host.nbytes].view(weight.dtype).view(weight.host.shape)
                rows.copy_(weight.host, non_blocking=True)
            buffer.memory.record_stream(copies)
            buffer.filled.record(copies)
            buffer.contents = contents
        return buffer


class OffloadedWeight(QuantizedWeight):
    """Stored: a weight [E, N, K], dense or quantized, of which some experts lie in host memory.

    data      int64 [E]: the address of each expert's rows; whoever holds it must hold this object
    resident  the rows of the other experts on the device, [E - n, N, K'], and `host`, [n, N, K'] in pinned host memory
    on_host   the experts in host memory, ascending
    scales, zeros  as in QuantizedWeight, on the device; None where the weight is dense (format "dense")

    It cannot be moved, converted, copied, pickled, exported or part of a state_dict.
    """

    scales: Any
    resident: Tensor
    host: Tensor

    def __init__(self, like: QuantizedWeight | Tensor, on_host: Sequence[int], device: Any) -> None:
        """Make an unset weight of the shape, dtypes, format and group of `like`, a weight on the meta device."""
        torch.nn.Module.__init__(self)
        self.shape, self.on_host = torch.Size(like.shape), tuple(sorted(on_host))
        self.format, self.group = getattr(like, "format", "dense"), getattr(like, "group", 0)
        stored = like.data
        E, *shape = stored.shape
        if (size := stored[0].nbytes) % ALIGNMENT:
            raise ValueError(f"OffloadedWeight: an expert's rows take {size} bytes, needs a multiple of {ALIGNMENT}")
        self.resident = torch.empty((E - len(self.on_host), *shape), dtype=stored.dtype, device=device)
        self.host = _pinned((len(self.on_host), *shape), stored.dtype, self.resident.device)
        self.register_buffer("data", self._table())
        self._on_host = torch.tensor([expert in self.on_host for expert in range(E)], device=device).long()
        self._staging = _Staging(self.host.nbytes)
        self._next_weight: Callable[[], OffloadedWeight | None] = lambda: None
        for name in ("scales", "zeros"):
            part = getattr(like, name, None)
            self.register_buffer(name, None if part is None else torch.empty_like(part, device=device))
        _weights[id(self)] = self

    def _table(self) -> Tensor:
        """Return the address of each expert's rows."""
        on_meta = self.resident.is_meta
        addresses = [0 if on_meta else self.rows(expert).data_ptr() for expert in range(len(self))]
        return torch.tensor(addresses, dtype=torch.int64, device=self.resident.device)

    def rows(self, expert: int) -> Tensor:
        """Return the memory of an expert's rows [N, K'], where it lies."""
        index = bisect_left(self.on_host, expert)
        return self.host[index] if expert in self.on_host else self.resident[expert - index]

    @property
    def name(self) -> str | None:  # type: ignore[override]
        return None if self.format == "dense" else super().name

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the values where the weight is dense."""
        return self.resident.dtype

    @property
    def value_dtype(self) -> torch.dtype | None:  # type: ignore[override]
        return self.dtype if self.format == "dense" else None

    @property
    def key(self) -> tuple[Any, ...]:
        return *super().key, self.dtype  # `tensors` has addresses

    @property
    def stored_rows(self) -> Tensor:
        """Such rows as the addresses lead to, as kernels read them."""
        return self.host if self.format == "dense" else self.kind.elements(self.host)

    @property
    def device(self) -> torch.device:
        return self.resident.device

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.resident.nbytes + sum(tensor.nbytes for tensor in self.buffers())

    @property
    def layout(self) -> str:
        """The id that the custom operator passes in place of the weight."""
        if torch.compiler.is_exporting():
            self._refuse()
        return f"{OFFLOADED}{id(self)}"

    @classmethod
    def of(cls, data: Tensor, scales: Any, zeros: Any, layout: str) -> OffloadedWeight:
        return _weights[int(layout.removeprefix(OFFLOADED))]

    def __getitem__(self, index: Any) -> Any:
        """Return an expert by number, to read, on the device; by a tuple or a slice of one expert, memory to write."""
        if index == ():
            return self
        first, *inner = index if isinstance(index, tuple) else (index,)
        expert: Any = range(len(self))[first]  # IndexError as a tensor's
        if isinstance(first, slice):
            (expert,) = expert  # ValueError for several
            rows, inner = self.rows(expert)[None], [slice(None), *inner]
        else:
            rows = self.rows(expert)
        data = rows[tuple(inner)]
        data = data.to(self.device) if isinstance(index, int) else data
        if self.format == "dense":
            return data
        zeros, shape = None if self.zeros is None else self.zeros[index], (*data.shape[:-1], self.shape[-1])
        return QuantizedWeight(self.format, data, self.scales[index], zeros, shape, self.group)

    def dequantize(self) -> Tensor:
        experts = (self[expert] for expert in range(len(self)))
        return torch.stack([x.float() if self.format == "dense" else x.dequantize() for x in experts])

    def viewed_as(self, format: str) -> QuantizedWeight:
        if (view := self.__dict__.get("_view")) is None:
            view = super().viewed_as(format)
            _weights[id(view)] = view  # type: ignore[assignment]
            view.__dict__["data_for_many_rows"] = self.data_for_many_rows  # a buffer holds the rows for both
        return view  # type: ignore[no-any-return]

    def data_for_many_rows(self) -> Tensor:
        """Return a table of addresses on the device, where the host's experts are copied: each byte once, on another
        stream, which begins with the next weight's, too. The host does not wait. On a CPU, return the table itself."""
        if self.device.type != "cuda":
            return self.data
        stream = torch.cuda.current_stream(self.device)
        if torch.cuda.is_current_stream_capturing():  # a replay may run beside another: the memory is the graph's own
            rows = torch.empty_like(self.host, device=self.device).copy_(self.host, non_blocking=True)
        else:
            buffer = self._staging.begin(self, stream)
            stream.wait_event(buffer.filled)
            rows, buffer.contents = buffer.memory, None  # the next chunk copies again
            if (next_weight := self._next_weight()) is not None:
                next_weight._staging.begin(next_weight, stream)
        table = self.data.add(self._on_host, alpha=rows.data_ptr() - self.host.data_ptr())
        table.memories = self.resident, rows  # type: ignore[attr-defined]  # which live until the launch
        return table

    @staticmethod
    def stage_in_turn(weights: Sequence[OffloadedWeight]) -> None:
        """Share a buffer, as large as the largest needs, among the weights of each of a layer's two projections, given
        in the order of their use. When one is staged, the copy of the next begins, so that a kernel reads one buffer
        while the other is filled."""
        for of_projection in (weights[::2], weights[1::2]):
            staging = _Staging(max((weight.host.nbytes for weight in of_projection), default=0))
            for weight in of_projection:
                weight._staging = staging
        for weight, next_weight in pairwise(weights):
            weight._next_weight = weakref.ref(next_weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> OffloadedWeight:
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if probe.device != self.device or (self.format == "dense" and probe.dtype != self.dtype):
            self._refuse()
        return self

    def _refuse(self, *args: Any) -> Any:
        """Raise ValueError: a copy, or a state, would hold the addresses of rows that are this object's."""
        got = "offloaded experts cannot be moved, converted, copied, pickled, exported or part of a state_dict"
        raise ValueError(f"Mixtral: {got}: needs a model without offload, or the checkpoint that they came from")

    _save_to_state_dict = _load_from_state_dict = __reduce_ex__ = _refuse  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> OffloadedWeight:
        table = memo.get(id(self.data))
        if table is None or not table.is_meta:
            self._refuse()
        like: Any = partial(torch.empty, dtype=self.dtype) if self.format == "dense" else self.spec.empty
        return OffloadedWeight(like(self.shape, device="meta"), self.on_host, "meta")


def empty_on_host(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.nn.Parameter:
    """Return an unset parameter of `device` whose memory is the host's, pinned: kernels read it in place.

    It is an ordinary tensor, which torch reads and writes as well. A loader writes its `memory`, the host's tensor: a
    copy to the device expects no address of the host.
    """
    memory = host = _pinned(shape, dtype, device)
    if device.type == "cuda":  # the interface by which torch takes addresses of a device has no bf16
        layout = {"shape": shape, "typestr": f"<i{dtype.itemsize}", "data": (memory.data_ptr(), False), "version": 2}
        owner = SimpleNamespace(__cuda_array_interface__=layout, memory=memory)
        memory = torch.as_tensor(owner, device=device).view(dtype)
    parameter = torch.nn.Parameter(memory, requires_grad=False)
    parameter.memory = host  # type: ignore[attr-defined]
    return parameter


def _pinned(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return unset host memory of exactly this size, which a CUDA device can read; on the meta device none.

    torch's own allocator of pinned memory rounds up to powers of two.
    """
    if device.type == "meta":
        return torch.empty(shape, dtype=dtype, device=device)
    count = torch.Size(shape).numel()
    # Private, because shared memory has pages of 4 kB, which take several times as long to allocate and to pin.
    pages = mmap.mmap(-1, max(1, count * dtype.itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(AttributeError, OSError):  # a system without huge pages
        pages.madvise(mmap.MADV_HUGEPAGE)
    host = torch.frombuffer(pages, dtype=dtype, count=count).view(shape)
    if device.type == "cuda":
        with suppress(AttributeError, OSError):  # else Linux copies all pinned private memory into every child process
            pages.madvise(mmap.MADV_DONTFORK)
        runtime = torch.cuda.cudart()
        with torch.cuda.device(device):
            status = runtime.cudaHostRegister(host.data_ptr(), host.nbytes, PORTABLE_MAPPED)
            if int(status):
                _call_runtime("GetLastError")  # else torch raises it at its next launch
                raise ValueError(
                    f"offload: {host.nbytes / 1e9:.1f} GB of host memory cannot be pinned (CUDA error {int(status)}): "
                    "needs fewer offloaded experts, more free memory, or a higher lock limit (ulimit -l)"
                )
            unpin = runtime.cudaHostUnregister, host.data_ptr(), torch.cuda.synchronize, device, pages
            weakref.finalize(host, _unpin, *unpin).atexit = False
            _check_address(host, device)
    return host


def _call_runtime(function: str, *args: Any) -> int:
    """Call the CUDA runtime where it has symbols to call, and return its status; 0 elsewhere."""
    with suppress(AttributeError, OSError):
        return call_runtime(function, *args)
    return 0


def _check_address(host: Tensor, device: torch.device) -> None:
    """Raise ValueError where pinned memory has another address on the device than on the host."""
    pinned, address = ctypes.c_void_p(host.data_ptr()), ctypes.c_void_p(host.data_ptr())
    status = _call_runtime("HostGetDevicePointer", ctypes.byref(address), pinned, ctypes.c_uint(0))
    if status or address.value != pinned.value:
        _call_runtime("GetLastError")
        raise ValueError(f"offload: {device} cannot read pinned memory at its host address, needs offload=0")


def _unpin(unregister: Any, address: int, synchronize: Any, device: torch.device, pages: mmap.mmap) -> None:
    """Unregister pinned memory after all kernels have ended. `pages` is an argument so that it lives until then."""
    try:
        synchronize(device)
    finally:  # it raises during a capture, when a collection may run this; freed memory must not stay pinned
        unregister(address)
