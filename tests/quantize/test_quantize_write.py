"""`mixtral-triton quantize` writes checkpoints of compressed-tensors that load bit for bit; and `weights=` on a
quantized checkpoint: its values, by loops that share no code with the reader, quantized anew."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mixtral_triton import Mixtral, verify
from mixtral_triton.checkpoint.tensors import total_bytes
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.quantize import QuantizedWeight, quantize
from mixtral_triton.quantize.hub import read_headers
from mixtral_triton.quantize.write import write
from tests.cli.commands import python, run_json
from tests.model.test_weights import expected, save
from tests.quantize.test_quantize import EXPERT, FORMATS, IMPORTS, LOADED, checkpoint, fused, large, small_tensors
from tests.quantize.test_quantize_hub import load
from tests.support import hub
from tests.support.memory import anonymous_peak, needs_proc

pytestmark = pytest.mark.compiled
MIXED = {"experts": "int4", "linear": "int8"}
W1 = "model.layers.1.block_sparse_moe.experts.2.w1"


def same(a: Mixtral, b: Mixtral) -> bool:
    """Whether two models have the same weights bit for bit, codes and scales included."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def sharded(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((SMALL / name).read_bytes())
    return save(folder, small_tensors(), shards=3)


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", [*FORMATS, {"experts": "int4", "linear": "fp8"}, MIXED], ids=str)
@pytest.mark.parametrize("source", ["one file", "shards", "fused"])
def test_written_checkpoint_loads_exactly(tmp_path: Path, format: Any, source: str, monkeypatch: Any) -> None:
    folder, read = {"shards": sharded, "fused": fused}.get(source, lambda _: SMALL)(tmp_path / "in"), list[int]()
    monkeypatch.setattr("mixtral_triton.quantize.PIECE", 5000)
    size = write(folder, tmp_path / "out", format, "cpu", read.append)
    assert sum(read) == total_bytes(read_headers(SMALL)) and size == total_bytes(read_headers(tmp_path / "out"))
    assert same(load(tmp_path / "out"), load(SMALL, weights=format))
    if source != "fused":
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            at.name for at in folder.iterdir() if at.is_file() and at.name != "README.md"
        }
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (SMALL / "tokenizer.json").read_bytes()


def tied(folder: Path, stored: bool) -> Path:
    """Write the small checkpoint with a tied head, which is in the file or is not."""
    tensors = small_tensors()
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()} if stored else {}
    return checkpoint(folder, {name: x for name, x in tensors.items() if name != "lm_head.weight"} | head, **TIED)


