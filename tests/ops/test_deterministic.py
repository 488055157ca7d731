"""`deterministic=True`: the bits of a token, or of a sequence, depend neither on the rest of the batch nor on its place
in it.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, ops
from mixtral_triton.kernels.launching.launch import INTERPRETED, LaunchConfig
from mixtral_triton.kernels.ops import linear
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPS, dispatched
from tests.support.calls import Sizes, outputs, tensors
from tests.support.models import random_model

FLOATS = (torch.float32, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("unguarded")  # other tests run the same kernels under guard


def batch_letter(name: str) -> str:
    """The letter that counts the rows, or the sequences, of a batch."""
    return OPS[name].row_letter


# Odd sizes: rows start at any address, on which the products of plain torch depend.
CASES: list[tuple[str, Sizes]] = [
    ("rms_norm", {"H": 101}),
    ("add_rms_norm", {"H": 101}),
    ("embed_rms_norm", {"T": 3, "V": 40, "H": 101, "past": 4}),
    ("linear", {"H": 64, "N": 33, "weight": "int8"}),
    ("linear", {"H": 101, "N": 33}),
    ("route", {"E": 7, "K": 2}),
    ("gate_route", {"H": 101, "E": 7, "K": 2}),
    ("rms_norm_gate_route", {"H": 101, "E": 7, "K": 2}),
    ("expert_swiglu", {"H": 64, "I": 64, "E": 2, "K": 2, "gate_up": "int4:32", "down": "fp8"}),
    ("expert_swiglu", {"H": 41, "I": 29, "E": 4, "K": 2}),
    ("experts_add_rms_norm", {"H": 41, "I": 29, "E": 4, "K": 2}),
    ("rope", {"T": 2, "Hq": 3, "Hkv": 1, "D": 10, "P": 50}),
    ("append", {"T": 3, "Hkv": 1, "D": 13, "C": 8, "past": 5}),
    ("rope_append_attention", {"T": 1, "Hq": 3, "Hkv": 1, "D": 10, "C": 90, "past": 0, "window": 0}),
    ("attention", {"T": 1, "S": 90, "Hq": 3, "Hkv": 1, "D": 13, "window": 0}),
    ("attention", {"T": 20, "S": 40, "Hq": 2, "Hkv": 1, "D": 13, "window": 11}),
    ("cached_attention", {"T": 5, "Hq": 2, "Hkv": 1, "D": 13, "C": 8, "past": 0, "window": 8}),
    ("append", {"T": 3, "Hkv": 1, "D": 14, "C": 8, "past": 5, "cache": "int8"}),
    ("rope_append_attention", {"T": 1, "Hq": 3, "Hkv": 1, "D": 10, "C": 90, "past": 0, "window": 0, "cache": "int8"}),
    ("cached_attention", {"T": 5, "Hq": 2, "Hkv": 1, "D": 14, "C": 8, "past": 0, "window": 8, "cache": "int8"}),
]
# The results of sort_by_expert are integers, and exact; a backward pass of more tokens takes larger tiles.
LISTED = {name for name, _ in CASES} | {"sort_by_expert", "expert_swiglu_backward"}
# Operations of no model need kernels: the torch backend is deterministic only where an operation has the argument.
for name in OPS.keys() - LISTED if INTERPRETED else ():
    shape = vars(OPS[name].test_shapes[0])
    CASES.append((name, {key: size for key, size in shape.items() if key != batch_letter(name)}))


def make_batch(name: str, sizes: Sizes, n: int, dtype: torch.dtype, device: Any) -> tuple[dict[str, Any], set[str]]:
    """Arguments of n rows or sequences, each at another position; and the names of those with one row for each."""
    op, generator, letter = OPS[name], torch.Generator().manual_seed(0), batch_letter(name)
    args = op.inputs(dict(sizes) | {letter: n}, dtype, device, generator)
    larger = op.inputs(dict(sizes) | {letter: n + 1}, dtype, "meta")
    if name == "attention":
        bounds = {"starts": (0, 30), "lengths": (1, sizes["S"] + 1)}
    else:
        bounds = {"past": (0, 40), "new": (1, sizes.get("T", 1) + 1)}
    if "past" in args or name == "attention":
        args |= {k: torch.randint(*bound, (n,), generator=generator).to(device) for k, bound in bounds.items()}
    if "limit" in args:
        args["limit"] = 1000
    if op.deterministic_index is not None:
        args["deterministic"] = True
    return args, {key for key, x in tensors(args).items() if key not in larger or larger[key].shape != x.shape}


def row_orders(name: str, n: int) -> list[list[int]]:
    """All rows in another order, and single rows. Sequences share no program, so a few of many suffice."""
    mixed = torch.randperm(n, generator=torch.Generator().manual_seed(n)).tolist()
    single = [[0], [n // 2], [n - 1]]
    if batch_letter(name) == "B" and n > 10:
        return [mixed[:9], *single]
    return [mixed, *single] if n > 100 else [mixed, mixed[::-1], [*range(1, n), 0], *single]


def check(name: str, sizes: Sizes, n: int, dtype: torch.dtype, device: Any) -> None:
    args, batched = make_batch(name, sizes, n, dtype, device)

    def run(rows: list[int]) -> list[Tensor]:
        selected = {key: value[rows] if key in batched else value for key, value in args.items()}
        return outputs(name, dispatched(name, selected), selected)

    batch = run(list(range(n)))
    for rows in row_orders(name, n):
        for want, got in zip(batch, run(rows), strict=True):
            assert torch.equal(want[rows], got), f"{name}: {rows} of {n}"


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n", [2, 8, 65, 1001])
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_row_at_any_place(name: str, sizes: Sizes, n: int, dtype: torch.dtype, device: torch.device) -> None:
    """Of 1001, rows alone in fp32: for one row at a time, plain torch is slow in bfloat16."""
    sequences = batch_letter(name) == "B"
    if n == 1001 and (sequences or dtype != torch.float32 or (INTERPRETED and name == "experts_add_rms_norm")):
        pytest.skip("takes half a minute, and is made of what runs in other cases")
    if INTERPRETED and n == 65 and sequences and dtype != torch.float32:
        pytest.skip("takes seconds, and runs the same programs as fp32")
    check(name, sizes, n, dtype, device)


@pytest.mark.compiled
@pytest.mark.parametrize("arch", ("sm_90", "sm_80", "gfx942"))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_launch_configurations_do_not_depend_on_the_batch(name: str, sizes: Sizes, dtype: Any, arch: str) -> None:
    assert launch_configs(name, sizes, 1, dtype, arch) == launch_configs(name, sizes, 1001, dtype, arch)


def launch_configs(name: str, sizes: Sizes, n: int, dtype: torch.dtype, arch: str) -> list[tuple[Any, ...]]:
    args, _ = make_batch(name, sizes, n, dtype, "cpu")
    with record_launches(arch=arch) as launches:
        OPS[name].run(**args | {key: value.to("meta") for key, value in tensors(args).items()})
    found = [x for x in launches if x.kernel != "sort_by_expert_kernel"]
    return [(x.kernel, dict(x.constexprs), x.num_warps, x.num_stages) for x in found]


def test_tile_that_depends_on_the_batch_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def configs_by_batch(sizes: Sizes, dtype: torch.dtype, arch: str) -> dict[str, LaunchConfig]:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32 if sizes.T > 1 else 16, "GROUP_M": 1}
        return {"linear_kernel": LaunchConfig(tiles, num_warps=4)}

    monkeypatch.setattr(linear, "configs", configs_by_batch)
    sizes = dict(CASES)["linear"]
    with pytest.raises(AssertionError):
        test_launch_configurations_do_not_depend_on_the_batch("linear", sizes, torch.bfloat16, "sm_90")
    if INTERPRETED:
        with pytest.raises(AssertionError, match=r"linear: .* of 8"):
            check("linear", sizes, 8, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("T", "window", "dtype"),
    [(1, None, FLOATS[1]), (1, 70, FLOATS[0]), (40, None, FLOATS[0]), (40, 16, FLOATS[1])],
)
def test_sequence_alone_and_with_longer_ones(T: int, window: int | None, dtype: Any, device: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, T, 4, 64, generator=generator).to(device=device, dtype=dtype)
    k, v = (torch.randn(3, 900, 2, 64, generator=generator).to(device=device, dtype=dtype) for _ in range(2))
    lengths = torch.tensor([300, 900, 41], device=device)
    batch = ops.attention(q, k, v, window=window, lengths=lengths, deterministic=True)
    for b, length in enumerate(lengths.tolist()):
        one = slice(b, b + 1)
        alone = ops.attention(q[one], k[one, :length], v[one, :length], window=window, deterministic=True)
        assert torch.equal(batch[one], alone)
    first, second = (ops.attention(q, k, v, window=window, lengths=lengths) for _ in range(2))
    assert torch.equal(first, second)  # repeated calls give the same bits without the argument, too


@pytest.fixture(scope="module")
def model() -> Mixtral:
    sizes = {"vocab_size": 41, "hidden_size": 54, "intermediate_size": 47, "num_attention_heads": 3}
    return random_model(deterministic=True, gain=1.0, num_hidden_layers=2, sliding_window=3, **sizes)


def steps(model: Mixtral, ids: Tensor, lengths: Tensor, dtype: Any) -> list[Tensor]:
    """Logits of each sequence's tokens in a ragged chunk behind an empty cache, and in two decode steps."""
    cache = KVCache(model.config, len(ids), device=model.device, dtype=dtype or model.dtype)
    chunk = model(ids[:, : int(lengths.max())], cache=cache, lengths=lengths)
    decoded = torch.cat([model(ids[:, t : t + 1], cache=cache) for t in range(2)], dim=1)
    return [torch.cat((chunk[b, :n], decoded[b])) for b, n in enumerate(lengths.tolist())]


