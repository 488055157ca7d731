"""The loader: every stored value reaches its parameter, and damaged files raise ValueError or OSError."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from mixtral_triton import SMALL, Mixtral
from mixtral_triton.checkpoint import tensors as checkpoint
from mixtral_triton.checkpoint.config import MixtralConfig
from mixtral_triton.checkpoint.tensors import (
    DTYPES,
    EMBEDDING,
    check,
    parameter_shapes,
    read_headers,
    table,
    total_bytes,
)
from mixtral_triton.quantize import hub

pytestmark = pytest.mark.compiled
COUNTS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "num_local_experts": 3}
CONFIG = MixtralConfig(**COUNTS, vocab_size=48, hidden_size=16, intermediate_size=24, head_dim=6, rope_theta=1e6)
TIED = replace(CONFIG, tie_word_embeddings=True)
LAYOUTS = ("per_expert", "fused")
INDEX = "model.safetensors.index.json"
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.norm.weight"
EVERY_TENSOR = [(layout, name) for layout in LAYOUTS for name in table(CONFIG, layout)]


def tensors_of(config, layout="per_expert", dtype=torch.bfloat16):
    torch.manual_seed(0)
    return {name: torch.randn(target.shape).to(dtype) for name, target in table(config, layout).items()}


def allocate(config, dtype=torch.bfloat16, device="cpu"):
    return {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in parameter_shapes(config).items()}


def load(folder, config, parameters, progress=lambda size: None):
    headers = read_headers(folder)
    hub.read_weights(headers, hub.plan_load(headers, config), config, parameters, progress)


def save(folder, tensors, shards=1):
    """Write one file, or an index and `shards` files that hold the tensors in turn."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / INDEX).unlink(missing_ok=True)
        return folder
    weight_map = {name: f"model-{number % shards}.safetensors" for number, name in enumerate(tensors)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in tensors if weight_map[name] == file}, folder / file)
    return save_index(folder, weight_map)


def save_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def expected(config, tensors, layout):
    """Return the parameters by plain concatenation, without `table`."""
    whole = {"embed_tokens": tensors["model.embed_tokens.weight"], "norm": tensors["model.norm.weight"]}
    if not config.tie_word_embeddings:
        whole["lm_head"] = tensors["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        disk, here = f"model.layers.{layer}", f"layers.{layer}"
        for name in ("input_layernorm", "post_attention_layernorm"):
            whole[f"{here}.{name}"] = tensors[f"{disk}.{name}.weight"]
        q, k, v, whole[f"{here}.o_proj"] = (tensors[f"{disk}.self_attn.{name}_proj.weight"] for name in "qkvo")
        whole[f"{here}.qkv_proj"] = torch.cat([q, k, v])
        for name in ("q_norm", "k_norm") if config.family.norms else ():
            whole[f"{here}.{name}"] = tensors[f"{disk}.self_attn.{name}.weight"]
        moe = f"{disk}.mlp" if layout == "fused" else f"{disk}.block_sparse_moe"
        whole[f"{here}.gate"] = tensors[f"{moe}.gate.weight"]
        if layout == "fused":
            whole |= {f"{here}.{name}": tensors[f"{moe}.experts.{name}"] for name in ("gate_up_proj", "down_proj")}
            continue
        experts = [f"{moe}.experts.{expert}" for expert in range(config.num_local_experts)]
        w1, w2, w3 = (torch.stack([tensors[f"{at}.{w}.weight"] for at in experts]) for w in ("w1", "w2", "w3"))
        whole |= {f"{here}.gate_up_proj": torch.cat([w1, w3], dim=1), f"{here}.down_proj": w2}
    return whole


def assert_loads(folder, tensors, config=CONFIG, layout="per_expert", dtype=torch.bfloat16):
    parameters, loaded = allocate(config, dtype), []
    load(folder, config, parameters, loaded.append)
    want = expected(config, tensors, layout)
    assert parameters.keys() == want.keys()
    assert [name for name, got in parameters.items() if not torch.equal(got, want[name].to(dtype))] == []
    assert sum(loaded) == total_bytes(read_headers(folder))


def assert_refused(folder, message, config=CONFIG, error=ValueError, dtype=torch.bfloat16):
    with pytest.raises(error, match=message) as caught:
        load(folder, config, allocate(config, dtype))
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["head", "tied"])
@pytest.mark.parametrize("chunk_bytes", [40, 2**24], ids=["many chunks", "one chunk"])
def test_every_value_reaches_its_parameter(tmp_path, monkeypatch, layout, shards, config, chunk_bytes):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
    tensors = tensors_of(config, layout)
    assert_loads(save(tmp_path, tensors, shards), tensors, config, layout)
    assert total_bytes(read_headers(tmp_path)) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_are_cast_to_the_parameters_dtype(tmp_path, stored, wanted):
    tensors = tensors_of(CONFIG, dtype=stored)
    assert_loads(save(tmp_path, tensors), tensors, dtype=wanted)
    assert DTYPES[read_headers(tmp_path).tensors[EMBEDDING].dtype] == stored


