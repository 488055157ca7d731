"""Quantizers: their error and their checks; models whose weights are quantized while they load."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from mixtral_triton import KVCache, Mixtral, MixtralConfig, reference
from mixtral_triton.bench.fit import memory_need
from mixtral_triton.checkpoint.tensors import parameter_shapes, read_headers, table, total_bytes
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.kernels.launching.launch import launch_context
from mixtral_triton.kernels.record import record_launches
from mixtral_triton.model.load import check_activations
from mixtral_triton.quantize import QuantizedWeight, quantize, select_specs
from tests.cli.commands import error_line
from tests.support import hub
from tests.support.memory import anonymous_peak, needs_proc
from tests.support.models import HELD_OUT, perplexity

pytestmark = pytest.mark.compiled
FORMATS = ("int4", "int8", "fp8")
REQUESTS = [*FORMATS, {"experts": "int4", "linear": "int8"}, {"linear": "fp8"}, {"experts": "fp8", "linear": "int4"}]
STEP = {"int8": 1 / 127, "fp8": 32 / 448}  # at the largest value of a row, relative to it


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", ["int8", "fp8"])
def test_error_is_at_most_half_a_step(format: str, dtype: torch.dtype) -> None:
    x = normal(3, 7, 100).to(dtype)
    weight = quantize(x, format)
    largest = x.float().abs().amax(-1, keepdim=True)
    assert weight.group == 100 and weight.scales.dtype == torch.float32 and weight.shape == x.shape
    assert ((weight.dequantize() - x.float()).abs() <= 0.5001 * STEP[format] * largest).all()
    at = x.float().abs().argmax(-1, keepdim=True)
    assert torch.allclose(weight.dequantize().gather(-1, at), x.float().gather(-1, at), rtol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("K", "group"), [(256, None), (192, None), (96, None), (256, 32), (128, 64)])
def test_int4_has_the_best_scale_and_the_nearest_codes(K: int, group: int | None) -> None:
    x = normal(2, 5, K)
    weight = quantize(x, "int4", group)
    size = weight.group
    assert size == group or (group is None and size == {256: 128, 192: 64, 96: 32}[K])
    assert weight.scales.dtype == torch.bfloat16 and weight.zeros is None
    codes = weight.codes.float() - 8
    ours, least = 0.0, 0.0
    for e, n, g in itertools.product(range(2), range(5), range(K // size)):
        part, scale = x[e, n, g * size : (g + 1) * size], weight.scales[e, n, g].float()
        group_codes = codes[e, n, g * size : (g + 1) * size]
        for code, value in zip(group_codes.tolist(), part.tolist(), strict=True):
            assert all(abs(code * scale - value) <= abs(other * scale - value) + 1e-6 for other in range(-8, 8))
        plain = part.abs().max() / 7  # clips nothing
        assert error(part, scale) <= error(part, plain.bfloat16().float()) * 1.0001
        least += float(min(error(part, (plain * (0.6 + 0.01 * step)).bfloat16().float()) for step in range(41)))
        ours += float(error(part, scale))
    assert ours <= 1.03 * least


def test_int4_finds_the_scale_that_a_group_has() -> None:
    """By least squares of the codes: no step of the search is a scale of which the lowest code alone clips nothing."""
    codes = torch.randint(-7, 8, (50, 64), generator=torch.Generator().manual_seed(0)).float()
    codes[:, 0] = -8
    x = codes * torch.linspace(0.5, 0.99, 50)[:, None].bfloat16().float()
    assert torch.equal(quantize(x, "int4", 64).dequantize(), x)


def error(part: Tensor, scale: Tensor) -> Tensor:
    """Return the squared error of a group in int4 with this scale, by the nearest of all sixteen values."""
    values = torch.arange(-8, 8) * scale
    return (part[:, None] - values).abs().amin(1).square().sum()


@pytest.mark.parametrize("format", FORMATS)
def test_zeros_tiny_and_huge_values_and_rows_in_pieces(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.stack([torch.zeros(128), torch.full((128,), 1e-38), torch.full((128,), -3e38), normal(128)])
    back = quantize(x, format).dequantize()
    assert torch.isfinite(back).all() and (back[0] == 0).all()
    assert torch.allclose(back[2:3], x[2:3], rtol=0.02)
    x = normal(2, 9, 128)
    whole = quantize(x, format)
    monkeypatch.setattr("mixtral_triton.quantize.PIECE", 300)
    assert torch.equal(quantize(x, format).data, whole.data)
    assert torch.equal(quantize(x[1, 3:5], format).dequantize(), whole.dequantize()[1, 3:5])


NO_WEIGHTS = (torch.int8, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)  # fp64 may exceed fp32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((normal(4, 100), "int4"), "int4 needs groups of 128 or 64 or 32 that divide 100 columns; int8 and"),
        ((normal(4, 96), "int4", 64), "group is 64, int4 needs groups of 128 or 64 or 32 that divide 96 columns"),
        ((normal(4, 96), "int4", 48), "group is 48, int4 needs groups of 128 or 64 or 32 that"),
        ((normal(4, 96), "int8", 32), "group is 32, int8 needs groups of 96 that divide 96 columns"),
        ((normal(4, 96), "int3"), "format is 'int3', needs one of int4, int8, fp8"),
        ((normal(96), "int8"), r"'tensor' is torch\.float32 \[96\] on cpu, needs finite numbers in fp32"),
        ((normal(4, 96), ["int8"]), r"format is \['int8'\], needs one of int4, int8, fp8"),
        *(((torch.ones(4, 96).to(dtype), "int8"), f"'tensor' is {dtype}") for dtype in NO_WEIGHTS),
        (([1.0], "int8"), "'tensor' is a list"),
        ((torch.ones(0, 96), "int8"), r"'tensor' is .*\[0, 96\] on cpu, needs finite"),
        ((torch.ones(4, 96, device="meta"), "int8"), "'tensor' is .* on meta, needs finite"),
        *(((torch.full((4, 96), value), "int8"), "needs finite numbers") for value in (torch.nan, torch.inf)),
    ],
)
def test_wrong_argument_raises_value_error(args: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(*args)


def load(weights: Any = None, folder: Any = SMALL, **settings: Any) -> Mixtral:
    return Mixtral.from_pretrained(folder, weights=weights, **{"device": "cpu"} | settings)


@pytest.mark.parametrize("weights", REQUESTS, ids=str)
def test_loading_quantizes_the_requested_parameters(weights: Any) -> None:
    model, plain = load(weights), load()
    wanted = {"experts": weights} if isinstance(weights, str) else weights
    formats = dict.fromkeys(("gate_up_proj", "down_proj"), wanted.get("experts"))
    formats |= dict.fromkeys(("qkv_proj", "o_proj", "lm_head"), wanted.get("linear"))
    for name, stored in plain.named_parameters():
        place, format = model.named_weights()[name], formats.get(name.rpartition(".")[2])
        if format is None:
            assert isinstance(place, nn.Parameter) and torch.equal(place, stored)
        else:
            assert place.format == format and torch.equal(place.dequantize(), quantize(stored, format).dequantize())
    assert set(model.state_dict()) >= set(dict(model.named_parameters()))


@pytest.mark.parametrize("weights", ["int4", {"experts": "int8", "linear": "fp8"}, "awq 128"], ids=str)
def test_logits_and_tokens_equal_the_dequantized_model(weights: Any, device: torch.device, tmp_path: Path) -> None:
    """Those of the reference, too: on a CPU their bits. "awq 128": of the hub, with zeros."""
    settings: dict[str, Any] = {"dtype": torch.float32, "device": device}
    if weights == "awq 128":
        hub.write(tmp_path, *hub.LAYOUTS[weights])
        model = load(folder=tmp_path, **settings)
    else:
        model = load(weights, **settings)
    dequantized_copy = Mixtral(model.config, device, torch.float32)
    for name, parameter in dequantized_copy.named_parameters():
        place = model.named_weights()[name]
        parameter.data.copy_(place.dequantize() if isinstance(place, QuantizedWeight) else place)
    ids = torch.arange(10).view(2, 5).to(device)
    want = dequantized_copy(ids)
    limit = 0 if device.type == "cpu" else 1e-4 * float(want.abs().max())
    for got in (model(ids), reference.forward(model, ids)):
        assert (got - want).abs().max() <= limit
    assert torch.equal(model.generate(ids, max_new_tokens=4), dequantized_copy.generate(ids, max_new_tokens=4))


def checkpoint(folder: Path, tensors: dict[str, Tensor], **changes: Any) -> Path:
    """Write a checkpoint with the small one's config and these changes of it."""
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(json.loads((SMALL / "config.json").read_text()) | changes))
    return folder


