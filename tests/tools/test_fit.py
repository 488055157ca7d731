"""fit: its bytes beside independent arithmetic and what the code allocates; its command, GPUs and offloaded experts."""

import json
import math
import re
from bisect import bisect_left
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from mixtral_triton import KVCache, Mixtral, MixtralConfig
from mixtral_triton.bench.fit import KNOWN, MemoryPlan, Request, format_specs, memory_need, parameters
from mixtral_triton.bench.fit import WEIGHT_FORMATS as FORMATS
from mixtral_triton.bench.gpus import GPU, GPUS, LINKS, MIB, parse_gpu
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.cli import commands
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.model import memory_plan
from mixtral_triton.model.cache import cache_bytes
from mixtral_triton.model.generate import prefill, sample
from mixtral_triton.model.memory_plan import (
    GRAPH_BYTES,
    LOGIT_BYTES,
    MARGIN,
    estimated_free,
    table_bytes,
    usable_bytes,
    workspace_bytes,
)
from mixtral_triton.quantize import select_specs
from tests.cli.commands import error_line, output, run, run_json
from tests.support import hub
from tests.support.memory import LiveBytes

pytestmark = pytest.mark.compiled
SMALLER, LARGER = KNOWN["mixtral-8x7b"], KNOWN["mixtral-8x22b"]
BF16 = torch.bfloat16
GB = 10**9


def specs(config: MixtralConfig, weights: Any) -> Any:
    return select_specs(weights, parameter_shapes(config))


def size(config: MixtralConfig, weights: Any) -> int:
    return memory_need(config, specs(config, weights), 1, 1)["weights"]


INT4 = specs(SMALLER, "int4")


def plan(config: MixtralConfig, specs: Any, mib: int, batch: int, context: int) -> MemoryPlan:
    request = Request("", config, {"as stored": specs}, batch, context)
    return request.memory_plan("as stored", GPU("", "", mib))


def test_the_published_counts_and_sizes() -> None:
    assert parameters(SMALLER) == (46_702_792_704, 12_879_925_248)
    # Published with 32,000 words: 768 more in the embedding, and as many in the head.
    assert parameters(LARGER)[0] == 140_620_634_112 + 2 * 768 * 6144
    assert parameters(KNOWN["qwen3-30b-a3b"])[0] == 30_532_122_624
    for config, want in ((SMALLER, [93.4, 48.3, 48.3, 26.5]), (LARGER, [281.3, 146.0, 146.0, 80.4])):
        sizes = [size(config, FORMATS[name]) / GB for name in ("as stored", "fp8", "int8", "int4")]
        assert [round(one, 1) for one in sizes] == want


def test_a_tied_head_is_not_quantized_and_columns_that_are_no_whole_unit_are_padded() -> None:
    """The head is the embedding, whose rows are read one at a time."""
    tied = replace(SMALLER, tie_word_embeddings=True)
    assert size(SMALLER, None) - size(tied, None) == 2 * 32000 * 4096
    gone = size(SMALLER, {"linear": "int8"}) - size(tied, {"linear": "int8"})
    assert gone == 32000 * 4096 + 4 * 32000
    config = replace(MixtralConfig.from_pretrained(SMALL), hidden_size=208, intermediate_size=333)
    assert list(format_specs(config)) == ["as stored", "fp8", "int8"]  # int4 has no group that divides the columns
    padded = 4 * 8 * (2 * 333 * 256 + 208 * 384) + 4 * 4 * 8 * (2 * 333 + 208)
    dense = 4 * 8 * (2 * 333 * 208 + 208 * 333)
    assert size(config, "int8") - size(config, None) == padded - 2 * dense


@pytest.mark.parametrize("weights", FORMATS.values(), ids=FORMATS)
def test_weights_are_the_bytes_of_the_loaded_model(weights: Any) -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu", weights=weights)
    held = {x.data_ptr(): x.nbytes for x in (*model.parameters(), *model.buffers()) if x.dtype != torch.float32}
    scales = sum(x.nbytes for x in model.buffers() if x.dtype == torch.float32) - model.cos.nbytes - model.sin.nbytes
    assert size(model.config, weights) == sum(held.values()) + scales