def test_loading_keeps_gradients_and_devices(tmp_path):
    """On the meta device only headers are read."""
    tensors = tensors_of(CONFIG)
    parameters = {name: torch.nn.Parameter(tensor) for name, tensor in allocate(CONFIG).items()}
    with torch.device("meta"):
        load(save(tmp_path, tensors), CONFIG, parameters)
    assert torch.equal(parameters["norm"], tensors["model.norm.weight"]) and parameters["norm"].requires_grad
    tensors[Q_PROJ][0, 0] = torch.nan
    parameters, loaded = allocate(CONFIG, device="meta"), []
    load(save(tmp_path, tensors), CONFIG, parameters, loaded.append)
    assert not loaded and all(parameter.is_meta for parameter in parameters.values())
    del tensors[Q_PROJ]
    with pytest.raises(ValueError, match="q_proj"):
        load(save(tmp_path, tensors), CONFIG, parameters)


def test_cache_of_links_loads(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    tensors = tensors_of(CONFIG)
    for number, file in enumerate(sorted(save(blobs, tensors, shards=2).iterdir())):
        file.rename(blobs / str(number))
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / str(number))
    assert_loads(snapshot, tensors)
    assert_refused(save_index(save(tmp_path, tensors), {"anything": "gone.safetensors"}), "needs one of the two")
    (blobs / "0").unlink()
    assert_refused(snapshot, r"model-0\.safetensors: no such file", error=FileNotFoundError)


def test_stored_tied_head_must_equal_the_embedding(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 100)
    tensors = tensors_of(TIED)
    head = tensors["model.embed_tokens.weight"].clone()
    assert_loads(save(tmp_path, tensors | {"lm_head.weight": head}, shards=2), tensors, TIED)
    head[-1, -1] += 1
    assert_refused(save(tmp_path, tensors | {"lm_head.weight": head}), r"lm_head\.weight differs .*tie_word", TIED)
    short = tensors | {"lm_head.weight": head[1:].clone()}
    assert_refused(save(tmp_path, short), r"lm_head\.weight has shape \(47", TIED)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("layout", "name"), EVERY_TENSOR)
def test_missing_misshapen_or_non_finite_tensor_raises_value_error(tmp_path, monkeypatch, layout, name):
    tensors = tensors_of(CONFIG, layout)
    tensor = tensors.pop(name)
    assert_refused(save(tmp_path, tensors), rf"asks for: 1 missing \({name}\)$")
    assert_refused(save(tmp_path, tensors | {name: tensor[..., 1:].clone()}), rf"asks for: {name} has shape .*, not ")
    assert_refused(save(tmp_path, tensors | {name: tensor[None].clone()}), rf"asks for: {name} has shape .*, not ")
    for value, chunk_bytes, wanted in itertools.product((torch.nan, -torch.inf), (40, 2**24), ("bfloat16", "float16")):
        monkeypatch.setattr(checkpoint, "CHUNK_BYTES", chunk_bytes)
        tensor.view(-1)[-1] = value
        message = rf"model\.safetensors: {name} is not finite everywhere: .* damaged"
        assert_refused(save(tmp_path, tensors | {name: tensor}), message, dtype=getattr(torch, wanted))


def test_unknown_tensors_and_mixed_layouts_raise_value_error(tmp_path):
    tensors, one = tensors_of(CONFIG), torch.ones(1, dtype=torch.bfloat16)
    for name in ("model.layers.0.self_attn.q_proj.bias", "model.layers.2.input_layernorm.weight", "x"):
        assert_refused(save(tmp_path, tensors | {name: one}), rf"1 unknown \({name}\)$")
    many = {f"extra.{number}": one.clone() for number in range(9)}
    assert_refused(save(tmp_path, tensors | many), r"9 unknown \(extra\.0, .*extra\.3 and 5 more\)$")
    fused = {name: tensor for name, tensor in tensors_of(CONFIG, "fused").items() if ".layers.1." in name}
    first = {name: tensor for name, tensor in tensors.items() if ".layers.1." not in name}
    assert_refused(save(tmp_path, first | fused), r"3 missing .*mlp\..* 10 unknown .*block_sparse_moe")


def test_other_config_raises_value_error(tmp_path):
    """Fast, however large the config's sizes are."""
    headers = read_headers(save(tmp_path, tensors_of(CONFIG)))
    for name in ("num_hidden_layers", "num_local_experts", "vocab_size"):
        with pytest.raises(ValueError, match="config asks for"):
            check(headers, replace(CONFIG, **{name: 10**9}))


