"""Arithmetic, bit and move instructions, compared with rationals, unlimited integers or torch's conversions."""

import math
import operator
import re
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch

from .arithmetic import FROM_E4M3
from .harness import as_bits, as_floats, run, samples
from .parser import Unmodelled
from .values import MODELLED

pytestmark = pytest.mark.compiled

N = 256
# Bits of precision, the exponent of the smallest normal number, and that of the largest.
FORMATS = {"f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15)}
HALVES, PAIRS = ("bf16", "f16"), ("bf16x2", "f16x2")
ARITHMETIC: dict[str, Any] = {"add": lambda a, b: a + b, "mul": lambda a, b: a * b}
ARITHMETIC |= {"fma.rn": lambda a, b, c: a * b + c, "sub": lambda a, b: a - b}


def rounded(x: Fraction, kind: str) -> float:
    """Round to the nearest number of the format, ties to even."""
    precision, least, most = FORMATS[kind]
    exponent = abs(x.numerator).bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(least, exponent) - precision + 1)
    out = round(x / unit) * unit
    return float(out) if abs(out) < Fraction(2) ** (most + 1) else math.copysign(math.inf, out)


def numbers(kind: str, seed: int, n: int = N) -> np.ndarray:
    """Return finite numbers of the format as fp32, of similar magnitude, so that sums cancel."""
    rng = np.random.default_rng(seed)
    return as_floats(as_bits(rng.standard_normal(n).astype(np.float32) * 2.0 ** rng.integers(-6, 6, n), kind), kind)


@pytest.mark.parametrize(("name", "kind"), [("sub", "f32"), *product(("add", "mul", "fma.rn"), (*FORMATS, *PAIRS))])
def test_arithmetic_is_rounded_once(name: str, kind: str) -> None:
    """Each number's result is compared with the exact one, rounded once. A register of pairs has two of them."""
    one, bits = kind.removesuffix("x2"), np.uint16 if kind in HALVES else np.uint32
    values = [numbers(one, seed) for seed in range(3 if name == "fma.rn" else 2)]
    values[0][: N // 8], values[-1][: N // 16] = 0.0, 0.0
    inputs = {f"%a{i}": as_bits(x, one).view(bits) for i, x in enumerate(values)}
    body, width = f"{name}.{kind} %d, {', '.join(inputs)};", 8 * bits().itemsize
    got = run(body, inputs, {"%d": width}, threads=len(inputs["%a0"]))["%d"]
    for lane, result in enumerate(as_floats(got.view(np.uint16) if one in HALVES else got, one)):
        args = [Fraction(float(x[lane])) for x in values]
        assert result == rounded(ARITHMETIC[name](*args), one), list(map(float, args))


def test_division_and_functions() -> None:
    a, b = numbers("f32", 0), np.abs(numbers("f32", 1)) + np.float32(0.01)
    body = "div.full.f32 %q, %a, %b; rsqrt.approx.ftz.f32 %s, %b; ex2.approx.ftz.f32 %e, %a; ex2.approx.f32 %x, %a;"
    inputs, outputs = {"%a": as_bits(a, "f32"), "%b": as_bits(b, "f32")}, dict.fromkeys(("%q", "%s", "%e", "%x"), 32)
    got = {name: as_floats(values, "f32") for name, values in run(body, inputs, outputs, threads=N).items()}
    for lane in range(N):
        exact = Fraction(float(a[lane])) / Fraction(float(b[lane]))
        assert got["%q"][lane] == rounded(exact, "f32")
    assert np.allclose(got["%s"], b.astype(float) ** -0.5, rtol=2**-23, atol=0)
    for name in ("%e", "%x"):
        assert np.allclose(got[name], 2.0 ** a.astype(float), rtol=2**-22, atol=0)


def test_ftz_flushes_subnormals() -> None:
    values = {"%x": -130.0, "%t": 2.0**-130, "%one": 1.0, "%z": 0.0}
    inputs = {name: as_bits(np.full(32, value, np.float32), "f32") for name, value in values.items()}
    body = """ex2.approx.ftz.f32 %e, %x; ex2.approx.f32 %f, %x; ex2.approx.ftz.f32 %g, %t;
        fma.rn.ftz.f32 %h, %t, %one, %z; fma.rn.f32 %i, %t, %one, %z; mul.f32 %j, %t, %one;"""
    want = {"%e": 0.0, "%f": 2.0**-130, "%g": 1.0, "%h": 0.0, "%i": 2.0**-130, "%j": 2.0**-130}
    got = run(body, inputs, dict.fromkeys(want, 32))
    assert {name: float(as_floats(got[name], "f32")[0]) for name in want} == want


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.5], np.float32)
A, B = (grid.reshape(-1) for grid in np.meshgrid(SPECIAL, SPECIAL))
UNORDERED = np.isnan(A) | np.isnan(B)