def small_tensors() -> dict[str, Tensor]:
    return load_file(SMALL / "model.safetensors")


def ones(dtype: torch.dtype = torch.float32, layout: Any = "per_expert", **sizes: int) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint of these sizes."""
    config = MixtralConfig.from_dict(json.loads((SMALL / "config.json").read_text()) | sizes)
    return {name: torch.ones(target.shape, dtype=dtype) for name, target in table(config, layout).items()}


def fused(folder: Path) -> Path:
    """Write the small checkpoint with all experts of a layer in one tensor, as transformers holds them in memory."""
    stored, tensors = small_tensors(), {}
    whole, parts = (table(MixtralConfig.from_pretrained(SMALL), layout) for layout in ("fused", "per_expert"))
    for name, target in whole.items():
        tensors[name] = stored[name] if name in stored else torch.empty(target.shape, dtype=torch.bfloat16)
        for part, source in parts.items():
            if name not in stored and source.parameter == target.parameter:
                tensors[name][source.index] = stored[part]
    return checkpoint(folder, tensors)


@pytest.mark.slow
def test_fused_layout_in_small_chunks_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, folder, read = load("int8"), fused(tmp_path), []
    monkeypatch.setattr("mixtral_triton.checkpoint.tensors.CHUNK_BYTES", 3000)
    got = load("int8", folder, progress=read.append)
    assert sum(read) == total_bytes(read_headers(folder))
    for name, place in wanted.named_weights().items():
        assert torch.equal(place.data, got.named_weights()[name].data)


def test_tied_head_stays_dense_and_casts_keep_the_values(tmp_path: Path) -> None:
    tensors = small_tensors()
    del tensors["lm_head.weight"]
    model = load({"linear": "int8"}, checkpoint(tmp_path, tensors, tie_word_embeddings=True))
    assert model.lm_head is model.embed_tokens and isinstance(model.layers[0].o_proj, QuantizedWeight)
    model = load("int4")
    before = model.layers[0].down_proj.dequantize()
    assert torch.equal(model.to(torch.float32).layers[0].down_proj.dequantize(), before)
    assert model.dtype == torch.float32 and model.layers[0].gate.dtype == torch.float32


@pytest.mark.parametrize(
    "weights", ["int3", 4, {}, {"experts": "nf4"}, {"experts": ["int4"]}, {"heads": "int4"}, ["int4"], torch.ones(2)]
)
def test_wrong_weights_raise_value_error(weights: Any) -> None:
    with pytest.raises(ValueError, match=r"weights is .*, needs None, one of int4, int8, fp8 \(the experts\), or"):
        load(weights)


def test_nan_and_groups_that_do_not_divide_raise_value_error(tmp_path: Path) -> None:
    tensors, name = small_tensors(), "model.layers.2.block_sparse_moe.experts.3.w3.weight"
    tensors[name][5, 7] = torch.nan
    with pytest.raises(ValueError, match=rf"{name} is not finite everywhere: .* damaged"):
        load("fp8", checkpoint(tmp_path, tensors))
    sizes = {"intermediate_size": 100, "num_hidden_layers": 1}
    checkpoint(tmp_path, ones(**sizes), **sizes)
    with pytest.raises(ValueError, match=r"'int4', layers\.0\.down_proj: .* divide 100 columns; int8 and fp8"):
        load("int4", tmp_path)
    assert load("int8", tmp_path).layers[0].down_proj.group == 100


IMPORTS = "from mixtral_triton import Mixtral"
LOADED = """
model = Mixtral.from_pretrained(sys.argv[1], device="cpu", weights=sys.argv[2] if sys.argv[2:] else None)
size = sum(at.nbytes for at in model.named_weights().values())
"""
EXPERT = 3 * 1024 * 2048 * 2  # bytes of one in `large`


def large(folder: Path, layout: str = "per_expert") -> int:
    """Write a checkpoint of ones that is mostly experts, and return its bytes."""
    sizes = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2, "num_local_experts": 4}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 500, "head_dim": 128}
    tensors = ones(torch.bfloat16, layout, **sizes)
    checkpoint(folder, tensors, **sizes)
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("weights", FORMATS)
def test_loading_peaks_below_the_weights_and_an_expert(tmp_path: Path, weights: str) -> None:
    dense = large(tmp_path)
    peak, size = anonymous_peak(IMPORTS, LOADED, str(tmp_path), weights)
    assert size < (0.4 if weights == "int4" else 0.6) * dense
    assert peak < size + EXPERT, f"{(peak - size) / 1e6:.1f} MB beside the weights"


@pytest.mark.slow
@needs_proc
def test_loading_tensors_of_several_experts_peaks_below_one_of_them(tmp_path: Path) -> None:
    dense = large(tmp_path, "fused")
    peak, size = anonymous_peak(IMPORTS, LOADED, str(tmp_path))
    assert size == dense and peak < size + 2 * EXPERT, f"{(peak - size) / 1e6:.1f} MB beside the weights"


@pytest.mark.slow
def test_perplexity_of_the_small_checkpoint(covers: Any) -> None:
    bounds = {("int8", None): 0.1, ("fp8", None): 0.3, ("int4", 128): 2.0, ("int4", 32): 1.2}  # per cent of perplexity
    before = perplexity(load(dtype=torch.float32))

    def check(name: str, model: Mixtral, bound: float) -> None:
        more = 100 * (perplexity(model) / before - 1)
        covers("quantized", f"{name}: perplexity {more:+.2f} % on {len(HELD_OUT)} tokens")
        assert more <= bound, name

    for (format, group), bound in bounds.items():
        model = load(dtype=torch.float32)
        for layer, name in itertools.product(model.layers, ("gate_up_proj", "down_proj")):
            weight = quantize(getattr(layer, name), format, group)
            delattr(layer, name)
            setattr(layer, name, weight)
        check(f"experts {format}, {group or 'a scale a row'}", model, bound)
    check("experts int4, linear int8", load(dtype=torch.float32, weights={"experts": "int4", "linear": "int8"}), 2.0)


@pytest.mark.slow
def test_loading_checks_memory_before_it_allocates(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = MixtralConfig.from_pretrained(SMALL)
    specs = select_specs("int4", parameter_shapes(config))
    need = memory_need(config, specs, 1, 1)
    free = need["weights"] + need["tables"]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free - 8, 2 * free))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 13)
    with pytest.raises(ValueError, match=r"the weights take .* MB, and cuda has .* free: `mixtral-triton fit`"):
        Mixtral.from_pretrained(SMALL, device="cuda", weights="int4")
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 12)  # torch keeps 8 bytes of a deleted model
    assert Mixtral.from_pretrained(SMALL, device="cuda", weights="int4").layers[0].down_proj.format == "int4"


@pytest.mark.parametrize(("one", "other"), [("int8", "fp8"), ("fp8", "int8"), ("int4", "int8")])
def test_state_of_another_format_is_refused(one: str, other: str, tmp_path: Path) -> None:
    """int8 and fp8 have the same shapes and dtypes, and their codes mean other numbers."""
    x = normal(3, 64)
    models = {format: torch.nn.ModuleDict({"w": quantize(x, format)}) for format in (one, other)}
    before = models[other]["w"].dequantize()
    with pytest.raises(ValueError, match=f"the state is .*'{one} 64 3 64', needs '{other} 64 3 64'"):
        models[other].load_state_dict(models[one].state_dict())
    assert torch.equal(models[other]["w"].dequantize(), before)
    save_model(models[one], str(tmp_path / "model.safetensors"))
    again = torch.nn.ModuleDict({"w": quantize(x + 1, one)})
    load_model(again, str(tmp_path / "model.safetensors"))
    assert torch.equal(again["w"].dequantize(), models[one]["w"].dequantize())


@pytest.mark.parametrize("assign", [False, True])
def test_state_of_other_dtypes_is_refused(assign: bool) -> None:
    """A copy would round fp16 scales to bf16, and the codes of an assigned state may be no int16."""
    weight = quantize(normal(3, 64), "int4")
    for name, dtype in (("scales", torch.float16), ("data", torch.int32)):
        state = weight.state_dict() | {name: getattr(weight, name).to(dtype)}
        with pytest.raises(ValueError, match=f"the state's {name} are {dtype}, needs {getattr(weight, name).dtype}"):
            weight.load_state_dict(state, assign=assign)


BOTH: Any = {"experts": "fp8", "linear": "fp8"}


@pytest.mark.parametrize(("weights", "count"), [("fp8", 2), ({"linear": "fp8"}, 2), (BOTH, 4)])
@pytest.mark.parametrize(("shape", "quantizes"), [((1, 64), False), ((64, 1), False), ((1, 65), True), ((65, 1), True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_more_than_64_rows_quantize_their_activations(
    weights: Any, count: int, shape: tuple[int, int], quantizes: bool, deterministic: bool
) -> None:
    """Each fp8 product of a layer once, never the head's; in deterministic mode for any number of rows."""
    options = {"weights": weights, "deterministic": deterministic}
    model = Mixtral.from_pretrained(SMALL, "meta", activations="fp8", **options)
    for cache in (None, KVCache(model.config, shape[0], 100, "meta", model.dtype)):
        with record_launches() as launches:
            model(torch.empty(shape, dtype=torch.int64, device="meta"), cache=cache)
        found = [launch.kernel for launch in launches].count("quantize_rows_kernel")
        assert found == count * len(model.layers) * (quantizes or deterministic)