@pytest.mark.parametrize(("stored", "wanted", "value"), [("bfloat16", "float16", 1e6), ("float32", "bfloat16", 3.4e38)])
def test_overflowing_cast_raises_value_error(tmp_path, stored, wanted, value):
    tensors = tensors_of(CONFIG, dtype=getattr(torch, stored))
    tensors[Q_PROJ][3, 5] = value
    message = rf"{Q_PROJ} is not finite everywhere: torch\.{wanted} cannot hold it"
    assert_refused(save(tmp_path, tensors), message, dtype=getattr(torch, wanted))
    assert_loads(tmp_path, tensors, dtype=getattr(torch, stored))
    tensors = {name: torch.full_like(tensor, 60000) for name, tensor in tensors_of(CONFIG, dtype=torch.float16).items()}
    assert_loads(save(tmp_path, tensors), tensors, dtype=torch.float16)  # a sum of finite values overflows
    tensors[NORM][:2] = torch.tensor([torch.inf, -torch.inf])
    assert_refused(save(tmp_path, tensors), f"{NORM} is not finite everywhere: .* damaged")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.int64, torch.float64, torch.float32])
def test_other_and_mixed_dtypes_raise_value_error(tmp_path, dtype):
    tensors = tensors_of(CONFIG)
    tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
    message = rf"'{Q_PROJ}' is stored as '[FI]\w+', needs one of F32, BF16, F16|most are BF16, but {Q_PROJ} is F32$"
    assert_refused(save(tmp_path, tensors, shards=2), message)


DAMAGES = {  # by what the message says
    "cut off, damaged or not safetensors .* not fully covered": [lambda data: data[:-1], lambda data: data + b"\0"],
    r"\(0 bytes\): .* header too small": [lambda data: b""],
    "header too large": [lambda data: (2**63).to_bytes(8, "little") + data[8:]],
    "invalid JSON": [lambda data: data[:8] + b"[" * (len(data) - 8)],
}


@pytest.mark.parametrize("message", DAMAGES)
def test_damaged_file_raises_value_error(tmp_path, message):
    path = save(tmp_path, tensors_of(CONFIG)) / "model.safetensors"
    data = path.read_bytes()
    for damage in DAMAGES[message]:
        path.write_bytes(damage(data))
        assert_refused(tmp_path, rf"model\.safetensors.*{message}")


def test_a_lack_of_memory_is_a_value_error_and_not_a_damaged_file(tmp_path, monkeypatch):
    file, error = save(tmp_path, tensors_of(CONFIG)) / "model.safetensors", torch.OutOfMemoryError("2 GiB")
    with pytest.raises(ValueError, match=r"^no memory is left for the weights: 2 GiB"), checkpoint.opened_file(file):
        raise error
    monkeypatch.setattr(Mixtral, "__init__", Mock(side_effect=error))
    with pytest.raises(ValueError, match="no memory is left on cpu for the weights: 2 GiB"):
        Mixtral.from_pretrained(SMALL, "cpu")


@pytest.mark.parametrize("file", ["../x", "/x", "a/x", "..", ".", "", None, 3, ["x"], "model.bin", "x.pt"])
def test_index_of_other_files_raises_value_error(tmp_path, file):
    file = f"{file}.safetensors" if str(file).endswith("x") else file
    save_file({Q_PROJ: torch.ones(1)}, tmp_path.parent / "x.safetensors")
    weight_map = json.loads((save(tmp_path, tensors_of(CONFIG), shards=2) / INDEX).read_text())["weight_map"]
    assert_refused(
        save_index(tmp_path, weight_map | {Q_PROJ: file}), rf"index\.json: the file of '{Q_PROJ}' is .*plain"
    )


def test_index_that_disagrees_with_its_files_is_rejected(tmp_path):
    for content in ("", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (tmp_path / INDEX).write_text(content)
        assert_refused(tmp_path, "not readable as JSON|a JSON object|weight_map is|holds 0 tensors")
    weight_map = json.loads((save(tmp_path, tensors_of(CONFIG), shards=2) / INDEX).read_text())["weight_map"]
    here, there = sorted(set(weight_map.values()), key=lambda file: file != weight_map[Q_PROJ])
    assert_refused(save_index(tmp_path, weight_map | {Q_PROJ: there}), rf"{INDEX} asks for.*{Q_PROJ}")
    assert_refused(save_index(tmp_path, weight_map | {"x": there}), rf"{there}: .*1 missing \(x\)")
    (tmp_path / there).unlink()
    assert_refused(tmp_path, rf"{there}: no such file", error=FileNotFoundError)
    (tmp_path / there).mkdir()
    assert_refused(tmp_path, rf"{there}: no such file", error=FileNotFoundError)
    del weight_map[Q_PROJ]
    assert_refused(save_index(tmp_path, weight_map), rf"{here}: .*1 unknown \({Q_PROJ}\)")


def test_pickled_or_missing_weights_are_rejected(tmp_path):
    assert_refused(tmp_path / "nowhere", "nowhere: no such folder", error=FileNotFoundError)
    torch.save({}, tmp_path / "pytorch_model.bin")
    assert_refused(tmp_path, r"model\.safetensors: no such file, needs what transf", error=FileNotFoundError)
