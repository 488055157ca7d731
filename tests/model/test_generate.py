"""Generation beside a loop of argmax over the whole text; ragged prompts, EOS, sampling, and what is refused."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import numpy
import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, reference
from mixtral_triton.cache import cache_bytes
from mixtral_triton.generate import sample
from mixtral_triton.kernels.launch import INTERPRETED
from tests.support.models import cache_of, random_model, tokens

V, P = 23, 30
NEW = 3 if INTERPRETED else 12
LIMITS = [(1.0, 1e-9, V), (5.0, 1e-3, V), (1e-4, 1.0, V), (1e-39, 1.0, V), (5e-324, 0.5, V), (50.0, 1.0, 1)]
LIMITS += [(1.0, 1e-60, V), (10**300, 1.0, 1)]
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


@pytest.mark.compiled
@pytest.mark.parametrize("chunk", (1, 4, 7, 12))
@pytest.mark.parametrize("window", (5, None))
def test_prompt_in_several_chunks(window: int | None, chunk: int, make: Make, device: Any, monkeypatch: Any) -> None:
    """Chunks of the prompts' own length too: then a sequence has no token in the last ones."""
    model, prompts = make(sliding_window=window), [tokens(T, seed=T, device=device) for T in (12, 1, 8)]
    want = model.generate(prompts, max_new_tokens=2)
    monkeypatch.setattr("mixtral_triton.generate.PREFILL_CHUNK", chunk)
    assert all(torch.equal(*pair) for pair in zip(model.generate(prompts, max_new_tokens=2), want, strict=True))


def check_eos(model: Mixtral, ids: Tensor, stops: set[int], **options: Any) -> None:
    T, plain = ids.shape[1], argmax_loop(model, ids, NEW).tolist()
    padded = model.generate(ids, max_new_tokens=NEW, **options).tolist()
    alone = [row.tolist() for row in model.generate(list(ids), max_new_tokens=NEW, **options)]
    for row, got, short in zip(plain, padded, alone, strict=True):
        end = next((at + 1 for at in range(T, T + NEW) if row[at] in stops), T + NEW)  # its first EOS stays
        assert got == row[:end] + row[end - 1 : end] * (T + NEW - end)
        assert short == row[:end]


EOS = ("int", "list", "tuple", "config", "config's list", "over the config's")


@pytest.mark.compiled
@pytest.mark.parametrize("step", (0, 1, NEW - 1))
@pytest.mark.parametrize("source", EOS)
def test_generation_stops_after_eos(source: str, step: int, make: Make, device: torch.device) -> None:
    """A token that greedy decoding comes to at `step` is made the EOS; the prompt holds it too, which ends nothing."""
    plain, ids = make(), tokens(2, 6, device=device)
    eos = int(argmax_loop(plain, ids, NEW)[0, 6 + step])
    ids[1, 2] = eos
    config: Any = {"config": eos, "config's list": [eos, V - 1], "over the config's": (eos + 1) % V}.get(source)
    option: Any = {"int": eos, "list": [eos], "tuple": (eos,), "over the config's": eos}.get(source)
    stops = {eos, V - 1} if source == "config's list" else {eos}
    check_eos(make(eos_token_id=config), ids, stops, **{} if option is None else {"eos_token_id": option})
    ids = tokens(3, 4, device=device)
    stops = {int(row[4 + step]) for row in argmax_loop(plain, ids, NEW)}  # several, one for each sequence
    check_eos(plain, ids, stops, eos_token_id=sorted(stops))


