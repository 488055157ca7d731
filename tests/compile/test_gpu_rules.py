"""Everything between a user's call and a launch, on simulated GPUs (tests/support/stub): results, devices, reads."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral, apply, ops
from tests.support.models import random_model
from tests.support.stub.driver import LaunchError

OTHER = torch.device("cuda", 1)  # the current one is cuda:0
IDS = torch.tensor([[3, 5, 7, 1], [2, 9, 11, 4]])


def build(device: Any) -> Mixtral:
    return random_model(device, num_hidden_layers=2, num_local_experts=2, sliding_window=3)


def run(device: Any) -> list[torch.Tensor]:
    """Logits without a cache, of a ragged chunk, and of the token after it."""
    model, ids = build(device), IDS.to(device)
    cache = KVCache(model.config, batch=2, device=device, dtype=torch.float32)
    chunk = model(ids, cache=cache, lengths=torch.tensor([4, 2], device=device))
    return [x.cpu() for x in (model(ids), chunk[0], chunk[1, :2], model(ids[:, :1], cache=cache))]


def test_model_on_another_than_the_current_gpu(gpu: Any) -> None:
    got, want = run(OTHER), run("cpu")
    for ours, plain in zip(got, want, strict=True):
        assert (ours - plain).abs().max() <= 1e-4 * plain.abs().max()
    assert {launched.device for launched in gpu.driver.launches} == {1} and gpu.current == 0


def test_the_current_device_changes_only_for_another_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing the current device costs host time: on the current one nobody does."""
    changes: list[int] = []
    monkeypatch.setattr(torch.cuda, "_exchange_device", lambda index: changes.append(index) or gpu.exchange(index))
    gpu.driver.executes = False
    for device, expected in (("cuda:0", []), ("cuda:1", [1])):
        x, weight = torch.ones(2, 16).to(device), torch.ones(16).to(device)
        changes.clear()
        ops.rms_norm(x, weight, 1e-5)
        assert changes == expected


def test_injected_fault_launch_on_the_wrong_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.ones(2, 16).to(OTHER), torch.ones(16).to(OTHER)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    with pytest.raises(LaunchError, match="x_ptr is on cuda:1, the launch on cuda:0"):
        ops.rms_norm(x, weight, 1e-5)


def test_tensors_of_two_gpus_raise_value_error(gpu: Any) -> None:
    with pytest.raises(ValueError, match="argument 'weight' is on cuda:1, needs to be on cuda:0"):
        ops.rms_norm(torch.ones(2, 16).to("cuda:0"), torch.ones(16).to(OTHER), 1e-5)
    with pytest.raises(ValueError, match="'input_ids' is on cuda:0, needs the model's device, cuda:1"):
        build(OTHER)(IDS.to("cuda:0"))


def test_generate_reads_back_once_a_prompt_and_once_a_token(gpu: Any) -> None:
    gpu.driver.executes = False
    model = build("cuda:0")
    prompts = [row.to("cuda:0") for row in IDS]
    gpu.syncs.clear()
    model.generate(prompts, max_new_tokens=6)
    free = len([sync for sync in gpu.syncs if sync != "synchronize"])
    gpu.syncs.clear()
    model.generate(prompts, max_new_tokens=6, eos_token_id=23)
    assert free == 2, "the prompt, and the text at the end"
    assert len([sync for sync in gpu.syncs if sync != "synchronize"]) <= free + 6


def test_an_applied_model_over_two_gpus(gpu: Any, make_hf: Any) -> None:
    """accelerate's hooks carry activations, masks and tables over; each layer's kernels run where its weights are."""
    accelerate = pytest.importorskip("accelerate")
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1]])
    eager = make_hf(num_local_experts=2)
    places = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.layers.0": 0, "model.layers.1": 1}
    places |= {"model.norm": 1, "lm_head": 1}
    with torch.no_grad():
        want = eager(IDS, attention_mask=mask).logits
        model = accelerate.dispatch_model(apply(make_hf(num_local_experts=2)), places)
        kwargs = {"attention_mask": mask.to("cuda:0")}
        got = model(IDS.to("cuda:0"), **kwargs).logits.cpu()
        text = model.generate(IDS.to("cuda:0"), **kwargs, max_new_tokens=2, do_sample=False).cpu()
        expected = eager.generate(IDS, attention_mask=mask, max_new_tokens=2, do_sample=False)
    assert (got - want)[mask.bool()].abs().max() <= 1e-4 * want.abs().max()
    assert torch.equal(text, expected)
    by_kernel = {(launched.kernel, launched.device) for launched in gpu.driver.launches}
    for kernel in ("attention_decode_kernel", "gate_route_kernel", "rms_norm_kernel", "rope_kernel"):
        assert {(kernel, 0), (kernel, 1)} <= by_kernel
    assert gpu.current == 0