TIED = {"tie_word_embeddings": True}
PAIRS = [{"experts": experts, "linear": linear} for experts in FORMATS for linear in FORMATS]
# transformers dequantizes int4 in the scales' bf16. Where linears are fp8 and it does not dequantize while loading, it
# quantizes their activations, too, as the files ask for, which changes logits by up to 0.15: the test takes that out.
ERROR = {"int4": 5e-3, "exact": 2e-6}


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", [*FORMATS, *PAIRS], ids=str)
@pytest.mark.parametrize("head", ["untied", "tied", "tied, in the file"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_transformers_computes_the_dequantized_model(tmp_path: Path, format: Any, head: str, dequantize: bool) -> None:
    transformers = pytest.importorskip("transformers", "5.17", "earlier ones find no experts there")
    pytest.importorskip("compressed_tensors")
    folder = SMALL if head == "untied" else tied(tmp_path / "in", head != "tied")
    write(folder, tmp_path / "out", format, "cpu")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    groups, ignore = (config["quantization_config"][name] for name in ("config_groups", "ignore"))
    quantized = isinstance(format, dict) and head == "untied"
    assert ("lm_head" in ignore) != quantized == any("lm_head" in group["targets"] for group in groups.values())
    if not dequantize:
        for group in groups.values():
            group["input_activations"] = None
        (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    settings = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if dequantize else {}
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, **settings
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    if theirs.model.layers[0].mlp.gate.weight.dtype != torch.float32:
        pytest.skip(f"transformers {transformers.__version__} leaves gates and experts in bfloat16")
    ids = torch.arange(3, 30)[None]
    want = Mixtral.from_pretrained(tmp_path / "out", "cpu", torch.float32)(ids)
    error = float((theirs.eval()(ids).logits.detach() - want).abs().max() / want.abs().max())
    assert error < ERROR["int4" if "int4" in str(format) else "exact"]


def test_one_group_size_for_all_experts(tmp_path: Path) -> None:
    """128 columns into the experts, 192 out of them: groups of 64 in both."""
    tensors = small_tensors()
    for name, tensor in tensors.items():
        if "experts" in name:
            tensors[name] = (tensor[:, :192] if ".w2." in name else tensor[:192]).contiguous()
    write(checkpoint(tmp_path / "in", tensors, intermediate_size=192), tmp_path / "out", "int4", "cpu")
    layer = load(tmp_path / "out").layers[0]
    assert layer.gate_up_proj.group == layer.down_proj.group == 64


def test_quantized_folder_and_existing_out_raise_value_error(tmp_path: Path) -> None:
    write(SMALL, tmp_path / "out", "int8", "cpu")
    with pytest.raises(ValueError, match=r"is quantized already \(compressed-tensors, pack-quantized\)"):
        write(tmp_path / "out", tmp_path / "again", "int4", "cpu")
    with pytest.raises(ValueError, match=r"weights is \{'linear': 'int8'\}, needs a format of the experts"):
        write(SMALL, tmp_path / "again", {"linear": "int8"}, "cpu")
    other = checkpoint(tmp_path / "tied", small_tensors(), **TIED)  # whose head is not the embedding
    with pytest.raises(ValueError, match=r"lm_head.weight differs from .*, but tie_word_embeddings is true"):
        write(other, tmp_path / "again", "int8", "cpu")
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already and not an empty folder"):
            write(SMALL, out, "int4", "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out", "tied"}
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
@needs_proc
def test_peak_memory_is_one_shard(tmp_path: Path) -> None:
    large(tmp_path)
    out = str(tmp_path / "out")
    work = "write(sys.argv[1], sys.argv[2], 'int4', 'cpu'); size = 0"
    peak, _ = anonymous_peak("from mixtral_triton.quantize.write import write", work, str(tmp_path), out)
    shard = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert peak < shard + EXPERT, f"{(peak - shard) / 1e6:.1f} MB beside the one shard"
    peak, size = anonymous_peak(IMPORTS, LOADED, out)
    # A piece of the hub's, unpacked.
    assert peak < size + 3 * EXPERT, f"{(peak - size) / 1e6:.1f} MB beside the weights"


@pytest.mark.parametrize("there", [True, False])
def test_files_are_removed_after_an_error(tmp_path: Path, there: bool) -> None:
    folder, out = sharded(tmp_path / "in"), tmp_path / "out"
    if there:
        out.mkdir()
    path = folder / "model-2.safetensors"
    tensors = load_file(path)
    last = max(name for name in tensors if "experts" in name)
    tensors[last][-1, -1] = torch.inf
    save_file(tensors, path)
    with pytest.raises(ValueError, match=rf"model-2\.safetensors: {last} is not finite everywhere"):
        write(folder, out, "int8", "cpu")
    assert out.exists() == there and (not there or not list(out.iterdir()))


@pytest.mark.slow
def test_full_disk_names_the_file_and_removes_it(tmp_path: Path) -> None:
    """The system limits files to half a megabyte."""
    pytest.importorskip("resource")
    out = tmp_path / "out"
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))\n"
    code += "from mixtral_triton.cli import main; sys.exit(main(sys.argv[1:]))"
    command = ("quantize", SMALL, out, "--weights", "int8", "--device", "cpu")
    done = python("-c", code, *command, PYTHONDONTWRITEBYTECODE="1")
    assert done.returncode == 2 and not out.exists()
    assert done.stderr.startswith(f"mixtral-triton quantize: {out / 'model.safetensors'}: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_command_writes_a_checkpoint_for_other_commands(tmp_path: Path) -> None:
    out, prompt = str(tmp_path / "out"), "--device cpu --prompt 'The return statement'"
    sizes = run_json("quantize small --weights int4 --device cpu", out)
    assert sizes["weights"] == "int4" and sizes["bytes"] < sizes["bytes_before"] and sizes["out"] == out
    for command, field in (("generate --max-new-tokens 4", "tokens"), ("trace", "experts")):
        assert run_json(f"{command} {prompt} {out}")[field] == run_json(f"{command} {prompt} --weights int4")[field]


@pytest.mark.slow
@pytest.mark.parametrize("format", ["int4", MIXED], ids=str)
def test_verify_accepts_the_written_checkpoint(tmp_path: Path, format: Any) -> None:
    write(SMALL, tmp_path / "out", format, "cpu")
    report = verify(load(tmp_path / "out"), torch.arange(3, 15)[None], folder=tmp_path / "out")
    assert not report.wrong
    stored = [row for row in report.rows if row.op == "weights" and row.case != "finite"]
    assert [(row.case, row.error) for row in stored] == [("as stored", 0.0)] * 5


ACT_ORDER = hub.gptq(64, reorder=True), hub.gptq_config(64, desc_act=True)
# Layouts that no kernel runs, and how they are refused.
UNSUPPORTED: dict[str, tuple[Any, str]] = {
    "act-order": (ACT_ORDER, "the weight is in act-order"),
    "groups of 16": ((hub.compressed(4, 16), hub.pack_config(4, 16)), "the group size is 16, needs 32, 64, 128"),
}


def different(model: Mixtral, meaning: dict[str, Tensor], formats: dict[str, str | None]) -> list[str]:
    """The names of weights that are not what `meaning` becomes in `formats`; None: dense."""
    wrong = []
    for name, value in expected(model.config, meaning, "per_expert").items():
        format, got = formats.get(name.rpartition(".")[2]), model.named_weights()[name]
        want = value.to(model.dtype).float() if format is None else quantize(value, format).dequantize()
        got = got.dequantize() if isinstance(got, QuantizedWeight) else got.float()
        wrong += [] if torch.equal(got, want) else [name]
    return wrong


EXPERTS = dict.fromkeys(("gate_up_proj", "down_proj"), "int8")
QUANTIZED_PARTS = dict.fromkeys(EXPERTS, "int4") | dict.fromkeys(("qkv_proj", "o_proj", "lm_head"), "int8")


@pytest.mark.filterwarnings("ignore:.*quantized anew")
@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_layouts_are_quantized_anew_with_weights(tmp_path: Path, case: str, monkeypatch: Any) -> None:
    layout, message = UNSUPPORTED[case]
    monkeypatch.setattr("mixtral_triton.quantize.PIECE", 5000)
    meaning = hub.write(tmp_path, *layout)
    message = rf"{tmp_path}.*{message}.*; or quantize it anew with weights=\"int8\""
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path)
    assert str(caught.value).isprintable()
    model = load(tmp_path, weights="int8")
    assert different(model, meaning, EXPERTS) == []
    assert different(load(tmp_path, weights=MIXED), meaning, QUANTIZED_PARTS) == []
    report = verify(model, torch.arange(12)[None] % 40, folder=tmp_path)
    assert {row.op for row in report.wrong} <= {"expert_swiglu", "experts_add_rms_norm", "layer"}
    assert all(row.ok for row in report.rows if row.op == "weights")


def test_a_config_far_beyond_the_files_is_refused_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1 << 30}))
    monkeypatch.setattr(
        "mixtral_triton.checkpoint.tensors.table", lambda *args: pytest.fail("lists all tensors of that config")
    )
    with pytest.raises(ValueError, match="the config asks for"):
        load(tmp_path, weights="int8")


def test_what_is_not_named_stays_as_stored(tmp_path: Path) -> None:
    meaning = hub.write(tmp_path, *hub.LAYOUTS["awq 64"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = load(tmp_path, weights="int8")
    assert [str(each.message) for each in caught] == [
        f"{tmp_path}: awq is dequantized and quantized anew (weights='int8'); `mixtral-triton perplexity` measures "
        "what that costs"
    ]
    exact = expected(model.config, meaning, "per_expert")["layers.0.qkv_proj"]
    assert torch.equal(model.layers[0].qkv_proj.dequantize(), exact)
    assert model.layers[0].down_proj.format == "int8"


def test_group_out_of_range_raises_value_error(tmp_path: Path) -> None:
    name = "model.layers.0.block_sparse_moe.experts.1.w1"
    hub.write(tmp_path, *ACT_ORDER, **{f"{name}.g_idx": torch.full((128,), 2, dtype=torch.int32)})
    with pytest.raises(ValueError, match=rf"{name}: g_idx is \[2, 2\], needs groups in 0\.\.1"):
        load(tmp_path, weights="int8")
