"""`mixtral-triton quantize` writes checkpoints of compressed-tensors that load bit for bit."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mixtral_triton import Mixtral
from mixtral_triton.cli import SMALL, main
from mixtral_triton.quantize import QuantizedWeight, quantize
from mixtral_triton.quantize import write as writer
from mixtral_triton.quantize.hub import read_headers
from mixtral_triton.quantize.write import write
from mixtral_triton.verification import verify
from mixtral_triton.weights import total_bytes
from tests.model.test_weights import save
from tests.quantize.test_quantize import EXPERT, FORMATS, IMPORTS, LOADED, checkpoint, fused, large, small_tensors
from tests.quantize.test_quantize_hub import load
from tests.support.memory import anonymous_peak, needs_proc

pytestmark = pytest.mark.compiled
MIXED = {"experts": "int4", "linear": "int8"}
W1 = "model.layers.1.block_sparse_moe.experts.2.w1"


def same(a: Mixtral, b: Mixtral) -> bool:
    """Whether two models have the same weights bit for bit, codes and scales included."""
    ours, theirs = a.state_dict(), b.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def sharded(folder: Path) -> Path:
    """Write the small checkpoint in three files."""
    folder.mkdir()
    save(folder, small_tensors(), shards=3)
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_bytes((SMALL / name).read_bytes())
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("format", [*FORMATS, {"experts": "int4", "linear": "fp8"}, MIXED], ids=str)
@pytest.mark.parametrize("source", ["one file", "shards", "fused"])
def test_written_checkpoint_loads_exactly(tmp_path: Path, format: Any, source: str, monkeypatch: Any) -> None:
    makers = {"shards": sharded, "fused": fused}
    folder = makers[source](tmp_path / "in") if source in makers else SMALL
    read: list[int] = []
    monkeypatch.setattr("mixtral_triton.quantize.PIECE", 5000)
    size = write(folder, tmp_path / "out", format, "cpu", read.append)
    assert sum(read) == total_bytes(read_headers(SMALL)) and size == total_bytes(read_headers(tmp_path / "out"))
    assert same(load(tmp_path / "out"), load(SMALL, weights=format))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    if source == "shards":
        assert names == {path.name for path in (tmp_path / "in").iterdir()}
    if source == "one file":
        assert names == {path.name for path in SMALL.iterdir() if path.is_file()}
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (SMALL / "tokenizer.json").read_bytes()


def written_config(library: Any, out: Path, format: Any) -> Any:
    write(SMALL, out, format, "cpu")
    written = json.loads((out / "config.json").read_text())["quantization_config"]
    return library.QuantizationConfig.model_validate(written)


@pytest.mark.parametrize("format", FORMATS)
def test_library_of_compressed_tensors_reads_it(tmp_path: Path, format: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.compressors import BaseCompressor

    config = written_config(library, tmp_path / "out", format)
    assert set(config.ignore) >= {"lm_head", "model.layers.0.block_sparse_moe.gate", "model.layers.3.self_attn.q_proj"}
    assert not [name for name in config.ignore if "experts" in name]
    parts, dense = load_file(tmp_path / "out" / "model.safetensors"), small_tensors()
    assert all(torch.equal(parts[name], dense[name]) for name in dense if "experts" not in name)
    linear = {name.removeprefix(f"{W1}."): tensor for name, tensor in parts.items() if name.startswith(f"{W1}.")}
    linear["weight_scale"] = linear["weight_scale"].float()  # it computes in the scale's dtype
    scheme = config.config_groups["group_0"]
    theirs = BaseCompressor.get_value_from_registry(config.format).decompress(linear, scheme)["weight"]
    assert torch.equal(theirs.float(), quantize(dense[f"{W1}.weight"], format).dequantize())


@pytest.mark.parametrize("linear", ["int8", "fp8"])
def test_library_of_compressed_tensors_finds_the_formats(tmp_path: Path, linear: str) -> None:
    library = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.utils import is_match

    config, module = written_config(library, tmp_path / "out", {"experts": "int4", "linear": linear}), nn.Linear(1, 1)
    assert config.format == ("pack-quantized" if linear == "int8" else "mixed-precision")
    for name, bits in {W1: 4, "model.layers.3.self_attn.q_proj": 8, "lm_head": 8}.items():
        groups = [each for each in config.config_groups.values() if is_match(name, module, each.targets)]
        assert [each.weights.num_bits for each in groups] == [bits] and name not in config.ignore


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


@pytest.mark.parametrize("format", [*FORMATS, *PAIRS], ids=str)
@pytest.mark.parametrize("head", ["untied", "tied", "tied, in the file"])
@pytest.mark.parametrize("dequantize", [False, True])
def test_transformers_computes_the_logits_of_the_dequantized_model(
    tmp_path: Path, format: Any, head: str, dequantize: bool
) -> None:
    transformers = pytest.importorskip("transformers")
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
    assert not (tmp_path / "again").exists()
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(ValueError, match="is there already and not an empty folder"):
            write(SMALL, out, "int4", "cpu")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out"}
    assert (tmp_path / "file").read_text() == "mine"


WRITTEN = "write(sys.argv[1], sys.argv[2], 'int4', 'cpu'); size = 0"


@pytest.mark.slow
@needs_proc
def test_peak_memory_is_one_shard(tmp_path: Path) -> None:
    large(tmp_path)
    out = str(tmp_path / "out")
    peak, _ = anonymous_peak("from mixtral_triton.quantize.write import write", WRITTEN, str(tmp_path), out)
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


def test_full_disk_names_the_file_and_removes_it(tmp_path: Path) -> None:
    """The system limits files to half a megabyte."""
    resource = pytest.importorskip("resource")
    out = tmp_path / "out"
    code = f"from mixtral_triton.cli import main; raise SystemExit(main(['quantize', {str(SMALL)!r}, {str(out)!r}, "
    command = [sys.executable, "-c", f"{code}'--weights', 'int8', '--device', 'cpu']))"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))  # noqa: E731 (one use)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, preexec_fn=limit, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and not out.exists()
    assert done.stderr == f"mixtral-triton quantize: {out / 'model.safetensors'}: {os.strerror(errno.EFBIG)}\n"


def test_command_writes_a_checkpoint_for_other_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["quantize", str(SMALL), out, "--weights", "int4", "--device", "cpu", "--json"]) == 0
    sizes = json.loads(capsys.readouterr().out)
    assert sizes["weights"] == "int4" and sizes["bytes"] < sizes["bytes_before"] and sizes["out"] == out
    assert main(["quantize", str(SMALL), out, "--weights", "int4"]) == 2
    line = capsys.readouterr().err
    assert line == f"mixtral-triton quantize: {out} is there already and not an empty folder\n"
    generate = ["--device", "cpu", "--prompt", "The return statement", "--max-new-tokens", "4", "--json"]
    assert main(["generate", out, *generate]) == 0
    read = json.loads(capsys.readouterr().out)["tokens"]
    assert main(["generate", "--weights", "int4", *generate]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == read
    trace = ["trace", "--device", "cpu", "--prompt", "The return statement", "--json"]
    assert main([*trace, out]) == main([*trace, "--weights", "int4"]) == 0
    read, quantized = map(json.loads, capsys.readouterr().out.splitlines())
    assert read["experts"] == quantized["experts"]


@pytest.mark.parametrize("format", ["int4", MIXED], ids=str)
def test_verify_accepts_the_written_checkpoint(tmp_path: Path, format: Any) -> None:
    write(SMALL, tmp_path / "out", format, "cpu")
    report = verify(load(tmp_path / "out"), torch.arange(3, 15)[None], folder=tmp_path / "out")
    assert not report.wrong
    stored = [row for row in report.rows if row.op == "weights" and row.case != "finite"]
    assert [(row.case, row.error) for row in stored] == [("as stored", 0.0)] * 5


def test_injected_swapped_nibbles_are_detected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def swapped(codes: Tensor, format: str) -> Tensor:
        return codes[:, 1::2] | codes[:, 0::2] << 4

    monkeypatch.setattr(writer, "_pack", swapped)
    write(SMALL, tmp_path / "out", "int4", "cpu")
    assert not same(load(tmp_path / "out"), load(SMALL, weights="int4"))
    assert isinstance(load(tmp_path / "out").layers[0].down_proj, QuantizedWeight)
