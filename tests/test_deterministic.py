"""`deterministic=True`: the bits of a token, or of a sequence, do not depend on what else is in the batch."""

from __future__ import annotations

import pytest
import torch

from mixtral_triton import KVCache, Mixtral, MixtralConfig, ops
from mixtral_triton.kernels.launch import INTERPRETED

FLOATS = (torch.float32, torch.bfloat16)
# One row at a time, plain torch is slow in bfloat16.
OTHERS = [(others, dtype) for others in (1, 7, 64) for dtype in FLOATS] + [(1000, torch.float32)]


@pytest.mark.parametrize(("others", "dtype"), OTHERS)
def test_a_token_alone_and_among_others(others: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate_up, down = (
        torch.randn(shape, generator=generator).mul(0.2).to(device=device, dtype=dtype)
        for shape in ((1 + others, 64), (4, 96, 64), (4, 64, 48))
    )
    weights, ids = ops.route(torch.randn(1 + others, 4, generator=generator).to(device), 2)
    alone = ops.expert_swiglu(x[:1], gate_up, down, ids[:1], weights[:1], deterministic=True)
    among = ops.expert_swiglu(x, gate_up, down, ids, weights, deterministic=True)
    assert torch.equal(among[:1], alone)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("T", "window"), [(1, None), (1, 70), (40, None), (40, 16)])
def test_a_sequence_alone_and_among_longer_ones(
    T: int, window: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, T, 4, 64, generator=generator).to(device=device, dtype=dtype)
    k, v = (torch.randn(3, 900, 2, 64, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([300, 900, 41], device=device)
    among = ops.attention(q, k, v, window=window, lengths=lengths, deterministic=True)
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        alone = ops.attention(q[one], k[one, :length], v[one, :length], window=window, deterministic=True)
        assert torch.equal(among[one], alone)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_call_gives_the_same_bits(deterministic: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 2, 64, generator=generator).to(device) for n in (1, 600))
    first, again = (ops.attention(q, k, k, deterministic=deterministic) for _ in range(2))
    assert torch.equal(first, again)


@pytest.mark.parametrize(("others", "dtype"), OTHERS)
def test_a_row_of_the_gate_and_of_a_linear_layer(others: int, dtype: torch.dtype, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x, gate, weight = (
        torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
        for shape in ((1 + others, 100), (8, 100), (40, 100))
    )
    alone, among = (
        (ops.linear(rows, weight, deterministic=True), *ops.gate_route(rows, gate, 2, deterministic=True))
        for rows in (x[:1], x)
    )
    for one, many in zip(alone, among, strict=True):
        assert torch.equal(many[:1], one)


@pytest.fixture(scope="module")
def model() -> Mixtral:
    config = MixtralConfig(
        vocab_size=40, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64, sliding_window=3, rope_theta=1e4,
    )  # fmt: skip
    model, generator = Mixtral(config, dtype=torch.float32, deterministic=True), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return model


def steps(model: Mixtral, ids: torch.Tensor, lengths: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the first sequence's tokens: a ragged chunk behind an empty cache, then two tokens one by one."""
    cache = KVCache(model.config, len(ids), device=model.device, dtype=model.dtype)
    chunk = model(ids, cache=cache, lengths=lengths)[0, : int(lengths[0])]
    return [chunk, *(model(ids[:, t : t + 1], cache=cache)[0] for t in range(2))]


SLOW = pytest.mark.skipif(INTERPRETED, reason="minutes, interpreted; the operations alone run among as many")


@pytest.mark.parametrize("others", [1, 7, pytest.param(64, marks=SLOW), pytest.param(1000, marks=SLOW)])
def test_a_sequence_of_a_model_alone_and_among_others(others: int, model: Mixtral, device: torch.device) -> None:
    model = model.to(device)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (1 + others, 5), generator=generator).to(device)
    lengths = torch.randint(1, 6, (1 + others,), generator=generator).to(device)
    lengths[0], longest = 4, int(lengths[1:].max())
    among = steps(model, ids[:, : max(longest, 4)], lengths)
    alone = steps(model, ids[:1, :4], lengths[:1])
    for one, many in zip(alone, among, strict=True):
        assert torch.equal(one, many)


@pytest.mark.parametrize(("new", "padded"), [(1, 5), pytest.param(3, 20, marks=SLOW)])
def test_a_short_chunk_alone_and_padded(new: int, padded: int, model: Mixtral, device: torch.device) -> None:
    """Behind a ring that has turned round: as long as the longest row of the batch, one token too, a chunk may be."""
    model = model.to(device)
    ids = torch.randint(40, (2, 7 + padded), generator=torch.Generator().manual_seed(2)).to(device)
    found = []
    for rows, T in ((1, new), (2, padded)):
        cache = KVCache(model.config, rows, device=model.device, dtype=model.dtype)
        model(ids[:rows, :7], cache=cache)
        lengths = torch.tensor([new, padded][:rows], device=device)
        found.append(model(ids[:rows, 7 : 7 + T], cache=cache, lengths=lengths)[0, :new])
    assert found[0].equal(found[1])


@pytest.mark.skipif(not INTERPRETED, reason="about tiles of keys, which plain torch has none of")
def test_tiles_of_keys_do_not_depend_on_the_queries() -> None:
    """Where they lie decides the bits: a chunk of 3 padded to 128, behind keys for all kinds of tiles."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 1, 600, 16, generator=generator).half() for _ in range(2))
    chunk = [torch.randn(1, 128, 1, 16, generator=generator).half() for _ in range(3)]
    bounds = torch.tensor([500]), torch.tensor([3])
    padded, own = (
        ops.cached_attention(*(x[:, :T] for x in chunk), keys, values, *bounds, 400, True)[:, :3] for T in (128, 3)
    )
    assert padded.equal(own)


def test_a_text_is_the_same_in_any_company(model: Mixtral, device: torch.device) -> None:
    model = model.to(device)
    prompts = [torch.tensor(ids, device=device) for ids in ([3, 5, 7], [1] * 8, [2, 9])]
    among = model.generate(prompts, max_new_tokens=4)
    for prompt, text in zip(prompts, among, strict=True):
        assert model.generate([prompt], max_new_tokens=4)[0].equal(text)
