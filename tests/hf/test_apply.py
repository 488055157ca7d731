"""apply and revert change one instance and nothing else, bit for bit, for a handful of families by one table."""

import copy
import functools
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

from mixtral_triton.hf.experts import NAME  # noqa: E402
from tests.support.families import build  # noqa: E402

pytestmark = pytest.mark.compiled
IDS = torch.randint(1, 48, (2, 14), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :6] = 0
PARTS = {name: {name} for name in ("attention", "rms_norm", "rope")} | {"experts": {"gate_route", "expert_swiglu"}}
ALL = set[str]().union(*PARTS.values())
# The operations that a family does not have here: transformers' own stay.
FAMILIES: dict[str, set[str]] = {"mixtral": set(), "qwen3_moe": set(), "deepseek_v3": set()}
if not hasattr(build("deepseek_v3").model.layers[-1].mlp.gate, "top_k"):
    FAMILIES["deepseek_v3"] = {"gate_route"}  # in this transformers the layer selects, and its router computes logits
FAMILIES |= {"qwen3_next": set(), "gpt_oss": {"gate_route", "expert_swiglu"}, "phimoe": {"gate_route", "rms_norm"}}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in [*FAMILIES][3:]]
families = pytest.mark.parametrize("family", [*[*FAMILIES][:3], *SLOW])


def model_of(family: str = "mixtral", **sizes: Any) -> Any:
    return build(family, **sizes).requires_grad_(False)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every module's class, every attribute by identity (containers by what they hold), and the config's values."""

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, mark(item)) for key, item in value.items()]
        return id(value.__func__) if isinstance(value, MethodType) else id(value)

    found = {name: (type(m), {k: mark(v) for k, v in vars(m).items()}) for name, m in model.named_modules()}
    config: Any = model.config
    return found | {"config": config.to_dict(), "values": [(k, repr(v)) for k, v in vars(config).items()]}


def snapshot_library() -> list[dict[str, Any]]:
    """transformers' registries and Mixtral classes."""
    from transformers.integrations.moe import ExpertsInterface

    kinds = (transformers.AttentionInterface, transformers.AttentionMaskInterface, ExpertsInterface)
    registries = [{k: v for k, v in kind._global_mapping.items() if k != NAME} for kind in kinds]
    classes = [kind for name, kind in vars(modeling).items() if name.startswith("Mixtral")]
    # copy caches __slotnames__
    return registries + [{k: v for k, v in vars(kind).items() if k != "__slotnames__"} for kind in classes]


@families
def test_apply_changes_one_instance_and_revert_restores_it(family: str, calls: set[str]) -> None:
    """Beside one of the same config, which transformers' own setters would change."""
    model = model_of(family)
    other = type(model)(model.config).eval()
    before, unchanged, want = snapshot(model), (snapshot(other), snapshot_library()), model(IDS).logits
    assert apply(model) is model and snapshot(model) != before
    assert (model(IDS).logits - want).abs().max() <= 1e-5 * want.abs().max()
    assert calls & ALL == ALL - FAMILIES[family]
    assert (snapshot(other), snapshot_library()) == unchanged and not hf.runs_here(other)
    assert {type(m).__name__ for m in model.modules()} == {type(m).__name__ for m in other.modules()}
    assert apply(model) is revert(model) is model and snapshot(model) == before
    assert (snapshot(other), snapshot_library()) == unchanged and torch.equal(model(IDS).logits, want)


@families
@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(part: str, family: str, calls: set[str]) -> None:
    model = model_of(family)
    want = model(IDS).logits
    out = apply(model, **{name: name == part for name in PARTS})(IDS)
    assert calls & ALL == PARTS[part] - FAMILIES[family]
    assert (out.logits - want).abs().max() <= 1e-4 * want.abs().max()
    with torch.no_grad(), forward_ad.dual_level():
        embeds = model.get_input_embeddings()(IDS)
        if PARTS[part] - FAMILIES[family]:
            with pytest.raises(ValueError, match="forward derivatives"):
                model(inputs_embeds=forward_ad.make_dual(embeds, embeds))


