"""verify of a transformers model finds faults of the drop-in in padded, packed and cached calls."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from mixtral_triton import hf, ops, verify
from mixtral_triton.hf import masks, modules, training
from mixtral_triton.kernels.launching.launch import INTERPRETED
from mixtral_triton.verification.models_under_test import STATIC
from mixtral_triton.verification.report import FP32
from tests.support.faults import DTYPES, Inject

IDS = torch.randint(1, 48, (2, 15), generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.skipif(INTERPRETED, reason="about masks and modules, whatever the backend: run once")
Change = Callable[..., Any]


def result(place: Any, name: str, change: Change) -> Inject:
    """change(result, *arguments) in the place of the result of `place.name`."""
    function = getattr(place, name)
    return lambda patch: patch.setattr(place, name, lambda *args, **more: change(function(*args, **more), *args))


def mask_by(change: Change) -> Inject:
    """The mask of other keyword arguments."""
    make = lambda **kwargs: masks.interval_mask(**kwargs | change(kwargs))  # noqa: E731
    return lambda patch: patch.setitem(AttentionMaskInterface._global_mapping, masks.NAME, make)


def static_by(change: Change) -> Inject:
    return mask_by(lambda kwargs: change(kwargs) if isinstance(kwargs["q_offset"], Tensor) else {})


def mask_without(place: int) -> Inject:
    """The mask without one of the arguments of the backbone's forward."""
    make = modules.causal_mask
    faulty = lambda *args: make(*args[:place], None, *args[place + 1 :])  # noqa: E731
    return lambda patch: patch.setattr(modules, "causal_mask", faulty)


def kind_of(key_mask: Tensor | None) -> str:
    if key_mask is None:
        return "none"
    return "dense" if key_mask.dtype == torch.bool else "interval" if key_mask.shape[2] else "causal"


def attend(kind: str, change: Change) -> Inject:
    """change(q, k, v, mask, window): other arguments of attention, for one kind of mask."""
    function = modules.attention

    def faulty(module: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Any, sliding_window: Any, **kwargs: Any) -> Any:
        args = q, k, v, key_mask, sliding_window
        q, k, v, key_mask, window = change(*args) if kind_of(key_mask) == kind else args
        return function(module, q, k, v, key_mask, sliding_window=window, **kwargs)

    return lambda patch: patch.setattr(modules, "attention", faulty)


rotary = modules.TritonRotaryEmbedding.forward
rotary_from_zero = lambda module, x, position_ids: rotary(module, x, position_ids - position_ids[:, :1])  # noqa: E731
no_window = lambda q, k, v, key_mask, window: (q, k, v, key_mask[:, :1], None)  # noqa: E731
earlier = lambda mask, n: (mask.view(torch.int32) - torch.tensor([[0], [n]])).int().view(torch.uint32)  # noqa: E731
first_row = lambda q, k, v, mask, window: (q, k, v, mask[:1].repeat(len(mask), 1, 1, 1), window)  # noqa: E731
first_query = lambda q, k, v, mask, window: (q, k, v, earlier(mask, q.shape[2] - 1), window)  # noqa: E731
first_keys = lambda q, k, v, mask, window: keys_in(slice(q.shape[2]), q, k, v, mask, window)  # noqa: E731
new_keys = lambda q, k, v, mask, window: keys_in(slice(-q.shape[2], None), q, k, v, mask, window)  # noqa: E731
cached = lambda k: {"attention_mask": None} if k["kv_length"] > k["q_length"] else {}  # noqa: E731
last_slot = lambda k: {"q_offset": k["q_offset"] * 0 + k["kv_length"] - k["q_length"]}  # noqa: E731


def keys_in(part: slice, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, window: Any) -> Any:
    return q, k[:, :, part], v[:, :, part], key_mask[..., part], window


def in_half(found: Any, *_: Any) -> Any:
    return found[0], found[1].half(), found[2]


