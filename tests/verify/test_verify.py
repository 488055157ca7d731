"""verify on a Mixtral, a folder and a transformers model: what it compares, reports and rejects."""

import json
import math
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import Mixtral, hf, verify
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.kernels.registry import dispatched
from mixtral_triton.kernels.weights.quantized_cache import QuantizedCache
from mixtral_triton.model.layer import Layer
from mixtral_triton.verification import families, generation, probe
from mixtral_triton.verification.forwards import ALONE, CHUNKS, TOKENS, UNCACHED
from mixtral_triton.verification.report import BITS, FP64, Report, Row
from mixtral_triton.verification.tolerance import Tolerance, largest
from tests.cli.commands import run_json
from tests.support.faults import DTYPES, replace_by, small_model
from tests.support.models import random_model
from tests.support.selection import slow_interpreted

IDS = torch.randint(1, 48, (2, 20), generator=torch.Generator().manual_seed(0))
# Of the registry; verify skips operations that no layer of a model has a call for.
OPERATIONS = {
    *("rms_norm", "add_rms_norm", "embed_rms_norm", "linear", "route", "gate_route", "rms_norm_gate_route"),
    *("sort_by_expert", "expert_swiglu", "experts_add_rms_norm", "rope", "append", "attention", "cached_attention"),
    *("rope_append_attention", "expert_swiglu_backward"),
}
EMBED = "embed_rms_norm"
once = pytest.mark.skipif(INTERPRETED, reason="about the comparison: run once, without the interpreter")
interpreted = pytest.mark.skipif(not INTERPRETED, reason="about kernels: with the interpreter")


def check_complete(report: Report, layers: int) -> None:
    """Every operation of a layer in every layer; the embedding is outside of them."""
    for layer in range(layers):
        assert {row.op for row in report.rows if row.layer == layer} - {"weights"} == {*OPERATIONS, "layer"} - {EMBED}
    assert EMBED in {row.op for row in report.rows if row.layer is None}


@slow_interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [8] if INTERPRETED else [8, 100, None])
def test_right_model(dtype: torch.dtype, window: int | None) -> None:
    report = verify(small_model(dtype, sliding_window=window), IDS[:, :10] if INTERPRETED else IDS)
    assert not report.wrong, str(report)
    check_complete(report, 2)
    ways = UNCACHED, CHUNKS, TOKENS, ALONE
    wanted = {part + way for part in ("attention, ", "routes, ", "") for way in ways}
    wanted |= {part + way + FP64 for part in ("attention, ", "routes, ", "experts, ", "") for way in ways}
    for layer in range(2):
        assert {row.case for row in report.rows if (row.op, row.layer) == ("layer", layer)} == wanted
    outside = Counter(row.op for row in report.rows if row.layer is None)
    if not INTERPRETED:  # nor sizes of `generate`
        assert outside == {"weights": 1, EMBED: 3, "linear": 3, "logits": 9, "generate": 1}
    assert report.flips == 0 or dtype != torch.float32


@once
@pytest.mark.exhaustive
@pytest.mark.parametrize("T", [1, 2, 3])
def test_texts_that_are_too_short_for_chunks(T: int) -> None:
    report = verify(small_model(sliding_window=8), IDS[:, :T])
    assert not report.wrong, str(report)
    check_complete(report, 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:1] if INTERPRETED else DTYPES)
@pytest.mark.parametrize("window", [6] if INTERPRETED else [6, None])
def test_right_transformers_model(dtype: torch.dtype, window: int | None, make_hf: Any) -> None:
    model = make_hf(sliding_window=window).to(dtype)
    state = {name: x.clone() for name, x in model.state_dict().items()}
    report = verify(model, IDS[:, :10])
    assert report.ok and "transformers' own modules" in str(report), str(report)
    assert all(torch.equal(x, model.state_dict()[name]) for name, x in state.items()) and not hf.applied(model)
    for layer in range(model.config.num_hidden_layers):
        found = {row.op for row in report.rows if row.layer == layer}
        assert found == {"rms_norm", "rope", "gate_route", "attention", "experts"}
    assert (report.flips == 0 and report.rows[-1].op == "logits") or dtype != torch.float32


