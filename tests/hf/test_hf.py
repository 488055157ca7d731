"""apply and revert: one instance, nothing else; undone bit for bit; what cannot be honoured is refused by name."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import MethodType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtral_triton import apply, hf, revert
from mixtral_triton.kernels.launch import INTERPRETED
from mixtral_triton.kernels.record import record_launches

transformers = pytest.importorskip("transformers")
from transformers.models.mixtral import modeling_mixtral as theirs  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules, not kernels: run once, without the interpreter")
IDS = torch.randint(1, 48, (2, 14), generator=torch.Generator().manual_seed(0))
ROOT = Path(__file__).parents[2]
PARTS = ("attention", "experts", "rms_norm", "rope")


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every module's class, and every attribute, by identity (containers: by what they hold)."""

    def mark(value: Any) -> Any:
        if isinstance(value, dict):
            return [(key, mark(item)) for key, item in value.items()]
        return id(value.__func__) if isinstance(value, MethodType) else id(value)

    found = {name: (type(m), {k: mark(v) for k, v in vars(m).items()}) for name, m in model.named_modules()}
    return found | {"config": model.config.to_dict()}


def registries() -> list[dict[str, Any]]:
    from transformers.integrations.moe import ExpertsInterface

    kinds = (transformers.AttentionInterface, transformers.AttentionMaskInterface, ExpertsInterface)
    return [{k: v for k, v in kind._global_mapping.items() if k != "mixtral_triton"} for kind in kinds]


def classes() -> dict[str, Any]:
    def own(kind: type) -> dict[str, Any]:
        return {name: value for name, value in vars(kind).items() if name != "__slotnames__"}  # a cache of copy's

    return {name: own(kind) for name, kind in vars(theirs).items() if name.startswith("Mixtral")}


def test_what_apply_changes_and_revert_restores(make_hf: Any) -> None:
    model, other = make_hf(), make_hf()
    model.config = other.config = model.model.config
    before = snapshot(model), snapshot(other), registries(), classes(), model.config.to_dict()
    assert apply(model) is model
    assert snapshot(model) != before[0]
    assert (snapshot(other), registries(), classes(), other.config.to_dict()) == before[1:]
    assert isinstance(model.model.norm, theirs.MixtralRMSNorm)
    assert revert(model) is model
    assert (snapshot(model), snapshot(other), registries(), classes(), model.config.to_dict()) == before


def test_applying_twice_is_applying_once_and_the_latest_choice_holds(make_hf: Any, calls: set[str]) -> None:
    model = make_hf()
    before = snapshot(model)
    apply(apply(model), attention=False, rope=False)
    model(IDS)
    assert calls == {"rms_norm", "gate_route", "expert_swiglu"}
    apply(model, attention=False, experts=False, rms_norm=False, rope=False)
    assert snapshot(model) == before
    assert snapshot(revert(model)) == before


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("attention", {"attention"}),
        ("experts", {"gate_route", "expert_swiglu"}),
        ("rms_norm", {"rms_norm"}),
        ("rope", {"rope"}),
    ],
)
def test_each_part_alone_equals_eager(part: str, expected: set[str], make_hf: Any, calls: set[str]) -> None:
    model = make_hf()
    want = model(IDS).logits
    got = apply(model, **{name: name == part for name in PARTS})(IDS).logits
    assert calls == expected
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_part_left_out_keeps_the_implementation_chosen_before(make_hf: Any) -> None:
    model = make_hf(attn_implementation="sdpa", experts_implementation="grouped_mm")
    apply(model, attention=False, experts=False)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "grouped_mm")


