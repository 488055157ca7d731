"""apply and revert change one instance and nothing else, bit for bit, and reject models that they cannot run."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from types import MethodType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from mixtral_triton import apply, hf, revert

transformers = pytest.importorskip("transformers")
from transformers.models.mixtral import modeling_mixtral as modeling  # noqa: E402

pytestmark = pytest.mark.compiled
IDS = torch.randint(1, 48, (2, 14), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :6] = 0
PARTS = {name: {name} for name in ("attention", "rms_norm", "rope")} | {"experts": {"gate_route", "expert_swiglu"}}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every module's class, and every attribute by identity (containers by what they hold)."""

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, mark(item)) for key, item in value.items()]
        return id(value.__func__) if isinstance(value, MethodType) else id(value)

    found = {name: (type(m), {k: mark(v) for k, v in vars(m).items()}) for name, m in model.named_modules()}
    return found | {"config": model.config.to_dict()}


def snapshot_library() -> list[dict[str, Any]]:
    """transformers' registries and Mixtral classes."""
    from transformers.integrations.moe import ExpertsInterface

    kinds = (transformers.AttentionInterface, transformers.AttentionMaskInterface, ExpertsInterface)
    registries = [{k: v for k, v in kind._global_mapping.items() if k != "mixtral_triton"} for kind in kinds]
    classes = [kind for name, kind in vars(modeling).items() if name.startswith("Mixtral")]
    # copy caches __slotnames__
    return registries + [{k: v for k, v in vars(kind).items() if k != "__slotnames__"} for kind in classes]


def test_apply_changes_one_instance_and_revert_restores_it(make_hf: Any) -> None:
    model, other = make_hf(), make_hf()
    model.config = other.config = model.model.config
    before, unchanged = snapshot(model), (snapshot(other), snapshot_library())
    assert apply(model) is model and snapshot(model) != before
    assert (snapshot(other), snapshot_library()) == unchanged
    assert isinstance(model.model.norm, modeling.MixtralRMSNorm)
    assert revert(model) is model and snapshot(model) == before
    assert (snapshot(other), snapshot_library()) == unchanged


def test_the_last_apply_decides(make_hf: Any, calls: set[str]) -> None:
    model = make_hf(attn_implementation="sdpa", experts_implementation="grouped_mm")
    with pytest.raises(ValueError, match="argument 'experts' is 'all', needs True or False"):
        apply(model, experts="all")
    before = snapshot(model)
    apply(apply(model), attention=False, rope=False)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "grouped_mm")
    model(IDS)
    assert calls == {"rms_norm", "gate_route", "expert_swiglu"}
    apply(model, attention=False, experts=False, rms_norm=False, rope=False)
    assert snapshot(model) == before == snapshot(revert(model))


@pytest.mark.parametrize("path", ["norm", "layers.0.mlp.gate"])
def test_parametrization_of_a_fused_module_is_removed_before_revert(path: str, make_hf: Any) -> None:
    """It gives the module a subclass of its own, without which the module has no weight."""
    model = make_hf()
    before, want = snapshot(model), model(IDS).logits
    module = apply(model).model.get_submodule(path)
    nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    for function in (revert, apply):
        with pytest.raises(ValueError, match=rf"revert: model\.{path} is a Parametrized\w+, needs the class"):
            function(model)
        assert hf.applied(model) and torch.allclose(model(IDS).logits, want, atol=1e-4)
    nn.utils.parametrize.remove_parametrizations(module, "weight")
    assert snapshot(revert(model)).keys() == before.keys() and torch.equal(model(IDS).logits, want)


@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(part: str, make_hf: Any, calls: set[str]) -> None:
    model = make_hf()
    want = model(IDS).logits
    out = apply(model, **{name: name == part for name in PARTS})(IDS, labels=IDS)
    assert calls == PARTS[part]
    assert (out.logits - want).abs().max() <= 1e-4 * want.abs().max()
    with torch.no_grad(), forward_ad.dual_level():
        embeds = model.model.embed_tokens(IDS)
        with pytest.raises(ValueError, match="forward derivatives"):
            model(inputs_embeds=forward_ad.make_dual(embeds, embeds))


