"""The PTX that unpacks quantized weights, evaluated without a GPU: every pair of halves, exactly.

The evaluator reads the very strings that are compiled, and knows nothing of what they are for.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_triton.kernels import unpack

HALVES = np.arange(1 << 16, dtype=np.uint32)
FLOATS = {"BF16": torch.bfloat16, "FP16": torch.float16}


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Bit 4a + 2b + c of the table, for each bit of the words."""
    out = np.zeros_like(a | b | c)
    for row in range(8):
        if table >> row & 1:
            picked = [word if row >> place & 1 else ~word for word, place in ((a, 2), (b, 1), (c, 0))]
            out |= picked[0] & picked[1] & picked[2]
    return out


def halves_of(words: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    """Low and high halves as floats, in fp64."""
    parts = [((words >> shift) & 0xFFFF).astype(np.uint16).view(np.int16) for shift in (0, 16)]
    return [torch.from_numpy(part.copy()).view(dtype).double() for part in parts]


def words_of(halves: list[torch.Tensor], dtype: torch.dtype) -> Any:
    low, high = (half.to(dtype).view(torch.int16).numpy().view(np.uint16).astype(np.uint32) for half in halves)
    return low | high << 16


def fma(a: Any, b: Any, c: Any, dtype: torch.dtype) -> Any:
    """Rounded once: in fp64 the product of two halves is exact, and so are the sums here."""
    parts = zip(*(halves_of(word, dtype) for word in (a, b, c)), strict=True)
    return words_of([x * y + z for x, y, z in parts], dtype)


def evaluate(ptx: str, *inputs: Any) -> Any:
    """$0 of a piece of PTX for arrays $1, $2, ... of 32-bit words."""
    registers: dict[str, Any] = {f"${number}": word for number, word in enumerate(inputs, 1)}
    size = max(np.size(word) for word in inputs)

    def operand(text: str) -> Any:
        value = registers[text] if text in registers else np.uint32(int(text, 0))
        return np.broadcast_to(value, (size,)).astype(np.uint32)

    body = re.fullmatch(r"\{ \.reg \.b32 [a-z, ]+; (.*) \}", ptx)
    assert body, ptx
    for line in filter(None, map(str.strip, body[1].split(";"))):
        opcode, rest = line.split(" ", 1)
        target, *names = (name.strip() for name in rest.split(","))
        table = int(names.pop(), 0) if opcode == "lop3.b32" else 0
        a, *more = map(operand, names)
        match opcode:
            case "mov.b32":
                result = a
            case "shl.b32":
                result = a << more[0]
            case "shr.b32":
                result = a >> more[0]
            case "and.b32":
                result = a & more[0]
            case "lop3.b32":
                result = lop3(a, *more, table)
            case "fma.rn.bf16x2":
                result = fma(a, *more, torch.bfloat16)
            case "fma.rn.f16x2":
                result = fma(a, *more, torch.float16)
            case _:
                raise ValueError(f"what does {opcode} do?")
        registers[target] = result
    return registers["$0"]


def field(format: str, number: int) -> torch.Tensor:
    """What field `number` of each half stands for, as torch reads it; int4: its code."""
    if format == "INT4":
        return torch.from_numpy(HALVES >> (4 * number) & 15).double()
    codes = torch.from_numpy((HALVES >> (8 * number) & 255).astype(np.uint8))
    return codes.view(torch.int8).double() if format == "INT8" else codes.view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("format", ["INT4", "INT8", "FP8"])
def test_each_half_beside_any_other(format: str, name: str) -> None:
    """All 65,536 as the low half, and as the high one, beside others: no bit leaks."""
    ptx = getattr(unpack, f"{format}_{name}").value
    bias = {"BF16": 128, "FP16": 1024}[name] if format == "INT4" else 0
    others = np.random.default_rng(0).permutation(HALVES)
    for number in range(4 if format == "INT4" else 2):
        shift = np.uint32(8 - 8 * number if format == "FP8" else (4 if format == "INT4" else 8) * number)
        want = field(format, number) + bias
        known = want.isfinite()  # codes 0x7F and 0xFF of fp8 are NaN, and refused where weights are made
        for place, words in enumerate((HALVES | others << 16, others | HALVES << 16)):
            got = halves_of(evaluate(ptx, words, shift), FLOATS[name])[place]
            assert torch.equal(got[known], want[known])


@pytest.mark.parametrize("name", FLOATS)
def test_zeros_and_scales(name: str) -> None:
    """Codes less zeros exactly; then times a scale, rounded once."""
    dtype, bias = FLOATS[name], {"BF16": 128, "FP16": 1024}[name]
    codes, zeros = (x.flatten() for x in torch.meshgrid(*[torch.arange(16.0).double()] * 2, indexing="ij"))
    words = words_of([codes + bias, codes.flip(0) + bias], dtype), words_of([zeros + bias, zeros.flip(0) + bias], dtype)
    minus = evaluate(getattr(unpack, f"MINUS_{name}").value, *words)
    assert torch.equal(halves_of(minus, dtype)[0], codes - zeros)
    scales = torch.rand(256, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = evaluate(getattr(unpack, f"TIMES_{name}").value, minus, words_of([scales, scales], dtype))
    assert torch.equal(halves_of(times, dtype)[0].to(dtype), ((codes - zeros) * scales.double()).to(dtype))


@pytest.mark.parametrize(
    ("right", "wrong"), [("0x43004300", "0x43004380"), ("0xEA", "0xE8"), ("0x000F000F", "0x000F001F")]
)
def test_a_changed_constant_is_seen(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert right in unpack.INT4_BF16.value
    monkeypatch.setattr(unpack.INT4_BF16, "value", unpack.INT4_BF16.value.replace(right, wrong))
    with pytest.raises(AssertionError):
        test_each_half_beside_any_other("INT4", "BF16")
