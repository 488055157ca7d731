"""The decode loop as a graph. Without a GPU, tests/support/stub captures: what it captured does not run, and a replay
runs the same operations and launches on the same memory."""

import gc
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral
from mixtral_triton.checkpoint.shard import UNSHARDED
from mixtral_triton.model import generate
from mixtral_triton.model.cuda_graph import CaptureLost, capture
from mixtral_triton.model.layer import Layer
from mixtral_triton.model.model import Model, _method_names
from tests.support.models import cache_of, random_model, tokens

V, NEW = 23, 8
GPU_DEVICE = torch.device("cuda", 1)  # not the current one
QUANTIZED = {"weights": {"experts": "int4", "linear": "int8"}, "hidden_size": 32, "intermediate_size": 32}


def build(window: int | None, device: torch.device | str) -> Mixtral:
    return random_model(device, sliding_window=window)


def prompts(device: torch.device | str) -> list[torch.Tensor]:
    return [torch.tensor(ids, device=device) for ids in ([3, 5, 7, 1, 2, 2], [4], [2, 9, 11])]


def texts(model: Mixtral, **settings: Any) -> list[list[int]]:
    return [text.tolist() for text in model.generate(prompts(model.device), **settings)]


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "more", [{"sliding_window": None}, {"sliding_window": 5}, QUANTIZED], ids=["", "window", "int4"]
)
def test_replays_give_the_text_of_the_plain_loop(more: dict[str, Any], gpu: Any) -> None:
    """The ring wraps, positions grow and routes change, in the replays alone. The capture is on the model's GPU."""
    got = texts(random_model(GPU_DEVICE, **more), max_new_tokens=NEW)
    assert gpu.replays == NEW - 2
    (graph,) = gpu.captures
    assert graph.stream.device == GPU_DEVICE and graph.mode == "thread_local" and graph.size
    assert gpu.current == 0 and [stream.cuda_stream for stream in gpu.streams] == [0, 0]
    assert got == texts(random_model("cpu", **more), max_new_tokens=NEW)
    assert len({token for text in got for token in text[-NEW:]}) > 4  # else any frozen number would do


@pytest.mark.slow
def test_the_next_replay_is_launched_before_a_token_is_returned(gpu: Any) -> None:
    """The first step runs eagerly. A caller who stops early leaves a cache with the token that it has seen, too."""
    model, prompt = build(None, GPU_DEVICE), prompts(GPU_DEVICE)[:1]
    want, cache = model.generate(prompt, NEW)[0].tolist(), cache_of(model, 1, 20)
    gpu.replays = 0
    steps, replays = model.stream(prompt, NEW, cache=cache), []
    found = [*prompt[0].tolist()]
    for token in steps:
        found.append(int(token))
        replays.append(gpu.replays)
        if len(replays) == NEW - 2:
            steps.close()  # type: ignore[attr-defined]
    assert replays == [*range(NEW - 2)] and found == want[: len(found)]
    assert cache.lengths.tolist() == [len(found)] and cache.conversation.held_tokens(cache) == [found]
    assert model.generate([found], 2, cache=cache)[0].tolist() == want and cache.reused == [len(found) - 1]


@pytest.mark.slow
def test_replays_draw_new_tokens_and_take_the_top_k(gpu: Any) -> None:
    """The filter reads no value from the host."""
    model, drawn = build(None, GPU_DEVICE), torch.Generator(GPU_DEVICE).manual_seed(0)
    prompt, settings = [prompts(GPU_DEVICE)[0]], {"temperature": 50.0, "generator": drawn}
    text = model.generate(prompt, max_new_tokens=16, **settings)[0].tolist()
    assert gpu.replays == 14 and len(set(text[-14:])) > 6
    want = texts(build(None, "cpu"), max_new_tokens=NEW)
    assert texts(model, max_new_tokens=NEW, top_k=1, top_p=0.9, **settings) == want
    assert gpu.replays == 14 + NEW - 2


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 5])
def test_replays_go_on_in_a_cache_with_penalty_and_log_probabilities(window: int | None, gpu: Any) -> None:
    """Sequences end at different replays, replays with the last one; a second turn goes on where each stands."""
    settings: dict[str, Any] = {"max_new_tokens": NEW, "repetition_penalty": 1.4}
    plain = texts(build(window, "cpu"), **settings)
    assert plain != texts(build(window, "cpu"), max_new_tokens=NEW)
    settings |= {"eos_token_id": [text[at] for text, at in zip(plain, (-4, -6, -2), strict=True)], "logprobs": 2}
    found = []
    for device in ("cpu", GPU_DEVICE):
        model, turns, ids = build(window, device), list[Any](), prompts(device)
        cache = KVCache(model.config, len(ids), 40, device, model.dtype)
        for _ in range(2):
            held, replays = cache.lengths.tolist(), gpu.replays
            got = model.generate(ids, cache=cache, **settings)
            new = [len(text) - len(prompt) for text, prompt in zip(got.ids, ids, strict=True)]
            assert cache.reused == held and len({*new}) > 1 and max(new) < NEW
            assert device == "cpu" or gpu.replays - replays == max(new) - 2
            assert cache.lengths.tolist() == [len(text) - 1 for text in got.ids]
            turns += [[each.tolist() for each in part] for part in got[::2]]
            turns.append(torch.cat(got.logprobs).tolist())
            ids = [torch.cat((text, text[-3:])) for text in got.ids]
        found.append(turns)
    cpu, on_gpu = found
    assert cpu[::3] == on_gpu[::3] and cpu[1::3] == on_gpu[1::3]
    assert all(a == pytest.approx(b, abs=1e-4) for a, b in zip(cpu[2::3], on_gpu[2::3], strict=True))


