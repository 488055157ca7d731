"""verify, interpreted, on checkpoints of the hub's layouts: the kernels read what the loader put there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mixtral_triton import verify
from mixtral_triton.kernels.launch import INTERPRETED
from tests.support import hub

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="about kernels: with the interpreter")


@pytest.mark.parametrize("layout", ["awq 64", "ct int4 32 True", "gptq -1 1", "fp8 blocks"])
def test_the_kernels_read_what_the_loader_put_there(tmp_path: Path, layout: str) -> None:
    """Zeros and scales in fp16, groups of 32, one a row, fp8 in groups of columns: what quantizing here never makes."""
    hub.write(tmp_path, *hub.LAYOUTS[layout])
    ids = torch.randint(40, (1, 12), generator=torch.Generator().manual_seed(0))
    report = verify(tmp_path, ids)
    assert report.ok, str(report)
