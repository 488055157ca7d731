"""Formats are leaves: in kernels/ the name of a format of weights, of the cache's, of what lies elsewhere stands in its
own file and in the registry. A kernel sees tiles; a launch asks the weight."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from mixtral_triton.kernels.weights import formats

KERNELS = Path(formats.__file__).parents[1]
# Names, and the files that may have them.
WEIGHTS = "|".join((*formats.FORMATS, "W8A8"))
NAMES = {
    rf"(?<!torch\.)(?<!tl\.)\b({WEIGHTS})\b": {
        *(f"weights/{name}.py" for name in ("int4", "int8", "fp8", "fp8_rows", "quantized_cache"))
    },
    r"QuantizedCache|quantized_cache": {"weights/quantized_cache.py"},
    r"[Oo]ffload|OFFLOADED|on_host|\bstaged\b": {"weights/offload.py"},
}
REGISTRY = {"weights/formats.py", "weights/composites.py"}
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
            if file not in own | REGISTRY:
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
