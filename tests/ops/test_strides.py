"""Every operation accepts tensors of any layout in memory: views of every argument, compared with the reference.

Test shapes that launch the same kernels on the same arguments are represented by the smallest one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import ops
from mixtral_triton.kernels import reference as kernel_reference
from mixtral_triton.kernels.launching.launch import describe, tma_can_read
from mixtral_triton.kernels.operation.cases import OpWithCases, as_dict
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.kernels.registry import OPERATIONS, OPS
from mixtral_triton.kernels.weights.quantized_cache import QuantizedCache
from tests.cli.commands import python
from tests.support.calls import Sizes, as_tuple, dense, inputs, inputs_without_padding, tensors

TOLERANCE = 4e-6  # of the largest value, in fp32
LARGEST = {"H": 24, "I": 20, "N": 24, "E": 8, "V": 20, "Hq": 4, "Hkv": 2, "D": 16, "C": 80, "S": 60, "past": 70}
QUANTIZED = {"weight", "gate_up", "down"}


def representative_sizes(op: OpWithCases) -> Iterator[Sizes]:
    """Of each set of kernels and arguments, the sizes with the fewest dimensions of 1, which have no stride."""
    found: dict[Any, list[tuple[int, int, Sizes]]] = {}
    for shape in op.test_shapes:
        sizes = shape
        if QUANTIZED.isdisjoint(as_dict(shape)):  # groups of a quantized weight need their columns
            known = {letter: getattr(shape, letter, None) for letter in LARGEST}
            known |= {"E": None} if getattr(shape, "groups", None) else {}  # which need their experts
            sizes = replace(shape, **{letter: min(n, LARGEST[letter]) for letter, n in known.items() if n is not None})
        args = op.inputs(sizes, op.dtypes[0], "meta")
        with record_launches() as launches:
            op.run(**args)
        key = frozenset(x.kernel for x in launches), frozenset(tensors(args))
        shapes = [x.shape for x in tensors(args).values()]
        ones, elements = sum(1 in shape for shape in shapes), sum(shape.numel() for shape in shapes)
        found.setdefault(key, []).append((ones, elements, sizes))
    yield from (min(shapes, key=lambda shape: shape[:2])[2] for shapes in found.values())


CASES = [(name, sizes) for name, op in OPS.items() for sizes in representative_sizes(op)]


LAYOUTS = ("sliced", "rows apart", "transposed", "expanded")


def with_layout(layout: str, x: Tensor, is_cache: bool) -> Tensor:
    """x in one of the LAYOUTS: every second element of each dimension, with NaN or what is out of range between; the
    same but for the last dimension; the first dimension last in memory; the first element repeated, of sequences'
    numbers the least, which is in range beside others. The last dimension of a cache stays dense."""
    if layout == "expanded":
        return (x[:1] if x.dim() > 1 else x.amin(0, keepdim=True)).expand(x.shape)
    if layout == "transposed":
        return x.transpose(0, last := 1 if is_cache else -1).contiguous().transpose(0, last)
    if layout == "rows apart" and x.dim() == 3:  # operations read rows [B,T,H] as [B T,H]
        return with_layout(layout, x.flatten(0, 1), is_cache).unflatten(0, x.shape[:2])
    around = torch.full([2 * n + 8 for n in x.shape], float("nan") if x.is_floating_point() else 10**6, device=x.device)
    steps = [2] * (x.dim() - 1) + [1 if is_cache or layout == "rows apart" else 2]
    starts = [1] * (x.dim() - 1) + [8 if layout == "rows apart" else 1]  # rows apart are read in place: at 16 bytes
    slices = tuple(slice(start, start + step * n, step) for start, n, step in zip(starts, x.shape, steps, strict=True))
    return around.to(x.dtype)[slices].copy_(x)


# Of the arguments in turn: where all have one layout, a kernel may take one's strides for another's.
# Rows that lie apart, of dense columns, are read in place; in the other layouts most operations read copies.
IN_TURN = ("rows apart and dense", "dense and rows apart", *LAYOUTS)


def change_layout(layout: str, name: str, x: Any, written: bool) -> Any:
    """A cache keeps a dense last dimension, and no element of a written one is there twice. A gate repeats columns: of
    equal experts, rounding would select one."""
    if name == "gate" and layout == "expanded":
        return x[:, :1].expand(x.shape)
    if isinstance(x, QuantizedCache) and (written or layout != "sliced"):
        return x.clone()
    if isinstance(x, QuantizedCache):  # every second slot of every second head and sequence; those between are NaN
        big = QuantizedCache.of(torch.full([*(2 * n for n in x.shape[:-1]), x.shape[-1]], float("nan")))
        return big[::2, ::2, ::2].to(x.device).copy_(x)
    if layout == "dense" or (written and layout == "expanded"):
        return x.clone()
    return with_layout(layout, x, name.endswith("cache"))


def check(
    name: str, sizes: Sizes, device: Any, change: Callable[[str, Tensor], Tensor], call: Any = OPERATIONS.get
) -> None:
    """Compare the operation on changed arguments with its reference on dense copies of them."""
    op, args = OPS[name], inputs_without_padding(name, sizes, device)
    args |= {key: change(key, value) for key, value in tensors(args).items()}
    copied = {key: x.clone(memory_format=torch.contiguous_format) for key, x in tensors(args).items()}
    before = {key: x.clone() for key, x in copied.items() if key not in op.mutates}
    want = [*as_tuple(op.call_reference(**args | copied)), *(dense(copied[key]) for key in op.mutates)]
    got = [*as_tuple(call(name)(**args)), *(dense(args[key]) for key in op.mutates)]
    for a, b in zip(got, want, strict=True):
        if b.is_floating_point():
            assert (a - b).abs().max() <= TOLERANCE * b.abs().max()
        else:
            assert torch.equal(a, b)
    assert all(torch.equal(dense(args[key]), dense(value)) for key, value in before.items())


@pytest.mark.exhaustive
@pytest.mark.parametrize("integers", (torch.int32, torch.int64))
@pytest.mark.parametrize("layouts", IN_TURN)
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_layout_of_all_arguments(name: str, sizes: Sizes, layouts: str, integers: torch.dtype, device: Any) -> None:
    def change(key: str, x: Tensor) -> Tensor:
        of_integers = isinstance(x, Tensor) and not x.is_floating_point()
        index, each = OPS[name].names.index(key), layouts.split(" and ")
        layout = each[0 if key.endswith("cache") else index % len(each)]  # caches need equal strides
        return change_layout(layout, key, x.to(integers) if of_integers else x, key in OPS[name].mutates)

    check(name, sizes, device, change)


@pytest.mark.parametrize("name", ["append", "cached_attention", "rope_append_attention"])
def test_caches_of_columns_apart_raise_value_error(name: str, device: torch.device) -> None:
    args = inputs(name, next(sizes for op, sizes in CASES if op == name), device)
    args |= {key: args[key].repeat_interleave(2, -1)[..., ::2] for key in ("k_cache", "v_cache")}
    with pytest.raises(ValueError, match=r"of strides .*, needs those of k_cache, the last of them 1"):
        OPERATIONS[name](**args)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("name", "sizes"), CASES, ids=str)
def test_lazy_negation(name: str, sizes: Sizes, device: torch.device, unguarded: None) -> None:
    """The memory of the imaginary part of a conjugate holds the opposite of its values. A guard copies the values."""

    def change(key: str, x: Any) -> Any:
        changes = isinstance(x, Tensor) and x.is_floating_point() and key not in OPS[name].mutates
        return torch._neg_view(-x) if changes else x

    check(name, sizes, device, change)


def test_lazily_negated_scales_of_a_quantized_weight(device: torch.device, unguarded: None) -> None:
    args = inputs("linear", {"T": 3, "H": 128, "N": 40, "weight": "int4:64"}, device)
    want = ops.linear(**args)
    args["weight"].scales = torch._neg_view(-args["weight"].scales)
    assert torch.equal(ops.linear(**args), want)


def test_tma_can_read() -> None:
    x = torch.empty(4, 64, dtype=torch.bfloat16)
    assert tma_can_read(x, "sm_90") and tma_can_read(x[:, 8:40], "sm_100")
    assert not any(tma_can_read(x, arch) for arch in ("sm_80", "sm_120", "gfx942"))
    for unreadable in (x.float(), x[:, 1:], x.t(), x[:, :0], x[:1].expand(4, 64), x.new_empty(8, 4)):
        assert not tma_can_read(unreadable, "sm_90")
    cache = torch.empty(2, 3, 5, 64, dtype=torch.bfloat16)
    assert tma_can_read(cache, "sm_90") and not tma_can_read(cache.transpose(1, 2), "sm_90")
    one = cache.as_strided((2, 1, 5, 64), (960, 7, 64, 1))  # the stride of one head can be anything
    assert describe(one, (1, 1, 4, 64), "sm_90").strides == [960, 960, 64, 1]


@pytest.mark.compiled
@pytest.mark.parametrize(("heads", "heads_first"), [((4, 4), True), ((1, 1), False), ((4, 1), None)])
def test_attention_of_transformers_layout_reads_by_tma(heads: Any, heads_first: bool | None, gpu: Any) -> None:
    """[B, Hkv, S, D] in memory: described with the heads first, as each stride is a multiple of the next."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, 300, 64, generator=draw).bfloat16() for n in (4, *heads))
    want = kernel_reference.attention(*(x.transpose(1, 2) for x in (q, k, v.expand_as(k))))
    q, k, v = (x.to("cuda:0").transpose(1, 2) for x in (q, k, v))
    got = ops.attention(q, k, v.expand_as(k))
    assert torch.allclose(got.held.float(), want.float(), atol=2e-2)
    args = gpu.driver.launches[0].args
    found = args["HEADS_FIRST"] if args["k_desc"] is not None else None
    assert found is heads_first and (args["v_desc"] is None) == (found is None)