@pytest.mark.parametrize("kind", FORMATS)
def test_comparisons_with_nan(kind: str) -> None:
    ordered: dict[str, Any] = {"eq": A == B, "lt": A < B, "le": A <= B, "gt": A > B, "ge": A >= B}
    ordered["ne"] = (A < B) | (A > B)
    table = ordered | {f"{name}u": want | UNORDERED for name, want in ordered.items()}
    table |= {"num": ~UNORDERED, "nan": UNORDERED}
    body = " ".join(f"setp.{name}.{kind} %{name}, %a, %b;" for name in table)
    got = run(body, {"%a": as_bits(A, kind), "%b": as_bits(B, kind)}, {f"%{name}": 1 for name in table}, threads=64)
    for name, want in table.items():
        assert (got[f"%{name}"] == want).all(), name
    if kind in HALVES:
        bits = [as_bits(x, kind).astype(np.uint32) for x in (A, B)]
        inputs = {name: x | x[::-1] << 16 for name, x in zip(("%a", "%b"), bits, strict=True)}
        table |= {f"{name}_high": want[::-1] for name, want in table.items()}
        body = " ".join(f"setp.{name}.{kind}x2 %{name}|%{name}_high, %a, %b;" for name in table if "_" not in name)
        got = run(body, inputs, {f"%{name}": 1 for name in table}, threads=64)
        for name, want in table.items():
            assert (got[f"%{name}"] == want).all(), name


@pytest.mark.parametrize("kind", FORMATS)
def test_extremes_prefer_numbers_and_order_zeros(kind: str) -> None:
    """NaN is the result of two NaN. `abs` keeps the magnitude."""
    bits = 32 if kind == "f32" else 16
    inputs, outputs = {"%a": as_bits(A, kind), "%b": as_bits(B, kind)}, {"%l": bits, "%h": bits}
    body = f"min.{kind} %l, %a, %b; max.{kind} %h, %a, %b; abs.{kind} %m, %a;"
    got = run(body, inputs, {**outputs, "%m": bits}, threads=64)
    assert np.array_equal(as_floats(got["%m"], kind), np.abs(A), equal_nan=True)
    for lane in range(64):
        known = [x for x in (float(A[lane]), float(B[lane])) if not math.isnan(x)]
        known.sort(key=lambda x: (x, math.copysign(1, x)))
        want = [(known or [math.nan])[i] for i in (0, -1)]
        found = [float(as_floats(got[name], kind)[lane]) for name in outputs]
        assert list(map(repr, found)) == list(map(repr, want))


@pytest.mark.parametrize("kind", HALVES)
def test_conversions_of_floats(kind: str) -> None:
    """All 16-bit numbers, and fp32 numbers among them ties, subnormals and overflows."""
    every = np.arange(2**16, dtype=np.uint16)
    wide = as_floats(every, kind)
    got = run(f"cvt.f32.{kind} %d, %x;", {"%x": every}, {"%d": 32}, threads=1024, blocks=64)["%d"].view("f4")
    assert np.array_equal(got, wide, equal_nan=True)
    x = samples(32, 4096).view("f4").copy()
    with np.errstate(invalid="ignore"):
        x[:1024] = wide[::64] + np.append(np.diff(wide), np.float32(0))[::64] / 2  # halfway to the next
    x[1024:2048] = numbers("f32", 3, 1024) * np.float32(2.0**-14)
    inputs = {"%a": as_bits(x, "f32"), "%b": as_bits(x[::-1].copy(), "f32")}
    body = f"cvt.rn.{kind}.f32 %d, %a; cvt.rn.{kind}x2.f32 %p, %a, %b;"
    got = run(body, inputs, {"%d": 16, "%p": 32}, threads=1024, blocks=4)
    assert (got["%d"] == np.where(np.isnan(x), 0x7FFF, as_bits(x, kind))).all()
    assert (got["%p"] >> 16 == got["%d"]).all() and (got["%p"] & 0xFFFF == got["%d"][::-1]).all()


def test_conversions_to_e4m3_are_those_of_torch() -> None:
    """Codes, the numbers between two of them, ties to even, numbers beyond the largest, and NaN."""
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert np.array_equal(FROM_E4M3, every.double().numpy(), equal_nan=True)
    known = every[~every.isnan()].unique()
    middle = (known[1:] + known[:-1]) / 2
    near = [torch.nextafter(middle, torch.full_like(middle, end)) for end in (-1e9, 1e9)]
    x = torch.cat((known, middle, *near, torch.tensor([449.0, 465.0, -1e30, math.inf, -0.0, math.nan])))
    x = torch.nn.functional.pad(x, (0, -len(x) % 1024))
    want = x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    body, registers = "cvt.rn.satfinite.e4m3x2.f32 %d, %a, %b;", {"%a": x.flip(0).numpy(), "%b": x.numpy()}
    got = run(body, registers, {"%d": 16}, threads=len(x))["%d"].view(np.uint8).reshape(-1, 2)
    nan = np.isnan(x.numpy())  # of either sign
    assert np.array_equal(got[~nan, 0], want[~nan]) and (got[nan, 0] & 127 == 127).all()
    assert np.array_equal(got[::-1, 1][~nan], want[~nan])


