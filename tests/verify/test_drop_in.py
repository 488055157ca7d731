"""verify of a transformers model finds faults of the drop-in, whole and in chunks. Masks: tests/hf/test_parity.py."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionMaskInterface

from mixtral_triton import hf, verify
from mixtral_triton.hf import attention, modules
from mixtral_triton.kernels.launching.launch import INTERPRETED
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
    make = lambda **kwargs: attention.interval_mask(**kwargs | change(kwargs))  # noqa: E731
    return lambda patch: patch.setitem(AttentionMaskInterface._global_mapping, attention.NAME, make)


def attend(change: Change) -> Inject:
    """change(q, k, v, mask, window): other arguments of attention where the mask is causal, and no interval."""
    function = modules.attention

    def faulty(module: Any, q: Tensor, k: Tensor, v: Tensor, key_mask: Any, sliding_window: Any, **kwargs: Any) -> Any:
        args = q, k, v, key_mask, sliding_window
        is_causal = key_mask is not None and key_mask.dtype != torch.int64 and not key_mask.shape[2]
        q, k, v, key_mask, window = change(*args) if is_causal else args
        return function(module, q, k, v, key_mask, sliding_window=window, **kwargs)

    return lambda patch: patch.setattr(modules, "attention", faulty)


rotary = modules.TritonRotaryEmbedding.forward
rotary_from_zero = lambda module, x, position_ids: rotary(module, x, position_ids - position_ids[:, :1])  # noqa: E731
no_window = lambda q, k, v, key_mask, window: (q, k, v, key_mask[:, :1], None)  # noqa: E731
first_keys = lambda q, k, v, mask, window: keys_in(slice(q.shape[2]), q, k, v, mask, window)  # noqa: E731
new_keys = lambda q, k, v, mask, window: keys_in(slice(-q.shape[2], None), q, k, v, mask, window)  # noqa: E731


def keys_in(part: slice, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, window: Any) -> Any:
    return q, k[:, :, part], v[:, :, part], key_mask[..., part], window


def in_half(outputs: Any, *_: Any) -> Any:
    return outputs[0], outputs[1].half(), outputs[2]


# The operation and the case of the first wrong row, and the faults, written before any was tried. The model of a fault
# with "window" in its name has one.
FAULTS: dict[tuple[str, str], dict[str, Inject]] = {
    ("layer", "routes, whole text"): {
        "routing weights of another dtype": result(modules.TritonRouter, "forward", in_half)
    },
    ("layer", "attention, whole text"): {"no window": attend(no_window)},
    ("layer", "attention, in chunks"): {
        "at a cache's first keys": attend(first_keys),
        "new keys only": attend(new_keys),
        "positions from 0": lambda patch: patch.setattr(modules.TritonRotaryEmbedding, "forward", rotary_from_zero),
        "offset of a window's keys ignored": mask_by(lambda _: {"kv_offset": 0}),
    },
}


@pytest.mark.exhaustive
@pytest.mark.parametrize(("case", "fault"), [(case, fault) for case in FAULTS for fault in FAULTS[case]])
def test_fault_in_the_drop_in(case: Any, fault: str, make_hf: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    FAULTS[case][fault](monkeypatch)
    for dtype in DTYPES:
        model = make_hf(sliding_window=4 if "window" in fault else None).to(dtype)
        first = next(iter(verify(model, IDS).wrong), None)
        assert first is not None and (first.op, first.case) == case, (dtype, first)


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


def test_training_mode_needs_apply_and_stays(make_hf: Any) -> None:
    with pytest.raises(ValueError, match=r"in training mode, needs inference, model.eval\(\), or apply\(model\)"):
        verify(make_hf().train(), IDS)
    model = hf.apply(make_hf()).train()
    model.model.layers[0].self_attn.eval()  # as a caller left it
    modes = [module.training for module in model.modules()]
    assert not verify(model, IDS).wrong and [module.training for module in model.modules()] == modes
