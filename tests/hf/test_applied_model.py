"""An applied model as transformers and users call it: attention weights, modules, implementations, compilers; PEFT's
adapters, and accelerate's layers on the CPU and on disk."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import apply, revert
from tests.hf.test_apply import IDS, LEFT

transformers = pytest.importorskip("transformers")
from transformers.models.mixtral import modeling_mixtral as modeling  # noqa: E402

pytestmark = pytest.mark.compiled
REAL = LEFT.bool()


def test_attention_weights_by_the_config_or_an_argument(make_hf: Any, calls: set[str]) -> None:
    """Before and after apply. An argument overrides the config."""
    model = make_hf()
    model.config.output_attentions = True
    want = model(IDS).attentions
    apply(model)
    assert all(torch.allclose(x, y, atol=1e-5) for x, y in zip(model(IDS).attentions, want, strict=True))
    assert model(IDS, output_attentions=False).attentions is None
    model.config.output_attentions = False
    assert model(IDS).attentions is None
    model.config.output_attentions = True
    assert len(model.model(IDS).attentions) == 2
    model.config.output_attentions = False
    calls.clear()
    assert model(IDS, output_attentions=True).attentions and "attention" in calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_take_an_ordinary_pair_of_angles(dtype: torch.dtype, make_hf: Any, calls: set[str]) -> None:
    """As a user's own loop over the layers passes it. Positions may differ from row to row."""
    model = make_hf().to(dtype)
    h = torch.randn(2, 14, 32, generator=torch.Generator().manual_seed(1)).to(dtype)
    positions = torch.stack((torch.arange(14), torch.arange(14) * 3))
    pairs = [model.model.rotary_emb(h, positions[:rows]) for rows in (1, 2)]
    visible = torch.ones(14, 14).tril().triu(-5).bool()
    mask = torch.zeros(1, 1, 14, 14, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    layer = model.model.layers[0]
    want = [layer(h, pair, mask) for pair in pairs] + [layer.self_attn(h, pair, mask)[0] for pair in pairs]
    apply(model)
    got = [layer(h, pair) for pair in pairs] + [layer.self_attn(h, pair)[0] for pair in pairs]
    assert {"rope", "attention"} <= calls
    for x, y in zip(got, want, strict=True):
        assert (x - y).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1) * y.abs().max()


