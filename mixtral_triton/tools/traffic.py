"""What interpreted kernels load, store and multiply: the counted side of "bytes touched / compulsory bytes".

Counted as a GPU's memory would see it without a cache: lanes that are masked off move nothing, an address that several
lanes of one load name moves once, and what two programs load counts twice. Descriptors (TMA) count as pointers do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..kernels import launch as door
from ..kernels.interpret import active_addresses, interpreting


@dataclass
class Argument:
    """One tensor of a launch: bytes loaded and stored, summed over the programs.

    crossed  bytes that came from L2: loaded, and once more for each further lane that names an address. So it is with
             tiles, whose copies to shared memory go by the lane; of numbers that all lanes ask for it is too many
    `lane` holds for each element, in memory order, which lane of a load or store last touched it; -1: none ever did.
    """

    buffer: torch.Tensor = field(repr=False)
    lane: np.ndarray = field(repr=False)
    loaded: int = 0
    crossed: int = 0
    stored: int = 0

    @property
    def touched(self) -> np.ndarray:
        """Which elements were loaded or stored, in memory order."""
        return self.lane >= 0

    @property
    def distinct(self) -> int:
        """Bytes loaded or stored at least once."""
        return int(self.touched.sum()) * self.buffer.element_size()

    def touch(self, addresses: np.ndarray) -> int | None:
        """Bytes at these addresses, each once; None where one of them is not of this tensor."""
        index = (addresses - np.uint64(self.buffer.data_ptr())).view(np.int64) // self.buffer.element_size()
        if index.min() < 0 or index.max() >= len(self.lane):
            return None
        lanes = np.arange(len(index), dtype=np.int32)
        self.lane[index] = lanes
        return int((self.lane[index] == lanes).sum()) * self.buffer.element_size()


@dataclass
class Kernel:
    """One launch. `arguments`: its tensors by name, without _ptr or _desc; `flops` of its tl.dot tiles as issued."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Argument] = field(default_factory=dict)
    flops: int = 0

    def touch(self, pointers: Any, mask: Any) -> tuple[Argument | None, int]:
        """The tensor that a load or store is from or to, and its bytes."""
        addresses = active_addresses(pointers, mask)
        if not len(addresses):
            return None, 0
        for argument in self.arguments.values():
            if (size := argument.touch(addresses)) is not None:
                return argument, size
        raise ValueError(f"{self.name}: a load or store reaches outside its tensor")


@dataclass
class Traffic:
    """The launches of a block, in order."""

    kernels: list[Kernel] = field(default_factory=list)

    def __getitem__(self, name: str) -> Kernel:
        """The one launch of that kernel."""
        (found,) = (kernel for kernel in self.kernels if kernel.name == name)
        return found

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    def moved(self, *names: str) -> int:
        """Bytes loaded and stored of the arguments `names` (none: of all) in all launches."""
        arguments = (item for kernel in self.kernels for item in kernel.arguments.items())
        return sum(found.loaded + found.stored for name, found in arguments if name in names or not names)


def _interpret(counted: Kernel, kernel: Any, args: dict[str, Any]) -> None:
    """`launch.interpret`, counted. Tensors get memory of their own, since views may lie across each other."""
    own, tensors = dict(args), door.tensors(args)
    short_names = {name: name.removesuffix("_ptr").removesuffix("_desc") for name in tensors}
    for name, tensor in tensors.items():
        short = short_names[name]
        if short not in counted.arguments:
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            buffer = tensor.as_strided((last + 1 if tensor.numel() else 0,), (1,)).clone()
            counted.arguments[short] = Argument(buffer, np.full(len(buffer), -1, np.int32))
        copy = counted.arguments[short].buffer.as_strided(tensor.shape, tensor.stride())
        own[name] = door.replace_base(args[name], copy)
    with interpreting() as builder, _counting(builder, counted):
        kernel[counted.grid](**own)
    for name, tensor in tensors.items():
        argument = counted.arguments[short_names[name]]
        if argument.stored:
            tensor.copy_(argument.buffer.as_strided(tensor.shape, tensor.stride()))


@contextmanager
def _counting(builder: Any, counted: Kernel) -> Iterator[None]:
    """The builder's loads, stores and dots count; a descriptor's end in the same functions."""
    load, store, dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot

    def counted_load(pointers: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        argument, size = counted.touch(pointers, mask)
        if argument is not None:
            argument.loaded += size
            argument.crossed += int(np.count_nonzero(mask.data)) * argument.buffer.element_size()
        return load(pointers, mask, *args, **kwargs)

    def counted_store(pointers: Any, value: Any, mask: Any, *args: Any, **kwargs: Any) -> Any:
        argument, size = counted.touch(pointers, mask)
        if argument is not None:
            argument.stored += size
        return store(pointers, value, mask, *args, **kwargs)

    def counted_dot(a: Any, b: Any, *args: Any) -> Any:
        counted.flops += 2 * a.data.size * b.data.shape[-1]
        return dot(a, b, *args)

    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_dot = counted_dot
    try:
        yield
    finally:
        del builder.create_masked_load, builder.create_masked_store
        builder.create_dot = dot


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Within the block, interpreted launches are counted; whatever guard there is does not see them."""
    traffic, before = Traffic(), door.interpret

    def interpret(kernel: Any, grid: tuple[int, ...], args: dict[str, Any]) -> None:
        traffic.kernels.append(Kernel(kernel.__name__, grid))
        _interpret(traffic.kernels[-1], kernel, args)

    door.interpret = interpret
    try:
        yield traffic
    finally:
        door.interpret = before
