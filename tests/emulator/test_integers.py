"""Each integer opcode against Python's own integers, of no width."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mixtral_triton.kernels.launch import INTERPRETED

from .harness import run, samples
from .parser import Unmodelled

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about a PTX emulator: run once, without the interpreter")

N = 256


def value(x: int, kind: str) -> int:
    """The low bits of x, as a number of the type."""
    width = int(kind[1:])
    x &= 2**width - 1
    return x - 2**width if kind[0] == "s" and x >> (width - 1) else x


def toward_zero(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def check(opcode: str, kinds: list[str], to: str, formula: Callable[..., int], nonzero: bool = False) -> None:
    """`formula` of the operands' values, cut to `to`, is what every lane gets."""
    given = {f"%a{i}": samples(int(kind[1:]), N, i) for i, kind in enumerate(kinds)}
    if nonzero:
        given["%a1"] = np.where(given["%a1"] == 0, given["%a1"].dtype.type(3), given["%a1"])
    got = run(f"{opcode} %d, {', '.join(given)};", given, {"%d": int(to[1:])}, threads=N)["%d"]
    for lane in range(N):
        args = [value(int(given[f"%a{i}"][lane]), kind) for i, kind in enumerate(kinds)]
        want = value(formula(*args), "u" + to[1:])
        assert int(got[lane]) == want, f"{opcode} {args}: {int(got[lane])}, not {want}"


