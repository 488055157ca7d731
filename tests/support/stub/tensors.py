"""Tensors on simulated GPUs, whose memory is the CPU's: torch's operations run there under a GPU's rules."""

import ctypes
import math
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .adapter import OPERATORS, call_operator

# Operations that copy between devices, or take an index or a mask from the host.
_CROSS_DEVICE = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
# Operations whose result, or its size, depends on values.
_SYNCS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}
# Errors of torch functions that need a GPU themselves, by builds of torch without CUDA and with it.
_NO_GPU = ("Could not run 'aten::empty", "PyTorch is not linked with support for cuda")
_NO_GPU += ("Found no NVIDIA driver", "CUDA error: CUDA driver version is insufficient")
# Methods that return values to the host.
_READS = {"__int__", "__float__", "__bool__", "__index__", "item", "tolist", "numpy", "__array__", "__contains__"}


class FakeGPUTensor(Tensor):
    """A tensor on a simulated GPU; `held` is its memory."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> "FakeGPUTensor":
        layout: dict[str, Any] = {"dtype": held.dtype, "layout": held.layout}
        if held.layout == torch.strided:
            layout |= {"strides": held.stride(), "storage_offset": held.storage_offset()}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, device=device, **layout)
        tensor.held = held
        if stage.capture is not None:
            stage.capture.allocate(held)
        return tensor

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        """Read values where a dispatch mode of torch, such as that of `verify`, has disabled the mode below."""
        stage.sync("tolist")
        return self.held.tolist()

    def record_stream(self, stream: Any) -> None:
        """Do nothing, because no memory is used again while a test holds it."""

    def __deepcopy__(self, memo: Any) -> Tensor:
        clone: Tensor = FakeGPUTensor(self.held.clone(), self.device)
        memo[id(self)] = clone = nn.Parameter(clone, self.requires_grad) if isinstance(self, nn.Parameter) else clone
        return clone

    def __repr__(self, **kwargs: Any) -> str:
        return f"FakeGPUTensor({self.held}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == OPERATORS:
            with Factories():  # torch has disabled the mode
                return call_operator(func._opname, args, kwargs or {})
        return dispatch(func, args, kwargs or {})


class HostSync(RuntimeError):
    """The host read a value where synchronization is forbidden."""


@dataclass(frozen=True)
class Work:
    """A copy (addresses it writes and reads, bytes) or a launch: its stream, and the work of each stream that is
    complete when it ends."""

    what: Any
    stream: int
    clock: Mapping[int, int]

    def precedes(self, other: "Work") -> bool:
        """Return whether streams and events order this work before the other."""
        return self.clock[self.stream] <= other.clock.get(self.stream, 0)


class Stage:
    """The state of execution: host synchronizations so far, the graph that is being captured, if any, and the order
    that streams and events impose."""

    def __init__(self) -> None:
        self.syncs: list[str] = []
        self.work: list[Work] = []
        self.clocks: dict[int, Counter[int]] = defaultdict(Counter)  # by stream: the work that precedes its next
        self.forbidden = False
        self.capture: Any = None
        self.pinned: dict[int, int] = {}  # bytes of host memory, by address
        self.last_error = 0  # of the runtime, which torch raises after its next launch

    def run(self, work: Callable[[], Any]) -> None:
        """Run work now, or record it for a replay."""
        if self.capture is None:
            work()
        else:
            self.capture.record(work)

    def log(self, what: Any, stream: int) -> None:
        self.clocks[stream][stream] += 1
        self.work.append(Work(what, stream, dict(self.clocks[stream])))

    def wait(self, stream: int, clock: Mapping[int, int]) -> None:
        """Order the next work of a stream behind all that `clock` counts."""
        self.clocks[stream] |= Counter(clock)

    def sync(self, operation: str) -> None:
        """Record that the host waits for a value."""
        self.syncs.append(operation)
        if self.capture is not None:
            self.capture.valid = False
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({operation})")
        if self.forbidden:
            raise HostSync(f"the host reads a value of the GPU: {operation}")


stage = Stage()


def is_fake_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def indexed(device: Any) -> torch.device:
    """Return a GPU's device with its index, which for "cuda" is the current one."""
    device = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if device.index is None else device


