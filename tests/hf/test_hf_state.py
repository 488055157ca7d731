"""What an applied model's state is: the user's config, pickles and copies, and what other models are made of it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import apply, hf, revert
from mixtral_triton.kernels.launch import INTERPRETED

transformers = pytest.importorskip("transformers")
from transformers.models.mixtral import modeling_mixtral as theirs  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules, not kernels: run once, without the interpreter")
IDS = torch.randint(1, 48, (2, 14), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :6] = 0
ROOT = Path(__file__).parents[2]
PARTS = ("attention", "experts", "rms_norm", "rope")


@pytest.fixture
def picklable(make_hf: Any) -> None:
    """transformers 5.7 beside the package `kernels` keeps local functions, which no pickle takes."""
    try:
        pickle.dumps(make_hf())
    except AttributeError as error:
        pytest.skip(f"a plain model of this transformers has no pickle: {error}")


def edit(model: Any) -> None:
    model.resize_token_embeddings(60, mean_resizing=False)
    model.config.use_cache = False
    model.model.config.pad_token_id = 3
    model.config.router_aux_loss_coef = 0.5
    model.config.note = "mine"


AGAIN: dict[str, Callable[[Any], Any]] = {
    "revert": revert,
    "apply": apply,
    "apply a part": lambda m: apply(m, attention=False),
    "apply, revert": lambda m: revert(apply(m)),
    "apply nothing": lambda m: apply(m, **dict.fromkeys(PARTS, False)),
}


@pytest.mark.parametrize("again", AGAIN)
def test_the_users_edits_of_the_config_stay(again: str, make_hf: Any, tmp_path: Path) -> None:
    model = make_hf()
    config = model.config
    edit(apply(model))
    AGAIN[again](model)
    assert model.config is config and model.model.config is config
    found = (config.vocab_size, config.use_cache, config.pad_token_id, config.router_aux_loss_coef, config.note)
    assert found == (60, False, 3, 0.5, "mine")
    ids = torch.cat((IDS, torch.full((2, 1), 59)), 1)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.note == "mine" and loaded.config.vocab_size == 60
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-3)


def test_the_implementations_that_the_user_selects_stay(make_hf: Any) -> None:
    model = apply(make_hf())
    model.set_attn_implementation("sdpa")
    model.set_experts_implementation("batched_mm")
    assert revert(model).config._attn_implementation == "sdpa"
    assert model.config._experts_implementation == "batched_mm"


def saved(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder)
    return folder


MADE: dict[str, Callable[[Any, Path], Any]] = {
    "the class": lambda m, _: transformers.MixtralForCausalLM(m.config),
    "the backbone's": lambda m, _: transformers.MixtralModel(m.model.config),
    "another head": lambda m, _: transformers.MixtralForSequenceClassification(m.config),
    "the instance's own class": lambda m, _: type(m)(m.config),
    "from_config": lambda m, _: transformers.AutoModelForCausalLM.from_config(m.config),
    "from_pretrained with the config": lambda m, folder: transformers.MixtralForCausalLM.from_pretrained(
        saved(m, folder), config=m.config
    ),
    "from_pretrained of its class": lambda m, folder: type(m).from_pretrained(saved(m, folder), config=m.config),
    "the saved config": lambda m, folder: transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(saved(m, folder))
    ),
    "a deep copy": lambda m, _: transformers.MixtralForCausalLM(copy.deepcopy(m.config)),
    "a shallow copy": lambda m, _: transformers.MixtralForCausalLM(copy.copy(m.config)),
    "a pickle of the config": lambda m, _: transformers.MixtralForCausalLM(pickle.loads(pickle.dumps(m.config))),
    "its dictionary": lambda m, _: transformers.MixtralForCausalLM(type(m.config).from_dict(m.config.to_dict())),
    "its JSON": lambda m, folder: transformers.MixtralForCausalLM(
        (m.config.to_json_file(folder / "c.json"), type(m.config).from_json_file(folder / "c.json"))[1]
    ),
}


@pytest.mark.parametrize("made", MADE)
def test_what_is_made_of_the_config_is_transformers(made: str, make_hf: Any, tmp_path: Path, calls: set[str]) -> None:
    model = apply(make_hf(attn_implementation="sdpa"))
    want = model(IDS).logits
    other = MADE[made](model, tmp_path).eval()
    calls.clear()
    other(IDS)
    assert not calls and not hf.applied(other)
    assert all("mixtral_triton" not in type(module).__module__ for module in other.modules())
    assert other.config._attn_implementation == "sdpa"
    got = model(IDS).logits
    assert torch.equal(got, want) and "attention" in calls and "expert_swiglu" in calls


@pytest.mark.parametrize("name", ["self_attn", "mlp.experts", "rotary_emb"])
def test_what_is_made_of_a_modules_config_is_transformers(name: str, make_hf: Any, calls: set[str]) -> None:
    model = apply(make_hf())
    inner = model.model.rotary_emb if name == "rotary_emb" else model.model.layers[0].get_submodule(name)
    arguments = (inner.config, 0) if name == "self_attn" else (inner.config,)
    kind = type(inner).__mro__[2]
    assert kind.__module__ == theirs.__name__
    for made in (kind(*arguments), type(inner)(*arguments)):
        assert type(made) is kind
    assert transformers.MixtralModel(inner.config).config is model.config
    assert not calls


CHILD = """
import pickle, sys, torch
{before}
kept = {load}
ids, mask, want, padded = kept["ids"], kept["mask"], kept["logits"], kept["padded"]
model = kept["model"]
with torch.no_grad():
    assert torch.allclose(model(ids).logits, want, atol={atol}), "logits"
    assert torch.allclose(model(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()], atol={atol}), "mask"
    model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False, cache_implementation="static")
{after}
print("right")
"""


def in_a_fresh_process(**parts: Any) -> str:
    done = subprocess.run([sys.executable, "-c", CHILD.format(**parts)], capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or done.stderr


def with_results(model: Any) -> dict[str, Any]:
    with torch.no_grad():
        padded = model(IDS, attention_mask=LEFT).logits
        return {"ids": IDS, "mask": LEFT, "model": model, "logits": model(IDS).logits, "padded": padded}


def test_an_applied_model_runs_in_a_fresh_process(picklable: None, make_hf: Any, tmp_path: Path, parity: Any) -> None:
    """Unpickling imports the modules that the pickle names, and calls nothing else of this package."""
    kept = with_results(apply(make_hf()))
    (tmp_path / "pickled").write_bytes(pickle.dumps(kept))
    torch.save(kept["model"], tmp_path / "saved")
    before = """
