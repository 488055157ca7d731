"""verify finds faults around right kernels, and its first wrong row names where each one was injected."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mixtral_triton import KVCache, Mixtral, generate, ops, verification, verify, weights
from mixtral_triton.cli import SMALL
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.offload import OffloadedWeight
from mixtral_triton.model import Layer, State
from mixtral_triton.verification import END
from mixtral_triton.verification.calls import with_layouts
from mixtral_triton.verification.layers import CHUNKS, ROUTES, TOKENS, UNCACHED
from tests.support import faults, hub
from tests.support.faults import Inject, all_dtypes, bf16_then_others, change_state, one_at_a_time, replace_by

IDS = torch.randint(50, (2, 22), generator=torch.Generator().manual_seed(0))
LAYER = 1  # of 3, where a fault of one layer is injected
small_model = partial(faults.small_model, num_hidden_layers=3)
pytestmark = pytest.mark.skipif(INTERPRETED, reason="about the model, whatever the backend: run once")


class SwappedNorms(Layer):
    def route(self, *args: Any) -> Any:
        layer = copy.copy(self)
        layer._parameters = dict(self._parameters, post_attention_layernorm=self._parameters["input_layernorm"])
        return Layer.route(layer, *args)


class SwappedQueriesAndKeys(Layer):
    def attention(self, h: Tensor, ring: Any, state: State) -> Tensor:
        attend, state = state.attend, copy.copy(state)
        state.attend = lambda q, k, v, ring: attend(k, q, v, ring)  # type: ignore[method-assign]
        return super().attention(h, ring, state)


class NoResidual(Layer):
    def forward(self, h: Tensor, x: Tensor, *args: Any) -> Any:
        return super().forward(h, 0 * x, *args)


class UnnormalizedRoutes(Layer):
    def route(self, *args: Any) -> Any:
        h, x, _, ids = super().route(*args)
        return h, x, (h @ self.gate.T).float().softmax(-1).gather(1, ids.long()), ids


class ReorderedTokens(Layer):
    def attention(self, *args: Any) -> Tensor:
        return super().attention(*args).flip(0, 1)


@all_dtypes
@pytest.mark.parametrize(
    ("fault", "case"),
    [
        (SwappedNorms, f"{ROUTES}, {UNCACHED}"),
        (SwappedQueriesAndKeys, f"attention, {UNCACHED}"),
        (NoResidual, f"{ROUTES}, {UNCACHED}"),
        (UnnormalizedRoutes, f"{ROUTES}, {UNCACHED}"),
    ],
)
def test_fault_in_one_layer(fault: Any, case: str, dtype: torch.dtype) -> None:
    model = small_model(dtype)
    model.layers[LAYER].__class__ = fault
    first = verify(model, IDS).wrong[0]
    assert (first.layer, first.op, first.case) == (LAYER, "layer", case)


@all_dtypes
def test_routes_that_are_no_near_tie_are_wrong(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    model.layers[LAYER].__class__ = ReorderedTokens
    assert (LAYER, "routes, whole text") in {(row.layer, row.case) for row in verify(model, IDS).wrong}


def change_window(change: int, state: State) -> None:
    state.window += change  # type: ignore[operator]


def shift_decode_position(state: State) -> None:
    if state.decodes:
        state.cos, state.sin = state.cos[1:], state.sin[1:]


def shift_ring(append: Any) -> Any:
    return lambda k, v, keys, values, past, new: append(k, v, keys, values, past + 1, new)


FAULTS_IN_ALL_LAYERS: dict[str, tuple[Inject, str]] = {
    "window + 1": (change_state(partial(change_window, 1)), UNCACHED),
    "window - 1": (change_state(partial(change_window, -1)), UNCACHED),
    "position + 1 in decode": (change_state(shift_decode_position), TOKENS),
    "ring off by one slot": (replace_by(ops.append, "unchecked", shift_ring), CHUNKS),
}


@all_dtypes
@pytest.mark.parametrize("fault", FAULTS_IN_ALL_LAYERS)
def test_fault_in_all_layers(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, case = FAULTS_IN_ALL_LAYERS[fault]
    inject(monkeypatch)
    report = verify(small_model(dtype), IDS)
    first = report.wrong[0]
    assert (first.layer, first.op, first.case) == (0, "layer", f"attention, {case}")
    assert {row.layer for row in report.wrong if row.case == first.case} == {0, 1, 2}


@all_dtypes
def test_next_norm_of_another_kind(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer before applies it, but the fault is reported in the layer that it enters."""
    model, forward = small_model(dtype), Layer.forward
    wrong = {id(layer.input_layernorm): layer.post_attention_layernorm for layer in model.layers}

    def faulty(layer: Layer, h: Tensor, x: Tensor, next_norm: Tensor, *args: Any) -> Any:
        return forward(layer, h, x, wrong.get(id(next_norm), next_norm), *args)

    monkeypatch.setattr(Layer, "forward", faulty)
    first = verify(model, IDS).wrong[0]
    assert (first.layer, first.op) == (1, "layer")


