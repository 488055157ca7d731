"""The decode loop as a graph: a tape stands in for CUDA's, and replays the very operations on the very tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mixtral_triton import Mixtral, MixtralConfig, generate
from mixtral_triton.kernels.launch import INTERPRETED

V = 23
NEW = 8 if INTERPRETED else 20


class Tape(TorchDispatchMode):
    """Like a CUDA graph: what ran once runs again with the same memory and the same numbers; no line of Python does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:  # a view shares the memory that is written again
            self.calls.append((func, args, kwargs or {}, tree_leaves(out)))
        return out

    def replay(self) -> None:
        for func, args, kwargs, outs in self.calls:
            for old, new in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Decoding captures on any device, with a tape; the list holds an entry a replay."""
    count: list[int] = []

    def captured(step: Any, generator: Any) -> Callable[[], None]:
        state = (step.token.clone(), step.ended.clone(), step.cache.lengths.clone())
        with Tape() as tape:
            step()
        for now, before in zip((step.token, step.ended, step.cache.lengths), state, strict=True):
            now.copy_(before)  # a capture runs nothing
        return lambda: count.append(1) or tape.replay()

    monkeypatch.setattr(generate, "can_capture", lambda model: True)
    monkeypatch.setattr(generate, "captured", captured)
    return count


def build(window: int | None, device: torch.device) -> Mixtral:
    config = MixtralConfig(
        vocab_size=V, hidden_size=16, intermediate_size=12, num_hidden_layers=1 if INTERPRETED else 2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4, rope_theta=1e4, max_position_embeddings=64,
        sliding_window=window, eos_token_id=None,
    )  # fmt: skip
    model, generator = Mixtral(config, device=device, dtype=torch.float32), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.copy_(torch.randn(weight.shape, generator=generator) * 2 * weight.shape[-1] ** -0.5)
    return model


def prompts(device: torch.device) -> list[torch.Tensor]:
    return [torch.tensor(ids, device=device) for ids in ([3, 5, 7, 1, 2, 2], [4], [2, 9, 11])]


@pytest.mark.parametrize("window", [None, 5])
def test_replays_give_the_loop_s_text(
    window: int | None, device: torch.device, replays: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ring turns round, positions grow and routes change, in the replays alone."""
    model = build(window, device)
    got = model.generate(prompts(device), max_new_tokens=NEW)
    assert len(replays) == NEW - 2
    monkeypatch.setattr(generate, "can_capture", lambda model: False)
    want = model.generate(prompts(device), max_new_tokens=NEW)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True)) and len(replays) == NEW - 2
    assert len({int(t) for text in want for t in text[-NEW:]}) > 4  # else any frozen number would do


def test_replays_end_with_the_last_sequence(device: torch.device, replays: list[int]) -> None:
    model = build(None, device)
    free = torch.stack([text[-NEW:] for text in model.generate(prompts(device), max_new_tokens=NEW)])
    eos = sorted({int(t) for t in free[:, 3]})
    replays.clear()
    texts = model.generate(prompts(device), max_new_tokens=NEW, eos_token_id=eos)
    ends = [next(i for i, t in enumerate(row.tolist()) if t in eos) for row in free]
    assert [len(text) - len(p) for text, p in zip(texts, prompts(device), strict=True)] == [end + 1 for end in ends]
    assert len(replays) == max(max(ends) - 1, 0)


@pytest.mark.skipif(INTERPRETED, reason="about the draw, whichever way operations go")
def test_replays_draw_anew(device: torch.device, replays: list[int]) -> None:
    model = build(None, device)
    drawn = torch.Generator(device).manual_seed(0)
    text = model.generate([prompts(device)[0]], max_new_tokens=40, temperature=50.0, generator=drawn)[0]
    assert len(replays) == 38 and len(set(text[-30:].tolist())) > 8


def test_a_capture_that_fails_is_said_and_decoding_goes_on(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(step: Any, generator: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model = build(None, device)
    want = model.generate(prompts(device), max_new_tokens=6)
    monkeypatch.setattr(generate, "can_capture", lambda model: True)
    monkeypatch.setattr(generate, "captured", refuses)
    with pytest.warns(RuntimeWarning, match="without a CUDA graph.*not permitted"):
        got = model.generate(prompts(device), max_new_tokens=6)
    assert all(a.equal(b) for a, b in zip(got, want, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_cuda_s_own_graph(temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    model = build(5, device)
    texts = []
    for capture in (True, False):
        monkeypatch.setattr(generate, "can_capture", lambda model, capture=capture: capture)
        drawn = torch.Generator(device).manual_seed(0)
        texts.append(model.generate(prompts(device), max_new_tokens=20, temperature=temperature, generator=drawn))
    assert all(len(a) == len(b) for a, b in zip(*texts, strict=True))
    if temperature == 0.0:
        assert all(a.equal(b) for a, b in zip(*texts, strict=True))


def test_a_generator_of_another_device_is_refused(device: torch.device) -> None:
    class Elsewhere(torch.Generator):
        device = torch.device("xpu")

    with pytest.raises(ValueError, match="generator is on xpu, needs the model's device"):
        build(None, device).generate(prompts(device), temperature=1.0, generator=Elsewhere())
