"""A launch on the PTX emulator: arguments as Triton's launcher packs them, three schedules that have to agree.

The tensors are this process's memory. What a schedule leaves there has to be, bit for bit, what the others leave.
"""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from ..support.stub.driver import SWIZZLE_SPANS
from .early import Written, changed
from .machine import SCHEDULES, Code, Schedule, execute
from .memory import Fault, Global, Params, Span
from .text import Param, Unmodelled, read
from .tma import Descriptor

FORMATS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "u8": "B", "u16": "H", "u32": "I"}
FORMATS |= {"u64": "Q", "fp32": "f", "f32": "f"}


@lru_cache(maxsize=512)
def compiled(ptx: str) -> Code:
    return Code(read(ptx), hashlib.sha256(ptx.encode()).hexdigest()[:12])


def span(name: str, tensor: torch.Tensor) -> Span:
    """From its first element to its last."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(name, tensor.data_ptr(), extent * tensor.element_size() if tensor.numel() else 0)


def tensor_map(descriptor: TensorDescriptor, meta: Mapping[str, Any]) -> Descriptor:
    size, strides = descriptor.base.element_size(), list(descriptor.strides)
    tf32 = getattr(descriptor, "round_f32_to_tf32", False)
    if descriptor.padding != "zero" or meta.get("is_im2col") or meta["fp4_padded"] or tf32:
        raise Unmodelled(f"a tensor map of {meta}")
    return Descriptor(
        descriptor.base.data_ptr(),
        size,
        tuple(reversed(descriptor.shape)),
        tuple(stride * size for stride in reversed(strides[:-1])),
        tuple(reversed(meta["block_size"])),
        SWIZZLE_SPANS[meta["swizzle"]] or 0,
    )


@dataclass
class Packed:
    """Arguments: the bytes of each parameter, the memory they lead to, and tensor maps by parameter."""

    values: list[bytes] = field(default_factory=list)
    spans: list[Span] = field(default_factory=list)
    maps: dict[int, Descriptor] = field(default_factory=dict)

    def add(self, name: str, kind: str, value: Any, metas: Iterator[Mapping[str, Any]] | None) -> None:
        if isinstance(value, TensorDescriptor):
            self.spans.append(span(name, value.base))
            if metas is None:
                raise Unmodelled(f"a descriptor without TMA: {name}")
            self.maps[len(self.values)] = tensor_map(value, next(metas))
            self.values.append(bytes(128))
            self.values += [struct.pack("<i", n) for n in value.shape]
            self.values += [struct.pack("<q", n) for n in value.strides]
        elif kind.startswith("*"):
            self.spans.append(span(name, value))
            self.values.append(struct.pack("<Q", value.data_ptr()))
        elif kind in FORMATS:
            self.values.append(struct.pack("<" + FORMATS[kind], value))
        else:
            raise Unmodelled(f"an argument of type {kind}: {name}")


def pack(launcher: Any, args: Mapping[str, Any]) -> Packed:
    """As Triton's launcher does: constants are absent, at the end stand two addresses of scratch memory."""
    metadata, packed = launcher.metadata, Packed()
    found = getattr(metadata, "tensordesc_meta", None)
    metas = iter(found) if found else None
    for (name, value), kind in zip(args.items(), launcher.signature, strict=True):
        if kind != "constexpr":
            packed.add(name, kind, value, metas)
    for kind in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, kind):
            raise Unmodelled(f"{kind} of {getattr(metadata, kind)} bytes")
        packed.values.append(bytes(8))
    return packed


def check_params(params: Sequence[Param], packed: Packed) -> None:
    sizes = [(param.size, len(value)) for param, value in zip(params, packed.values, strict=False)]
    if len(params) != len(packed.values) or any(want != got for want, got in sizes):
        raise Unmodelled(f"parameters of {[one.size for one in params]} bytes, packed {list(map(len, packed.values))}")


@dataclass
class Executor:
    """Runs launches. `codes`: by kernel, what it ran, with the instructions that ran; `launches`: how often.

    `build`: PTX -> what is executed. `fenced_copies`: what cp.async brought needs a fence before wgmma reads it.
    """

    schedules: Sequence[Schedule] = SCHEDULES
    codes: dict[str, list[Code]] = field(default_factory=dict)
    launches: Counter[str] = field(default_factory=Counter)
    build: Callable[[str], Code] = compiled
    fenced_copies: bool = True
    unsettled: Written = field(default_factory=list)  # by launches that the next one may overlap

    def __call__(self, launched: Any, args: Mapping[str, Any]) -> None:
        code = self.build(launched.ptx)
        known = self.codes.setdefault(launched.kernel, [])
        if not any(code is one for one in known):
            known.append(code)
        self.launches[launched.kernel] += 1
        self.run(code, launched, args)

    def run(self, code: Code, launched: Any, args: Mapping[str, Any]) -> None:
        packed = pack(launched.launcher, args)
        check_params(code.program.params, packed)
        params = Params(code.program.params, packed.values)
        params.descriptors = {code.program.params[at].name: one for at, one in packed.maps.items()}
        memory = Global(packed.spans)
        if launched.launcher.metadata.launch_pdl:
            memory.unsettled = self.unsettled
        else:
            self.unsettled = []
        before, first = memory.save(), None
        for schedule in self.schedules:
            if first is not None:
                memory.restore(before)
            try:
                execute(code, schedule, launched.grid, memory, params, launched.shared, self.fenced_copies)
            except Fault as fault:
                raise Fault(f"{launched.kernel} ({schedule.name}): {fault}") from None
            if len(self.schedules) > 1:
                first = self._compare(launched.kernel, schedule, memory, first)
        self.unsettled += changed(memory.regions, before)

    def _compare(self, kernel: str, schedule: Schedule, memory: Global, first: Any) -> Any:
        now = memory.save()
        for region, old, new in zip(memory.regions, first or now, now, strict=True):
            if not np.array_equal(old, new):
                at = int(np.flatnonzero(old != new)[0])
                raise Fault(f"{kernel}: {region.name}, byte {at}: {schedule.name}: not the first schedule's bits")
        return first or now
