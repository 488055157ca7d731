"""A cache that is set back, refilled or used elsewhere, after failed forwards at any operation, and of other models:
the next result is that of a fresh cache, or a ValueError."""

import copy
import pickle
import random
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.kernels.operation import call
from tests.support.models import cache_of, computed, random_model, tokens

pytestmark = pytest.mark.compiled
V, LONGEST = 11, 40
make = partial(random_model, max_position_embeddings=30)


class Injected(Exception):
    """A failure of an operation, or Ctrl-C there."""


class FailAt:
    """Within the block the operation number `at` fails, before it runs or behind it."""

    def __init__(self, at: int, behind: bool) -> None:
        self.at, self.behind, self.original = at, behind, call.call_unchecked

    def __enter__(self) -> None:
        call.call_unchecked = self.run

    def __exit__(self, *error: Any) -> None:
        call.call_unchecked = self.original

    def run(self, op: Any, args: Any, key: Any = None) -> Any:
        self.at -= 1
        if self.at == 0 and not self.behind:
            raise Injected
        out = self.original(op, args, key)
        if self.at == 0:
            raise Injected
        return out


def edited(text: list[int], draw: random.Random) -> list[int]:
    """The text as it is, longer, or with other tokens near its end."""
    kind = draw.choice(["same", "longer", "newest", "newest", "earlier", "shorter"])
    if kind == "longer":
        text = text + [draw.randrange(V) for _ in range(draw.choice([1, 1, 2, 5]))]
    elif kind == "shorter":
        text = text[: max(1, len(text) - draw.choice([1, 1, 2, 4]))]
    elif kind != "same":
        back = 1 if kind == "newest" else draw.randint(2, 6)
        text = text[:-back] + [draw.randrange(V) for _ in range(back)] if len(text) > back else text
    return text[:LONGEST] or [1]


def wrong_after_failures(seed: int) -> str | None:
    """Continue texts in a cache, with failures, by generate or by forwards -> what is wrong, if anything."""
    draw = random.Random(seed)
    sizes = {"vocab_size": V, "sliding_window": draw.randint(1, 16), "num_hidden_layers": draw.randint(1, 2)}
    model = random_model(deterministic=draw.random() < 0.5, seed=seed % 3, **sizes)
    model.prefill_chunk = draw.choice([3, 5, 100])
    batch = draw.choice([1, 1, 2])
    cache = cache_of(model, batch, 64)
    text = [[draw.randrange(V) for _ in range(draw.randint(1, 30))] for _ in range(batch)]
    for turn in range(6):
        with FailAt(draw.randint(1, 40) if draw.random() < 0.6 else 0, draw.random() < 0.5), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                got = model.generate(text, draw.choice([1, 1, 2, 4]), cache=cache, logprobs=2, eos_token_id=[])
            except Injected:
                got = None
            except ValueError as error:
                if "forward failed after it had overwritten" not in str(error):
                    return f"turn {turn}: {error}"
                cache.lengths.zero_()
                continue
        if got is not None:
            for row, prompt, scores in zip(got.ids, text, got.logprobs, strict=True):
                want = model.score([row])[0][len(prompt) - 1 :]
                if not torch.allclose(scores, want, atol=1e-4):
                    return f"turn {turn}: {scores.tolist()} instead of {want.tolist()}"
            text = [row.tolist() for row in got.ids]
        if draw.random() < 0.3:  # forwards that a user calls, of which one fails
            with FailAt(draw.randint(1, 12), draw.random() < 0.5):
                try:
                    model(tokens(batch, draw.choice([1, 1, 3]), seed=seed, vocabulary=V), cache=cache)
                except Injected:
                    pass
                except ValueError:
                    cache.lengths.zero_()
        text = [edited(each, draw) for each in text]
    return None


@pytest.mark.slow
def test_random_failures_leave_a_right_result_or_a_value_error() -> None:
    assert {seed: wrong for seed in range(30) if (wrong := wrong_after_failures(seed))} == {}


@pytest.mark.slow
def test_a_thousand_random_failures() -> None:
    assert {seed: wrong for seed in range(30, 1060) if (wrong := wrong_after_failures(seed))} == {}


def filled(model: Mixtral, n: int = 9) -> tuple[KVCache, torch.Tensor]:
    cache, ids = cache_of(model, 1, 30), tokens(1, n)
    return cache, model.generate(ids, 3, cache=cache)


def test_lengths_that_a_caller_changes_do_not_hide_what_failed() -> None:
    model = random_model(sliding_window=6, deterministic=True)
    cache, new = cache_of(model, 1), torch.tensor([4], dtype=torch.int32)
    model(tokens(1, 5), cache=cache)
    with FailAt(9, behind=False), pytest.raises(Injected):  # behind the first layer's append
        model(tokens(1, 4), cache=cache, lengths=new)
    new.zero_()
    cache.lengths.fill_(4)
    with pytest.raises(ValueError, match="forward failed after it had overwritten keys"):
        model(tokens(1, 1), cache=cache)


def test_a_cache_knows_the_model_that_filled_it() -> None:
    model, other = random_model(), random_model(seed=1)
    cache, text = filled(model)
    with pytest.raises(ValueError, match=r"cache' has keys that another model filled in, .* or lengths of 0"):
        other(text[:, -1:], cache=cache)
    with pytest.warns(RuntimeWarning, match="computed from its start: the cache was filled by another model"):
        assert torch.equal(other.generate(text, 3, cache=cache), other.generate(text, 3))
    assert cache.reused == [0]
    for again in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert torch.equal(other.generate(text, 4, cache=again), other.generate(text, 4))
        assert again.reused == [text.shape[1] - 1]
    cache.grow(40)
    with pytest.warns(RuntimeWarning, match="filled by another model"):
        model.generate(text, 1, cache=cache)
    cache.lengths.zero_()
    model(text, cache=cache)


