"""Generation beside a loop of argmax over the whole text; ragged prompts, EOS, caches that go on, log
probabilities, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from torch import Tensor

from mixtral_triton import SMALL, KVCache, Mixtral, reference
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.model import generate
from mixtral_triton.model.cache import cache_bytes
from mixtral_triton.model.sampling import Logprobs, SamplingOptions, penalize
from tests.support.faults import Inject, in_step, replace_by
from tests.support.models import HELD_OUT, cache_of, computed, random_model, seeded, tokens
from tests.support.selection import slow_interpreted

V, P = 23, 30
NEW = 3 if INTERPRETED else 12
Make = Callable[..., Mixtral]


@pytest.fixture
def make(device: torch.device) -> Make:
    """Changes of the configuration -> a model with random weights in fp32."""
    sizes = {"vocab_size": V, "max_position_embeddings": P, "sliding_window": 5}
    return lambda **changes: random_model(device, **sizes | changes)


def logits_of(model: Mixtral, ids: Tensor) -> Tensor:
    """Of the whole text, without a cache; interpreted, that would take minutes."""
    return reference.forward(model, ids) if INTERPRETED else model(ids)


def argmax_loop(model: Mixtral, ids: Tensor, n: int) -> Tensor:
    for _ in range(n):
        ids = torch.cat((ids, logits_of(model, ids)[:, -1:].argmax(-1)), 1)
    return ids


@pytest.mark.exhaustive
@pytest.mark.parametrize(("T", "new"), [*((T, NEW) for T in (1, 4, 5, 12)), (P - 2, 2)])
@pytest.mark.parametrize("window", (5, None, 1))
def test_greedy(T: int, new: int, window: int | None, make: Make, device: torch.device) -> None:
    model, ids = make(sliding_window=window), tokens(2, T, device=device)
    before = ids.clone()
    got = model.generate(ids, max_new_tokens=new)
    assert got.dtype == torch.int64 and got.device == ids.device and torch.equal(ids, before)
    assert torch.equal(got, argmax_loop(model, ids, new))


def test_a_cache_holds_no_padding_and_no_text_that_a_graph_appends(make: Make, device: torch.device) -> None:
    model, ids = make(), tokens(2, 4, device=device)
    cache = cache_of(model, 2, 9)
    model(ids, cache=cache, lengths=torch.tensor([3, 1], device=device))
    held = [ids[0, :3].tolist(), ids[1, :1].tolist()]
    found = [cache.conversation.held_tokens(cache)]
    cache.lengths += 1  # as if it held padding
    found.append(cache.conversation.held_tokens(cache))
    cache.lengths -= 1
    cache.replayed = True
    found.append(cache.conversation.held_tokens(cache))
    assert found == [held if device.type == "cpu" else None, None, None]


@pytest.mark.exhaustive
@pytest.mark.parametrize("window", (5, None))
def test_ragged_prompts_are_as_each_alone(window: int | None, make: Make, device: torch.device) -> None:
    model = make(sliding_window=window)
    prompts = [tokens(T, seed=T, device=device) for T in (1, 9, 4)]
    together = model.generate(prompts, max_new_tokens=NEW)
    assert isinstance(together, list)
    as_lists = model.generate([prompts[0].tolist(), prompts[1], tuple(prompts[2].tolist())], max_new_tokens=NEW)
    assert all(map(torch.equal, together, as_lists))
    for prompt, got in zip(prompts, together, strict=True):
        assert torch.equal(got, argmax_loop(model, prompt[None], NEW)[0])


def check_eos(model: Mixtral, ids: Tensor, stops: set[int], **options: Any) -> None:
    T, plain = ids.shape[1], argmax_loop(model, ids, NEW).tolist()
    padded = model.generate(ids, max_new_tokens=NEW, **options).tolist()
    alone = [row.tolist() for row in model.generate(list(ids), max_new_tokens=NEW, **options)]
    for row, got, short in zip(plain, padded, alone, strict=True):
        end = next((at + 1 for at in range(T, T + NEW) if row[at] in stops), T + NEW)  # its first EOS stays
        assert got == row[:end] + row[end - 1 : end] * (T + NEW - end)
        assert short == row[:end]


EOS = ("int", "list", "tuple", "config", "config's list", "over the config's", "never")


@pytest.mark.exhaustive
@pytest.mark.compiled
@pytest.mark.parametrize("step", (0, 1, NEW - 1))
@pytest.mark.parametrize("source", EOS)
def test_generation_stops_after_eos(source: str, step: int, make: Make, device: torch.device) -> None:
    """A token that greedy decoding comes to at `step` is made the EOS; the prompt holds it too, which ends nothing."""
    plain, ids = make(), tokens(2, 6, device=device)
    eos = int(argmax_loop(plain, ids, NEW)[0, 6 + step])
    ids[1, 2] = eos
    config: Any = {"config": eos, "config's list": [eos, V - 1], "over the config's": (eos + 1) % V, "never": eos}.get(
        source
    )
    option: Any = {"int": eos, "list": [eos], "tuple": (eos,), "over the config's": eos, "never": []}.get(source)
    stops = {"config's list": {eos, V - 1}, "never": set()}.get(source, {eos})
    check_eos(make(eos_token_id=config), ids, stops, **{} if option is None else {"eos_token_id": option})
    ids = tokens(3, 4, device=device)
    stops = {int(row[4 + step]) for row in argmax_loop(plain, ids, NEW)}  # several, one for each sequence
    check_eos(plain, ids, stops, eos_token_id=sorted(stops))


def without_eos(end_of: Any) -> Any:
    return lambda tail, eos: (end := end_of(tail, eos)) - (int(tail[end - 1]) in eos)


END_FAULTS: dict[str, Inject] = {
    "EOS is cut off": replace_by(generate, "_end_of", without_eos),
    "an ended sequence goes on": in_step("pick", lambda _, step: step.ended.zero_()),
    "EOS of the config is ignored": replace_by(
        SamplingOptions,
        "stops",
        lambda f: lambda options, config: f(replace(options, eos_token_id=options.eos_token_id or []), config),
    ),
    "the last EOS is unknown": in_step("__init__", lambda _, step: setattr(step, "stops", step.stops[:-1])),
    "all sequences end together": in_step("pick", lambda _, step: step.ended.fill_(bool(step.ended.any()))),
}


@pytest.mark.compiled
@pytest.mark.parametrize("fault", END_FAULTS)
def test_fault_in_the_end_of_a_text(fault: str, make: Make, device: torch.device, monkeypatch: Any) -> None:
    ids = tokens(2, 6, seed=1, device=device)
    new = argmax_loop(make(), ids, NEW)[:, 6:]
    stops = {int(new[0, 4]), int(new[1, 7])}
    assert not stops & {*new[0, :4].tolist(), *new[1, :7].tolist()}  # the sequences end apart, each by another EOS
    model = make(eos_token_id=sorted(stops))
    check_eos(model, ids, stops)
    END_FAULTS[fault](monkeypatch)
    with pytest.raises(AssertionError):
        check_eos(model, ids, stops)


@pytest.mark.compiled
def test_stream_yields_the_tokens_of_generate(make: Make, device: torch.device) -> None:
    """One at a time, of tensors and of lists; the iterator ends with the last sequence, or where the caller does."""
    ids = tokens(2, 6, device=device)
    plain = argmax_loop(make(), ids, NEW)[:, 6:]
    model = make(eos_token_id=int(plain[0, 3]))
    steps = list(model.stream(ids, NEW))
    assert torch.equal(torch.stack(steps, 1), model.generate(ids, NEW)[:, 6:][:, : len(steps)])
    assert [int(token) for token in model.stream([ids[0]], NEW)] == model.generate([ids[0]], NEW)[0][6:].tolist()
    one = model.stream(ids, NEW, 0.8, 0.9, [], seeded(device), top_k=5, min_p=0.05)
    want = model.generate(ids, NEW, 0.8, 0.9, [], seeded(device), top_k=5, min_p=0.05)[:, 6:]
    assert next(one).tolist() == want[:, 0].tolist() and next(one).tolist() == want[:, 1].tolist()
    with pytest.raises(ValueError, match="input_ids is a str"):
        model.stream("hello")


@pytest.fixture
def idle(make: Make, monkeypatch: pytest.MonkeyPatch) -> Make:
    for name in ("model.model.Model.hidden", "model.generate.KVCache"):
        monkeypatch.setattr(f"mixtral_triton.{name}", Mock(side_effect=AssertionError("the model ran")))
    return make


def test_no_new_tokens_and_a_model_without_values(idle: Make, device: torch.device) -> None:
    ids = tokens(2, 4, device=device)
    assert torch.equal(idle().generate(ids, max_new_tokens=0), ids)
    model = idle()
    with torch.device("meta"):  # a caller's default device
        got = model.generate([ids[0], ids[1, :2]], max_new_tokens=0)
    assert [row.tolist() for row in got] == [ids[0].tolist(), ids[1, :2].tolist()]
    with pytest.raises(ValueError, match=r"meta.*needs a CPU or a GPU"):
        idle().to("meta").generate(ids.to("meta"))


IDS: list[tuple[Callable[[Tensor], Any], str]] = [
    (lambda x: [x[0], x[0, :0]], "prompt 1"),
    (lambda x: [x], "prompt 0"),
    (lambda x: x.tolist()[0], "prompt 0 is a int, needs int64 .T. or a list of token ids"),
    (lambda x: [[1, 2], [1, 2.0]], "prompt 1 is a list"),
    (lambda x: [[True]], "prompt 0 is a list"),
    (lambda x: [[1 << 63]], "prompt 0 is a list"),
    (lambda x: [[-1]], "prompt 0 is a list"),
    (lambda x: [[1], []], "prompt 1"),
    (lambda x: x * 0 + V, f"{V}"),
    (lambda x: x.to("meta"), "meta"),
]
for _change in (lambda x: x[:, :0], lambda x: x[:0], lambda x: x[0, 0], lambda x: x[0], lambda x: x[None]):
    IDS.append((_change, "prompt|input_ids"))
IDS += [(lambda x, wrong=wrong: wrong, "prompt|input_ids") for wrong in ([], None, "hello")]
NAN, INF = float("nan"), float("inf")
WRONG: dict[str, tuple[Any, ...]] = {
    "max_new_tokens": (-1, 1.5, None, True),
    "temperature": (-0.1, NAN, INF, 10**400, "hot", None),
    "top_p": (0.0, -0.5, 1.01, NAN, "a"),
    "top_k": (0, -1, 2.0, True, "5"),
    "min_p": (-0.1, 1.5, NAN, "a", True),
    "eos_token_id": ("2", 1.5, [1, "2"], 1 << 63),
    "repetition_penalty": (0.0, -1.0, NAN, INF, 10**400, "a", True),
    "logprobs": (-1, 1.5, V + 1, True, "3"),
    "cache": (7, cache_of(random_model(), 3), KVCache(random_model(sliding_window=7).config, 2, device="cpu")),
}
OPTIONS: list[dict[str, Any]] = [{name: value} for name, values in WRONG.items() for value in values]
ELSEWHERE = type("Elsewhere", (torch.Generator,), {"device": torch.device("xpu")})
GENERATORS = 7, ELSEWHERE(), numpy.zeros(1)  # an array has a device, which is text
OPTIONS += [{"generator": each, "temperature": 1.0} for each in GENERATORS]


@pytest.mark.parametrize(("change", "message"), IDS)
def test_bad_prompts(change: Callable[[Tensor], Any], message: str, idle: Make, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"(?s)^generate: .*({message})"):
        idle().generate(change(tokens(2, 4, device=device)), max_new_tokens=2)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: f"{options!s:.50}")
def test_bad_options(options: dict[str, Any], idle: Make, device: torch.device) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        idle().generate(tokens(2, 4, device=device), **{"max_new_tokens": 2} | options)


@pytest.mark.parametrize("window", (None, 5))
@pytest.mark.parametrize(("lengths", "new"), [((4,), P - 3), ((P,), 1), ((P + 1,), 0), ((2, P - 1), 2)])
def test_beyond_the_last_position(lengths: Any, new: int, window: int | None, idle: Make, device: Any) -> None:
    prompts = [tokens(T, device=device) for T in lengths]
    with pytest.raises(ValueError, match=f"(?s){lengths[-1]}.*{P}"):
        idle(sliding_window=window).generate(prompts, max_new_tokens=new)


@pytest.mark.compiled
@pytest.mark.parametrize("window", [2**31 - 1, 4_000_000, 64])
def test_a_window_that_no_position_can_leave_takes_the_slots_of_the_text(window: int) -> None:
    """64 positions: the ring is as long as the text, and without a length as long as the positions."""
    model, plain = random_model(sliding_window=window), random_model()
    assert cache_of(model, 2).slots == 12 and KVCache(model.config, 1, device="cpu").slots == 64
    assert cache_bytes(model.config, 1, 5, model.dtype) == cache_bytes(plain.config, 1, 5, model.dtype)
    ids = tokens(1, 3)
    assert torch.equal(model.generate(ids, 9), plain.generate(ids, 9))
    cache = cache_of(model, 1)
    got = torch.cat([model(ids, cache=cache), model(ids, cache=cache)], 1)
    assert torch.allclose(got, plain(ids.repeat(1, 2)), atol=1e-4)


CACHED: dict[str, dict[str, Any]] = {"plain": {"sliding_window": None}, "ring": {}, "offload": {"on_host": (1, 3)}}
CACHED |= {"deterministic": {"deterministic": True}, "int8": {"sliding_window": None}, "int8 ring": {}}


@slow_interpreted
@pytest.mark.parametrize("case", CACHED)
def test_a_cache_goes_on_and_computes_new_tokens_alone(
    case: str, make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three turns of a ragged batch; the ring of 5 slots has moved on in the first."""
    model, new = make(**CACHED[case]), 2 if INTERPRETED else 4
    dtype = torch.int8 if "int8" in case else model.dtype
    cache = KVCache(model.config, 2, P, device, dtype)
    alone = KVCache(model.config, 1, P, device, dtype)
    counts, texts, held = computed(model, monkeypatch), [tokens(T, seed=T, device=device) for T in (6, 2)], 0
    for turn in range(3):
        before = [text.clone() for text in texts]
        got = model.generate(texts, new, cache=cache, logprobs=2)
        assert sum(counts) == sum(map(len, texts)) + 2 * (new - 1) - held, "the whole text but what was held"
        assert cache.lengths.tolist() == [len(text) - 1 for text in got.ids]
        assert all(torch.equal(*pair) for pair in zip(texts, before, strict=True))
        want = model.generate(texts, new, cache_dtype=dtype, logprobs=2)
        assert all(torch.equal(*pair) for pair in zip(got.ids, want.ids, strict=True))
        for mine, other in zip(got.logprobs, want.logprobs, strict=True):
            assert torch.allclose(mine, other, atol=1e-4)
        if case == "deterministic":  # the bits of a sequence are those that it has alone, in the same turns
            single = model.generate(before[:1], new, cache=alone, logprobs=2)
            assert torch.equal(single.ids[0], got.ids[0]) and torch.equal(single.logprobs[0], got.logprobs[0])
        held = sum(cache.lengths.tolist())
        texts = [torch.cat((text, tokens(3 + b, seed=turn, device=device))) for b, text in enumerate(got.ids)]
        counts.clear()
    with pytest.raises(ValueError, match=rf"cache_dtype is torch.*needs None or {cache.dtype}"):
        model.generate(texts, 1, cache=cache, cache_dtype=torch.int8 if dtype != torch.int8 else model.dtype)