def test_the_last_apply_decides(make_hf: Any, calls: set[str]) -> None:
    model = make_hf(attn_implementation="sdpa", experts_implementation="grouped_mm")
    with pytest.raises(ValueError, match="argument 'experts' is 'all', needs True or False"):
        apply(model, experts="all")
    before = snapshot(model)
    apply(apply(model), attention=False, rope=False)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", NAME)
    model(IDS)
    assert calls == {"rms_norm", "gate_route", "expert_swiglu"}
    apply(model, attention=False, experts=False, rms_norm=False, rope=False)
    assert snapshot(model) == before == snapshot(revert(model))


@pytest.mark.parametrize("path", ["norm", "layers.0.mlp.gate"])
def test_parametrization_of_a_replaced_module_is_removed_before_revert(path: str, make_hf: Any) -> None:
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


@families
def test_saved_files_are_the_same(family: str, tmp_path: Path) -> None:
    model, plain, changed = model_of(family), tmp_path / "plain", tmp_path / "applied"
    names = list(model.state_dict())
    model.save_pretrained(plain)
    assert list(apply(model).state_dict()) == names
    model.save_pretrained(changed)
    files = sorted(path.name for path in plain.iterdir())
    assert files == sorted(path.name for path in changed.iterdir())
    assert all((plain / name).read_bytes() == (changed / name).read_bytes() for name in files)


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