def to_fake_gpu(x: Any, device: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, FakeGPUTensor):
        return x
    return FakeGPUTensor(x.detach(), indexed(device))


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the memory of its arguments; results are on the GPU unless they go to the CPU."""
    name, mutates, is_view = getattr(func, "_opname", func.__name__), False, False
    if isinstance(func, torch._ops.OpOverload):
        mutates, is_view = func._schema.is_mutable, func.is_view
    leaves, spec = tree_flatten((args, kwargs))
    fakes = [x for x in leaves if isinstance(x, FakeGPUTensor)]
    devices = {x.device for x in fakes}
    if name not in _CROSS_DEVICE:  # 0-D tensors of the CPU count as numbers
        on_cpu = {x.device for x in leaves if isinstance(x, Tensor) and not isinstance(x, FakeGPUTensor) and x.dim()}
        if len(devices | on_cpu) > 1:
            found = ", ".join(sorted(map(str, devices | on_cpu)))
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {found}")
    target = kwargs.get("device")
    device = indexed(target) if is_fake_gpu(target) else next(iter(devices))
    to_host = target is not None and not is_fake_gpu(target)
    to_host = to_host or (name == "copy_" and not isinstance(args[0], FakeGPUTensor))
    if to_host or name in _SYNCS or (name == "index" and any(is_mask(x) for x in args[1])):
        stage.sync(name)
    memory = [torch.device("cpu") if isinstance(x, torch.device) else getattr(x, "held", x) for x in leaves]
    call_args, call_kwargs = tree_unflatten(memory, spec)
    if name == "copy_":
        to, source = call_args[:2]
        stage.log((to.data_ptr(), source.data_ptr(), to.nbytes), torch.cuda.current_stream(device).cuda_stream)

    if stage.last_error and not is_view:
        stage.last_error = 0
        raise RuntimeError("CUDA error: out of memory (the last error of an earlier call)")

    def call() -> Any:
        return func(*call_args, **call_kwargs)

    if stage.capture is not None and mutates:
        stage.capture.record(call)
        out = call_args[0] if func._schema.returns else None
    else:
        out = call()
        if stage.capture is not None and not is_view:
            stage.capture.record(lambda: overwrite(out, call()))
    known = {id(x.held): x for x in fakes}
    # A view is an inference tensor if its base is one, whatever the mode.
    inference = torch.is_inference_mode_enabled() and not (is_view and not fakes[0].is_inference())
    with torch.inference_mode(inference):
        return out if to_host else tree_map(lambda x: known[id(x)] if id(x) in known else to_fake_gpu(x, device), out)


def _of_address(owner: Any, layout: Mapping[str, Any], device: Any) -> Tensor:
    """Return a tensor on memory that `owner` describes, which on this GPU is the host's: it must be pinned."""
    address, dtype = layout["data"][0], {"<i2": torch.int16, "<i4": torch.int32}[layout["typestr"]]
    if address not in stage.pinned:
        raise RuntimeError("The specified pointer resides on host memory and is not registered with any CUDA device.")
    memory = (ctypes.c_char * (math.prod(layout["shape"]) * dtype.itemsize)).from_address(address)
    weakref.finalize(memory, lambda alive: None, owner)
    return to_fake_gpu(torch.frombuffer(memory, dtype=dtype).view(layout["shape"]), device)


def is_mask(x: Any) -> bool:
    return isinstance(x, FakeGPUTensor) and x.dtype in (torch.bool, torch.uint8)


def overwrite(old: Any, new: Any) -> None:
    for before, after in zip(tree_flatten(old)[0], tree_flatten(new)[0], strict=True):
        if isinstance(before, Tensor) and before.data_ptr() != after.data_ptr():
            before.copy_(after)