def test_lengths_written_between_steps_are_noticed() -> None:
    model = random_model()
    cache = cache_of(model, 1)
    steps = model.stream(tokens(1, 3), 4, cache=cache)
    next(steps)
    next(steps)
    cache.lengths.fill_(2)
    with pytest.raises(ValueError, match="or its lengths were written"):
        next(steps)


@pytest.mark.parametrize("window", [None, 4])
def test_no_new_tokens_fill_the_cache_but_for_the_newest(window: int | None) -> None:
    model, ids = random_model(sliding_window=window), tokens(1, 9)
    cache = cache_of(model, 1)
    assert torch.equal(model.generate(ids, 0, cache=cache), ids)
    assert cache.lengths.tolist() == [8]
    assert torch.equal(model.generate(ids, 3, cache=cache), model.generate(ids, 3)) and cache.reused == [8]


@pytest.mark.parametrize(
    ("window", "same", "kept"), [(None, 4, 4), (None, 13, 13), (None, 0, 0), (5, 13, 13), (5, 12, 0)]
)
def test_a_cache_is_set_back_or_refilled_where_the_text_differs(
    window: int | None, same: int, kept: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """14 tokens are held. A ring that has moved on can lose its newest token alone."""
    model, ids = make(device, sliding_window=window), tokens(1, 10, device=device)
    cache = KVCache(model.config, 1, 30, device, model.dtype)
    text = model.generate(ids, 5, cache=cache)
    changed = torch.cat((text[:, :same], (text[:, same : same + 1] + 1) % 23, text[:, same + 1 :]), 1)
    counts = computed(model, monkeypatch)
    with (
        pytest.warns(RuntimeWarning, match=r"other tokens are in the cache from 12 on.*ring")
        if kept != same
        else nullcontext()
    ):
        got = model.generate(changed, 3, cache=cache)
    assert counts == [15 - kept, 1, 1] and cache.reused == [kept]
    assert torch.equal(got, model.generate(changed, 3))


def test_a_ring_that_was_set_back_before_a_failure_still_knows_what_it_lost() -> None:
    """The newest of 14 tokens may go, and the call fails before any forward: one more may not go."""
    model, ids = make(sliding_window=5, deterministic=True), tokens(1, 10)
    cache = KVCache(model.config, 1, 30, "cpu", model.dtype)
    text = model.generate(ids, 5, cache=cache)
    for place in (13, 12):
        changed = text.clone()
        changed[:, place:] = (changed[:, place:] + 1) % 23
        with FailAt(int(place == 13), behind=False), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            with pytest.raises(Injected) if place == 13 else nullcontext():
                got = model.generate(changed, 3, cache=cache)
    assert cache.reused == [0] and torch.equal(got, model.generate(changed, 3))


@pytest.mark.parametrize("window", (None, 5))
def test_a_sequence_that_ends_is_not_appended_to(window: int | None, device: torch.device) -> None:
    """Its EOS, repeated until the last sequence ends, would take the slots of a ring."""
    prompts = [tokens(T, seed=T, device=device) for T in (6, 2)]
    plain = [text.tolist() for text in make(device, sliding_window=window).generate(prompts, 12)]
    model = make(device, sliding_window=window, eos_token_id=(eos := plain[0][8]))
    cache = KVCache(model.config, 2, 30, device, model.dtype)
    texts = model.generate(prompts, 12, cache=cache)
    assert len(texts[0]) == 9 < len(texts[1]) and eos not in texts[1][2:].tolist()[:5]
    assert cache.lengths.tolist() == [len(text) - 1 for text in texts]
    longer = [torch.cat((text, tokens(2, device=device))) for text in texts]
    got, want = model.generate(longer, 3, cache=cache), model.generate(longer, 3)
    assert [text.tolist() for text in got] == [text.tolist() for text in want]
    assert cache.reused == [len(text) - 1 for text in texts]


@pytest.mark.parametrize("window", (None, 5))
def test_a_cache_after_other_use(window: int | None, device: torch.device) -> None:
    model, ids = make(device, sliding_window=window), tokens(1, 10, device=device)
    cache, want = KVCache(model.config, 1, 16, device, model.dtype), model.generate(ids, 4)
    model(ids[:, :6], cache=cache)  # a forward is known on a CPU alone
    warned = pytest.warns(RuntimeWarning, match="host does not know") if device.type == "cuda" else nullcontext()
    first = model.stream(ids, 4, cache=cache)
    with warned:
        token = next(first)
    assert token.tolist() == want[:, 10].tolist() and next(first).tolist() == want[:, 11].tolist()
    assert cache.lengths.tolist() == [11] and cache.reused == [0 if device.type == "cuda" else 6]
    assert torch.equal(model.generate(want[:, :12], 2, cache=cache), want) and cache.reused == [11]
    with pytest.raises(ValueError, match="cache has gone on in another call"):
        next(first)
    if window is None:
        with pytest.raises(ValueError, match="reach 17 tokens, beyond the cache's slots, 16"):
            model.generate(want, 4, cache=cache)
    longer = torch.cat((want, ids), 1)[:, :16]
    cache.conversation.texts = None  # as after a forward in a graph
    with pytest.warns(RuntimeWarning, match="host does not know"):
        assert torch.equal(model.generate(longer, 1, cache=cache), model.generate(longer, 1))
