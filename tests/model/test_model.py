"""The whole model beside transformers' MixtralForCausalLM on random checkpoints, with and without the ring cache."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mixtral_triton import KVCache, Mixtral, reference
from mixtral_triton.kernels.launching.launch import INTERPRETED
from tests.conftest import HF_SIZES
from tests.support.models import cache_of as make_cache
from tests.support.models import tokens as random_tokens
from tests.support.selection import slow_interpreted

pytest.importorskip("transformers")

W, V, P = 6, 48, 96  # the window, the vocabulary, the positions that most configurations have
ROOM = [("short, no window", 12, 12), ("short, no window", 500, 20), ("short", 2, 20)]  # max_len, and the most tokens
SHORT = 20  # the positions that those have which the tests fill to the end
LAYERS, NEW = HF_SIZES["num_hidden_layers"], 3 if INTERPRETED else 8
BASE = {"pad_token_id": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
CONFIGS: dict[str, dict[str, Any]] = {
    "window": {},
    "no window": {"sliding_window": None},
    "window 1": {"sliding_window": 1, "num_key_value_heads": 4},
    "window beyond the text": {"sliding_window": 64},
    "mqa": {"num_key_value_heads": 1, "sliding_window": 5},
    "mha": {"num_key_value_heads": 4, "sliding_window": None},
    "8 experts": {"num_local_experts": 8, "head_dim": 16},
    "8 experts, top 1": {"num_local_experts": 8, "num_experts_per_tok": 1},
    "top 1, tied": {"num_experts_per_tok": 1, "tie_word_embeddings": True, "sliding_window": None},
    "tied, large heads": {"tie_word_embeddings": True, "head_dim": 24, "num_key_value_heads": 1},
    "every expert": {"num_experts_per_tok": 4, "head_dim": 6},
    "odd sizes": {"hidden_size": 27, "intermediate_size": 19, "head_dim": 10, "num_attention_heads": 6},
    "three layers": {"num_hidden_layers": 3, "rms_norm_eps": 0.01, "sliding_window": 9},
    "one layer, theta 1e4": {"num_hidden_layers": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
    "short": {"max_position_embeddings": SHORT},
    "short, no window": {"max_position_embeddings": SHORT, "sliding_window": None},
    "far": {"num_hidden_layers": 1, "head_dim": 128, "max_position_embeddings": 32768},
}
Make = Callable[[str], tuple[Path, Any]]
BUILT: dict[str, tuple[Path, Any]] = {}


@pytest.fixture
def make(make_hf: Any, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The name of a configuration -> a checkpoint folder, and transformers' model of it in fp32 on the CPU."""

    def make_once(name: str) -> tuple[Path, Any]:
        if name not in BUILT:
            folder, hf = tmp_path_factory.mktemp("checkpoint"), make_hf(seed=len(name), **BASE | CONFIGS[name])
            hf.save_pretrained(folder)
            BUILT[name] = folder, hf
        return BUILT[name]

    return make_once


@pytest.fixture
def load(make: Make, device: torch.device) -> Callable[..., Mixtral]:
    return lambda name, **options: Mixtral.from_pretrained(make(name)[0], **{"device": device} | options)


@pytest.fixture
def model(load: Callable[..., Mixtral]) -> Mixtral:
    return load("window")


tokens, cache_of = partial(random_tokens, vocabulary=V), partial(make_cache, max_len=P)


