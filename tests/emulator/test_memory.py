"""Loads, stores, warp instructions and control flow, compared with loops; and the faults of invalid addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .harness import check_fault, compiled_only, every_schedule, run, samples, shared_addresses
from .memory import SHARED_BASE
from .parser import Unmodelled

pytestmark = compiled_only


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("count", "width"), [(1, 16), (1, 32), (1, 64), (2, 16), (2, 32), (2, 64), (4, 16), (4, 32)])
def test_loads_return_what_stores_wrote(space: str, count: int, width: int) -> None:
    """Each lane accesses its own vector, in reverse order; every third lane is masked in the load."""
    size, lanes = count * width // 8, np.arange(64)
    memory = np.zeros(64 * size, np.uint8)
    base = memory.ctypes.data if space == "global" else SHARED_BASE
    address = (base + (63 - lanes) * size).astype(np.uint64 if space == "global" else np.uint32)
    values = {f"%v{i}": samples(width, 64, i) for i in range(count)}
    names = [f"%w{i}" for i in range(count)]
    source, target = (f"{{{', '.join(vector)}}}" if count > 1 else vector[0] for vector in (list(values), names))
    kind = f"{space}.{'' if count == 1 else f'v{count}.'}b{width}"
    body = f"@%p st.{kind} [%a], {source}; @!%p st.{kind} [%a+0], {source}; @%p ld.{kind} {target}, [%a];"
    inputs = {"%a": address, "%p": lanes % 3 != 0, **values}
    got = run(body, inputs, dict.fromkeys(names, width), threads=64, arrays=[memory], shared=64 * size)
    for name, want in zip(names, values.values(), strict=True):
        assert (got[name] == np.where(lanes % 3, want, np.array(2**width - 1, want.dtype))).all()
    if space == "global":
        assert (memory.reshape(64, -1)[::-1] == np.stack(list(values.values()), 1).view(np.uint8)).all()


def test_narrow_loads_extend() -> None:
    memory = samples(32, 32)
    address = memory.ctypes.data + 4 * np.arange(32, dtype=np.uint64)
    body = """ld.global.s32 %s, [%a]; ld.global.b8 %b, [%a+3]; st.shared.v2.b8 [%i], {%b, %b}; ld.shared.b16 %h, [%i];
        ld.shared.b8 %c, [%i+1];"""
    outputs = {"%s": 64, "%b": 16, "%h": 16, "%c": 16}
    got = run(body, {"%a": address, "%i": shared_addresses(32, 2)}, outputs, arrays=[memory], shared=64)
    assert (got["%s"].view(np.int64) == memory.view(np.int32)).all()
    assert (got["%b"] == memory >> 24).all() and (got["%c"] == memory >> 24).all()
    assert (got["%h"] == (memory >> 24) * 257).all()


def test_one_load_reads_several_arrays() -> None:
    first, second = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    lanes = np.arange(32)
    address = (np.where(lanes % 2 == 0, first.ctypes.data, second.ctypes.data) + 4 * lanes).astype(np.uint64)
    got = run("ld.global.b32 %d, [%a];", {"%a": address}, {"%d": 32}, arrays=[first, second])["%d"]
    assert (got == np.where(lanes % 2 == 0, first, second)).all()


@pytest.mark.parametrize(
    ("body", "offset", "message"),
    [
        ("ld.global.b32 %d, [%a];", 4, "illegal address 0x"),
        ("ld.global.b32 %d, [%a];", -4, "illegal address 0x"),
        ("ld.global.b32 %d, [%a];", 2, "misaligned address 0x.* of 4 bytes"),
        ("st.global.b32 [%a], %d;", 4, r"illegal address 0x\w+: block \(0, 0, 0\), thread 31: st.global.b32"),
        ("st.global.b32 [%a], %d;", 1, "misaligned address"),
        ("cp.async.ca.shared.global [%s], [%a], 4;", 4, "illegal address"),
        ("cp.async.ca.shared.global [%s], [%a], 4;", -128, "illegal address"),
    ],
)
def test_invalid_global_addresses_are_faults(body: str, offset: int, message: str) -> None:
    memory = np.zeros(32, np.uint32)
    address = (memory.ctypes.data + 4 * np.arange(32) + offset).astype(np.uint64)
    check_fault(message, body, {"%a": address, "%s": shared_addresses(32, 4)}, {"%d": 32}, arrays=[memory], shared=128)


@pytest.mark.parametrize(("offset", "message"), [(-4, "illegal"), (64, "illegal"), (2, "misaligned"), (60, "")])
def test_invalid_shared_addresses_are_faults(offset: int, message: str) -> None:
    inputs = {"%a": np.full(32, SHARED_BASE + offset, np.uint32), "%v": np.zeros(32, np.uint32)}
    check_fault(message and f"{message} shared address", "st.shared.b32 [%a], %v;", inputs, shared=64)


@pytest.mark.parametrize("c", [31, 31 | 16 << 8, 31 | 24 << 8])
def test_shuffles(c: int) -> None:
    x = samples(32, 32)
    by = np.arange(32, dtype=np.uint32) * 7 % 5
    segment, clamp = c >> 8, c & 31
    for name in ("up", "down", "bfly", "idx"):
        bound = segment << 8 if name == "up" else c
        got = run(f"shfl.sync.{name}.b32 %d|%p, %x, %b, {bound}, -1;", {"%x": x, "%b": by}, {"%d": 32, "%p": 1})
        for lane in range(32):
            b, first = int(by[lane]), lane & segment
            last = first | (clamp & ~segment)
            source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | (b & ~segment)}[name]
            inside = source >= first if name == "up" else source <= last
            assert got["%p"][lane] == inside
            assert got["%d"][lane] == x[source if inside else lane], (name, lane)


def test_reductions_and_elections() -> None:
    x = samples(32, 64)
    body = """redux.sync.add.s32 %s, %x, -1; redux.sync.min.s32 %m, %x, -1; redux.sync.max.s32 %n, %x, %all;
        redux.sync.max.u32 %u, %x, -1; elect.sync %l|%p, -1; bar.warp.sync -1;"""
    outputs = {"%s": 32, "%m": 32, "%n": 32, "%u": 32, "%l": 32, "%p": 1}
    got = run(body, {"%x": x, "%all": np.full(64, 2**32 - 1, np.uint32)}, outputs, threads=64)
    unsigned, signed = x.reshape(2, 32), x.view(np.int32).reshape(2, 32)
    want = {"%s": unsigned.sum(1, dtype=np.uint32), "%m": signed.min(1), "%n": signed.max(1), "%u": unsigned.max(1)}
    for name, values in want.items():
        assert (got[name] == np.repeat(values, 32).view(np.uint32)).all(), name
    assert (got["%p"] == (np.arange(64) % 32 == 0)).all() and (got["%l"] == 0).all()


def test_partial_warps_are_refused() -> None:
    with pytest.raises(Unmodelled, match="part of a warp"):
        run("redux.sync.add.s32 %d, %x, 255;", {"%x": samples(32, 32)}, {"%d": 32})
    body = "setp.lt.u32 %p, %x, 7; @%p bra there; redux.sync.add.s32 %d, %x, -1; there:"
    check_fault("part of the warp", body, {"%x": np.arange(32, dtype=np.uint32)}, {"%d": 32, "%p": 1})


@every_schedule
def test_divergent_lanes_reconverge(schedule: Any) -> None:
    """Collatz: lanes leave the loop in different iterations; a shuffle follows it."""
    start = np.arange(1, 129, dtype=np.uint32)
    body = """mov.u32 %n, 0; setp.eq.u32 %p, %x, 1; @%p bra out;
        again: and.b32 %o, %x, 1; setp.ne.u32 %q, %o, 0; @%q bra odd; shr.u32 %x, %x, 1; bra.uni next;
        odd: mad.lo.u32 %x, %x, 3, 1;
        next: add.u32 %n, %n, 1; setp.ne.u32 %p, %x, 1; @%p bra again;
        out: shfl.sync.bfly.b32 %m, %n, 1, 31, -1;"""
    outputs = {"%n": 32, "%o": 32, "%m": 32, "%p": 1, "%q": 1}
    got = run(body, {"%x": start}, outputs, threads=64, blocks=2, schedule=schedule)
    for lane, x in enumerate(start.tolist()):
        steps = 0
        while x != 1:
            x, steps = 3 * x + 1 if x % 2 else x // 2, steps + 1
        assert got["%n"][lane] == steps and got["%m"][lane ^ 1] == steps


@every_schedule
def test_barriers_in_loops_of_different_length(schedule: Any) -> None:
    """Each iteration passes a value to the next warp by way of two barriers; blocks differ in their iterations."""
    lanes, turns = np.tile(np.arange(96), 5), np.repeat(np.arange(1, 6, dtype=np.uint32), 96)
    addresses = shared_addresses(96, 4)
    x = samples(32, 480)
    inputs = {"%k": turns, "%x": x, "%a": addresses[lanes], "%b": addresses[(lanes + 32) % 96]}
    body = """again: st.shared.b32 [%a], %x; bar.sync 0; ld.shared.b32 %x, [%b]; bar.sync 0;
        sub.u32 %k, %k, 1; setp.ne.u32 %p, %k, 0; @%p bra again;"""
    got = run(body, inputs, {"%p": 1}, threads=96, blocks=5, shared=384, schedule=schedule)["%x"]
    want = [np.roll(values, -32 * (block + 1)) for block, values in enumerate(x.reshape(5, 96))]
    assert (got == np.concatenate(want)).all()


def test_lanes_that_are_done_do_not_block_a_barrier() -> None:
    body = "mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 32; @%p bra end; bra.uni wait; wait: bar.sync 0; bar.sync 0; end:"
    run(body, {}, {"%t": 32, "%p": 1}, threads=64)


@every_schedule
def test_a_deadlock_is_a_fault(schedule: Any) -> None:
    body = """mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 32; mov.u32 %m, 1024; mov.u32 %z, 0; setp.eq.u32 %q, %t, 0;
        @%q mbarrier.init.shared::cta.b64 [%m], 1; bar.sync 0; @%p bra there;
        wait: mbarrier.try_wait.parity.shared::cta.b64 %d, [%m], %z; @!%d bra wait; there: bar.sync 0;"""
    outputs = {"%t": 32, "%p": 1, "%m": 32, "%z": 32, "%q": 1, "%d": 1}
    message = r"deadlock: .*thread 32 of unit: mbarrier\.try_wait"
    check_fault(message, body, {}, outputs, threads=64, shared=8, schedule=schedule)
