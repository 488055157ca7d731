"""The experts inside vLLM, against transformers and `Mixtral` with the same weights; options, checkpoints and versions
that are refused. Tests with an engine need vLLM: `environment.sh` makes an environment for them, which the others do
not."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from mixtral_triton import SMALL, ExpertsConfig, Mixtral, ops
from mixtral_triton.quantize import QuantizedWeight, quantize
from tests.cli.commands import ROOT
from tests.support.models import HELD_OUT

pytestmark = pytest.mark.compiled
NAME, NEW = "mixtral_triton", 8
needs_vllm = pytest.mark.usefixtures("vllm")
VARIABLES = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "0"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
# More sequences than run at a time, the longest beyond the window, most in several chunks.
PROMPTS = [HELD_OUT[100 * n : 100 * n + length] for n, length in enumerate((1, 3, 8, 31, 32, 33, 70, 100))]
Tokens = tuple[list[list[int]], list[list[float]]]  # new ids and their log probabilities


def engine(
    options: Any = None,
    prompts: Any = PROMPTS,
    new: int = NEW,
    halved: bool = False,
    env: Any = None,
    folder: Path | None = None,
    **more: Any,
) -> Any:
    """Return what `engine.py` prints of a case; RuntimeError with its stderr if it fails."""
    case = {"options": options, "prompts": prompts, "new": new, "halved": halved, "engine": more}
    case["model"] = folder and str(folder)
    variables = {**os.environ, **VARIABLES, **(IN_PROCESS if env is None else env)}
    command = [sys.executable, "-m", "tests.engine.engine"]
    run = subprocess.run(command, input=json.dumps(case), capture_output=True, text=True, env=variables, cwd=ROOT)
    if run.returncode:
        raise RuntimeError(run.stdout + run.stderr)
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("{")))  # amid logs


@pytest.fixture(scope="module")
def vllm() -> Any:
    return pytest.importorskip("vllm", exc_type=ImportError)  # also one beside packages that it cannot import


@pytest.fixture(scope="module")
def of_transformers() -> Tokens:
    return tokens_of(transformers.AutoModelForCausalLM.from_pretrained(SMALL, dtype=torch.float32), PROMPTS)


def tokens_of(model: Any, prompts: list[list[int]]) -> Tokens:
    """Greedy tokens of transformers' model after each prompt alone, in fp32."""
    ids, logprobs = [], []
    for prompt in prompts:
        x = torch.tensor([prompt])
        options = {"attention_mask": torch.ones_like(x), "max_new_tokens": NEW, "min_new_tokens": NEW}
        out = model.generate(x, **options, do_sample=False, output_logits=True, return_dict_in_generate=True)
        ids.append(out.sequences[0, len(prompt) :].tolist())
        steps = zip(out.logits, ids[-1], strict=True)
        logprobs.append([step[0].log_softmax(-1)[token].item() for step, token in steps])
    return ids, logprobs


SIZES = {"vocab_size": 128, "hidden_size": 128, "intermediate_size": 64, "moe_intermediate_size": 64, "head_dim": 64}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "num_experts": 8}
SIZES |= {"num_experts_per_tok": 3, "max_position_embeddings": 128, "eos_token_id": None, "pad_token_id": 0}


@needs_vllm
@pytest.mark.parametrize("weights", [None, "int8"])
@pytest.mark.parametrize("family", ["Qwen3Moe", "Olmoe"])
def test_other_families_give_the_tokens_of_transformers(family: str, weights: str | None, tmp_path: Path) -> None:
    """The plugin is of no family. With int8 experts near ties of random weights may turn one text in six."""
    config = getattr(transformers, f"{family}Config")(**SIZES)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        parameter.data = 1 + 0.1 * torch.randn_like(parameter) if "norm" in name else 0.2 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path)
    prompts = [[(7 * n + 3 * place) % 120 + 1 for place in range(3 + 4 * n)] for n in range(6)]
    found = engine({"weights": weights}, prompts, folder=tmp_path, skip_tokenizer_init=True)
    equal, errors = compare(found, tokens_of(model, prompts))
    assert (equal, max(errors) < 1e-4) == (len(prompts), True) if weights is None else equal >= len(prompts) - 1