def index(x: FakeGPUTensor, place: Any, *value: Any) -> Any:
    """Run `x[place]` or `x[place] = value`, for which torch needs a GPU before it dispatches."""
    leaves, spec = tree_flatten(place)
    if any(is_mask(leaf) for leaf in leaves):
        stage.sync("index by a mask")
    at = tree_unflatten([getattr(leaf, "held", leaf) for leaf in leaves], spec)
    if value:
        new = getattr(value[0], "held", value[0])
        return stage.run(lambda: x.held.__setitem__(at, new))
    out = x.held[at]
    if stage.capture is not None and any(isinstance(leaf, Tensor) for leaf in leaves):
        stage.capture.record(lambda: overwrite(out, x.held[at]))
    return to_fake_gpu(out, x.device)


class Factories(TorchFunctionMode):
    """Functions with a GPU as their device create simulated tensors; `with torch.device(...)` may name the device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if hasattr(kwargs.get("generator"), "check_draw"):
            kwargs["generator"].check_draw(stage.capture)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], FakeGPUTensor):
            return index(*args)
        if name in _READS and isinstance(args[0], FakeGPUTensor):
            stage.sync(name)
            return func(args[0].held, *args[1:], **kwargs)
        if name == "copy_" and any(isinstance(x, FakeGPUTensor) for x in args):
            return torch.ops.aten.copy_.default(*args, **kwargs)
        if name == "pin_memory":
            return args[0]
        if kwargs.pop("pin_memory", False):  # as safetensors reads for a GPU: pinned memory needs a real one
            return func(*args, **kwargs)
        if name == "cuda" and isinstance(args[0], Tensor):
            return self._move(args[0], args[1] if len(args) > 1 else kwargs.get("device", "cuda"), {})
        if name == "to" and isinstance(args[0], Tensor):
            return self._to(func, args, kwargs)
        if func is torch.device and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        device = kwargs.get("device")
        if name == "as_tensor" and (layout := getattr(args[0], "__cuda_array_interface__", None)):
            return _of_address(args[0], layout, device)
        if is_fake_gpu(device) and not any(isinstance(x, FakeGPUTensor) for x in args):
            return to_fake_gpu(func(*args, **kwargs | {"device": "cpu"}), device)
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:  # of functions that need a GPU before they dispatch
            if not str(error).startswith(_NO_GPU):
                raise
            if not any(isinstance(x, FakeGPUTensor) for x in tree_flatten((args, kwargs))[0]):
                raise
        return dispatch(func, args, kwargs)

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run `x.to(...)`, whose device may be a string, a device, an index or a tensor's."""
        options = (*args[1:], *kwargs.values())
        like = [x for x in options if isinstance(x, FakeGPUTensor)]
        named = [x.device for x in like] + [x for x in options if isinstance(x, (str, torch.device))]
        named += [torch.device("cuda", x) for x in args[1:] if isinstance(x, int) and not isinstance(x, bool)]
        device = named[0] if named else None
        if device is not None and torch.device(device).type == "meta":
            return func(getattr(args[0], "held", args[0]), *args[1:], **kwargs)
        if not is_fake_gpu(device):
            return func(*args, **kwargs)
        dtypes = [x for x in options if isinstance(x, torch.dtype)] + [x.dtype for x in like]
        if args[0].device == indexed(device):
            return args[0].to(dtypes[0]) if dtypes else args[0]
        return self._move(args[0], device, {"dtype": dtypes[0]} if dtypes else {})

    def _move(self, x: Tensor, device: Any, dtype: dict[str, torch.dtype]) -> Tensor:
        memory = x.held if isinstance(x, FakeGPUTensor) else x.detach()
        moved = to_fake_gpu(memory.to(device="cpu", copy=True, **dtype), device)
        return nn.Parameter(moved, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else moved
