"""A GPU that torch reports and that does not exist: what reaches for it without being marked `gpu` fails.

python -m pytest -p tests.support.fake_gpu
python -m tests.support.fake_gpu FILE ARGUMENTS
"""

import runpy
import sys
from typing import Any

import torch


def is_visible() -> bool:
    """Return whether the caller's caller sees the GPU. Those that ask any GPU for its state do not: torch's compiler,
    and transformers where it loads quantized weights."""
    return not sys._getframe(2).f_globals.get("__name__", "").startswith(("torch.", "transformers.quantizers."))


torch.cuda.is_available = lambda: is_visible()
torch.cuda.device_count = lambda: int(is_visible())


def pytest_collection_modifyitems(items: list[Any]) -> None:
    import pytest

    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a GPU that exists"))


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
