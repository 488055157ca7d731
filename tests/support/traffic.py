"""Count what interpreted kernels load, store and multiply, for "bytes touched / compulsory bytes".

Counted as a GPU's memory would see it without a cache: masked lanes move nothing, an address that several lanes of one
load name moves once, and what two programs load counts twice. Descriptors (TMA) count as pointers do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from mixtral_triton.kernels.launching import launch as launching
from mixtral_triton.kernels.launching.interpret import interpreting
from tests.support.calls import find_weight, memory_of, operand_name, replace_tensors, tensors_of_launch


def active_addresses(pointers: Any, mask: Any) -> np.ndarray:
    """The addresses that an interpreted load or store touches: those of unmasked lanes."""
    return pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]


@dataclass
class Argument:
    """One tensor of a launch: bytes loaded and stored, summed over the programs.

    crossed  bytes from L2: loaded, and once more for each further lane that names an address. This holds for tiles,
             which are copied to shared memory by the lane; for numbers that all lanes load it is too many
    touched  which elements were loaded or stored, in memory order
    """

    buffer: torch.Tensor = field(repr=False)
    touched: np.ndarray = field(repr=False)
    loaded: int = 0
    crossed: int = 0
    stored: int = 0

    @property
    def distinct(self) -> int:
        """Bytes loaded or stored at least once."""
        return int(self.touched.sum()) * self.buffer.element_size()

    def touch(self, addresses: np.ndarray) -> int | None:
        """Bytes at these addresses, each once; None where one of them is not of this tensor."""
        index = (addresses - np.uint64(self.buffer.data_ptr())).view(np.int64) // self.buffer.element_size()
        if index.min() < 0 or index.max() >= len(self.touched):
            return None
        self.touched[index] = True
        return len(np.unique(index)) * self.buffer.element_size()


@dataclass
class Kernel:
    """One launch. `arguments`: its tensors by operand, of an offloaded weight also its memories, as "down resident" and
    "down host"; `flops` of its tl.dot tiles as issued."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Argument] = field(default_factory=dict)
    flops: int = 0

    def touch(self, pointers: Any, mask: Any, stores: bool) -> None:
        """Count a load or store of the interpreter."""
        addresses = active_addresses(pointers, mask)
        if not len(addresses):
            return
        for argument in self.arguments.values():
            if (size := argument.touch(addresses)) is not None:
                argument.stored += size * stores
                argument.loaded += size * (not stores)
                lanes = 0 if stores else int(np.count_nonzero(mask.data))
                argument.crossed += lanes * argument.buffer.element_size()
                return
        raise ValueError(f"{self.name}: a load or store reaches outside its tensor")


@dataclass
class Traffic:
    """The launches of a block, in order."""

    kernels: list[Kernel] = field(default_factory=list)

    def __getitem__(self, name: str) -> Kernel:
        """Return the only launch of that kernel."""
        (found,) = (kernel for kernel in self.kernels if kernel.name == name)
        return found

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    def moved(self, *names: str) -> int:
        """Return bytes loaded and stored of the arguments `names` (none: of all) in all launches."""
        arguments = (item for kernel in self.kernels for item in kernel.arguments.items())
        return sum(found.loaded + found.stored for name, found in arguments if name in names or not names)


def _interpret(counted: Kernel, kernel: Any, args: dict[str, Any]) -> None:
    """Run `launch.interpret` and count. Tensors get memory of their own, since views may overlap."""
    copies, tensors = dict[str, torch.Tensor](), tensors_of_launch(args)
    short = {name: operand_name(name) for name in tensors}
    for name, tensor in tensors.items():
        if short[name] not in counted.arguments:
            buffer = memory_of(tensor).clone()
            counted.arguments[short[name]] = Argument(buffer, np.zeros(len(buffer), bool))
        copies[name] = counted.arguments[short[name]].buffer.as_strided(tensor.shape, tensor.stride())
        if (weight := find_weight(tensor)) is not None:
            for memory, rows in (("resident", weight.resident.flatten()), ("host", weight.host.flatten())):
                counted.arguments[f"{short[name]} {memory}"] = Argument(rows, np.zeros(len(rows), bool))

    def counting(function: Any, count: Any) -> Any:
        return lambda *args, **kwargs: (count(*args), function(*args, **kwargs))[1]

    def count_dot(a: Any, b: Any, *rest: Any) -> None:
        counted.flops += 2 * a.data.size * b.data.shape[-1]

    with interpreting() as builder:
        counts = {  # a descriptor's loads and stores end in these functions, too
            "create_masked_load": lambda pointers, mask, *rest: counted.touch(pointers, mask, stores=False),
            "create_masked_store": lambda pointers, value, mask, *rest: counted.touch(pointers, mask, stores=True),
            "create_dot": count_dot,
        }
        with patch.multiple(
            builder, **{name: counting(getattr(builder, name), count) for name, count in counts.items()}
        ):
            kernel[counted.grid](**replace_tensors(args, copies))
    for name, tensor in tensors.items():  # not an offloaded weight's rows: kernels only read these
        argument = counted.arguments[short[name]]
        if argument.stored:
            tensor.copy_(argument.buffer.as_strided(tensor.shape, tensor.stride()))


@contextmanager
def count_traffic() -> Iterator[Traffic]:
    """Count interpreted launches within the block, which run without the tests' guard."""
    traffic = Traffic()

    def interpret(kernel: Any, grid: tuple[int, ...], args: dict[str, Any]) -> None:
        traffic.kernels.append(Kernel(kernel.__name__, grid))
        _interpret(traffic.kernels[-1], kernel, args)

    with patch.object(launching, "interpret", interpret):
        yield traffic