@pytest.mark.compiled
def test_it_stops_when_all_have_ended(make: Make, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids, calls = make(), tokens(1, 4, device=device), []
    hidden = model.hidden
    eos = int(argmax_loop(model, ids, 1)[0, -1])
    monkeypatch.setattr(model, "hidden", lambda *args: (calls.append(1), hidden(*args))[1])
    assert model.generate(ids, max_new_tokens=26, eos_token_id=eos)[0, 4:].tolist() == [eos] * 26
    assert len(calls) == 1


def seeded(device: torch.device, seed: int = 0) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def probabilities(logits: Tensor, temperature: float, top_p: float, top_k: Any = None, min_p: float = 0.0) -> Tensor:
    """Those of the tokens that transformers' filters leave, in their order; 0 of the others. Ties all stay."""
    warpers = pytest.importorskip("transformers.generation.logits_process")
    left, no_ids = logits[None].cpu() / temperature, torch.zeros(1, 1)
    if top_k is not None:
        left = warpers.TopKLogitsWarper(top_k)(no_ids, left)
    if top_p < 1.0:
        left = warpers.TopPLogitsWarper(top_p)(no_ids, left)
    if min_p > 0.0:
        left = warpers.MinPLogitsWarper(min_p)(no_ids, left)
    return left.softmax(-1)[0]


@pytest.mark.compiled
@pytest.mark.parametrize("temperature", (0.3, 1.5, 4.0))
@pytest.mark.parametrize("top_p", (0.01, 0.5, 0.9, 1.0))
@pytest.mark.parametrize(("top_k", "min_p"), [*((k, 0.0) for k in (None, 1, 3, V - 1, V, 10 * V)), (None, 0.3), (9, 1)])
def test_sample(top_k: int | None, min_p: float, top_p: float, temperature: float, device: torch.device) -> None:
    logits, draws = torch.randn(V, generator=torch.Generator().manual_seed(1)), 20000
    logits[[2, 5, 11]] = logits.topk(3).values[-1]  # a tie for third place
    want = probabilities(logits, temperature, top_p, top_k, min_p)
    batch = logits.to(device).expand(draws, -1)
    often = torch.bincount(sample(batch, temperature, top_p, seeded(device), top_k, min_p).cpu(), minlength=V) / draws
    assert not often[want == 0].any()
    assert (often - want).abs().sum() < 0.05


@pytest.mark.compiled
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.5), (2.0, 0.3)])
def test_generate_stays_in_the_nucleus(temperature: float, top_p: float, make: Make, device: torch.device) -> None:
    model = make()
    options = {"max_new_tokens": NEW, "temperature": temperature, "top_p": top_p}
    ids = tokens(3, 3, device=device)
    out, again, other = (model.generate(ids, generator=seeded(device, seed), **options) for seed in (0, 0, 1))
    assert torch.equal(out, again) and not torch.equal(out, other)
    logits = logits_of(model, out)
    for row, scores in zip(out.tolist(), logits, strict=True):
        assert all(probabilities(scores[t - 1], temperature, top_p)[row[t]] > 0 for t in range(3, len(row)))


@pytest.mark.compiled
@pytest.mark.parametrize(("temperature", "top_p", "top_k"), LIMITS)
def test_greedy_at_the_limits(temperature: float, top_p: float, top_k: Any, make: Make, device: Any) -> None:
    """`top_k` is an argument by name alone: the positions of those before it are what they were."""
    model, ids = make(), tokens(2, 4, device=device)
    settings = {"temperature": temperature, "generator": seeded(device)}
    greedy = model.generate(ids, max_new_tokens=NEW)
    assert torch.equal(model.generate(ids, max_new_tokens=NEW, top_p=top_p, top_k=top_k, **settings), greedy)
    if top_k == 1:
        assert not torch.equal(model.generate(ids, max_new_tokens=NEW, **settings), greedy)
        with pytest.raises(TypeError):
            model.generate(ids, NEW, 1.0, 1.0, None, None, 1)


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
    for name in ("model.Mixtral.hidden", "generate.KVCache"):
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
}
OPTIONS: list[dict[str, Any]] = [{name: value} for name, values in WRONG.items() for value in values]
ELSEWHERE = type("Elsewhere", (torch.Generator,), {"device": torch.device("xpu")})
GENERATORS = 7, ELSEWHERE(), numpy.zeros(1)  # an array has a device, which is text
OPTIONS += [{"generator": each, "temperature": 1.0} for each in GENERATORS]


@pytest.mark.parametrize(("change", "message"), IDS)
def test_bad_prompts(change: Callable[[Tensor], Any], message: str, idle: Make, device: torch.device) -> None:
    with pytest.raises(ValueError, match=f"(?s){message}"):
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