def test_cache_bytes_are_those_of_a_kv_cache() -> None:
    assert cache_bytes(SMALLER, 1, 1, torch.bfloat16) == 128 * 1024
    for config in (SMALLER, replace(SMALLER, sliding_window=4096)):
        for dtype in (torch.bfloat16, torch.int8):
            cache = KVCache(config, 3, 5000, "meta", dtype)
            assert cache_bytes(config, 3, 5000, dtype) == sum(x.nbytes for x in (*cache.keys, *cache.values))
    tables = Mixtral(replace(SMALLER, num_hidden_layers=1), "meta")
    assert table_bytes(SMALLER) == tables.cos.nbytes + tables.sin.nbytes


def most_alive(
    config: MixtralConfig, batch: int, context: int, weights: Any = None, chunk: int = 2048, activations: Any = None
) -> int:
    """What `generate` takes at most while it reads prompts, beside weights and cache: by the code itself."""
    model = Mixtral(config, "meta", specs=specs(config, weights))
    model.activations = activations
    model.prefill_chunk, cache = chunk, KVCache(config, batch, context, "meta", torch.bfloat16)
    with torch.no_grad(), LiveBytes() as live:
        ids = torch.zeros(batch, context, dtype=torch.int64, device="meta")
        prefill(model, cache, ids, torch.zeros(batch, dtype=torch.int64, device="meta"))
    return live.peak


NARROW, WIDE = {"intermediate_size": 256, "num_experts_per_tok": 1}, {"head_dim": 256, "intermediate_size": 512}
# Formats of weights and activations, and sizes. Quantized weights need no more: none is dequantized anywhere.
PREFILLS = [(None, None, sizes) for sizes in ({}, NARROW, WIDE)]
NORMS = NARROW | {"model_type": "olmoe", "num_key_value_heads": 32}  # of whole rows, which attention holds
PREFILLS += [(None, None, NORMS)]
PREFILLS += [(weights, None, {}) for weights in ("int4", "fp8", FORMATS["int4, linear int8"])]
PREFILLS += [("fp8", "fp8", sizes) for sizes in ({}, NARROW | {"hidden_size": 4160, "intermediate_size": 200})]


@pytest.mark.exhaustive
@pytest.mark.parametrize(("weights", "activations", "sizes"), PREFILLS, ids=str)
@pytest.mark.parametrize(
    ("batch", "context", "chunk"),
    [(1, 5000, 2048), (1, 4096, 2048), (3, 700, 2048), (64, 2048, 2048), (1, 129, 2048), (3, 1100, 512)],
)
def test_the_workspace_is_what_a_prefill_takes(
    batch: int, context: int, chunk: int, weights: Any, activations: Any, sizes: dict[str, int]
) -> None:
    config = replace(SMALLER, num_hidden_layers=3, **sizes)
    found = most_alive(config, batch, context, weights, chunk, activations)
    said = workspace_bytes(config, batch, context, chunk, activations)
    assert found <= said and ((weights and not activations) or said <= 1.02 * found + 4096)
    assert not activations or sizes or found > 1.05 * most_alive(config, batch, context, weights, chunk)


@pytest.mark.parametrize("weights", [None, "int4"])
@pytest.mark.parametrize("batch", [1, 8, 64, 128, 256])
def test_a_decode_step_takes_less_than_half_of_what_is_estimated_for_a_graph(batch: int, weights: Any) -> None:
    assert most_alive(replace(SMALLER, num_hidden_layers=2), batch, 1, weights) < GRAPH_BYTES / 2


