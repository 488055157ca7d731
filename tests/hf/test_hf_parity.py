"""The parity table: each thing that transformers' Mixtral does, with `apply` beside eager, in fp32.

Printed by python -m pytest tests/test_hf.py tests/test_hf_parity.py: values within 1e-4 of the largest, equal tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mixtral_triton import apply, hf, revert
from mixtral_triton.kernels.launch import INTERPRETED

transformers = pytest.importorskip("transformers")

LIMIT = 1e-4  # of the largest value
T, NEW = (9, 3) if INTERPRETED else (14, 8)
IDS = torch.randint(1, 48, (2, T), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, : T // 2] = 0
RIGHT = LEFT.flip(1)
HOLES = LEFT.clone()
HOLES[0, 4:6] = 0
Results = dict[str, Any]


def cache_name(model: Any) -> str:
    """`cache` since 5.24, `past_key_values` before."""
    names = inspect.signature(type(model.base_model).forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def logits(model: Any, mask: Tensor | None = None, **kwargs: Any) -> Results:
    """Of the real tokens: what stands on padding means nothing, but has to be finite."""
    ids = {} if "inputs_embeds" in kwargs else {"input_ids": IDS}
    out = model(**ids, attention_mask=mask, **kwargs).logits
    assert out.isfinite().all()
    return {"logits": out if mask is None or mask.dim() != 2 else out[mask.bool()]}


def stepwise(model: Any, cache: Any, mask: Tensor | None, chunks: list[int]) -> Results:
    """The text in chunks through a cache, the mask growing with it."""
    outs, begin = [], 0
    for size in chunks:
        end = begin + size
        part = None if mask is None else mask[:, :end]
        kwargs = {cache_name(model): cache, "attention_mask": part, "use_cache": True}
        out = model(IDS[:, begin:end], **kwargs).logits
        outs.append(out if mask is None else out[mask[:, begin:end].bool()])
        begin = end
    return {"logits": torch.cat([out.flatten(0, -2) for out in outs])}


def dynamic(model: Any) -> Any:
    return transformers.DynamicCache(config=model.config)


def static(model: Any, length: int = 30) -> Any:
    return transformers.StaticCache(config=model.config, max_cache_len=length)


def generated(model: Any, ids: Tensor = IDS, mask: Tensor | None = None, **kwargs: Any) -> Results:
    torch.manual_seed(0)
    mask = torch.ones_like(ids) if mask is None else mask
    return {"tokens": model.generate(ids, attention_mask=mask, max_new_tokens=NEW, **kwargs)}


def dense(mask: Tensor, window: int | None) -> Tensor:
    """bool [B,1,T,T]: causal, in the window, where the key is there."""
    i, j = torch.arange(T)[:, None], torch.arange(T)
    seen = (j <= i) & (j > i - (window or T))
    return seen & mask[:, None, None].bool()


def user_bool(model: Any) -> Results:
    return logits(model, dense(torch.ones_like(IDS), model.config.sliding_window))


def user_float(model: Any) -> Results:
    seen = dense(torch.ones_like(IDS), None)
    seen[0, 0, 7:, 2] = False
    return logits(model, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min))


def packed(model: Any) -> Results:
    """Other borders in each row, one of them a sequence of one token; and the same borders in both."""
    rows = [[range(5), range(T - 5)], [range(3), range(1), range(7, T + 3)]]
    own = torch.tensor([[position for part in row for position in part] for row in rows])
    got = {str(i): logits(model, position_ids=p, use_cache=False)["logits"] for i, p in enumerate((own, own[:1]))}
    return {**got, "a row each": logits(model, position_ids=torch.arange(T)[None] + 2, use_cache=False)["logits"]}


def outputs(model: Any) -> Results:
    labels = IDS.masked_fill(LEFT == 0, -100)
    labels[1, T // 2] = -100  # padding would have to predict it
    out = model(IDS, attention_mask=LEFT, labels=labels, output_router_logits=True)
    real = LEFT.flatten().bool()
    routed = {f"router {layer}": router[real] for layer, router in enumerate(out.router_logits)}
    assert len(routed) == model.config.num_hidden_layers
    return {"loss": out.loss, "aux loss": out.aux_loss, **routed}


def hidden_states(model: Any) -> Results:
    out = model(IDS, output_hidden_states=True, logits_to_keep=3)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1 and out.logits.shape[1] == 3
    return {"logits": out.logits, **{str(i): hidden for i, hidden in enumerate(out.hidden_states)}}


def embedded(model: Any) -> Results:
    embeds = model.get_input_embeddings()(IDS)
    tokens = model.generate(inputs_embeds=embeds, attention_mask=LEFT, max_new_tokens=NEW, do_sample=False)
    return {**logits(model, LEFT, inputs_embeds=embeds), "tokens": tokens}


def conversation(model: Any) -> Results:
    """generate twice on one cache: the second prompt continues the first answer."""
    kept = dynamic(model)
    name = cache_name(model)
    first = generated(model, IDS[:1], do_sample=False, **{name: kept})["tokens"]
    second = torch.cat((first, IDS[:1, :3]), 1)
    return {"first": first, "second": generated(model, second, do_sample=False, **{name: kept})["tokens"]}


def assisted(model: Any) -> Results:
    draft = type(model)(model.config)
    draft.load_state_dict(model.state_dict())
    draft.lm_head.weight.data = draft.lm_head.weight + 0.3 * torch.randn_like(draft.lm_head.weight)
    return generated(model, IDS[:1], do_sample=False, assistant_model=draft.eval())


def returned(model: Any) -> Results:
    """All that generate can hand back beside the tokens."""
    wanted = dict.fromkeys(("output_scores", "output_logits", "output_hidden_states"), True)
    torch.manual_seed(0)
    out = model.generate(
        IDS, attention_mask=LEFT, max_new_tokens=NEW, do_sample=False, return_dict_in_generate=True, **wanted
    )
    last = [step[-1][:, -1] for step in out.hidden_states]
    return {"tokens": out.sequences, "scores": torch.stack(out.scores), "hidden": torch.stack(last)}


def processed(model: Any) -> Results:
    """Processors and criteria of generate; the second sequence is padded once it has ended."""
    settings = {
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 2,
        "min_new_tokens": 2,
        "bad_words_ids": [[5], [7, 9]],
    }
    return generated(model, mask=LEFT, do_sample=False, eos_token_id=list(range(10, 24)), **settings)


def resized(model: Any) -> Results:
    model.resize_token_embeddings(60, mean_resizing=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[48:] = 0.1
        model.get_output_embeddings().weight[48:] = 0.1
    return logits(model)


def alone(model: Any) -> Results:
    """A padded row of a batch, and the same text without padding and batch."""
    text = IDS[1:, T // 2 :]
    batch = model(IDS, attention_mask=LEFT).logits[1:, T // 2 :]
    single = model(text).logits
    assert (batch - single).abs().max() <= LIMIT * single.abs().max()
    return {"batch": batch, "single": single}


def cropped(model: Any) -> Results:
    kept = dynamic(model)
    kwargs = {cache_name(model): kept, "use_cache": True}
    model(IDS, **kwargs)
    kept.crop(-4)
    return {"logits": model(IDS[:, -4:], **kwargs).logits}


def as_tuple(model: Any) -> Results:
    return {"logits": model(IDS, return_dict=False, use_cache=False)[0]}


def gradients_enabled(model: Any) -> Results:
    with torch.enable_grad():
        return {"logits": model(IDS).logits.detach()}


def device_map(model: Any) -> Results:
    """Hooks as accelerate puts them for a device_map, weights of the second half on the CPU until they are needed."""
    accelerate = pytest.importorskip("accelerate")
    ours = hf.applied(model)
    accelerate.cpu_offload(revert(model), execution_device="cpu")
    return logits(apply(model) if ours else model, LEFT)


def attended(model: Any, mask: Tensor | None = None, **kwargs: Any) -> Results:
    """Attention's weights of the real tokens, and the logits beside them."""
    out = model(IDS, attention_mask=mask, output_attentions=True, **kwargs)
    real = torch.ones_like(IDS).bool() if mask is None or mask.dim() != 2 else mask.bool()
    weights = {str(i): layer.transpose(1, 2)[real] for i, layer in enumerate(out.attentions)}
    assert len(weights) == model.config.num_hidden_layers
    return {"logits": out.logits[real], **weights}


