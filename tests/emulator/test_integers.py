"""Integer, move and special-register instructions, compared with Python's integers of unlimited width."""

from __future__ import annotations

import operator
from collections.abc import Callable

import numpy as np
import pytest

from .harness import compiled_only, run, samples
from .parser import Unmodelled

pytestmark = compiled_only

N = 256
NARROW = ("s16", "u16", "s32", "u32")
TYPES = (*NARROW, "s64", "u64")


def value(x: int, kind: str) -> int:
    """Return the low bits of x as a number of this type."""
    width = int(kind[1:])
    x &= 2**width - 1
    return x - 2**width if kind[0] == "s" and x >> (width - 1) else x


def toward_zero(a: int, b: int) -> int:
    b = b or 3  # the test replaces divisors of 0
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def add_halves(a: int, b: int) -> int:
    return (a + b) % 2**16 + ((a >> 16) + (b >> 16)) % 2**16 * 2**16


BINARY: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "min": min, "max": max, "div": toward_zero,
    "rem": lambda a, b: a - (b or 3) * toward_zero(a, b),
}  # fmt: skip
# opcode: the types of its operands, the type of the result, a formula
CASES: dict[str, tuple[list[str], str, Callable[..., int]]] = {
    "max.relu.s32": (["s32"] * 2, "s32", lambda a, b: max(a, b, 0)),
    "add.s16x2": (["u32"] * 2, "u32", add_halves),
    "popc.b32": (["u32"], "u32", lambda a: a.bit_count()),
    "popc.b64": (["u64"], "u32", lambda a: a.bit_count()),
}
for _kind in TYPES:
    CASES |= {f"{name}.{_kind}": ([_kind] * 2, _kind, formula) for name, formula in BINARY.items()}
for _kind in NARROW:
    _bits, _wide = int(_kind[1:]), f"{_kind[0]}{2 * int(_kind[1:])}"
    CASES[f"mul.wide.{_kind}"] = [_kind] * 2, _wide, lambda a, b: a * b
    CASES[f"mad.wide.{_kind}"] = [_kind, _kind, _wide], _wide, lambda a, b, c: a * b + c
    CASES[f"mul.hi.{_kind}"] = [_kind] * 2, _kind, lambda a, b, bits=_bits: a * b >> bits
    CASES[f"mad.lo.{_kind}"] = [_kind] * 3, _kind, lambda a, b, c: a * b + c
for _bits in (16, 32, 64):
    _u, _s = f"u{_bits}", f"s{_bits}"
    for _name, _formula in (("and", operator.and_), ("or", operator.or_), ("xor", operator.xor)):
        CASES[f"{_name}.b{_bits}"] = [_u] * 2, _u, _formula
    CASES[f"not.b{_bits}"] = [_u], _u, lambda a: ~a
    CASES[f"neg.{_s}"] = [_s], _u, lambda a: -a
    CASES[f"abs.{_s}"] = [_s], _u, abs
    CASES[f"shl.b{_bits}"] = [_u, "u32"], _u, lambda a, by, most=_bits: a << min(by, most)
    for _type, _kind in (("u", _u), ("b", _u), ("s", _s)):
        CASES[f"shr.{_type}{_bits}"] = [_kind, "u32"], _u, lambda a, by, most=_bits: a >> min(by, most)
for _pair in ("u64.u32", "s64.s32", "u32.u64", "u16.u32", "u32.u16", "s32.s16", "s32.s8", "u32.u8", "s16.s8", "u16.u8",
              "s64.u32"):  # fmt: skip
    CASES[f"cvt.{_pair}"] = [_pair.split(".")[1]], _pair.split(".")[0], lambda a: a


@pytest.mark.parametrize("opcode", CASES)
def test_results_equal_those_of_unlimited_integers(opcode: str) -> None:
    kinds, to, formula = CASES[opcode]
    inputs = {f"%a{i}": samples(max(16, int(kind[1:])), N, i) for i, kind in enumerate(kinds)}
    if opcode.startswith(("div", "rem")):
        inputs["%a1"] = np.where(inputs["%a1"] == 0, inputs["%a1"].dtype.type(3), inputs["%a1"])
    got = run(f"{opcode} %d, {', '.join(inputs)};", inputs, {"%d": int(to[1:])}, threads=N)["%d"]
    for lane in range(N):
        args = [value(int(inputs[f"%a{i}"][lane]), kind) for i, kind in enumerate(kinds)]
        assert int(got[lane]) == value(formula(*args), "u" + to[1:]), args


