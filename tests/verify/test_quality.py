"""perplexity, beside a loop that reads each token's window anew; the held-out text that a folder brings."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mixtral_triton import Mixtral, reference
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.verification import held_out, perplexity, quality
from tests.support.models import random_model

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about sums of losses: run once, on the plain way")
IDS = torch.randint(23, (31,), generator=torch.Generator().manual_seed(0))


def by_loop(model: Mixtral, ids: torch.Tensor, context: int) -> float:
    """Token i from those of its window before it; numpy's fp64."""
    losses = []
    for i in range(1, len(ids)):
        start = (i - 1) // context * context
        logits = reference.forward(model, ids[None, start:i])[0, -1].double().numpy()
        losses.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[ids[i]])
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("context", "tokens"), [(8, 31), (7, 31), (1, 31), (30, 31), (64, 31), (5, 2)])
def test_it_is_the_loops(context: int, tokens: int) -> None:
    model = random_model()
    assert math.isclose(perplexity(model, IDS[:tokens], context), by_loop(model, IDS[:tokens], context), rel_tol=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary() -> None:
    model = random_model()
    model.lm_head.data.zero_()
    assert perplexity(model, IDS) == pytest.approx(23, rel=1e-12)


def test_a_model_that_is_sure_and_wrong_has_no_overflow() -> None:
    model = random_model()
    model.lm_head.data.mul_(1e6)
    assert perplexity(model, IDS) == math.inf


def test_its_window_is_the_models_positions_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model(max_position_embeddings=16)
    assert perplexity(model, IDS) == perplexity(model, IDS, 16) != perplexity(model, IDS, 8)
    monkeypatch.setattr(quality, "CONTEXT", 8)
    assert perplexity(model, IDS) == perplexity(model, IDS, 8)


def test_few_logits_are_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = random_model(max_position_embeddings=1024), []
    head = model.head
    monkeypatch.setattr(model, "head", lambda h: seen.append(len(h)) or head(h))
    text = torch.randint(23, (1001,), generator=torch.Generator().manual_seed(1))
    whole = perplexity(model, text)
    assert sum(seen) == 1000 and max(seen) == quality.ROWS
    monkeypatch.setattr(quality, "ROWS", 1)
    assert math.isclose(perplexity(model, text), whole, rel_tol=1e-6)


@pytest.mark.parametrize(
    ("ids", "context", "says"),
    [
        (IDS[None], None, r"ids' is \[1, 31\]"),
        (IDS[:1], None, "at least two"),
        ([1, 2], None, "list"),
        (IDS.float(), None, "int64"),
        (IDS + 1, None, "holds token 23"),
        (IDS, 0, "context is 0"),
        (IDS, 65, "context is 65, needs 1 to 64"),
    ],
)
def test_bad_input(ids: Any, context: int | None, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        perplexity(random_model(), ids, context)


def test_a_folder_brings_a_text_or_none(tmp_path: Path) -> None:
    config = random_model().config
    assert held_out(tmp_path, config) is None
    (tmp_path / "heldout.json").write_text('{"ids": [0, 22, 3]}')
    found = held_out(tmp_path, config)
    assert found is not None and found.dtype == torch.int64 and found.tolist() == [0, 22, 3]


@pytest.mark.parametrize("ids", [None, [], [1], [1, 23], [-1, 2], [1, 2.0], [True, 1], "12", {"0": 1}])
def test_a_text_that_is_none_is_refused(tmp_path: Path, ids: Any) -> None:
    (tmp_path / "heldout.json").write_text(json.dumps({"ids": ids}))
    with pytest.raises(ValueError, match=r"heldout\.json: ids has to be a list"):
        held_out(tmp_path, random_model().config)
