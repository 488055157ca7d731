"""Models with experts in host memory: the same logits and tokens, and what is rejected before any allocation."""

import copy
import pickle
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_model

from mixtral_triton import Mixtral, verify
from mixtral_triton.bench import fit
from mixtral_triton.bench.gpus import parse_gpu
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.kernels.weights.offload import OffloadedWeight, _pinned
from mixtral_triton.model import memory_plan
from mixtral_triton.model.memory_plan import MemoryRequest
from tests.support.memory import needs_proc
from tests.support.models import random_model

pytestmark = pytest.mark.compiled
IDS = torch.arange(3, 20)[None]


def test_a_table_has_the_address_of_each_expert_s_rows() -> None:
    stacked, model = (Mixtral.from_pretrained(SMALL, "cpu", offload=count) for count in (0, 2))
    for layer, want in zip(model.layers, stacked.layers, strict=True):
        for name in ("gate_up_proj", "down_proj"):
            weight: Any = getattr(layer, name)
            in_memory = {True: iter(weight.host), False: iter(weight.resident)}
            rows = [next(in_memory[expert in weight.on_host]) for expert in range(len(weight))]
            assert len(weight.on_host) == 2 and weight.data.tolist() == [x.data_ptr() for x in rows]
            assert torch.equal(torch.stack(rows), getattr(want, name))
    assert not verify(model, IDS, folder=SMALL).wrong


COUNT, CONTEXT = "needs 0 to 7 experts of each layer, or 'auto'", "context is .*, needs 1 to 1024, the model's p"
WRONG = [({"offload": each}, COUNT) for each in (-1, 8, True, 1.0, "all", None)]
WRONG += [({"offload": "auto", "context": each}, CONTEXT) for each in (0, -1, 1025, 1.5, True, "many")]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_count_or_context_raises_value_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(SMALL, "cpu", **options)


def test_host_memory_is_checked_before_allocating(monkeypatch: pytest.MonkeyPatch) -> None:
    per_expert = 4 * 3 * 128 * 256 * 2
    monkeypatch.setattr(memory_plan, "host_memory", lambda: 2 * per_expert)
    with pytest.raises(ValueError, match=r"12 of 32 experts in host memory take .* available"):
        Mixtral.from_pretrained(SMALL, "cpu", offload=3)
    assert Mixtral.from_pretrained(SMALL, "cpu", offload=2).layers[0].down_proj.on_host == (6, 7)


MEMINFO = [("MemTotal: 9 kB\nMemAvailable: 8 kB", 8192), ("MemTotal: 9 kB", None), (None, None)]