def test_conversions_of_integers() -> None:
    x = samples(32, 256)
    values = np.array([0.0, 127.0, -127.0, 2.5, -2.5, 4e4, -4e4, np.nan, np.inf], np.float32)
    short = run("cvt.rzi.s16.f32 %d, %x;", {"%x": np.resize(values, 32).view("u4")}, {"%d": 16})["%d"].view(np.int16)
    assert short[:9].tolist() == [0, 127, -127, 2, -2, 32767, -32768, 0, 32767]
    got = run("cvt.rn.f32.s32 %s, %x; cvt.rn.f32.u32 %u, %x;", {"%x": x}, {"%s": 32, "%u": 32}, threads=256)
    for lane in range(256):
        for name, integer in (("%s", int(x.view(np.int32)[lane])), ("%u", int(x[lane]))):
            assert got[name].view("f4")[lane] == rounded(Fraction(integer), "f32")
    got = run("cvt.rn.f16.s16 %h, %x;", {"%x": x}, {"%h": 16}, threads=256)["%h"].view("f2")
    assert [float(h) for h in got] == [rounded(Fraction(int(integer)), "f16") for integer in x.astype(np.int16)]


def value(x: int, kind: str) -> int:
    width = int(kind[1:])
    x &= 2**width - 1
    return x - 2**width if kind[0] == "s" and x >> (width - 1) else x


def toward_zero(a: int, b: int) -> int:
    b = b or 3  # the test replaces divisors of 0
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def add_halves(a: int, b: int) -> int:
    return (a + b) % 2**16 + ((a >> 16) + (b >> 16)) % 2**16 * 2**16


def lop3(a: int, b: int, c: int, table: int) -> int:
    rows = [table >> (4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1)) & 1 for i in range(32)]
    return sum(bit << i for i, bit in enumerate(rows))


def prmt(a: int, b: int, selector: int) -> int:
    """Only sixteen bits of the selector count."""
    pool = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    nibbles = [selector >> 4 * i & 15 for i in range(4)]
    selected = [(0xFF if pool[n & 7] > 127 else 0) if n & 8 else pool[n & 7] for n in nibbles]
    return int.from_bytes(bytes(selected), "little")