BINARY: dict[str, Callable[[int, int], int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul.lo": lambda a, b: a * b, "min": min, "max": max,
}  # fmt: skip
TYPES = ["s16", "u16", "s32", "u32", "s64", "u64"]


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", BINARY)
def test_arithmetic(name: str, kind: str) -> None:
    check(f"{name}.{kind}", [kind] * 2, kind, BINARY[name])


@pytest.mark.parametrize("kind", TYPES)
def test_division_is_toward_zero(kind: str) -> None:
    check(f"div.{kind}", [kind] * 2, kind, toward_zero, nonzero=True)
    check(f"rem.{kind}", [kind] * 2, kind, lambda a, b: a - b * toward_zero(a, b), nonzero=True)


@pytest.mark.parametrize("kind", ["s16", "u16", "s32", "u32"])
def test_wide_products(kind: str) -> None:
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    check(f"mul.wide.{kind}", [kind] * 2, wide, lambda a, b: a * b)
    check(f"mad.wide.{kind}", [kind, kind, wide], wide, lambda a, b, c: a * b + c)
    check(f"mul.hi.{kind}", [kind] * 2, kind, lambda a, b: a * b >> int(kind[1:]))
    check(f"mad.lo.{kind}", [kind] * 3, kind, lambda a, b, c: a * b + c)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_bits(width: int) -> None:
    two = [f"u{width}"] * 2
    check(f"and.b{width}", two, two[0], lambda a, b: a & b)
    check(f"or.b{width}", two, two[0], lambda a, b: a | b)
    check(f"xor.b{width}", two, two[0], lambda a, b: a ^ b)
    check(f"not.b{width}", two[:1], two[0], lambda a: ~a)
    check(f"neg.s{width}", [f"s{width}"], two[0], lambda a: -a)
    check(f"abs.s{width}", [f"s{width}"], two[0], abs)


@pytest.mark.parametrize("width", [16, 32, 64])
def test_shifts_clamp(width: int) -> None:
    check(f"shl.b{width}", [f"u{width}", "u32"], f"u{width}", lambda a, by: a << min(by, width))
    check(f"shr.u{width}", [f"u{width}", "u32"], f"u{width}", lambda a, by: a >> min(by, width))
    check(f"shr.b{width}", [f"u{width}", "u32"], f"u{width}", lambda a, by: a >> min(by, width))
    check(f"shr.s{width}", [f"s{width}", "u32"], f"u{width}", lambda a, by: a >> min(by, width))


def test_a_shift_by_a_number() -> None:
    x = samples(32, 32)
    got = run("shl.b32 %a, %x, 40; shr.s32 %b, %x, 40; shr.u32 %c, %x, 7;", {"%x": x}, {"%a": 32, "%b": 32, "%c": 32})
    assert (got["%a"] == 0).all() and (got["%b"] == np.where(x >> 31, 2**32 - 1, 0)).all()
    assert (got["%c"] == x // 128).all()


def test_max_relu_is_signed() -> None:
    check("max.relu.s32", ["s32", "s32"], "s32", lambda a, b: max(a, b, 0))


def test_sums_of_halves_do_not_carry() -> None:
    def halves(a: int, b: int) -> int:
        return (a + b) % 2**16 + ((a >> 16) + (b >> 16)) % 2**16 * 2**16

    check("add.s16x2", ["u32", "u32"], "u32", halves)


def test_popc() -> None:
    check("popc.b32", ["u32"], "u32", lambda a: a.bit_count())
    check("popc.b64", ["u64"], "u32", lambda a: a.bit_count())


@pytest.mark.parametrize(("begin", "length"), [(0, 32), (4, 3), (31, 1), (15, 5), (0, 1)])
def test_fields(begin: int, length: int) -> None:
    x = samples(32, N)
    body = f"bfe.u32 %u, %x, {begin}, {length}; bfe.s32 %s, %x, {begin}, {length};"
    got = run(body, {"%x": x}, {"%u": 32, "%s": 32}, threads=N)
    for lane in range(N):
        field = f"{int(x[lane]):032b}"[32 - begin - length : 32 - begin]
        assert int(got["%u"][lane]) == int(field, 2)
        assert int(got["%s"][lane]) == int(field[0] * (32 - length) + field, 2)


@pytest.mark.parametrize("table", [0xEA, 0x96, 0xE8, 0x01, 0xCA, 0x78])
def test_lop3_by_its_table(table: int) -> None:
    a, b, c = (samples(32, N, seed) for seed in range(3))
    got = run(f"lop3.b32 %d, %a, %b, %c, {table:#x};", {"%a": a, "%b": b, "%c": c}, {"%d": 32}, threads=N)["%d"]
    for bit in range(32):
        row = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        assert ((got >> bit & 1) == (table >> row & 1)).all()


@pytest.mark.parametrize("selector", [0x7701, 0x3210, 0x7654, 0x8F19, 0x0123, None])
def test_prmt_byte_by_byte(selector: int | None) -> None:
    """None: a register's, each lane its own; of a selector sixteen bits count."""
    a, b, c = (samples(32, N, seed) for seed in range(3))
    chosen = "%c" if selector is None else f"{selector:#x}U"
    got = run(f"prmt.b32 %d, %a, %b, {chosen};", {"%a": a, "%b": b, "%c": c}, {"%d": 32}, threads=N)["%d"]
    for lane in range(N):
        pool = int(a[lane]).to_bytes(4, "little") + int(b[lane]).to_bytes(4, "little")
        want = []
        for i in range(4):
            nibble = (int(c[lane]) if selector is None else selector) >> 4 * i & 15
            byte = pool[nibble & 7]
            want.append((0xFF if byte > 127 else 0) if nibble & 8 else byte)
        assert int(got[lane]) == int.from_bytes(bytes(want), "little")


@pytest.mark.parametrize("kind", TYPES)
def test_comparisons(kind: str) -> None:
    a, b = samples(int(kind[1:]), N, 0), samples(int(kind[1:]), N, 1)
    b = np.where(np.arange(N) % 3 == 0, a, b)
    names = {"eq": "__eq__", "ne": "__ne__", "lt": "__lt__", "le": "__le__", "gt": "__gt__", "ge": "__ge__"}
    body = " ".join(f"setp.{name}.{kind} %{name}, %a, %b;" for name in names)
    got = run(body, {"%a": a, "%b": b}, {f"%{name}": 1 for name in names}, threads=N)
    for lane in range(N):
        x, y = value(int(a[lane]), kind), value(int(b[lane]), kind)
        for name, method in names.items():
            assert got[f"%{name}"][lane] == getattr(x, method)(y), (name, x, y)


def test_predicates_and_selection() -> None:
    p, q = (np.arange(32) >> shift & 1 == 1 for shift in (0, 1))
    given = {"%p": p, "%q": q, "%x": samples(32, 32, 0), "%y": samples(32, 32, 1)}
    body = """and.pred %a, %p, %q; or.pred %o, %p, %q; xor.pred %e, %p, %q; not.pred %n, %p;
        mov.pred %t, -1; mov.pred %f, 0; selp.b32 %s, %x, %y, %p; selp.f32 %u, %y, 0f3F800000, %q;"""
    wanted = dict.fromkeys(("%a", "%o", "%e", "%n", "%t", "%f"), 1) | {"%s": 32, "%u": 32}
    got = run(body, given, wanted)
    assert (got["%a"] == (p & q)).all() and (got["%o"] == (p | q)).all() and (got["%e"] == (p ^ q)).all()
    assert (got["%n"] == ~p).all() and got["%t"].all() and not got["%f"].any()
    assert [int(x) for x in got["%s"]] == [int(given["%x" if one else "%y"][i]) for i, one in enumerate(p)]
    assert [int(x) for x in got["%u"]] == [int(given["%y"][i]) if one else 0x3F800000 for i, one in enumerate(q)]


def test_moves_split_and_join() -> None:
    x, y = samples(32, 32), samples(64, 32)
    body = """mov.b32 {%l, %h}, %x; mov.b32 %j, {%h, %l}; mov.b64 {_, %u}, %y; mov.b64 {%v, _}, %y;
        mov.b64 %w, {%u, %v}; mov.b16 %k, -3; mov.u32 %c, 0x1F; mov.b64 %z, 0;"""
    wanted = {"%l": 16, "%h": 16, "%j": 32, "%u": 32, "%v": 32, "%w": 64, "%k": 16, "%c": 32, "%z": 64}
    got = run(body, {"%x": x, "%y": y}, wanted)
    for lane in range(32):
        low, high = int(x[lane]) % 2**16, int(x[lane]) >> 16
        assert int(got["%j"][lane]) == low * 2**16 + high
        assert int(got["%w"][lane]) == (int(y[lane]) % 2**32) * 2**32 + (int(y[lane]) >> 32)
    assert (got["%k"] == 65533).all() and (got["%c"] == 31).all() and (got["%z"] == 0).all()


@pytest.mark.parametrize(
    ("to", "source"),
    [("u64", "u32"), ("s64", "s32"), ("u32", "u64"), ("u16", "u32"), ("u32", "u16"), ("s32", "s16"), ("s32", "s8"),
     ("u32", "u8"), ("s16", "s8"), ("u16", "u8"), ("s64", "u32")],
)  # fmt: skip
def test_conversions_of_integers(to: str, source: str) -> None:
    x = samples(max(16, int(source[1:])), N)
    got = run(f"cvt.{to}.{source} %d, %x;", {"%x": x}, {"%d": max(16, int(to[1:]))}, threads=N)["%d"]
    for lane in range(N):
        want = value(value(int(x[lane]), source), to)
        assert value(int(got[lane]), to[0] + str(8 * got.itemsize)) == want


def test_where_a_lane_is() -> None:
    body = "mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mov.u32 %n, %nctaid.x; mov.u32 %y, %ctaid.y; mov.u32 %l, %laneid;"
    got = run(body, {}, dict.fromkeys(("%t", "%c", "%n", "%y", "%l"), 32), threads=64, blocks=3)
    lanes = np.arange(192)
    assert (got["%t"] == lanes % 64).all() and (got["%c"] == lanes // 64).all() and (got["%n"] == 3).all()
    assert (got["%y"] == 0).all() and (got["%l"] == lanes % 32).all()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("add.sat.s32 %d, %x, %x;", "not modelled: add.sat.s32"),
        ("add.cc.u32 %d, %x, %x;", "not modelled: add.cc.u32"),
        ("mul24.lo.s32 %d, %x, %x;", "not modelled: mul24.lo.s32"),
        ("atom.global.add.u32 %d, [%x], 1;", "not modelled: atom.global.add.u32"),
        ("ld.local.b32 %d, [%x];", "not modelled: ld.local.b32"),
        ("cvt.satfinite.s32.f32 %d, %x;", "not modelled: cvt.satfinite.s32.f32"),
        ("bfe.u32 %d, %x, 30, 5;", "bit field beyond the register"),
        ("bfe.u32 %d, %x, %x, 5;", "bit field whose position is in a register"),
        ("mov.u32 %d, %clock;", "mov of %clock"),
        ("add.s64 %d, %x, %x;", "Reg.* as s64"),
        ("bar.sync 1, 64;", "barrier of a part of the block"),
        (".local .b8 depot[8];", "directive: .local"),
        (".local .align 4 .b8 depot[8]; mov.u32 %d, depot;", "local memory: depot"),
        ("bra nowhere;", "branch to no label"),
    ],
)
def test_what_is_not_modelled_is_refused(text: str, named: str) -> None:
    """By its name: a modifier too many is another opcode."""
    with pytest.raises(Unmodelled, match=named):
        run(text, {"%x": samples(32, 64)}, {"%d": 32}, threads=64)


def test_local_memory_that_nothing_uses_is_no_matter() -> None:
    assert (run(".local .align 1 .b8 depot[1]; mov.u32 %d, 3;", {}, {"%d": 32})["%d"] == 3).all()