@all_dtypes
def test_head_tied_in_the_model(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Mixtral, "head", lambda model, h: ops.linear.unchecked(h, model.embed_tokens))
    wrong = [row.op for row in verify(small_model(dtype), IDS).wrong]
    assert wrong[0] == "logits" and {*wrong} <= {"logits", "generate"}


def wrong_weights(model: Mixtral) -> list[tuple[int | None, str]]:
    return [(row.layer, row.op) for row in verify(model, IDS[:1, :4], folder=SMALL).wrong]


@all_dtypes
def test_head_tied_by_the_loader(dtype: torch.dtype) -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu", dtype)
    model.lm_head = model.embed_tokens
    assert wrong_weights(model)[:2] == [(None, "config"), (None, "weights")]


@all_dtypes
@pytest.mark.parametrize("swap", [("w1", "w3"), ("k_proj", "v_proj")])
def test_loader_that_swaps(swap: tuple[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and reference share what was loaded, so only the files show it."""
    table, swapped = weights.table, dict(zip(swap, swap[::-1], strict=True))

    def faulty(*args: Any) -> dict[str, weights.Destination]:
        targets = table(*args)
        return {name: targets[re.sub("|".join(swap), lambda found: swapped[found[0]], name)] for name in targets}

    monkeypatch.setattr(weights, "table", faulty)
    assert wrong_weights(Mixtral.from_pretrained(SMALL, "cpu", dtype)) == [(layer, "weights") for layer in range(4)]


@all_dtypes
@pytest.mark.parametrize("value", [None, float("nan")], ids=["another expert's", "NaN"])
def test_wrong_down_projection_of_one_expert(value: float | None, dtype: torch.dtype) -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu", dtype)
    down_proj = model.layers[2].down_proj
    if value is None:
        down_proj[3] = down_proj[5]
        assert wrong_weights(model) == [(2, "weights")]
    else:
        down_proj[3, 0, 0] = value
        assert (2, "weights") in wrong_weights(model)


def test_checkpoint_with_fused_experts_and_tied_head(tmp_path: Path) -> None:
    model = small_model(torch.bfloat16)
    stored = {"model.embed_tokens.weight": model.embed_tokens, "model.norm.weight": model.norm}
    for index, layer in enumerate(model.layers):
        names = {name: f"{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")}
        names |= {"o_proj": "self_attn.o_proj.weight", "gate": "mlp.gate.weight"}
        names |= {name: f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
        stored |= {f"model.layers.{index}.{stored}": getattr(layer, name) for name, stored in names.items()}
        for name, rows in zip("qkv", layer.qkv_proj.chunk(3), strict=True):
            stored[f"model.layers.{index}.self_attn.{name}_proj.weight"] = rows
    save_file({name: x.detach().contiguous() for name, x in stored.items()}, tmp_path / "model.safetensors")
    config = asdict(model.config) | {"model_type": "mixtral", "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify(Mixtral.from_pretrained(tmp_path, "cpu"), IDS, folder=tmp_path)
    assert not report.wrong, str(report)
    assert [row.layer for row in report.rows if row.case == "as stored"] == [None, 0, 1, 2]


def longer_than_a_chunk(prefill: Any) -> Any:
    """The hidden states of prompts that are longer than a chunk are those of each other's."""
    return lambda model, cache, ids, lengths: prefill(model, cache, ids, lengths).flip(int(ids.shape[1] <= 3))


def without_eos(cut: Any) -> Any:
    return lambda tail, eos: (x := cut(tail, eos))[: len(x) - (int(x[-1]) in eos)]


def goes_on(pick: Any) -> Any:
    return lambda step, h: (step.ended.zero_(), pick(step, h))


def one_stop_less(init: Any) -> Any:
    return lambda step, *args: (init(step, *args), setattr(step, "stops", step.stops[:-1]))[0]


def all_end(pick: Any) -> Any:
    return lambda step, h: (pick(step, h), step.ended.fill_(bool(step.ended.any())))[0]


def one_behind(stream: Any) -> Any:
    def faulty(*args: Any) -> Any:
        tokens = list(stream(*args))
        yield from [tokens[0], *tokens[:-1]]

    return faulty


def not_counted(advance: Any) -> Any:
    return lambda cache, new, common: advance(cache, 0 * new if common == 1 else new, common)


def shifted(table: Any) -> Any:
    return lambda weight: table(weight).roll(1)


def in_sample(change: Callable[..., tuple[Any, ...]]) -> Inject:
    return replace_by(verification, "sample", lambda sample: lambda *args: sample(*change(*args)))


# What users read and launch around the model: the operation and the case of the first wrong row.
FAULTS_AROUND: dict[str, tuple[Inject, str, str]] = {
    "EOS is cut off": (replace_by(generate, "_cut", without_eos), "generate", END),
    "an ended sequence goes on": (replace_by(generate.Step, "pick", goes_on), "generate", END),
    "EOS of the config is ignored": (
        replace_by(generate, "eos_ids", lambda ids: lambda given, config: ids([] if given is None else given, config)),
        *("generate", END),
    ),
    "the last EOS is unknown": (replace_by(generate.Step, "__init__", one_stop_less), "generate", END),
    "all sequences end together": (replace_by(generate.Step, "pick", all_end), "generate", END),
    "a token behind": (replace_by(generate, "_stream", one_behind), "generate", "greedy"),
    "temperature twice": (in_sample(lambda x, t, *args: (x / t, t, *args)), "generate", "sample"),
    "top_p is wider": (in_sample(lambda x, t, p, *args: (x, t, min(1.0, 1.03 * p), *args)), "generate", "sample"),
    "a full cache": (replace_by(KVCache, "reserve", lambda reserve: lambda cache, new: None), "forward", "refusals"),
    "any cache": (replace_by(Mixtral, "_check_cache", lambda check: lambda *args: None), "forward", "refusals"),
    "a step is not counted": (replace_by(KVCache, "advance", not_counted), "layer", "attention, token by token"),
    "rows of a long prompt": (replace_by(generate, "prefill", longer_than_a_chunk), "generate", "greedy"),
    "top_k + 1": (in_sample(lambda x, t, p, g, k=None, *m: (x, t, p, g, k and k + 1, *m)), "generate", "sample"),
    "no min_p": (in_sample(lambda x, t, p, g, k=None, *m: (x, t, p, g, k)), "generate", "sample"),
    "no BOS": (
        replace_by(verification.source, "encode", lambda encode: lambda *args: (encode(*args)[0][1:], "")),
        *("config", "tokens of a prompt"),
    ),
    "a shifted table": (replace_by(OffloadedWeight, "_table", shifted), "weights", "addresses of experts"),
}


@bf16_then_others
@pytest.mark.parametrize("name", FAULTS_AROUND)
def test_fault_around_the_model(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    inject, *place = FAULTS_AROUND[name]
    inject(monkeypatch)
    model = Mixtral.from_pretrained(SMALL, "cpu", dtype, offload=2 * (name == "a shifted table"))
    wrong = verify(model, IDS, folder=SMALL, quick=True).wrong
    assert wrong and [wrong[0].op, wrong[0].case] == place, wrong


@bf16_then_others
@pytest.mark.parametrize("fault", ["strides", "batch"])
def test_fault_that_contiguous_or_single_calls_hide(
    fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row's stride is ignored, or what else is in the batch is not."""
    model, right = small_model(dtype), verification.ModelUnderTest.operation
    target = verification.ModelUnderTest(model)

    def faulty(op: str, args: Any) -> Any:
        def run(**args: Any) -> Any:
            first = next(iter(args))
            if fault == "strides" and op == "rms_norm" and args["x"].stride() != args["x"].contiguous().stride():
                args[first] = torch.as_strided(args["x"], args["x"].shape, args["x"].contiguous().stride())
            out = right(op, args)(**args)
            return out * 1.01 if fault == "batch" and op == "attention" and len(args[first]) > 4 else out

        return run

    check = target.check(model.layers[0], torch.nn.functional.embedding(IDS, model.embed_tokens), model.config)
    calls = [*with_layouts(check.calls(1)), *check.deterministic_calls()]
    assert all(row.ok for call in calls for row in target.measure(0, *call))
    monkeypatch.setattr(verification.ModelUnderTest, "operation", staticmethod(faulty))
    wrong = {(row.op, row.case) for call in calls for row in target.measure(0, *call) if not row.ok}
    assert wrong >= ({("rms_norm", "sliced")} if fault == "strides" else {("attention", "bits in any batch")}), wrong


def change_config(model: Mixtral, **changes: Any) -> None:
    model.config = model.full_config = replace(model.config, **changes)
    for layer in model.layers:
        layer.config = model.config  # type: ignore[assignment]


def roll_tables(model: Mixtral) -> None:
    model.cos, model.sin = model.cos.roll(-1, 1), model.sin.roll(-1, 1)


# Model and reference share these. The first wrong row of transformers' own layers, in every dtype.
PEER_FAULTS: dict[str, tuple[Callable[[Mixtral], None], str]] = {
    "rotary tables": (roll_tables, "attention, transformers"),
    "eps x 100": (partial(change_config, rms_norm_eps=1e-3), "attention, transformers"),
    "window": (partial(change_config, sliding_window=7), "attention, transformers"),
    "top 1": (partial(change_config, num_experts_per_tok=1), "routes, transformers"),
}


@pytest.mark.exhaustive
@all_dtypes
@pytest.mark.parametrize("fault", PEER_FAULTS)
def test_fault_that_transformers_layers_show(fault: str, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    model, (inject, case) = Mixtral.from_pretrained(SMALL, "cpu", dtype), PEER_FAULTS[fault]
    inject(model)
    wrong = verify(model, IDS, folder=SMALL, peer="transformers", quick=True).wrong
    first = next(row for row in wrong if "transformers" in row.case)
    assert (first.layer, first.op, first.case) == (0, "layer", case), wrong


@pytest.mark.parametrize("weights", [None, {"experts": "int4", "linear": "int8"}, "awq"])
def test_transformers_has_one_layer_at_a_time(weights: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A quantized model is compared with its dequantized weights."""
    pytest.importorskip("transformers")
    loaded = one_at_a_time(monkeypatch, verification.targets, "_load_layer")
    folder = tmp_path if weights == "awq" else SMALL
    if weights == "awq":
        hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    model = Mixtral.from_pretrained(folder, "cpu", weights=None if weights == "awq" else weights)
    report = verify(model, IDS % 40, folder=folder, peer="transformers", quick=True)
    assert report.ok and len(loaded) == len(model.layers), str(report)
    assert {row.layer for row in report.rows if row.case == "transformers"} == {None, *range(len(loaded))}


def test_wrong_folder_or_peer_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"another model's: \S+ has shape"):
        verify(small_model(torch.bfloat16, num_hidden_layers=4), IDS, folder=SMALL)
    model = Mixtral.from_pretrained(SMALL, "cpu")
    del model.layers[3]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="another model's: it has a layer 3"):
        verify(model, IDS, folder=SMALL)
    with pytest.raises(ValueError, match="needs 'transformers' or None"):
        verify(SMALL, peer="vllm")
    with pytest.raises(ValueError, match="needs folder"):
        verify(small_model(torch.bfloat16), IDS, peer="transformers")
    monkeypatch.setattr(verification, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        verify(SMALL, peer="transformers")