def close(got: Tensor, want: Tensor, rtol: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype == torch.float32
    if want.numel():
        assert (got - want.to(got.device)).abs().max() <= rtol * want.abs().max()


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", CONFIGS)
def test_equals_transformers(name: str, make: Make, load: Callable[..., Mixtral], device: torch.device) -> None:
    hf, model, ids = make(name)[1], load(name), tokens(1 if INTERPRETED else 2, 20, device=device)
    with torch.no_grad():
        want = hf(ids.cpu()).logits
        greedy = hf.generate(ids[:, :10].cpu(), max_new_tokens=NEW, do_sample=False, use_cache=False)
    assert model.dtype == torch.float32
    close(model(ids), want, 1e-4)
    close(reference.forward(model, ids), want, 1e-4)
    assert torch.equal(model.generate(ids[:, :10], max_new_tokens=NEW).cpu(), greedy)


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("start", (1000, 30000))
def test_equals_transformers_at_far_positions(start: int, make: Make, load: Any, device: Any) -> None:
    """One layer: only the first W tokens see what the cache held (zeros) before `start`."""
    model, ids = load("far"), tokens(1, 20, device=device)
    with torch.no_grad():
        want = make("far")[1](ids.cpu(), position_ids=torch.arange(start, start + 20)[None]).logits
    cache = cache_of(model, 1)
    cache.lengths.fill_(start)
    close(model(ids, cache=cache)[:, W:], want[:, W:], 1e-4)


CHUNKS = {"1": (1,), "W-1": (W - 1,), "W": (W,), "W+1": (W + 1,), "3W": (3 * W,), "mixed": (2, 1, 9, 1, 1, 6, 20)}


def in_chunks(model: Mixtral, ids: Tensor, cache: KVCache, sizes: tuple[int, ...]) -> Tensor:
    logits, start, turn = [], 0, cycle(sizes)
    while start < ids.shape[1]:
        chunk = ids[:, start : start + next(turn)]
        logits.append(model(chunk, cache=cache))
        start += chunk.shape[1]
    return torch.cat(logits, 1)


@slow_interpreted
@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("name", ("window", "no window", "three layers")[: 2 if INTERPRETED else 3])
def test_cache_in_chunks(name: str, sizes: tuple[int, ...], load: Callable[..., Mixtral], device: torch.device) -> None:
    model, ids = load(name), tokens(1, 20, device=device)
    cache = cache_of(model, 1)
    close(in_chunks(model, ids, cache, sizes), model(ids), 1e-5)
    assert cache.lengths.dtype == torch.int32 and cache.lengths.tolist() == [20]


def ragged(model: Mixtral, ids: Tensor, plan: list[list[int]], pad: int, cache: KVCache) -> None:
    """Feed the first plan[.][b] tokens of each chunk, the rest of it being noise; compare with the one-shot run."""
    B, done = len(ids), [0] * len(ids)
    want, got = model(ids), [[] for _ in range(B)]
    for step, new in enumerate(plan):
        chunk = tokens(B, max(new) + pad, seed=step, device=ids.device)
        for b in range(B):
            chunk[b, : new[b]] = ids[b, done[b] : done[b] + new[b]]
        logits = model(chunk, cache=cache, lengths=torch.tensor(new, device=ids.device))
        for b in range(B):
            got[b].append(logits[b, : new[b]])
            done[b] += new[b]
        assert cache.lengths.tolist() == done
    for b in range(B):
        close(torch.cat(got[b]), want[b, : done[b]], 1e-5)


PLAN = [[3, 0, 2], [1, 0, 1], [0, 8, 1], [0, 1, 0], [13, 2, 3], [1, 1, 0], [1, 1, 1]]
# Plans up to the last position: a sequence near (or at) its end does not keep the others from going on, nor does a
# chunk's padding count.
ENDS = [([[SHORT - 4, 3], [4, 9]], 0), ([[SHORT - 4, 3], [4, 2]], 9), ([[SHORT, 3], [0, 1]], 0)]
RAGGED = [(name, PLAN, pad, 19) for name in ("window", "no window") for pad in (0, 2)]
RAGGED += [(name, plan, pad, SHORT) for name in ("short", "short, no window") for plan, pad in ENDS]


@slow_interpreted
@pytest.mark.parametrize(("name", "plan", "pad", "T"), RAGGED)
def test_ragged_chunks(name: str, plan: list[list[int]], pad: int, T: int, load: Any, device: Any) -> None:
    model, B = load(name), len(plan[0])
    ragged(model, tokens(B, T, device=device), plan, pad, cache_of(model, B))


@slow_interpreted
@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("name", ("window", "no window"))
def test_cache_again_and_in_inference_mode(name: str, load: Callable[..., Mixtral], device: torch.device) -> None:
    model, ids = load(name), tokens(2, 8, device=device)
    cache = cache_of(model, 2, max_len=20)
    model(tokens(2, 19, seed=1, device=device), cache=cache)
    cache.lengths.zero_()
    close(in_chunks(model, ids, cache, (5, 1, 1)), model(ids), 1e-5)
    cache.lengths.zero_()
    in_chunks(model, tokens(2, 20, device=device), cache, (20,))  # all of it fits once more
    want = model.generate(ids, max_new_tokens=2)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, max_new_tokens=2), want)
        cache, steps = cache_of(model, 2), model.stream(ids, 2)
        first = next(steps)
        close(in_chunks(model, ids[:, :5], cache, (4, 1)), model(ids)[:, :5], 1e-5)
    close(in_chunks(model, ids[:, 5:], cache, (2, 1)), model(ids)[:, 5:], 1e-5)  # begun in the one mode, and continued
    assert torch.equal(torch.stack([first, next(steps)], 1), want[:, 8:])


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("way", ("assign", "to_empty", "to_empty on meta"))
def test_a_state_dict_fills_an_unset_model(way: str, load: Callable[..., Mixtral], device: torch.device) -> None:
    model, ids = load("window"), tokens(1, 8, device=device)
    other = load("window", device=device if way == "to_empty" else "meta")
    other = other if way == "assign" else other.to_empty(device=device)
    other.load_state_dict(model.state_dict(), assign=way == "assign")
    assert torch.equal(other(ids), model(ids))  # a state_dict has no rotary tables