REJECTED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no model": (lambda make: "mixtral", "model is a str, needs transformers' PreTrainedModel"),
    "pipeline": (lambda make: SimpleNamespace(model=make()), "a SimpleNamespace, .*give it the model inside, .model$"),
    "another module": (lambda make: nn.Linear(2, 2), "model is a Linear"),
    "compiled": (changed(torch.compile), "model is a OptimizedModule.*the model inside, ._orig_mod"),
    "fp64": (changed(lambda m: m.double()), "torch.float64"),
    "tensor parallel": (changed(lambda m: setattr(m, "_tp_size", 2)), "tensor-parallel plan; load it without tp_plan"),
    "expert parallel": (changed(lambda m: setattr(experts(m), "_is_expert_parallel", True)), "is split over ranks"),
    "DTensor": (
        changed(lambda m: setattr(m.model.norm.weight, "__class__", type("DTensor", (nn.Parameter,), {}))),
        "norm.weight is a DTensor",
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


ROTARY = (modeling.MixtralRotaryEmbedding,)


def wrong_norm(module: Any, x: Any) -> Any:
    return modeling.MixtralRMSNorm.forward(module, x) * 1.5


KEPT: dict[str, tuple[Callable[[Any], Any], set[str]]] = {  # what keeps which operation from running anywhere
    "a norm's forward": (
        lambda m: [setattr(x, "forward", MethodType(wrong_norm, x)) for x in m.modules() if "Norm" in type(x).__name__],
        {"rms_norm"},
    ),
    "a norm's class": (
        lambda m: [
            setattr(x, "__class__", type("Mine", (type(x),), {"forward": wrong_norm}))
            for x in m.modules()
            if "Norm" in type(x).__name__
        ],
        {"rms_norm"},
    ),
    "a layer's attention is not causal": (
        lambda m: setattr(m.model.layers[1].self_attn, "is_causal", False),
        {"attention"},
    ),
    "the activation of a layer's experts": (
        lambda m: setattr(m.model.layers[1].mlp.experts, "act_fn", nn.GELU()),
        {"expert_swiglu"},
    ),
    "cos and sin of other columns": (
        lambda m: setattr(m.model.rotary_emb, "__class__", type("MineRotaryEmbedding", ROTARY, {"forward": shuffled})),
        {"rope"},
    ),
}  # fmt: skip


def shuffled(module: Any, x: Any, position_ids: Any) -> Any:
    """Angles of which no two columns are equal."""
    pair = modeling.MixtralRotaryEmbedding.forward(module, x, position_ids)
    return tuple(x * torch.linspace(0.5, 1, x.shape[-1]) for x in pair)


@pytest.mark.parametrize("what", KEPT)
def test_what_is_not_served_stays_as_it_is(what: str, make_hf: Any, calls: set[str]) -> None:
    model = make_hf()
    change, missing = KEPT[what]
    change(model)
    want = model(IDS).logits
    got = apply(model)(IDS).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    assert calls & ALL == ALL - missing


PATCHED = {"MixtralRMSNorm": {"rms_norm"}, "MixtralTopKRouter": {"gate_route"}, "MixtralAttention": set[str]()}


@pytest.mark.parametrize("name", PATCHED)
def test_a_class_that_was_patched_after_another_apply(
    name: str, make_hf: Any, calls: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    apply(make_hf())
    kind = getattr(modeling, name)
    original = kind.forward

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        if isinstance(out, torch.Tensor):
            return 1.5 * out
        return tuple(1.5 * x if getattr(x, "is_floating_point", bool)() else x for x in out)

    first = apply(make_hf())
    monkeypatch.setattr(kind, "forward", forward)
    model = make_hf()
    want = model(IDS).logits
    calls.clear()
    got = apply(model)(IDS).logits
    assert (got - want).abs().max() <= 1e-4 * want.abs().max() and calls & ALL == ALL - PATCHED[name]
    assert not hf.applied(revert(first)) and torch.equal(first(IDS).logits, want)


def test_a_router_that_reads_its_config_is_known_by_that(make_hf: Any) -> None:
    class Mine(modeling.MixtralTopKRouter):
        def forward(self, x: Any) -> Any:
            logits, weights, ids = super().forward(x)
            return logits, weights * self.config.factor, ids

    for factor in (1.0, 3.0):
        model = make_hf()
        model.config.factor = factor
        for module in model.modules():
            if isinstance(module, modeling.MixtralTopKRouter):
                module.__class__, module.config = Mine, model.config
        want = model(IDS).logits
        got = apply(model)(IDS).logits
        assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("parts", [None, dict.fromkeys(PARTS, True), dict.fromkeys(PARTS, False), {"attention": False}])
def test_edits_of_the_config_stay(parts: Any, make_hf: Any, tmp_path: Path) -> None:
    model = make_hf()
    original = model.config
    apply(model).resize_token_embeddings(60, mean_resizing=False)
    assert model.config is model.model.config is not original and original.vocab_size == 48
    edits = {"use_cache": False, "pad_token_id": 3, "router_aux_loss_coef": 0.5, "note": "mine"}
    model.config.update(edits)
    model = revert(model) if parts is None else apply(model, **parts)
    assert {name: getattr(model.config, name) for name in ("vocab_size", *edits)} == {"vocab_size": 60, **edits}
    assert revert(model).config is original and original.note == "mine"


@families
def test_copies_are_independent(family: str, calls: set[str]) -> None:
    model = model_of(family)
    try:
        pickle.dumps(model)
    except AttributeError as error:  # with the package `kernels`, transformers 5.7 keeps local functions
        pytest.skip(f"a plain model of this transformers has no pickle: {error}")
    apply(model)
    copies = [pickle.loads(pickle.dumps(model, protocol)) for protocol in (2, 5)]
    want = model(IDS).logits
    for each in (*copies, copy.copy(model), copy.deepcopy(model)):
        assert hf.applied(each) and torch.equal(each(IDS).logits, want)
    copies[0].set_attn_implementation("eager")
    assert not hf.runs_here(revert(copies[1])) and hf.applied(model)
    assert b"mixtral_triton" in pickle.dumps(model) and b"mixtral_triton" not in pickle.dumps(copies[1])
    for each, fused in ((model, True), (copies[0], False), (model._replicate_for_data_parallel(), True)):
        calls.clear()
        each(IDS)
        assert ("attention" in calls) == fused
    layer = next(module for module in model.modules() if hasattr(module, "original"))
    with torch.device("meta"):  # who calls the class builds transformers' own
        assert type(copy.copy(layer)) is type(layer)
