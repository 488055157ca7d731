"""`save_pretrained` of quantized experts: what is written, who reads it, and what older files become."""

import json
from os import listdir
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, modeling_utils
from transformers.utils import hub

from mixtral_triton import ExpertsConfig, Mixtral, register, stored_config
from mixtral_triton.hf.experts import PROJECTIONS
from mixtral_triton.hf.quantizer import check_dense_checkpoint
from mixtral_triton.quantize import quantize
from mixtral_triton.quantize.write import write
from tests.support.families import LIMIT, VERSION, build, experts_of
from tests.support.hub import LAYOUTS
from tests.support.stored import EXPERTS, IDS, INT4, load, write_quantized

pytestmark = [
    pytest.mark.compiled,
    pytest.mark.skipif(VERSION < (5, 17), reason="earlier ones have no hook for the conversions"),
]
register()


def saved(model: Any, out: Path) -> dict[str, Any]:
    """Save in shards, read again, and compare every bit; return the quantization_config."""
    model.save_pretrained(out, max_shard_size="300KB")
    again = AutoModelForCausalLM.from_pretrained(out, config=stored_config(out))
    want, got = model.state_dict(), again.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(x, got[name]) and x.dtype == got[name].dtype for name, x in want.items())
    config: dict[str, Any] = json.loads((out / "config.json").read_text())["quantization_config"]
    return config


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "olmoe", "deepseek_v3"])
@pytest.mark.parametrize("layout", [INT4, "fp8 blocks", "ct int8", "ct int4 -1 True", "gptq 64 1", "autofp8"])
def test_a_stored_model_is_saved_and_read_bit_for_bit(layout: str, family: str, tmp_path: Path) -> None:
    stored, _ = write_quantized(family, tmp_path, *LAYOUTS[layout], only=EXPERTS)
    config = saved(load(stored, dtype="auto"), tmp_path / "out")
    assert config["quant_method"] == "compressed-tensors" and "lm_head" in config["ignore"]
    assert not any(".experts." in name for name in config["ignore"])