@needs_vllm
def test_vllm_itself_reads_what_save_pretrained_writes(tmp_path: Path) -> None:
    """By its own int4 kernel, which computes in bf16: that may turn a text."""
    if not torch.cpu._is_amx_tile_supported():
        pytest.skip("vLLM's own int4 experts on a CPU need AMX")
    settings: Any = {"quantization_config": ExpertsConfig("int4"), "dtype": torch.float32}
    model = transformers.AutoModelForCausalLM.from_pretrained(SMALL, **settings)
    model.save_pretrained(tmp_path)
    found = engine(None, folder=tmp_path, skip_tokenizer_init=True, dtype="bfloat16")
    equal, errors = compare(found, tokens_of(model, PROMPTS))
    assert equal >= len(PROMPTS) - 1 and sorted(errors)[-2] < 0.2


def of_mixtral(**options: Any) -> tuple[Mixtral, Tokens]:
    model = Mixtral.from_pretrained(SMALL, device="cpu", dtype=torch.float32, **options)
    texts = model.generate([torch.tensor(ids) for ids in PROMPTS], NEW, eos_token_id=[])
    scores = [model(text[None, :-1])[0, -NEW:].log_softmax(-1) for text in texts]
    logprobs = [rows.gather(1, text[-NEW:, None])[:, 0].tolist() for rows, text in zip(scores, texts, strict=True)]
    return model, ([text[-NEW:].tolist() for text in texts], logprobs)


def compare(found: Any, want: Tokens) -> tuple[int, list[float]]:
    """Return how many texts are equal, and each one's largest difference of a log probability."""
    equal = sum(ids == expected for ids, expected in zip(found["ids"], want[0], strict=True))
    errors = (torch.tensor(found["logprobs"]) - torch.tensor(want[1])).abs().amax(-1).tolist()
    print(
        f"{equal} of {len(errors)} texts equal, differences of log probabilities {min(errors):.1e} to {max(errors):.1e}"
    )
    return equal, errors


def assert_same(found: Any, want: Tokens) -> None:
    equal, errors = compare(found, want)
    assert equal == len(want[0]) and max(errors) < 1e-5


DENSE = {
    "vLLM routes": ({}, {}),
    "deterministic": ({"route": True, "deterministic": True}, {}),
    "tp": ({}, {"tensor_parallel_size": 2, "env": TWO_RANKS}),
    "ep": ({"route": True}, {"tensor_parallel_size": 2, "enable_expert_parallel": True, "env": TWO_RANKS}),
    "torch.compile": ({"route": True}, {"enforce_eager": False}),
}


@needs_vllm
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name != "vLLM routes" else []) for name in DENSE]
)
def test_dense_experts_give_the_tokens_of_transformers(name: str, of_transformers: Tokens) -> None:
    options, more = DENSE[name]
    assert_same(engine(options, **more), of_transformers)


@needs_vllm
@pytest.mark.parametrize(
    ("weights", "more"),
    [("int4", {}), *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        ("int8", {}), ("fp8", {}), ("int4", {"enforce_eager": False}),
        ("int4", {"tensor_parallel_size": 2, "enable_expert_parallel": True, "env": TWO_RANKS})])],
    ids=str,
)  # fmt: skip
def test_quantized_experts_give_the_tokens_of_the_quantized_model(weights: str, more: Any) -> None:
    """Once loaded, no dense projection is left in the process, and the experts take the model's bytes."""
    model, want = of_mixtral(weights=weights)
    found = engine({"weights": weights, "route": True}, **more)
    assert_same(found, want)
    if not more:
        experts = [module.nbytes for module in model.modules() if isinstance(module, QuantizedWeight)]
        assert (found["bytes"], found["dense"]) == (sum(experts), 0)


@needs_vllm
def test_the_engine_runs_these_experts(of_transformers: Tokens) -> None:
    """Control: half of what they return changes every text."""
    equal, errors = compare(engine({}, halved=True), of_transformers)
    assert equal < len(PROMPTS) / 2 and min(errors) > 0.1


@needs_vllm
@pytest.mark.slow
@pytest.mark.parametrize("options", ({"route": True}, {"weights": "int4"}), ids=str)
def test_interpreted_kernels_give_the_same_tokens(options: Any) -> None:
    prompts, interpreted = [HELD_OUT[:5], HELD_OUT[50:53]], {**IN_PROCESS, "TRITON_INTERPRET": "1"}
    want = engine(options, prompts, new=3)
    found = engine(options, prompts, new=3, env=interpreted)
    assert want["launches"] == 0 < found["launches"]
    assert_same(found, (want["ids"], want["logprobs"]))


