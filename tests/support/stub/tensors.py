"""Tensors that say they are on a GPU, and whose memory is the CPU's.

torch's operations on them run on that memory, by the rules of a GPU: operands of one device, and a host that has to
wait where it looks at a value. Under a capture nothing runs; a replay runs it all on the same memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from mixtral_triton.kernels import call
from mixtral_triton.kernels.registry import OPS

# What copies between devices, and what takes an index or a mask from the host.
_CROSSING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}
# The result's size, or the result itself, is something that only the GPU knows.
_LOOKS = {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2"}
# What torch says where it has to do with a GPU itself.
_NO_GPU = ("Could not run 'aten::empty", "PyTorch is not linked with support for cuda")
# Methods that give the host numbers.
_READS = {"__int__", "__float__", "__bool__", "__index__", "item", "tolist", "numpy", "__array__", "__contains__"}


class FakeGPUTensor(Tensor):
    """`held` is the memory."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> FakeGPUTensor:
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        tensor = Tensor._make_wrapper_subclass(cls, held.shape, device=device, **layout)
        tensor.held = held
        return tensor

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: Any) -> Tensor:
        made: Tensor = FakeGPUTensor(self.held.clone(), self.device)
        memo[id(self)] = made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return made

    def __repr__(self, **kwargs: Any) -> str:
        return f"FakeGPUTensor({self.held}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "mixtral_triton":  # an operator of ours goes the way that a GPU's tensors go
            with Factories():  # which torch set aside when it came here through one
                return call.call_checked(OPS[func._opname], OPS[func._opname].bind(*args, **(kwargs or {})))
        return dispatch(func, args, kwargs or {})


class Looks(RuntimeError):
    """The host read a value, and somebody forbade it."""


class Stage:
    """What happens to operations now: counted looks, and the tape of a capture where there is one."""

    def __init__(self) -> None:
        self.looks: list[str] = []
        self.forbidden = False
        self.capture: Any = None  # a graph.Graph that is being captured

    def run(self, work: Callable[[], Any]) -> None:
        """Now, or when the capture under way is replayed."""
        if self.capture is None:
            work()
        else:
            self.capture.record(work)

    def look(self, what: str) -> None:
        self.looks.append(what)
        if self.capture is not None:
            self.capture.invalidate()
            raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
        if self.forbidden:
            raise Looks(f"the host looked at a value of the GPU: {what}")


stage = Stage()


def is_fake_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def indexed(device: Any) -> torch.device:
    """A GPU's device with its number: "cuda" is the current one."""
    chosen = torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if chosen.index is None else chosen


def to_fake_gpu(x: Any, device: Any) -> Any:
    if not isinstance(x, Tensor) or isinstance(x, FakeGPUTensor):
        return x
    return FakeGPUTensor(x.detach(), indexed(device))


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run `func` on the memory behind its arguments; results are on the GPU unless they go to the CPU."""
    name, mutates, view = kind_of(func)
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [x for x in leaves if isinstance(x, Tensor)]
    gpus = {x.device for x in tensors if isinstance(x, FakeGPUTensor)}
    check_devices(name, tensors, gpus)
    target = kwargs.get("device")
    device = indexed(target) if is_fake_gpu(target) else next(iter(gpus))
    to_host = (target is not None and not is_fake_gpu(target)) or (
        name == "copy_" and not isinstance(args[0], FakeGPUTensor)
    )
    if to_host or name in _LOOKS or (name == "index" and any(is_mask(x) for x in args[1])):
        stage.look(name)
    memory, known = [], {}
    for x in leaves:
        memory.append(x.held if isinstance(x, FakeGPUTensor) else torch.device("cpu") if is_device(x) else x)
        if isinstance(x, FakeGPUTensor):
            known[id(x.held)] = x
    call_args, call_kwargs = tree_unflatten(memory, spec)

    def call() -> Any:
        return func(*call_args, **call_kwargs)

    if stage.capture is None:
        out = call()
    elif mutates:
        stage.capture.record(call)
        out = call_args[0] if func._schema.returns else None
    else:
        out = call()
        if not view:
            stage.capture.record(lambda: overwrite(out, call()))
    return out if to_host else tree_map(lambda x: known.get(id(x)) if id(x) in known else to_fake_gpu(x, device), out)


def kind_of(func: Any) -> tuple[str, bool, bool]:
    """The name of torch's operation, whether it writes into an argument, and whether its result is a view of one."""
    if isinstance(func, torch._ops.OpOverload):
        return func._opname, func._schema.is_mutable, func.is_view
    return func.__name__, False, False


