"""verify runs what generate runs: each launch configuration, batches of unequal length, and generate itself."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, MixtralConfig, generate, reference, verify
from mixtral_triton.cli import SMALL, main
from mixtral_triton.kernels.experts import op
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.model import Layer
from mixtral_triton.ops import unchecked
from mixtral_triton.tools.tolerance import Fp64Reference, Tolerance, worst
from mixtral_triton.verification import calls, generation
from mixtral_triton.verification.calls import LayerCheck, SizedCalls
from mixtral_triton.verification.layers import Target, compare_layers
from mixtral_triton.verification.report import Row
from tests.support.models import random_model

IDS = torch.randint(1, 48, (2, 20), generator=torch.Generator().manual_seed(0))
NAN, INF = math.nan, math.inf
once = pytest.mark.skipif(INTERPRETED, reason="about the comparison: run once, without the interpreter")


def model_8x7b(layers: int = 1) -> Mixtral:
    return Mixtral(MixtralConfig(num_hidden_layers=layers, rope_theta=1e6), device="meta")


def meta_check(model: Mixtral) -> LayerCheck:
    """The calls of a layer of 8x7B on meta tensors: what torch computes has shapes alone."""
    config, N = model.config, 144
    Hq, Hkv, D, K = config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.num_experts_per_tok
    empty = partial(torch.empty, dtype=torch.bfloat16, device="meta")
    H, E = config.hidden_size, config.num_local_experts
    text, heads = (2, N // 2, H), (2, N // 2, Hkv, D)
    values: dict[str, Any] = {name: empty(text) for name in ("x", "normed", "heads", "attended", "y", "output")}
    values |= {"q": empty(2, N // 2, Hq, D), "k": empty(heads), "v": empty(heads), "h": empty(N, H)}
    values |= {"logits": empty(N, E), "weights": empty(N, K).float(), "ids": empty(N, K).int()}
    return LayerCheck(reference.Values(**values), model.layers[0], config, {"cos": model.cos, "sin": model.sin})


def launched_by(block: Callable[[], Any], arch: str) -> set[Any]:
    with record_launches(arch) as records:
        block()
    items = ((x.kernel, x.num_warps, x.num_stages, tuple(sorted(x.constexprs.items()))) for x in records)
    return {item for item in items if "::" not in item[0]}


def left_out(arch: str, limit: int = 4096) -> tuple[set[Any], list[str]]:
    """What a forward of 8x7B launches and the calls of verify do not, and what the report says it left out."""
    model = model_8x7b()
    sized = SizedCalls(limit, (arch, None))
    planned: set[Any] = set()
    for call in sized.calls_of_generate(meta_check(model)):
        planned |= calls.launches(call, *sized.gpu)
    needed: set[Any] = set()
    for B, T in [(1, 1), (8, 1), (32, 1), (1, 512), (1, 2048)]:
        cache = KVCache(model.config, B, 4096, "meta", torch.bfloat16)
        needed |= launched_by(lambda: model.hidden(torch.zeros(B, T, dtype=torch.int64, device="meta"), cache), arch)  # noqa: B023
    return needed - planned, sized.not_run


@once
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_every_launch_of_generate_is_run(arch: str) -> None:
    missing, not_run = left_out(arch)
    assert not missing and not not_run


@once
def test_a_launch_that_is_not_reached_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer sizes, and with a limit of tokens, which the report names."""
    _, not_run = left_out("sm_90", limit=256)
    assert any(line.startswith("experts_add_rms_norm (1 x 512 tokens): experts_") for line in not_run)
    assert all("needs a GPU or --tokens" in line for line in not_run)
    monkeypatch.setattr(calls, "CHUNKS", [size for size in calls.CHUNKS if size[1] < 512])
    missing, _ = left_out("sm_90")
    assert {kernel for kernel, *_ in missing} >= {"experts_up_kernel", "attention_prefill_kernel"}


@once
def test_a_tile_that_no_size_reaches_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    configs = op.configs

    def with_a_tile(sizes: Any, dtype: Any, arch: str) -> Any:
        found = configs(sizes, dtype, arch)
        if sizes["T"] == 512:
            found["experts_up_kernel"] = dataclasses.replace(found["experts_up_kernel"], num_stages=2)
        return found

    monkeypatch.setattr(op, "configs", with_a_tile)
    monkeypatch.setattr(calls, "CHUNKS", [size for size in calls.CHUNKS if size[1] != 512])
    assert {kernel for kernel, *_ in left_out("sm_90")[0]} == {"experts_up_kernel"}