@pytest.mark.parametrize("top_k", [None, 5])
def test_a_draw_takes_no_more_than_logit_bytes(top_k: int | None) -> None:
    model = Mixtral(replace(SMALLER, num_hidden_layers=1), "meta")
    with torch.no_grad(), LiveBytes() as live:
        sample(model.head(torch.zeros(3, 4096, dtype=torch.bfloat16, device="meta")), 0.7, 0.9, None, top_k)
    assert LOGIT_BYTES / 2 < live.peak / (3 * 32000) < LOGIT_BYTES


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("format", FORMATS)
def test_the_longest_text_fits_and_one_token_more_does_not(format: str, batch: int) -> None:
    specs = format_specs(SMALLER)[format]
    for mib in (26_000, 29_000, 47_000, 49_000, 93_000):
        found, memory = plan(SMALLER, specs, mib, batch, 100).longest_context, estimated_free(mib * MIB)
        least, more = (memory_need(SMALLER, specs, batch, S)["total"] for S in (max(found, 1), found + 1))
        assert found == 0 or least <= 0.98 * memory
        assert found == 32768 or more > 0.98 * memory - 1
    ring = replace(SMALLER, sliding_window=4096)  # it holds any text or none
    assert {plan(ring, specs, mib, batch, 100).longest_context for mib in (20_000, 150_000)} == {0, 32768}


def test_what_fits_leaves_two_percent_of_the_free_memory() -> None:
    need = memory_need(SMALLER, INT4, 1, 4096)["total"]
    least = bisect_left(range(40_000), need / (1 - MARGIN), key=lambda mib: estimated_free(mib * MIB))
    found = [plan(SMALLER, INT4, mib, 1, 4096) for mib in (least - 1, least + 1)]
    assert [one.verdict for one in found] == ["no", "fits"]


def row(text: str, label: str) -> list[str]:
    """The words of a table's row, behind its label."""
    return re.search(rf"^{re.escape(label)} +(\S.*)$", text, re.M)[1].split()  # type: ignore[index]


def test_an_h100_holds_eight_bits_and_a_4090_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    text = output("fit --gpu h100")
    stored = row(text, "as stored")
    assert stored[:2] == ["93.4", "GB"] and stored[-4:-1] == ["15", "offload", "47"]
    for label, size in (("fp8", "48.3"), ("int8", "48.3"), ("int4", "26.5"), ("int4, linear int8", "25.0")):
        assert row(text, label)[0] == size and [row(text, label)[-3], row(text, label)[-1]] == ["32,768", "fits"]
    assert row(output("fit --memory 1", status=1), "int4")[-1] == "no"
    assert row(output("fit --gpu rtx4090"), "int4, linear int8")[-4:-1] == ["20", "offload", "62"]


def test_json_has_the_launches_of_a_layer_that_bench_gives_floors() -> None:
    """Of Qwen3-30B: nine, each of 64 programs and more but for a selection and a row's norm."""
    model, weights = "qwen3-30b-a3b", "experts=int4,linear=int8"
    plans = run_json(f"fit {model} --gpu h100 --context 1024")["formats"]
    (plan,) = (plan for plan in plans if plan["format"] == "int4, linear int8")
    command = f"bench decode_step --gpu h100 --floors --model {model}"
    launches, dense = run_json(f"{command} --weights {weights}"), run_json(command)
    fields = "kernel", "programs"
    assert plan["launches"] == [{name: launch[name] for name in fields} for launch in launches]
    few = [launch["kernel"] for launch in launches if launch["programs"] < 64]
    assert len(launches) == 9 and few == ["route_kernel", "experts_combine_kernel"]
    table = output(f"{command} --weights {weights}")
    assert all(re.search(rf"^{x['kernel']} +{x['programs']}\b", table, re.M) for x in launches)
    up, dense_up = (next(x for x in rows if x["kernel"] == "experts_up_decode_kernel") for rows in (launches, dense))
    assert 3 < dense_up["bytes"] / up["bytes"] < 4 and 3 < dense_up["floor_s"] / up["floor_s"] < 4


def test_several_gpus_are_all_shown() -> None:
    text = output("fit --gpu h100 --gpu rtx4090 --gpu H100")
    assert re.findall(r"^(H100 80GB|RTX 4090|H200) ", text, re.M) == ["H100 80GB", "RTX 4090"]
    found = run_json("fit --gpu mi300x --gpu rtx4090")["gpus"]
    assert [entry["gpu"]["name"] for entry in found] == ["MI300X", "RTX 4090"]