def test_rotary_tables_are_made_once_and_move_along(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate rebuilds the tuples that it moves. In bf16 a pair without its tables would be less exact."""
    from mixtral_triton.hf import modules

    tables, count = modules.token_tables, []
    monkeypatch.setattr(modules, "token_tables", lambda *args: (count.append(1), tables(*args))[1])
    model = apply(make_hf(num_hidden_layers=3))
    model(IDS)
    assert len(count) == 1
    operations = pytest.importorskip("accelerate.utils.operations")
    angles = model.model.rotary_emb(torch.randn(2, 14, 32).bfloat16(), torch.arange(14)[None])
    moved = operations.send_to_device({"position_embeddings": angles}, torch.device("cpu"))["position_embeddings"]
    assert all(torch.equal(x, y) for x, y in zip(moved.tables, angles.tables, strict=True))
    assert moved.tables[0].dtype == torch.float32
    assert all(x.is_meta for x in (*angles.to("meta"), *angles.to("meta").tables))


def test_continuous_batching_raises_value_error(make_hf: Any) -> None:
    model = apply(make_hf(attn_implementation="sdpa"))
    message = r"continuous batching \(generate_batch\).*apply\(model, attention=False\)"
    for start in (lambda: model.generate_batch(inputs=IDS.tolist()), model.init_continuous_batching):
        with pytest.raises(ValueError, match=message):
            start()
    assert apply(model, attention=False).init_continuous_batching() is not None


SELECT = {"attention": "set_attn_implementation", "experts": "set_experts_implementation"}
OPERATION = {"attention": "attention", "experts": "expert_swiglu"}


@pytest.mark.parametrize("name", ["eager", "sdpa", {"": "eager"}])
@pytest.mark.parametrize("part", SELECT)
def test_transformers_selects_implementations(part: str, name: Any, make_hf: Any, calls: set[str]) -> None:
    """Even the one in the config. This package's comes back by its name, or by apply."""
    name = "batched_mm" if part == "experts" and name == "sdpa" else name
    model = apply(make_hf())

    def run(fused: bool) -> Tensor:
        calls.clear()
        logits = model(IDS, attention_mask=LEFT).logits[REAL]
        assert (OPERATION[part] in calls) == fused and {"rms_norm", "rope"} <= calls
        return logits

    want = run(fused=True)
    for target in (model, model.model):
        select = getattr(target, SELECT[part])
        for select_ours in (lambda select=select: select("mixtral_triton"), lambda: apply(model)):
            select(name)
            assert torch.allclose(run(fused=False), want, atol=1e-4)
            select_ours()
            run(fused=True)
    getattr(model, SELECT[part])({"another_config": "eager"})
    run(fused=True)
    with pytest.raises(ValueError, match=r"foo.* is not supported"):
        getattr(model, SELECT[part])("foo")
    run(fused=True)
    getattr(model, SELECT[part])(name)
    stored = f"_{'attn' if part == 'attention' else 'experts'}_implementation"
    assert getattr(revert(model).config, stored) == (name if isinstance(name, str) else "eager")
    for other in (model, apply(model, **{part: False})):
        getattr(other, SELECT[part])("mixtral_triton")  # by transformers' own dispatch
        assert getattr(model.config, stored) == "mixtral_triton" and torch.allclose(
            model(IDS, attention_mask=LEFT).logits[REAL], want, atol=1e-4
        )
        getattr(other, SELECT[part])(name)


def test_generate_keeps_the_experts_on_a_gpu(make_hf: Any, calls: set[str], monkeypatch: Any) -> None:
    """There transformers uses `batched_mm` while decoding, where `grouped_mm` is selected."""
    model = apply(make_hf(experts_implementation="grouped_mm"))
    monkeypatch.setattr(transformers.PreTrainedModel, "device", SimpleNamespace(type="cuda"))
    for experts, name in ((True, "grouped_mm"), (False, "batched_mm")):
        calls.clear()
        with apply(model, experts=experts)._optimize_model_for_decode():
            assert model.config._experts_implementation == name
            model(IDS)
        assert ("expert_swiglu" in calls) == experts


def test_attention_without_the_mask_of_apply(make_hf: Any) -> None:
    """In transformers' own forward of the backbone, None is causal from the first key on, as in torch."""
    model = apply(make_hf(sliding_window=None))
    attend, h = model.model.layers[0].self_attn, torch.randn(2, 5, 32)
    pair = model.model.rotary_emb(h, torch.arange(5)[None])
    cache = transformers.StaticCache(config=model.config, max_cache_len=9)
    got, weights = attend(h, pair, None, cache, output_attentions=True)
    assert torch.allclose(got, attend(h, pair)[0], atol=1e-5)
    assert weights.shape == (2, 4, 5, 9) and not weights[..., 5:].any()
    assert modeling.MixtralModel.forward(model.model, IDS).last_hidden_state.isfinite().all()


def test_positional_arguments_of_the_backbone(make_hf: Any) -> None:
    model = make_hf()
    calls = [(IDS,), (IDS, LEFT), (None, LEFT, None, None, model.model.embed_tokens(IDS))]
    with torch.no_grad():
        want = [model.model(*args)[0][REAL] for args in calls]
        got = [apply(model).model(*args)[0][REAL] for args in calls]
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(got, want, strict=True))
    with pytest.raises(TypeError, match="attention_mask"):
        model.model(IDS, LEFT, attention_mask=LEFT)
    with pytest.raises(ValueError, match="input_ids"):
        model.model()


WRONG_MASKS = [
    *((torch.ones(B, n), rf"attention_mask is of shape \[{B}, {n}\], needs \[2, 14\]") for B, n in ((3, 14), (2, 12))),
    (torch.ones(2, 15), "has 14 keys, needs 15, as its mask says"),
    (torch.ones(2, 1, 14, 9), r"broadcasts to \[2, 4, 14, 14\]"),
]
for _dtype in (torch.int64, torch.int32):
    WRONG_MASKS.append((torch.ones(2, 1, 14, 14, dtype=_dtype), f"attention_mask is {_dtype}"))
    # One of two keys has the size of an interval, one that begins with 0 that of a sequence.
    for _tokens in (1, 2, 3):
        WRONG_MASKS.append((torch.tensor([0, 1], dtype=_dtype).expand(1, 1, _tokens, 2), f"is {_dtype} of shape"))


def test_wrong_mask_raises_value_error(make_hf: Any) -> None:
    model = apply(make_hf())
    for mask, message in WRONG_MASKS:
        with pytest.raises(ValueError, match=message):
            model(IDS[: mask.shape[0], : mask.shape[2]] if len(mask) == 1 else IDS, attention_mask=mask)
    cache = model(IDS, use_cache=True)[1]
    with pytest.raises(ValueError, match=r"shape \[2, 1\], needs \[2, 15\] \(14 past, 1 new\)"):
        model(IDS[:, :1], torch.ones(2, 1), None, cache)


