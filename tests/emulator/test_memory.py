"""Loads, stores, shuffles and control flow of the PTX emulator, against loops; and each fault of an address."""

from __future__ import annotations

import numpy as np
import pytest

from mixtral_triton.kernels.launch import INTERPRETED

from .harness import run, samples
from .machine import SCHEDULES
from .memory import SHARED_BASE, Fault
from .parser import Unmodelled

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about a PTX emulator: run once, without the interpreter")

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: one.name)


@pytest.mark.parametrize("space", ["global", "shared"])
@pytest.mark.parametrize(("count", "width"), [(1, 16), (1, 32), (1, 64), (2, 16), (2, 32), (2, 64), (4, 16), (4, 32)])
def test_what_is_stored_is_loaded(space: str, count: int, width: int) -> None:
    """Each lane its own vector, from behind; the lanes of every third one stay out."""
    size = count * width // 8
    memory = np.zeros(64 * size, np.uint8)
    lanes = np.arange(64)
    base = memory.ctypes.data if space == "global" else SHARED_BASE
    address = (base + (63 - lanes) * size).astype(np.uint64 if space == "global" else np.uint32)
    values = {f"%v{i}": samples(width, 64, i) for i in range(count)}
    got_names = [f"%w{i}" for i in range(count)]
    vector = f"{{{', '.join(values)}}}" if count > 1 else "%v0"
    into = f"{{{', '.join(got_names)}}}" if count > 1 else "%w0"
    kind = ("v2." if count == 2 else "v4." if count == 4 else "") + f"b{width}"
    body = f"@%p st.{space}.{kind} [%a], {vector}; @!%p st.{space}.{kind} [%a+0], {vector};"
    body += f"@%p ld.{space}.{kind} {into}, [%a];"
    given = {"%a": address, "%p": lanes % 3 != 0, **values}
    got = run(body, given, dict.fromkeys(got_names, width), threads=64, arrays=[memory], shared=64 * size)
    for name, want in zip(got_names, values.values(), strict=True):
        unwritten = 2**width - 1
        assert [int(x) for x in got[name]] == [int(x) if i % 3 else unwritten for i, x in enumerate(want)]
    if space == "global":
        stored = memory.reshape(64, count, width // 8)
        for lane in range(64):
            for i, value in enumerate(values.values()):
                assert int.from_bytes(stored[63 - lane, i].tobytes(), "little") == int(value[lane])


def test_narrow_loads_widen() -> None:
    memory = samples(32, 32)
    address = memory.ctypes.data + 4 * np.arange(32, dtype=np.uint64)
    body = """ld.global.s32 %s, [%a]; ld.global.b8 %b, [%a+3]; st.shared.v2.b8 [%i], {%b, %b}; ld.shared.b16 %h, [%i];
        ld.shared.b8 %c, [%i+1];"""
    given = {"%a": address, "%i": (SHARED_BASE + 2 * np.arange(32)).astype(np.uint32)}
    got = run(body, given, {"%s": 64, "%b": 16, "%h": 16, "%c": 16}, arrays=[memory], shared=64)
    for lane in range(32):
        word = int(memory[lane])
        assert int(got["%s"][lane]) == (word | 0xFFFFFFFF00000000 if word >> 31 else word)
        assert int(got["%b"][lane]) == int(got["%c"][lane]) == word >> 24
        assert int(got["%h"][lane]) == (word >> 24) * 257


def test_several_arrays_in_one_load() -> None:
    first, second = np.arange(32, dtype=np.uint32), np.arange(100, 132, dtype=np.uint32)
    lanes = np.arange(32)
    address = (np.where(lanes % 2 == 0, first.ctypes.data, second.ctypes.data) + 4 * lanes).astype(np.uint64)
    got = run("ld.global.b32 %d, [%a];", {"%a": address}, {"%d": 32}, arrays=[first, second])["%d"]
    assert (got == np.where(lanes % 2 == 0, first, second)).all()


@pytest.mark.parametrize(
    ("body", "offset", "said"),
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
def test_an_address_of_nothing(body: str, offset: int, said: str) -> None:
    memory = np.zeros(32, np.uint32)
    address = (memory.ctypes.data + 4 * np.arange(32) + offset).astype(np.uint64)
    given = {"%a": address, "%s": (SHARED_BASE + 4 * np.arange(32)).astype(np.uint32)}
    with pytest.raises(Fault, match=said):
        run(body, given, {"%d": 32}, arrays=[memory], shared=128)


@pytest.mark.parametrize(("address", "said"), [(SHARED_BASE - 4, "illegal"), (SHARED_BASE + 64, "illegal"),
                                               (SHARED_BASE + 2, "misaligned"), (SHARED_BASE + 60, "")])  # fmt: skip
def test_shared_memory_has_an_end(address: int, said: str) -> None:
    given = {"%a": np.full(32, address, np.uint32), "%v": np.zeros(32, np.uint32)}
    if said:
        with pytest.raises(Fault, match=f"{said} shared address"):
            run("st.shared.b32 [%a], %v;", given, shared=64)
    else:
        run("st.shared.b32 [%a], %v;", given, shared=64)


@pytest.mark.parametrize("c", [31, 31 | 16 << 8, 31 | 24 << 8])
def test_shuffles_lane_by_lane(c: int) -> None:
    x = samples(32, 32)
    by = np.arange(32, dtype=np.uint32) * 7 % 5
    segment, clamp = c >> 8, c & 31
    for name in ("up", "down", "bfly", "idx"):
        bound = segment << 8 if name == "up" else c
        body = f"shfl.sync.{name}.b32 %d|%p, %x, %b, {bound}, -1;"
        got = run(body, {"%x": x, "%b": by}, {"%d": 32, "%p": 1})
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
    wanted = {"%s": 32, "%m": 32, "%n": 32, "%u": 32, "%l": 32, "%p": 1}
    got = run(body, {"%x": x, "%all": np.full(64, 2**32 - 1, np.uint32)}, wanted, threads=64)
    for warp in range(2):
        own = [int(v) for v in x[32 * warp : 32 * warp + 32]]
        signed = [v - 2**32 if v >> 31 else v for v in own]
        want = {"%s": sum(own), "%m": min(signed), "%n": max(signed), "%u": max(own)}
        for name, value in want.items():
            assert (got[name][32 * warp : 32 * warp + 32] == value % 2**32).all()
    assert (got["%p"] == (np.arange(64) % 32 == 0)).all() and (got["%l"] == 0).all()


def test_a_part_of_a_warp_is_refused() -> None:
    with pytest.raises(Unmodelled, match="part of a warp"):
        run("redux.sync.add.s32 %d, %x, 255;", {"%x": samples(32, 32)}, {"%d": 32})
    body = "setp.lt.u32 %p, %x, 7; @%p bra there; redux.sync.add.s32 %d, %x, -1; there:"
    with pytest.raises(Fault, match="part of the warp"):
        run(body, {"%x": np.arange(32, dtype=np.uint32)}, {"%d": 32, "%p": 1})


@every_schedule
def test_lanes_go_their_own_way_and_come_together(schedule: object) -> None:
    """Collatz: every lane leaves the loop at another turn; one value each is exchanged after it."""
    start = np.arange(1, 129, dtype=np.uint32)
    body = """mov.u32 %n, 0; setp.eq.u32 %p, %x, 1; @%p bra out;
        again: and.b32 %o, %x, 1; setp.ne.u32 %q, %o, 0; @%q bra odd; shr.u32 %x, %x, 1; bra.uni next;
        odd: mad.lo.u32 %x, %x, 3, 1;
        next: add.u32 %n, %n, 1; setp.ne.u32 %p, %x, 1; @%p bra again;
        out: shfl.sync.bfly.b32 %m, %n, 1, 31, -1;"""
    wanted = {"%n": 32, "%o": 32, "%m": 32, "%p": 1, "%q": 1}
    got = run(body, {"%x": start}, wanted, threads=64, blocks=2, schedule=schedule)  # type: ignore[arg-type]
    for lane, x in enumerate(start.tolist()):
        steps = 0
        while x != 1:
            x, steps = 3 * x + 1 if x % 2 else x // 2, steps + 1
        assert got["%n"][lane] == steps and got["%m"][lane ^ 1] == steps


@every_schedule
def test_barriers_in_loops_of_different_length(schedule: object) -> None:
    """Blocks that turn more or less often; each turn a value goes to the next warp, by two barriers."""
    turns = np.repeat(np.arange(1, 6, dtype=np.uint32), 96)
    lanes = np.tile(np.arange(96), 5)
    given = {
        "%k": turns, "%x": samples(32, 480), "%a": (SHARED_BASE + 4 * lanes).astype(np.uint32),
        "%b": (SHARED_BASE + 4 * ((lanes + 32) % 96)).astype(np.uint32),
    }  # fmt: skip
    body = """again: st.shared.b32 [%a], %x; bar.sync 0; ld.shared.b32 %x, [%b]; bar.sync 0;
        sub.u32 %k, %k, 1; setp.ne.u32 %p, %k, 0; @%p bra again;"""
    got = run(body, given, {"%p": 1}, threads=96, blocks=5, shared=384, schedule=schedule)["%x"]  # type: ignore[arg-type]
    for block in range(5):
        want = np.roll(given["%x"][96 * block : 96 * block + 96], -32 * (block + 1))
        assert (got[96 * block : 96 * block + 96] == want).all()


def test_a_barrier_that_some_never_reach() -> None:
    body = "mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 32; @%p bra end; bra.uni wait; wait: bar.sync 0; bar.sync 0; end:"
    run(body, {}, {"%t": 32, "%p": 1}, threads=64)  # those that are done are not waited for
    stuck = """mov.u32 %t, %tid.x; setp.lt.u32 %p, %t, 32; mov.u32 %m, 1024; mov.u32 %z, 0; setp.eq.u32 %q, %t, 0;
        @%q mbarrier.init.shared::cta.b64 [%m], 1; bar.sync 0; @%p bra there;
        wait: mbarrier.try_wait.parity.shared::cta.b64 %d, [%m], %z; @!%d bra wait; there: bar.sync 0;"""
    for schedule in SCHEDULES:
        with pytest.raises(Fault, match=r"deadlock: .*thread 32 of unit: mbarrier\.try_wait"):
            wanted = {"%t": 32, "%p": 1, "%m": 32, "%z": 32, "%q": 1, "%d": 1}
            run(stuck, {}, wanted, threads=64, shared=8, schedule=schedule)