def test_intervals_never_become_a_dense_mask(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padding on either side, packed sequences, windows, every kind of cache: transformers' masks are not asked."""
    from mixtral_triton.hf import mask as hf_mask

    def refuse(**kwargs: Any) -> None:
        raise AssertionError("a dense mask was made")

    monkeypatch.setattr(hf_mask, "sdpa_mask", refuse)
    for name in ("eager", "sdpa"):
        monkeypatch.setitem(transformers.AttentionMaskInterface._global_mapping, name, refuse)
    padded = torch.ones_like(IDS)
    padded[1, :6] = 0
    for window in (6, None):
        model = apply(make_hf(sliding_window=window))
        for mask in (None, padded, padded.flip(1), torch.ones_like(IDS)):
            model(IDS, attention_mask=mask)
        for cache in ("dynamic", "static"):
            model.generate(IDS, attention_mask=padded, max_new_tokens=8, cache_implementation=cache, do_sample=False)
        packed = torch.cat((torch.arange(5), torch.arange(9))).expand(2, 14)
        model(IDS, position_ids=packed, use_cache=False)
        model(IDS, use_cache=False)


def test_state_dict_and_saved_files_are_the_same(make_hf: Any, tmp_path: Path, parity: Any) -> None:
    model = make_hf()
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "plain")
    apply(model)
    assert list(model.state_dict()) == names
    model.save_pretrained(tmp_path / "applied")
    files = sorted(path.name for path in (tmp_path / "plain").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "applied").iterdir())
    for name in files:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "applied" / name).read_bytes(), name
    with torch.no_grad():
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "applied").eval()
        assert torch.allclose(again(IDS).logits, model(IDS).logits, atol=1e-3)
    parity("save_pretrained, state_dict", "holds")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_is_applied_and_can_be_reverted_alone(clone: Callable[[Any], Any], make_hf: Any) -> None:
    model = apply(make_hf())
    dequantized_copy = clone(model)
    want = model(IDS).logits
    assert torch.equal(dequantized_copy(IDS).logits, want)
    revert(dequantized_copy)
    assert type(dequantized_copy.model.norm) is theirs.MixtralRMSNorm and not hf.applied(dequantized_copy)
    assert hf.applied(model) and torch.equal(model(IDS).logits, want)


def test_the_users_hooks_run_and_stay(make_hf: Any) -> None:
    seen: list[str] = []
    model = make_hf()
    for name, module in model.named_modules():
        if not name.endswith("act_fn"):  # refused below
            module.register_forward_hook(lambda *_, name=name: seen.append(name))
    model(IDS)
    want, seen[:] = set(seen), []
    apply(model)
    model.model.register_forward_pre_hook(lambda *_: seen.append("new"))
    model(IDS)
    assert set(seen) == want | {"new"}
    revert(model)
    assert len(model.model._forward_pre_hooks) == 1


def test_accelerates_hooks_may_come_and_go(make_hf: Any) -> None:
    """A hook keeps the bound forward that it wraps, and leaves it behind when it is removed."""
    accelerate = pytest.importorskip("accelerate")
    model = make_hf()
    want = model(IDS).logits
    accelerate.dispatch_model(model, {"": "cpu"}, force_hooks=True)
    hooked = snapshot(model)
    apply(model)
    assert type(model.model.norm).__module__ == "mixtral_triton.hf.modules"
    assert torch.allclose(model(IDS).logits, want, atol=1e-4)
    assert snapshot(revert(model)) == hooked
    accelerate.hooks.remove_hook_from_submodules(apply(model))
    revert(model)
    assert all(type(m).__module__ != "mixtral_triton.hf.modules" for m in model.modules())
    left = [m.__dict__["forward"] for m in model.modules() if "forward" in m.__dict__]
    assert left and not any("mixtral_triton" in forward.__func__.__module__ for forward in left)


def test_forward_works_with_gradients_and_backward_says_no(make_hf: Any, parity: Any) -> None:
    for part in PARTS:
        model = apply(make_hf(), **{name: name == part for name in PARTS})
        loss = model(IDS, labels=IDS).loss
        assert loss.requires_grad
        with pytest.raises(ValueError, match="inference only"):
            loss.backward()
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        model.train()(IDS)
    revert(model)(IDS, labels=IDS).loss.backward()
    parity("gradients: forward works, backward is refused", "holds")


