"""Copies and control flow are compared with loops; invalid accesses, races and missing waits are faults.

Results of loads, stores, warp instructions and wgmma: test_kernels.py, in which a wrong one changes those of kernels.
"""

from typing import Any

import numpy as np
import pytest

from .copies import Descriptor
from .harness import check_fault, every_schedule, run, samples, shared_addresses
from .machine import SCHEDULES
from .memory import SHARED_BASE, Fault
from .parser import Unmodelled

pytestmark = pytest.mark.compiled

_, LATE, LOGGED = SCHEDULES


@pytest.mark.parametrize(
    ("body", "offset", "message"),
    [
        ("ld.global.b32 %d, [%a];", 4, "illegal address 0x"),
        ("ld.global.b32 %d, [%a];", 2, "misaligned address 0x.* of 4 bytes"),
        ("st.global.b32 [%a], %d;", 4, r"illegal address 0x\w+: block \(0, 0, 0\), thread 31: st.global.b32"),
        ("st.global.b32 [%a], %d;", 1, "misaligned address"),
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


def test_late_copies_complete_at_their_wait() -> None:
    memory = samples(32, 32)
    body = """cp.async.ca.shared.global [%s], [%g], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%s+128], [%g], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %a, [%s]; ld.shared.b32 %b, [%s+128]; cp.async.wait_group 0;"""
    source = (memory.ctypes.data + 4 * np.arange(32)).astype(np.uint64)
    inputs, outputs = {"%s": shared_addresses(32, 4), "%g": source}, {"%a": 32, "%b": 32}
    got = run(body, inputs, outputs, arrays=[memory], shared=256, schedule=LATE)
    assert (got["%a"] == memory).all() and (got["%b"] == 2**32 - 1).all()


ISSUE, WAIT_FOR_COPY = "cp.async.ca.shared.global [%s], [%g], 4; cp.async.commit_group;", "cp.async.wait_group 0;"
FETCH = ISSUE + WAIT_FOR_COPY
STORE, STORE_FOREIGN = "st.shared.b32 [%s], %v;", "st.shared.b32 [%o], %v;"
LOAD, SYNC = "ld.shared.b32 %w, [%o];", "bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (STORE + SYNC + LOAD, ""),
        (STORE + LOAD, "race: reads what another warp writes: ld.shared"),
        (STORE + SYNC + LOAD + STORE, "race: writes what another warp reads: st.shared"),
        (STORE + SYNC + LOAD + SYNC + STORE, ""),
        (LOAD, "reads unwritten shared memory"),
        (STORE + STORE_FOREIGN, "race: warps write different values"),
        (STORE + SYNC + STORE_FOREIGN, ""),
        ("mov.b32 %v, 5;" + STORE + STORE_FOREIGN, ""),
        (FETCH + LOAD, "race: reads"),
        (ISSUE + LOAD + WAIT_FOR_COPY, "reads where a copy is in flight"),
        (ISSUE, r"no wait for: cp\.async"),
        (STORE + SYNC + LOAD + FETCH, "race: writes what another warp reads: cp.async"),
    ],
)
def test_races_are_detected(body: str, message: str) -> None:
    """Lane i stores its own word and loads that of another warp's lane."""
    memory, addresses = samples(32, 64), shared_addresses(64, 4)
    source = (memory.ctypes.data + 4 * np.arange(64)).astype(np.uint64)
    inputs = {"%s": addresses, "%o": np.roll(addresses, 32), "%v": samples(32, 64), "%g": source}
    check_fault(message, body, inputs, {"%w": 32}, threads=64, arrays=[memory], shared=256, schedule=LOGGED)


TRY = "waitLoop: mbarrier.try_wait.parity.shared::cta.b64 %p, [%b], %z; @!%p bra waitLoop;"
COPY = f"""mov.u32 %t, %tid.x; setp.eq.u32 %q, %t, 0; mov.b64 %m, map0; mov.u32 %z, 0;
    @%q mbarrier.init.shared::cta.b64 [%b], 1; bar.sync 0;
    @%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 256;
    @%q cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%m, {{%z, %z}}], [%b];
    {TRY}
    ld.shared.b32 %f, [%s]; bar.sync 0; @%q mbarrier.inval.shared::cta.b64 [%b];"""