@slow_interpreted
@pytest.mark.parametrize("settings", [{"repetition_penalty": 1.5}, {}, {"temperature": 1.5, "top_p": 0.8}], ids=str)
def test_log_probabilities_are_those_of_a_forward(settings: Any, make: Make, device: torch.device) -> None:
    """Before temperature and penalty. Behind an EOS they are 0, so that a sum is the text's."""
    plain, N = make(), 4
    prompts = [tokens(6, seed=seed, device=device) for seed in (6, 7)]
    options = {"max_new_tokens": NEW, **settings}
    eos = int(plain.generate(prompts, generator=seeded(device), **options)[0][7])
    model = make(eos_token_id=eos)
    ids = model.generate(prompts, generator=seeded(device), **options)
    got = model.generate(prompts, generator=seeded(device), logprobs=N, **options)
    padded = model.generate(torch.stack(prompts), generator=seeded(device), logprobs=N, **options)
    assert got._fields == ("ids", "logprobs", "top_ids", "top_logprobs") and padded.ids.shape == (2, 6 + NEW)
    assert padded.logprobs.dtype == padded.top_logprobs.dtype == torch.float32 and padded.top_ids.dtype == torch.int64
    for b, (text, same) in enumerate(zip(got.ids, ids, strict=True)):
        assert torch.equal(text, same) and torch.equal(padded.ids[b, : len(text)], text)
        n, want = len(text) - 6, logits_of(model, text[None])[0, 5:-1].log_softmax(-1)
        top, top_ids = want.topk(N)
        for found in (Logprobs(*(each[b] for each in got)), Logprobs(*(each[b, :n] for each in padded))):
            assert torch.allclose(found.logprobs, want.gather(1, text[6:, None])[:, 0], atol=1e-4)
            assert torch.allclose(found.top_logprobs, top, atol=1e-4) and torch.equal(found.top_ids, top_ids)
        assert (padded.ids[b, len(text) :] == eos).all() and (padded.top_ids[b, n:] == eos).all()
        assert not padded.logprobs[b, n:].any() and not padded.top_logprobs[b, n:].any()
    steps = list(model.stream(prompts, generator=seeded(device), logprobs=N, **options))
    assert torch.equal(torch.stack([step.top_ids for step in steps], 1), padded.top_ids[:, : len(steps)])
    none = model.generate(torch.stack(prompts), 0, logprobs=0)
    assert [list(each.shape) for each in none] == [[2, 6], [2, 0], [2, 0, 0], [2, 0, 0]]