def test_shifts_by_constants_clamp() -> None:
    x = samples(32, 32)
    body = "shl.b32 %a, %x, 40; shr.s32 %b, %x, 40; shr.u32 %c, %x, 7;"
    got = run(body, {"%x": x}, {"%a": 32, "%b": 32, "%c": 32})
    assert (got["%a"] == 0).all() and (got["%b"] == np.where(x >> 31, 2**32 - 1, 0)).all()
    assert (got["%c"] == x // 128).all()


@pytest.mark.parametrize(("begin", "length"), [(0, 32), (4, 3), (31, 1), (15, 5), (0, 1)])
def test_bit_fields(begin: int, length: int) -> None:
    x = samples(32, N)
    body = f"bfe.u32 %u, %x, {begin}, {length}; bfe.s32 %s, %x, {begin}, {length};"
    got = run(body, {"%x": x}, {"%u": 32, "%s": 32}, threads=N)
    for lane in range(N):
        field = f"{int(x[lane]):032b}"[32 - begin - length : 32 - begin]
        assert int(got["%u"][lane]) == int(field, 2)
        assert int(got["%s"][lane]) == int(field[0] * (32 - length) + field, 2)


@pytest.mark.parametrize("table", [0xEA, 0x96, 0xE8, 0x01, 0xCA, 0x78])
def test_lop3_applies_its_table(table: int) -> None:
    a, b, c = (samples(32, N, seed) for seed in range(3))
    got = run(f"lop3.b32 %d, %a, %b, %c, {table:#x};", {"%a": a, "%b": b, "%c": c}, {"%d": 32}, threads=N)["%d"]
    for bit in range(32):
        row = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        assert ((got >> bit & 1) == (table >> row & 1)).all()


@pytest.mark.parametrize("selector", [0x7701, 0x3210, 0x7654, 0x8F19, 0x0123, None])
def test_prmt_selects_bytes(selector: int | None) -> None:
    """None: the selector is a register, of which sixteen bits count."""
    a, b, c = (samples(32, N, seed) for seed in range(3))
    operand = "%c" if selector is None else f"{selector:#x}U"
    got = run(f"prmt.b32 %d, %a, %b, {operand};", {"%a": a, "%b": b, "%c": c}, {"%d": 32}, threads=N)["%d"]
    for lane in range(N):
        pool = int(a[lane]).to_bytes(4, "little") + int(b[lane]).to_bytes(4, "little")
        nibbles = [(int(c[lane]) if selector is None else selector) >> 4 * i & 15 for i in range(4)]
        want = [(0xFF if pool[n & 7] > 127 else 0) if n & 8 else pool[n & 7] for n in nibbles]
        assert int(got[lane]) == int.from_bytes(bytes(want), "little")


@pytest.mark.parametrize("kind", TYPES)
def test_comparisons(kind: str) -> None:
    a, b = samples(int(kind[1:]), N, 0), samples(int(kind[1:]), N, 1)
    b = np.where(np.arange(N) % 3 == 0, a, b)
    names = ("eq", "ne", "lt", "le", "gt", "ge")
    body = " ".join(f"setp.{name}.{kind} %{name}, %a, %b;" for name in names)
    got = run(body, {"%a": a, "%b": b}, {f"%{name}": 1 for name in names}, threads=N)
    for lane in range(N):
        x, y = value(int(a[lane]), kind), value(int(b[lane]), kind)
        for name in names:
            assert got[f"%{name}"][lane] == getattr(x, f"__{name}__")(y), (name, x, y)


def test_predicates_and_selection() -> None:
    p, q = (np.arange(32) >> shift & 1 == 1 for shift in (0, 1))
    x, y = samples(32, 32, 0), samples(32, 32, 1)
    body = """and.pred %a, %p, %q; or.pred %o, %p, %q; xor.pred %e, %p, %q; not.pred %n, %p;
        mov.pred %t, -1; mov.pred %f, 0; selp.b32 %s, %x, %y, %p; selp.f32 %u, %y, 0f3F800000, %q;"""
    outputs = dict.fromkeys(("%a", "%o", "%e", "%n", "%t", "%f"), 1) | {"%s": 32, "%u": 32}
    got = run(body, {"%p": p, "%q": q, "%x": x, "%y": y}, outputs)
    want = {"%a": p & q, "%o": p | q, "%e": p ^ q, "%n": ~p, "%t": True, "%f": False}
    want |= {"%s": np.where(p, x, y), "%u": np.where(q, y, 0x3F800000)}
    assert all((got[name] == values).all() for name, values in want.items())


def test_moves_split_and_join_registers() -> None:
    x, y = samples(32, 32), samples(64, 32)
    body = """mov.b32 {%l, %h}, %x; mov.b32 %j, {%h, %l}; mov.b64 {_, %u}, %y; mov.b64 {%v, _}, %y;
        mov.b64 %w, {%u, %v}; mov.b16 %k, -3; mov.u32 %c, 0x1F; mov.b64 %z, 0;"""
    outputs = {"%l": 16, "%h": 16, "%j": 32, "%u": 32, "%v": 32, "%w": 64, "%k": 16, "%c": 32, "%z": 64}
    got = run(body, {"%x": x, "%y": y}, outputs)
    assert (got["%j"] == (x << 16 | x >> 16)).all() and (got["%w"] == (y << 32 | y >> 32)).all()
    assert (got["%k"] == 65533).all() and (got["%c"] == 31).all() and (got["%z"] == 0).all()


def test_special_registers() -> None:
    body = "mov.u32 %t, %tid.x; mov.u32 %c, %ctaid.x; mov.u32 %n, %nctaid.x; mov.u32 %y, %ctaid.y; mov.u32 %l, %laneid;"
    got = run(body, {}, dict.fromkeys(("%t", "%c", "%n", "%y", "%l"), 32), threads=64, blocks=3)
    lanes = np.arange(192)
    want = {"%t": lanes % 64, "%c": lanes // 64, "%n": 3, "%y": 0, "%l": lanes % 32}
    assert all((got[name] == values).all() for name, values in want.items())


@pytest.mark.parametrize(
    ("text", "message"),
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
def test_unmodelled_instructions_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(Unmodelled, match=message):
        run(text, {"%x": samples(32, 64)}, {"%d": 32}, threads=64)


def test_unused_local_memory_is_accepted() -> None:
    assert (run(".local .align 1 .b8 depot[1]; mov.u32 %d, 3;", {}, {"%d": 32})["%d"] == 3).all()
