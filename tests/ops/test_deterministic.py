"""`deterministic=True`: the bits of a token, or of a sequence, do not depend on what else is in the batch, nor on where
in the batch it stands.

numpy's product sums a row in another order elsewhere in a tile, so interpreted kernels get one here with a fixed order.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, ops
from mixtral_triton.kernels import interpret, launch, linear
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.op import LaunchConfig, Shape, Sizes
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS
from tests.support.models import random_model

FLOATS = (torch.float32, torch.bfloat16)
UNGUARDED = launch.interpret  # other tests run the same kernels under guard, which takes more than twice as long
SLOW = pytest.mark.skipif(INTERPRETED, reason="minutes, interpreted; fewer others are as good there")


@pytest.fixture(autouse=True)
def quick(gates: None, ordered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpret", UNGUARDED)


# each operation; where it has an option `deterministic`, with it

# Odd sizes: rows begin anywhere in memory, which plain torch's products mind.
CASES: list[tuple[str, dict[str, int]]] = [
    ("rms_norm", {"H": 101}),
    ("add_rms_norm", {"H": 101}),
    ("embed_rms_norm", {"T": 3, "V": 40, "H": 101, "past": 4}),
    ("linear", {"H": 101, "N": 33}),
    ("route", {"E": 7, "K": 2}),
    ("gate_route", {"H": 101, "E": 7, "K": 2}),
    ("rms_norm_gate_route", {"H": 101, "E": 7, "K": 2}),
    ("expert_swiglu", {"H": 41, "I": 29, "E": 4, "K": 2}),
    ("experts_add_rms_norm", {"H": 41, "I": 29, "E": 4, "K": 2}),
    ("rope", {"T": 2, "Hq": 3, "Hkv": 1, "D": 10, "P": 50}),
    ("append", {"T": 3, "Hkv": 1, "D": 13, "C": 8, "past": 5}),
    ("rope_append_attention", Shape(T=1, Hq=3, Hkv=1, D=10, C=90, past=0, window=0)),
    ("attention", {"T": 1, "S": 90, "Hq": 3, "Hkv": 1, "D": 13, "window": 0}),
    ("attention", {"T": 20, "S": 40, "Hq": 2, "Hkv": 1, "D": 13, "window": 11}),
    ("cached_attention", Shape(T=1, Hq=3, Hkv=1, D=13, C=90, past=0, window=0, fresh=False)),
    ("cached_attention", Shape(T=5, Hq=2, Hkv=1, D=13, C=8, past=0, window=8, fresh=True)),
]
LISTED = {name for name, _ in CASES} | {"sort_by_expert"}  # whose results are integers, and exact
for name in OPS.keys() - LISTED:
    shape = OPS[name].test_shapes[0]
    CASES.append((name, {key: size for key, size in shape.items() if key != ("B" if "B" in shape else "T")}))
ROWS = [case for case in CASES if "T" not in case[1]]  # the others are of sequences
IDS = [f"{name}-{sizes.get('T', '')}".strip("-") for name, sizes in CASES]


def letter(sizes: Sizes) -> str:
    """What counts the rows, or sequences, of a batch."""
    return "B" if "T" in sizes else "T"


def whole_batch(name: str, sizes: Sizes, n: int, dtype: torch.dtype, device: Any) -> tuple[dict[str, Any], set[str]]:
    """Arguments of n rows or sequences, each at a place of its own; and which of them have a row for each."""
    op, generator = OPS[name], torch.Generator().manual_seed(0)
    args = op.inputs(Shape(sizes) | {letter(sizes): n}, dtype, device, generator)
    larger = op.inputs(Shape(sizes) | {letter(sizes): n + 1}, dtype, "meta")
    if name == "attention":
        bounds = {"starts": (0, 30), "lengths": (1, sizes["S"] + 1)}
    else:
        bounds = {"past": (0, 40), "new": (1, sizes.get("T", 1) + 1)}
    if "past" in args or name == "attention":
        args |= {k: torch.randint(*bound, (n,), generator=generator).to(device) for k, bound in bounds.items()}
    if "limit" in args:
        args["limit"] = 1000
    if "deterministic" in signature(op.run).parameters:
        args["deterministic"] = True
    tensors = {key: value for key, value in args.items() if isinstance(value, Tensor)}
    return args, {key for key, value in tensors.items() if key not in larger or larger[key].shape != value.shape}


def run(name: str, args: dict[str, Any], batched: set[str], rows: list[int]) -> list[Tensor]:
    """What these rows, in this order, give, and what became of the caches."""
    own = {key: value[rows] if key in batched else value for key, value in args.items()}
    out = getattr(torch.ops.mixtral_triton, name)(**own)
    return [*(out if isinstance(out, tuple) else () if out is None else (out,)), *(own[k] for k in OPS[name].mutates)]


def orders(sizes: Sizes, n: int) -> list[list[int]]:
    """All of them in another order, some of them alone. Of many sequences, which share no program, some will do."""
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
    few = [[0], [n // 2], [n - 1]]
    if letter(sizes) == "B" and n > 10:
        return [mixed[:9], *few]
    return [mixed, *few] if n > 100 else [mixed, mixed[::-1], [*range(1, n), 0], *few]


def check(name: str, sizes: Sizes, n: int, dtype: torch.dtype, device: Any) -> None:
    args, batched = whole_batch(name, sizes, n, dtype, device)
    among = run(name, args, batched, list(range(n)))
    for rows in orders(sizes, n):
        for want, got in zip(among, run(name, args, batched, rows), strict=True):
            assert torch.equal(want[rows], got), f"{name}: {rows} of {n}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("others", [1, 7, 64])
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=IDS)
def test_a_row_at_any_place(name: str, sizes: Sizes, others: int, dtype: torch.dtype, device: torch.device) -> None:
    """Alone too, and among others in another order."""
    if INTERPRETED and others == 64 and letter(sizes) == "B" and dtype != torch.float32:
        pytest.skip("seconds, and no other program than in fp32")
    check(name, sizes, 1 + others, dtype, device)


@pytest.mark.parametrize(("name", "sizes"), ROWS, ids=[name for name, _ in ROWS])
def test_a_row_among_a_thousand(name: str, sizes: Sizes, device: torch.device) -> None:
    """In fp32: one row at a time, plain torch is slow in bfloat16."""
    if INTERPRETED and name == "experts_add_rms_norm":
        pytest.skip("half a minute, interpreted; all it adds to expert_swiglu has a program a token")
    check(name, sizes, 1001, torch.float32, device)


@pytest.mark.parametrize("arch", ("sm_90", "sm_80", "gfx942"))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=IDS)
def test_launch_choices_do_not_depend_on_the_batch(name: str, sizes: Sizes, dtype: torch.dtype, arch: str) -> None:
    assert launch_configs(name, sizes, 1, dtype, arch) == launch_configs(name, sizes, 1001, dtype, arch)


def launch_configs(name: str, sizes: Sizes, n: int, dtype: torch.dtype, arch: str) -> list[tuple[Any, ...]]:
    args, _ = whole_batch(name, sizes, n, dtype, "cpu")
    on_meta = {key: value.to("meta") if isinstance(value, Tensor) else value for key, value in args.items()}
    with record_launches(arch=arch) as launches:
        OPS[name].run(**on_meta)
    found = [x for x in launches if x.kernel != "sort_by_expert_kernel"]
    return [(x.kernel, dict(x.constexprs), x.num_warps, x.num_stages) for x in found]


# the faults that these tests are for


def by_batch(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32 if sizes["T"] > 1 else 16, "GROUP_M": 1}
    return {"linear_kernel": LaunchConfig(tiles, num_warps=4)}


def test_a_tile_that_depends_on_the_batch_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "configs", by_batch)
    linear_case = dict(CASES)["linear"]
    with pytest.raises(AssertionError):
        test_launch_choices_do_not_depend_on_the_batch("linear", linear_case, torch.bfloat16, "sm_90")
    if INTERPRETED:
        with pytest.raises(AssertionError, match=r"linear: .* of 8"):
            check("linear", linear_case, 8, torch.float32, "cpu")


@pytest.mark.skipif(not INTERPRETED, reason="about the product of interpreted kernels")
@pytest.mark.parametrize("name", ("linear", "expert_swiglu", "experts_add_rms_norm"))
def test_a_sum_that_depends_on_the_place_is_seen(name: str, ordered: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every second row and column summed from the last: as a library may, by the place in the tile."""

    def out_of_order(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        total, turned = ordered(a, b), ordered(a[:, ::-1], b[::-1])
        total[1::2], total[:, 1::2] = turned[1::2], turned[:, 1::2]
        return total

    monkeypatch.setattr(interpret, "product", out_of_order)
    with pytest.raises(AssertionError, match=rf"{name}: .* of 8"):
        check(name, dict(CASES)[name], 8, torch.float32, "cpu")


# sequences of their own length, and a model


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


@pytest.fixture(scope="module")
def model() -> Mixtral:
    sizes = {"vocab_size": 41, "hidden_size": 54, "intermediate_size": 47, "num_attention_heads": 3}
    return random_model(deterministic=True, gain=1.0, num_hidden_layers=2, sliding_window=3, **sizes)


def steps(model: Mixtral, ids: Tensor, lengths: Tensor) -> list[Tensor]:
    """Logits of each sequence's tokens: of a ragged chunk behind an empty cache, then of two tokens one by one."""
    cache = KVCache(model.config, len(ids), device=model.device, dtype=model.dtype)
    chunk = model(ids[:, : int(lengths.max())], cache=cache, lengths=lengths)
    one_by_one = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(2)], dim=1)
    return [torch.cat((chunk[b, :n], one_by_one[b])) for b, n in enumerate(lengths.tolist())]


