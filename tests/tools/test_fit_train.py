"""fit --train: its bytes beside those of tiny models that train by PEFT, its command, and its tables in a document."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from mixtral_triton import ExpertsConfig, MixtralConfig, register
from mixtral_triton.bench.fit import KNOWN
from mixtral_triton.bench.fit_train import RANK, backward_bytes, training_need
from mixtral_triton.checkpoint.tensors import parameter_shapes
from mixtral_triton.hf import training
from mixtral_triton.hf.experts import NAME, PROJECTIONS
from mixtral_triton.kernels.weights.quantized import QuantizedWeight, QuantSpec
from mixtral_triton.quantize import select_specs
from tests.cli.commands import ROOT, error_line, output, run_json
from tests.support import hub
from tests.support.families import experts_of
from tests.support.memory import LiveBytes

pytestmark = pytest.mark.compiled
register()
B, T, V = 2, 16, 96
SIZES: dict[str, Any] = {"vocab_size": V, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 32, "num_experts_per_tok": 2}
FAMILIES = {  # with the names of their sizes
    "Mixtral": {"intermediate_size": 160, "num_local_experts": 6},
    "Qwen3Moe": {"moe_intermediate_size": 160, "num_experts": 6},
}
BF16 = torch.bfloat16


def config(layers: int, family: str = "Mixtral") -> MixtralConfig:
    sizes = SIZES | {"num_hidden_layers": layers, "dtype": "bfloat16"}
    model_type = {"Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe"}[family]
    return MixtralConfig(model_type=model_type, **sizes, **FAMILIES["Mixtral"], rope_theta=1e4)


def need(family: str, layers: int = 2, format: str | None = None) -> dict[str, int]:
    specs = select_specs(format, parameter_shapes(config(layers, family)))
    return training_need(config(layers, family), specs, B, T)


def dense_model(family: str, layers: int = 2, **changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = SIZES | FAMILIES[family] | {"num_hidden_layers": layers} | changes
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(BF16)
    model.set_experts_implementation(NAME)
    model.set_attn_implementation(NAME)
    return model


def with_lora(model: Any) -> Any:
    model = peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=["q_proj", "v_proj"])).train()
    model.enable_input_require_grads()
    return model


def loss_of(model: Any) -> Tensor:
    ids = torch.arange(B * T).view(B, T)
    return model(input_ids=ids, labels=ids, use_cache=False).loss


@pytest.mark.parametrize("format", [None, "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_adapter_gradients_and_optimizer(family: str, format: str | None, tmp_path: Path) -> None:
    model = dense_model(family)
    if format is not None:
        model.save_pretrained(tmp_path)
        settings: Any = {"quantization_config": ExpertsConfig(format), "attn_implementation": NAME}
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=BF16, **settings)
    experts = [getattr(module, key) for module in experts_of(model).values() for key in PROJECTIONS]
    quantized = sum(weight.nbytes for weight in experts if isinstance(weight, QuantizedWeight))
    weights = quantized + sum(x.nbytes for x in model.parameters())
    model = with_lora(model)
    adapter = [x for x in model.parameters() if x.requires_grad]
    optimizer = torch.optim.AdamW(adapter)
    loss_of(model).backward()
    optimizer.step()
    found = {"weights": weights, "adapter": sum(x.nbytes for x in adapter)}
    found["adapter"] += sum(x.grad.nbytes for x in model.parameters() if x.grad is not None)
    found["optimizer"] = sum(x.nbytes for state in optimizer.state.values() for x in state.values())
    wanted = need(family, format=format)
    assert {name: wanted[name] for name in found} == found and bool(quantized) == (format is not None)


@pytest.mark.parametrize("format", [None, "int4", "int8", "fp8"])
@pytest.mark.parametrize("tokens", [64, 2048])
def test_the_backward_pass_of_experts_takes_what_is_calculated(tokens: int, format: str | None) -> None:
    config = MixtralConfig(hidden_size=512, intermediate_size=1024, num_hidden_layers=1, rope_theta=1e4)
    E, H, I, K = config.num_local_experts, config.hidden_size, config.intermediate_size, config.num_experts_per_tok
    shapes = (E, 2 * I, H), (E, H, I)
    dense = [torch.empty(shape, dtype=BF16, device="meta") for shape in shapes]
    weights = [QuantSpec.default_for(format, shape[-1]).empty(shape, "meta") for shape in shapes] if format else dense
    x, grad = torch.empty(2, tokens, H, dtype=BF16, device="meta")
    routes = torch.empty(tokens, K, dtype=torch.int64, device="meta"), torch.empty(tokens, K, device="meta")
    needs_grad = True, False, False, False, True, False
    context = SimpleNamespace(saved_tensors=(x, *routes), projections=weights, needs_input_grad=needs_grad)
    context.versions, context.activation = training.versions(*weights), "silu"
    with torch.no_grad(), LiveBytes() as live:
        training.FrozenExperts.backward(context, grad)
    assert backward_bytes(config, format is not None, tokens) == pytest.approx(live.peak, rel=0.01)


@pytest.mark.parametrize("words", [500, 20000], ids=["experts are the peak", "logits are the peak"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_step_takes_what_is_calculated(family: str, words: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, with short sequences: attention has all scores there, which it has not on a GPU."""
    sizes = {"vocab_size": words, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    inner = {"intermediate_size": 1024, "num_local_experts": 8}, {"moe_intermediate_size": 1024, "num_experts": 8}
    by_family = dict(zip(FAMILIES, inner, strict=True))
    monkeypatch.setattr(transformers.masking_utils, "find_packed_sequence_indices", lambda positions: None)  # reads
    with torch.device("meta"):
        model = with_lora(dense_model(family, **sizes, **by_family[family])).to("meta")
        model.gradient_checkpointing_enable({"use_reentrant": True})
        ids = torch.empty(64, 16, dtype=torch.int64)
    with LiveBytes() as live:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    model_type = {"Mixtral": "mixtral", "Qwen3Moe": "qwen3_moe"}[family]
    config = MixtralConfig(model_type=model_type, **SIZES | sizes | inner[0], rope_theta=1e4, dtype="bfloat16")
    found = training_need(config, {}, *ids.shape)
    assert found["activations"] + found["adapter"] / 2 == pytest.approx(live.peak, rel=0.05)


def test_known_models() -> None:
    """The counts of their pages on the hub; LoRA's by hand."""
    counts = {"mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624}
    for name, count in counts.items():
        found = run_json(f"fit {name} --train --gpu h200 --context 4096")
        dense, *_, int4 = found["formats"]
        parts = int4["bytes"]
        assert dense["bytes"]["weights"] == 2 * count and dense["gpus"] == ["H200"]
        assert int4["format"] == "int4" and parts["weights"] < 0.3 * 2 * count
        assert parts["total"] == sum(parts.values()) - parts["total"]
    assert parts["adapter"] == 2 * 4 * 48 * 16 * (2048 + 32 * 128 + 2048 + 4 * 128)
    double, single = (run_json(f"fit --train --batch {n} --gpu h200")["formats"][0]["bytes"] for n in (2, 1))
    assert double == single | {part: single[part] + single["activations"] for part in ("activations", "total")}


def test_the_exit_status_and_the_formats() -> None:
    text = output("fit qwen3-30b-a3b --train --memory 24", status=1)
    assert "Calculated, not measured" in text and [line.split()[-1:] for line in text.splitlines()].count(["-"]) == 4
    assert [each["format"] for each in run_json("fit small --train --memory 8")["formats"]] == [
        "as stored",
        "fp8",
        "int8",
        "int4",
    ]


def test_wrong_options_are_refused(tmp_path: Path) -> None:
    assert "--train is given, and --cache-dtype, too" in error_line("fit --train --gpu h100 --cache-dtype int8")
    assert "--batch is 0" in error_line("fit qwen3-30b-a3b --train --gpu h100 --batch 0")
    hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    assert "is quantized already, needs a dense checkpoint" in error_line("fit --train --gpu h100", tmp_path)
    assert "or qwen3-30b-a3b" in error_line("fit qwen3 --train --gpu h100")


def test_the_tables_are_in_the_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    page = (ROOT / "docs" / "drop_in.md").read_text(encoding="utf-8")
    for name in ("mixtral-8x7b", "qwen3-30b-a3b"):
        assert name in KNOWN and f"mixtral-triton fit {name} --train" in page
        for line in output(f"fit {name} --train").splitlines():
            if " GB " in line:
                assert line.strip() in page, line
