"""`ExpertsConfig`: experts in 4 or 8 bits from `from_pretrained`, one dense projection at a time, and refusals."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompileConfig

from mixtral_triton import ExpertsConfig, register, verify
from mixtral_triton.hf.experts import NAME
from mixtral_triton.hf.quantizer import ExpertsQuantizer, QuantizeExperts, check_dense_checkpoint
from mixtral_triton.quantize import quantize
from tests.support.families import VERSION, build, config_of, experts_of
from tests.support.memory import anonymous_peak, needs_proc

pytestmark = pytest.mark.compiled
IDS = torch.arange(2, 20).view(2, 9)
register()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny OLMoE in shards, with a tensor an expert, as on the hub."""
    folder = tmp_path_factory.mktemp("olmoe")
    build("olmoe").save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


def load(folder: Path, weights: str = "int4", **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=ExpertsConfig(weights), **kwargs)


@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_experts_have_the_bits_of_quantize(weights: str, folder: Path) -> None:
    dense, model = AutoModelForCausalLM.from_pretrained(folder), load(folder, weights)
    for want, module in zip(experts_of(dense).values(), experts_of(model).values(), strict=True):
        for key in ("gate_up_proj", "down_proj"):
            expected, got = quantize(getattr(want, key), weights), getattr(module, key)
            assert got.format == weights and torch.equal(got.data, expected.data)
            assert torch.equal(got.scales, expected.scales) and f"{weights}" in repr(module)
    assert model.config._experts_implementation == NAME and model.quantization_method == NAME
    assert model.model.layers[0].mlp.gate.weight.dtype == torch.float32


def test_dtype_and_device_map(folder: Path) -> None:
    with torch.no_grad():
        want = load(folder)(IDS).logits
        assert torch.equal(load(folder, device_map="cpu")(IDS).logits, want)
        assert torch.equal(load(folder, device_map={"": "cpu"}, dtype=torch.float32)(IDS).logits, want)
        half = load(folder, device_map="auto", dtype="bfloat16")
        assert (
            half.dtype == torch.bfloat16 and half.model.layers[0].mlp.experts.down_proj.scales.dtype == torch.bfloat16
        )
        assert torch.allclose(half(IDS).logits.float(), want, atol=0.2 * float(want.abs().max()))