BEYOND = """
import torch
from mixtral_triton import ops, reference
from mixtral_triton.kernels.launching.kernel_args import Rows
from mixtral_triton.kernels.ops.sort import gather_by_expert, gather_config
E, I, H, stride = 256, 32, 64, 1 << 24
weights = []
for N, K in ((2 * I, H), (H, I)):  # most of it is never touched, and takes no memory
    weight = torch.empty((E - 1) * stride + N * K).as_strided((E, N, K), (stride, K, 1))
    weights.append(weight)
chosen = torch.tensor([0, 130, 255])
for weight in weights:
    for expert in chosen:
        weight[expert].normal_(std=0.1)
for T in (1, 70):
    x, routes = torch.randn(T, H), torch.rand(T, 3)
    got = ops.expert_swiglu(x, *weights, chosen.repeat(T, 1), routes)
    want = reference.expert_swiglu(x, *(weight[chosen] for weight in weights), torch.arange(3).repeat(T, 1), routes)
    assert torch.allclose(got, want, atol=1e-4), T
x, ids = torch.empty((40 << 26) + 48).as_strided((41, 48), (1 << 26, 1)).normal_(), torch.arange(82).view(41, 2) % 7
rows, order, _ = gather_by_expert(Rows(x, 1 << 26), ids, 8, gather_config(48))
assert torch.equal(rows, x[order.long() // 2])
"""


@pytest.mark.slow
@pytest.mark.interpreted
def test_offsets_of_experts_and_of_gathered_rows_pass_2_to_the_31() -> None:
    """As those of DeepSeek-V3 do, in prefill and decode; 34 GB of addresses, and few pages of memory."""
    done = python("-c", BEYOND, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