# The result for unlimited integers, by opcode or by what precedes its type; the width of the result cuts it.
FORMULAS: dict[str, Callable[..., int]] = {
    "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "mul.wide": operator.mul, "div": toward_zero,
    "rem": lambda a, b: a - (b or 3) * toward_zero(a, b), "min": min, "max": max, "neg": operator.neg, "abs": abs,
    "mad.lo": lambda a, b, c: a * b + c, "mad.wide": lambda a, b, c: a * b + c, "max.relu": lambda a, b: max(a, b, 0),
    "and": operator.and_, "or": operator.or_, "xor": operator.xor, "not": operator.invert, "popc": int.bit_count,
    "shl": lambda a, by: a << min(by, 64), "shr": lambda a, by: a >> min(by, 64), "cvt": operator.pos, "prmt": prmt,
    "selp": lambda a, b, p: a if p else b, "add.s16x2": add_halves, "add.u16x2": add_halves,
}  # fmt: skip
FORMULAS |= {f"setp.{name}": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")}
for _bits in (16, 32):
    FORMULAS |= dict.fromkeys((f"mul.hi.s{_bits}", f"mul.hi.u{_bits}"), lambda a, b, bits=_bits: a * b >> bits)
# The opcode and its constants: the types of the other operands, the type of the result, a formula.
CASES: dict[str, tuple[list[str], str, Callable[..., int]]] = {
    "neg.f32": (["u32"], "u32", lambda a: a ^ 2**31),
    "abs.f32": (["u32"], "u32", lambda a: a % 2**31),
    "selp.f32": (["u32", "u32", "u1"], "u32", FORMULAS["selp"]),
    "shl.b32 40": (["u32"], "u32", lambda a: 0),
    "shr.s32 40": (["s32"], "u32", lambda a: a >> 40),
    "shr.u32 7": (["u32"], "u32", lambda a: a >> 7),
}
for _opcode, _build in MODELLED.items():
    _parts = _opcode.split(".")
    _name = "cvt" if _parts[0] == "cvt" and _parts[1][0] in "su" else _opcode.rpartition(".")[0]
    _formula = FORMULAS.get(_opcode, FORMULAS.get(_name) if re.fullmatch(r"[bsu]\d+|pred", _parts[-1]) else None)
    if _formula is not None:
        _kinds = ["u1" if kind == "pred" else kind.replace("b", "u") for kind in _build.types]
        _wide = f"{_kinds[0][0]}{2 * int(_kinds[0][1:])}"
        _results = {"setp": "u1", "popc": "u32", "cvt": _parts[1], "mul": _wide, "mad": _wide}
        _to = _kinds[0] if _parts[1] in ("lo", "hi") else _results.get(_parts[0], _kinds[0])
        CASES[_opcode] = _kinds, _to, _formula
for _begin, _length in ((0, 32), (4, 3), (31, 1), (15, 5), (0, 1)):
    for _type in "su":
        _kind = f"{_type}{_length}"
        CASES[f"bfe.{_type}32 {_begin}, {_length}"] = ["u32"], "u32", lambda a, k=_kind, by=_begin: value(a >> by, k)
for _table in (0xEA, 0x96, 0xE8, 0x01, 0xCA, 0x78):
    CASES[f"lop3.b32 {_table:#x}"] = ["u32"] * 3, "u32", partial(lop3, table=_table)
for _selector in (0x7701, 0x3210, 0x7654, 0x8F19, 0x0123):
    CASES[f"prmt.b32 {_selector:#x}U"] = ["u32"] * 2, "u32", partial(prmt, selector=_selector)


@pytest.mark.parametrize("case", CASES)
def test_results_equal_those_of_unlimited_integers(case: str) -> None:
    (opcode, _, constants), (kinds, to, formula) = case.partition(" "), CASES[case]
    inputs = {f"%a{i}": samples(max(16, int(kind[1:])), N, i) for i, kind in enumerate(kinds)}
    inputs |= {f"%a{i}": inputs[f"%a{i}"] % 2 == 1 for i, kind in enumerate(kinds) if kind == "u1"}
    if opcode.startswith("setp"):
        inputs["%a1"] = np.where(np.arange(N) % 3 == 0, inputs["%a0"], inputs["%a1"])
    if opcode.startswith(("div", "rem")):
        inputs["%a1"] = np.where(inputs["%a1"] == 0, inputs["%a1"].dtype.type(3), inputs["%a1"])
    operands = ", ".join([*inputs, *filter(None, [constants])])
    width = 16 if to[1:] == "8" else int(to[1:])  # no register has 8 bits
    got = run(f"{opcode} %d, {operands};", inputs, {"%d": width}, threads=N)["%d"]
    for lane in range(N):
        args = [value(int(inputs[f"%a{i}"][lane]), kind) for i, kind in enumerate(kinds)]
        assert int(got[lane]) == value(value(formula(*args), to), f"u{width}"), args


def test_moves_split_and_join_registers() -> None:
    x, y = samples(32, 32), samples(64, 32)
    body = """mov.b32 {%l, %h}, %x; mov.b32 %j, {%h, %l}; mov.b64 {_, %u}, %y; mov.b64 {%v, _}, %y;
        mov.b64 %w, {%u, %v}; mov.b16 %k, -3; mov.u32 %c, 0x1F; mov.b64 %z, 0; mov.pred %t, -1; mov.pred %f, 0;"""
    outputs = dict.fromkeys(("%l", "%h", "%k"), 16) | dict.fromkeys(("%j", "%u", "%v", "%c"), 32)
    outputs |= {"%w": 64, "%z": 64, "%t": 1, "%f": 1}
    got = run(body, {"%x": x, "%y": y}, outputs)
    assert (got["%j"] == (x << 16 | x >> 16)).all() and (got["%w"] == (y << 32 | y >> 32)).all()
    for name, constant in {"%k": 65533, "%c": 31, "%z": 0, "%t": True, "%f": False}.items():
        assert (got[name] == constant).all(), name


def test_bytes_of_a_register_become_floats() -> None:
    """As Triton 3.9 converts four codes of int8 to bf16 on sm_80."""
    x = samples(32, 256)
    body = """{ .reg .s8 s<4>; mov.b32 {s0, s1, s2, s3}, %x; cvt.rn.f32.s8 %a, s0; cvt.rn.f32.s8 %d, s3;
        cvt.rn.f32.u8 %u, s3; }"""
    got = run(body, {"%x": x}, dict.fromkeys(("%a", "%d", "%u"), 32), threads=256)
    bytes_of_x = x.view(np.int8).reshape(-1, 4)
    wants = {"%a": bytes_of_x[:, 0], "%d": bytes_of_x[:, 3], "%u": bytes_of_x[:, 3].view(np.uint8)}
    assert all((got[name].view(np.float32) == want).all() for name, want in wants.items())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("add.sat.s32 %d, %x, %x;", "not modelled: add.sat.s32"),
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