def test_intervals_never_become_a_dense_mask(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on either side, windows and every kind of cache call none of transformers' masks."""
    from mixtral_triton.hf import masks

    def refuse(**kwargs: Any) -> None:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(masks, "sdpa_mask", refuse)
    for name in ("eager", "sdpa"):
        monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, name, refuse)
    for window in (6, None):
        model = apply(make_hf(sliding_window=window))
        for mask in (None, LEFT, LEFT.flip(1), torch.ones_like(IDS)):
            model(IDS, attention_mask=mask)
        for cache in ("dynamic", "static"):
            model.generate(IDS, attention_mask=LEFT, max_new_tokens=8, cache_implementation=cache, do_sample=False)
        model(IDS, position_ids=torch.arange(14)[None], use_cache=False)


def test_saved_files_are_the_same(make_hf: Any, tmp_path: Path, parity: Any) -> None:
    model, plain, applied = make_hf(), tmp_path / "plain", tmp_path / "applied"
    names = list(model.state_dict())
    model.save_pretrained(plain)
    assert list(apply(model).state_dict()) == names
    model.save_pretrained(applied)
    files = sorted(path.name for path in plain.iterdir())
    assert files == sorted(path.name for path in applied.iterdir())
    assert all((plain / name).read_bytes() == (applied / name).read_bytes() for name in files)
    parity("save_pretrained, state_dict", "holds")


def test_hooks_of_the_user_run_and_stay(make_hf: Any) -> None:
    called: list[str] = []
    model = make_hf()
    for name, module in model.named_modules():
        if not name.endswith("act_fn"):
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    model(IDS)
    want, called[:] = set(called), []
    apply(model)
    model.model.register_forward_pre_hook(lambda *_: called.append("new"))
    model(IDS)
    assert set(called) == want | {"new"}
    assert len(revert(model).model._forward_pre_hooks) == 1


def changed(change: Callable[[Any], Any], **sizes: Any) -> Callable[[Any], Any]:
    def build(make: Any) -> Any:
        model = make(**sizes)
        result = change(model)
        return result if isinstance(result, nn.Module) else model

    return build


def experts(model: Any) -> Any:
    return model.model.layers[0].mlp.experts


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}  # until transformers dequantizes such a model
FAST_NORM = type("FastNorm", (modeling.MixtralRMSNorm,), {})
PARAMS_4BIT = type("Params4bit", (nn.Parameter,), {})  # as in bitsandbytes
MISTRAL = {"vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1}
REJECTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no model": (lambda make: "mixtral", "model is a str, needs transformers' MixtralForCausalLM"),
    "pipeline": (lambda make: SimpleNamespace(model=make()), "a SimpleNamespace, .*give it the model inside, .model$"),
    "another module": (lambda make: nn.Linear(2, 2), "model is a Linear"),
    "compiled": (changed(torch.compile), "model is a OptimizedModule.*the model inside, ._orig_mod"),
    "another family": (lambda make: transformers.MistralModel(transformers.MistralConfig(**MISTRAL)), "a MistralModel"),
    "4 bits": (
        changed(lambda m: setattr(m.model.layers[0].self_attn.q_proj, "weight", PARAMS_4BIT(torch.zeros(512, 1)))),
        "q_proj.weight is torch.float32 in a Params4bit, needs a plain fp32, bf16 or fp16",
    ),
    "quantizer": (changed(lambda m: setattr(m, "hf_quantizer", object())), "quantization_config.*from_pretrained"),
    "config": (
        changed(lambda m: setattr(m.config, "quantization_config", FP8)),
        "quantization_config.*from_pretrained",
    ),
    "fp64": (changed(lambda m: m.double()), "torch.float64"),
    "tensor parallel": (changed(lambda m: setattr(m, "_tp_size", 2)), "tensor-parallel plan; load it without tp_plan"),
    "expert parallel": (changed(lambda m: setattr(experts(m), "_is_expert_parallel", True)), "is split over ranks"),
    "forward": (changed(lambda m: setattr(m.model.norm, "forward", id)), "model.norm has a forward of its own"),
    "class": (changed(lambda m: setattr(m.model.norm, "__class__", FAST_NORM)), "FastNorm, not transformers' own Mi"),
    "activation": (changed(id, hidden_act="gelu"), "has the activation GELU.*needs SiLU"),
    "another attention": (
        changed(lambda m: setattr(m.model.layers[1], "self_attn", nn.Identity())),
        r"model\.layers\.1\.self_attn is a Identity, which cannot read fused attention's masks",
    ),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_model_stays_as_it_was(case: str, make_hf: Any) -> None:
    build, message = REJECTED[case]
    model = build(make_hf)
    before = snapshot(model) if isinstance(model, transformers.PreTrainedModel) else None
    with pytest.raises(ValueError, match=message):
        apply(model)
    assert before is None or snapshot(model) == before


@pytest.mark.parametrize("parts", [None, dict.fromkeys(PARTS, True), dict.fromkeys(PARTS, False), {"attention": False}])
def test_edits_of_the_config_stay(parts: Any, make_hf: Any, tmp_path: Path) -> None:
    model = apply(make_hf())
    config = model.config
    model.resize_token_embeddings(60, mean_resizing=False)
    edits = {"use_cache": False, "pad_token_id": 3, "router_aux_loss_coef": 0.5, "note": "mine"}
    config.update(edits)
    model = revert(model) if parts is None else apply(model, **parts)
    assert model.config is config and model.model.config is config
    assert {name: getattr(config, name) for name in ("vocab_size", *edits)} == {"vocab_size": 60, **edits}
    ids = torch.cat((IDS, torch.full((2, 1), 59)), 1)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert loaded.config.note == "mine" and loaded.config.vocab_size == 60
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-3)