def test_compiles_without_a_graph_break(make_hf: Any, parity: Any) -> None:
    """fullgraph: plain, left-padded, and a decode step on a static cache with the masks that generate prepares."""
    model = apply(make_hf())
    mask = torch.ones_like(IDS)
    mask[1, :6] = 0
    with torch.no_grad():
        want = [model(IDS).logits, model(IDS, attention_mask=mask, use_cache=False).logits[mask.bool()]]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(IDS).logits, want[0], atol=1e-4)
        got = compiled(IDS, attention_mask=mask, use_cache=False).logits
        assert torch.allclose(got[mask.bool()], want[1], atol=1e-4)
        settings = {"attention_mask": mask, "max_new_tokens": 4, "cache_implementation": "static", "do_sample": False}
        want_ids = model.generate(IDS, **settings)
        forward = model.forward
        model.forward = torch.compile(forward, fullgraph=True, backend="aot_eager")
        assert torch.equal(model.generate(IDS, **settings), want_ids)
    parity("compile: fullgraph, static cache too", "holds")


@pytest.mark.parametrize("masked", [False, True])
def test_exports_with_open_sizes(masked: bool, make_hf: Any, parity: Any) -> None:
    def call(ids: Tensor) -> dict[str, Any]:
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        return {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if masked else {})

    model = apply(make_hf())
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("tokens", min=4, max=64)}
    open_sizes = {name: sizes if isinstance(value, Tensor) else None for name, value in call(IDS).items()}
    with torch.no_grad():
        program = torch.export.export(model, (), call(IDS), dynamic_shapes=open_sizes)
        for ids in (IDS, torch.cat((IDS, IDS[:1]))[:, :9]):
            real = call(ids).get("attention_mask", torch.ones_like(ids)).bool()
            got, want = program.module()(**call(ids)).logits, model(**call(ids)).logits
            assert torch.allclose(got[real], want[real], atol=1e-4)
    assert any("mixtral_triton" in str(node.target) for node in program.graph.nodes)
    parity("export: open sizes, left padding" if masked else "export: open sizes", "holds")


@pytest.mark.parametrize("tokens", [1, 20])
def test_kernels_a_layer_are_at_most_half_of_eagers(tokens: int, make_hf: Any) -> None:
    """Ours as a GPU would launch them, on meta tensors; eager's as torch's operations that compute."""
    counts = {}
    for device in ("meta", "cpu"):
        total = []
        for layers in (1, 2):
            model = make_hf(num_hidden_layers=layers, sliding_window=None)
            model = apply(model).to("meta") if device == "meta" else model
            kept = model(IDS.to(device), use_cache=True)[1]
            ids = torch.ones((2, tokens), dtype=torch.long, device=device)
            with torch.no_grad(), record_launches() as launches:
                model(ids, None, None, kept)
            total.append(len(launches))
        counts[device] = total[1] - total[0]
    assert 0 < counts["meta"] <= counts["cpu"] / 2


