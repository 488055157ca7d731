"""The parity table: features of transformers' Mixtral, applied and eager, in fp32: equal tokens, values within 1e-4.

`python -m pytest tests/hf` prints it. Several rows restate transformers' own tests of generate and outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import apply, hf, revert
from mixtral_triton.kernels.launch import INTERPRETED

transformers = pytest.importorskip("transformers")
from mixtral_triton.hf.attention import CACHE  # noqa: E402

LIMIT = 1e-4  # of the largest value
T, NEW = (9, 3) if INTERPRETED else (14, 8)
IDS = torch.randint(1, 48, (2, T), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, : T // 2] = 0
RIGHT = LEFT.flip(1)
HOLES = LEFT.clone()
HOLES[0, 4:6] = 0
COUNTED = (LEFT.cumsum(-1) - 1).clamp(min=0)
RESTARTED = torch.tensor([*range(5), *range(T - 5)])[None]
Results = dict[str, Any]


def logits(model: Any, mask: Tensor | None = None, **kwargs: Any) -> Results:
    """Of the real tokens. On padding they mean nothing, but must be finite."""
    ids = {} if "inputs_embeds" in kwargs else {"input_ids": IDS}
    out = model(**ids, attention_mask=mask, **kwargs).logits
    assert out.isfinite().all()
    return {"logits": out if mask is None or mask.dim() != 2 else out[mask.bool()]}


def in_chunks(make_cache: Callable[[Any], Any], mask: Tensor | None) -> Callable[[Any], Results]:
    """The text in chunks through a cache, with a mask that grows."""

    def run(model: Any) -> Results:
        outs, begin, cache = [], 0, make_cache(model)
        for size in CHUNKS:
            end = begin + size
            part = None if mask is None else mask[:, :end]
            out = model(IDS[:, begin:end], attention_mask=part, use_cache=True, **{CACHE: cache}).logits
            outs.append(out if mask is None else out[mask[:, begin:end].bool()])
            begin = end
        return {"logits": torch.cat([out.flatten(0, -2) for out in outs])}

    return run


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def static(model: Any, length: int = 30) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def generated(model: Any, ids: Tensor = IDS, mask: Tensor | None = None, **kwargs: Any) -> Results:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    settings = {"max_new_tokens": NEW, "do_sample": False} | kwargs
    return {"tokens": model.generate(ids, attention_mask=mask, **settings)}


def generate(**settings: Any) -> Callable[[Any], Results]:
    return lambda model: generated(model, **settings)


def causal(model: Any, mask: Tensor | None = None) -> Tensor:
    """bool [B,1,T,T]: what is not later, in the model's window, and valid."""
    i, j, window = torch.arange(T)[:, None], torch.arange(T), model.config.sliding_window
    valid = torch.ones_like(IDS) if mask is None else mask
    return (j <= i) & (j > i - (window or T)) & valid[:, None, None].bool()


def added(visible: Tensor) -> Tensor:
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)


def user_float(model: Any) -> Results:
    visible = causal(model)
    visible[0, 0, 7:, 2] = False
    return logits(model, added(visible))


def packed(model: Any) -> Results:
    """Other bounds in each row, with a sequence of one token; the same bounds in both; one sequence per row."""
    rows = [[range(5), range(T - 5)], [range(3), range(1), range(7, T + 3)]]
    both = torch.tensor([[position for part in row for position in part] for row in rows])
    positions = both, both[:1], torch.arange(T)[None] + 2
    return {str(i): logits(model, position_ids=p, use_cache=False)["logits"] for i, p in enumerate(positions)}


def outputs(model: Any) -> Results:
    labels = IDS.masked_fill(LEFT == 0, -100)
    labels[1, T // 2] = -100  # padding would predict it
    out = model(IDS, attention_mask=LEFT, labels=labels, output_router_logits=True)
    real = LEFT.flatten().bool()
    routed = {f"router {layer}": router[real] for layer, router in enumerate(out.router_logits)}
    assert len(routed) == model.config.num_hidden_layers
    return {"loss": out.loss, "aux loss": out.aux_loss, **routed}


def embedded(model: Any) -> Results:
    embeds = model.get_input_embeddings()(IDS)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=LEFT, max_new_tokens=NEW, do_sample=False)
    return {**logits(model, LEFT, inputs_embeds=embeds), "tokens": tokens}


def conversation(model: Any) -> Results:
    """generate twice on one cache: the second prompt continues the first answer."""
    cache = {CACHE: dynamic(model)}
    first = generated(model, IDS[:1], **cache)["tokens"]
    second = torch.cat((first, IDS[:1, :3]), 1)
    return {"first": first, "second": generated(model, second, **cache)["tokens"]}