RUNS = {
    "--gpu h100": "FOLDER --weights experts=int4,linear=int8",
    "--gpu rtx4090 --context 4096 --cache-dtype int8": "FOLDER --weights experts=int4,linear=int8 --cache-dtype int8 "
    "--offload auto --context 4096",
    "qwen3-30b-a3b --memory 16": "FOLDER --weights experts=int4,linear=int8 --offload auto --context 40960",
    f"{SMALL} --gpu h100": f"{SMALL} --weights experts=int4,linear=int8",
    "--gpu h100 --batch 3": None,
    "--memory 1": None,
}


@pytest.mark.parametrize("options", RUNS)
def test_the_last_line_is_the_command_that_runs_the_first_format(options: str) -> None:
    *_, last = run(f"fit {options}")[1].splitlines()
    want = f"To run it: mixtral-triton chat {RUNS[options]}"
    assert last == want if RUNS[options] else "mixtral-triton" not in last
    if RUNS[options]:
        assert commands.parser().parse_args(want.split()[4:]).command == "chat"


@pytest.mark.parametrize("options", ["qwen3-30b-a3b --memory 16", "mixtral-8x7b --gpu rtx4090 --context 5000"])
def test_the_command_places_the_experts_of_the_plan(options: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading decides on its own, by what is free."""
    words = run(f"fit {options}")[1].splitlines()[-1].split()
    args, found = commands.parser().parse_args(words[4:]), run_json(f"fit {options}")
    config, plan = KNOWN[found["model"]], min(found["formats"], key=lambda each: each["bytes"]["weights"])
    of_format, free = specs(config, args.weights), usable_bytes(found["gpu"]["free"])
    monkeypatch.setattr(memory_plan, "available_bytes", lambda device: free)
    request = memory_plan.MemoryRequest(args.offload, args.context)
    sizes = memory_plan.movable_bytes(config, parameter_shapes(config), of_format, BF16)
    held = plan["bytes"]["weights"] + plan["bytes"]["tables"]
    with pytest.warns(UserWarning, match="in host memory"):
        placed = memory_plan.place(request, config, None, torch.device("meta"), held, sizes)
    assert placed.count == plan["offload"]["experts"] > 0


def test_json_is_exact() -> None:
    found = run_json("fit mixtral-8x22b --gpu H200 --batch 2 --context 4096")
    assert found["gpu"] == {"name": "H200", "bytes": 143771 * MIB, "free": (143771 - 870 - 426) * MIB}
    assert (found["parameters"], found["batch"], found["context"]) == (parameters(LARGER)[0], 2, 4096)
    for one in found["formats"]:
        parts = one["bytes"]
        assert all(type(size) is int for size in parts.values())
        assert parts["total"] == sum(parts.values()) - parts["total"]
        assert parts["weights"] == size(LARGER, one["weights"])
    assert [one["format"] for one in found["formats"]] == list(FORMATS)


@pytest.mark.parametrize(("field", "status"), [("num_hidden_layers", 2), ("num_local_experts", 1), ("vocab_size", 1)])
def test_absurd_sizes_end_at_once(field: str, status: int, tmp_path: Path) -> None:
    values = json.loads((SMALL / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, field: 2**31 - 8}))
    assert run("fit --gpu b300", tmp_path)[0] == status


@pytest.mark.slow
def test_without_a_gpu_all_gpus_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("COLUMNS", "80")
    assert " ".join(row(output("fit"), "RTX 4090")) == "20 (62) 16 (79) 4.1 (169) 4.1 (169) 1.6 (216)"
    found = run_json("fit --context 1000")["gpus"]
    gpus = {entry["gpu"]["name"]: {one["format"]: one for one in entry["formats"]} for entry in found}
    assert list(gpus) == [gpu.name for gpu in GPUS.values()]
    assert all(one["verdict"] == "fits" and not one["offload"] for one in gpus["H200"].values())
    hosted = {format: one["offload"]["experts"] for format, one in gpus["H100 80GB"].items() if one["offload"]}
    bounds = {name: {format: one["tokens_per_second_bound"] for format, one in of.items()} for name, of in gpus.items()}
    assert hosted == {"as stored": 34} and bounds["H100 80GB"]["fp8"] > bounds["A100 80GB"]["fp8"]
    assert bounds["H100 80GB"]["int4"] > bounds["H100 80GB"]["fp8"] > bounds["H100 80GB"]["as stored"] > 0
    free = {entry["gpu"]["name"]: entry["gpu"]["bytes"] - entry["gpu"]["free"] for entry in found}
    assert free["RTX 4090"] == math.ceil(0.0152 * 24564 * MIB) + 426 * MIB


def test_the_gpu_at_hand_gives_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "A GPU", 50_000 * 2**20 + 17

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (40_000 * MIB, 50_000 * MIB))
    found = run_json("fit")
    assert found["gpu"] == {"name": "A GPU", "bytes": 50_000 * MIB, "free": 40_000 * MIB}
    assert [one["verdict"] for one in found["formats"]] == ["no", "no", "no", "fits", "fits"]


def test_a_quantized_folder_has_one_format(tmp_path: Path) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    held = Mixtral.from_pretrained(tmp_path, "cpu")
    (one,) = run_json("fit --memory 2", tmp_path)["formats"]
    rest = held.cos.nbytes + held.sin.nbytes
    assert one["weights"] is None
    assert one["bytes"]["weights"] == sum(x.nbytes for x in (*held.parameters(), *held.buffers())) - rest
    assert one["tokens_per_second_bound"] is None  # of a GPU whose rates are unknown
    assert run_json("fit --gpu h100", tmp_path)["formats"][0]["tokens_per_second_bound"] > 1e7
    assert row(output("fit --memory 2", tmp_path), "as stored")[-1] == "fits"
    (tmp_path / "model.safetensors").unlink()
    assert error_line("fit", tmp_path)


# Experts in host memory for one sequence of 4,096 tokens.
OFFLOADED = {
    ("rtx4080", "int4, linear int8"): 115,
    ("rtx3090", "int4, linear int8"): 18,
    ("rtx4090", "int4, linear int8"): 18,
    ("rtx5090", "fp8"): 99,
    ("h100", "as stored"): 36,
}


@pytest.mark.parametrize(("gpu", "format"), OFFLOADED)
def test_experts_in_host_memory(gpu: str, format: str) -> None:
    formats = json.loads(run(f"fit --gpu {gpu} --context 4096 --json")[1])["formats"]
    one = next(one for one in formats if one["format"] == format)
    experts = OFFLOADED[gpu, format]
    offload, width = one["offload"], {"as stored": 2, "fp8": 1}.get(format, 0.5)
    assert (offload["experts"], offload["of"]) == (experts, 256) and offload["embedding"]
    each, embedding = 3 * 4096 * 14336 * width, 32000 * 4096 * 2
    of_layer = -(-experts // 32)
    assert (offload["host_bytes"], offload["staging_bytes"]) == (experts * each + embedding, of_layer * each)
    # No quicker than the link at its full rate: 2 of 8 experts a token and layer, chosen uniformly. Nor than memory.
    link_s = experts * each / 4 / LINKS[offload["link"]]
    memory_s = (256 - experts) * each / 4 / parse_gpu(gpu).bandwidth
    assert max(link_s, memory_s) < 1 / one["tokens_per_second_bound"] < 1.2 * (link_s + memory_s) + 0.003
    # The fewest: one less does not fit.
    limit, total = (1 - MARGIN) * estimated_free(parse_gpu(gpu).bytes), one["bytes"]["total"]
    device_bytes = total - offload["host_bytes"] + offload["staging_bytes"]
    assert device_bytes == offload["device_bytes"] <= limit
    assert total - embedding - (experts - 1) * each + -(-(experts - 1) // 32) * each > limit
