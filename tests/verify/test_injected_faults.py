"""verify finds the mistakes that a person makes around right kernels: the first wrong row names each planted one."""

from __future__ import annotations

import inspect
import json
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import mixtral_triton
from mixtral_triton import Mixtral, verification, verify, weights
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.model import Layer, State
from mixtral_triton.verification.model import CHUNKS, TOKENS, UNCACHED
from tests.support import models

SMALL = Path(mixtral_triton.__file__).parent / "small"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.randint(50, (2, 22), generator=torch.Generator().manual_seed(0))
LAYER = 1  # of 3: where a fault of one layer is planted
SIZES: dict[str, Any] = models.SIZES | {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "sliding_window": 7,
}
once = pytest.mark.skipif(INTERPRETED, reason="about the shell, whichever way the operations go: run once, without")


def made_of(dtype: torch.dtype, **more: Any) -> Mixtral:
    return models.random_model(dtype=dtype, gain=1.0, **SIZES | more)


def rewritten(function: Callable[..., Any], *changes: str) -> Callable[..., Any]:
    """`function` with each old text of its source replaced by the new one that follows it."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in zip(changes[::2], changes[1::2], strict=True):
        assert old in source
        source = source.replace(old, new)
    place: dict[str, Any] = {}
    exec(source, function.__globals__, place)
    return place[function.__name__]


def in_one_layer(made: Mixtral, name: str, old: str, new: str) -> None:
    """A method of one layer alone is rewritten."""
    faulty = type("Faulty", (Layer,), {name: rewritten(getattr(Layer, name), old, new)})
    made.layers[LAYER].__class__ = faulty


# What a person writes, and where verify has to say so first: (layer, operation, case).
IN_A_LAYER = {
    "the two norms swapped": ("forward", "post_attention_layernorm", "input_layernorm"),
    "query and key heads swapped": ("attention", "q, k, v = qkv", "k, q, v = qkv"),
    "a residual left out": ("forward", "a, x, *norm", "a, x * 0, *norm"),
    "routes not renormalized": (
        "forward",
        "y, total = self",
        "scores = _.float().softmax(-1).gather(1, ids.long()); y, total = self",
    ),
}
IN_ALL_LAYERS = {
    "window + 1": ("__init__", "model.config.sliding_window", "model.config.sliding_window + 1", UNCACHED),
    "window - 1": ("__init__", "model.config.sliding_window", "model.config.sliding_window - 1", UNCACHED),
    "position + 1 in decode": ("attend", "self.cos, self.sin, *", "self.cos[1:], self.sin[1:], *", TOKENS),
    "the ring off by one slot": ("attend", "(k, v, *ring, self.past", "(k, v, *ring, self.past + 1", CHUNKS),
}  # fmt: skip


@once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", IN_A_LAYER)
def test_a_fault_in_the_wiring_of_one_layer(fault: str, dtype: torch.dtype) -> None:
    made = made_of(dtype)
    in_one_layer(made, *IN_A_LAYER[fault])
    first = verify(made, IDS).wrong[0]
    assert (first.layer, first.op, first.case) == (LAYER, "layer", UNCACHED)


@once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", IN_ALL_LAYERS)
def test_a_fault_in_the_wiring_of_all_layers(fault: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old, new, case = IN_ALL_LAYERS[fault]
    monkeypatch.setattr(State, name, rewritten(getattr(State, name), old, new))
    report = verify(made_of(dtype), IDS)
    first = report.wrong[0]
    assert (first.layer, first.op, first.case) == (0, "layer", case)
    assert {row.layer for row in report.wrong if row.case == case} == {0, 1, 2}


@once
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_input_norm_of_another_layer(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is applied by the layer before, and is a fault of the layer that it enters."""
    hidden = rewritten(Mixtral.hidden, "layer.input_layernorm for layer", "layer.post_attention_layernorm for layer")
    monkeypatch.setattr(Mixtral, "hidden", hidden)
    first = verify(made_of(dtype), IDS).wrong[0]
    assert (first.layer, first.op) == (1, "layer")


