"""The parity table: features of transformers' Mixtral, applied and eager, in fp32: equal tokens, values within 1e-4.
And what a user passes or replaces after `apply`: honoured as transformers does, or refused by name.

`python -m pytest tests/hf` prints the table.
"""

from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mixtral_triton import apply
from mixtral_triton.kernels.launching.launch import INTERPRETED

transformers = pytest.importorskip("transformers")
from mixtral_triton.hf.masks import CACHE  # noqa: E402

LIMIT = 1e-4  # of the largest value
T, NEW = (9, 3) if INTERPRETED else (14, 8)
IDS = torch.randint(1, 48, (2, T), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones_like(IDS)
LEFT[1, : T // 2] = 0
RIGHT = (torch.arange(T) < T - 4)[None].long()  # of one text; every token sees one of its keys
HOLES = LEFT.clone()
HOLES[0, 4:6] = 0
COUNTED = (LEFT.cumsum(-1) - 1).clamp(min=0)
RESTARTED = torch.tensor([*range(5), *range(T - 5)])[None]
Results = dict[str, Any]


def logits(model: Any, mask: Tensor | None = None, **kwargs: Any) -> Results:
    """Logits, and attention weights if asked for, of the real tokens; on padding they are finite, and mean nothing."""
    ids = {} if "inputs_embeds" in kwargs else {"input_ids": IDS}
    out = model(**ids, attention_mask=mask, **kwargs)
    assert out.logits.isfinite().all()
    real = torch.ones_like(IDS).bool() if mask is None or mask.dim() != 2 else mask.bool()
    weights = {str(index): layer.transpose(1, 2)[real] for index, layer in enumerate(out.attentions or ())}
    assert len(weights) == (model.config.num_hidden_layers if kwargs.get("output_attentions") else 0)
    return {"logits": out.logits[real], **weights}


attn_output = partial(logits, output_attentions=True)


def in_chunks(make_cache: Callable[[Any], Any], mask: Tensor | None, weights: bool = False) -> Callable[[Any], Results]:
    """The text in chunks through a cache, with a mask that grows; attention's weights or the logits of each chunk."""

    def run(model: Any) -> Results:
        found, begin, cache = {}, 0, make_cache(model)
        for end in accumulate(CHUNKS):
            part = None if mask is None else mask[:, :end]
            kwargs = {"attention_mask": part, "use_cache": True, CACHE: cache, "output_attentions": weights}
            out = model(IDS[:, begin:end], **kwargs)
            real = torch.ones_like(IDS[:, begin:end]).bool() if mask is None else mask[:, begin:end].bool()
            layers = [layer.transpose(1, 2) for layer in out.attentions] if weights else [out.logits]
            found |= {f"{begin} {index}": layer[real] for index, layer in enumerate(layers)}
            begin = end
        return found

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


def cropped(model: Any) -> Results:
    cache = dynamic(model)
    kwargs = {CACHE: cache, "use_cache": True}
    model(IDS, **kwargs)
    cache.crop(-4)
    return {"logits": model(IDS[:, -4:], **kwargs).logits}


def rope(kind: str) -> dict[str, Any]:
    return {"head_dim": 8, "rope_parameters": {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}}


NO_WINDOW = {"sliding_window": None}
CHUNKS = [T - 6, 1, 3, 1, 1]
LOOKUP = {"prompt_lookup_num_tokens": 2}
# The feature -> changes of the model's sizes, and what to compare.
TABLE: dict[str, tuple[dict[str, Any], Callable[[Any], Results]]] = {
    "forward: sliding window": ({}, logits),
    "forward: no window": (NO_WINDOW, logits),
    "forward: one key/value head": ({"num_key_value_heads": 1}, logits),
    "forward: top 1, tied embeddings": ({"num_experts_per_tok": 1, "tie_word_embeddings": True}, logits),
    "forward: labels, router logits, auxiliary loss": ({}, outputs),
    "forward: every output, as object and tuple": ({}, every_output),
    "forward: gradients enabled": ({}, torch.enable_grad()(lambda m: {"logits": m(IDS).logits.detach()})),
    "forward: inputs_embeds, and generate": ({}, embedded),
    "rope: yarn": (rope("yarn"), logits),
    "rope: dynamic, beyond the positions": (rope("dynamic") | {"max_position_embeddings": 8}, logits),
    "mask: left padding": ({}, partial(logits, mask=LEFT)),
    "mask: left padding, positions counted": (NO_WINDOW, lambda m: logits(m, LEFT, position_ids=COUNTED)),
    "mask: holes": ({}, partial(logits, mask=HOLES)),
    "mask: one sequence of padding only": (NO_WINDOW, lambda m: logits(m, LEFT * torch.tensor([[1], [0]]))),
    "mask: user's 4-D, added": (NO_WINDOW, user_float),
    "mask: user's 4-D, bool (beside sdpa)": ({"attn_implementation": "sdpa"}, lambda m: logits(m, causal(m))),
    "mask: not causal": ({}, lambda m: logits(m, LEFT, is_causal=False)),
    "mask: packed sequences by position_ids": ({}, packed),
    "mask: packed sequences, no window": (NO_WINDOW, packed),
    "mask: positions that start again, with a cache": ({}, lambda m: logits(m, position_ids=RESTARTED)),
    "cache: dynamic, in chunks": (NO_WINDOW, in_chunks(dynamic, None)),
    "cache: dynamic, left padding": (NO_WINDOW, in_chunks(dynamic, LEFT)),
    "cache: sliding window, in chunks": ({}, in_chunks(dynamic, None)),
    "cache: sliding window, left padding": ({}, in_chunks(dynamic, LEFT)),
    "cache: static": (NO_WINDOW, in_chunks(static, None)),
    "cache: static, left padding": (NO_WINDOW, in_chunks(static, LEFT)),
    "cache: static, filled to the end": (NO_WINDOW, in_chunks(partial(static, length=T), None)),
    "cache: static sliding window": ({"sliding_window": 20}, in_chunks(static, LEFT)),
    "cache: static sliding window, beyond it": ({}, in_chunks(static, None)),
    "cache: static sliding window, left padding": ({}, in_chunks(static, LEFT)),
    "cache: cut back": (NO_WINDOW, cropped),
    "generate: left padding": ({}, partial(generated, mask=LEFT)),
    "generate: right padding, window": ({}, partial(generated, ids=IDS[1:], mask=RIGHT)),
    "generate: right padding, window, lookup": ({}, partial(generated, ids=IDS[1:], mask=RIGHT, **LOOKUP)),
    "generate: without a cache": ({}, partial(generated, mask=LEFT, use_cache=False)),
    "generate: beams": ({}, partial(generated, mask=LEFT, num_beams=3)),
    "generate: static cache": (NO_WINDOW, partial(generated, mask=LEFT, cache_implementation="static")),
    "generate: static cache, window": ({}, partial(generated, mask=LEFT, cache_implementation="static")),
    "attention weights: left padding": ({}, partial(attn_output, mask=LEFT)),
    "attention weights: holes": ({}, partial(attn_output, mask=HOLES)),
    "attention weights: packed sequences": ({}, lambda m: attn_output(m, position_ids=RESTARTED, use_cache=False)),
    "attention weights: user's 4-D, added": ({}, lambda m: attn_output(m, added(causal(m, HOLES)))),
    "attention weights: dynamic cache, no mask": (NO_WINDOW, in_chunks(dynamic, None, weights=True)),
    "attention weights: dynamic cache": (NO_WINDOW, in_chunks(dynamic, LEFT, weights=True)),
    "attention weights: static sliding window": ({}, in_chunks(static, LEFT, weights=True)),
}
QUICK = ("forward: sliding window", "forward: every output, as object and tuple", "cache: static, left padding")
QUICK += ("attention weights: dynamic cache, no mask",)
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


@pytest.mark.parametrize(
    "feature",
    [
        pytest.param(name, marks=() if name in (SHORT[:1] if INTERPRETED else QUICK) else pytest.mark.slow)
        for name in (SHORT if INTERPRETED else TABLE)
    ],
)
def test_parity(feature: str, make_hf: Any, parity: Any) -> None:
    sizes, run = TABLE[feature]
    with torch.no_grad():
        want, got = run(make_hf(**sizes)), run(apply(make_hf(**sizes)))
    parity(feature, compare(got, want))


REPLACED: dict[str, Callable[[Any], None]] = {
    "the activation GELU": lambda layer: setattr(layer.mlp.experts, "act_fn", nn.GELU()),
    "the activation Mine": lambda layer: setattr(layer.mlp.experts, "act_fn", MINE),
    "the activation SiLUActivation": lambda layer: setattr(layer.mlp.experts.act_fn, "forward", torch.tanh),
    "attention that is not causal": lambda layer: setattr(layer.self_attn, "is_causal", False),
}
MINE = type("Mine", (nn.SiLU,), {})()


@pytest.mark.compiled
@pytest.mark.parametrize("message", REPLACED)
def test_what_fused_operations_never_read_is_refused_at_the_call(message: str, make_hf: Any) -> None:
    model = apply(make_hf(sliding_window=None))
    REPLACED[message](model.model.layers[-1])
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(IDS)


@pytest.mark.compiled
def test_model_that_was_converted_to_fp64_is_refused_at_the_call(make_hf: Any) -> None:
    """`apply` refuses it, too; kernels that read it without their checks would be wrong in silence."""
    with torch.no_grad(), pytest.raises(ValueError, match=r"got torch\.float64, as of a converted model"):
        apply(make_hf()).double()(IDS)


@pytest.mark.compiled
def test_a_hook_that_replaces_the_angles_is_honoured(make_hf: Any) -> None:
    """It makes the rotary embedding's result anew, of the class that it got."""
    found = []
    for fused in (False, True):
        model = apply(make_hf()) if fused else make_hf()
        model.model.rotary_emb.register_forward_hook(lambda module, args, out: type(out)(x * 0.5 for x in out))
        found.append(model(IDS).logits)
    assert (found[0] - found[1]).abs().max() <= 1e-4 * found[0].abs().max()