@pytest.mark.parametrize("others", [7, *(pytest.param(n, marks=SLOW) for n in (1, 64, 1000))])
def test_a_sequence_of_a_model_at_any_place(others: int, model: Mixtral, device: torch.device) -> None:
    """In another order, and alone: then in a chunk as short as itself."""
    model, generator, n = model.to(device), torch.Generator().manual_seed(1), 1 + others
    ids = torch.randint(40, (n, 5), generator=generator).to(device)
    lengths = torch.randint(1, 6, (n,), generator=generator).to(device)
    among = steps(model, ids, lengths)
    mixed = torch.randperm(n, generator=generator).tolist()
    for rows in ([*range(1, n), 0], mixed, [n // 2])[INTERPRETED:]:
        for row, got in zip(rows, steps(model, ids[rows], lengths[rows]), strict=True):
            assert torch.equal(among[row], got), f"{row} of {n}"


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


@pytest.mark.parametrize("format", ["int4", "fp8"])
def test_quantized_weights_keep_the_promise(format: str, device: torch.device) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "sliding_window": 3}
    model = random_model(device, deterministic=True, weights={"experts": format, "linear": "int8"}, **sizes)
    ids = torch.randint(20, (9, 5), generator=torch.Generator().manual_seed(1)).to(device)
    lengths = torch.tensor([5, 3, 1, 4, 5, 2, 5, 1, 3], device=device)
    among = steps(model, ids, lengths)
    for rows in ([4], [8, 0, 3], [*range(8, -1, -1)]):
        for row, got in zip(rows, steps(model, ids[rows], lengths[rows]), strict=True):
            assert torch.equal(among[row], got), f"{row} of 9"


def test_a_text_is_the_same_in_any_company(model: Mixtral, device: torch.device) -> None:
    model = model.to(device)
    prompts = [torch.tensor(ids, device=device) for ids in ([3, 5, 7], [1] * 8, [2, 9])]
    among = model.generate(prompts, max_new_tokens=4)
    for prompt, text in zip(prompts, among, strict=True):
        assert model.generate([prompt], max_new_tokens=4)[0].equal(text)