def assisted(model: Any, **settings: Any) -> Results:
    torch.manual_seed(0)
    draft = type(model)(copy.deepcopy(model.config))
    draft.load_state_dict(model.state_dict())
    draft.lm_head.weight.data = draft.lm_head.weight + 0.3 * torch.randn_like(draft.lm_head.weight)
    return generated(model, IDS[:1], assistant_model=draft.eval(), **settings)


def flat(outputs: Any, name: str = "") -> Results:
    """The tensors of nested outputs, without caches."""
    if isinstance(outputs, Tensor):
        return {name: outputs}
    items = outputs.items() if isinstance(outputs, dict) else enumerate(outputs or ())
    pairs = [(key, value) for key, value in items if key not in ("cache", "past_key_values")]
    return {key: x for at, value in pairs for key, x in flat(value, f"{name} {at}").items()}


def every_output(model: Any) -> Results:
    """A tuple holds the tensors of the object, in their order."""
    settings = dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), True)
    named, plain = (model(IDS, return_dict=kind, use_cache=False, **settings) for kind in (True, False))
    pairs = zip(flat(named).values(), flat(plain).values(), strict=True)
    assert all(torch.equal(x, y) for x, y in pairs)
    return flat(named)


def generated_outputs(**settings: Any) -> Callable[[Any], Results]:
    """All that generate returns, without padding, where hidden states mean nothing."""
    kinds = ("attentions", "hidden_states", "scores", "logits")
    outputs = {f"output_{kind}": True for kind in kinds} | {"return_dict_in_generate": True}

    def run(model: Any) -> Results:
        found = flat(generated(model, **outputs | settings)["tokens"])
        assert all(any(kind in name for name in found) for kind in kinds)
        return found

    return run


def recorded_outputs(model: Any) -> Results:
    """Whatever the head, the backbone records outputs, and each call records them once."""
    found = {}
    for kind in ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering", "Model"):
        torch.manual_seed(0)
        other = getattr(transformers, f"Mixtral{kind}")(copy.deepcopy(model.config)).eval()
        other = apply(other) if hf.applied(model) else other
        first, second = (other(IDS, output_attentions=True, output_hidden_states=True) for _ in range(2))
        assert len(first.attentions) == len(second.attentions) == model.config.num_hidden_layers
        found |= flat([second.attentions, second.hidden_states], kind)
    return found


def processed(model: Any) -> Results:
    """Processors and criteria of generate; a sequence that has ended is padded."""
    settings = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 2}
    return generated(model, mask=LEFT, bad_words_ids=[[5], [7, 9]], eos_token_id=[*range(10, 24)], **settings)


def resized(model: Any) -> Results:
    found = {}
    for size in (60, 47):
        model.resize_token_embeddings(size, mean_resizing=False)
        with torch.no_grad():
            model.get_input_embeddings().weight[46:] = 0.1
            model.get_output_embeddings().weight[46:] = 0.1
        found[str(size)] = model(IDS.clamp(max=46)).logits
        assert model.config.vocab_size == model.model.config.vocab_size == size == found[str(size)].shape[-1]
    return found