@once
def test_deterministic_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right; and with a chunk of one token that takes another path than a longer one, which holds the same row."""
    model = small_model(torch.bfloat16, rms_norm_eps=1.0)  # so large that it is no small change of another
    model.deterministic = True
    assert not verify(model, IDS).wrong
    alone = lambda f: lambda layer, h, *args: f(layer, h, *args) * (1.01 if h.shape[1] == 1 else 1)  # noqa: E731
    replace_by(Layer, "attention", alone)(monkeypatch)
    assert [row.case for row in generation.repeated_rows(model, IDS) if not row.ok] == [BITS]


def random_case(seed: int, dtype: torch.dtype, *gains: float) -> tuple[Mixtral, Tensor]:
    draw = random.Random(seed)
    groups, experts = draw.choice([1, 2]), draw.choice([2, 4, 5, 8])
    sizes: dict[str, Any] = {
        "gain": draw.choice(gains or (0.5, 1.0, 2.0)),
        "vocab_size": draw.choice([33, 50, 100]),
        "hidden_size": draw.choice([24, 32, 48, 64]),
        "intermediate_size": draw.choice([16, 40, 64]),
        "num_hidden_layers": draw.choice([1, 2]),
        "num_attention_heads": groups * draw.choice([1, 2, 3]),
        "head_dim": draw.choice([8, 16, 20, 32]),
        "num_experts_per_tok": draw.randint(1, min(experts, 3)),
        "sliding_window": draw.choice([None, 1, 3, 8, 40]),
    }
    shape = (draw.randint(1, 2), draw.randint(1, 12 if INTERPRETED else 40))
    ids = torch.randint(33, shape, generator=torch.Generator().manual_seed(seed))
    return random_model("cpu", dtype, seed, num_key_value_heads=groups, num_local_experts=experts, **sizes), ids


SHARP = [(208, 8.0), (224, 16.0), (240, 4.0), (240, 8.0), (240, 16.0)]  # softmax is nearly a choice: errors grow
RANDOM = [(seed, (), (DTYPES[seed % 3],) if INTERPRETED else DTYPES) for seed in range(2 if INTERPRETED else 20)]


@slow_interpreted
@pytest.mark.parametrize(
    ("seed", "gains", "dtypes"), RANDOM + [(seed, (gain,), DTYPES[:2]) for seed, gain in SHARP if not INTERPRETED]
)
def test_no_false_positives(seed: int, gains: tuple[float, ...], dtypes: list[torch.dtype]) -> None:
    for dtype in dtypes:
        report = verify(*random_case(seed, dtype, *gains))
        assert not report.wrong, str(report)


@interpreted
@pytest.mark.parametrize("seed", [150, 170, 297])
def test_roundings_in_a_row_are_no_fault(seed: int) -> None:
    """With an outlier in the norm's weights torch's own error is small by chance, the kernels' beyond twice it."""
    generator, T, H, E = torch.Generator().manual_seed(seed), 2, 32, 4
    draw = partial(torch.randn, generator=generator)
    norm = 1 + 0.1 * draw(H)
    norm[seed % H] *= 100
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(T)]).int()
    args = {"x": draw(T, H), "gate_up_proj": draw(E, 2 * H, H) / H**0.5, "down_proj": draw(E, H, H) / H**0.5}
    weights = draw(T, 2).softmax(-1)
    args = {name: x.bfloat16() for name, x in {**args, "residual": draw(T, H), "norm_weight": norm}.items()}
    op, args = "experts_add_rms_norm", {**args, "ids": ids, "weights": weights, "eps": 1e-5}
    tolerance = Tolerance(op, args)
    earlier = tolerance.limits
    error, limit = tolerance.measure(dispatched(op, args))
    assert tolerance.limits is not earlier and error <= limit


