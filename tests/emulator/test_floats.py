"""Each opcode of floats against rationals, rounded once, or against torch's conversions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_triton.kernels.launch import INTERPRETED

from .harness import bits, run, samples

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about a PTX emulator: run once, without the interpreter")

N = 512
# Bits of precision, the exponent of the smallest normal number, and that of the largest.
FORMATS = {"f32": (24, -126, 127), "bf16": (8, -126, 127), "f16": (11, -14, 15)}


def rounded(x: Fraction, kind: str) -> float:
    """To the nearest of the format, ties to even."""
    precision, least, most = FORMATS[kind]
    if x == 0:
        return 0.0
    exponent = max(least, math.frexp(abs(float(x)))[1] - 1 if abs(x) > Fraction(1, 2**1000) else least)
    while abs(x) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > least and abs(x) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - precision + 1)
    out = round(x / unit) * unit
    return float(out) if abs(out) < Fraction(2) ** (most + 1) else math.copysign(math.inf, out)


def numbers(kind: str, seed: int, n: int = N) -> np.ndarray:
    """Finite numbers of the format as fp32, of like sizes, so that sums cancel."""
    rng = np.random.default_rng(seed)
    x = torch.from_numpy(rng.standard_normal(n).astype(np.float32) * 2.0 ** rng.integers(-6, 6, n))
    return x.to({"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[kind]).float().numpy()


def as_bits(x: np.ndarray, kind: str) -> np.ndarray:
    """Exactly: the numbers are the format's."""
    if kind == "f32":
        return bits(x, "f4")
    return bits(x, "f2") if kind == "f16" else (bits(x, "f4") >> 16).astype(np.uint16)


def as_floats(got: np.ndarray, kind: str) -> np.ndarray:
    if kind == "f32":
        return got.view(np.float32)
    return got.view(np.float16).astype(np.float32) if kind == "f16" else (got.astype(np.uint32) << 16).view(np.float32)


def check(opcode: str, kind: str, formula: Callable[..., Fraction], count: int) -> None:
    values = [numbers(kind, seed) for seed in range(count)]
    values[0][: N // 8], values[-1][: N // 16] = 0.0, 0.0
    given = {f"%a{i}": as_bits(x, kind) for i, x in enumerate(values)}
    width = 32 if kind == "f32" else 16
    got = as_floats(run(f"{opcode} %d, {', '.join(given)};", given, {"%d": width}, threads=N)["%d"], kind)
    for lane in range(N):
        args = [Fraction(float(x[lane])) for x in values]
        want = rounded(formula(*args), kind)
        assert got[lane] == want, f"{opcode} of {list(map(float, args))}: {got[lane]}, not {want}"


ARITHMETIC: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b,
}  # fmt: skip


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_rounded_once(name: str, kind: str) -> None:
    check(f"{name}.{kind}", kind, ARITHMETIC[name], 2)


@pytest.mark.parametrize("kind", FORMATS)
def test_fma_is_rounded_once(kind: str) -> None:
    check(f"fma.rn.{kind}", kind, lambda a, b, c: a * b + c, 3)


def test_fma_where_two_roundings_would_show() -> None:
    """A product just beside the middle of two fp32 numbers, so near that fp64 takes it for the middle."""
    a, b, c = np.float32(2**-24 + 2**-47), np.float32(1.0), np.float32(1.0)
    tiny = np.float32(2.0**-60)
    cases = [(a, b, c), (np.float32(2.0**-24), b, c), (tiny, tiny, c), (np.float32(1 + 2**-23), np.float32(2**-24), c)]
    cases += [(np.float32(-(2.0**-25) * (1 + 2**-23)), np.float32(1 - 2**-24), np.float32(1.0))]
    cases += [(np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2.0**30)), (tiny, tiny, np.float32(-1))]
    x, y, z = (np.array([case[i] for case in cases] * 32, np.float32)[:32] for i in range(3))
    given = {f"%{name}": bits(value, "f4") for name, value in zip("abc", (x, y, z), strict=True)}
    got = run("fma.rn.f32 %d, %a, %b, %c;", given, {"%d": 32})["%d"].view(np.float32)
    for lane in range(32):
        exact = Fraction(float(x[lane])) * Fraction(float(y[lane])) + Fraction(float(z[lane]))
        assert got[lane] == rounded(exact, "f32"), lane


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_fma_of_16_bits_where_the_sum_has_more_bits_than_fp64(kind: str) -> None:
    one = 1 + 2.0 ** (1 - FORMATS[kind][0])
    for tiny in (2.0**-14, -(2.0**-14)):
        x, y = np.full(32, one, np.float32), np.full(32, 1.0, np.float32)
        y *= np.float32(2.0 ** (FORMATS[kind][2] - 1)) if kind == "bf16" else 1
        z = np.full(32, tiny, np.float32) * np.float32(2.0**-100 if kind == "bf16" else 1)
        given = {f"%{name}": as_bits(v, kind) for name, v in zip("abc", (x, y, z), strict=True)}
        got = as_floats(run(f"fma.rn.{kind} %d, %a, %b, %c;", given, {"%d": 16})["%d"], kind)
        exact = Fraction(float(x[0])) * Fraction(float(y[0])) + Fraction(float(z[0]))
        assert got[0] == rounded(exact, kind)


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_pairs_are_two_halves(kind: str) -> None:
    given = {f"%{name}": samples(32, N, seed) for seed, name in enumerate("abc")}
    for i, name in enumerate(given):  # finite halves
        given[name] = (as_bits(numbers(kind, 10 + i, 2 * N), kind)).view(np.uint32)
    body = f"""fma.rn.{kind}x2 %f, %a, %b, %c; add.{kind}x2 %s, %a, %b; mul.{kind}x2 %m, %a, %b; neg.{kind}x2 %n, %a;"""
    got = run(body, given, dict.fromkeys(("%f", "%s", "%m", "%n"), 32), threads=N)
    halves = {name: value.view(np.uint16) for name, value in given.items()}
    for part in (0, 1):
        half = {name: value[part::2].copy() for name, value in halves.items()}
        body = f"fma.rn.{kind} %f, %a, %b, %c; add.{kind} %s, %a, %b; mul.{kind} %m, %a, %b; neg.{kind} %n, %a;"
        want = run(body, half, dict.fromkeys(("%f", "%s", "%m", "%n"), 16), threads=N)
        for name in ("%f", "%s", "%m", "%n"):
            assert (got[name].view(np.uint16)[part::2] == want[name]).all()


