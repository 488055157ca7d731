"""The checkpoint that ships with the package: a trained Mixtral, balanced, small, and what its training log says."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from mixtral_triton import Mixtral
from mixtral_triton.cli import SMALL
from mixtral_triton.verification import held_out, perplexity

pytestmark = pytest.mark.compiled
TOKENIZER = str(SMALL / "tokenizer.json")
LOG = json.loads((SMALL / "training.json").read_text())


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return Mixtral.from_pretrained(SMALL, device="cpu", dtype=torch.float32)


def test_size_shape_and_shares_of_the_experts(model: Mixtral) -> None:
    assert (SMALL / "model.safetensors").stat().st_size < 10_000_000
    config, shares = model.config, torch.tensor(LOG["expert_shares"])
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (8, 2, 64)
    assert shares.shape == (4, 8) and shares.min() >= 0.03
    torch.testing.assert_close(shares.sum(1), torch.ones(4), rtol=0, atol=1e-2)


def test_it_has_learnt_english_of_the_python_documentation(model: Mixtral) -> None:
    """Far better than chance on a text of that kind, and its own continuation is words that the text would use."""
    tokenizer = Tokenizer.from_file(TOKENIZER)
    config, text = model.config, held_out(SMALL, model.config)
    assert text is not None and len(text) > 4000
    ends = (text == config.eos_token_id).nonzero().flatten()  # of whole documents, each from <s> to </s>
    assert text[0] == config.bos_token_id and ends[-1] == len(text) - 1
    assert (text[ends[:-1] + 1] == config.bos_token_id).all() and len(ends) == (text == config.bos_token_id).sum()
    assert "breaking out of the normal flow of control" in " ".join(tokenizer.decode(text.tolist()).split())
    loss = math.log(perplexity(model, text))
    assert loss < 0.6 * math.log(config.vocab_size)
    assert abs(loss - LOG["held_out_loss"]) < 0.4  # a part of what the log is about, read in longer windows
    prompt = torch.tensor([[config.bos_token_id, *tokenizer.encode("The function", add_special_tokens=False).ids]])
    words = tokenizer.decode(model.generate(prompt, max_new_tokens=40)[0].tolist()).lower().split()
    assert len({"the", "a", "is", "of", "and", "to", "in", "be", "an", "or"} & set(words)) >= 3


def test_its_tokenizer_has_a_beginning_an_end_and_padding() -> None:
    """For transformers' AutoTokenizer; the texts and tokens are those of the tokenizer itself."""
    transformers = pytest.importorskip("transformers")
    found, tokenizer = transformers.AutoTokenizer.from_pretrained(SMALL), Tokenizer.from_file(TOKENIZER)
    config = json.loads((SMALL / "config.json").read_text())
    assert (found.bos_token_id, found.eos_token_id) == (config["bos_token_id"], config["eos_token_id"])
    assert found.pad_token_id == found.eos_token_id and found.model_max_length == config["max_position_embeddings"]
    text = "The return statement , a list .\n    x = [1, 2]  # naïve"
    ids = found(text).input_ids
    assert ids == tokenizer.encode(text).ids and found.decode(ids, skip_special_tokens=True) == text
    padded = found([text, "A list"], padding=True, return_tensors="pt")
    assert padded.attention_mask.sum(1).tolist() == [len(ids), len(found("A list").input_ids)]


def test_what_the_training_writes_besides_weights_is_what_is_shipped(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from benchmarks.train_small import save_text

    save_text(Tokenizer.from_file(TOKENIZER), tmp_path)
    same_topics = platform.python_version() == LOG["python"]  # of help(), which are the held-out text
    for name in ("tokenizer.json", "tokenizer_config.json", *(["heldout.json"] if same_topics else [])):
        assert (tmp_path / name).read_bytes() == (SMALL / name).read_bytes()