def attended_user(model: Any) -> Results:
    seen = dense(HOLES, model.config.sliding_window)
    return attended(model, torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min))


def attended_steps(model: Any, cache: Any, mask: Tensor) -> Results:
    """Weights over the keys that a cache holds: of each chunk a tensor."""
    found, begin = {}, 0
    for size in CHUNKS:
        end = begin + size
        kwargs = {cache_name(model): cache, "attention_mask": mask[:, :end], "use_cache": True}
        weights = model(IDS[:, begin:end], output_attentions=True, **kwargs).attentions
        real = mask[:, begin:end].bool()
        found |= {f"{begin} {i}": layer.transpose(1, 2)[real] for i, layer in enumerate(weights)}
        begin = end
    return found


def attended_generate(model: Any) -> Results:
    settings = {"do_sample": False, "output_attentions": True, "return_dict_in_generate": True}
    out = model.generate(IDS, attention_mask=LEFT, max_new_tokens=NEW, **settings)
    rows = [layer[..., -1, :].flatten() for step in out.attentions for layer in step]
    return {"tokens": out.sequences, "weights": torch.cat(rows)}


def alone_layer(model: Any) -> Results:
    """cos and sin as the rotary module answers, and a layer that is called with an ordinary pair of them."""
    h = torch.randn(2, T, 32, generator=torch.Generator().manual_seed(2))
    cos, sin = model.model.rotary_emb(h, torch.arange(T)[None])
    hidden = torch.zeros((1, 1, T, T)).masked_fill(~dense(torch.ones(1, T), 6), torch.finfo(torch.float32).min)
    return {"cos": cos, "sin": sin, "layer": model.model.layers[0](h, (cos, sin), hidden)}