@pytest.mark.usefixtures("unguarded")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_16_bit_model_is_near_fp32(dtype: torch.dtype, load: Callable[..., Mixtral], device: torch.device) -> None:
    model, ids = load("window", dtype=dtype), tokens(1, 8, device=device)
    logits, want = model(ids), load("window")(ids)
    assert model.dtype == dtype and logits.dtype == torch.float32
    assert (logits - want).abs().mean() <= 0.1 * want.abs().mean()
    cached = in_chunks(model, ids, cache_of(model, 1), (5, 1))
    assert (cached - logits).abs().mean() <= 0.1 * want.abs().mean()
    assert torch.equal(load("window").to(dtype)(ids), logits)  # rotary tables in 16 bits would turn by other angles


def other_cache(model: Mixtral, device: Any = None, dtype: Any = None, **changes: Any) -> KVCache:
    return KVCache(replace(model.config, **changes), 2, P, device or model.device, dtype or model.dtype)


def full_cache(model: Mixtral) -> KVCache:
    cache = cache_of(model, 2)
    cache.lengths += P
    return cache


CALLS: dict[str, tuple[Callable[[Mixtral, Tensor], Any], str]] = {
    "negative id": (lambda m, x: m(x - 50), "input_ids.*-"),
    "id beyond": (lambda m, x: m(x * 0 + V), f"input_ids.* {V}"),
    "int32 ids": (lambda m, x: m(x.int()), "input_ids.*int32"),
    "float ids": (lambda m, x: m(x.float()), "input_ids.*float32"),
    "1-D ids": (lambda m, x: m(x[0]), r"input_ids.*\[9\]"),
    "list of ids": (lambda m, x: m([[1, 2]]), "input_ids.*list"),
    "no tokens": (lambda m, x: m(x[:, :0]), r"input_ids.*\[2, 0\]"),
    "no rows": (lambda m, x: m(x[:0]), r"input_ids.*\[0, 9\]"),
    "meta ids": (lambda m, x: m(x.to("meta")), "input_ids.*meta"),
    "too long": (lambda m, x: m(x.repeat(1, 11)), f"99.*max_position_embeddings.*{P}"),
    "lengths, no cache": (lambda m, x: m(x, lengths=torch.tensor([1, 2])), "lengths.*cache"),
    "cache, another config": (
        lambda m, x: m(x, cache=other_cache(m, rope_theta=7.0)),
        "config.rope_theta 7.0, needs 1000000.0$",
    ),
    "cache of another batch": (lambda m, x: m(x, cache=cache_of(m, 3)), "cache.*batch 3.*2"),
    "cache of another dtype": (lambda m, x: m(x, cache=other_cache(m, dtype=torch.half)), "float16"),
    "full cache": (lambda m, x: m(x, cache=full_cache(m)), f"{P + 9} tokens, beyond the max_position_embeddings"),
    "meta cache": (lambda m, x: m(x, cache=other_cache(m, "meta")), "cache.*device meta"),
    "converted to fp64": (lambda m, x: m.double()(x), "dtype.*float64"),
    "sparse ids": (lambda m, x: m(x.to_sparse()), "input_ids.*sparse"),
    "nested ids": (lambda m, x: m(torch.nested.nested_tensor([*x])), "input_ids.*nested"),
    "huge batch": (lambda m, x: KVCache(m.config, 1 << 50, 5, "cpu"), rf"batch {1 << 50} .*smaller batch"),
    "mask of transformers": (lambda m, x: m(x, attention_mask=x), "no argument 'attention_mask', needs lengths"),
    "hidden states": (lambda m, x: m(x, output_hidden_states=True), "needs model.layers.i..register_forward_hook"),
    "labels": (lambda m, x: m(x, labels=x), "needs model.score.texts."),
    "not a cache": (lambda m, x: m(x, cache={}), "cache.*dict"),
}
LENGTHS: dict[str, Any] = {
    "negative": torch.tensor([-1, 2]),
    "beyond the chunk": torch.tensor([3, 10]),
    "of one row": torch.tensor([3]),
    "of rank 2": torch.tensor([[3, 3]]),
    "float": torch.tensor([3.0, 3.0]),
    "bool": torch.tensor([True, False]),
    "on meta": torch.tensor([3, 3], device="meta"),
    "a list": [3, 3],
    "sparse": torch.tensor([3, 3]).to_sparse(),
}
# Cases that show in a value alone.
OF_VALUES = "negative id", "id beyond", "full cache", "negative", "beyond the chunk"


