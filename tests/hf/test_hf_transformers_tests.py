"""What transformers' own tests of Mixtral ask for, restated: those that an applied model once failed, by their names.

Each gives what a model answers, and is run on an applied model and on one that is not. Training stays refused.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import apply, hf
from mixtral_triton.kernels.launch import INTERPRETED

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.skipif(INTERPRETED, reason="about modules, not kernels: run once, without the interpreter")
IDS = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, :4] = 0
EVERYTHING = dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), True)
LISTED = dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), True)


def flat(outputs: Any) -> list[Any]:
    """Every tensor in nested outputs; what is none (a shape, a name) as it is."""
    if isinstance(outputs, dict):
        return [x for key in outputs if key not in ("cache", "past_key_values") for x in (key, *flat(outputs[key]))]
    return [x for part in outputs for x in flat(part)] if isinstance(outputs, (tuple, list)) else [outputs]


def attention_outputs(model: Any) -> Any:
    """By argument and by config, alone and after hidden states; one a layer, a head's queries over its keys."""
    alone = model(IDS, output_attentions=True)
    both = model(IDS, output_attentions=True, output_hidden_states=True)
    model.config.output_attentions = True
    by_config = model(IDS)
    model.config.output_attentions = False
    assert alone.attentions[0].shape == (3, 4, 9, 9) and len(both.hidden_states) == len(both.attentions) + 1
    return [alone, both, by_config, len(model(IDS))]


def outputs_equivalence(model: Any) -> Any:
    """A tuple holds what an object holds, in its order."""
    named, plain = (model(IDS, return_dict=how, use_cache=False, **EVERYTHING) for how in (True, False))
    assert all(torch.equal(x, y) for x, y in zip(flat(named.to_tuple()), flat(plain), strict=True))
    return named


def generated(**settings: Any) -> Callable[[Any], Any]:
    """Everything that generate hands back, step by step. Without padding: what stands on that means nothing."""

    def run(model: Any) -> Any:
        torch.manual_seed(0)
        wanted = {"max_new_tokens": 4, "return_dict_in_generate": True, "attention_mask": torch.ones_like(IDS)}
        outputs = model.generate(IDS, **(wanted | LISTED | settings))
        assert len(outputs.attentions[0]) == model.config.num_hidden_layers
        return outputs

    return run


def compiled_generate(model: Any) -> Any:
    """A compiled forward on a static cache gives all that the plain one gives."""
    run = generated(cache_implementation="static", do_sample=False, max_new_tokens=3)
    plain = run(model)
    if hf.applied(model):
        model.forward = torch.compile(model.forward, backend="aot_eager")
        assert all(same(x, y) for x, y in zip(flat(run(model)), flat(plain), strict=True))
    return plain


def assisted(do_sample: bool, same: bool) -> Callable[[Any], Any]:
    def run(model: Any) -> Any:
        draft = model
        if not same:
            draft = type(model)(copy.deepcopy(model.config)).eval()
            draft.load_state_dict(model.state_dict())
            draft.lm_head.weight.data = draft.lm_head.weight.flip(0)
        draft.generation_config.num_assistant_tokens = 2
        torch.manual_seed(0)
        settings = {"max_new_tokens": 4, "do_sample": do_sample, "return_dict_in_generate": True, **LISTED}
        return model.generate(IDS[:1], assistant_model=draft, **settings).sequences

    return run


def attention_set_dynamically(model: Any) -> Any:
    """Every config of the model follows, a name that is none is refused and changes nothing."""
    assert {part.config._attn_implementation for part in (model, model.model)} == {"eager"}
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match='`attn_implementation="foo"` is not supported'):
        model.set_attn_implementation("foo")
    assert {part.config._attn_implementation for part in (model, model.model)} == {"sdpa"}
    return model(IDS, attention_mask=LEFT).logits[LEFT.bool()]