from transformers import AttentionMaskInterface
AttentionMaskInterface._global_mapping["eager"] = None  # no mask of transformers' is made
"""
    after = f"""
saved = torch.load({str(tmp_path / "saved")!r}, weights_only=False)
with torch.no_grad():
    assert torch.equal(saved(ids, attention_mask=mask).logits[mask.bool()], padded[mask.bool()])
from mixtral_triton import hf, revert
assert hf.applied(model) and type(model.model.norm).__module__ == "mixtral_triton.hf.modules"
assert not hf.applied(revert(model)) and type(model).__mro__[1].__name__ == "MixtralPreTrainedModel"
"""
    load = f"pickle.load(open({str(tmp_path / 'pickled')!r}, 'rb'))"
    assert in_a_fresh_process(before=before, load=load, atol=0, after=after) == "right"
    parity("pickle: an applied model in a fresh process", "holds")


def test_a_reverted_model_needs_this_package_no_more(
    picklable: None, make_hf: Any, tmp_path: Path, parity: Any
) -> None:
    model = apply(make_hf())
    kept = with_results(model)
    model.set_attn_implementation("sdpa")
    pickled = pickle.dumps(kept | {"model": revert(pickle.loads(pickle.dumps(model)))})
    assert b"mixtral_triton" not in pickled
    (tmp_path / "model").write_bytes(pickled)
    before = "sys.modules['mixtral_triton'] = None"
    load = f"pickle.load(open({str(tmp_path / 'model')!r}, 'rb'))"
    assert in_a_fresh_process(before=before, load=load, atol=1e-4, after="") == "right"
    parity("pickle: a reverted model without this package", "holds")


@pytest.mark.parametrize("name", ["RMSNorm", "before_forward", "rebuild"])
def test_pickles_of_earlier_layouts_are_refused(name: str) -> None:
    """Each applied model of those layouts names one of these, whatever parts were applied."""
    with pytest.raises(ValueError, match=r"pickled by another version .* from_pretrained and apply again"):
        pickle.loads(f"cmixtral_triton.hf_modules\n{name}\n.".encode())


@pytest.mark.parametrize("part", PARTS)
def test_pickles_of_another_layout_are_refused(
    part: str, picklable: None, make_hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mixtral_triton.hf import modules as hf_modules

    model = apply(make_hf(), **{name: name == part for name in PARTS})
    monkeypatch.setattr(hf_modules, "LAYOUT", hf_modules.LAYOUT + 1)
    pickled = pickle.dumps(model)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another version of the package"):
        pickle.loads(pickled)


def test_copies_keep_to_themselves(picklable: None, make_hf: Any, calls: set[str]) -> None:
    """Every protocol, copies of a part, torch's replicas: applied, and each with a choice of its own."""
    model = apply(make_hf())
    twins = [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(6)]
    for dequantized_copy in (*twins, copy.copy(model), copy.deepcopy(model)):
        assert hf.applied(dequantized_copy) and torch.equal(dequantized_copy(IDS).logits, model(IDS).logits)
    twins[0].set_attn_implementation("eager")
    replica = model._replicate_for_data_parallel()
    calls.clear()
    for one in (model, twins[1], replica):
        one(IDS)
        assert "attention" in calls
        calls.clear()
    twins[0](IDS)
    assert "attention" not in calls
    layer = copy.deepcopy(model.model.layers[0])
    h = torch.randn(2, 5, 32)
    positions = model.model.rotary_emb(h, torch.arange(5)[None])
    assert torch.equal(layer(h, positions), model.model.layers[0](h, positions))