def is_mask(x: Any) -> bool:
    return isinstance(x, FakeGPUTensor) and x.dtype in (torch.bool, torch.uint8)


def is_device(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "cuda"


def overwrite(old: Any, new: Any) -> None:
    """A replay's results go where the capture's went."""
    for before, now in zip(tree_flatten(old)[0], tree_flatten(new)[0], strict=True):
        if isinstance(before, Tensor) and before.data_ptr() != now.data_ptr():
            before.copy_(now)


def check_devices(name: str, tensors: list[Tensor], gpus: set[torch.device]) -> None:
    """One device for all, but for numbers (0-D tensors of the CPU), and for what copies or indexes."""
    if name in _CROSSING:
        return
    others = {x.device for x in tensors if not isinstance(x, FakeGPUTensor) and x.dim()}
    if len(gpus | others) > 1:
        found = ", ".join(sorted(map(str, gpus | others)))
        raise RuntimeError(f"Expected all tensors to be on the same device, but {name} found {found}")


def indexing(x: FakeGPUTensor, place: Any, *value: Any) -> Any:
    """`x[place]`, or `x[place] = value`: torch's own way asks for the GPU before it dispatches."""
    leaves, spec = tree_flatten(place)
    if any(is_mask(leaf) for leaf in leaves):
        stage.look("index by a mask")
    at = tree_unflatten([getattr(leaf, "held", leaf) for leaf in leaves], spec)
    if value:
        new = getattr(value[0], "held", value[0])
        return stage.run(lambda: x.held.__setitem__(at, new))
    out = x.held[at]
    if stage.capture is not None and any(isinstance(leaf, Tensor) for leaf in leaves):
        stage.capture.record(lambda: overwrite(out, x.held[at]))
    return to_fake_gpu(out, x.device)


class Factories(TorchFunctionMode):
    """Functions that are told a GPU's device give tensors there; the device may come from `with torch.device(...)`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if hasattr(kwargs.get("generator"), "draws"):
            kwargs["generator"].draws(stage.capture)
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], FakeGPUTensor):
            return indexing(*args)
        if name in _READS and isinstance(args[0], FakeGPUTensor):
            stage.look(name)
            return func(args[0].held, *args[1:], **kwargs)
        if name == "copy_" and any(isinstance(x, FakeGPUTensor) for x in args):
            return torch.ops.aten.copy_.default(*args, **kwargs)
        if name == "cuda" and isinstance(args[0], Tensor):
            return self._moved(args[0], args[1] if len(args) > 1 else kwargs.get("device", "cuda"), {})
        if name == "to" and isinstance(args[0], Tensor):
            return self._to(func, args, kwargs)
        if func is torch.device and isinstance(args[0], int):
            return torch.device("cuda", args[0])
        device = kwargs.get("device")
        if not is_fake_gpu(device) or any(isinstance(x, FakeGPUTensor) for x in args):
            return self._or_on_memory(func, args, kwargs)
        return to_fake_gpu(func(*args, **kwargs | {"device": "cpu"}), device)

    def _or_on_memory(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Some functions allocate inside of torch, or ask for the GPU, before anything dispatches."""
        try:
            return func(*args, **kwargs)
        except (NotImplementedError, RuntimeError) as error:
            gpus = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, FakeGPUTensor)]
            if not gpus or not str(error).startswith(_NO_GPU):
                raise
        return dispatch(func, args, kwargs)

    def _to(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """`x.to(...)`, whichever way a GPU is said."""
        others = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, FakeGPUTensor)]
        named = [x for x in (*args[1:], kwargs.get("device")) if isinstance(x, (str, torch.device))]
        named += [torch.device("cuda", x) for x in args[1:] if isinstance(x, int) and not isinstance(x, bool)]
        device = others[0].device if others else named[0] if named else None
        if not is_fake_gpu(device):
            return func(*args, **kwargs)
        dtypes = [x for x in (*args[1:], kwargs.get("dtype")) if isinstance(x, torch.dtype)]
        dtypes += [x.dtype for x in others]
        if args[0].device == indexed(device):
            return args[0].to(dtypes[0]) if dtypes else args[0]
        return self._moved(args[0], device, {"dtype": dtypes[0]} if dtypes else {})

    def _moved(self, x: Tensor, device: Any, dtype: dict[str, torch.dtype]) -> Tensor:
        x_held = x.held if isinstance(x, FakeGPUTensor) else x.detach()
        moved = to_fake_gpu(x_held.to(device="cpu", copy=True, **dtype), device)
        return nn.Parameter(moved, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else moved