def tiny_model(dtype: torch.dtype = torch.bfloat16, **sizes: Any) -> Mixtral:
    options: dict[str, Any] = {"gain": 1.0, "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48}
    options |= {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 7}
    return random_model(dtype=dtype, **options | sizes)


def first_row_for_all(patch: pytest.MonkeyPatch, *names: str) -> None:
    """The first sequence's positions or lengths, or both, are taken for all."""
    for name in ("rope_append_attention", "cached_attention", "append"):
        function = getattr(unchecked, name)
        places = {"rope_append_attention": (7, 8), "cached_attention": (5, 6), "append": (4, 5)}[name]

        def faulty(*args: Any, function: Any = function, places: Any = places) -> Any:
            values = list(args)
            for place, which in zip(places, ("past", "new"), strict=True):
                if which in names:
                    values[place] = values[place][:1].expand_as(values[place]).contiguous()
            return function(*values)

        patch.setattr(unchecked, name, staticmethod(faulty))


def change_generate(name: str, change: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(generate, name, change(getattr(generate, name)))


def scale_of(name: str, factor: float) -> Callable[[pytest.MonkeyPatch], None]:
    """What attention or the experts add is wrong by a factor."""

    def inject(patch: pytest.MonkeyPatch) -> None:
        method = getattr(Layer, name)
        if name == "attention":
            patch.setattr(Layer, name, lambda layer, *args: method(layer, *args) * factor)
            return

        def experts(layer: Layer, h: Tensor, x: Tensor, weights: Tensor, *args: Any) -> Any:
            return method(layer, h, x, weights * factor, *args)

        patch.setattr(Layer, name, experts)

    return inject


def other_eps(patch: pytest.MonkeyPatch) -> None:
    route = Layer.route

    def faulty(layer: Layer, *args: Any) -> Any:
        config = layer.config
        layer.config = dataclasses.replace(config, rms_norm_eps=100 * config.rms_norm_eps)
        try:
            return route(layer, *args)
        finally:
            layer.config = config

    patch.setattr(Layer, "route", faulty)


def one_expert_more(patch: pytest.MonkeyPatch) -> None:
    route = Layer.route

    def faulty(layer: Layer, *args: Any) -> Any:
        h, x, weights, ids = route(layer, *args)
        return h, x, torch.cat((weights, weights[:, :1]), 1), torch.cat((ids, ids[:, :1]), 1)

    patch.setattr(Layer, "route", faulty)


def one_token_less(patch: pytest.MonkeyPatch) -> None:
    attention = Layer.attention
    patch.setattr(Layer, "attention", lambda layer, *args: attention(layer, *args)[:, 1:])


def with_draw(sample: Any) -> Any:
    return lambda *args: (args[3] and torch.rand(1, generator=args[3]), sample(*args))[1]


# Written down before any was tried: what is injected -> the operation and the case of the first wrong row.
FAULTS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, str]]] = {
    "first sequence's positions": (lambda patch: first_row_for_all(patch, "past"), ("layer", "attention, in chunks")),
    "first sequence's lengths": (lambda patch: first_row_for_all(patch, "new"), ("layer", "attention, in chunks")),
    "attention 10 % too large": (scale_of("attention", 1.1), ("layer", "attention, whole text")),
    "attention 1 % too large": (scale_of("attention", 1.01), ("layer", "attention, whole text, fp32")),
    "experts 10 % too large": (scale_of("experts", 1.1), ("layer", "experts, whole text")),
    "experts 1 % too large": (scale_of("experts", 1.01), ("layer", "experts, whole text, fp32")),
    "eps x 100": (other_eps, ("layer", "routes, fp32")),
    "top_k + 1": (one_expert_more, ("layer", "routes")),
    "a token less": (one_token_less, ("layer", "attention, whole text")),
    "last token of the longest prompt": (
        change_generate("prefill", lambda f: lambda m, c, i, n: f(m, c, i, torch.full_like(n, i.shape[1]))),
        ("generate", "greedy"),
    ),
    "greedy takes the second": (
        change_generate("sample", lambda f: lambda x, *args: f(x.masked_fill(x == x.amax(-1, True), -INF), *args)),
        ("generate", "greedy"),
    ),
    "no temperature": (
        change_generate("sample", lambda f: lambda x, t, *args: f(x, t and 1e3, *args)),
        ("generate", "sampled"),
    ),
    "a draw too many": (change_generate("sample", with_draw), ("generate", "sampled")),
}


