"""verify finds faults around right kernels, and its first wrong row names where each one was injected."""

import copy
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_triton import Mixtral, ops, verify
from mixtral_triton.checkpoint import tensors as checkpoint
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.model.layer import ForwardContext, Layer
from mixtral_triton.verification.forwards import CHUNKS, TOKENS, UNCACHED
from mixtral_triton.verification.probe import ROUTES
from tests.support import faults
from tests.support.faults import all_dtypes, change_state, replace_by

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
    def attention(self, h: Tensor, kv_cache: Any, state: ForwardContext) -> Tensor:
        attend, state = state.attend, copy.copy(state)
        state.attend = lambda q, k, v, *args: attend(k, q, v, *args)  # type: ignore[method-assign]
        return super().attention(h, kv_cache, state)


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


class WrongNextNorm(Layer):
    def forward(self, h: Tensor, x: Tensor, next_norm: Tensor, *args: Any) -> Any:
        return super().forward(h, x, self.post_attention_layernorm, *args)


def change_window(change: int, state: ForwardContext) -> None:
    state.window += change  # type: ignore[operator]


def shift_decode_position(state: ForwardContext) -> None:
    if state.decodes:
        state.cos, state.sin = state.cos[1:], state.sin[1:]


def shift_ring(append: Any) -> Any:
    return lambda k, v, keys, values, past, new: append(k, v, keys, values, past + 1, new)


def tied(head: Any) -> Any:
    return lambda model, h: ops.linear.unchecked(h, model.embed_tokens)


def in_another_dtype(head: Any) -> Any:
    """What a float32 model computes is as exact in fp64; what a 16-bit one does, in its own dtype."""
    return lambda model, h: head(model, h).to(torch.float64 if h.dtype == torch.float32 else h.dtype)


# The class of one layer, or a fault in all; the layers and the case of the first wrong row.
FAULTS: dict[str, tuple[Any, set[int | None], str]] = {
    "norms swapped": (SwappedNorms, {LAYER}, f"{ROUTES}, {UNCACHED}"),
    "queries and keys swapped": (SwappedQueriesAndKeys, {LAYER}, f"attention, {UNCACHED}"),
    "no residual": (NoResidual, {LAYER}, f"{ROUTES}, {UNCACHED}"),
    "routes not normalized": (UnnormalizedRoutes, {LAYER}, f"{ROUTES}, {UNCACHED}"),
    "tokens reordered": (ReorderedTokens, {LAYER}, f"attention, {UNCACHED}"),
    "another next norm": (WrongNextNorm, {LAYER}, UNCACHED),  # which it applies itself
    "window + 1": (change_state(partial(change_window, 1)), {0, 1, 2}, f"attention, {UNCACHED}"),
    "window - 1": (change_state(partial(change_window, -1)), {0, 1, 2}, f"attention, {UNCACHED}"),
    "position + 1 in decode": (change_state(shift_decode_position), {0, 1, 2}, f"attention, {TOKENS}"),
    "ring off by one slot": (replace_by(ops.append, "unchecked", shift_ring), {0, 1, 2}, f"attention, {CHUNKS}"),
    "head tied in the model": (replace_by(Mixtral, "head", tied), {None}, UNCACHED),
    "logits in the wrong dtype": (replace_by(Mixtral, "head", in_another_dtype), {None}, UNCACHED),
}


@pytest.mark.exhaustive
@all_dtypes
@pytest.mark.parametrize("name", FAULTS)
def test_fault_in_the_model(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, layers, case = FAULTS[name]
    model = small_model(dtype)
    if isinstance(fault, type):
        model.layers[LAYER].__class__ = fault
    else:
        fault(monkeypatch)
    wrong = verify(model, IDS).wrong
    assert (wrong[0].op, wrong[0].case) == ("logits" if layers == {None} else "layer", case)
    assert wrong[0].layer == min(layers, key=str) and {row.layer for row in wrong if row.case == case} == layers
    assert name != "tokens reordered" or (LAYER, f"{ROUTES}, {UNCACHED}") in {(row.layer, row.case) for row in wrong}
    assert layers != {None} or {row.op for row in wrong} <= {"logits", "generate"}


def by_instance(name: str, change: Callable[[Any], Any]) -> Callable[[Any], None]:
    """Replace a method of one layer, or of the model, around what it was."""

    def patch(module: Any) -> None:
        function = getattr(module, name)
        setattr(module, name, lambda *args, **kwargs: change(function(*args, **kwargs)))

    return patch


def scale_stream(outputs: Any) -> Any:
    return outputs[0], outputs[1] * 1.02


# What a caller changes in one layer, or in the model, and the case of the first wrong row.
PATCHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "forward": (by_instance("forward", scale_stream), UNCACHED),
    "attention": (by_instance("attention", lambda out: out * 1.1), f"attention, {UNCACHED}"),
    "weights that do not sum to 1": (by_instance("route", lambda out: (*out[:2], out[2] * 1.1, out[3])), "routes"),
    "ids of other experts": (by_instance("route", lambda out: (*out[:3], (out[3] + 1) % 4)), "routes"),
    "a hook": (lambda layer: layer.register_forward_hook(lambda *args: scale_stream(args[-1])), UNCACHED),
    "a hook before": (
        lambda layer: layer.register_forward_pre_hook(lambda _, args: (args[0] * 1.1, *args[1:])),
        f"attention, {UNCACHED}",
    ),
    "nothing": (by_instance("forward", lambda outputs: outputs), ""),
    "head": (by_instance("head", lambda logits: logits * 1.1), UNCACHED),
}