def check_rows(logits: Tensor, bad: list[bool]) -> None:
    """Check that exactly the bad sequences are NaN, as on a GPU, which reads no value back."""
    assert logits.isnan().all(-1).all(-1).tolist() == bad
    assert all(row[0].isfinite().all() for row, is_bad in zip(logits, bad, strict=True) if not is_bad)


@pytest.mark.parametrize("case", CALLS)
def test_wrong_arguments_raise_value_error(case: str, model: Mixtral, device: torch.device) -> None:
    function, message = CALLS[case]
    if device.type == "cuda" and case in OF_VALUES:
        return check_rows(function(model, tokens(2, 9, device=device)), [True, True])
    with pytest.raises(ValueError, match=f"(?s){message}"):
        function(model, tokens(2, 9, device=device))


# The checks without which a forward takes what it must refuse.
UNCHECKED: dict[str, tuple[Any, str]] = {
    "cache, another config": (Mixtral, "_check_cache"),
    "cache of another dtype": (Mixtral, "_check_cache"),
    "full cache": (KVCache, "reserve"),
}


@pytest.mark.compiled
@pytest.mark.parametrize("case", UNCHECKED)
def test_fault_in_a_refusal(case: str, model: Mixtral, device: torch.device, monkeypatch: Any) -> None:
    test_wrong_arguments_raise_value_error(case, model, device)
    monkeypatch.setattr(*UNCHECKED[case], lambda *args: None)
    with pytest.raises((pytest.fail.Exception, AssertionError, RuntimeError)):
        test_wrong_arguments_raise_value_error(case, model, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", LENGTHS)
def test_bad_lengths_leave_the_cache_alone(case: str, model: Mixtral, device: torch.device) -> None:
    cache, lengths = cache_of(model, 2), LENGTHS[case]
    model(tokens(2, 4, device=device), cache=cache)
    keys = cache.keys[0].clone()
    on_device = isinstance(lengths, Tensor) and not lengths.is_meta
    lengths = lengths.to(device) if on_device else lengths
    if device.type == "cuda" and case in OF_VALUES:
        logits = model(tokens(2, 9, device=device), cache=cache, lengths=lengths)
        return check_rows(logits, [case == "negative", case == "beyond the chunk"])
    with pytest.raises(ValueError, match=r"argument 'lengths' is .*, needs "):
        model(tokens(2, 9, device=device), cache=cache, lengths=lengths)
    assert cache.lengths.tolist() == [4, 4] and torch.equal(cache.keys[0], keys)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "max_len", "most"), ROOM)
