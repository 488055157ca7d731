"""Models with experts in host memory on a simulated GPU: remembered launches, graphs, and the order of copies.

The simulated GPU completes all work at once; `gpu.work` knows which order streams and events impose.
"""

import gc
import math
import os
import threading
import weakref
from importlib import import_module
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.bench.fit import memory_need
from mixtral_triton.checkpoint import tensors as checkpoint
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.kernels.operation import plan
from mixtral_triton.kernels.weights import offload
from mixtral_triton.kernels.weights.offload import OffloadedWeight
from mixtral_triton.model import generate, memory_plan
from mixtral_triton.model.memory_plan import MARGIN, Placement, movable_bytes
from tests.cli.commands import run
from tests.support.models import random_model, tokens
from tests.support.stub.gpu import Stream
from tests.support.stub.tensors import Factories

GPU_DEVICE = torch.device("cuda", 0)
LAYERS, CHUNK = 4, 80  # tokens: more than decode takes
INT4: dict[str, Any] = {"weights": "int4", "hidden_size": 32, "intermediate_size": 32}
UNEVEN = ((0, 1, 3), (), (2,), (1, 3))


def prefill(gpu: Any, chunks: int = 1, on_host: Any = (1, 3)) -> Mixtral:
    gpu.driver.executes = False
    model = random_model(GPU_DEVICE, num_hidden_layers=LAYERS, on_host=on_host, max_position_embeddings=512)
    cache = KVCache(model.config, 1, chunks * CHUNK, GPU_DEVICE, model.dtype)
    gpu.work.clear()
    with gpu.no_syncs():
        for _ in range(chunks):
            model(tokens(1, CHUNK, device=GPU_DEVICE), cache=cache)
    return model


def hosts(model: Mixtral) -> dict[int, int]:
    """The layer of each buffer in host memory, by its address."""
    weights = [(index, weight) for index, layer in enumerate(model.layers) for weight in layer.children()]
    return {weight.host.data_ptr(): index for index, weight in weights if isinstance(weight, OffloadedWeight)}