@slow_interpreted
@pytest.mark.parametrize("chunk", (2048, 3))
def test_score_is_the_log_softmax_of_each_text(chunk: int, make: Make, device: torch.device, monkeypatch: Any) -> None:
    model, texts = make(), [tokens(T, seed=T, device=device) for T in (9, 1, 5)]
    model.prefill_chunk = chunk
    monkeypatch.setattr("mixtral_triton.model.score.LOGITS", 2 * V)  # two rows at a time
    for text, got in zip(texts, model.score(texts), strict=True):
        want = logits_of(model, text[None])[0, :-1].log_softmax(-1).gather(1, text[1:, None])[:, 0]
        assert got.dtype == torch.float32 and got.device == text.device and got.shape == want.shape
        assert torch.allclose(got, want, atol=1e-4)
    for wrong, message in (
        ([], "at least one"),
        ("ab", "a str"),
        ([texts[0][None]], "text 0"),
        ([texts[0] + V], "token"),
    ):
        with pytest.raises(ValueError, match=f"(?s)^score: .*{message}"):
            model.score(wrong)
    with pytest.raises(ValueError, match=f"score: .*{P + 1} tokens.*{P}"):
        model.score([tokens(P + 1, device=device)])
    with pytest.raises(ValueError, match="score: cache_dtype"):
        model.score(texts, cache_dtype=torch.float64)
    eighth = torch.cat(model.score(texts, cache_dtype=torch.int8)) - torch.cat(model.score(texts))
    assert 0 < eighth.abs().max() < 0.5


@pytest.mark.slow
@pytest.mark.compiled
def test_penalty_equals_that_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    original = transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32).eval()
    model = Mixtral.from_pretrained(SMALL, "cpu", torch.float32)
    ids = torch.tensor(HELD_OUT[:20])
    logits, seen = torch.randn(3, 50), torch.randint(50, (3, 9), generator=torch.Generator().manual_seed(0))
    process = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    mask = torch.zeros(3, 50, dtype=torch.bool).scatter(1, seen, True)
    assert torch.equal(penalize(logits, mask, 1.7), process(seen, logits))
    found = set()
    for penalty in (1.0, 1.1, 1.3, 3.0, 0.8):
        settings = {"max_new_tokens": 40, "do_sample": False, "pad_token_id": 1, "repetition_penalty": penalty}
        want = original.generate(ids[None], **settings)[0].tolist()
        assert model.generate([ids], 40, repetition_penalty=penalty)[0].tolist() == want
        found.add(tuple(want))
    assert len(found) == 5, "each penalty has its own text"