# The case of the first wrong row, of a layer, and the faults. The model of a fault with "window" in its name has one,
# longer than the text.
FAULTS: dict[str, dict[str, Inject]] = {
    "routes, whole text": {"routing weights of another dtype": result(modules.TritonRouter, "forward", in_half)},
    "attention, whole text": {"no window": attend("causal", no_window)},
    "attention, in chunks": {
        "at a cache's first keys": attend("causal", first_keys),
        "new keys only": attend("causal", new_keys),
        "positions from 0": lambda patch: patch.setattr(modules.TritonRotaryEmbedding, "forward", rotary_from_zero),
        "offset of a window's keys ignored": mask_by(lambda _: {"kv_offset": 0}),
    },
    "attention, packed": {
        "boundaries ignored": lambda patch: patch.setattr(masks, "is_causal_pattern", lambda function: True),
        "positions forgotten": mask_without(3),
    },
    "attention, left padding": {
        "padding ignored": result(masks, "first_key", lambda *_: (True, None)),
        "one token of padding seen": result(masks, "first_key", lambda out, _: (True, (out[1] - 1).relu())),
        "first row's padding for all": attend("interval", first_row),
        "first query's interval for all": attend("interval", first_query),
        "no window beside padding": attend("interval", no_window),
    },
    f"attention, {STATIC}": {
        "unwritten slots seen": static_by(last_slot),
        "offset - 1": static_by(lambda k: {"q_offset": k["q_offset"] - 1}),
        "offset 0": static_by(lambda k: {"q_offset": k["q_offset"] * 0}),
        "padding of a static cache ignored": static_by(lambda _: {"attention_mask": None}),
        "padding of a cache ignored": mask_by(cached),
        "mask forgotten": mask_without(2),
    },
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("case", "fault"), [(case, fault) for case in FAULTS for fault in FAULTS[case]])
def test_fault_in_the_drop_in(case: str, fault: str, make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[case][fault](monkeypatch)
    for dtype in DTYPES:
        model = make_hf(sliding_window=40 if "window" in fault else None).to(dtype)
        first = next(iter(verify(model, IDS).wrong), None)
        assert first is not None and (first.op, first.case) == ("layer", case), (dtype, first)


@pytest.mark.slow
@pytest.mark.parametrize(("part", "dtypes"), [("self_attn", DTYPES), ("mlp", DTYPES), ("lm_head", DTYPES[:1])])
def test_an_applied_model_that_is_3_percent_wrong_fails(part: str, dtypes: Any, make_hf: Any) -> None:
    for dtype, factor in product(dtypes, (1.03, 1.0)):
        scale = lambda _, args, out, f=factor: (out[0] * f, *out[1:]) if isinstance(out, tuple) else out * f  # noqa: E731
        model = hf.apply(make_hf().to(dtype))
        for name, module in model.named_modules():
            if name.endswith(part):
                module.register_forward_hook(scale)
        assert bool(verify(model, IDS).wrong) == (factor != 1), (dtype, factor)


ROUTERS: dict[str, Change] = {
    "weights that do not sum to 1": lambda logits, weights, ids: (logits, weights * 1.1, ids),
    "ids of other experts": lambda logits, weights, ids: (logits, weights, (ids + 1) % logits.shape[-1]),
}


@pytest.mark.parametrize("fault", ROUTERS)
def test_a_router_with_right_logits_and_wrong_routes_fails(fault: str, make_hf: Any) -> None:
    model = hf.apply(make_hf())
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: ROUTERS[fault](*out))
    report = verify(model, IDS)
    assert all(not row.ok for row in report.rows if row.case.startswith("routes, ")), str(report)


@pytest.mark.slow
def test_eps_of_the_norms_is_seen_in_16_bits(make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = lambda module, x: ops.rms_norm(x, module.weight, 1e-6)  # noqa: E731
    monkeypatch.setattr(modules.TritonRMSNorm, "forward", norm)
    wrong = verify(make_hf().bfloat16(), IDS).wrong
    assert wrong and all(row.case.endswith(FP32) for row in wrong)


@pytest.mark.parametrize("parameters", [["mlp.experts.gate_up_proj"], ["mlp.gate.weight"], None], ids=str)
def test_adapters_on_parameters_are_refused_by_name_until_they_are_merged(parameters: Any, make_hf: Any) -> None:
    peft = pytest.importorskip("peft")
    hf = make_hf()
    settings: Any = {"target_modules": ["q_proj", "o_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(hf, peft.LoraConfig(r=4, target_parameters=parameters, **settings)).eval()
    with pytest.raises(ValueError, match=r"give it the model inside, \.base_model\.model"):
        verify(model)
    if parameters is not None:
        with pytest.raises(
            ValueError, match=r"PEFT's target_parameters, needs them merged: model\.merge_and_unload\(\)"
        ):
            verify(model.base_model.model, IDS)
        model = model.merge_and_unload()
    report = verify(model if parameters else model.base_model.model, IDS)
    assert not report.wrong


@pytest.mark.slow
@pytest.mark.parametrize(("index", "gradient"), [(0, "x"), (4, "routing weights")])
def test_an_applied_model_in_training_mode_has_its_gradients_judged(
    index: int, gradient: str, make_hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault of 3 % in one gradient is named, in both dtypes."""
    backward = training.FrozenExperts.backward
    scaled = lambda ctx, grad: tuple(x * 1.03 if at == index else x for at, x in enumerate(backward(ctx, grad)))  # noqa: E731
    for dtype in DTYPES:
        model = hf.apply(make_hf().to(dtype)).train().requires_grad_(False)
        model.model.layers[0].self_attn.eval()  # as a caller left it
        modes = [module.training for module in model.modules()]
        report = verify(model, IDS)
        judged = {(row.op, row.layer) for row in report.rows if row.op.startswith("gradient")}
        layers = range(len(model.model.layers))
        assert judged == {(f"gradient of {name}", at) for name in ("x", "routing weights") for at in layers}
        assert not report.wrong and [module.training for module in model.modules()] == modes
        with monkeypatch.context() as patch:
            patch.setattr(training.FrozenExperts, "backward", scaled)
            wrong = {(row.op, row.layer) for row in verify(model, IDS).wrong}
        assert wrong == {(f"gradient of {gradient}", at) for at in layers}
    assert not any(row.op.startswith("gradient") for row in verify(model.eval(), IDS).rows)


def test_training_mode_without_apply_or_with_experts_that_train_is_refused(make_hf: Any) -> None:
    with pytest.raises(ValueError, match=r"in training mode, needs inference, model.eval\(\), or apply\(model\)"):
        verify(make_hf().train(), IDS)
    with pytest.raises(ValueError, match="experts that require gradients, needs frozen ones"):
        verify(hf.apply(make_hf()).train().requires_grad_(True), IDS)
