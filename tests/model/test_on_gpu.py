"""What a simulated GPU cannot show of launches and captures."""

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from mixtral_triton import Mixtral
from mixtral_triton.bench.decode_step import STEP, decode_step, inputs, replayed_step
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.kernels.operation import plan
from mixtral_triton.model import cuda_graph, memory_plan
from tests.support.models import cache_of, random_model, tokens

pytestmark = pytest.mark.gpu
Repeat = Callable[[Callable[[], Any], int], torch.Tensor]


@pytest.fixture
def decode() -> tuple[dict[str, Any], Repeat]:
    """The arguments of a decode step in bf16; and a function that repeats a step from the same cache and returns all
    logits [steps,B,V]."""
    with torch.no_grad(), torch.device("cuda"):
        args = inputs(STEP.test_shapes[0], torch.bfloat16, "cuda", torch.Generator("cuda").manual_seed(0))
        buffers = [*args["cache"].keys, *args["cache"].values]
        kept = [buffer.clone() for buffer in buffers]

    @torch.no_grad()
    def repeat(step: Callable[[], Any], steps: int) -> torch.Tensor:
        args["cache"].lengths.fill_(args["cache"].slots - 1)
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)
        return torch.stack([step().clone() for _ in range(steps)])

    return args, repeat


def test_dependent_launches_give_the_bits_of_ordinary_ones(decode: tuple[dict[str, Any], Repeat]) -> None:
    args, repeat = decode
    replays = 3 if "stub" in torch.cuda.get_device_name() else 1000
    dependent = repeat(replayed_step(args), replays)
    with mock.patch("mixtral_triton.model.model.pdl_region", nullcontext):
        assert torch.equal(dependent, repeat(replayed_step(args), replays))


def test_plans_give_the_bits_of_operations(decode: tuple[dict[str, Any], Repeat]) -> None:
    args, repeat = decode
    planned = repeat(partial(decode_step, **args), 3)
    with mock.patch.object(plan, "run", lambda op, args, key=None: op.run(*args)):
        assert torch.equal(planned, repeat(partial(decode_step, **args), 3))


def test_a_captured_step_is_one_chain(decode: tuple[dict[str, Any], Repeat], tmp_path: Path) -> None:
    args, repeat = decode
    repeat(partial(decode_step, **args), 1)
    with torch.no_grad():
        replay: Any = cuda_graph.capture(partial(decode_step, **args), None, args["model"].device)
    replay.graph.debug_dump(str(tmp_path / "step.dot"))
    text = (tmp_path / "step.dot").read_text()
    nodes = set(re.findall(r'"(graph_\d+_node_\d+)"', text))
    assert text.count("->") == len(nodes) - 1 > 0


def test_two_threads_generate_what_each_generates_alone(decode: tuple[dict[str, Any], Repeat]) -> None:
    args, _ = decode

    def text(temperature: float) -> list[int]:
        with torch.cuda.stream(torch.cuda.Stream()):
            drawn = torch.Generator("cuda").manual_seed(0)
            return args["model"].generate(args["token"], 64, temperature, generator=drawn).tolist()

    torch.cuda.synchronize()
    alone = [text(0.0), text(1.0)]
    with ThreadPoolExecutor(2) as pool:
        assert all(list(pool.map(text, (0.0, 1.0))) == alone for _ in range(10))


def test_a_capture_that_fails_on_the_caller_s_stream_leaves_torch_usable() -> None:
    x, drawn = torch.zeros(1, device="cuda"), torch.Generator("cuda").manual_seed(0)
    cuda_graph.capture(x.zero_, drawn, x.device)
    with torch.cuda.stream(cuda_graph._streams[torch.cuda.current_device()]):
        with pytest.raises(RuntimeError) as error:
            cuda_graph.capture(lambda: int(x.zero_()), drawn, x.device)
        assert not isinstance(error.value, cuda_graph.CaptureLost)
        x.exponential_(generator=drawn)
        torch.zeros(8).pin_memory()
        torch.cuda.empty_cache()
        cuda_graph.capture(x.zero_, drawn, x.device)()
        assert float(x) == 0.0


@pytest.mark.parametrize("weights", [None, "int4", "int8", "fp8"])
def test_experts_in_host_memory_give_the_bits_of_resident_ones(weights: str | None) -> None:
    """Chunks, whose experts are copied beside the kernels, again and again; and a captured decode step. With "auto" the
    embedding is there, too."""
    found, simulated = [], "stub" in torch.cuda.get_device_name()  # which is slow
    ids, repeats, new = (torch.arange(3, 83), 1, 4) if simulated else (torch.arange(3, 203), 50, 64)
    ids = ids.to("cuda")[None]
    for offload in (0, 3, "auto"):
        with mock.patch.object(memory_plan, "available_bytes", return_value=1):
            model = Mixtral.from_pretrained(SMALL, "cuda", weights=weights, offload=offload)
        logits = model(ids)
        assert all(torch.equal(model(ids), logits) for _ in range(repeats))
        found.append((logits, model.generate(ids, new)))
    assert hasattr(model.embed_tokens, "memory") and all(map(torch.equal, found[0], found[1]))
    assert all(map(torch.equal, found[0], found[2]))


@pytest.mark.parametrize("T", (1, 3))
def test_forward_in_a_cuda_graph(T: int) -> None:
    model = random_model("cuda", sliding_window=5)
    ids, held = tokens(2, T).cuda(), cache_of(model, 2)
    model(ids, cache=held)  # compiles
    held.lengths.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = model(ids, cache=held)
    cache, chunk = cache_of(model, 2), ids.clone()
    for step in range(4):
        ids.copy_((chunk + step) % 23)
        graph.replay()
        assert torch.equal(logits, model(ids, cache=cache))
    ids[1, 0] = 23
    graph.replay()
    assert logits[1].isnan().all() and logits[0].isfinite().all()
