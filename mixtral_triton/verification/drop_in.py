"""The drop-in as transformers calls it: all outputs of the reverted and of the applied model, by masks and caches."""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, MixtralForCausalLM, StaticCache
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .. import hf
from ..hf.attention import CACHE
from .layers import Step
from .models_under_test import TransformersUnderTest
from .report import Row
from .tolerance import largest

TOKENS, NEW = 8, 3  # of the text, and those that `generate` adds
LAYERS, EXPERTS, INNER = 2, 3, 32  # of the model, and of rows of an expert, at most
LIMIT = 1e-2  # of an output's largest value: a sharp softmax makes 1e-3 of fp32 roundings, a wrong key far more
CACHES = ("no cache", "dynamic cache", "static cache", "the model's cache")


def compare_calls(target: TransformersUnderTest, ids: Tensor, steps: Callable[[str, int], Step]) -> list[Row]:
    """Rows of the same calls of transformers' model and of an applied one, with a text that is cut from ids [B,T].

    Both are fp32 copies of the target, which stays as it is, with few layers, experts and rows: a call hands each layer
    the same masks, errors are far below the limit, and eps shows. A window is half as long as the text."""
    pair = [_small_copy(target).to(ids.device) for _ in range(2)]
    hf.apply(pair[1])
    t, b, T = torch.arange(TOKENS, device=ids.device), torch.arange(2, device=ids.device)[:, None], TOKENS
    text, masks = ids.flatten()[(b * T + t) % ids.numel()], dict[str, Any].fromkeys(("no mask", "packed"))
    masks |= {"left padding": t >= b * T // 3, "right padding": t < T - b * T // 3}
    masks |= dict.fromkeys(("a hole", "4-D mask"), (t < T // 3) | (t > T // 3 + b))
    kinds = [*product(masks.items(), CACHES[:3]), (("packed", None), CACHES[3])]  # the last: one sequence a row
    calls = {f"{mask}, {cache}": partial(_outputs, text, valid, mask, cache) for (mask, valid), cache in kinds}
    calls |= {f"generate, {cache}": partial(_generate, text, masks["left padding"], cache) for cache in CACHES[1:3]}
    rows, step = list[Row](), steps("calls of transformers", len(calls))
    for case, call in calls.items():
        notes = list[str]()
        with target.catch_faults(notes.append):
            errors = _errors(*_run_both(pair, call))
            worst = max(errors, key=errors.__getitem__)
            note = "" if errors[worst] <= LIMIT else f"{worst}: error {errors[worst]:.1e}, limit {LIMIT:.0e}"
            rows.append(Row(None, "call", case, errors[worst], LIMIT, note))
        rows += [Row.exact(None, "call", case, False, note) for note in notes]
        step()
    return rows


def _small_copy(target: TransformersUnderTest) -> Any:
    """An eager model in fp32 of the target's first layers, with a part of their experts."""
    config, tensors = copy.deepcopy(target.backbone.config), dict[str, Tensor]()
    config.update(dict.fromkeys(("eos_token_id", "pad_token_id")) | {"tie_word_embeddings": False})
    config.num_hidden_layers, config.vocab_size = min(LAYERS, len(target.layers)), len(target.embed_tokens)
    E = config.num_local_experts = max(min(EXPERTS, config.num_local_experts), config.num_experts_per_tok)
    I = config.intermediate_size = min(INNER, config.intermediate_size)
    config.sliding_window = config.sliding_window and TOKENS // 2
    tensors["lm_head"] = target.embed_tokens if target.lm_head is None else target.lm_head
    x, eps = target.embed_tokens.float(), target.config.rms_norm_eps
    tensors |= {"model.embed_tokens": x * (eps / x.square().mean()).sqrt(), "model.norm": target.norm}
    for index, layer in enumerate(target.layers[: config.num_hidden_layers]):
        place, experts = f"model.layers.{index}.", layer.mlp.experts
        halves = experts.gate_up_proj[:E].unflatten(1, (2, -1))[:, :, :I]
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {place + name: getattr(layer, name).weight for name in norms}
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            project = getattr(layer.self_attn, name)
            identity = torch.eye(project.in_features, dtype=project.weight.dtype, device=project.weight.device)
            tensors[f"{place}self_attn.{name}"] = project(identity).t()  # with what an adapter adds
        tensors[f"{place}mlp.gate"] = layer.mlp.gate.weight[:E]
        tensors[f"{place}mlp.experts.gate_up_proj"] = halves.flatten(1, 2)
        tensors[f"{place}mlp.experts.down_proj"] = experts.down_proj[:E, :, :I]
    fp32 = {name: x.detach().float().contiguous() for name, x in tensors.items()}
    settings: dict[str, Any] = {"attn_implementation": "eager", "experts_implementation": "eager"}
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay
        model = MixtralForCausalLM._from_config(config, dtype=torch.float32, **settings).eval()
    model.load_state_dict({name if "experts" in name else f"{name}.weight": x for name, x in fp32.items()})
    return model


def _run_both(pair: list[Any], call: Callable[[Any], dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """What `call` returns of both models. Where the second one's routes differ it takes the first one's: they differ by
    a near tie, or else by wrong router logits, which are an output."""
    routes, results = list[Any](), list[dict[str, Tensor]]()

    def route(gate: Any, args: Any, out: Any) -> Any:
        if not results:
            return routes.append(out[1:])
        weights, ids = routes.pop(0)
        differs = (out[2].sort(-1).values != ids.sort(-1).values).any(-1, keepdim=True)
        lowest = out[0].gather(-1, out[2]).amin(-1, keepdim=True)
        left_out = out[0].scatter(-1, out[2], -math.inf).amax(-1, keepdim=True)
        differs &= left_out - lowest <= LIMIT * largest(out[0])  # other ids than those of its own logits stay wrong
        return out[0], weights.where(differs, out[1]), ids.where(differs, out[2])

    with ExitStack() as stack:
        for layer in (layer for model in pair for layer in model.model.layers):
            stack.enter_context(layer.mlp.gate.register_forward_hook(route))
        for model in pair:
            results.append(call(model))
    return results


def _errors(want: dict[str, Tensor], got: dict[str, Tensor]) -> dict[str, float]:
    """The largest error of each output, relative to its largest value. Of generated tokens that differ, up to them."""
    if "tokens" in want:
        same = int((want["tokens"] == got["tokens"]).all(0).cumprod(0).sum())
        want, got = ({"logits": outputs["logits"][:, : same + 1]} for outputs in (want, got))
    return {
        name: largest(got[name] - x) / max(largest(x), 1e-30) if got[name].shape == x.shape else math.inf
        for name, x in want.items()
    }


def _outputs(text: Tensor, valid: Tensor | None, mask: str, kind: str, model: Any) -> dict[str, Tensor]:
    """The outputs of the text [B,T], over a cache in chunks and a step, for tokens that see a key: [n,...] each."""
    (B, T), config, results = text.shape, model.config, dict[str, Tensor]()
    caches: dict[str, Any] = {CACHES[1]: DynamicCache, CACHES[2]: partial(StaticCache, max_cache_len=T + NEW)}
    cache: Any = caches[kind](config=config) if kind in caches else None
    create: Any = create_causal_mask if config.sliding_window is None else create_sliding_window_causal_mask
    restarted = torch.arange(T, device=text.device) % (T // 2 + 1 + torch.arange(B, device=text.device)[:, None])
    for begin, end in [(0, T), (T - 1, T)] if cache is None else pairwise((0, T // 2, T - 1, T)):
        kwargs: dict[str, Any] = {"position_ids": restarted[:, begin:end] if mask == "packed" else None, CACHE: cache}
        kwargs["attention_mask"] = None if valid is None else valid[:, begin * (cache is None) : end].long()
        dense = create(config=config, inputs_embeds=model.model.embed_tokens(text[:, begin:end]), **kwargs)
        if mask == "4-D mask":
            kwargs["attention_mask"] = dense
        names = dict.fromkeys(("output_attentions", "output_hidden_states", "output_router_logits"), True)
        out = model.model(text[:, begin:end], use_cache=kind != CACHES[0], **kwargs, **names)
        outputs = {"logits": [model.lm_head(out.last_hidden_state)], "hidden states": out.hidden_states}
        outputs["attentions"] = [weights.transpose(1, 2) for weights in out.attentions]
        outputs["router logits"] = [logits.view(B, end - begin, -1) for logits in out.router_logits]
        sees = (dense[:, 0] == 0).any(-1).expand(B, -1)
        for name, layers in outputs.items():
            for index, x in enumerate(layers):
                results[f"{name} {index} of tokens {begin} to {end}"] = x[sees]
    return results


def _generate(text: Tensor, valid: Any, kind: str, model: Any) -> dict[str, Tensor]:
    """The greedy tokens [B,n] behind the text [B,T], and their logits [B,n,V]."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    if kind == CACHES[2]:
        settings |= {"cache_implementation": "static", "disable_compile": True}
    out = model.generate(text, attention_mask=valid.long(), return_dict_in_generate=True, **settings)
    return {"tokens": out.sequences[:, text.shape[1] :], "logits": torch.stack(out.logits, 1)}