def saved(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


FROM_CONFIG: dict[str, Callable[[Any, Path], Any]] = {
    "class": lambda m, _: transformers.MixtralForCausalLM(m.config),
    "another head": lambda m, _: transformers.MixtralForSequenceClassification(m.config),
    "from_config": lambda m, _: transformers.AutoModelForCausalLM.from_config(m.config),
    "from_pretrained": lambda m, folder: type(m).from_pretrained(saved(m, folder), config=m.config),
    "pickle": lambda m, _: transformers.MixtralForCausalLM(pickle.loads(pickle.dumps(m.config))),
    "attention": lambda m, _: type(m.model.layers[0].self_attn)(m.model.layers[0].self_attn.config, 0),
    "experts": lambda m, _: type(m.model.layers[0].mlp.experts)(m.model.layers[0].mlp.experts.config),
}


@pytest.mark.parametrize("source", FROM_CONFIG)
def test_module_made_from_the_config_is_transformers(source: str, make_hf: Any, tmp_path: Path, calls: set) -> None:
    model = apply(make_hf(attn_implementation="sdpa"))
    want = model(IDS).logits
    other = FROM_CONFIG[source](model, tmp_path).eval()
    calls.clear()
    if isinstance(other, transformers.PreTrainedModel):
        other(IDS)
    assert not calls and not hf.applied(other) and other.config._attn_implementation == "sdpa"
    assert all("mixtral_triton" not in type(module).__module__ for module in other.modules())
    assert torch.equal(model(IDS).logits, want) and {"attention", "expert_swiglu"} <= calls


@pytest.fixture
def picklable(make_hf: Any) -> None:
    """With the package `kernels` installed, transformers 5.7 keeps local functions that pickle rejects."""
    try:
        pickle.dumps(make_hf())
    except AttributeError as error:
        pytest.skip(f"a plain model of this transformers has no pickle: {error}")


def test_copies_are_independent(picklable: None, make_hf: Any, calls: set[str]) -> None:
    model = apply(make_hf())
    copies = [pickle.loads(pickle.dumps(model, protocol)) for protocol in range(6)]
    want = model(IDS).logits
    for each in (*copies, copy.copy(model), copy.deepcopy(model)):
        assert hf.applied(each) and torch.equal(each(IDS).logits, want)
    copies[0].set_attn_implementation("eager")
    assert not hf.applied(revert(copies[2])) and hf.applied(model)
    assert b"mixtral_triton" in pickle.dumps(model) and b"mixtral_triton" not in pickle.dumps(copies[2])
    for each, fused in ((model, True), (copies[1], True), (model._replicate_for_data_parallel(), True), (copies[0], 0)):
        calls.clear()
        each(IDS)
        assert ("attention" in calls) == fused
    h, layer = torch.randn(2, 5, 32), copy.deepcopy(model.model.layers[0])
    positions = model.model.rotary_emb(h, torch.arange(5)[None])
    assert torch.equal(layer(h, positions), model.model.layers[0](h, positions))
