"""An applied model as transformers and users call it: implementations, compilers; PEFT's adapters, and accelerate's
layers on the CPU and on disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import apply, revert
from mixtral_triton.hf import replaced
from tests.hf.test_apply import IDS, LEFT

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.compiled
REAL = LEFT.bool()


@pytest.mark.parametrize("batch", [1, 2])
def test_rotary_tables_are_made_once_a_forward(batch: int, make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the first layer, for its cos and sin: a hook or accelerate may make others, or another sin."""
    count = list[int]()
    half = replaced.half_columns
    monkeypatch.setattr(replaced, "half_columns", lambda *args: (count.append(1), half(*args))[1])
    model = apply(make_hf(num_hidden_layers=3))
    for _ in range(2):
        count.clear()
        model(IDS[:batch])
        assert len(count) == 2
    found = []
    for fused in (False, True):
        model = apply(make_hf()) if fused else make_hf()
        model.model.rotary_emb.register_forward_hook(lambda module, args, out: (out[0], out[1] * 0.5))
        model.model.layers[1].register_forward_pre_hook(
            lambda m, args, kw: (
                args,
                kw | {"position_embeddings": (kw["position_embeddings"][0], torch.ones(1, 14, 8))},
            ),
            with_kwargs=True,
        )
        found.append(model(IDS).logits)
    assert close(found[1], found[0])


def test_continuous_batching_raises_value_error(make_hf: Any) -> None:
    model = apply(make_hf(attn_implementation="sdpa"))
    with pytest.raises(ValueError, match=r"mixtral_triton.* is not supported"):  # in the words of each release
        model.init_continuous_batching()
    assert apply(model, attention=False).init_continuous_batching() is not None


SELECT = {"attention": "set_attn_implementation", "experts": "set_experts_implementation"}
OPERATION = {"attention": "attention", "experts": "expert_swiglu"}


@pytest.mark.parametrize("name", ["eager", {"": "eager"}])
@pytest.mark.parametrize("part", SELECT)
def test_transformers_selects_implementations(part: str, name: Any, make_hf: Any, calls: set[str]) -> None:
    """This package's comes back by its name, or by apply, and what was selected before apply by revert."""
    model = apply(make_hf(attn_implementation="sdpa", experts_implementation="batched_mm"))

    def run(fused: bool) -> Tensor:
        calls.clear()
        logits = model(IDS, attention_mask=LEFT).logits[REAL]
        assert (OPERATION[part] in calls) == fused and {"rms_norm", "rope"} <= calls
        return logits

    want = run(fused=True)
    select = getattr(model, SELECT[part])
    for select_ours in (lambda: select("mixtral_triton"), lambda: apply(model)):
        select(name)
        assert torch.allclose(run(fused=False), want, atol=1e-4)
        select_ours()
        run(fused=True)
    select({"another_config": "eager"})
    run(fused=True)
    with pytest.raises(ValueError, match=r"foo.* is not supported"):
        select("foo")
    select(name)
    revert(model)
    assert (model.config._attn_implementation, model.config._experts_implementation) == ("sdpa", "batched_mm")


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