def check_order(gpu: Any, model: Mixtral) -> None:
    """Each kernel reads its own layer's rows, after they have arrived and before their buffer is filled again."""
    layers, written, read = hosts(model), {}, dict[int, list[Any]]()
    offloaded = sorted({*layers.values()})
    readers = dict.fromkeys(("experts_up_kernel", "experts_down_kernel"), 0)
    for work in gpu.work:
        if isinstance(work.what, tuple):
            target, source, size = work.what
            if source in layers:
                assert all(reader.precedes(work) for reader in read.pop(target, [])), "overwritten while it is read"
                written[target] = work, layers[source], size
        elif work.what.kernel in readers:
            weight = work.what.args["gate_up" if work.what.kernel == "experts_up_kernel" else "down"].ptr
            table = weight.held.tolist()
            if weight.dtype != torch.int64:  # a layer without any
                continue
            here = offloaded[readers[work.what.kernel] % len(offloaded)]
            on_host = model.layers[here].down_proj.on_host
            copy, layer, size = written[table[on_host[0]]]
            rows = [table[expert] - table[on_host[0]] for expert in on_host]
            assert rows == [*range(0, size, size // len(on_host))], "not where the experts were copied to"
            assert copy.precedes(work), "read before it has arrived"
            assert layer == here, "another layer's rows"
            readers[work.what.kernel] += 1
            read.setdefault(table[on_host[0]], []).append(work)
    assert len(set(readers.values())) == 1 and readers["experts_up_kernel"] % len(offloaded) == 0


def copies(gpu: Any, model: Mixtral) -> list[Any]:
    known = hosts(model)
    return [work for work in gpu.work if isinstance(work.what, tuple) and work.what[1] in known]


@pytest.mark.parametrize("on_host", [(1, 3), UNEVEN], ids=["even", "uneven"])
def test_prefill_copies_each_expert_once_a_chunk_in_order(on_host: Any, gpu: Any) -> None:
    """On a stream that is not the kernels', into a buffer for each projection, without a synchronization; it is as
    large as the layer with the most experts needs."""
    model = prefill(gpu, 2, on_host)
    check_order(gpu, model)
    found = copies(gpu, model)
    assert sorted(work.what[1] for work in found) == sorted(2 * [*hosts(model)])
    assert len({work.what[0] for work in found}) == 2
    buffers = [layer for layer in model.layers if isinstance(layer.down_proj, OffloadedWeight)]
    staged = {each._staging.nbytes for layer in buffers for each in (layer.gate_up_proj, layer.down_proj)}
    experts = [on_host] * LAYERS if on_host == (1, 3) else on_host
    sizes = movable_bytes(model.config, parameter_shapes(model.config), {}, model.dtype)[0]
    assert sum(staged) == Placement.of(experts, sizes).staging_bytes
    kernels = {launch.stream for launch in gpu.driver.launches}
    assert len(kernels) == 1 and not kernels & {work.stream for work in found}


def test_rows_that_the_host_wrote_are_copied_again(gpu: Any) -> None:
    """The copy of the next weight begins before its turn, and the host may write it in between."""
    model = random_model(GPU_DEVICE, num_hidden_layers=1, on_host=(1, 3))
    weight, counts = model.layers[0].down_proj, []
    for written in (False, False, True, False):
        if written:
            weight.host.mul_(2.0)
        gpu.work.clear()
        buffer = weight._staging.begin(weight, torch.cuda.current_stream(GPU_DEVICE))
        counts.append(len(copies(gpu, model)))
        rows = buffer.memory[: weight.host.nbytes].view(weight.dtype).view(weight.host.shape)
        assert torch.equal(rows.cpu(), weight.host.cpu())
    assert counts == [1, 0, 1, 0]


def test_one_projection_is_copied_while_the_other_computes(gpu: Any) -> None:
    model = prefill(gpu)
    kernels = [getattr(work.what, "kernel", "") for work in gpu.work]
    pairs, names = [*zip(gpu.work, kernels, strict=True)], ("experts_up_kernel", "experts_down_kernel")
    up, down = ([work for work, kernel in pairs if kernel == name] for name in names)
    gate_up = {layer.gate_up_proj.host.data_ptr() for layer in model.layers}
    for work in copies(gpu, model):
        layer, is_up = hosts(model)[work.what[1]], work.what[1] in gate_up
        hides = (down[layer - 1] if layer else None) if is_up else up[layer]
        assert hides is None or not hides.precedes(work), "the copy waits for the kernel that could hide it"
        assert layer == 0 or (up if is_up else down)[layer - 1].precedes(work)


@pytest.mark.parametrize("fault", ["wait_event", "wait_stream", "one buffer"])
def test_injected_fault_in_the_order_of_copies(fault: str, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait, or one buffer: the next layer's rows arrive where this layer's kernel reads."""
    if fault == "one buffer":
        stage = OffloadedWeight.stage_in_turn

        def by_projection(weights: Any) -> None:
            stage(weights)
            for weight, next_weight in zip(weights, weights[2:], strict=False):
                weight._next_weight = weakref.ref(next_weight)

        monkeypatch.setattr(OffloadedWeight, "stage_in_turn", by_projection)
    else:
        monkeypatch.setattr(Stream, fault, lambda *args: None)
    model = prefill(gpu, chunks=2)
    with pytest.raises(AssertionError, match="overwritten" if fault == "wait_stream" else "read before"):
        check_order(gpu, model)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{}, {"deterministic": True}, INT4], ids=["dense", "deterministic", "int4"])
def test_same_tokens_in_graph_replays(sizes: dict[str, Any], gpu: Any) -> None:
    """Prompts beyond decode's tokens, then a captured step: routes change in the replays, and so do the rows read."""
    texts = []
    for on_host, embedding in (((), False), ((0, 2), False), (((), (0, 2)), True)):
        sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 128, "on_host": on_host}
        model = random_model(GPU_DEVICE, **sizes, embedding=embedding)
        gpu.replays = 0
        texts.append(model.generate(tokens(1, 70, device=GPU_DEVICE), 8).tolist())
        assert gpu.replays == 6
    assert texts[0] == texts[1] == texts[2]


@pytest.mark.slow
def test_generate_places_what_the_memory_lacks(gpu: Any) -> None:
    """Memory that three experts of all layers are too much for: they and the embedding are in host memory."""
    config, each = Mixtral.from_pretrained(SMALL, "meta").config, 3 * 128 * 256 * 2
    weights = memory_need(config, {}, 1, 64)
    embedding, texts = config.vocab_size * config.hidden_size * 2, []
    lacks = weights["total"] - embedding - 2 * each  # three experts free two, since the buffers hold one of a layer
    for room in (weights["total"], lacks):
        gpu.properties.total_memory = math.ceil(room / (1 - MARGIN)) + 1
        texts.append(run("generate --prompt 'The return' --max-new-tokens 2 --context 64 --offload auto"))
    assert len({text[:2] for text in texts}) == 1 and texts[0][0] == 0
    assert "offload='auto': 0 of 32 experts in host memory (0.0 MB)" in texts[0][2]
    assert "offload='auto': 3 of 32 experts and the embedding in host memory (1.1 MB)\n" in texts[1][2]


def test_the_embedding_in_host_memory_is_an_ordinary_tensor(gpu: Any) -> None:
    model = random_model(GPU_DEVICE, embedding=True)
    table = model.embed_tokens
    assert table.device == GPU_DEVICE and gpu.pinned == {table.data_ptr(): table.nbytes}
    want = random_model().state_dict()
    assert all(torch.equal(value.cpu(), want[name]) for name, value in model.state_dict().items())
    model.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert torch.equal(table.cpu(), want["embed_tokens"] + 1) and gpu.pinned == {table.data_ptr(): table.nbytes}
    with pytest.raises(RuntimeError, match="not registered with any CUDA device"), mock.patch.object(gpu, "pinned", {}):
        random_model(GPU_DEVICE, embedding=True)
    del model, table
    gc.collect()
    assert not gpu.pinned


def test_decode_copies_nothing_and_waits_for_nothing(gpu: Any) -> None:
    gpu.driver.executes, launched = False, []
    for count in (0, 2):
        model = Mixtral.from_pretrained(SMALL, GPU_DEVICE, offload=count)
        cache, ids = KVCache(model.config, 1, 64, GPU_DEVICE, model.dtype), tokens(1, 1, device=GPU_DEVICE)
        model(ids, cache=cache)
        gpu.work.clear()
        with gpu.no_syncs(), mock.patch.object(plan, "_run_and_record", side_effect=AssertionError("no plan")):
            model(ids, cache=cache)
        launched.append([getattr(work.what, "kernel", "a copy") for work in gpu.work])
    assert launched[0] == launched[1] and "a copy" not in launched[1] and len(launched[1]) <= 8 * 4 + 3


@pytest.mark.slow
def test_host_memory_is_pinned_at_its_size_and_returned(gpu: Any) -> None:
    model = Mixtral.from_pretrained(SMALL, GPU_DEVICE, offload=3)
    weights = [each for layer in model.layers for each in (layer.gate_up_proj, layer.down_proj)]
    assert gpu.pinned == {each.host.data_ptr(): each.host.nbytes for each in weights}
    assert sum(gpu.pinned.values()) == 3 * 4 * 3 * 128 * 256 * 2
    gpu.pinned_most = 1.5 * sum(gpu.pinned.values())
    with pytest.raises(ValueError, match=r"cannot be pinned \(CUDA error 2\): needs fewer offloaded experts"):
        Mixtral.from_pretrained(SMALL, GPU_DEVICE, offload=3)
    gc.collect()
    assert len(gpu.pinned) == len(weights)
    gpu.pinned_most *= 2
    assert Mixtral.from_pretrained(SMALL, GPU_DEVICE, offload=1)  # the advice can be followed in this process
    gc.collect()
    assert len(gpu.pinned) == len(weights)
    del model, weights
    gc.collect()
    assert not gpu.pinned


PLACES = {"cache": (generate, "KVCache"), "prefill": (generate, "prefill"), "step": (generate.Step, "__call__")}
PLACES |= {"score": (import_module("mixtral_triton.model.score"), "run_chunks")}


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_names_the_command_that_knows_what_fits(place: str, gpu: Any, monkeypatch: Any) -> None:
    gpu.driver.executes = False
    T, new, model = 20, 0 if place == "score" else 8, random_model(GPU_DEVICE)
    monkeypatch.setattr(*PLACES[place], mock.Mock(side_effect=torch.OutOfMemoryError("Tried 2 GiB.\nOf 80 GiB")))
    text, left = tokens(2, T, device=GPU_DEVICE), "no memory is left on cuda:0 for 2 sequences of"
    with pytest.raises(
        ValueError, match=rf"^\w+: {left} {T + new} tokens \(Tried 2 GiB\.\), needs .*`mixtral-triton fit`"
    ):
        model.score(text) if place == "score" else model.generate(text, new)
    assert not gpu.captures


def test_embedding_in_host_memory_is_loaded_by_the_host(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device address of what is registered is the host's, to which no copy to a device leads."""
    fill, destinations = checkpoint._fill, {}

    def recorded(part: Any, name: str, stored: Any, target: Any, destination: Any, *rest: Any) -> None:
        destinations[target.parameter] = destination.device.type
        fill(part, name, stored, target, destination, *rest)

    monkeypatch.setattr(checkpoint, "_fill", recorded)
    monkeypatch.setattr(memory_plan, "available_bytes", lambda *args: 1)
    with pytest.warns(UserWarning, match="and the embedding in host memory"):
        model = Mixtral.from_pretrained(SMALL, GPU_DEVICE, offload="auto")
    assert destinations["embed_tokens"] == "cpu" and destinations["norm"] == "cuda" and model.embed_tokens.is_cuda
    assert torch.equal(model.embed_tokens.cpu(), Mixtral.from_pretrained(SMALL, "cpu").embed_tokens)


@pytest.mark.parametrize("hip", [None, "6.4"])
def test_memory_at_another_address_is_refused(hip: Any, gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    gpu.mapped_at = 1 << 12
    with pytest.raises(ValueError, match="offload: cuda:0 cannot read pinned memory at its host address, needs"):
        offload.empty_on_host((4, 8), torch.bfloat16, GPU_DEVICE)


@pytest.mark.slow
def test_capture_of_a_large_batch_has_memory_of_its_own(gpu: Any) -> None:
    """More sequences than decode takes: a replay copies the experts again, into the graph's memory."""
    texts, prompts = [], list(tokens(65, 1, device=GPU_DEVICE))
    for on_host in ((), (0, 2)):
        model = random_model(GPU_DEVICE, on_host=on_host)
        texts.append([text.tolist() for text in model.generate(prompts, 6)])
    assert texts[0] == texts[1] and gpu.replays == 8


def test_threads_and_streams_share_no_buffer(gpu: Any) -> None:
    gpu.driver.executes = False
    weight = random_model(GPU_DEVICE, on_host=(1,)).layers[0].down_proj
    found: list[Any] = [weight.data_for_many_rows().memories[1]]
    with torch.cuda.stream(torch.cuda.Stream()):
        found.append(weight.data_for_many_rows().memories[1])

    def stage() -> None:
        with Factories():  # a mode is a thread's own
            found.append(weight.data_for_many_rows().memories[1])

    thread = threading.Thread(target=stage)
    thread.start()
    thread.join()
    assert len({rows.data_ptr() for rows in found}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("inference", [False, True])
def test_prefill_of_a_model_loaded_in_inference_mode(inference: bool, gpu: Any) -> None:
    """Its tensors have no version counter."""
    with torch.inference_mode():
        model = random_model(GPU_DEVICE, on_host=(0, 2), max_position_embeddings=128)
    ids, resident = tokens(1, 70, device=GPU_DEVICE), random_model(GPU_DEVICE, max_position_embeddings=128)
    with torch.inference_mode(inference):
        got = model(ids).to("cpu")
    assert torch.equal(got, resident(ids).to("cpu"))


def test_staging_buffers_of_earlier_streams_are_freed(gpu: Any) -> None:
    gpu.driver.executes = False
    weight = random_model(GPU_DEVICE, on_host=(1,)).layers[0].down_proj
    rows = []
    for stream in [torch.cuda.Stream() for _ in range(6)]:
        with torch.cuda.stream(stream):
            rows += [weakref.ref(weight.data_for_many_rows().memories[1]) for _ in range(2)]
        gpu.work.clear()
    gc.collect()
    assert len(weight._staging.buffers) == 2 and len({id(x) for ref in rows if (x := ref()) is not None}) <= 4


def test_memory_is_returned_though_a_capture_forbids_to_wait() -> None:
    returned: list[int] = []

    def forbidden(device: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="not permitted"):
        offload._unpin(returned.append, 1234, forbidden, GPU_DEVICE, mock.Mock())
    assert returned == [1234]


def test_a_forked_child_has_experts_of_its_own() -> None:
    weight = random_model(on_host=(1,)).layers[0].down_proj
    before = weight.host.clone()
    if (child := os.fork()) == 0:
        weight.host.zero_()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0 and torch.equal(weight.host, before)