@pytest.mark.parametrize("name", PATCHES)
def test_what_a_caller_patched_is_seen_and_kept(name: str) -> None:
    """In the layer it is in; a forward that is replaced by a right one is right."""
    (change, case), model = PATCHES[name], small_model(torch.bfloat16)
    changed: Any = model if name == "head" else model.layers[LAYER]
    change(changed)
    before = [dict(vars(module)) for module in (model, *model.layers)]
    hooks = [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.layers]
    wrong = verify(model, IDS).wrong
    assert [dict(vars(module)) for module in (model, *model.layers)] == before
    assert [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in model.layers] == hooks
    assert bool(wrong) == bool(case)
    if wrong:
        assert (wrong[0].layer, wrong[0].op) == ((None, "logits") if name == "head" else (LAYER, "layer"))
        assert wrong[0].case.startswith(case)
        assert {row.layer for row in wrong if row.op == "layer"} <= {LAYER}


def wrong_weights(model: Mixtral) -> list[tuple[int | None, str]]:
    return [(row.layer, row.op) for row in verify(model, IDS[:1, :4], folder=SMALL).wrong]


@pytest.mark.exhaustive
@all_dtypes
@pytest.mark.parametrize("swap", [("w1", "w3"), ("k_proj", "v_proj")])
def test_loader_that_swaps(swap: tuple[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and reference share what was loaded, so only the files show it."""
    table, swapped = checkpoint.table, dict(zip(swap, swap[::-1], strict=True))

    def faulty(*args: Any) -> dict[str, checkpoint.Destination]:
        targets = table(*args)
        return {name: targets[re.sub("|".join(swap), lambda found: swapped[found[0]], name)] for name in targets}

    monkeypatch.setattr(checkpoint, "table", faulty)
    assert wrong_weights(Mixtral.from_pretrained(SMALL, "cpu", dtype)) == [(layer, "weights") for layer in range(4)]


def tie_head(model: Mixtral) -> None:
    model.lm_head = model.embed_tokens


# What is wrong in the loaded model, and the first wrong rows.
LOADED: dict[str, tuple[Callable[[Mixtral], object], list[tuple[int | None, str]]]] = {
    "head tied by the loader": (tie_head, [(None, "config"), (None, "weights")]),
    "another expert's": (lambda m: m.layers[2].down_proj[3].copy_(m.layers[2].down_proj[5]), [(2, "weights")]),
    "NaN": (lambda m: m.layers[2].down_proj[3, 0].fill_(torch.nan), [(2, "weights")] * 2),
}


@pytest.mark.exhaustive
@all_dtypes
@pytest.mark.parametrize("name", LOADED)
def test_fault_in_loaded_weights(name: str, dtype: torch.dtype) -> None:
    model, (inject, first) = Mixtral.from_pretrained(SMALL, "cpu", dtype), LOADED[name]
    inject(model)
    wrong = wrong_weights(model)
    assert wrong[:2] == first, wrong


def test_checkpoint_with_fused_experts_and_tied_head(make_hf: Any, tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 3, "tie_word_embeddings": True}
    make_hf(**sizes).bfloat16().save_pretrained(tmp_path, save_original_format=False)
    report = verify(Mixtral.from_pretrained(tmp_path, "cpu"), IDS % 48, folder=tmp_path)
    assert not report.wrong, str(report)
    assert [row.layer for row in report.rows if row.case == "as stored"] == [None, 0, 1, 2]


@pytest.mark.slow
def test_digits_that_the_dtype_of_the_model_has_not_are_named(folder: Path) -> None:
    tensors = {name: x.float() for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    assert Mixtral.from_pretrained(folder, "cpu").dtype == torch.float32  # whatever config.json says
    for dtype in (torch.float32, torch.bfloat16):
        report = verify(Mixtral.from_pretrained(folder, "cpu", dtype), IDS[:1, :4], folder=folder, quick=True)
        assert not report.wrong and ("digits of the files" in str(report)) == (dtype == torch.bfloat16)


def test_wrong_folder_raises_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        verify(small_model(torch.bfloat16), IDS, folder=tmp_path)
    shutil.copy(SMALL / "config.json", tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match=r"index\.json: weight_map is None"):
        verify(small_model(torch.bfloat16), IDS, folder=tmp_path)
    with pytest.raises(ValueError, match=r"folder is '.*', needs None: target is a folder itself"):
        verify(SMALL, IDS, folder=SMALL)
    with pytest.raises(ValueError, match=r"another model's: \S+ has shape"):
        verify(small_model(torch.bfloat16, num_hidden_layers=4), IDS, folder=SMALL)
    model = Mixtral.from_pretrained(SMALL, "cpu")
    del model.layers[3]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="another model's: it has a layer 3"):
        verify(model, IDS, folder=SMALL)