def alone(model: Any) -> Results:
    """A padded row of a batch, and the same text without padding and batch."""
    text = IDS[1:, T // 2 :]
    batch = model(IDS, attention_mask=LEFT).logits[1:, T // 2 :]
    single = model(text).logits
    assert (batch - single).abs().max() <= LIMIT * single.abs().max()
    return {"batch": batch, "single": single}


def cropped(model: Any) -> Results:
    cache = dynamic(model)
    kwargs = {CACHE: cache, "use_cache": True}
    model(IDS, **kwargs)
    cache.crop(-4)
    return {"logits": model(IDS[:, -4:], **kwargs).logits}


def device_map(model: Any) -> Results:
    """accelerate's hooks for a device_map, which keep weights on the CPU until they are needed."""
    accelerate = pytest.importorskip("accelerate")
    applied = hf.applied(model)
    accelerate.cpu_offload(revert(model), execution_device="cpu")
    return logits(apply(model) if applied else model, LEFT)


def attn_output(model: Any, mask: Tensor | None = None, **kwargs: Any) -> Results:
    """Attention's weights of the real tokens, and the logits beside them."""
    out = model(IDS, attention_mask=mask, output_attentions=True, **kwargs)
    real = torch.ones_like(IDS).bool() if mask is None or mask.dim() != 2 else mask.bool()
    weights = {str(i): layer.transpose(1, 2)[real] for i, layer in enumerate(out.attentions)}
    assert len(weights) == model.config.num_hidden_layers
    return {"logits": out.logits[real], **weights}


def attended_steps(model: Any, make_cache: Callable[[Any], Any]) -> Results:
    """Weights over the keys of a cache, a tensor for each chunk."""
    found, begin, cache = {}, 0, make_cache(model)
    for size in CHUNKS:
        end = begin + size
        kwargs = {CACHE: cache, "attention_mask": LEFT[:, :end], "use_cache": True, "output_attentions": True}
        real = LEFT[:, begin:end].bool()
        layers = model(IDS[:, begin:end], **kwargs).attentions
        found |= {f"{begin} {i}": layer.transpose(1, 2)[real] for i, layer in enumerate(layers)}
        begin = end
    return found


def rope(kind: str) -> dict[str, Any]:
    return {"head_dim": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}}


CLASSIFIER = {"kind": "MixtralForSequenceClassification", "num_labels": 3}
NO_WINDOW = {"sliding_window": None}
CHUNKS = [T - 6, 1, 3, 1, 1]
# The feature -> changes of the model's sizes, and what to compare.
TABLE: dict[str, tuple[dict[str, Any], Callable[[Any], Results]]] = {
    "forward: sliding window": ({}, logits),
    "forward: no window": (NO_WINDOW, logits),
    "forward: one token": (NO_WINDOW, lambda m: {"logits": m(IDS[:, :1]).logits}),
    "forward: window of one": ({"sliding_window": 1}, logits),
    "forward: one key/value head": ({"num_key_value_heads": 1}, logits),
    "forward: as many key/value heads": ({"num_key_value_heads": 4}, logits),
    "forward: top 1, tied embeddings": ({"num_experts_per_tok": 1, "tie_word_embeddings": True}, logits),
    "forward: every expert": ({"num_experts_per_tok": 4, "head_dim": 6}, logits),
    "forward: odd sizes": ({"hidden_size": 27, "intermediate_size": 19, "head_dim": 10}, logits),
    "forward: labels, router logits, auxiliary loss": ({}, outputs),
    "forward: logits_to_keep": ({}, lambda m: {"logits": m(IDS, logits_to_keep=3).logits}),
    "forward: every output, as object and tuple": ({}, every_output),
    "forward: outputs of every head": ({}, recorded_outputs),
    "forward: gradients enabled": ({}, torch.enable_grad()(lambda m: {"logits": m(IDS).logits.detach()})),
    "forward: inputs_embeds, and generate": ({}, embedded),
    "forward: a padded row equals its text alone": ({}, alone),
    "forward: resized embeddings": ({}, resized),
    "forward: classification": (CLASSIFIER, lambda m: {"logits": m(IDS, LEFT)[0]}),
    "forward: MixtralModel": ({"kind": "MixtralModel"}, lambda m: {"hidden": m(IDS)[0]}),
    "rope: linear": (rope("linear"), logits),
    "rope: yarn": (rope("yarn"), logits),
    "rope: dynamic, beyond the positions": (rope("dynamic") | {"max_position_embeddings": 8}, logits),
    "mask: left padding": ({}, partial(logits, mask=LEFT)),
    "mask: left padding, no window": (NO_WINDOW, partial(logits, mask=LEFT)),
    "mask: left padding, positions counted": (NO_WINDOW, lambda m: logits(m, LEFT, position_ids=COUNTED)),
    "mask: right padding": ({}, partial(logits, mask=RIGHT)),
    "mask: right padding, no window": (NO_WINDOW, partial(logits, mask=RIGHT)),
    "mask: holes": ({}, partial(logits, mask=HOLES)),
    "mask: one sequence of padding only": (NO_WINDOW, lambda m: logits(m, LEFT * torch.tensor([[1], [0]]))),
    "mask: user's 4-D, added": (NO_WINDOW, user_float),
    "mask: user's 4-D, bool (beside sdpa)": ({"attn_implementation": "sdpa"}, lambda m: logits(m, causal(m))),
    "mask: not causal": ({}, lambda m: logits(m, LEFT, is_causal=False)),
    "mask: packed sequences by position_ids": ({}, packed),
    "mask: packed sequences, no window": (NO_WINDOW, packed),
    "mask: packed sequences, window of one": ({"sliding_window": 1}, packed),
    "mask: positions that start again, with a cache": ({}, lambda m: logits(m, position_ids=RESTARTED)),
    "cache: dynamic, in chunks": (NO_WINDOW, in_chunks(dynamic, None)),
    "cache: dynamic, left padding": (NO_WINDOW, in_chunks(dynamic, LEFT)),
    "cache: dynamic, holes": (NO_WINDOW, in_chunks(dynamic, HOLES)),
    "cache: sliding window, in chunks": ({}, in_chunks(dynamic, None)),
    "cache: sliding window, left padding": ({}, in_chunks(dynamic, LEFT)),
    "cache: static": (NO_WINDOW, in_chunks(static, None)),
    "cache: static, left padding": (NO_WINDOW, in_chunks(static, LEFT)),
    "cache: static, filled to the end": (NO_WINDOW, in_chunks(partial(static, length=T), None)),
    "cache: static sliding window": ({"sliding_window": 20}, in_chunks(static, LEFT)),
    "cache: static sliding window, beyond it": ({}, in_chunks(static, None)),
    "cache: static sliding window, left padding": ({}, in_chunks(static, LEFT)),
    "cache: cut back": (NO_WINDOW, cropped),
    "generate: left padding": ({}, generate(mask=LEFT)),
    "generate: without a cache": ({}, generate(mask=LEFT, use_cache=False)),
    "generate: beams": ({}, generate(mask=LEFT, num_beams=3)),
    "generate: sampling": ({}, generate(mask=LEFT, do_sample=True, top_p=0.9, top_k=20)),
    "generate: static cache": (NO_WINDOW, generate(mask=LEFT, cache_implementation="static")),
    "generate: static cache, window": ({}, generate(mask=LEFT, cache_implementation="static")),
    "generate: every output": ({}, generated_outputs()),
    "generate: every output, beams": ({}, generated_outputs(num_beams=2)),
    "generate: every output, beams, sampled": ({}, generated_outputs(do_sample=True, num_beams=2)),
    "generate: processors, end of sequence": ({}, processed),
    "generate: assisted": (NO_WINDOW, assisted),
    "generate: assisted, sampling": (NO_WINDOW, partial(assisted, do_sample=True)),
    "generate: prompt lookup": (NO_WINDOW, generate(ids=IDS[:1], prompt_lookup_num_tokens=3)),
    "generate: twice on one cache": (NO_WINDOW, conversation),
    "generate: prefill in chunks": (NO_WINDOW, generate(prefill_chunk_size=4)),
    "attention weights: left padding": ({}, partial(attn_output, mask=LEFT)),
    "attention weights: one key/value head": ({"num_key_value_heads": 1}, attn_output),
    "attention weights: holes": ({}, partial(attn_output, mask=HOLES)),
    "attention weights: packed sequences": ({}, lambda m: attn_output(m, position_ids=RESTARTED, use_cache=False)),
    "attention weights: user's 4-D, added": ({}, lambda m: attn_output(m, added(causal(m, HOLES)))),
    "attention weights: dynamic cache": (NO_WINDOW, partial(attended_steps, make_cache=dynamic)),
    "attention weights: sliding window, cached": ({}, partial(attended_steps, make_cache=dynamic)),
    "attention weights: static cache": (NO_WINDOW, partial(attended_steps, make_cache=static)),
    "attention weights: static sliding window": ({}, partial(attended_steps, make_cache=static)),
    "placement: accelerate's hooks, weights offloaded": ({}, device_map),
}
SHORT = ("forward: sliding window", "mask: left padding", "cache: static, left padding", "generate: left padding")


def compare(got: Results, want: Results) -> str:
    """Assert identical tokens and values within the limit -> the text of the row."""
    assert got.keys() == want.keys()
    errors = [0.0]
    for name, expected in want.items():
        if not expected.is_floating_point():
            assert torch.equal(got[name], expected), f"{name}: got {got[name].tolist()}, needs {expected.tolist()}"
            continue
        hidden = expected.isinf()  # scores of tokens that a sampler has ruled out
        assert torch.equal(got[name].isinf(), hidden), name
        errors.append(float((got[name] - expected)[~hidden].abs().max() / expected[~hidden].abs().max()))
        assert errors[-1] <= LIMIT, name
    tokens = any(expected.dtype == torch.int64 for expected in want.values())
    return f"error {max(errors):.0e}" if max(errors) else "tokens identical" if tokens else "identical"


@pytest.mark.exhaustive
@pytest.mark.parametrize("feature", [name for name in TABLE if not INTERPRETED or name in SHORT])
def test_parity(feature: str, make_hf: Any, parity: Any) -> None:
    sizes, run = TABLE[feature]
    with torch.no_grad():
        want, got = run(make_hf(**sizes)), run(apply(make_hf(**sizes)))
    parity(feature, compare(got, want))
