"""cp.async, mbarriers and TMA; and what the race detector of shared memory detects."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from .copies import Descriptor
from .harness import check_fault, compiled_only, every_schedule, run, samples, shared_addresses
from .machine import SCHEDULES
from .memory import SHARED_BASE, Fault

pytestmark = compiled_only

AT_ONCE, LATE, LOGGED = SCHEDULES


@every_schedule
@pytest.mark.parametrize("size", [4, 8, 16])
def test_groups_of_copies(size: int, schedule: Any) -> None:
    """Three groups, of which the youngest may be pending; copies of no bytes write zeros and ignore their address."""
    memory, lanes = samples(32, 3 * 32 * size // 4), np.arange(32)
    masked = lanes % 4 == 3
    source = np.where(masked, 0, memory.ctypes.data + size * lanes).astype(np.uint64)
    body = ""
    for i in range(3):
        body += f"cp.async.{'ca' if size < 16 else 'cg'}.shared.global [%s+{32 * size * i}], [%g], {size}, %n;"
        body += f"cp.async.commit_group; add.u64 %g, %g, {32 * size};"
    body += f"cp.async.wait_group 1; ld.shared.b32 %a, [%s]; ld.shared.b32 %b, [%s+{32 * size}];"
    body += f"cp.async.wait_group 0; ld.shared.b32 %c, [%s+{64 * size}];"
    inputs = {"%s": shared_addresses(32, size), "%g": source, "%n": np.where(masked, 0, size).astype(np.uint32)}
    got = run(body, inputs, {"%a": 32, "%b": 32, "%c": 32}, arrays=[memory], shared=96 * size, schedule=schedule)
    for i, name in enumerate(("%a", "%b", "%c")):
        assert (got[name] == np.where(masked, 0, memory[(32 * i + lanes) * size // 4])).all()


def test_late_copies_complete_at_their_wait() -> None:
    memory = samples(32, 32)
    body = """cp.async.ca.shared.global [%s], [%g], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%s+128], [%g], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %a, [%s]; ld.shared.b32 %b, [%s+128]; cp.async.wait_group 0;"""
    source = (memory.ctypes.data + 4 * np.arange(32)).astype(np.uint64)
    inputs, outputs = {"%s": shared_addresses(32, 4), "%g": source}, {"%a": 32, "%b": 32}
    got = run(body, inputs, outputs, arrays=[memory], shared=256, schedule=LATE)
    assert (got["%a"] == memory).all() and (got["%b"] == 2**32 - 1).all()
    in_flight = "reads where a copy is in flight"
    check_fault(in_flight, body, inputs, outputs, arrays=[memory], shared=256, schedule=LOGGED)
    body = body.replace("cp.async.wait_group 0;", "")
    check_fault(r"no wait for: cp\.async", body, inputs, outputs, arrays=[memory], shared=256, schedule=AT_ONCE)


FETCH = "cp.async.ca.shared.global [%s], [%g], 4; cp.async.commit_group; cp.async.wait_group 0;"
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
        (STORE + SYNC + LOAD + FETCH, "race: writes what another warp reads: cp.async"),
    ],
)
def test_races_are_detected(body: str, message: str) -> None:
    """Lane i stores its own word and loads that of another warp's lane."""
    memory, addresses = samples(32, 64), shared_addresses(64, 4)
    source = (memory.ctypes.data + 4 * np.arange(64)).astype(np.uint64)
    inputs = {"%s": addresses, "%o": np.roll(addresses, 32), "%v": samples(32, 64), "%g": source}
    check_fault(message, body, inputs, {"%w": 32}, threads=64, arrays=[memory], shared=256, schedule=LOGGED)