def implementation_of_a_loaded_model(model: Any) -> Any:
    """sdpa unless eager is asked for, whatever the model that was saved ran on."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for asked in ({}, {"attn_implementation": "eager"}, {"config": model.config}):
            loaded = type(model).from_pretrained(folder, **asked).eval()
            assert not hf.applied(loaded)
            found += [loaded.config._attn_implementation, loaded(IDS).logits]
    return found


def experts_implementations(model: Any) -> Any:
    found = [model(IDS, attention_mask=LEFT).logits[LEFT.bool()]]
    for name in ("eager", "batched_mm", "eager"):
        model.set_experts_implementation(name)
        found.append(model(IDS, attention_mask=LEFT).logits[LEFT.bool()])
    return found


def attentions_left_padded(model: Any) -> Any:
    out = model(IDS, attention_mask=LEFT, output_attentions=True)
    return [out.logits[LEFT.bool()], [layer.transpose(1, 2)[LEFT.bool()] for layer in out.attentions]]


def buffers_on_meta(model: Any) -> Any:
    """Built on the meta device and emptied, a model finds its buffers again."""
    with torch.device("meta"):
        other = type(model)(model.config)
    other = apply(other) if hf.applied(model) else other
    other.to_empty(device="cpu")
    other.model.rotary_emb.inv_freq.fill_(7.0)
    other.init_weights()
    return [[name, buffer] for name, buffer in other.named_buffers()]


def rope_frequencies(model: Any) -> Any:
    """cos and sin of a short, a long and a short text, as dynamic scaling has them."""
    parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 10.0}
    sizes = model.config.to_dict() | {"rope_parameters": parameters, "max_position_embeddings": 16, "head_dim": 8}
    other = type(model)(type(model.config).from_dict(sizes)).eval()
    rotary = (apply(other) if hf.applied(model) else other).model.rotary_emb
    x = torch.randn(1)
    short, long = torch.arange(10)[None], torch.arange(24)[None]
    found = [rotary(x, positions) for positions in (short, long, short)]
    for cos, sin in found:
        assert cos.dtype == sin.dtype == x.dtype and cos.shape[:2] in ((1, 10), (1, 24))
    assert not torch.equal(found[0][1], found[1][1][:, :10])
    return [[cos, sin] for cos, sin in found]


def save_and_load(model: Any) -> Any:
    """A model that is loaded where one was applied, and applied itself, answers the same."""
    first = model(IDS).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        second = type(model).from_pretrained(folder, attn_implementation="eager").eval()
    second = apply(second) if hf.applied(model) else second
    assert torch.allclose(second(IDS).logits, first, atol=1e-5)
    return first


def resized(model: Any) -> Any:
    """More rows and fewer, in the config too; the embedding that is there stays."""
    weight: Tensor = model.get_input_embeddings().weight.clone()
    for size in (58, 33):
        model.resize_token_embeddings(size, mean_resizing=False)
        kept = min(size, 48)
        assert (
            model.config.vocab_size
            == model.model.config.vocab_size
            == size
            == model(IDS.clamp(max=32)).logits.shape[-1]
        )
        assert torch.equal(model.get_input_embeddings().weight[:kept], weight[:kept])
    return model(IDS.clamp(max=32)).logits


def recorded_once(model: Any) -> Any:
    """Outputs are recorded by the backbone alone, whatever the head, and asked for twice they come once."""
    kinds = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model")
    found = []
    for kind in kinds:
        torch.manual_seed(0)
        other = getattr(transformers, f"Mixtral{kind}")(copy.deepcopy(model.config)).eval()
        other = apply(other) if hf.applied(model) else other
        outputs = [other(IDS, output_attentions=True, output_hidden_states=True) for _ in range(2)]
        assert [len(out.attentions) for out in outputs] == [2, 2]
        found.append([outputs[1].attentions, outputs[1].hidden_states])
    return found


RESTATED: dict[str, Callable[[Any], Any]] = {
    "test_attention_outputs": attention_outputs,
    "test_model_outputs_equivalence": outputs_equivalence,
    "test_greedy_generate_dict_outputs": generated(do_sample=False, use_cache=False),
    "test_greedy_generate_dict_outputs_use_cache": generated(do_sample=False),
    "test_sample_generate_dict_output": generated(do_sample=True, top_k=10),
    "test_beam_search_generate_dict_output": generated(do_sample=False, num_beams=2, use_cache=False),
    "test_beam_search_generate_dict_outputs_use_cache": generated(do_sample=False, num_beams=2),
    "test_beam_sample_generate_dict_output": generated(do_sample=True, num_beams=2),
    "test_generate_compilation_all_outputs": compiled_generate,
    "test_assisted_decoding_matches_greedy_search_0_random": assisted(do_sample=False, same=False),
    "test_assisted_decoding_matches_greedy_search_1_same": assisted(do_sample=False, same=True),
    "test_assisted_decoding_sample": assisted(do_sample=True, same=False),
    "test_can_set_attention_dynamically": attention_set_dynamically,
    "test_sdpa_can_dispatch_non_composite_models": implementation_of_a_loaded_model,
    "test_eager_matches_batched_and_grouped_inference": experts_implementations,
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": attentions_left_padded,
    "test_init_weights_can_init_buffers": buffers_on_meta,
    "test_model_rope_scaling_frequencies": rope_frequencies,
    "test_save_load": save_and_load,
    "test_resize_tokens_embeddings": resized,
    "test_capture_outputs_decorator": recorded_once,
}


def same(got: Any, want: Any) -> bool:
    if not isinstance(want, Tensor):
        return bool(got == want)
    if not want.is_floating_point():
        return torch.equal(got, want)
    hidden = want.isinf()  # scores of tokens that a sampler has ruled out
    limit = 1e-4 * want[~hidden].abs().max()
    return torch.equal(got.isinf(), hidden) and bool(((got - want)[~hidden].abs() <= limit).all())


@pytest.mark.parametrize("test", RESTATED)
def test_as_transformers_tests_it(test: str, make_hf: Any, parity: Any) -> None:
    settings: dict[str, Any] = {"sliding_window": None} if "assisted" in test else {}
    settings |= {"num_hidden_layers": 1} if "compilation" in test else {}
    with torch.no_grad():
        want, got = (flat(RESTATED[test](model)) for model in (make_hf(**settings), apply(make_hf(**settings))))
    assert len(got) == len(want) and all(same(x, y) for x, y in zip(got, want, strict=True))
    parity(f"theirs: {test.removeprefix('test_')}", "holds")


def step(model: Any, **inputs: Any) -> None:
    model.train()(IDS, **inputs).loss.backward()


def retained(model: Any) -> None:
    outputs = model.train()(IDS, output_hidden_states=True, output_attentions=True)
    outputs.hidden_states[0].retain_grad()
    outputs[0].flatten()[0].backward()


def checkpointed(settings: dict[str, Any] | None = None) -> Callable[[Any], None]:
    def run(model: Any) -> None:
        old_name = model.gradient_checkpointing_enable  # which later releases warn of
        getattr(model, "activation_checkpointing_enable", old_name)(settings)
        step(model, labels=IDS)

    return run


def with_gradients_of_the_input(model: Any) -> None:
    model.enable_input_require_grads()
    checkpointed()(model)


TRAINING: dict[str, tuple[str, Callable[[Any], None]]] = {
    "test_training": ("MixtralForCausalLM", lambda m: step(m, labels=IDS)),
    "test_training_overfit": ("MixtralForCausalLM", lambda m: step(m.eval(), labels=IDS)),
    "test_training_gradient_checkpointing": ("MixtralForTokenClassification", checkpointed()),
    "test_training_gradient_checkpointing_use_reentrant_false": (
        "MixtralForCausalLM",
        checkpointed({"use_reentrant": False}),
    ),
    "test_training_gradient_checkpointing_use_reentrant_true": (
        "MixtralForCausalLM",
        checkpointed({"use_reentrant": True}),
    ),
    "test_enable_input_require_grads_with_gradient_checkpointing": ("MixtralForCausalLM", with_gradients_of_the_input),
    "test_retain_grad_hidden_states_attentions": ("MixtralForCausalLM", retained),
    "test_problem_types": ("MixtralForSequenceClassification", lambda m: step(m, labels=torch.tensor([0, 1, 1]))),
    "backward in evaluation mode": ("MixtralForCausalLM", lambda m: m.eval()(IDS, labels=IDS).loss.backward()),
}


@pytest.mark.parametrize("test", TRAINING)
def test_training_is_refused_by_name(test: str, make_hf: Any) -> None:
    kind, train = TRAINING[test]
    with pytest.raises(ValueError, match="inference only"):
        train(apply(make_hf(kind)))
