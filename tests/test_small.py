"""The checkpoint that ships with the package: a trained Mixtral, balanced, small, and what its training log says."""

from __future__ import annotations

import json

import pytest
import torch
from tokenizers import Tokenizer

from mixtral_triton import Mixtral, reference
from mixtral_triton.cli import SMALL
from mixtral_triton.kernels.launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about the weights: run once, on the plain way")
LOG = json.loads((SMALL / "training.json").read_text())


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return Mixtral.from_pretrained(SMALL, device="cpu", dtype=torch.float32)


def test_size_and_shape(model: Mixtral) -> None:
    assert (SMALL / "model.safetensors").stat().st_size < 10_000_000
    config = model.config
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (8, 2, 64)


def test_every_expert_is_used() -> None:
    shares = torch.tensor(LOG["expert_shares"])
    assert shares.shape == (4, 8)
    torch.testing.assert_close(shares.sum(1), torch.ones(4), rtol=0, atol=1e-2)
    assert shares.min() >= 0.03


def test_it_has_learnt_english_of_the_python_documentation(model: Mixtral) -> None:
    """Far better than chance on a text of that kind, and its own continuation is words that the text would use."""
    tokenizer = Tokenizer.from_file(str(SMALL / "tokenizer.json"))
    text = "The return statement leaves the current function call with the expression list (or None) as return value."
    ids = torch.tensor([[model.config.bos_token_id, *tokenizer.encode(text, add_special_tokens=False).ids]])
    logits = reference.forward(model, ids)
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
    assert loss < 0.6 * torch.tensor(float(model.config.vocab_size)).log()
    prompt = torch.tensor(
        [[model.config.bos_token_id, *tokenizer.encode("The function", add_special_tokens=False).ids]]
    )
    words = tokenizer.decode(model.generate(prompt, max_new_tokens=40)[0].tolist()).lower().split()
    assert len({"the", "a", "is", "of", "and", "to", "in", "be", "an", "or"} & set(words)) >= 3


def test_the_log_says_how_it_was_made() -> None:
    assert {"seed", "steps", "tokens_seen", "train_loss", "held_out_loss", "torch", "transformers"} <= set(LOG)
    assert LOG["held_out_loss"] < 4.0
