"""cp.async, mbarriers and TMA of the PTX emulator; and what its log of shared memory sees."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mixtral_triton.kernels.launch import INTERPRETED

from .copies import Descriptor
from .harness import run, samples
from .machine import SCHEDULES
from .memory import SHARED_BASE, Fault

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about a PTX emulator: run once, without the interpreter")

every_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: one.name)
LOGGED = SCHEDULES[2]


def lanes_of(threads: int, size: int) -> np.ndarray:
    return (SHARED_BASE + size * np.arange(threads)).astype(np.uint32)


@every_schedule
@pytest.mark.parametrize("size", [4, 8, 16])
def test_groups_of_copies(size: int, schedule: object) -> None:
    """Three groups, of which the youngest may be under way; lanes with no bytes get zeros, from any address."""
    memory = samples(32, 3 * 32 * size // 4)
    lanes = np.arange(32)
    far = np.where(lanes % 4 == 3, 0, memory.ctypes.data + size * lanes).astype(np.uint64)
    kind = "ca" if size < 16 else "cg"
    body = ""
    for i in range(3):
        body += f"cp.async.{kind}.shared.global [%s+{32 * size * i}], [%g], {size}, %n; cp.async.commit_group;"
        body += f"add.u64 %g, %g, {32 * size};"
    body += f"cp.async.wait_group 1; ld.shared.b32 %a, [%s]; ld.shared.b32 %b, [%s+{32 * size}];"
    body += f"cp.async.wait_group 0; ld.shared.b32 %c, [%s+{64 * size}];"
    given = {"%s": lanes_of(32, size), "%g": far, "%n": np.where(lanes % 4 == 3, 0, size).astype(np.uint32)}
    got = run(body, given, {"%a": 32, "%b": 32, "%c": 32}, arrays=[memory], shared=96 * size, schedule=schedule)  # type: ignore[arg-type]
    for i, name in enumerate(("%a", "%b", "%c")):
        want = memory[(32 * i + lanes) * size // 4]
        assert (got[name] == np.where(lanes % 4 == 3, 0, want)).all()


def test_a_copy_comes_no_sooner_than_somebody_waits() -> None:
    memory = samples(32, 32)
    body = """cp.async.ca.shared.global [%s], [%g], 4; cp.async.commit_group;
        cp.async.ca.shared.global [%s+128], [%g], 4; cp.async.commit_group;
        cp.async.wait_group 1; ld.shared.b32 %a, [%s]; ld.shared.b32 %b, [%s+128]; cp.async.wait_group 0;"""
    given = {"%s": lanes_of(32, 4), "%g": (memory.ctypes.data + 4 * np.arange(32)).astype(np.uint64)}
    got = run(body, given, {"%a": 32, "%b": 32}, arrays=[memory], shared=256, schedule=SCHEDULES[1])
    assert (got["%a"] == memory).all() and (got["%b"] == 2**32 - 1).all()
    with pytest.raises(Fault, match="reads where a copy is in flight"):
        run(body, given, {"%a": 32, "%b": 32}, arrays=[memory], shared=256, schedule=LOGGED)
    body = body.replace("cp.async.wait_group 0;", "")
    with pytest.raises(Fault, match=r"no wait for: cp\.async"):
        run(body, given, {"%a": 32, "%b": 32}, arrays=[memory], shared=256, schedule=SCHEDULES[0])


FETCH = "cp.async.ca.shared.global [%s], [%g], 4; cp.async.commit_group; cp.async.wait_group 0;"
STORE, LOAD, SYNC = "st.shared.b32 [%s], %v;", "ld.shared.b32 %w, [%o];", "bar.sync 0;"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (STORE + SYNC + LOAD, ""),
        (STORE + LOAD, "race: reads what another warp writes: ld.shared"),
        (STORE + SYNC + LOAD + STORE, "race: writes what another warp reads: st.shared"),
        (STORE + SYNC + LOAD + SYNC + STORE, ""),
        (LOAD, "reads unwritten shared memory"),
        (STORE + "st.shared.b32 [%o], %v;", "race: warps write different values"),
        (STORE + SYNC + "st.shared.b32 [%o], %v;", ""),
        ("mov.b32 %v, 5;" + STORE + "st.shared.b32 [%o], %v;", ""),
        (FETCH + LOAD, "race: reads"),
        (STORE + SYNC + LOAD + FETCH, "race: writes what another warp reads: cp.async"),
    ],
)
def test_the_log_sees_races(body: str, said: str) -> None:
    """Lane i stores its own word and loads that of another warp's lane."""
    memory = samples(32, 64)
    given = {
        "%s": lanes_of(64, 4), "%o": np.roll(lanes_of(64, 4), 32), "%v": samples(32, 64),
        "%g": (memory.ctypes.data + 4 * np.arange(64)).astype(np.uint64),
    }  # fmt: skip
    if said:
        with pytest.raises(Fault, match=said):
            run(body, given, {"%w": 32}, threads=64, arrays=[memory], shared=256, schedule=LOGGED)
    else:
        run(body, given, {"%w": 32}, threads=64, arrays=[memory], shared=256, schedule=LOGGED)