def test_a_fused_checkpoint_loads_as_one_with_a_tensor_an_expert(folder: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    save_file({name: x.contiguous() for name, x in model.state_dict().items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(IDS).logits, load(folder)(IDS).logits)


def test_wrong_arguments_are_refused_by_name(folder: Path) -> None:
    for weights in ("int3", None, 4):
        with pytest.raises(ValueError, match=f"ExpertsConfig: weights is {weights!r}, needs one of"):
            ExpertsConfig(weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ExpertsConfig: argument is 'group', needs weights alone"):
        ExpertsConfig("int4", group=3)
    assert ExpertsConfig.from_dict(ExpertsConfig("int8").to_dict()).weights == "int8"
    for name in ("eager", "grouped_mm", "batched_mm"):
        with pytest.raises(ValueError, match=f"experts_implementation is '{name}', needs None or 'mixtral_triton'"):
            load(folder, experts_implementation=name)
    load(folder, experts_implementation=NAME)
    with pytest.raises(ValueError, match=r"ExpertsConfig: device_map is .*needs no disk"):
        load(folder, device_map={"model.embed_tokens": "cpu", "model": "disk", "lm_head": "cpu"}, offload_folder=folder)


def test_another_implementation_is_refused_afterwards(folder: Path) -> None:
    model = load(folder)
    model.set_experts_implementation("eager")
    with pytest.raises(ValueError, match="experts_implementation of OlmoeExperts is 'eager', needs 'mixtral_triton'"):
        model(IDS)
    model.set_experts_implementation(NAME)
    model(IDS)


def test_models_without_such_experts_are_refused_before_their_files_are_read(tmp_path: Path) -> None:
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    for config, message in (
        (transformers.LlamaConfig(**sizes), "model is 'LlamaForCausalLM', needs a model with experts"),
        (config_of("gpt_oss"), r"model\.layers\.0\.mlp\.experts has a bias"),
        (config_of("olmoe", hidden_act="gelu"), r"model\.layers\.0\.mlp\.experts has the activation GELU"),
        (config_of("olmoe", intermediate_size=40), r"model\.layers\.0\.mlp\.experts\.down_proj: .*int4 needs groups"),
    ):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.to_empty(device="cpu").save_pretrained(tmp_path)
        for file in tmp_path.glob("*.safetensors"):  # the header alone
            file.write_bytes(file.read_bytes()[: 8 + int.from_bytes(file.read_bytes()[:8], "little")])
        with pytest.raises(ValueError, match=message):
            load(tmp_path)


def test_memory_counts_the_bits_of_a_format(folder: Path) -> None:
    """What transformers asks of a quantizer to fit a `device_map`."""
    for weights, size in (("int4", 0.5), ("int8", 1), ("fp8", 1)):
        quantizer, x = ExpertsQuantizer(ExpertsConfig(weights)), torch.empty(2, dtype=torch.bfloat16)
        quantizer.paths = {"mlp.experts"}
        assert quantizer.param_element_size(None, "mlp.experts.down_proj", x) == size
        assert quantizer.param_element_size(None, "mlp.gate.weight", x) == 2


STORED = {
    "config.json": {"quantization_config": {"quant_method": "modelopt", "quant_algo": "FP8"}},
    "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}},
}


@pytest.mark.parametrize("name", STORED)
def test_a_checkpoint_that_is_quantized_already_is_refused_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    config = json.loads((copied / "config.json").read_text())
    file, stored = copied / name, STORED[name]
    file.write_text(json.dumps(config | stored if file.name == "config.json" else stored))
    with pytest.raises(ValueError, match=rf"ExpertsConfig: quantization of .*{file.name} is .*, needs none"):
        load(copied)
    file.write_text(json.dumps({"text_config": stored}))
    with pytest.raises(ValueError, match=f"{file.name} is "):
        check_dense_checkpoint([str(copied / "model.safetensors")])


EXPERT = "model.layers.1.mlp.experts."


def moved(tensors: dict[str, Any]) -> None:
    """Rows of one expert's gate are its up's."""
    gate, up = (f"{EXPERT}3.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[gate][:-8].clone(), torch.cat((tensors[gate][-8:], tensors[up]))


def added(name: str) -> Callable[[dict[str, Any]], Any]:
    """One expert more, of this name."""
    own = f"{EXPERT}0."
    return lambda x: x.update({f"{EXPERT}{name}.{key[len(own) :]}": x[key].clone() for key in [*x] if own in key})


def without(pattern: str) -> Callable[[dict[str, Any]], Any]:
    """Without the tensors of these names."""
    return lambda x: [x.pop(name) for name in [*x] if re.search(pattern, name)]


def with_nan(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda x: x[name][-1].fill_(float("nan"))


CONVERSION = "issues during automatic conversion"  # transformers' own
WRONG_FILES = {
    "more experts": (added("8"), CONVERSION),
    "a name more": (added("00"), CONVERSION),
    "rows of gate and up": (moved, CONVERSION),
    "NaN in an expert": (with_nan(f"{EXPERT}3.down_proj.weight"), CONVERSION),
    "NaN": (with_nan("model.norm.weight"), r"model.norm.weight in torch.float32 is 'not finite everywhere', needs"),
    "no experts of a layer": (without(r"layers\.1\..*\.experts\."), f"{EXPERT}gate_up_proj in the files is 'missing'"),
    "no down_proj of a layer": (without(r"layers\.1\..*experts.*down"), f"{EXPERT}down_proj in the files is 'missing'"),
}


@pytest.mark.skipif(VERSION < (5, 17), reason="earlier ones stack the experts before they are quantized")
@pytest.mark.parametrize("fault", WRONG_FILES)
def test_files_with_other_experts_or_nan_are_refused(fault: str, folder: Path, tmp_path: Path) -> None:
    tensors: dict[str, Any] = {}
    for file in folder.glob("*.safetensors"):
        tensors |= load_file(file)
    change, message = WRONG_FILES[fault]
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    shutil.copy(folder / "config.json", tmp_path)
    with pytest.raises((ValueError, RuntimeError), match=message):
        load(tmp_path)


def test_gate_comes_first_in_whatever_order_the_file_has_them() -> None:
    model = build("olmoe", num_hidden_layers=1)
    (path, module), (gate, up) = next(iter(experts_of(model).items())), torch.randn(2, 8, 96, 64)
    want = quantize(torch.cat((gate, up), 1), "int4")
    settings = {"full_layer_name": f"{path}.gate_up_proj", "source_patterns": ["gate", "up"], "model": model}
    QuantizeExperts("int4").convert({"up": [*up], "gate": [*gate]}, **settings)
    assert torch.equal(module.gate_up_proj.data, want.data)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe", "deepseek_v3", "mixtral"])
def test_a_static_cache_has_one_graph_and_equal_tokens(family: str, tmp_path: Path) -> None:
    build(family, num_hidden_layers=2).save_pretrained(tmp_path)
    model, graphs = load(tmp_path, attn_implementation=NAME), list[Any]()
    settings = {"max_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(IDS, **settings, disable_compile=True)
    torch._dynamo.reset()
    backend: Any = lambda graph, _: graphs.append(graph) or graph  # noqa: E731
    compiled = CompileConfig(backend=backend, fullgraph=True, mode=None)
    compiled._compile_all_devices = True  # on a CPU, too
    assert torch.equal(model.generate(IDS, **settings, compile_config=compiled), want)
    assert len(graphs) == 1


READY = """
from transformers import AutoModelForCausalLM
from mixtral_triton import ExpertsConfig
AutoModelForCausalLM.from_pretrained(sys.argv[2], quantization_config=ExpertsConfig("int4"), dtype="float32")
"""
LOAD = """
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=ExpertsConfig("int4"), dtype="float32")
size = sum(x.nbytes for x in (*model.parameters(), *model.buffers()))
"""


@needs_proc
@pytest.mark.slow
@pytest.mark.skipif(VERSION < (5, 17), reason="earlier ones stack the experts before they are quantized")
def test_dense_experts_never_lie_in_memory_together(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 512, "num_experts": 32, "num_hidden_layers": 5}
    model = AutoModelForCausalLM.from_config(config_of("olmoe", **sizes))
    projection = model.model.layers[0].mlp.experts.gate_up_proj.nbytes
    model.bfloat16().save_pretrained(tmp_path)  # another dtype, so that each tensor is copied, as to a GPU
    peak, size = anonymous_peak(READY, LOAD, str(tmp_path), str(folder))
    print(f"peak {peak:,} bytes, quantized model {size:,}, one projection {projection:,}")
    assert peak <= 1.1 * (size + projection)


def test_an_adapter_that_would_train_nothing_in_quantized_experts_is_refused_by_verify(folder: Path) -> None:
    """PEFT itself warns alone, as it finds no such parameter."""
    peft = pytest.importorskip("peft")
    settings: Any = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
    with pytest.warns(RuntimeWarning, match="no parameter was matched"):
        adapted = peft.get_peft_model(load(folder, "int8"), peft.LoraConfig(r=4, **settings))
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\.gate_up_proj is quantized.*train nothing there"):
        verify(adapted)
