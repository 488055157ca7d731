"""Formats are leaves: the name of a format of weights, of the cache's, of what lies elsewhere stands in its own file
and in the registry. A kernel sees tiles; a launch asks the weight; the runtime asks the format.

And the PTX of each format: the emulator runs the strings that are compiled, for every pair of 16-bit halves."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import triton.language as tl

from mixtral_triton.kernels.weights import formats, fp8, int4, int8, packing
from tests.cli.commands import ROOT
from tests.emulator.harness import run

KERNELS = Path(formats.__file__).parents[1]
# Names, and the files that may have them.
WEIGHTS = "|".join((*formats.FORMATS, "W8A8"))
NAMES = {
    rf"(?<!torch\.)(?<!tl\.)\b({WEIGHTS})\b": {"int4", "int8", "fp8", "fp8_rows", "quantized_cache"},
    r"QuantizedCache|quantized_cache": {"quantized_cache"},
    r"[Oo]ffload|OFFLOADED|on_host|\bstaged\b": {"offload"},
}
REGISTRY = {"formats", "names", "composite_args"}
EXCEPTIONS = {
    "ops/linear.py": "its cases name the formats that tests and benchmarks draw",
    "ops/experts/op.py": "the same",
    "ops/attention/op.py": "its cases name the cache's format",
    "ops/rope.py": "the same",
    "ops/tiles.py": "a GPU's measurement is named after its file",
}


def sources() -> dict[str, str]:
    return {str(path.relative_to(KERNELS)): path.read_text() for path in KERNELS.rglob("*.py")}


def misplaced(files: Mapping[str, str]) -> Iterator[str]:
    """The lines that name a format, with their files."""
    for file, text in files.items():
        for names, own in NAMES.items():
            if file not in {f"weights/{name}.py" for name in own | REGISTRY}:
                yield from (f"{file}: {line.strip()}" for line in text.splitlines() if re.search(names, line))


def test_a_format_is_named_in_its_file_and_in_the_registry_alone() -> None:
    found = [*misplaced(sources())]
    assert not [line for line in found if line.partition(":")[0] not in EXCEPTIONS]
    assert {line.partition(":")[0] for line in found} == {*EXCEPTIONS} and len(EXCEPTIONS) <= 6


@pytest.mark.parametrize(
    "line", ['if LAYOUT.format == "int4":', "if format == W8A8:", "isinstance(x, QuantizedCache)", "weight.on_host"]
)
def test_a_name_in_another_file_is_found(line: str) -> None:
    files = sources()
    assert [*misplaced({"ops/sort.py": f"{files['ops/sort.py']}\n{line}\n"})] == [f"ops/sort.py: {line}"]


RUNTIME = ROOT / "mixtral_triton"
# Where the runtime has the name of a format as a value, not in a sentence.
NAMED_IN_RUNTIME = {
    "bench/compile.py": "the cache's",
    "bench/decode_step.py": "the cache's",
    "bench/fit.py": "the mixtures that fit compares",
    "cli/commands.py": "the activations' and the cache's",
    "hf/quantizer.py": "the public default",
    "model/mixtral.py": "the activations'",
    "quantize/layouts.py": "transformers' name of a quantization",
}


def named_in_runtime(text: str) -> set[str]:
    names = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    return {name for name in formats.FORMATS if name in names}


def test_the_runtime_names_no_format() -> None:
    files = [path for path in RUNTIME.rglob("*.py") if "kernels" not in path.relative_to(RUNTIME).parts]
    found = {str(path.relative_to(RUNTIME)) for path in files if named_in_runtime(path.read_text())}
    assert found == {*NAMED_IN_RUNTIME}
    assert named_in_runtime('groups = weight.format != "int4"') == {"int4"} and not named_in_runtime('"int4 or int8"')
    assert [*formats.BITS] == [name for name, format in formats.FORMATS.items() if not format.multiplies_codes]


LEAVES: dict[str, Any] = {"int4": int4, "int8": int8, "fp8": fp8}
HALVES = np.arange(1 << 16, dtype=np.uint32)
HALF_TYPES = {"BF16": torch.bfloat16, "FP16": torch.float16}
BIAS = {"BF16": 128, "FP16": 1024}  # of int4


def to_halves(words: Any, dtype: torch.dtype) -> torch.Tensor:
    """The low and high halves of words as floats, [2, words] in fp64."""
    return torch.from_numpy(words.view(np.int16).reshape(-1, 2).copy()).view(dtype).double().T


def to_words(low: torch.Tensor, high: torch.Tensor, dtype: torch.dtype) -> Any:
    return torch.stack((low, high), -1).to(dtype).view(torch.int16).numpy().view(np.uint32).ravel()


def evaluate(ptx: str, *words: Any) -> Any:
    """Compute $0 of a piece of PTX for arrays $1, $2, ... of 32-bit words, or one word for all, in the emulator."""
    size = max(word.size for word in words)
    padded = {f"%r{at}": np.resize(word, -(-size // 1024) * 1024) for at, word in enumerate(words, 1)}
    return run(ptx.replace("$", "%r"), padded, {"%r0": 32}, threads=1024, blocks=-(-size // 1024))["%r0"][:size]


def expected_field(format: str, number: int) -> torch.Tensor:
    """The value of field `number` of each half, as torch reads it; of int4 the code."""
    if format == "int4":
        return torch.from_numpy(HALVES >> (4 * number) & 15).double()
    codes = torch.from_numpy((HALVES >> (8 * number) & 255).astype(np.uint8))
    return codes.view(torch.int8).double() if format == "int8" else codes.view(torch.float8_e4m3fn).double()


@pytest.mark.parametrize("name", HALF_TYPES)
@pytest.mark.parametrize("format", LEAVES)
def test_ptx_unpacks_every_half(format: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the 65,536 values is the low half and the high half beside another value: no bit leaks. The piece of PTX
    and how far it shifts for each field are those of the format's values."""
    leaf = LEAVES[format]
    monkeypatch.setattr(leaf, "unpack_field", lambda tile, shift, ptx, dtype: (ptx.value, shift))
    monkeypatch.setattr(leaf, "apply_to_pairs", lambda moved, zero, ptx, dtype: moved, raising=False)
    triton_type = {"BF16": tl.bfloat16, "FP16": tl.float16}[name]
    neighbours = np.random.default_rng(0).permutation(HALVES)
    for number in range(formats.FORMATS[format].fields):
        ptx, shift = getattr(leaf, f"{format}_values").fn(None, number, mock.MagicMock(), triton_type, True)
        want = expected_field(format, number) + (BIAS[name] if format == "int4" else 0)
        finite = want.isfinite()  # codes 0x7F and 0xFF of fp8 are NaN, and rejected where weights are made
        for place, words in enumerate((HALVES | neighbours << 16, neighbours | HALVES << 16)):
            got = to_halves(evaluate(ptx, words, np.uint32(shift)), HALF_TYPES[name])[place]
            assert torch.equal(got[finite], want[finite])


