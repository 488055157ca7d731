"""Floating-point instructions, compared with rationals that are rounded once, or with torch's conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from .harness import bits, compiled_only, run, samples

pytestmark = compiled_only

N = 512
# Bits of precision, the exponent of the smallest normal number, and that of the largest.
FORMATS = {"f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15)}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


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
    x = torch.from_numpy(rng.standard_normal(n).astype(np.float32) * 2.0 ** rng.integers(-6, 6, n))
    return x.to(DTYPES[kind]).float().numpy()


def as_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Return the bits of numbers of the format."""
    if kind == "f32":
        return bits(x, "f4")
    return bits(x, "f2") if kind == "f16" else (bits(x, "f4") >> 16).astype(np.uint16)


def as_floats(got: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f32":
        return got.view(np.float32)
    return got.view(np.float16).astype(np.float32) if kind == "f16" else (got.astype(np.uint32) << 16).view(np.float32)


ARITHMETIC: dict[str, Callable[..., Fraction]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
    "fma.rn": lambda a, b, c: a * b + c,
}  # fmt: skip


def check(name: str, kind: str, values: list[np.ndarray]) -> None:
    """Compare each lane's result with the exact one, rounded once."""
    inputs = {f"%a{i}": as_bits(x, kind) for i, x in enumerate(values)}
    width, n = 32 if kind == "f32" else 16, len(values[0])
    got = as_floats(run(f"{name}.{kind} %d, {', '.join(inputs)};", inputs, {"%d": width}, threads=n)["%d"], kind)
    for lane in range(n):
        args = [Fraction(float(x[lane])) for x in values]
        assert got[lane] == rounded(ARITHMETIC[name](*args), kind), list(map(float, args))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_rounded_once(name: str, kind: str) -> None:
    values = [numbers(kind, seed) for seed in range(3 if name == "fma.rn" else 2)]
    values[0][: N // 8], values[-1][: N // 16] = 0.0, 0.0
    check(name, kind, values)


def test_fp32_fma_near_ties_of_fp64() -> None:
    """The exact sums lie so near a tie between two fp32 numbers that fp64 rounds them to the tie."""
    tiny = 2.0**-60
    cases = [(2**-24 + 2**-47, 1, 1), (2.0**-24, 1, 1), (tiny, tiny, 1), (1 + 2**-23, 2**-24, 1), (tiny, tiny, -1)]
    cases += [(-(2.0**-25) * (1 + 2**-23), 1 - 2**-24, 1), (1 + 2**-12, 1 + 2**-12, 2.0**30)]
    check("fma.rn", "f32", list(np.array((cases * 32)[:32], np.float32).T.copy()))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("kind", "y", "z"), [("bf16", 2.0**126, 2.0**-114), ("f16", 1.0, 2.0**-14)])
def test_16_bit_fma_whose_sum_exceeds_fp64(kind: str, y: float, z: float, sign: int) -> None:
    x = 1 + 2.0 ** (1 - FORMATS[kind][0])
    check("fma.rn", kind, [np.full(32, value, np.float32) for value in (x, y, sign * z)])


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_pairs_equal_two_halves(kind: str) -> None:
    inputs = {f"%{name}": as_bits(numbers(kind, 10 + i, 2 * N), kind).view(np.uint32) for i, name in enumerate("abc")}
    body = "fma.rn.{0} %f, %a, %b, %c; add.{0} %s, %a, %b; mul.{0} %m, %a, %b; neg.{0} %n, %a;"
    names = ("%f", "%s", "%m", "%n")
    got = run(body.format(f"{kind}x2"), inputs, dict.fromkeys(names, 32), threads=N)
    for part in (0, 1):
        half = {name: x.view(np.uint16)[part::2].copy() for name, x in inputs.items()}
        want = run(body.format(kind), half, dict.fromkeys(names, 16), threads=N)
        assert all((got[name].view(np.uint16)[part::2] == want[name]).all() for name in names)


def test_division_and_functions() -> None:
    a, b = numbers("f32", 0), np.abs(numbers("f32", 1)) + np.float32(0.01)
    body = """div.full.f32 %q, %a, %b; div.rn.f32 %r, %a, %b; rsqrt.approx.ftz.f32 %s, %b; ex2.approx.ftz.f32 %e, %a;
        ex2.approx.f32 %x, %a;"""
    outputs = dict.fromkeys(("%q", "%r", "%s", "%e", "%x"), 32)
    found = run(body, {"%a": bits(a, "f4"), "%b": bits(b, "f4")}, outputs, threads=N)
    got = {name: found[name].view("f4") for name in outputs}
    for lane in range(N):
        exact = Fraction(float(a[lane])) / Fraction(float(b[lane]))
        assert got["%q"][lane] == got["%r"][lane] == rounded(exact, "f32")
    assert np.allclose(got["%s"], b.astype(float) ** -0.5, rtol=2**-23, atol=0)
    for name in ("%e", "%x"):
        assert np.allclose(got[name], 2.0 ** a.astype(float), rtol=2**-22, atol=0)


def test_ftz_flushes_subnormals() -> None:
    values = {"%x": -130.0, "%t": 2.0**-130, "%one": 1.0, "%z": 0.0}
    inputs = {name: bits(np.full(32, value), "f4") for name, value in values.items()}
    body = """ex2.approx.ftz.f32 %e, %x; ex2.approx.f32 %f, %x; ex2.approx.ftz.f32 %g, %t;
        fma.rn.ftz.f32 %h, %t, %one, %z; fma.rn.f32 %i, %t, %one, %z; mul.f32 %j, %t, %one;"""
    want = {"%e": 0.0, "%f": 2.0**-130, "%g": 1.0, "%h": 0.0, "%i": 2.0**-130, "%j": 2.0**-130}
    got = run(body, inputs, dict.fromkeys(want, 32))
    assert {name: float(got[name].view("f4")[0]) for name in want} == want


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


def test_extremes_prefer_numbers_and_order_zeros() -> None:
    body = "min.f32 %l, %a, %b; max.f32 %h, %a, %b; min.NaN.f32 %m, %a, %b; max.NaN.f32 %n, %a, %b;"
    inputs = {"%a": bits(A, "f4"), "%b": bits(B, "f4")}
    found = run(body, inputs, dict.fromkeys(("%l", "%h", "%m", "%n"), 32), threads=64)
    got = {name: value.view("f4") for name, value in found.items()}

    def order(x: float) -> tuple[float, float]:
        return x, math.copysign(1, x)

    for lane in range(64):
        known = sorted((x for x in (float(A[lane]), float(B[lane])) if not math.isnan(x)), key=order)
        for names, pick in (("lm", 0), ("hn", -1)):
            number, strict = (float(got[f"%{name}"][lane]) for name in names)
            assert order(number) == order(known[pick]) if known else math.isnan(number)
            assert order(strict) == order(known[pick]) if len(known) == 2 else math.isnan(strict)


def test_neg_and_abs_change_the_sign_bit() -> None:
    x = bits(np.tile(SPECIAL, 4), "f4")
    got = run("neg.f32 %n, %x; abs.f32 %a, %x;", {"%x": x}, {"%n": 32, "%a": 32})
    assert (got["%n"] == x ^ 0x80000000).all() and (got["%a"] == x & 0x7FFFFFFF).all()


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_conversions_of_floats(kind: str) -> None:
    """All 16-bit numbers, and fp32 numbers among them ties, subnormals and overflows."""
    every = np.arange(2**16, dtype=np.uint16)
    wide = torch.from_numpy(every.view(np.int16).copy()).view(DTYPES[kind]).float().numpy()
    got = run(f"cvt.f32.{kind} %d, %x;", {"%x": every}, {"%d": 32}, threads=1024, blocks=64)["%d"].view("f4")
    assert np.array_equal(got, wide, equal_nan=True)
    x = samples(32, 4096).view("f4").copy()
    with np.errstate(invalid="ignore"):
        x[:1024] = wide[::64] + np.append(np.diff(wide), np.float32(0))[::64] / 2  # halfway to the next
    x[1024:2048] = numbers("f32", 3, 1024) * np.float32(2.0**-14)
    want = torch.from_numpy(x).to(DTYPES[kind]).view(torch.int16).numpy().view(np.uint16)
    got16 = run(f"cvt.rn.{kind}.f32 %d, %x;", {"%x": bits(x, "f4")}, {"%d": 16}, threads=1024, blocks=4)["%d"]
    assert (got16 == np.where(np.isnan(x), 0x7FFF, want)).all()
    inputs = {"%a": bits(x, "f4"), "%b": bits(x[::-1].copy(), "f4")}
    pair = run(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", inputs, {"%d": 32}, threads=1024, blocks=4)["%d"]
    assert (pair >> 16 == got16).all() and (pair & 0xFFFF == got16[::-1]).all()


def test_conversions_between_floats_and_integers() -> None:
    x = samples(32, 256)
    edges = [math.nan, math.inf, -math.inf, 3e9, -3e9, 5e9, -0.5, 0.5] * 2
    y = np.concatenate([numbers("f32", 0, 240) * 1e3, edges]).astype(np.float32)
    body = "cvt.rn.f32.s32 %s, %x; cvt.rn.f32.u32 %u, %x; cvt.rzi.s32.f32 %i, %y; cvt.rzi.u32.f32 %j, %y;"
    got = run(body, {"%x": x, "%y": bits(y, "f4")}, dict.fromkeys(("%s", "%u", "%i", "%j"), 32), threads=256)
    for lane in range(256):
        for name, integer in (("%s", int(x.view(np.int32)[lane])), ("%u", int(x[lane]))):
            assert got[name].view("f4")[lane] == rounded(Fraction(integer), "f32")
        for name, least, most in (("%i", -(2**31), 2**31 - 1), ("%j", 0, 2**32 - 1)):
            number = 0.0 if math.isnan(y[lane]) else max(least, min(most, float(y[lane])))
            assert int(got[name][lane]) == math.trunc(number) % 2**32