@once
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_tied_where_it_is_not(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the shell, and in the loader."""
    made = made_of(dtype)
    with monkeypatch.context() as planted:
        planted.setattr(Mixtral, "head", rewritten(Mixtral.head, "self.lm_head", "self.embed_tokens"))
        assert [(row.layer, row.op) for row in verify(made, IDS).wrong] == [(None, "logits")]
    loaded = Mixtral.from_pretrained(SMALL, dtype=dtype)
    loaded.lm_head = loaded.embed_tokens
    first = verify(loaded, IDS[:1, :4], folder=SMALL).wrong[0]
    assert (first.layer, first.op) == (None, "weights")


SWAPS = {
    "w1 and w3": (".w1.", ".other.", ".w3.", ".w1.", ".other.", ".w3."),
    "k and v": ("{projection}_proj", "{dict(q='q', k='v', v='k')[projection]}_proj"),
}


@once
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("swap", SWAPS)
def test_a_loader_that_swaps(swap: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model and reference share what was loaded: only the files tell."""
    monkeypatch.setattr(weights, "table", rewritten(weights.table, *SWAPS[swap]))
    report = verify(Mixtral.from_pretrained(SMALL, dtype=dtype), IDS[:1, :4], folder=SMALL)
    assert [(row.layer, row.op) for row in report.wrong] == [(layer, "weights") for layer in range(4)]


@once
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_with_the_down_projection_of_another(dtype: torch.dtype) -> None:
    loaded = Mixtral.from_pretrained(SMALL, dtype=dtype)
    loaded.layers[2].down_proj[3] = loaded.layers[2].down_proj[5]
    report = verify(loaded, IDS[:1, :4], folder=SMALL)
    assert [(row.layer, row.op) for row in report.wrong] == [(2, "weights")]


@once
def test_a_route_that_was_no_close_call() -> None:
    """The layer's own gate reads the tokens in another order: their routes are put right, and said to be wrong."""
    made = made_of(torch.bfloat16)
    in_one_layer(made, "forward", "a, x, *norm", "a.flip(0), x, *norm")
    assert (LAYER, "routes") in {(row.layer, row.case) for row in verify(made, IDS).wrong}


def a_random_model(seed: int, dtype: torch.dtype, *gains: float) -> tuple[Mixtral, Tensor]:
    """Any sizes, and a text."""
    draw = random.Random(seed)
    groups, experts = draw.choice([1, 2]), draw.choice([2, 4, 5, 8])
    made = models.random_model(
        dtype=dtype,
        seed=seed,
        gain=draw.choice(gains or (0.5, 1.0, 2.0)),
        vocab_size=draw.choice([33, 50, 100]),
        hidden_size=draw.choice([24, 32, 48, 64]),
        intermediate_size=draw.choice([16, 40, 64]),
        num_hidden_layers=draw.choice([1, 2]),
        num_key_value_heads=groups,
        num_attention_heads=groups * draw.choice([1, 2, 3]),
        head_dim=draw.choice([8, 16, 20, 32]),
        num_local_experts=experts,
        num_experts_per_tok=draw.randint(1, min(experts, 3)),
        sliding_window=draw.choice([None, 1, 3, 8, 40]),
    )
    shape = (draw.randint(1, 2), draw.randint(1, 12 if INTERPRETED else 40))
    return made, torch.randint(33, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(2) if INTERPRETED else range(20))
def test_no_false_alarm_on_any_configuration(seed: int) -> None:
    for dtype in [DTYPES[seed % 3]] if INTERPRETED else DTYPES:
        report = verify(*a_random_model(seed, dtype))
        assert not report.wrong, str(report)


@once
@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize(("seed", "gain"), [(208, 8.0), (224, 16.0), (240, 4.0), (240, 8.0), (240, 16.0)])
def test_no_false_alarm_where_softmax_is_nearly_a_choice(seed: int, gain: float, dtype: torch.dtype) -> None:
    """Layers that magnify each rounding: by how much, those of plain torch need not show."""
    report = verify(*a_random_model(seed, dtype, gain))
    assert not report.wrong, str(report)


def fused(made: Mixtral) -> dict[str, Tensor]:
    """The tensors as transformers writes them today: experts in one, a tied head in none."""
    stored = {"model.embed_tokens.weight": made.embed_tokens, "model.norm.weight": made.norm}
    for index, layer in enumerate(made.layers):
        q, k, v = layer.qkv_proj.chunk(3)
        own = {
            "input_layernorm.weight": layer.input_layernorm,
            "post_attention_layernorm.weight": layer.post_attention_layernorm,
            "self_attn.q_proj.weight": q,
            "self_attn.k_proj.weight": k,
            "self_attn.v_proj.weight": v,
            "self_attn.o_proj.weight": layer.o_proj,
            "mlp.gate.weight": layer.gate,
            "mlp.experts.gate_up_proj": layer.gate_up_proj,
            "mlp.experts.down_proj": layer.down_proj,
        }
        stored |= {f"model.layers.{index}.{name}": value for name, value in own.items()}
    return {name: value.detach().contiguous() for name, value in stored.items()}


@once
def test_a_checkpoint_of_the_other_layout(tmp_path: Path) -> None:
    made = made_of(torch.bfloat16)
    save_file(fused(made), tmp_path / "model.safetensors")
    config = {**SIZES, "model_type": "mixtral", "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    report = verify(tmp_path, IDS)
    assert not report.wrong, str(report)
    assert [row.layer for row in report.rows if row.op == "weights"] == [None, 0, 1, 2]


@once
def test_a_folder_of_another_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"another model's: \S+ has shape"):
        verify(made_of(torch.bfloat16), IDS, folder=SMALL)


@once
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformers_on_the_same_files(dtype: torch.dtype) -> None:
    """What model and reference share, here the rotary tables, only another loader can tell."""
    pytest.importorskip("transformers")
    loaded = Mixtral.from_pretrained(SMALL, dtype=dtype)
    assert not verify(loaded, IDS[:1], folder=SMALL, peer="transformers").wrong
    loaded.cos, loaded.sin = loaded.cos.roll(-1, 1), loaded.sin.roll(-1, 1)
    report = verify(loaded, IDS[:1], folder=SMALL, peer="transformers")
    assert [(row.layer, row.op, row.case) for row in report.wrong] == [(None, "logits", "transformers")]


@once
def test_a_peer_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = made_of(torch.bfloat16)
    with pytest.raises(ValueError, match="needs 'transformers' or None"):
        verify(SMALL, peer="vllm")
    with pytest.raises(ValueError, match=r"give folder="):
        verify(made, IDS, peer="transformers")
    (tmp_path / "meminfo").write_text("MemTotal: 16 kB\nMemAvailable: 2 kB\n")
    monkeypatch.setattr(verification, "MEMORY", tmp_path / "meminfo")
    with pytest.raises(ValueError, match=r"second copy, .* GiB"):
        verify(SMALL, peer="transformers")
    monkeypatch.setattr(verification, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        verify(SMALL, peer="transformers")