def check_model(model: Mixtral, ids: Tensor, lengths: Tensor, orders: list[list[int]], cache: Any = None) -> None:
    batch = steps(model, ids, lengths, cache)
    for rows in orders:
        for row, got in zip(rows, steps(model, ids[rows], lengths[rows], cache), strict=True):
            assert torch.equal(batch[row], got), f"{row} of {len(ids)}"


@pytest.mark.slow
@pytest.mark.parametrize("n", [8, *(pytest.param(n, marks=pytest.mark.compiled) for n in (2, 65, 1001))])
def test_sequence_of_a_model_at_any_place(n: int, model: Mixtral, device: torch.device) -> None:
    """Alone, a sequence is in a chunk of no more than its length."""
    model, generator = model.to(device), torch.Generator().manual_seed(1)
    ids = torch.randint(40, (n, 5), generator=generator).to(device)
    lengths = torch.randint(1, 6, (n,), generator=generator).to(device)
    mixed = torch.randperm(n, generator=generator).tolist()
    check_model(model, ids, lengths, [[*range(1, n), 0], mixed, [n // 2]][INTERPRETED:])


@pytest.mark.interpreted
def test_tiles_of_keys_do_not_depend_on_the_queries() -> None:
    """The bits depend on where tiles are: a chunk of 3 is padded to 128, behind keys for all kinds of tiles."""
    generator = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 1, 600, 16, generator=generator).half() for _ in range(2))
    chunk = [torch.randn(1, 128, 1, 16, generator=generator).half() for _ in range(3)]
    bounds = torch.tensor([500]), torch.tensor([3])
    cache = keys, values, *bounds, 400, True
    padded, short = (ops.cached_attention(*(x[:, :T] for x in chunk), *cache)[:, :3] for T in (128, 3))
    assert padded.equal(short)
