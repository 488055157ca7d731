"""What tools need to know of a kernel beside its code: declared where the kernel is defined, read by its name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

Operands = Mapping[str, Tensor]  # of a launch, by `operand_name`


class Product(NamedTuple):
    """Rows times the rows of a weight, or of the weights of experts."""

    x: str  # operands
    weight: str
    halves: int  # parts of the weight's rows that a program takes
    depth: str  # the constexpr with the depth of the sum


@dataclass(frozen=True)
class KernelFacts:
    """What is known of a kernel.

    work  a Product; "attention"; or moved_bytes(operands, programs) of a kernel that streams. None: it streams each
          operand once
    full  tiles that must cover a whole dimension: a smaller one is wrong, a larger one idle
    """

    work: Product | Literal["attention"] | Callable[[Operands, int], float] | None = None
    full: frozenset[str] = frozenset()


_facts: dict[str, KernelFacts] = {}


def kernel_facts(*full: str, work: Any = None) -> Callable[[Any], Any]:
    """Declare the facts of the kernel below."""

    def declare(kernel: Any) -> Any:
        _facts[kernel.__name__] = KernelFacts(work, frozenset(full))
        return kernel

    return declare


def facts_of(kernel: str) -> KernelFacts:
    """Return the facts of a kernel by its name: the default ones where none were declared."""
    return _facts.get(kernel, KernelFacts())