@once
@pytest.mark.parametrize("name", FAULTS)
def test_injected_fault(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, place = FAULTS[name]
    model = tiny_model()
    inject(monkeypatch)
    first = verify(model, IDS).wrong[0]
    assert (first.op, first.case) == place


@once
@pytest.mark.parametrize(
    ("old", "new"),
    [((0.8, 0.9, 50), (0.8, 1.0, 50)), ((0.8, 0.9, 5), (0.8, 0.9, 50)), ((0.8, 0.5, 50), (0.8, 0.9, 50))],
    ids=["top_p off", "top_k off", "top_p larger"],
)
def test_fault_in_sample(old: Any, new: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "TOP_P", old[1])
    monkeypatch.setattr(generation, "TOP_K", old[2])
    sample = generation.sample
    monkeypatch.setattr(generation, "sample", lambda x, t, p, g, k: sample(x, t, new[1], g, new[2]))
    logits = torch.randn(400, 60, generator=torch.Generator().manual_seed(0))
    assert not generation._check_sample(logits, [torch.Generator(), torch.Generator()]).ok


def test_sample_on_a_real_vocabulary() -> None:
    """Of 64 tokens, every pair of two entries would take 500 GB. bf16 has ties at the edge of top_p."""
    logits = torch.randn(64, 32000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        assert generation._check_sample(logits.to(dtype).float(), [torch.Generator(), torch.Generator()]).ok


@once
@pytest.mark.parametrize("value", [NAN, INF])
def test_not_finite_is_wrong(value: float) -> None:
    """In each kind of row: operations, layers, routes, tensors that no token reads."""
    x = torch.randn(2, 4, 8)
    args = {"x": x, "weight": torch.ones(8), "eps": 1e-5}
    error, limit = Tolerance("rms_norm", args).measure(lambda **kwargs: torch.full_like(x, value))
    assert not Row(0, "rms_norm", "", error, limit).ok
    assert not Row(0, "layer", "", *Fp64Reference(x.double(), 1.0).measure(torch.full_like(x, value))).ok
    assert not Row(0, "", "", *worst([(0.0, 1.0), (value, value), (0.5, 1.0)])).ok
    assert not Row(0, "", "", *worst([(value, INF), (0.5, 1.0)])).ok
    model = tiny_model(torch.float32)
    _, expected, _ = compare_layers(Target(model), IDS, calls.text_calls)
    weights = expected.layers[0].weights.clone()
    weights[0, 0, 0] = value
    assert not Row(0, "layer", "", *expected.layers[0].route_error(expected.layers[0].ids, ..., weights)).ok
    with torch.no_grad():
        model.embed_tokens[49, 3] = value
    report = verify(model, IDS)
    assert [(row.op, row.case) for row in report.wrong] == [("weights", "finite")]


@once
def test_overflow_of_fp16_is_named() -> None:
    model = tiny_model(torch.float16)
    with torch.no_grad():
        model.layers[0].down_proj *= 3e4
    report = verify(model, IDS)
    assert (
        not report.ok and not report.wrong and report.verdict.startswith("OVERFLOW: plain torch overflows in float16")
    )
    assert not verify(tiny_model(torch.bfloat16), IDS).wrong


@once
def test_peer_on_a_cpu_counts_as_compared() -> None:
    pytest.importorskip("transformers")
    model = Mixtral.from_pretrained(SMALL, dtype=torch.float32)
    report = verify(model, IDS[:1, :8], folder=SMALL, peer="transformers")
    assert report.compared and report.ok, str(report)


@once
def test_command_line(monkeypatch: pytest.MonkeyPatch, capsys: Any, in_process: None) -> None:
    for options, message in (
        (["--tokens", "4096"], "needs 2 to 2048"),
        (["--tokens", "1"], "needs 2 to 2048"),
        (["--prompt", "a text", "--tokens", "99"], "fewer than --tokens 99"),
    ):
        assert main(["verify", "--device", "cpu", *options]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and len(error.splitlines()) == 1

    def crash(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(reference, "block", crash)
    assert main(["verify", "--device", "cpu"]) == 3
    error = capsys.readouterr().err.strip()
    assert "crashed: OutOfMemoryError: no memory" in error.splitlines()[-1] and len(error.splitlines()) == 1