@pytest.mark.slow
def test_compiles_without_a_graph_break(make_hf: Any, parity: Any) -> None:
    model = apply(make_hf())
    calls: list[dict[str, Any]] = [{}, {"attention_mask": LEFT, "use_cache": False}, {"output_attentions": True}]
    settings = {"attention_mask": LEFT, "max_new_tokens": 4, "cache_implementation": "static", "do_sample": False}
    settings |= dict.fromkeys(("output_scores", "return_dict_in_generate"), True)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        for kwargs in calls:
            real = REAL if "attention_mask" in kwargs else torch.ones_like(REAL)
            want, got = model(IDS, **kwargs), compiled(IDS, **kwargs)
            assert torch.allclose(got.logits[real], want.logits[real], atol=1e-4)
            for x, y in zip(got.attentions or (), want.attentions or (), strict=True):
                assert torch.allclose(x, y, atol=1e-5)
        generated = model.generate(IDS, **settings)
        model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
        again = model.generate(IDS, **settings)
    assert torch.equal(again.sequences, generated.sequences)
    assert all(torch.allclose(x, y, atol=1e-4) for x, y in zip(again.scores, generated.scores, strict=True))
    parity("compile: fullgraph, static cache too", "holds")


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
def test_exports_with_dynamic_sizes(masked: bool, make_hf: Any, parity: Any) -> None:
    if masked and torch.__version__ < "2.13":
        pytest.skip("torch before 2.13 fixes the number of tokens where its own attention takes a mask")

    def inputs(ids: Tensor) -> dict[str, Any]:
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        return {"input_ids": ids, "use_cache": False} | ({"attention_mask": mask} if masked else {})

    model = apply(make_hf())
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("tokens", min=4, max=64)}
    dynamic = {name: sizes if isinstance(value, Tensor) else None for name, value in inputs(IDS).items()}
    with torch.no_grad():
        program = torch.export.export(model, (), inputs(IDS), dynamic_shapes=dynamic)
        for ids in (IDS, torch.cat((IDS, IDS[:1]))[:, :9]):
            real = inputs(ids).get("attention_mask", torch.ones_like(ids)).bool()
            got, want = program.module()(**inputs(ids)).logits, model(**inputs(ids)).logits
            assert torch.allclose(got[real], want[real], atol=1e-4)
    assert any("mixtral_triton" in str(node.target) for node in program.graph.nodes)
    parity("export: dynamic sizes, left padding" if masked else "export: dynamic sizes", "holds")


EXPERTS, GATE = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], ["mlp.gate.weight"]


def close(got: Tensor, want: Tensor) -> bool:
    return bool((got - want).abs().max() <= 1e-4 * want.abs().max())


@pytest.mark.parametrize("parameters", [None, EXPERTS, GATE], ids=["attention", "experts", "gate"])
@pytest.mark.parametrize("first", ["apply", "adapter"])
def test_adapters_of_peft(first: str, parameters: Any, make_hf: Any, calls: set[str]) -> None:
    peft = pytest.importorskip("peft")
    hf = make_hf()
    base = hf(IDS).logits
    if first == "apply":
        apply(hf)
    torch.manual_seed(0)
    linears = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = peft.LoraConfig(r=4, target_modules=linears, target_parameters=parameters, init_lora_weights=False)
    model = peft.get_peft_model(hf, config).eval().requires_grad_(False)
    apply(hf)
    calls.clear()
    got = model(IDS).logits
    assert {"attention", "expert_swiglu", "rope"} <= calls
    want = (revert(hf), model(IDS).logits)[1]
    assert close(got, want) and not close(want, base)
    apply(hf)
    merged = model.merge_and_unload()
    assert close(merged(IDS).logits, want)


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_device_map_of_accelerate(place: str, make_hf: Any, tmp_path: Path, calls: set[str], parity: Any) -> None:
    """Hooks bring a layer's weights when it runs; until then they are on the meta device."""
    pytest.importorskip("accelerate")
    hf = make_hf()
    want = hf(IDS).logits
    hf.save_pretrained(tmp_path / "model")
    modules = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
    layers = {f"model.layers.{index}": place if index else "cpu" for index in range(2)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=modules | layers, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    model.eval().requires_grad_(False)
    parameters = {parameter.device.type for parameter in model.model.layers[1].parameters()}
    assert parameters == ({"meta"} if place == "disk" else {"cpu"})
    assert close(apply(model)(IDS).logits, want) and {"attention", "expert_swiglu", "rope", "rms_norm"} <= calls
    texts = [each.generate(IDS[:1], max_new_tokens=4, do_sample=False) for each in (model, hf)]
    assert torch.equal(*texts)
    assert close(revert(model)(IDS).logits, want)
    parity(f"placement: device_map, weights on {place}", "holds")


@pytest.mark.parametrize("name", ["self_attn", "mlp", "input_layernorm"])
def test_lazily_negated_activations(name: str, make_hf: Any) -> None:
    """Unchecked operations read memory as it is, so a module asks where a caller's tensor enters it."""
    model = apply(make_hf())
    layer, x = model.model.layers[0], torch.randn(1, 5, 32)
    call: Any = getattr(layer, name)
    if name == "self_attn":
        tables = model.model.rotary_emb(x, torch.arange(5)[None])
        call = lambda x: layer.self_attn(x, position_embeddings=tables, attention_mask=None)[0]  # noqa: E731
    with torch.no_grad():
        assert torch.equal(call(torch._neg_view(-x)), call(x))