@interpreted
@pytest.mark.parametrize("seed", [55, 76, 91])
def test_roundings_of_a_cache_of_8_bits_are_no_fault(seed: int) -> None:
    """Of one key the kernel rounds the scale and the result, torch the value, whose error is small by chance."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed))
    k, v = (QuantizedCache.of(draw(1, 2, 2, 8)) for _ in range(2))
    args: dict[str, Any] = {"q": draw(1, 1, 4, 8).bfloat16(), "k_cache": k, "v_cache": v, "window": 2}
    args |= dict.fromkeys("kv", torch.zeros(1, 1, 2, 8).bfloat16())
    args |= {"past": torch.tensor([1]), "new": torch.tensor([0])}
    error, limit = Tolerance("cached_attention", args).measure(dispatched("cached_attention", args))
    assert 2**-8 < error <= limit


@once
def test_small_checkpoint_compared_with_itself_exits_1() -> None:
    found = run_json("verify --device cpu", status=1)
    assert not found["ok"] and not found["compared"] and all(row["ok"] for row in found["rows"])
    assert found["verdict"].startswith("NOTHING WAS COMPARED")
    assert set(found["rows"][0]) == {"layer", "op", "case", "error", "limit", "note", "ok"}
    assert {(row["layer"], row["op"]) for row in found["rows"]} >= {
        (at, op) for at in range(4) for op in OPERATIONS - {EMBED}
    }


@pytest.mark.slow
@once
def test_report_names_every_kind_of_row_that_did_not_run() -> None:
    def not_run(report: Report) -> set[str]:
        found = report.as_dict()["not_run"]
        assert all(f"not run: {line}"[:60] in str(report) for line in found)
        return {line.split()[0] for line in found}

    always = {"kernels;", "config.json", "captured", "deterministic", "caches"}
    assert not_run(verify(small_model(), IDS[:, :4])) == always
    quick = verify(small_model(torch.bfloat16), IDS[:, :4], quick=True)
    assert not_run(quick) == {*always, "layers"}
    assert "layers in fp64; needs --no-quick" in quick.not_run
    of_int8 = verify(small_model(), cache_dtype=torch.int8).not_run
    assert "caches of the model's dtype; needs no --cache-dtype" in of_int8


@once
def test_json_has_null_for_what_is_not_finite() -> None:
    row = Row(None, "logits", "", math.nan, math.inf)
    found = json.loads(json.dumps(Report((row,), 0, 1, "Triton", "float32").as_dict(), allow_nan=False))["rows"][0]
    assert found["error"] is found["limit"] is None and not found["ok"]


@once
@pytest.mark.parametrize("name", sorted(OPERATIONS))
def test_fault_in_an_operation(name: str, inject_fault: Any) -> None:
    inject_fault(name)
    report = verify(small_model(), IDS[:1])
    assert not report.ok and report.verdict.startswith("WRONG")
    assert {row.op for row in report.wrong} == {name}


@pytest.mark.slow
def test_nan_in_an_expert_that_the_text_does_not_take(make_hf: Any) -> None:
    """Of transformers; of a model of ours: test_not_finite_is_wrong."""
    theirs = make_hf()
    with torch.no_grad():
        theirs.model.layers[-1].mlp.gate.weight[3] = 0.0
        theirs.model.layers[-1].mlp.experts.gate_up_proj[3, 0, 0] = float("nan")
    assert verify(theirs, IDS[:, :1]).wrong


@pytest.mark.parametrize(
    ("target", "ids", "message"),
    [
        (lambda make_hf: 3, None, "target is a int, needs a Mixtral, a checkpoint folder or a model of transformers$"),
        (lambda make_hf: SimpleNamespace(model=make_hf()), None, "; give it the model inside, .model$"),
        (lambda make_hf: small_model(), torch.zeros((1, 65), dtype=torch.int64), "needs at most 64"),
        (lambda make_hf: small_model(), torch.full((1, 4), 50), "^verify: .*token 50"),
        (lambda make_hf: small_model(), torch.zeros(4), "^verify: .*int64 tensor"),
        (lambda make_hf: small_model().to("meta"), None, r"verify: .*meta"),
        (lambda make_hf: make_hf().to("meta"), None, "offloading"),
    ],
)
def test_bad_input_raises_value_error(target: Any, ids: Any, message: str, make_hf: Any) -> None:
    model = target(make_hf)
    with pytest.raises(ValueError, match=message):
        verify(model, ids)
    assert not isinstance(model, torch.nn.Module) or isinstance(model, Mixtral) or not hf.applied(model)


def fp8_model(activations: str | None = "fp8", dtype: torch.dtype = torch.bfloat16) -> Mixtral:
    """small_model with fp8 weights, a scale a row."""
    model = small_model(dtype, weights={"experts": "fp8", "linear": "fp8"})
    model.activations = activations
    return model


@pytest.mark.exhaustive
@once
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations_of_8_bits_are_compared_with_such_a_reference(dtype: torch.dtype) -> None:
    report = verify(fp8_model(dtype=dtype), IDS, quick=True)
    assert not report.wrong, str(report)
    assert any("layers of activations in 16 bits" in line for line in report.not_run)
    plain = verify(fp8_model(None, dtype), IDS, quick=True)
    assert not any("activations" in line for line in plain.not_run)


@pytest.mark.exhaustive
@once
@pytest.mark.parametrize("fault", ["reference", "model"])
def test_activations_that_only_one_side_quantizes_are_wrong(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32: in 16 bits a rounding changes so many codes of the reference that the limits allow 16 bits, too."""
    if fault == "reference":
        monkeypatch.setattr(probe, "with_fp8_activations", lambda weight: weight)
    else:
        monkeypatch.setattr(Mixtral, "quantizes_activations", lambda self, rows: False)
    wrong = {row.case for row in verify(fp8_model(dtype=torch.float32), IDS).wrong if row.op == "layer"}
    assert {"attention, whole text", f"experts, whole text{FP64}", "whole text"} <= wrong, wrong


@interpreted
@pytest.mark.slow
def test_kernels_of_fp8_activations_are_compared() -> None:
    """With the rule of `generate`: many rows take the codes' kernels, few those of 16 bits."""
    report = verify(fp8_model(), IDS[:, :12], quick=True)
    assert not report.wrong, str(report)
    assert ("experts_add_rms_norm", "5 x 17 tokens") in {(row.op, row.case) for row in report.rows}


def test_a_row_where_torch_overflows_is_not_ok_and_nan_is_wrong() -> None:
    right, overflow = Row(0, "linear", "x", 0.1, 0.2), Row(0, "linear", "y", math.inf, math.inf)
    for row, verdict in ((right, "RIGHT"), (overflow, "OVERFLOW"), (replace(overflow, error=0.0), "OVERFLOW")):
        report = Report((right, row), 0, 0, "Triton", "float16")
        assert report.ok == (verdict == "RIGHT") and report.verdict.startswith(verdict) and not report.wrong
    exact, nan = torch.ones(2, 3, dtype=torch.float64), torch.tensor([[1.0, math.nan, 1.0], [1.0, 1.0, 1.0]])
    row = families.worst_call(
        "gradient of x", "layers.0.mlp", iter([(exact.float(),) * 2 + (exact,), (nan, exact, exact)])
    )
    assert not row.ok and not row.overflows and largest(nan) == math.inf