def test_warps_may_store_equal_values() -> None:
    """Of one warp's different values at one address the last lane's stays; it must equal what other warps leave."""
    inputs = {"%s": np.full(64, SHARED_BASE, np.uint32), "%v": np.tile(np.arange(32, dtype=np.uint32), 2)}
    got = run(STORE + SYNC + "ld.shared.b32 %w, [%s];", inputs, {"%w": 32}, threads=64, shared=4)
    assert (got["%w"] == 31).all()
    inputs["%v"] = np.arange(64, dtype=np.uint32)
    check_fault("race: warps write different values", STORE, inputs, threads=64, shared=4)


def box_of(tensor: np.ndarray, corner: tuple[int, ...], box: tuple[int, ...], span: int) -> np.ndarray:
    """Return the swizzled box as bytes; dimensions and coordinates innermost first."""
    out = np.full(4096, 0xFF, np.uint8).view(np.uint16)
    margin = 100  # of zeros around the tensor
    ranges = (slice(margin + c, margin + c + n) for c, n in zip(corner[::-1], box[::-1], strict=True))
    values = np.pad(tensor, margin)[tuple(ranges)].reshape(-1)
    address = SHARED_BASE + 2 * np.arange(values.size)
    address ^= (address >> 7 & span // 16 - 1) << 4 if span else 0
    out[(address - SHARED_BASE) // 2] = values
    return out.view(np.uint8)


@every_schedule
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0, 0), (8, -2, 1), (-8, 5, 0), (4, 3, 2), (32, 0, 0)])
def test_tma_copies_a_box(corner: tuple[int, int, int], span: int, schedule: Any) -> None:
    """Coordinates may be negative and unaligned; the copy is repeated in two phases of one mbarrier."""
    tensor = samples(16, 3 * 7 * 40).reshape(3, 7, 40)[:, :, :36]
    inner = span // 2 or 16
    box = (inner, 4, 2)
    descriptor = Descriptor(tensor.ctypes.data, 2, (36, 7, 3), (80, 560), box, span)
    size, threads = 2 * inner * 8, 64
    body = """mov.u32 %t, %tid.x; setp.eq.u32 %q, %t, 0; mov.b64 %m, map0; cvta.param.u64 %m, %m; mov.u32 %z, 0;
        @%q mbarrier.init.shared::cta.b64 [%b], 1; bar.sync 0;
        again: @%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], SIZE; elect.sync %e|%p, -1; and.pred %p, %p, %w;
        @%p cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%m, {%x, %y, %zz}], [%b];
        { .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%b], %z;
        @!complete bra.uni waitLoop; }
        ld.shared.v4.b32 {%f0, %f1, %f2, %f3}, [%l]; add.u32 %z, %z, 1; setp.lt.u32 %r, %z, 2;
        bar.sync 0; @%r bra again;
        @%q mbarrier.inval.shared::cta.b64 [%b];""".replace("SIZE", str(size))
    chunk = np.arange(threads) % (size // 16)
    inputs = {"%b": np.full(threads, SHARED_BASE + 4096, np.uint32), "%s": np.full(threads, SHARED_BASE, np.uint32)}
    inputs |= {"%w": np.arange(threads) < 32, "%l": (SHARED_BASE + 16 * chunk).astype(np.uint32)}
    for name, at in zip(("%x", "%y", "%zz"), corner, strict=True):
        inputs[name] = np.full(threads, at).astype(np.int32).view(np.uint32)
    outputs = dict.fromkeys(("%t", "%z", "%e", "%f0", "%f1", "%f2", "%f3"), 32) | {"%q": 1, "%p": 1, "%r": 1, "%m": 64}
    arrays = [np.lib.stride_tricks.as_strided(tensor, (3 * 7 * 40 - 4,), (2,))]
    options = {"threads": threads, "arrays": arrays, "shared": 4104, "descriptors": [descriptor]}
    got = run(body, inputs, outputs, schedule=schedule, **options)
    words = np.stack([got[f"%f{i}"] for i in range(4)], 1)
    assert (words == box_of(tensor, corner, box, span).view(np.uint32).reshape(-1, 4)[chunk]).all()


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