def broken(change: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def build(make: Any) -> Any:
        model = make()
        changed = change(model)
        return model if changed is None else changed

    return build


def own_forward(model: Any) -> None:
    model.model.norm.forward = lambda x: x


def own_class(model: Any) -> None:
    model.model.norm.__class__ = type("FastNorm", (theirs.MixtralRMSNorm,), {})


def quantized(model: Any) -> None:
    proj = model.model.layers[0].self_attn.q_proj
    proj.weight = nn.Parameter(proj.weight.to(torch.int8), requires_grad=False)


def planted_config(model: Any) -> None:
    """As a quantized model has it, until transformers dequantizes it."""
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def four_bits(model: Any) -> None:
    """A parameter of another kind, as bitsandbytes puts in."""
    kind = type("Params4bit", (nn.Parameter,), {})
    model.model.layers[0].self_attn.q_proj.weight = kind(torch.zeros((512, 1)), requires_grad=False)


def hooked_activation(model: Any) -> None:
    model.model.layers[0].mlp.experts.act_fn.register_forward_hook(lambda *_: None)


def sharded(model: Any) -> None:
    model._tp_size = 2


def split_experts(model: Any) -> None:
    model.model.layers[0].mlp.experts._is_expert_parallel = True


REFUSED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "not a model": (lambda make: "mixtral", "model is a str, needs transformers' MixtralForCausalLM"),
    "another model": (lambda make: nn.Linear(2, 2), "model is a Linear"),
    "compiled": (broken(torch.compile), "model is a OptimizedModule.*the model inside, ._orig_mod"),
    "another family": (
        lambda make: transformers.MistralForCausalLM(
            transformers.MistralConfig(vocab_size=8, hidden_size=32, intermediate_size=8, num_hidden_layers=1)
        ),
        "model is a MistralForCausalLM",
    ),
    "quantized": (broken(quantized), "q_proj.weight is torch.int8 in a Parameter, needs a plain fp32, bf16 or fp16"),
    "four bits": (broken(four_bits), "torch.float32 in a Params4bit"),
    "quantizer": (
        broken(lambda m: setattr(m, "hf_quantizer", object())),
        "quantization_config.*Mixtral.from_pretrained",
    ),
    "quantization_config": (broken(planted_config), "quantization_config.*Mixtral.from_pretrained"),
    "fp64": (broken(lambda m: m.double()), "torch.float64"),
    "tensor parallel": (broken(sharded), "tensor-parallel plan; load it without tp_plan"),
    "expert parallel": (broken(split_experts), "layers.0.mlp.experts is split over ranks"),
    "own forward": (broken(own_forward), "model.norm has a forward of its own"),
    "own class": (broken(own_class), "model.norm is a FastNorm, not transformers' own MixtralRMSNorm"),
    "a hook inside": (broken(hooked_activation), "act_fn has hooks.*experts=False"),
    "activation": (lambda make: make(hidden_act="gelu"), "activation GELU.*needs silu"),
    "head size": (lambda make: make(head_dim=512), "head_dim is 512, needs at most 256"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_left_as_it_was(case: str, make_hf: Any) -> None:
    build, message = REFUSED[case]
    model = build(make_hf)
    before = snapshot(model) if isinstance(model, transformers.PreTrainedModel) else None
    with pytest.raises(ValueError, match=message):
        apply(model)
    assert before is None or snapshot(model) == before


def test_parts_are_true_or_false(make_hf: Any) -> None:
    with pytest.raises(ValueError, match="argument 'experts' is 'all', needs True or False"):
        apply(make_hf(), experts="all")


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(3, 14), r"attention_mask is of shape \[3, 14\], needs \[2, 14\]"),
        (torch.ones(2, 12), r"needs \[2, 14\], one value a token"),
        (torch.ones(2, 15), r"needs \[2, 14\], one value a token"),
        (torch.ones(2, 1, 14, 9), r"broadcasts to \[2, 4, 14, 14\]"),
        (torch.ones(2, 1, 14, 14, dtype=torch.int64), "attention_mask is torch.int64"),
        (torch.ones(2, 1, 14, 14, dtype=torch.int32), "attention_mask is torch.int32"),
    ],
)
def test_a_mask_of_the_wrong_shape(mask: Tensor, message: str, make_hf: Any) -> None:
    with pytest.raises(ValueError, match=message):
        apply(make_hf())(IDS, attention_mask=mask)


def test_a_mask_of_the_new_tokens_only_is_no_mask_of_the_text(make_hf: Any) -> None:
    model = apply(make_hf())
    kept = model(IDS, use_cache=True)[1]
    with pytest.raises(ValueError, match=r"shape \[2, 1\], needs \[2, 15\] \(14 past, 1 new\)"):
        model(IDS[:, :1], torch.ones(2, 1), None, kept)


def test_the_package_alone_does_not_import_transformers() -> None:
    code = "import sys; from mixtral_triton import Mixtral, apply, revert, verify; print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(("version", "found"), [("5.6.2", "found 5.6.2"), (None, "pip install 'transformers>=5.7'")])
def test_too_old_or_missing(version: str | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fake: Any = None
    if version is not None:
        fake = ModuleType("transformers")
        fake.__version__ = version
    monkeypatch.setitem(sys.modules, "transformers", fake)
    with pytest.raises(ImportError, match=found):
        apply(nn.Linear(1, 1))
