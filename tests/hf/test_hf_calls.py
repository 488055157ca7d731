"""What others ask of an applied model: attention's weights, cos and sin, a layer alone, another implementation."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtral_triton import apply, hf, revert
from mixtral_triton.hf.release import cache_keyword
from mixtral_triton.kernels.launch import INTERPRETED

transformers = pytest.importorskip("transformers")
from transformers.models.mixtral import modeling_mixtral as theirs  # noqa: E402

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules, not kernels: run once, without the interpreter")
IDS = torch.randint(1, 48, (2, 14), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :6] = 0


@pytest.mark.parametrize("window", [6, None])
def test_weights_are_given_for_one_call_beside_the_same_logits(window: Any, make_hf: Any, calls: set[str]) -> None:
    model = apply(make_hf(sliding_window=window))
    want = model(IDS, attention_mask=LEFT)
    calls.clear()
    got = model(IDS, attention_mask=LEFT, output_attentions=True)
    assert "attention" in calls and torch.equal(got.logits, want.logits)
    assert [x.shape for x in got.attentions] == [(2, 4, 14, 14)] * 2 and want.attentions is None
    assert model(IDS, attention_mask=LEFT).attentions is None
    real = LEFT.bool()
    for weights in got.attentions:
        rows = weights.transpose(1, 2)[real]
        assert torch.allclose(rows.sum(-1), torch.ones(rows.shape[:2]), atol=1e-5)
        seen = (weights > 0).float().sum(-1).amax(1)[real]  # keys that a query looks at
        assert seen.max() == (window or 14)


def test_weights_by_the_config(make_hf: Any) -> None:
    """Before and after apply; an argument goes before it, and a model of torch's attention may not ask that way."""
    model = make_hf()
    model.config.output_attentions = True
    want = model(IDS).attentions
    apply(model)
    for got, expected in zip(model(IDS).attentions, want, strict=True):
        assert torch.allclose(got, expected, atol=1e-5)
    assert model(IDS, output_attentions=False).attentions is None
    model.config.output_attentions = False
    assert model(IDS).attentions is None
    model.config.output_attentions = True
    assert len(model.model(IDS).attentions) == 2
    assert len(apply(make_hf(attn_implementation="sdpa"))(IDS, output_attentions=True).attentions) == 2
    assert len(apply(make_hf(), attention=False)(IDS, output_attentions=True).attentions) == 2