def load_plugin(monkeypatch: pytest.MonkeyPatch, version: str = "0") -> Any:
    """Return a copy of the plugin beside a module `vllm` of this version, which as 0.20 has none of the classes."""
    vllm: Any = ModuleType("vllm")
    vllm.__version__ = version
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    spec = importlib.util.spec_from_file_location("mixtral_triton.other_vllm", ROOT / "mixtral_triton/vllm.py")
    assert spec is not None and spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    return plugin


@pytest.mark.parametrize("version", ("0.20.2", "0.30.0", "0.34.0rc1.dev2+g1234567", "1.31.0"))
def test_other_versions_of_vllm_are_refused_by_name(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = load_plugin(monkeypatch, version)
    with pytest.warns(UserWarning, match=rf"needs vLLM 0\.31, 0\.32, 0\.33, got {re.escape(version)}: not registered"):
        plugin.register()


def test_the_plugin_is_an_entry_point_for_the_versions_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'[project.entry-points."vllm.general_plugins"]\n{NAME} = "mixtral_triton.vllm:register"' in text
    versions = load_plugin(monkeypatch).VERSIONS
    assert f'"vllm>={versions[0]},<0.{int(versions[-1].split(".")[1]) + 1}"' in text


@pytest.mark.parametrize(
    "options", [{"deterministic": 1}, {"route": "yes"}, {"weights": "int3"}, {"other": True}, ["int4"], "int4"], ids=str
)
def test_options_of_another_type_are_refused(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """1 equals True, and is none: it would switch nothing on."""
    plugin, config = load_plugin(monkeypatch), SimpleNamespace(additional_config={NAME: options})
    monkeypatch.setattr(plugin, "get_current_vllm_config", lambda: config, raising=False)
    with pytest.raises(ValueError, match=r"vLLM's additional_config.* is .*, needs a dict of weights: None"):
        plugin.read_options()
    config.additional_config[NAME] = {"deterministic": True, "weights": "int4"}
    assert plugin.read_options() == {"weights": "int4", "route": False, "deterministic": True}


@contextmanager
def building(options: Any) -> Iterator[Any]:
    """Yield the plugin as within the construction of an engine with these options."""
    from vllm.config import VllmConfig, set_current_vllm_config

    plugin = importlib.import_module("mixtral_triton.vllm")
    plugin.register()
    with set_current_vllm_config(VllmConfig(additional_config={NAME: options})):
        yield plugin


@needs_vllm
@pytest.mark.parametrize("method", ("awq", "gptq", "fp8", "compressed-tensors"))
def test_a_quantized_checkpoint_is_refused_with_the_commands_that_take_it(method: str, tmp_path: Path) -> None:
    from vllm.config import ModelConfig

    quantized = {"quant_method": method, "bits": 4, "group_size": 128, "zero_point": True, "desc_act": False}
    config = json.loads((SMALL / "config.json").read_text()) | {"quantization_config": quantized}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = f"quant_method is '{method}', needs none; `vllm serve FOLDER` without .*`mixtral-triton generate FOLDER`"
    with building({}), pytest.raises(ValueError, match=message):
        ModelConfig(model=str(tmp_path), tokenizer=str(SMALL), quantization=NAME)
    with building({}) as plugin:
        assert plugin.ExpertsConfig.override_quantization_method(quantized, None) is None


def routed_experts(**changes: Any) -> Any:
    """Return what `ExpertsMethod` reads of a layer of routed experts."""
    from vllm.model_executor.layers.fused_moe import FusedMoEConfig, FusedMoEParallelConfig, MoEActivation
    from vllm.model_executor.layers.fused_moe import RoutingMethodType as Routing

    fields = dict.fromkeys(("num_experts", "num_local_experts", "num_logical_experts"), 8)
    parallel = FusedMoEParallelConfig.make_no_parallel()
    parallel = replace(parallel, **changes.pop("parallel", {}))
    moe: dict[str, Any] = {"hidden_dim": 64, "intermediate_size": 64, "experts_per_token": 2, "device": "cpu"}
    moe |= {"activation": MoEActivation.SILU, "routing_method": Routing.RenormalizeNaive, "in_dtype": torch.float32}
    for name, kind in (("activation", MoEActivation), ("routing_method", Routing)):
        moe |= {name: kind[changes.pop(name)]} if name in changes else {}
    layer = {"swiglu_limit": None, "swiglu_alpha": None, "swiglu_beta": None, "use_grouped_topk": False}
    layer |= {"routed_scaling_factor": 1.0, "apply_router_weight_on_input": False}
    layer |= {name: changes.pop(name) for name in layer.keys() & changes.keys()}
    config = FusedMoEConfig(**fields, **moe, moe_parallel_config=parallel, **changes)
    return SimpleNamespace(moe_config=config, **layer)


UNSUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "LoRA": ({}, {"is_lora_enabled": True}, "LoRA"),
    "another activation": ({}, {"activation": "GELU"}, "activation"),
    "data parallel": ({}, {"parallel": {"dp_size": 2}}, "parallel config"),
    "all-to-all": ({}, {"parallel": {"use_ep": True, "sp_size": 2}}, "parallel config"),
    "load balancing": ({}, {"parallel": {"enable_eplb": True}}, "parallel config"),
    "a bias": ({}, {"has_bias": True}, "a bias"),
    "a clamp": ({}, {"swiglu_limit": 7.0}, "a clamp"),
    "a scaled input": ({}, {"apply_router_weight_on_input": True}, "a scaled input"),
    "sigmoid": ({"route": True}, {"routing_method": "Sigmoid"}, "routing method"),
    "weights that do not sum to 1": ({"route": True}, {"routing_method": "Default"}, "routing method"),
    "groups": ({"route": True}, {"use_grouped_topk": True}, "a router with groups"),
    "a factor": ({"route": True}, {"routed_scaling_factor": 2.5}, "a router with groups or a factor"),
}


@needs_vllm
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_experts_that_the_kernels_do_not_compute_raise_value_error(name: str) -> None:
    options, changes, reason = UNSUPPORTED[name]
    with building(options) as plugin, pytest.raises(ValueError, match=rf"options is .* kernel does not.* {reason}"):
        plugin.ExpertsMethod(routed_experts(**changes))


@needs_vllm
def test_experts_that_the_kernels_compute_are_taken() -> None:
    """Where vLLM routes, any router is right; expert and tensor parallelism need nothing of the kernels."""
    for changes in ({"routing_method": "Sigmoid"}, {"use_grouped_topk": True}, {"parallel": {"use_ep": True}}):
        with building({}) as plugin:
            assert plugin.ExpertsMethod(routed_experts(**changes)).experts_cls is plugin.Experts
    with building({"route": True, "weights": "int8"}) as plugin:
        method = plugin.ExpertsMethod(routed_experts(routing_method="Renormalize"))
    assert method.experts_cls is plugin.RoutingExperts and method.uses_meta_device


@needs_vllm
def test_batch_invariance_needs_deterministic_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.envs.VLLM_BATCH_INVARIANT", True)
    with building({}) as plugin, pytest.raises(ValueError, match="batch invariance"):
        plugin.ExpertsMethod(routed_experts())
    with building({"deterministic": True}) as plugin:
        plugin.ExpertsMethod(routed_experts())


@needs_vllm
def test_weights_that_vllm_did_not_quantize_are_found() -> None:
    """A version that does not call `process_weights_after_loading` would leave them dense."""
    x, w13, w2 = torch.randn(3, 64), torch.randn(8, 128, 64), torch.randn(8, 64, 64)
    routes = torch.tensor([[0, 7], [3, 2], [1, 5]]), torch.full((3, 2), 0.5)
    with building({"weights": "int8"}) as plugin:
        method = plugin.ExpertsMethod(routed_experts())
        experts = method.experts_cls(method.moe, method.get_fused_moe_quant_config(routed_experts()))
    dense, small = (w13, w2), (quantize(w13, "int8"), quantize(w2, "int8"))
    for weights in (dense, (small[0], w2), (quantize(w13, "fp8"), small[1])):
        with pytest.raises(RuntimeError, match="vLLM did not quantize the experts"):
            experts.experts(x, *weights, *routes, None)
    want = ops.expert_swiglu(x, *small, *routes)
    assert torch.equal(experts.experts(x, *small, *routes, None), want)
    here = torch.tensor([0, 1, 2, 3, -1, -1, -1, -1])  # this rank's experts are the first four
    part = ops.expert_swiglu(x, *small, routes[0].clamp(max=3), routes[1] * (routes[0] < 4))
    first = tuple(weight[:4] for weight in small)
    assert torch.allclose(experts.experts(x, *first, *routes, here), part, atol=float(1e-6 * part.abs().max()))