@pytest.mark.parametrize(
    ("old", "new", "messages"),
    [
        ("", "", ""),
        ("[%b], 256;", "[%b], 128;", "waits for -128 bytes|deadlock|a phase is incomplete"),
        ("[%b], 256;", "[%b], 512;", "deadlock"),
        ("@%q mbarrier.init.shared::cta.b64 [%b], 1;", "", "no mbarrier at this address"),
        ("1; bar.sync 0;", "1;", "race|no mbarrier at this address"),
        (TRY, "", "without a wait|has no wait"),
        ("@!%p bra waitLoop;", "", "without a wait|unwritten|a phase is incomplete"),
        ("bar.sync 0; @%q mbarrier.inval", "@%q mbarrier.inval", "race|no mbarrier at|the mbarrier of a copy"),
        ("ld.shared.b32 %f, [%s];", "st.shared.b64 [%b], %m;", "writes over an mbarrier"),
        ("@%q cp.async.bulk", "@%q st.shared.b32 [%s], %t; @%q cp.async.bulk", "no fence.proxy.async"),
        ("@%q mbarrier.inval.shared::cta.b64 [%b];", "@%q mbarrier.init.shared::cta.b64 [%b], 1;", "exists already"),
        ("map0;", "4096;", "no descriptor at this address"),
    ],
)  # fmt: skip
def test_some_schedule_detects_a_faulty_tma_copy(old: str, new: str, messages: str) -> None:
    tensor = samples(16, 128).reshape(8, 16)
    descriptor = Descriptor(tensor.ctypes.data, 2, (16, 8), (32,), (16, 8), 32)
    inputs = {"%b": np.full(64, SHARED_BASE + 256, np.uint32), "%s": np.full(64, SHARED_BASE, np.uint32)}
    outputs = {"%t": 32, "%z": 32, "%q": 1, "%p": 1, "%m": 64, "%f": 32}
    assert not old or COPY.count(old) == 1
    body, faults = COPY.replace(old, new) if old else COPY, []
    options = {"threads": 64, "arrays": [tensor], "shared": 264, "descriptors": [descriptor]}
    for schedule in SCHEDULES:
        try:
            run(body, inputs, outputs, schedule=schedule, **options)
        except Fault as fault:
            faults.append(str(fault))
    assert bool(faults) == bool(messages)
    assert not messages or any(message in "\n".join(faults) for message in messages.split("|")), faults


PRODUCT = """wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%d0,%d1,%d2,%d3,%d4,%d5,%d6,%d7},
    {%a,%a,%a,%a}, %y, 0, 1, 1, 0;"""
BEGIN = "st.shared.v4.b32 [%i], {%v, %v, %v, %v}; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
OVERWRITE = "bar.sync 0; mov.b32 %w, 9; st.shared.b32 [%i], %w;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
INPUTS = {
    "%i": shared_addresses(128, 16), "%v": samples(32, 128), "%a": samples(32, 128, 1),
    "%y": np.full(128, SHARED_BASE >> 4 | 1 << 16 | 64 << 32 | 1 << 62, np.uint64),
}  # fmt: skip
OUTPUTS = {"%w": 32} | {f"%d{i}": 32 for i in range(8)}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (BEGIN + PRODUCT + COMMIT + WAIT, ""),
        (BEGIN.replace("wgmma.fence.sync.aligned;", "") + PRODUCT + COMMIT + WAIT, "no wgmma.fence before"),
        (BEGIN + PRODUCT + COMMIT, "no wait for: wgmma"),
        (BEGIN + PRODUCT + WAIT, "no wait for: wgmma"),
        (BEGIN + PRODUCT + COMMIT + "mov.b32 %a, 7;" + WAIT, "a register changed under"),
        (BEGIN + PRODUCT + COMMIT + "mov.b32 %d0, 7;" + WAIT, "the result's register was written under"),
        (BEGIN + PRODUCT + COMMIT + OVERWRITE + WAIT, "shared memory changed"),
        (BEGIN + "mov.b32 %a, 7;" + PRODUCT + COMMIT + WAIT, "no wgmma.fence after a register was written"),
        (BEGIN + PRODUCT + COMMIT + WAIT + PRODUCT + COMMIT + WAIT, "no wgmma.fence before"),
        (BEGIN.replace("fence.proxy.async.shared::cta;", "") + PRODUCT + COMMIT + WAIT, "no fence.proxy.async"),
        (BEGIN.replace("bar.sync 0;", "") + PRODUCT + COMMIT + WAIT, "race: reads what another warp writes"),
    ],
)
def test_pending_products_restrict_their_operands(body: str, message: str) -> None:
    check_fault(message, body, INPUTS, OUTPUTS, threads=128, shared=2048)


def test_results_are_undefined_until_a_wait() -> None:
    body = BEGIN + PRODUCT + COMMIT + "mov.b32 %w, %d0;" + WAIT
    inputs = {**INPUTS, "%v": np.zeros(128, np.uint32), "%a": samples(32, 128)}
    got = run(body, inputs, OUTPUTS, threads=128, shared=2048, schedule=SCHEDULES[1])
    assert (got["%w"] == 2**32 - 1).all() and (got["%d0"] != 2**32 - 1).all()