@pytest.mark.parametrize(("text", "available"), MEMINFO)
def test_host_memory_is_what_the_system_has_available(
    text: str | None, available: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if text is not None:
        (tmp_path / "meminfo").write_text(text)
    monkeypatch.setattr(memory_plan, "MEMINFO", tmp_path / "meminfo")
    assert memory_plan.host_memory() == available


def test_auto_takes_the_fewest(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(UserWarning, match="0 of 32 experts in host memory"):
        assert isinstance(Mixtral.from_pretrained(SMALL, "cpu", offload="auto").layers[0].down_proj, torch.nn.Parameter)
    model = Mixtral.from_pretrained(SMALL, "cpu")
    needed, sizes = 10_000_000, ([250_000] * 4, 400_000)  # the buffers hold the experts of the layer with the most
    context = sum(memory_plan.running_bytes(model.config, 1, 1024).values())
    cases = [(10_000_000, [], False), (9_999_999, [0] * 4, True), (9_600_000, [0] * 4, True)]
    # Freed are 400,000 and each 250,000, without the buffers, 250,000 up to four experts and 500,000 up to eight.
    cases += [(9_599_999, [0, 1, 0, 1], True), (9_350_000, [0, 1, 0, 1], True), (9_349_999, [0, 1, 1, 1], True)]
    cases += [(9_100_000, [0, 1, 1, 1], True), (8_850_000, [1] * 4, True), (8_849_999, [1, 2, 1, 2], True)]
    cases += [(1, [7] * 4, True)]
    for available, counts, embedding in cases:
        monkeypatch.setattr(memory_plan, "available_bytes", lambda device, free=available: free + context)
        args = (MemoryRequest("auto"), model.config, None, torch.device("cpu"), needed, sizes)
        with pytest.warns(UserWarning, match=f"{sum(counts)} of 32 experts {'and' if counts else 'in'}"):
            found = memory_plan.place(*args)
        assert ([*map(len, found.experts)], found.embedding) == (counts, embedding), available
        host = sum(counts) * 250_000 + 400_000 * embedding
        assert (found.host_bytes, found.staging_bytes) == (host, 250_000 * max(counts, default=0))


def test_an_embedding_that_is_the_head_stays_on_the_gpu() -> None:
    for tied, size in ((False, 23 * 16 * 4), (True, 0)):
        model = random_model("meta", tie_word_embeddings=tied)
        each, embedding = memory_plan.movable_bytes(model.config, parameter_shapes(model.config), {}, model.dtype)
        assert (each, embedding) == ([3 * 16 * 12 * 4], size)
        assert memory_plan.Placement.of([[]], each, embedding).embedding is not tied


@pytest.mark.parametrize(
    ("name", "format"), [("rtx4080", "int4"), ("rtx4090", "int4, linear int8"), ("h100", "as stored")]
)
def test_auto_takes_what_fit_says(name: str, format: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the GPU has as much free memory as the table says, once its context exists."""
    monkeypatch.setattr(memory_plan, "host_memory", lambda: None)  # that of this machine may not suffice
    gpu_of_fit, config, synchronized = parse_gpu(name), fit.KNOWN["mixtral-8x7b"], list[Any]()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronized.append)
    free = lambda device: memory_plan.estimated_free(gpu_of_fit.bytes) if synchronized else gpu_of_fit.bytes  # noqa: E731
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free(device), gpu_of_fit.bytes))
    specs, shapes = fit.format_specs(config)[format], parameter_shapes(config)
    offload = fit.Request("", config, {format: specs}, 1, 4096).memory_plan(format, gpu_of_fit).offload
    need = fit.memory_need(config, specs, 1, 4096)
    sizes = memory_plan.movable_bytes(config, shapes, specs, torch.bfloat16)
    args = (MemoryRequest("auto"), config, None, torch.device("cuda"), need["weights"] + need["tables"], sizes)
    said = f"offload='auto': {offload['experts']} of {offload['of']} experts and the embedding in host memory ("
    with pytest.warns(UserWarning, match=re.escape(said)):
        found = memory_plan.place(*args)
    names = ("count", "embedding", "host_bytes", "staging_bytes")
    assert [getattr(found, name) for name in names] == [offload[name] for name in ("experts", *names[1:])]


@pytest.mark.parametrize("weights", [None, "int4", "int8", "fp8"])
def test_offloaded_model_cannot_be_moved_copied_or_saved(weights: str | None, tmp_path: Path) -> None:
    """Saving it would lose the experts; loading it would point the tables into another model's memory."""
    with torch.device("meta"):  # a caller's default device
        model, resident = (Mixtral.from_pretrained(SMALL, "cpu", weights=weights, offload=count) for count in (2, 0))
    casts = [model.half] if weights is None else []  # codes stay as they are
    export = partial(torch.export.export, model, (IDS,))  # a program would hold the table without the rows
    copies = partial(copy.deepcopy, model), partial(pickle.dumps, model)
    state = {name: x * 0 for name, x in resident.state_dict().items()}
    states = model.state_dict, partial(save_model, model, str(tmp_path / "model.safetensors"))
    states += (partial(model.load_state_dict, state, strict=False),)
    for fault in (partial(model.to, "meta"), *copies, export, *casts, *states):
        with pytest.raises(ValueError, match=r"offloaded experts cannot be .* part of a state_dict: needs a model"):
            fault()
    assert torch.equal(model(IDS), resident(IDS))
    weights = [each for each in model.modules() if isinstance(each, OffloadedWeight)]
    assert all(torch.equal(each.data, each._table()) for each in weights)
    model = random_model(num_hidden_layers=2, on_host=((), (3,)))  # the first layer could be converted
    want = model(IDS % 23)
    with pytest.raises(ValueError, match="offloaded experts cannot be"):
        model.half()
    assert torch.equal(model(IDS % 23), want)


@needs_proc
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_host_memory_is_private_and_asks_for_huge_pages(device: str, gpu: Any) -> None:
    """That which is pinned stays out of child processes (`dc`): Linux would copy all of it into each."""
    host = _pinned((1 << 22,), torch.uint8, torch.device(device))
    mapped, at = Path("/proc/self/smaps").read_text(), host.data_ptr()
    ranges = re.findall(r"^(\w+)-(\w+) (\S+) .*?^VmFlags: (.*?)$", mapped, re.MULTILINE | re.DOTALL)
    ((mode, flags),) = ((mode, flags) for low, high, mode, flags in ranges if int(low, 16) <= at < int(high, 16))
    assert mode == "rw-p" and "hg" in flags.split() and ("dc" in flags.split()) == (device == "cuda")