def test_division_and_functions() -> None:
    a, b = numbers("f32", 0), np.abs(numbers("f32", 1)) + np.float32(0.01)
    body = "div.full.f32 %q, %a, %b; div.rn.f32 %r, %a, %b; rsqrt.approx.ftz.f32 %s, %b; ex2.approx.ftz.f32 %e, %a;"
    wanted = dict.fromkeys(("%q", "%r", "%s", "%e", "%x"), 32)
    got = run(body + "ex2.approx.f32 %x, %a;", {"%a": bits(a, "f4"), "%b": bits(b, "f4")}, wanted, threads=N)
    for lane in range(N):
        exact = Fraction(float(a[lane])) / Fraction(float(b[lane]))
        assert got["%q"].view("f4")[lane] == got["%r"].view("f4")[lane] == rounded(exact, "f32")
        assert math.isclose(got["%s"].view("f4")[lane], float(b[lane]) ** -0.5, rel_tol=2**-23)
        for name in ("%e", "%x"):
            assert math.isclose(got[name].view("f4")[lane], 2.0 ** float(a[lane]), rel_tol=2**-22)


def test_flushed_subnormals() -> None:
    """`.ftz` takes them for zeros and gives zeros for them; without it they stay."""
    tiny = np.full(32, 2.0**-130, np.float32)
    x = np.full(32, -130.0, np.float32)
    body = """ex2.approx.ftz.f32 %e, %x; ex2.approx.f32 %f, %x; ex2.approx.ftz.f32 %g, %t;
        fma.rn.ftz.f32 %h, %t, %one, %z; fma.rn.f32 %i, %t, %one, %z; mul.f32 %j, %t, %one;"""
    numbers = {"%x": x, "%t": tiny, "%one": np.ones(32), "%z": np.zeros(32)}
    given = {name: bits(value, "f4") for name, value in numbers.items()}
    got = run(body, given, dict.fromkeys(("%e", "%f", "%g", "%h", "%i", "%j"), 32))
    values = {name: float(got[name].view("f4")[0]) for name in ("%e", "%f", "%g", "%h", "%i", "%j")}
    assert values == {"%e": 0.0, "%f": 2.0**-130, "%g": 1.0, "%h": 0.0, "%i": 2.0**-130, "%j": 2.0**-130}


SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 2.5], np.float32)


def pairs() -> tuple[np.ndarray, np.ndarray]:
    a, b = np.meshgrid(SPECIAL, SPECIAL)
    return a.reshape(-1), b.reshape(-1)


@pytest.mark.parametrize("kind", FORMATS)
def test_comparisons_of_what_is_no_number(kind: str) -> None:
    a, b = pairs()
    ordered: dict[str, Callable[[float, float], bool]] = {
        "eq": lambda x, y: x == y, "lt": lambda x, y: x < y, "le": lambda x, y: x <= y,
        "gt": lambda x, y: x > y, "ge": lambda x, y: x >= y, "ne": lambda x, y: x < y or x > y,
    }  # fmt: skip
    table: dict[str, Callable[[float, float], bool]] = dict(ordered)
    for name, compare in ordered.items():
        table[f"{name}u"] = lambda x, y, c=compare: math.isnan(x) or math.isnan(y) or c(x, y)  # type: ignore[misc]
    table["num"] = lambda x, y: not (math.isnan(x) or math.isnan(y))
    table["nan"] = lambda x, y: math.isnan(x) or math.isnan(y)
    given = {"%a": as_bits(a, kind), "%b": as_bits(b, kind)}
    body = " ".join(f"setp.{name}.{kind} %{name}, %a, %b;" for name in table)
    got = run(body, given, {f"%{name}": 1 for name in table}, threads=64)
    for lane in range(64):
        for name, compare in table.items():
            assert got[f"%{name}"][lane] == compare(float(a[lane]), float(b[lane])), (name, a[lane], b[lane])