def test_weights_in_a_compiled_model(make_hf: Any) -> None:
    model = apply(make_hf())
    with torch.no_grad():
        want = model(IDS, output_attentions=True).attentions
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(IDS, output_attentions=True).attentions
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_the_rotary_module_answers_as_transformers_does(dtype: torch.dtype, kind: str, make_hf: Any) -> None:
    parameters = {"rope_type": kind, "rope_theta": 1e4} | ({"factor": 2.0} if kind == "yarn" else {})
    model = make_hf(head_dim=8, rope_parameters=parameters).to(dtype)
    x = torch.randn(2, 14, 32).to(dtype)
    for positions in (torch.arange(14)[None], torch.stack((torch.arange(14), torch.arange(14) + 3))):
        want = revert(model).model.rotary_emb(x, positions)
        got = apply(model).model.rotary_emb(x, positions)
        assert isinstance(got, tuple) and len(got) == 2
        cos, sin = got
        assert (cos.dtype, cos.shape) == (dtype, (len(positions), 14, 8))
        assert torch.equal(cos, want[0]) and torch.equal(sin, want[1])
        assert torch.equal(got[0], want[0]) and torch.equal(got[-1], want[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_and_attention_take_an_ordinary_pair(dtype: torch.dtype, make_hf: Any, calls: set[str]) -> None:
    """As those do who build their own loop over the layers; positions may differ from row to row."""
    model = make_hf().to(dtype)
    h = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = torch.stack((torch.arange(14), torch.arange(14) * 3))
    rows = slice(0, 1), slice(0, 2)
    pairs = [model.model.rotary_emb(h, positions[row]) for row in rows]
    mask = torch.full((14, 14), torch.finfo(dtype).min).triu(1).to(dtype)[None, None]
    mask = mask.masked_fill(torch.ones(14, 14).tril(-6).bool(), torch.finfo(dtype).min)
    layer = model.model.layers[0]
    want = [layer(h, pair, mask) for pair in pairs] + [layer.self_attn(h, pair, mask)[0] for pair in pairs]
    apply(model)
    got = [layer(h, pair) for pair in pairs] + [layer.self_attn(h, pair)[0] for pair in pairs]
    assert {"rope", "attention"} <= calls
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1) * y.abs().max()


def test_tables_are_made_once_a_forward(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mixtral_triton.hf import modules as hf_modules

    made: list[int] = []
    tables = hf_modules.rope_tables
    monkeypatch.setattr(hf_modules, "rope_tables", lambda *args: (made.append(1), tables(*args))[1])
    model = apply(make_hf(num_hidden_layers=3))
    model(IDS)
    assert len(made) == 1


def test_tables_go_along_from_gpu_to_gpu(make_hf: Any) -> None:
    """accelerate rebuilds the tuples that it moves; in bf16 a pair without its tables would be less exact."""
    operations = pytest.importorskip("accelerate.utils.operations")
    angles = apply(make_hf()).model.rotary_emb(torch.randn(2, 14, 32).bfloat16(), torch.arange(14)[None])
    moved = operations.send_to_device({"position_embeddings": angles}, torch.device("cpu"))["position_embeddings"]
    assert all(torch.equal(x, y) for x, y in zip(moved.tables, angles.tables, strict=True))
    assert moved.tables[0].dtype == torch.float32
    assert all(x.is_meta for x in (*angles.to("meta"), *angles.to("meta").tables))


def test_transformers_finds_the_rotary_module(make_hf: Any) -> None:
    """`_init_weights` fills its buffers, as after loading on the meta device."""
    rotary = apply(make_hf()).model.rotary_emb
    want = rotary.inv_freq.clone()
    for name in ("inv_freq", "original_inv_freq"):
        getattr(rotary, name).fill_(7.0)
    apply(make_hf())._init_weights(rotary)
    assert torch.equal(rotary.inv_freq, want) and torch.equal(rotary.original_inv_freq, want)


@pytest.mark.parametrize("hook", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_hook_that_would_never_fire_is_refused_in_the_forward(hook: str, make_hf: Any) -> None:
    model = apply(make_hf())
    handle = getattr(model.model.layers[1].mlp.experts.act_fn, hook)(lambda *_: None)
    with pytest.raises(ValueError, match=r"act_fn .* has hooks.*apply\(model, experts=False\)"):
        model(IDS)
    handle.remove()
    model(IDS)
    seen: list[int] = []
    getattr(model.model.layers[1].mlp.experts.act_fn, hook)(lambda *_: seen.append(1))
    apply(model, experts=False)(IDS)
    assert seen


class Wrapper(nn.Module):
    """What hides a model as PEFT, torch or an engine does."""

    def __init__(self, **inside: nn.Module) -> None:
        super().__init__()
        self.__dict__["_modules"].update(inside)


def wrapped(model: Any) -> dict[str, Any]:
    return {
        ".base_model.model": Wrapper(base_model=Wrapper(model=model)),
        ".base_model": Wrapper(base_model=model),
        ".module": nn.DataParallel(model),
        ".module.base_model.model": Wrapper(module=Wrapper(base_model=Wrapper(model=model))),
    }


@pytest.mark.parametrize("path", [".base_model.model", ".base_model", ".module", ".module.base_model.model"])
def test_the_hint_names_where_the_model_is(path: str, make_hf: Any) -> None:
    for function in (apply, revert):
        with pytest.raises(ValueError) as caught:
            function(wrapped(make_hf())[path])
        assert str(caught.value).endswith(f"give it the model inside, {path}")


def test_a_model_with_adapters(make_hf: Any) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        make_hf(), peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    model.eval()
    want = model(IDS).logits
    with pytest.raises(ValueError, match=r"PeftModel.*the model inside, \.base_model\.model$"):
        apply(model)
    apply(model.base_model.model)
    assert hf.applied(model) and torch.allclose(model(IDS).logits, want, atol=1e-4)


def test_continuous_batching_is_refused_by_name(make_hf: Any) -> None:
    model = apply(make_hf(attn_implementation="sdpa"))
    for start in (lambda: model.generate_batch(inputs=IDS.tolist()), model.init_continuous_batching):
        with pytest.raises(
            ValueError, match=r"continuous batching \(generate_batch\).*apply\(model, attention=False\)"
        ):
            start()
    assert apply(model, attention=False).init_continuous_batching() is not None


def test_a_cache_in_pages_is_refused_by_name(make_hf: Any) -> None:
    cache = pytest.importorskip("transformers.generation.continuous_batching.cache")
    paged = object.__new__(cache.PagedAttentionCache)
    model = apply(make_hf())
    paged.get_seq_length = lambda *_: 0
    with pytest.raises(ValueError, match=r"is a PagedAttentionCache, needs a Cache .* continuous batching"):
        model(IDS, **{cache_keyword(): paged})


SELECT = {"attention": "set_attn_implementation", "experts": "set_experts_implementation"}
OPERATION = {"attention": "attention", "experts": "expert_swiglu"}


@pytest.mark.parametrize("name", ["eager", "sdpa", {"": "eager"}])
@pytest.mark.parametrize("part", SELECT)
def test_another_implementation_by_transformers_own_methods(
    part: str, name: Any, make_hf: Any, calls: set[str]
) -> None:
    """Even the one that the config has named all along; ours comes back by its name, or by apply."""
    name = "batched_mm" if part == "experts" and name == "sdpa" else name
    model = apply(make_hf())
    want = model(IDS, attention_mask=LEFT).logits[LEFT.bool()]
    for target in (model, model.model):
        for back in ("by name", "by apply"):
            getattr(target, SELECT[part])(name)
            calls.clear()
            got = model(IDS, attention_mask=LEFT).logits[LEFT.bool()]
            assert OPERATION[part] not in calls and "rms_norm" in calls and "rope" in calls
            assert torch.allclose(got, want, atol=1e-4)
            if back == "by apply":
                apply(model)
            else:
                getattr(target, SELECT[part])("mixtral_triton")
            calls.clear()
            model(IDS)
            assert OPERATION[part] in calls
    getattr(model, SELECT[part])({"another_config": "eager"})
    calls.clear()
    model(IDS)
    assert OPERATION[part] in calls


@pytest.mark.parametrize("part", SELECT)
def test_our_name_selects_what_was_applied_only(part: str, make_hf: Any) -> None:
    model = apply(make_hf(), **{part: False})
    with pytest.raises(ValueError, match=rf"apply\(model, {part}=True\)"):
        getattr(model, SELECT[part])("mixtral_triton")
    with pytest.raises(ValueError, match="is not supported"):
        getattr(revert(model), SELECT[part])("mixtral_triton")
    assert model.config._attn_implementation == "eager"


def test_generate_does_not_switch_experts_on_a_gpu(make_hf: Any, calls: set[str], monkeypatch: Any) -> None:
    """There transformers takes `batched_mm` for the time of decoding, where `grouped_mm` was chosen."""
    model = apply(make_hf(experts_implementation="grouped_mm"))
    monkeypatch.setattr(transformers.PreTrainedModel, "device", SimpleNamespace(type="cuda"))
    with model._optimize_model_for_decode():
        assert model.config._experts_implementation == "grouped_mm"
        model(IDS)
    assert "expert_swiglu" in calls
    calls.clear()
    with apply(model, experts=False)._optimize_model_for_decode():
        assert model.config._experts_implementation == "batched_mm"
        model(IDS)
    assert "expert_swiglu" not in calls


@pytest.mark.parametrize("place", [7, "cuda:7", torch.device("cuda", 7)])
def test_a_gpu_that_is_not_there(place: Any, make_hf: Any) -> None:
    """As accelerate's hooks of a model that was split where there were more."""
    accelerate = pytest.importorskip("accelerate")
    model = make_hf()
    hooks = [accelerate.hooks.AlignDevicesHook(execution_device=device) for device in ("cpu", place)]
    accelerate.hooks.add_hook_to_module(model.model.layers[1], hooks[0])
    apply(model)
    accelerate.hooks.add_hook_to_module(model.model.layers[1], hooks[1], append=True)
    with pytest.raises(ValueError, match=r"apply: model\.layers\.1 is to run on cuda:7, .* has \d CUDA devices"):
        apply(model)
    assert hf.applied(model)
    revert(model)
    assert not hf.applied(model)


def test_the_mask_of_another_maker_is_as_torch_takes_it(make_hf: Any) -> None:
    """`forward` of the backbone's own class leaves the mask to transformers: None is causal from the first key on."""
    model = apply(make_hf(sliding_window=None))
    attend = model.model.layers[0].self_attn
    h = torch.randn(2, 5, 32)
    pair = model.model.rotary_emb(h, torch.arange(5)[None])
    cache = transformers.StaticCache(config=model.config, max_cache_len=9)
    want = attend(h, pair)[0]
    got, weights = attend(h, pair, None, cache, output_attentions=True)
    assert torch.allclose(got, want, atol=1e-5)
    assert weights.shape == (2, 4, 5, 9) and not weights[..., 5:].any()
    assert theirs.MixtralModel.forward(model.model, IDS).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("causal", [True, False])
def test_a_model_that_looks_both_ways(causal: bool, make_hf: Any) -> None:
    for window in (6, None):
        model = make_hf(sliding_window=window)
        want = [model(IDS, is_causal=causal).logits, model(IDS, attention_mask=LEFT, is_causal=causal).logits]
        apply(model)
        got = [model(IDS, is_causal=causal).logits, model(IDS, attention_mask=LEFT, is_causal=causal).logits]
        assert torch.allclose(got[0], want[0], atol=1e-4)
        assert torch.allclose(got[1][LEFT.bool()], want[1][LEFT.bool()], atol=1e-4)


def test_positional_arguments_of_the_backbone(make_hf: Any) -> None:
    model = make_hf()
    embeds: Tensor = model.model.embed_tokens(IDS)
    calls = [(IDS,), (IDS, LEFT), (None, LEFT, None, None, embeds)]
    real = LEFT.bool()
    with torch.no_grad():
        want = [model.model(*args)[0][real] for args in calls]
        got = [apply(model).model(*args)[0][real] for args in calls]
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(got, want, strict=True))
    with pytest.raises(TypeError, match="attention_mask"):
        model.model(IDS, LEFT, attention_mask=LEFT)
    with pytest.raises(ValueError, match="input_ids"):
        model.model()
