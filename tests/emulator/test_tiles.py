"""ldmatrix, stmatrix, mma and wgmma of the PTX emulator, element by element from the tables of the PTX ISA."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED

from .harness import run, samples
from .machine import SCHEDULES
from .memory import SHARED_BASE, Fault

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about a PTX emulator: run once, without the interpreter")

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def halves(values: np.ndarray, kind: str) -> np.ndarray:
    return torch.from_numpy(values).to(DTYPES[kind]).view(torch.int16).numpy().view(np.uint16)


def numbers(*shape: int, seed: int, kind: str) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(DTYPES[kind]).float().numpy()


FILL = "st.shared.b32 [%i], %v; bar.sync 0;"


def filled(memory: np.ndarray) -> dict[str, np.ndarray]:
    """Registers of 1024 lanes that put 4 KiB of `memory` where shared memory begins."""
    return {"%i": (SHARED_BASE + 4 * np.arange(1024)).astype(np.uint32), "%v": memory.view(np.uint32)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    memory = samples(16, 2048)
    rows = np.random.default_rng(1).permutation(256)[:32]
    address = np.tile(SHARED_BASE + 16 * rows, 32).astype(np.uint32)
    names = [f"%r{i}" for i in range(count)]
    trans = ".trans" if transposed else ""
    body = FILL + f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{', '.join(names)}}}, [%a]; bar.sync 0;"
    got = run(body, {**filled(memory), "%a": address}, dict.fromkeys(names, 32), threads=1024, shared=4096)
    table = memory.reshape(256, 8)
    for i, name in enumerate(names):
        for lane in range(32):
            for half in range(2):
                row, column = lane // 4, 2 * (lane % 4) + half
                if transposed:
                    row, column = column, row
                assert int(got[name][lane]) >> 16 * half & 0xFFFF == table[rows[8 * i + row], column]
    # What ldmatrix gave, stmatrix puts back.
    values = {name: got[name] for name in names}
    back = f"@%p stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%a], {{{', '.join(names)}}}; bar.sync 0;"
    after = run(
        FILL + back + "ld.shared.b32 %w, [%i];",
        {**filled(np.zeros(2048, np.uint16)), "%a": address, "%p": np.arange(1024) < 32, **values},
        {"%w": 32}, threads=1024, shared=4096,
    )["%w"].view(np.uint16).reshape(256, 8)  # fmt: skip
    want = np.zeros_like(table)
    want[rows[: 8 * count]] = table[rows[: 8 * count]]
    assert (after == want).all()


@pytest.mark.parametrize("kind", DTYPES)
def test_mma_element_by_element(kind: str) -> None:
    a, b = numbers(16, 16, seed=0, kind=kind), numbers(16, 8, seed=1, kind=kind)
    c = np.random.default_rng(2).standard_normal((16, 8)).astype(np.float32)
    given: dict[str, np.ndarray] = {}
    packed_a, packed_b = halves(a, kind), halves(b, kind)
    for r in range(4):
        words = []
        for lane in range(32):
            row, column = lane // 4 + 8 * (r % 2), 2 * (lane % 4) + 8 * (r // 2)
            words.append(int(packed_a[row, column]) | int(packed_a[row, column + 1]) << 16)
        given[f"%a{r}"] = np.array(words, np.uint32)
        row_c, column_c = np.arange(32) // 4 + 8 * (r // 2), 2 * (np.arange(32) % 4) + r % 2
        given[f"%c{r}"] = c[row_c, column_c].view(np.uint32)
    for r in range(2):
        words = []
        for lane in range(32):
            row, column = 2 * (lane % 4) + 8 * r, lane // 4
            words.append(int(packed_b[row, column]) | int(packed_b[row + 1, column]) << 16)
        given[f"%b{r}"] = np.array(words, np.uint32)
    body = f"""mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
        {{%d0, %d1, %d2, %d3}}, {{%a0, %a1, %a2, %a3}}, {{%b0, %b1}}, {{%c0, %c1, %c2, %c3}};"""
    got = run(body, given, dict.fromkeys(("%d0", "%d1", "%d2", "%d3"), 32))
    want = a.astype(float) @ b.astype(float) + c
    for r in range(4):
        values = got[f"%d{r}"].view(np.float32)
        for lane in range(32):
            row, column = lane // 4 + 8 * (r // 2), 2 * (lane % 4) + r % 2
            assert values[lane] == np.float32(want[row, column])


def place(start: int, offset: int, span: int) -> int:
    """Where a byte lies: three, two or one bit of the address above bit 7 are added to those above bit 4."""
    address = start + offset
    return address ^ (address >> 7 & span // 16 - 1) << 4


def descriptor(start: int, leading: int, stride: int, span: int) -> int:
    code = {128: 1, 64: 2, 32: 3}[span]
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | code << 62


def laid_out(matrix: np.ndarray, kind: str, start: int, span: int, transposed: bool, memory: np.ndarray) -> int:
    """Puts [rows, 16] into shared memory as TMA would -> its descriptor.

    K contiguous: rows of `span` bytes, of which 32 are ours, eight of them a group. Else `span` bytes of rows a k.
    """
    packed, table = halves(matrix, kind), memory.view(np.uint16)
    rows = len(matrix)
    for r in range(rows):
        for k in range(16):
            if transposed:
                per = span // 2
                offset = r // per * 16 * span + 2 * (r % per) + k // 8 * 8 * span + k % 8 * span
            else:
                offset = r // 8 * 8 * span + r % 8 * span + 2 * k
            table[(place(start, offset, span) - SHARED_BASE) // 2] = packed[r, k]
    return descriptor(start, 16 * span if transposed else 16, 8 * span, span)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda one: one.name)
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("span", [32, 64, 128])
def test_wgmma_from_descriptors_and_from_registers(span: int, transposed: bool, kind: str, schedule: object) -> None:
    """Two products into one sum: the first is not added to what the register had."""
    columns = 64
    a, b = numbers(64, 16, seed=0, kind=kind), numbers(columns, 16, seed=1, kind=kind)
    memory = np.zeros(32768, np.uint8)
    at_b = SHARED_BASE + 16384
    da = laid_out(a, kind, SHARED_BASE, span, transposed, memory)
    db = laid_out(b, kind, at_b, span, transposed, memory)
    results = [f"%d{i}" for i in range(columns // 2)]
    form = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {{{', '.join(results)}}}"
    flags = f"{int(transposed)}, {int(transposed)}"
    body = """mov.u32 %k, 0; fill: ld.global.b32 %v, [%g]; st.shared.b32 [%i], %v; add.u64 %g, %g, 512;
        add.u32 %i, %i, 512; add.u32 %k, %k, 1; setp.lt.u32 %p, %k, 64; @%p bra fill;
        fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"""
    body += f"{form}, %x, %y, 0, 1, 1, {flags}; {form}, {{%a0, %a1, %a2, %a3}}, %y, 1, 1, 1, {int(transposed)};"
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    lanes = np.arange(128)
    given = {
        "%g": (memory.ctypes.data + 4 * lanes).astype(np.uint64), "%i": (SHARED_BASE + 4 * lanes).astype(np.uint32),
        "%x": np.full(128, da, np.uint64), "%y": np.full(128, db, np.uint64),
    }  # fmt: skip
    packed = halves(a, kind)
    for r in range(4):
        row, column = 16 * (lanes // 32) + lanes % 32 // 4 + 8 * (r % 2), 2 * (lanes % 4) + 8 * (r // 2)
        given[f"%a{r}"] = packed[row, column].astype(np.uint32) | packed[row, column + 1].astype(np.uint32) << 16
    wanted = {"%k": 32, "%v": 32, "%p": 1} | dict.fromkeys(results, 32)
    got = run(body, given, wanted, threads=128, arrays=[memory], shared=32768, schedule=schedule)  # type: ignore[arg-type]
    product = (a.astype(float) @ b.astype(float).T).astype(np.float32)
    want = (product + a.astype(float) @ b.astype(float).T).astype(np.float32)
    for r, name in enumerate(results):
        row = 16 * (lanes // 32) + lanes % 32 // 4 + 8 * (r // 2 % 2)
        column = 8 * (r // 4) + 2 * (lanes % 4) + r % 2
        assert np.allclose(got[name].view(np.float32), want[row, column], rtol=1e-6, atol=1e-6)


PRODUCT = """wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%d0,%d1,%d2,%d3,%d4,%d5,%d6,%d7},
    {%a,%a,%a,%a}, %y, 0, 1, 1, 0;"""
BEGIN = "st.shared.v4.b32 [%i], {%v, %v, %v, %v}; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
OVERWRITE = "bar.sync 0; mov.b32 %w, 9; st.shared.b32 [%i], %w;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"


@pytest.mark.parametrize(
    ("body", "said"),
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
def test_what_a_product_in_flight_forbids(body: str, said: str) -> None:
    lanes = np.arange(128)
    given = {
        "%i": (SHARED_BASE + 16 * lanes).astype(np.uint32), "%v": samples(32, 128), "%a": samples(32, 128, 1),
        "%y": np.full(128, descriptor(SHARED_BASE, 16, 1024, 128), np.uint64),
    }  # fmt: skip
    wanted = {"%w": 32} | {f"%d{i}": 32 for i in range(8)}
    if said:
        with pytest.raises(Fault, match=said):
            run(body, given, wanted, threads=128, shared=2048)
    else:
        run(body, given, wanted, threads=128, shared=2048)


def test_a_result_that_nobody_waited_for_is_nothing() -> None:
    body = BEGIN + PRODUCT + COMMIT + "mov.b32 %w, %d0;" + WAIT
    lanes = np.arange(128)
    given = {
        "%i": (SHARED_BASE + 16 * lanes).astype(np.uint32), "%v": np.zeros(128, np.uint32), "%a": samples(32, 128),
        "%y": np.full(128, descriptor(SHARED_BASE, 16, 1024, 128), np.uint64),
    }  # fmt: skip
    wanted = {"%w": 32} | {f"%d{i}": 32 for i in range(8)}
    got = run(body, given, wanted, threads=128, shared=2048, schedule=SCHEDULES[1])
    assert (got["%w"] == 2**32 - 1).all() and (got["%d0"] != 2**32 - 1).all()