def edited(model: Any) -> Results:
    """The config edited as it stands, and what it says saved and loaded."""
    model.config.output_router_logits = True
    model.config.use_cache = False
    out = model(IDS)
    assert out.router_logits is not None and len(out) == 3
    return {"logits": out.logits, "aux loss": out.aux_loss}


def rope(kind: str) -> dict[str, Any]:
    return {"head_dim": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}}


NO_WINDOW = {"sliding_window": None}
CHUNKS = [T - 6, 1, 3, 1, 1]
# The feature -> the model's sizes beyond the usual ones, and what it gives.
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
    "forward: hidden states, logits_to_keep": ({}, hidden_states),
    "forward: tuple instead of an object": ({}, as_tuple),
    "forward: gradients enabled": ({}, gradients_enabled),
    "forward: inputs_embeds, and generate": ({}, embedded),
    "forward: a padded row equals its text alone": ({}, alone),
    "forward: resized embeddings": ({}, resized),
    "forward: sequence classification": (
        {"kind": "MixtralForSequenceClassification", "num_labels": 3},
        lambda m: {"logits": m(IDS, attention_mask=LEFT).logits},
    ),
    "forward: MixtralModel": ({"kind": "MixtralModel"}, lambda m: {"hidden": m(IDS).last_hidden_state}),
    "rope: linear": (rope("linear"), logits),
    "rope: yarn": (rope("yarn"), logits),
    "rope: dynamic, beyond the positions": (rope("dynamic") | {"max_position_embeddings": 8}, logits),
    "mask: left padding": ({}, lambda m: logits(m, LEFT)),
    "mask: left padding, no window": (NO_WINDOW, lambda m: logits(m, LEFT)),
    "mask: left padding, positions counted": (
        NO_WINDOW,
        lambda m: logits(m, LEFT, position_ids=(LEFT.cumsum(-1) - 1).clamp(min=0)),
    ),
    "mask: right padding": ({}, lambda m: logits(m, RIGHT)),
    "mask: right padding, no window": (NO_WINDOW, lambda m: logits(m, RIGHT)),
    "mask: holes": ({}, lambda m: logits(m, HOLES)),
    "mask: one sequence of padding only": (NO_WINDOW, lambda m: logits(m, LEFT * torch.tensor([[1], [0]]))),
    "mask: user's 4-D, added": (NO_WINDOW, user_float),
    "mask: user's 4-D, bool (beside sdpa)": ({"attn_implementation": "sdpa"}, user_bool),
    "mask: packed sequences by position_ids": ({}, packed),
    "mask: packed sequences, no window": (NO_WINDOW, packed),
    "mask: packed sequences, window of one": ({"sliding_window": 1}, packed),
    "mask: positions that start again, with a cache": (
        {},
        lambda m: logits(m, position_ids=torch.tensor([*range(5), *range(T - 5)])[None]),
    ),
    "cache: dynamic, in chunks": (NO_WINDOW, lambda m: stepwise(m, dynamic(m), None, CHUNKS)),
    "cache: dynamic, left padding": (NO_WINDOW, lambda m: stepwise(m, dynamic(m), LEFT, CHUNKS)),
    "cache: dynamic, holes": (NO_WINDOW, lambda m: stepwise(m, dynamic(m), HOLES, CHUNKS)),
    "cache: sliding window, in chunks": ({}, lambda m: stepwise(m, dynamic(m), None, CHUNKS)),
    "cache: sliding window, left padding": ({}, lambda m: stepwise(m, dynamic(m), LEFT, CHUNKS)),
    "cache: static": (NO_WINDOW, lambda m: stepwise(m, static(m), None, CHUNKS)),
    "cache: static, left padding": (NO_WINDOW, lambda m: stepwise(m, static(m), LEFT, CHUNKS)),
    "cache: static, filled to the end": (NO_WINDOW, lambda m: stepwise(m, static(m, T), None, CHUNKS)),
    "cache: static sliding window": ({"sliding_window": 20}, lambda m: stepwise(m, static(m), LEFT, CHUNKS)),
    "cache: static sliding window, beyond it": ({}, lambda m: stepwise(m, static(m), None, CHUNKS)),
    "cache: static sliding window, left padding": ({}, lambda m: stepwise(m, static(m), LEFT, CHUNKS)),
    "cache: cut back": (NO_WINDOW, cropped),
    "generate: greedy": ({}, lambda m: generated(m, do_sample=False)),
    "generate: greedy, left padding": ({}, lambda m: generated(m, mask=LEFT, do_sample=False)),
    "generate: without a cache": ({}, lambda m: generated(m, mask=LEFT, do_sample=False, use_cache=False)),
    "generate: beams": ({}, lambda m: generated(m, mask=LEFT, do_sample=False, num_beams=3)),
    "generate: beams, several returned": (
        NO_WINDOW,
        lambda m: generated(m, mask=LEFT, do_sample=False, num_beams=3, num_return_sequences=2, length_penalty=0.7),
    ),
    "generate: sampling": ({}, lambda m: generated(m, mask=LEFT, do_sample=True, top_p=0.9, top_k=20)),
    "generate: beams, sampled": ({}, lambda m: generated(m, mask=LEFT, do_sample=True, num_beams=2)),
    "generate: static cache": (
        NO_WINDOW,
        lambda m: generated(m, mask=LEFT, do_sample=False, cache_implementation="static"),
    ),
    "generate: static cache, window": (
        {},
        lambda m: generated(m, mask=LEFT, do_sample=False, cache_implementation="static"),
    ),
    "generate: scores, logits and hidden states": ({}, returned),
    "generate: processors, end of sequence": ({}, processed),
    "generate: assisted": (NO_WINDOW, assisted),
    "generate: prompt lookup": (
        NO_WINDOW,
        lambda m: generated(m, IDS[:1], do_sample=False, prompt_lookup_num_tokens=3),
    ),
    "generate: twice on one cache": (NO_WINDOW, conversation),
    "generate: prefill in chunks": (NO_WINDOW, lambda m: generated(m, do_sample=False, prefill_chunk_size=4)),
    "attention weights: left padding": ({}, lambda m: attended(m, LEFT)),
    "attention weights: left padding, no window": (NO_WINDOW, lambda m: attended(m, LEFT)),
    "attention weights: one key/value head": ({"num_key_value_heads": 1}, attended),
    "attention weights: holes": ({}, lambda m: attended(m, HOLES)),
    "attention weights: packed sequences": (
        {},
        lambda m: attended(m, position_ids=torch.tensor([*range(5), *range(T - 5)])[None], use_cache=False),
    ),
    "attention weights: user's 4-D, added": ({}, attended_user),
    "attention weights: dynamic cache": (NO_WINDOW, lambda m: attended_steps(m, dynamic(m), LEFT)),
    "attention weights: sliding window, cached": ({}, lambda m: attended_steps(m, dynamic(m), LEFT)),
    "attention weights: static cache": (NO_WINDOW, lambda m: attended_steps(m, static(m), LEFT)),
    "attention weights: static sliding window": ({}, lambda m: attended_steps(m, static(m), LEFT)),
    "attention weights: generate": (NO_WINDOW, attended_generate),
    "rope: cos and sin for others, a layer alone": ({}, alone_layer),
    "config: edited after apply": ({}, edited),
    "placement: accelerate's hooks, weights offloaded": ({}, device_map),
}
SHORT = (
    "forward: sliding window",
    "mask: left padding",
    "cache: static, left padding",
    "generate: greedy, left padding",
)


def compare(got: Results, want: Results) -> str:
    """Tokens identical, values within the limit -> what to print about it."""
    assert got.keys() == want.keys()
    errors = [0.0]
    for name, expected in want.items():
        if expected.dtype == torch.int64:
            assert torch.equal(got[name], expected), f"{name}: {got[name].tolist()} instead of {expected.tolist()}"
        else:
            errors.append(float((got[name] - expected).abs().max() / expected.abs().max()))
            assert errors[-1] <= LIMIT, name
    tokens = any(expected.dtype == torch.int64 for expected in want.values())
    return f"error {max(errors):.0e}" if max(errors) else "tokens identical" if tokens else "identical"


@pytest.mark.parametrize("feature", [name for name in TABLE if not INTERPRETED or name in SHORT])
def test_parity(feature: str, make_hf: Any, parity: Any) -> None:
    sizes, run = TABLE[feature]
    with torch.no_grad():
        want = run(make_hf(**sizes))
        got = run(apply(make_hf(**sizes)))
    parity(feature, compare(got, want))