def test_what_stays_of_a_warp_has_to_be_what_stays_of_another() -> None:
    """Lanes of one warp store different values at one place: of both the last lane's stays, and they are equal."""
    values = np.tile(np.arange(32, dtype=np.uint32), 2)
    given = {"%s": np.full(64, SHARED_BASE, np.uint32), "%v": values}
    got = run(STORE + SYNC + "ld.shared.b32 %w, [%s];", given, {"%w": 32}, threads=64, shared=4)
    assert (got["%w"] == 31).all()
    with pytest.raises(Fault, match="race: warps write different values"):
        run(STORE, {**given, "%v": np.arange(64, dtype=np.uint32)}, threads=64, shared=4)


def boxed(tensor: np.ndarray, corner: tuple[int, ...], box: tuple[int, ...], span: int) -> np.ndarray:
    """[bytes]: the box, element by element; dimensions and coordinates innermost first."""
    out = np.full(4096, 0xFF, np.uint8).view(np.uint16)
    sizes = tensor.shape[::-1]
    for number, index in enumerate(itertools.product(*(range(n) for n in reversed(box)))):
        at = tuple(c + i for c, i in zip(corner, reversed(index), strict=True))
        inside = all(0 <= a < n for a, n in zip(at, sizes, strict=True))
        address = SHARED_BASE + 2 * number
        address ^= (address >> 7 & span // 16 - 1) << 4 if span else 0
        out[(address - SHARED_BASE) // 2] = tensor[tuple(reversed(at))] if inside else 0
    return out.view(np.uint8)


@every_schedule
@pytest.mark.parametrize("span", [0, 32, 64, 128])
@pytest.mark.parametrize("corner", [(0, 0, 0), (8, -2, 1), (-8, 5, 0), (4, 3, 2), (32, 0, 0)])
def test_a_box_of_a_tensor(corner: tuple[int, int, int], span: int, schedule: object) -> None:
    """Coordinates may be negative, or not a multiple of anything; two phases of one mbarrier."""
    tensor = samples(16, 3 * 7 * 40).reshape(3, 7, 40)[:, :, :36]
    inner = span // 2 or 16
    box = (inner, 4, 2)
    one = Descriptor(tensor.ctypes.data, 2, (36, 7, 3), (80, 560), box, span)
    size = 2 * inner * 8
    threads = 64
    body = """mov.u32 %t, %tid.x; setp.eq.u32 %q, %t, 0; mov.b64 %m, map0; cvta.param.u64 %m, %m; mov.u32 %z, 0;
        @%q mbarrier.init.shared::cta.b64 [%b], 1; bar.sync 0;
        again: @%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], SIZE; elect.sync %e|%p, -1; and.pred %p, %p, %w;
        @%p cp.async.bulk.tensor.3d.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%m, {%x, %y, %zz}], [%b];
        { .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%b], %z;
        @!complete bra.uni waitLoop; }
        ld.shared.v4.b32 {%f0, %f1, %f2, %f3}, [%l]; add.u32 %z, %z, 1; setp.lt.u32 %r, %z, 2;
        bar.sync 0; @%r bra again;
        @%q mbarrier.inval.shared::cta.b64 [%b];""".replace("SIZE", str(size))
    lanes = np.arange(threads)
    given = {
        "%b": np.full(threads, SHARED_BASE + 4096, np.uint32), "%s": np.full(threads, SHARED_BASE, np.uint32),
        "%w": lanes < 32, "%l": (SHARED_BASE + 16 * (lanes % (size // 16))).astype(np.uint32),
    }  # fmt: skip
    for name, at in zip(("%x", "%y", "%zz"), corner, strict=True):
        given[name] = np.full(threads, at).astype(np.int32).view(np.uint32)
    wanted = dict.fromkeys(("%t", "%z", "%e", "%f0", "%f1", "%f2", "%f3"), 32) | {"%q": 1, "%p": 1, "%r": 1, "%m": 64}
    arrays = [np.lib.stride_tricks.as_strided(tensor, (3 * 7 * 40 - 4,), (2,))]
    got = run(
        body,
        given,
        wanted,
        threads=threads,
        arrays=arrays,
        shared=4104,
        schedule=schedule,
        descriptors=[one],  # type: ignore[arg-type]
    )
    words = np.stack([got[f"%f{i}"] for i in range(4)], 1)
    want = boxed(tensor, corner, box, span).view(np.uint32).reshape(-1, 4)
    assert (words == want[lanes % (size // 16)]).all()


TRY = "waitLoop: mbarrier.try_wait.parity.shared::cta.b64 %p, [%b], %z; @!%p bra waitLoop;"
COPY = """mov.u32 %t, %tid.x; setp.eq.u32 %q, %t, 0; mov.b64 %m, map0; mov.u32 %z, 0;
    @%q mbarrier.init.shared::cta.b64 [%b], 1; bar.sync 0;
    @%q mbarrier.arrive.expect_tx.shared::cta.b64 _, [%b], 256;
    @%q cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%s], [%m, {%z, %z}], [%b];
    waitLoop: mbarrier.try_wait.parity.shared::cta.b64 %p, [%b], %z; @!%p bra waitLoop;
    ld.shared.b32 %f, [%s]; bar.sync 0; @%q mbarrier.inval.shared::cta.b64 [%b];"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", ""),
        ("[%b], 256;", "[%b], 128;", "waits for -128 bytes|deadlock|a phase is incomplete"),
        ("[%b], 256;", "[%b], 512;", "deadlock"),
        ("@%q mbarrier.init.shared::cta.b64 [%b], 1;", "", "no mbarrier at this address"),
        ("1; bar.sync 0;", "1;", "race|no mbarrier at this address"),
        (TRY, "", "without a wait|no wait|unwritten|has no wait"),
        ("@!%p bra waitLoop;", "", "without a wait|no wait|unwritten|has no wait wrote|a phase is incomplete"),
        (
            "bar.sync 0; @%q mbarrier.inval",
            "@%q mbarrier.inval",
            "race|no mbarrier at this address|the mbarrier of a copy is invalid",
        ),
        ("ld.shared.b32 %f, [%s];", "st.shared.b64 [%b], %m;", "writes over an mbarrier"),
        ("@%q cp.async.bulk", "@%q st.shared.b32 [%s], %t; @%q cp.async.bulk", "no fence.proxy.async"),
        ("@%q mbarrier.inval.shared::cta.b64 [%b];", "@%q mbarrier.init.shared::cta.b64 [%b], 1;", "exists already"),
        ("map0;", "4096;", "no descriptor at this address"),
    ],
)  # fmt: skip
def test_what_goes_wrong_with_a_copy_is_seen(old: str, new: str, said: str) -> None:
    """By one of the schedules."""
    tensor = samples(16, 128).reshape(8, 16)
    one = Descriptor(tensor.ctypes.data, 2, (16, 8), (32,), (16, 8), 32)
    given = {"%b": np.full(64, SHARED_BASE + 256, np.uint32), "%s": np.full(64, SHARED_BASE, np.uint32)}
    wanted = {"%t": 32, "%z": 32, "%q": 1, "%p": 1, "%m": 64, "%f": 32}
    assert not old or COPY.count(old) == 1
    body, seen = COPY.replace(old, new) if old else COPY, []
    for schedule in SCHEDULES:
        try:
            run(body, given, wanted, threads=64, arrays=[tensor], shared=264, schedule=schedule, descriptors=[one])
        except Fault as fault:
            seen.append(str(fault))
    if not said:
        assert seen == []
    else:
        assert seen and any(one in "\n".join(seen) for one in said.split("|")), seen