def test_extremes_prefer_numbers_and_know_the_sign_of_zero() -> None:
    a, b = pairs()
    body = "min.f32 %l, %a, %b; max.f32 %h, %a, %b; min.NaN.f32 %m, %a, %b; max.NaN.f32 %n, %a, %b;"
    given = {"%a": bits(a, "f4"), "%b": bits(b, "f4")}
    found = run(body, given, dict.fromkeys(("%l", "%h", "%m", "%n"), 32), threads=64)
    got = {name: value.view("f4") for name, value in found.items()}

    def order(x: float) -> tuple[float, float]:
        return x, math.copysign(1, x)

    for lane in range(64):
        both = [float(a[lane]), float(b[lane])]
        known = sorted((x for x in both if not math.isnan(x)), key=order)
        for names, pick in (("lm", 0), ("hn", -1)):
            plain, strict = float(got[f"%{names[0]}"][lane]), float(got[f"%{names[1]}"][lane])
            assert order(plain) == order(known[pick]) if known else math.isnan(plain)
            assert order(strict) == order(known[pick]) if len(known) == 2 else math.isnan(strict)


def test_signs() -> None:
    x = bits(np.tile(SPECIAL, 4), "f4")
    got = run("neg.f32 %n, %x; abs.f32 %a, %x;", {"%x": x}, {"%n": 32, "%a": 32})
    assert (got["%n"] == x ^ 0x80000000).all() and (got["%a"] == x & 0x7FFFFFFF).all()


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
def test_conversions_of_floats(kind: str, dtype: torch.dtype) -> None:
    """Of all bits of 16, and of fp32 among them ties, subnormals and what is too large."""
    every = np.arange(2**16, dtype=np.uint16)
    wide = torch.from_numpy(every.view(np.int16).copy()).view(dtype).float().numpy()
    got = run(f"cvt.f32.{kind} %d, %x;", {"%x": every}, {"%d": 32}, threads=1024, blocks=64)["%d"].view("f4")
    assert np.array_equal(got, wide, equal_nan=True)
    x = samples(32, 4096).view("f4").copy()
    x[:1024] = wide[::64] + np.diff(wide, append=0)[::64] / 2  # halfway to the next
    x[1024:2048] = numbers("f32", 3, 1024) * np.float32(2.0**-14)
    want = torch.from_numpy(x).to(dtype)
    got16 = run(f"cvt.rn.{kind}.f32 %d, %x;", {"%x": bits(x, "f4")}, {"%d": 16}, threads=1024, blocks=4)["%d"]
    same = got16 == want.view(torch.int16).numpy().view(np.uint16)
    assert (same | np.isnan(x)).all() and (got16[np.isnan(x)] == 0x7FFF).all()
    given = {"%a": bits(x, "f4"), "%b": bits(x[::-1].copy(), "f4")}
    pair = run(f"cvt.rn.{kind}x2.f32 %d, %a, %b;", given, {"%d": 32}, threads=1024, blocks=4)["%d"]
    assert (pair >> 16 == got16).all() and (pair & 0xFFFF == got16[::-1]).all()


def test_floats_of_integers_and_back() -> None:
    x = samples(32, 256)
    body = "cvt.rn.f32.s32 %s, %x; cvt.rn.f32.u32 %u, %x; cvt.rzi.s32.f32 %i, %y; cvt.rzi.u32.f32 %j, %y;"
    y = np.concatenate([numbers("f32", 0, 240) * 1e3, [math.nan, math.inf, -math.inf, 3e9, -3e9, 5e9, -0.5, 0.5] * 2])
    given = {"%x": x, "%y": bits(y, "f4")}
    got = run(body, given, dict.fromkeys(("%s", "%u", "%i", "%j"), 32), threads=256)
    for lane in range(256):
        unsigned = int(x[lane])
        signed = unsigned - 2**32 if unsigned >> 31 else unsigned
        assert got["%s"].view("f4")[lane] == rounded(Fraction(signed), "f32")
        assert got["%u"].view("f4")[lane] == rounded(Fraction(unsigned), "f32")
        number = float(np.float32(y[lane]))
        for name, least, most in (("%i", -(2**31), 2**31 - 1), ("%j", 0, 2**32 - 1)):
            whole: Any = 0 if math.isnan(number) else most if number == math.inf else least
            whole = math.trunc(number) if math.isfinite(number) else whole
            assert int(got[name][lane]) == max(least, min(most, whole)) % 2**32
