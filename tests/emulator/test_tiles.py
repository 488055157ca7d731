"""ldmatrix, stmatrix, mma and wgmma, compared element by element with the layouts of the PTX ISA."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from .harness import check_fault, compiled_only, every_schedule, run, samples, shared_addresses
from .machine import SCHEDULES
from .memory import SHARED_BASE

pytestmark = compiled_only

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
LANES = np.arange(128)
WARP = np.arange(32)


def halves(values: np.ndarray, kind: str) -> np.ndarray:
    return torch.from_numpy(values).to(DTYPES[kind]).view(torch.int16).numpy().view(np.uint16)


def numbers(*shape: int, seed: int, kind: str) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return torch.from_numpy(values).to(DTYPES[kind]).float().numpy()


def pairs(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Pack two 16-bit values into each register."""
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def vector(name: str, count: int) -> str:
    return f"{{{', '.join(f'%{name}{i}' for i in range(count))}}}"


FILL = "st.shared.b32 [%i], %v; bar.sync 0;"


def fill(memory: np.ndarray) -> dict[str, np.ndarray]:
    """Return registers of 1024 lanes that store 4 KiB of `memory` to shared memory."""
    return {"%i": shared_addresses(1024, 4), "%v": memory.view(np.uint32)}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    memory = samples(16, 2048)
    table = memory.reshape(256, 8)
    rows = np.random.default_rng(1).permutation(256)[:32]
    address = np.tile(SHARED_BASE + 16 * rows, 32).astype(np.uint32)
    names = [f"%r{i}" for i in range(count)]
    form = f"sync.aligned.m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    body = FILL + f"ldmatrix.{form} {vector('r', count)}, [%a]; bar.sync 0;"
    got = run(body, {**fill(memory), "%a": address}, dict.fromkeys(names, 32), threads=1024, shared=4096)
    for i, name in enumerate(names):
        tile = table[rows[8 * i : 8 * i + 8]]
        tile = tile.T if transposed else tile
        assert (got[name][:32] == pairs(tile[WARP // 4, 2 * (WARP % 4)], tile[WARP // 4, 2 * (WARP % 4) + 1])).all()
    # stmatrix inverts ldmatrix.
    body = FILL + f"@%p stmatrix.{form} [%a], {vector('r', count)}; bar.sync 0; ld.shared.b32 %w, [%i];"
    inputs = fill(np.zeros(2048, np.uint16)) | {"%a": address, "%p": np.arange(1024) < 32}
    inputs |= {name: got[name] for name in names}
    after = run(body, inputs, {"%w": 32}, threads=1024, shared=4096)["%w"].view(np.uint16).reshape(256, 8)
    want = np.zeros_like(table)
    want[rows[: 8 * count]] = table[rows[: 8 * count]]
    assert (after == want).all()


@pytest.mark.parametrize("kind", DTYPES)
def test_mma(kind: str) -> None:
    a, b = numbers(16, 16, seed=0, kind=kind), numbers(16, 8, seed=1, kind=kind)
    c = np.random.default_rng(2).standard_normal((16, 8)).astype(np.float32)
    packed_a, packed_b = halves(a, kind), halves(b, kind)
    group, member = WARP // 4, WARP % 4
    inputs: dict[str, np.ndarray] = {}
    places_c = [(group + 8 * (r // 2), 2 * member + r % 2) for r in range(4)]
    for r in range(4):
        row, column = group + 8 * (r % 2), 2 * member + 8 * (r // 2)
        inputs[f"%a{r}"] = pairs(packed_a[row, column], packed_a[row, column + 1])
        inputs[f"%c{r}"] = c[places_c[r]].view(np.uint32)
    for r in range(2):
        row = 2 * member + 8 * r
        inputs[f"%b{r}"] = pairs(packed_b[row, group], packed_b[row + 1, group])
    registers = f"{vector('d', 4)}, {vector('a', 4)}, {vector('b', 2)}, {vector('c', 4)}"
    body = f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 {registers};"
    got = run(body, inputs, {f"%d{r}": 32 for r in range(4)})
    want = (a.astype(float) @ b.astype(float) + c).astype(np.float32)
    for r in range(4):
        assert (got[f"%d{r}"].view(np.float32) == want[places_c[r]]).all()


def descriptor(start: int, leading: int, stride: int, span: int) -> int:
    code = {128: 1, 64: 2, 32: 3}[span]
    return start >> 4 | (leading >> 4) << 16 | (stride >> 4) << 32 | code << 62


def write_tile(matrix: np.ndarray, kind: str, start: int, span: int, transposed: bool, memory: np.ndarray) -> int:
    """Write [rows, 16] to shared memory as TMA would and return its descriptor.

    K contiguous: rows of `span` bytes, of which 32 belong to the tile, in groups of eight. Transposed: for each k,
    `span` bytes of rows.
    """
    (r, k), per = np.indices(matrix.shape), span // 2
    if transposed:
        address = start + r // per * 16 * span + 2 * (r % per) + k // 8 * 8 * span + k % 8 * span
    else:
        address = start + r // 8 * 8 * span + r % 8 * span + 2 * k
    address ^= (address >> 7 & span // 16 - 1) << 4
    memory.view(np.uint16)[(address - SHARED_BASE) // 2] = halves(matrix, kind)
    return descriptor(start, 16 * span if transposed else 16, 8 * span, span)


@every_schedule
@pytest.mark.parametrize("kind", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("span", [32, 64, 128])
def test_wgmma(span: int, transposed: bool, kind: str, schedule: Any) -> None:
    """Two products with one accumulator, A from a descriptor and from registers; the first ignores the accumulator."""
    columns = 64
    a, b = numbers(64, 16, seed=0, kind=kind), numbers(columns, 16, seed=1, kind=kind)
    memory = np.zeros(32768, np.uint8)
    tile_a = write_tile(a, kind, SHARED_BASE, span, transposed, memory)
    tile_b = write_tile(b, kind, SHARED_BASE + 16384, span, transposed, memory)
    results = [f"%d{i}" for i in range(columns // 2)]
    wgmma = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{kind}.{kind} {vector('d', columns // 2)}"
    trans = int(transposed)
    body = """mov.u32 %k, 0; fill: ld.global.b32 %v, [%g]; st.shared.b32 [%i], %v; add.u64 %g, %g, 512;
        add.u32 %i, %i, 512; add.u32 %k, %k, 1; setp.lt.u32 %p, %k, 64; @%p bra fill;
        fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"""
    body += f"{wgmma}, %x, %y, 0, 1, 1, {trans}, {trans}; {wgmma}, {vector('a', 4)}, %y, 1, 1, 1, {trans};"
    body += COMMIT + WAIT
    inputs = {"%g": (memory.ctypes.data + 4 * LANES).astype(np.uint64), "%i": shared_addresses(128, 4)}
    inputs |= {"%x": np.full(128, tile_a, np.uint64), "%y": np.full(128, tile_b, np.uint64)}
    packed = halves(a, kind)
    group, member = 16 * (LANES // 32) + LANES % 32 // 4, LANES % 4
    for r in range(4):
        row, column = group + 8 * (r % 2), 2 * member + 8 * (r // 2)
        inputs[f"%a{r}"] = pairs(packed[row, column], packed[row, column + 1])
    outputs = {"%k": 32, "%v": 32, "%p": 1} | dict.fromkeys(results, 32)
    got = run(body, inputs, outputs, threads=128, arrays=[memory], shared=32768, schedule=schedule)
    want = 2 * (a.astype(float) @ b.astype(float).T)
    for r, name in enumerate(results):
        expected = want[group + 8 * (r // 2 % 2), 8 * (r // 4) + 2 * member + r % 2]
        assert np.allclose(got[name].view(np.float32), expected, rtol=1e-6, atol=1e-6)


PRODUCT = f"""wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {vector("d", 8)},
    {{%a,%a,%a,%a}}, %y, 0, 1, 1, 0;"""
BEGIN = "st.shared.v4.b32 [%i], {%v, %v, %v, %v}; fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"
OVERWRITE = "bar.sync 0; mov.b32 %w, 9; st.shared.b32 [%i], %w;"
COMMIT, WAIT = "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"
INPUTS = {
    "%i": shared_addresses(128, 16), "%v": samples(32, 128), "%a": samples(32, 128, 1),
    "%y": np.full(128, descriptor(SHARED_BASE, 16, 1024, 128), np.uint64),
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