def looks(step: Any) -> None:
    """A host that looks at a value: CUDA gives up the capture, and its end fails as well."""
    step()
    int(step.token[0])


def raises(step: Any) -> None:
    """A fault that CUDA does not see: the capture ends as it should, with half a step in it."""
    step.model.hidden(step.token[:, None], step.cache)
    raise RuntimeError("out of registers")


def synchronizes(step: Any) -> None:
    """Another thread synchronizes the device: CUDA gives up the capture, and the step does not notice."""
    step()
    with pytest.raises(RuntimeError, match="not permitted"):
        torch.cuda.synchronize()


FAILURES = [(looks, "not permitted"), (raises, "registers"), (synchronizes, "in another thread")]


@pytest.mark.slow
@pytest.mark.parametrize("callers_stream", [False, True])
@pytest.mark.parametrize(("fault", "said"), FAILURES)
def test_failed_capture_leaves_everything_usable(
    fault: Any, said: str, callers_stream: bool, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if callers_stream:  # torch hands out a stream again
        monkeypatch.setattr("tests.support.stub.gpu.POOL", 1)
        torch.cuda.set_stream(torch.cuda.Stream(GPU_DEVICE))
        torch.cuda.set_device(0)
    streams = [stream.cuda_stream for stream in gpu.streams]
    assert streams == [0, int(callers_stream)]
    model, drawn = build(5, GPU_DEVICE), torch.Generator(GPU_DEVICE)
    settings = {"max_new_tokens": NEW, "temperature": 1e-6, "generator": drawn}  # draws, and always the likeliest
    want = texts(build(5, "cpu"), max_new_tokens=NEW)
    monkeypatch.setattr(generate, "capture", lambda step, *rest: capture(lambda: fault(step), *rest))
    with pytest.warns(RuntimeWarning, match=f"without a CUDA graph.*({said})"):
        assert texts(model, **settings) == want
    assert gpu.replays == 0 and len(gpu.captures) == 2  # with dependent launches and without
    assert gpu.current == 0 and [stream.cuda_stream for stream in gpu.streams] == streams
    assert not gpu.pools and not gpu.host_pools
    monkeypatch.undo()
    assert texts(model, **settings) == want
    assert gpu.replays == NEW - 2


def is_dependent(graph: Any) -> bool:
    return any(each.launcher.metadata.launch_pdl for each in graph.launches)


REFUSED = [(is_dependent, ["capturing without dependent launches"], NEW - 3)]
REFUSED += [(lambda graph: True, ["capturing without dependent launches", "decoding without a CUDA graph"], 0)]


@pytest.mark.slow
@pytest.mark.parametrize(("refuses", "said", "replays"), REFUSED)
def test_graph_that_cannot_be_instantiated(refuses: Any, said: list[str], replays: int, gpu: Any) -> None:
    """A driver without programmatic edges, and one without memory: both fallbacks are tried, in order."""
    gpu.refuses, model, drawn = refuses, build(5, GPU_DEVICE), torch.Generator(GPU_DEVICE)
    want = texts(build(5, "cpu"), max_new_tokens=NEW)
    with pytest.warns(RuntimeWarning) as warned:
        assert texts(model, max_new_tokens=NEW, temperature=1e-6, generator=drawn) == want
    found = [str(each.message) for each in warned]
    assert len(found) == len(said) and all(
        f"generate: {a}, slower: CUDA" in b for a, b in zip(said, found, strict=True)
    )
    assert gpu.replays == replays and len(gpu.captures) == 2 and not gpu.pools and not gpu.host_pools
    gpu.refuses = lambda graph: False
    assert texts(model, max_new_tokens=NEW) == want and gpu.replays == replays + NEW - 2


def test_a_model_that_is_collected_during_a_step_does_not_end_its_capture(gpu: Any) -> None:
    """Its pinned memory is returned after a synchronization, which CUDA does not permit in a capture."""
    models, kept = [random_model(GPU_DEVICE, on_host=(1,))], list[Any]()

    def step() -> None:
        cycle: list[Any] = [models.pop()]  # new, so that a collection of the youngest objects finds it
        cycle.append(cycle)
        del cycle
        kept.extend([] for _ in range(3 * gc.get_threshold()[0]))  # more than start a collection
        assert gpu.pinned

    capture(step, None, GPU_DEVICE)
    assert gc.isenabled() and gpu.captures[-1].ended
    gc.collect()
    assert not gpu.pinned
    try:
        gc.disable()  # by a user, whose setting stays
        capture(lambda: None, None, GPU_DEVICE)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_graphs_that_live_together_share_no_memory(gpu: Any) -> None:
    gpu.driver.executes = False
    model = build(None, GPU_DEVICE)
    for _ in range(2):  # the second pair takes the first one's
        steps = [model.stream(prompts(GPU_DEVICE), NEW) for _ in range(2)]
        for _ in range(3):
            assert all(next(each) is not None for each in steps)
        first, second = (graph.memory_pool for graph in gpu.captures[-2:])
        assert first != second and len(gpu.pool_bytes) == 2
        for each in steps:
            each.close()  # type: ignore[attr-defined]
    pool_bytes = dict(gpu.pool_bytes)
    for _ in range(50):  # one after another, each takes the same pool
        model.generate(prompts(GPU_DEVICE), NEW)
    assert len(gpu.captures) == 54 and gpu.pool_bytes == pool_bytes
    capture(lambda: None, None, torch.device("cuda", 0))  # of another stream
    assert len({graph.memory_pool for graph in gpu.captures}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("where", ["capture", "instantiate"])
@pytest.mark.parametrize("frees", [True, False])
def test_a_capture_without_memory_takes_what_earlier_graphs_kept(
    frees: bool, where: str, gpu: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where that is too little, too, steps are launched, with a warning."""
    model, emptied = build(None, GPU_DEVICE), []
    want = texts(model, max_new_tokens=NEW)

    def empty_cache() -> None:
        emptied.append(dict(gpu.pool_bytes))
        if frees:
            gpu.pool_bytes_most, gpu.refuses = 1 << 40, lambda graph: False

    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    if where == "capture":
        gpu.pool_bytes_most = sum(gpu.pool_bytes.values()) - 1 if frees else 0
    else:
        gpu.refuses = lambda graph: 2
    gpu.replays = 0
    message = "decoding without a CUDA graph, slower: .*out of memory"
    with nullcontext() if frees else pytest.warns(RuntimeWarning, match=message):
        assert texts(model, max_new_tokens=NEW) == want
    assert emptied[0] == {} and gpu.replays == (NEW - 2) * frees
    assert len(gpu.pool_bytes) == 1 if frees else not any(gpu.pool_bytes.values())


# A mesh of one rank: its collectives are copies, which a graph holds.
ONE_RANK = SimpleNamespace(
    shard=UNSHARDED,
    local_ids=lambda ids, experts: ids,
    all_reduce=lambda part, in_order: part.clone(),
    all_gather=lambda part, size: part.clone(),
    broadcast=torch.clone,
    synchronize=lambda device: None,
)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["its end", "close", "collection"])
def test_the_end_of_a_stream_resets_its_graph(end: str, gpu: Any) -> None:
    """`destroy_process_group` waits for a graph with collectives, which an exception's traceback may keep alive."""
    steps = []
    for device in (torch.device("cuda", 0), GPU_DEVICE):
        model: Any = build(None, device)
        model.ranks = ONE_RANK
        steps.append(model.stream(prompts(device), NEW, eos_token_id=[]))
    for _ in range(3):
        assert all(next(each) is not None for each in steps)
    assert len(gpu.captures) == 2 and all(graph.ended for graph in gpu.captures)
    if end == "its end":
        assert [len(list(each)) for each in steps] == [NEW - 3] * 2
    elif end == "close":
        for each in steps:
            each.close()  # type: ignore[attr-defined]
    steps.clear()
    each = None
    assert not any(graph.ended for graph in gpu.captures)


def test_captures_take_turns_on_one_stream_a_device(gpu: Any) -> None:
    """A capture on a stream of its own that synchronizes first, as torch's does, would end the other thread's."""
    threads, began = [], threading.Event()

    def step() -> None:
        threads.append(threading.Thread(target=lambda: capture(began.set, None, GPU_DEVICE)))
        threads[0].start()
        assert not began.wait(0.3)

    capture(step, None, GPU_DEVICE)
    threads[0].join()
    capture(lambda: None, None, torch.device("cuda", 0))
    assert began.is_set() and all(graph.valid and graph.ended for graph in gpu.captures) and not gpu.syncs
    first, second, other = (graph.stream for graph in gpu.captures)
    assert first == second != other


def test_a_capture_that_cannot_be_put_right_says_what_is_lost(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "capture", lambda step, *rest: capture(lambda: looks(step), *rest))
    monkeypatch.setattr(
        "mixtral_triton.model.cuda_graph._call_runtime", lambda *args: None
    )  # no empty one in its place
    with pytest.raises(CaptureLost, match=r"cuda:1 is still in it: memory .* is lost.*Restart the process"):
        texts(build(None, GPU_DEVICE), max_new_tokens=NEW)


def double(called: list[Any]) -> Any:
    """Double the output of layer 0 from a caller's fifth call on."""
    return lambda out: (called.append(0), (out[0] * (1 + (len(called) > 4)), out[1]))[1]


def change_layer(model: Mixtral, change: str, called: list[Any]) -> Any:
    """Let a caller's code run in layer 0, in one of the manners that torch has for it."""
    layer, edit = model.layers[0], double(called)
    if change == "hook":
        return layer.register_forward_hook(lambda module, args, out: edit(out))
    if change == "hook of all modules":
        run = torch.nn.modules.module.register_module_forward_hook
        return run(lambda module, args, out: edit(out) if module is layer else None)
    if change == "subclass":
        layer.__class__ = type("Doubled", (Layer,), {"forward": lambda self, *args: edit(Layer.forward(self, *args))})
    else:
        method = getattr(layer, change)
        setattr(layer, change, lambda *args: edit(method(*args)))
    return None


@pytest.mark.slow
@pytest.mark.parametrize("change", ["hook", "hook of all modules", "forward", "experts", "subclass"])
def test_no_capture_and_no_pdl_where_a_layer_is_changed(change: str, gpu: Any) -> None:
    found: list[Any] = []
    for device in ("cpu", GPU_DEVICE):
        model, called = build(5, device), list[Any]()
        handle, start = change_layer(model, change, called), len(gpu.driver.launches)
        try:
            warning = pytest.warns(RuntimeWarning, match="without a CUDA graph.*(layer 0|all modules)")
            with warning if found else nullcontext():
                found.append((texts(model, max_new_tokens=NEW), len(called)))
        finally:
            if handle is not None:
                handle.remove()
        assert not any(each.launcher.metadata.launch_pdl for each in gpu.driver.launches[start:])
    assert found[0] == found[1] and gpu.replays == 0
    if handle is not None:  # the hook is removed
        texts(model, max_new_tokens=NEW)
        assert any(each.launcher.metadata.launch_pdl for each in gpu.driver.launches[start:])


@pytest.mark.compiled
def test_every_method_that_an_instance_replaces_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that a contributor adds to a class included, and `generate`, which runs around the steps, excluded."""
    model = build(None, "cpu")
    for kind in (Model, Layer):
        monkeypatch.setattr(kind, "scale", lambda self, out: out, raising=False)
    _method_names.cache_clear()
    model.generate = model.stream = print  # type: ignore[assignment]
    assert model.find_change() is None
    for module, where in ((model, "the model"), (model.layers[0], "layer 0")):
        for name in ("scale", "forward", "_call_impl", "_compiled_call_impl"):
            module.__dict__[name] = print
            assert where in str(model.find_change())
            del module.__dict__[name]
    handle = model.layers[0].register_forward_pre_hook(print)
    assert "layer 0" in str(model.find_change())
    handle.remove()
    model.layers[0].compile()
    assert "layer 0" in str(model.find_change())


@pytest.mark.slow
@pytest.mark.compiled
def test_forward_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    model, ids = build(None, "cpu"), tokens(2, 12)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    held = [cache_of(model, 2), cache_of(model, 2)]
    with torch.no_grad():
        assert torch.allclose(compiled(ids), model(ids), atol=1e-5)
        for chunk, lengths in ((ids[:, :5], torch.tensor([2, 5])), *((ids[:, t : t + 1], None) for t in range(3))):
            got, want = (f(chunk, c, lengths) for f, c in zip((compiled, model), held, strict=True))
            assert torch.allclose(got, want, atol=1e-5)
        before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        for t in range(3):
            compiled(ids[:, t : t + 1], held[0])
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before
        assert held[0].lengths.tolist() == [8, 11]
        for dtype in (model.dtype, torch.int8):  # of another batch sizes are symbols of the compiler
            ids, held = tokens(3, 9), [KVCache(model.config, 3, 12, "cpu", dtype) for _ in range(2)]
            for chunk in ids.split((3, 4, 1, 1), 1):
                got, want = (f(chunk, c) for f, c in zip((compiled, model), held, strict=True))
                assert torch.allclose(got, want, atol=1e-5)
