"""A launch in the PTX emulator: arguments packed as by Triton's launcher; all schedules must leave the same bits."""

import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..support.stub.adapter import memories_of
from ..support.stub.driver import SWIZZLE_SPANS, with_kinds, with_memory
from .copies import Descriptor
from .machine import SCHEDULES, Code, Schedule, execute
from .memory import Fault, Global, Params, Span
from .parser import Unmodelled, parse
from .races import Writes, changed_bytes
from .values import Array

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
FORMATS |= {"u64": "Q", "fp32": "f", "f32": "f"}


@lru_cache(maxsize=512)
def compiled(ptx: str) -> Code:
    return Code(parse(ptx))


def span_of(name: str, tensor: torch.Tensor) -> Span:
    """Return the memory from the tensor's first element to its last."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(name, tensor.data_ptr(), extent * tensor.element_size() if tensor.numel() else 0)


def tensor_map(descriptor: TensorDescriptor, meta: Mapping[str, Any] | None) -> Descriptor:
    size = descriptor.base.element_size()
    tf32 = getattr(descriptor, "round_f32_to_tf32", False)
    if meta is None or descriptor.padding != "zero" or meta.get("is_im2col") or meta["fp4_padded"] or tf32:
        raise Unmodelled(f"tensor map of {meta}")
    sizes, box = tuple(descriptor.shape[::-1]), tuple(meta["block_size"][::-1])
    strides = tuple(stride * size for stride in descriptor.strides[-2::-1])
    return Descriptor(descriptor.base.data_ptr(), size, sizes, strides, box, SWIZZLE_SPANS[meta["swizzle"]] or 0)


class Launch:
    """A launch's parameters, as packed by Triton's launcher, and the memory that they point to; it can run repeatedly.

    Triton's launcher omits constants and appends two addresses of scratch memory.
    """

    def __init__(self, code: Code, launched: Any, args: Mapping[str, Any]) -> None:
        self.code, self.launched = code, launched
        values, spans, maps = list[bytes](), list[Span](), dict[int, Descriptor]()  # maps: by number of the parameter
        metadata = launched.launcher.metadata
        metas = iter(getattr(metadata, "tensordesc_meta", None) or ())
        signature = launched.launcher.signature
        held = {path: value for _, path, _, value in with_kinds(args, signature, launched.args.values())}
        for _, name, kind, value in with_kinds(args, signature, args.values()):
            if isinstance(value, TensorDescriptor):
                spans.append(span_of(name, value.base))
                maps[len(values)] = tensor_map(value, next(metas, None))
                values.append(bytes(128))
                values += [struct.pack("<i", n) for n in value.shape]
                values += [struct.pack("<q", n) for n in value.strides]
            elif kind.startswith("*"):
                spans.append(span_of(name, value))
                memories = zip(("resident", "host"), memories_of(held[name]), strict=False)
                spans += [span_of(f"{name} {memory}", with_memory(tensor)) for memory, tensor in memories]
                values.append(struct.pack("<Q", value.data_ptr()))
            elif kind in FORMATS:
                values.append(struct.pack("<" + FORMATS[kind], value))
            elif kind != "constexpr":
                raise Unmodelled(f"argument of type {kind}: {name}")
        if metadata.global_scratch_size or metadata.profile_scratch_size:
            raise Unmodelled("scratch memory")
        values += [bytes(8), bytes(8)]
        declared = code.program.params
        sizes, expected = [len(value) for value in values], [param.size for param in declared]
        if sizes != expected:
            raise Unmodelled(f"parameters of {expected} bytes, packed {sizes}")
        self.params = Params(declared, values, {declared[at].name: each for at, each in maps.items()})
        self.memory = Global(spans)
        self.before = self.memory.save()

    def run(self, code: Code, schedule: Schedule) -> list[Array]:
        """Return the memory after a run that starts with the memory before the launch."""
        self.memory.restore(self.before)
        execute(code, schedule, self.launched.grid, self.memory, self.params, self.launched.shared)
        return self.memory.save()


@dataclass
class Executor:
    """Executes launches. `codes`: by kernel, the code of its variants; `build`: a function from PTX to code."""

    schedules: Sequence[Schedule] = SCHEDULES
    codes: dict[str, list[Code]] = field(default_factory=dict)
    build: Callable[[str], Code] = compiled
    loaded: Counter[str] = field(default_factory=Counter)  # bytes by argument, of all launches
    pending: Writes = field(default_factory=list)  # by launches that the next one may overlap

    def __call__(self, launched: Any, args: Mapping[str, Any]) -> None:
        code = self.build(launched.ptx)
        variants = self.codes.setdefault(launched.kernel, [])
        if not any(code is variant for variant in variants):
            variants.append(code)
        launch = Launch(code, launched, args)
        memory = launch.memory
        if launched.launcher.metadata.launch_pdl:
            memory.pending = self.pending
        else:
            self.pending = []
        first = None
        for schedule in self.schedules:
            try:
                result = launch.run(code, schedule)
                first = first or result
                for region, old, new in zip(memory.regions, first, result, strict=True):
                    if not np.array_equal(old, new):
                        at = int(np.flatnonzero(old != new)[0])
                        raise Fault(f"{region.name}, byte {at} differs from the first schedule")
            except Fault as fault:
                raise Fault(f"{launched.kernel} ({schedule.name}): {fault}") from None
        self.loaded.update({region.name: region.loaded for region in memory.regions})
        changed = changed_bytes(memory.regions, launch.before)
        self.pending = self.pending + changed if memory.released_early else changed