@pytest.mark.exhaustive
@pytest.mark.parametrize("weights", ["int4", "int8", "fp8"])
def test_a_saved_mixtral_is_what_quantize_writes(weights: str, tmp_path: Path) -> None:
    _, dense = write_quantized("mixtral", tmp_path, *LAYOUTS[INT4])
    write(dense, tmp_path / "by quantize", weights, "cpu")
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=ExpertsConfig(weights))
    config = saved(model, tmp_path / "out")
    by_quantize = json.loads((tmp_path / "by quantize" / "config.json").read_text())["quantization_config"]
    assert config == by_quantize
    names, tensors = dict[str, Tensor](), load_file(tmp_path / "by quantize" / "model.safetensors")
    for file in (tmp_path / "out").glob("*.safetensors"):
        names |= load_file(file)
    assert names.keys() == tensors.keys() and all(torch.equal(x, names[name]) for name, x in tensors.items())
    ours, theirs = Mixtral.from_pretrained(tmp_path / "out", device="cpu"), load(tmp_path / "out")
    with torch.no_grad():
        assert torch.allclose(ours(IDS), theirs(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.exhaustive
@pytest.mark.skipif(VERSION < (5, 24), reason="earlier ones leave gates and experts in bfloat16")
@pytest.mark.parametrize("weights", ["fp8", "int8"])
@pytest.mark.parametrize("family", ["laguna", "qwen2_moe", "qwen3_next", "hy_v3", "mixtral"])
def test_transformers_reads_what_is_saved(family: str, weights: str, tmp_path: Path) -> None:
    """Experts of 32, 64 and 96 columns, beside gates [1, H] and modules named otherwise than their tensors."""
    pytest.importorskip("compressed_tensors")
    build(family).save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=ExpertsConfig(weights))
    config = saved(model, tmp_path / "out")
    for group in config["config_groups"].values():
        group["input_activations"] = None  # transformers would quantize them
    values = json.loads((tmp_path / "out" / "config.json").read_text()) | {"quantization_config": config}
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with torch.no_grad():
        want, got = model(IDS).logits, theirs(IDS).logits
    print(f"{family} {weights}: {float((got - want).abs().max() / want.abs().max()):.0e} of the largest logit")
    assert (got - want).abs().max() <= LIMIT * want.abs().max()


def test_layers_of_two_formats_are_saved_and_a_tied_head_is_ignored(tmp_path: Path) -> None:
    build("qwen3_moe", tie_word_embeddings=True).save_pretrained(tmp_path / "dense")
    settings: Any = {"quantization_config": ExpertsConfig("int4")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", **settings)
    last = [*experts_of(model).values()][-1]
    for key in PROJECTIONS:
        setattr(last, key, quantize(getattr(last, key).dequantize(), "int8"))
    assert "lm_head" in saved(model, tmp_path / "out")["ignore"]


def test_a_save_leaves_no_weights_of_an_older_one(tmp_path: Path) -> None:
    out, (stored, _) = tmp_path / "out", write_quantized("olmoe", tmp_path, *LAYOUTS[INT4], only=EXPERTS)
    model = load(stored)
    for size in ("1GB", "300KB", "1GB"):  # one file, shards, one file
        with torch.no_grad():
            model.lm_head.weight += 1
        model.save_pretrained(out, max_shard_size=size)
        assert torch.equal(load(out).lm_head.weight, model.lm_head.weight)
    (out / "model.safetensors.index.json").write_text("{}")
    message = r"files is \['model.safetensors', 'model.safetensors.index.json'\], needs one of the two"
    with pytest.raises(ValueError, match=message):
        load(out)
    with pytest.raises(ValueError, match=message):
        check_dense_checkpoint([out / "model.safetensors"])
    with pytest.raises(ValueError, match=message):
        Mixtral.from_pretrained(out, "cpu")


def test_nothing_is_removed_but_by_a_save_that_replaces_it(tmp_path: Path, monkeypatch: Any) -> None:
    """Other files, other ranks, adapters alone, the hub, and what calls the quantizer or reads the model's state."""
    accelerate, peft = pytest.importorskip("accelerate"), pytest.importorskip("peft")
    stored, _ = write_quantized("qwen3_moe", tmp_path, *LAYOUTS[INT4], only=EXPERTS)
    model, out, pushed = load(stored), tmp_path / "out", list[str]()
    out.mkdir()
    names = ["model.safetensors", "model.safetensors.index.json"]

    def save_pretrained(save_directory: Path, is_main_process: bool = True, variant: Any = None) -> None:
        model.hf_quantizer.get_state_dict_and_metadata(model)

    def push() -> None:
        repository, card = SimpleNamespace(repo_id="me/mine"), SimpleNamespace(save=lambda path: None)
        monkeypatch.setattr(hub, "create_repo", lambda *args, **kwargs: repository, raising=False)
        monkeypatch.setattr(hub, "hf_api", lambda: SimpleNamespace(create_repo=hub.create_repo), raising=False)
        monkeypatch.setattr(hub, "create_and_tag_model_card", lambda *args, **kwargs: card)
        monkeypatch.setattr(
            type(model), "_upload_modified_files", lambda x, path, *_, **__: pushed.extend(listdir(path))
        )
        model.push_to_hub("mine", max_shard_size="300KB")

    def save_adapter() -> None:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
        Trainer(model=adapted, args=TrainingArguments(out, report_to="none", use_cpu=True)).save_model()

    for save in (
        lambda: save_pretrained(out),
        lambda: model.save_pretrained(out, variant="new"),
        lambda: model.save_pretrained(out, is_main_process=False),
        push,
        lambda: accelerate.Accelerator(cpu=True).save_model(model, tmp_path / "by accelerate"),
        save_adapter,
    ):
        for name in names:
            (out / name).write_text("the user's")
        save()
        assert [(out / name).read_text() for name in names] == ["the user's"] * 2
    assert {"config.json", names[1]} <= {*pushed} and (out / "adapter_model.safetensors").exists()


def test_an_interrupted_save_leaves_no_folder_that_loads(tmp_path: Path, monkeypatch: Any) -> None:
    stored, _ = write_quantized("olmoe", tmp_path, *LAYOUTS[INT4], only=EXPERTS)
    model, save = load(stored), modeling_utils.safe_save_file

    def interrupted(tensors: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        if "00002" in str(file):
            raise OSError("no space left on device")
        save(tensors, file, *args, **kwargs)

    monkeypatch.setattr(modeling_utils, "safe_save_file", interrupted)
    with pytest.raises(OSError, match="no space left"):
        model.save_pretrained(tmp_path / "out", max_shard_size="300KB")
    assert (tmp_path / "out" / "config.json").exists()
    with pytest.raises(OSError, match="no file named"):
        load(tmp_path / "out")


def test_families_without_a_tensor_an_expert_are_not_saved(tmp_path: Path) -> None:
    _, dense = write_quantized("granitemoe", tmp_path, *LAYOUTS[INT4])
    model = AutoModelForCausalLM.from_pretrained(dense, quantization_config=ExpertsConfig("int4"))
    with pytest.raises(ValueError, match="needs a tensor an expert, which granitemoe has not"):
        model.save_pretrained(tmp_path / "out")
    assert not [*(tmp_path / "out").glob("*.json")]


def test_adapters_over_stored_experts_are_saved_alone_and_merged(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    stored, _ = write_quantized("qwen3_moe", tmp_path, *LAYOUTS["awq 32"], only=EXPERTS)
    model = peft.get_peft_model(load(stored), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    optimizer = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.eval().save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(stored), tmp_path / "adapter", torch_device="cpu")
    with torch.no_grad():
        want = model(IDS).logits
        assert torch.equal(again(IDS).logits, want) and not torch.equal(load(stored)(IDS).logits, want)
    merged = model.merge_and_unload()
    saved(merged, tmp_path / "out")
    with torch.no_grad():
        got = load(tmp_path / "out")(IDS).logits
        assert torch.equal(got, merged(IDS).logits) and (got - want).abs().max() <= LIMIT * want.abs().max()