@pytest.mark.parametrize("name", HALF_TYPES)
def test_ptx_subtracts_zeros_and_multiplies_by_scales(name: str) -> None:
    """The difference is exact, the product rounded once."""
    dtype, bias = HALF_TYPES[name], BIAS[name]
    codes, zeros = (x.flatten() for x in torch.meshgrid(*[torch.arange(16.0).double()] * 2, indexing="ij"))
    words = (to_words(x + bias, x.flip(0) + bias, dtype) for x in (codes, zeros))
    minus = evaluate(getattr(int4, f"MINUS_{name}").value, *words)
    assert torch.equal(to_halves(minus, dtype)[0], codes - zeros)
    scales = torch.rand(256, generator=torch.Generator().manual_seed(0)).to(dtype)
    times = evaluate(getattr(packing, f"TIMES_{name}").value, minus, to_words(scales, scales, dtype))
    assert torch.equal(to_halves(times, dtype)[0].to(dtype), ((codes - zeros) * scales.double()).to(dtype))


@pytest.mark.parametrize(
    ("right", "wrong"), [("0x43004300", "0x43004380"), ("0xEA", "0xE8"), ("0x000F000F", "0x000F001F")]
)
def test_wrong_constant_in_the_ptx_is_caught(right: str, wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert right in int4.CODES_BF16.value
    monkeypatch.setattr(int4.CODES_BF16, "value", int4.CODES_BF16.value.replace(right, wrong))
    with pytest.raises(AssertionError):
        test_ptx_unpacks_every_half("int4", "BF16", monkeypatch)