def test_activations_change_forwards_of_many_rows_alone() -> None:
    """As the reference does, in plain torch; a state, a copy and a model without them know nothing of it."""
    models = [Mixtral.from_pretrained(SMALL, "cpu", weights=BOTH, activations=each) for each in (None, "fp8")]
    ids = torch.tensor([HELD_OUT[:80]])
    before = {name: x.clone() for name, x in models[1].state_dict().items()}
    plain, quantized = (model(ids) for model in models)
    assert torch.equal(models[1](ids[:, :64]), models[0](ids[:, :64]))
    difference = (quantized - plain).norm(dim=-1) / plain.norm(dim=-1)
    assert 0.01 < float(difference.median()) < 0.2
    for model, logits in zip(models, (plain, quantized), strict=True):
        assert torch.allclose(reference.forward(model, ids), logits, rtol=0.02, atol=0.02 * float(logits.abs().max()))
    state = models[1].state_dict()
    assert state.keys() == before.keys() == models[0].state_dict().keys()
    assert all(torch.equal(x, before[name]) for name, x in state.items())
    models[0].load_state_dict(state)
    assert torch.equal(copy.deepcopy(models[1])(ids), quantized) and torch.equal(models[0](ids), plain)
    models[1].layers[0].o_proj.scales.mul_(0)
    assert not torch.equal(models[1](ids), quantized), "a view shares the weight's tensors"