@pytest.mark.parametrize("chunk", (1, 5))
def test_the_end_of_the_cache(name: str, max_len: int, most: int, chunk: int, load: Any, device: Any) -> None:
    """Without a window its slots, with one (a ring) the positions; nothing is overwritten or counted beyond."""
    model = load(name)
    cache, keep = cache_of(model, 2, max_len=max_len), torch.tensor([most - chunk, 3], device=device)
    model(tokens(2, most - chunk, device=device), cache=cache, lengths=keep)
    model(tokens(2, chunk, device=device), cache=cache)
    if device.type == "cuda":  # the host does not know the lengths of ragged chunks
        return check_rows(model(tokens(2, chunk, device=device), cache=cache), [True, 3 + 2 * chunk > most])
    with pytest.raises(ValueError, match=f"{most}: needs {'a larger max_len or ' if most == max_len else ''}fewer"):
        model(tokens(2, chunk, device=device), cache=cache)
    assert cache.lengths.tolist() == [most, 3 + chunk]


@pytest.mark.parametrize("value", [*(LENGTHS[case] for case in LENGTHS if case not in OF_VALUES), 5, None], ids=str)
def test_unsuitable_lengths_set_by_hand_raise_value_error(value: Any, model: Mixtral, device: torch.device) -> None:
    cache = cache_of(model, 2)
    cache.lengths = value
    with pytest.raises(ValueError, match=r"^(KVCache: argument 'lengths'|Mixtral: argument 'cache') .*, needs "):
        model(tokens(2, 9, device=device), cache=cache)


BAD_LOADS: list[dict[str, Any]] = [{"mesh": "tp"}, {"dtype": torch.float64}, {"dtype": "int8"}]
BAD_LOADS += [{"activations": wrong} for wrong in ("int8", 8, True)]
BAD_DEVICES = [{"device": device} for device in ("gpu", "cuda:99", "", 1.5)]
NO_NUMBERS = (0, "2", 1.5, True, None)
BAD_CACHES: list[dict[str, Any]] = [{name: value} for name in ("batch", "max_len") for value in NO_NUMBERS]
BAD_CACHES += [{"dtype": torch.float64}, {"dtype": "float32"}, {"config": None}]


@pytest.mark.parametrize("options", [*BAD_CACHES, *BAD_DEVICES], ids=str)
def test_bad_caches(options: dict[str, Any], load: Callable[..., Mixtral]) -> None:
    good = {"config": load("no window", device="meta").config, "batch": 2, "max_len": P, "device": "cpu"}
    with pytest.raises(ValueError, match=next(iter(options))):
        KVCache(**good | options)


@pytest.mark.parametrize("options", [*BAD_LOADS, *BAD_DEVICES], ids=str)
def test_bad_loads(options: dict[str, Any], load: Callable[..., Mixtral]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        load("window", **options)


def test_gradients_and_training_are_refused(model: Mixtral, device: torch.device) -> None:
    ids = tokens(1, 3, device=device)
    for refused in (model.train, lambda: model.train(True), model.requires_grad_):
        with pytest.raises(ValueError, match="inference only"):
            refused()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert model.eval() is model and model.train(False) is model and model.requires_grad_(False) is model
    for place in (model.lm_head, model.layers[-1].gate, model.layers[0]):
        place.requires_grad_()
        with pytest.raises(ValueError, match="inference only"):
            model(ids)
        place.requires_grad_(False)
    assert not model(ids).requires_grad
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(ValueError, match="Mixtral is for inference only"):
        norm = forward_ad.make_dual(model.norm.data, model.norm.data)
        torch.func.functional_call(model, {"norm": norm}, (ids,))