@pytest.mark.slow
def test_compiled_model_with_activations_has_the_same_logits() -> None:
    model = Mixtral.from_pretrained(SMALL, "cpu", weights=BOTH, activations="fp8")
    ids = torch.arange(66)[None] + 5
    logits = model(ids)
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="eager")(ids), logits)


@pytest.mark.parametrize("weights", [None, "int8", {"experts": "int4"}])
def test_activations_need_fp8_weights_with_one_scale_a_row(weights: Any, tmp_path: Path) -> None:
    message = "activations is 'fp8', and no layer has fp8 weights with one scale a row: needs weights='fp8', or"
    with pytest.raises(ValueError, match=f"^Mixtral.from_pretrained: {message}"):
        Mixtral.from_pretrained(SMALL, "cpu", weights=weights, activations="fp8")
    assert message in error_line("generate --device cpu --activations fp8 --prompt x")


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "gfx942"])
def test_activations_need_a_gpu_that_multiplies_fp8(arch: str) -> None:
    shapes = {"layers.0.o_proj": (64, 64)}
    arguments: Any = ("fp8", select_specs(BOTH, shapes), shapes)
    message = f"activations is 'fp8', and the GPU is {arch}: needs sm_89, sm_90, sm_100, sm_103 or sm_120$"
    with launch_context(arch=arch):
        check_activations(*arguments, torch.device("cpu"))
        with pytest.raises(ValueError, match=message):
            check_activations(*arguments, torch.device("cuda"))
    with launch_context(arch="sm_89"):
        check_activations(*arguments, torch.device("cuda"))


def test_activations_on_a_mesh_are_refused() -> None:
    with pytest.raises(ValueError, match="activations is 'fp8', needs None or, without a mesh"):
        Mixtral.from_pretrained(SMALL, "meta", weights="fp8", activations="fp8", mesh=object())
