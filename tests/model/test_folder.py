"""A checkpoint's folder: names on the hub against a cache on disk, other layouts, and the one that ships with the
package: a trained Mixtral, balanced and small. Its config.json: how MixtralConfig reads
and normalizes it, and errors that name the field."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from tokenizers import Tokenizer

from mixtral_triton import Mixtral, MixtralConfig, verify
from mixtral_triton.checkpoint.config import SIZES, checkpoint_folder
from mixtral_triton.cli.commands import SMALL
from mixtral_triton.model.mixtral import LOAD_HINTS
from mixtral_triton.model.sampling import GENERATE_HINTS
from mixtral_triton.quantize.write import write
from tests.cli.commands import error_line, output
from tests.quantize.test_quantize_write import sharded
from tests.support.models import HELD_OUT, perplexity, random_model

pytestmark = pytest.mark.compiled
NAME, COMMIT = "someone/Mixtral-small", "0123456789" * 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A repository on a hub that answers from disk; `.downloads`: the patterns and the revision of each call."""
    remote, cache, downloads = sharded(tmp_path / "remote"), tmp_path / "cache" / "snapshots" / COMMIT, []
    (remote / "pytorch_model.bin").write_bytes(b"pickle")

    def snapshot_download(repository: str, revision: str | None = None, allow_patterns: Any = None) -> str:
        downloads.append((repository, revision, sorted(allow_patterns)))
        cache.mkdir(parents=True, exist_ok=True)
        for file in remote.iterdir():
            if file.name in allow_patterns:
                shutil.copy(file, cache / file.name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(remote=remote, cache=cache, downloads=downloads)


@pytest.mark.slow
def test_a_name_on_the_hub_stands_for_its_folder(hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mixtral_triton.checkpoint.arguments.default_device", lambda: "cpu")
    assert MixtralConfig.from_pretrained(NAME) == MixtralConfig.from_pretrained(SMALL)
    assert not list(hub.cache.glob("*.safetensors")) and hub.downloads[-1][:2] == (NAME, None)
    model = Mixtral.from_pretrained(f"{NAME}@v1.0", "cpu")
    assert hub.downloads[-2][:2] == (NAME, "v1.0")
    assert hub.downloads[-1] == (NAME, COMMIT, [f"model-{number}.safetensors" for number in range(3)])
    cached, remote = ({file.name for file in folder.iterdir()} for folder in (hub.cache, hub.remote))
    assert cached == remote - {"pytorch_model.bin"}
    hub.downloads.clear()
    Mixtral.from_pretrained(NAME, "cpu")
    assert {revision for _, revision, _ in hub.downloads} == {None}  # of a cache that has all, no commit is looked up
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids), Mixtral.from_pretrained(SMALL, "cpu")(ids))
    write(NAME, "out", "int8", "cpu")
    assert not verify(NAME, ids, quick=True).wrong and (Path("out") / "config.json").is_file()
    for command in ("generate", "trace"):
        assert output(f"{command} {NAME} --device cpu --prompt 'The return' --json")
    assert " fits" in output(f"fit {NAME} --gpu h100")
    shutil.copytree(SMALL, NAME)  # a folder comes before a name
    count = len(hub.downloads)
    assert checkpoint_folder(NAME) == Path(NAME) and len(hub.downloads) == count


@pytest.mark.parametrize("kind", ["RepositoryNotFoundError", "GatedRepoError", "HFValidationError", "RuntimeError"])
def test_errors_of_the_hub_are_one_line(kind: str, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    error_type = getattr(huggingface_hub.errors, kind, RuntimeError)
    error = error_type.__new__(error_type)  # some need a response
    error.args = ("two\nlines",)

    def fail(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=f"{NAME}@v9: is no folder here, and the hub says {kind}: .*lines"):
        Mixtral.from_pretrained(f"{NAME}@v9")
    assert error_line(f"generate --prompt x {NAME}@v9").endswith("two lines")


def test_no_weight_is_fetched_for_what_will_be_refused(hub: Any) -> None:
    """Another architecture; an index whose names, as patterns, would download anything."""
    index, config = hub.remote / "model.safetensors.index.json", json.loads((hub.remote / "config.json").read_text())
    index.write_text(json.dumps({"weight_map": {"a": "[m]*.safetensors"}}))
    with pytest.raises(ValueError, match=r"index.json: the file of 'a' is '\[m\]\*.safetensors', needs the"):
        Mixtral.from_pretrained(NAME, "cpu")
    (hub.remote / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"config.json: model_type is 'llama'"):
        Mixtral.from_pretrained(NAME, "cpu")
    assert len(hub.downloads) == 2


TOKENIZER = str(SMALL / "tokenizer.json")


@pytest.fixture(scope="module")
def model() -> Mixtral:
    return Mixtral.from_pretrained(SMALL, device="cpu", dtype=torch.float32)


def test_the_small_model_is_balanced_and_has_learnt_english(model: Mixtral) -> None:
    assert (SMALL / "model.safetensors").stat().st_size < 10_000_000
    config, text = model.config, torch.tensor(HELD_OUT)
    assert (config.num_local_experts, config.num_experts_per_tok, config.sliding_window) == (8, 2, 64)
    for experts in model.trace(text[:1024]).ids.flatten(1):
        assert experts.bincount(minlength=8).min() >= 0.03 * len(experts)
    tokenizer = Tokenizer.from_file(TOKENIZER)
    assert len(text) > 4000
    ends = (text == config.eos_token_id).nonzero().flatten()  # of whole documents, each from <s> to </s>
    assert text[0] == config.bos_token_id and ends[-1] == len(text) - 1
    assert (text[ends[:-1] + 1] == config.bos_token_id).all() and len(ends) == (text == config.bos_token_id).sum()
    assert "breaking out of the normal flow of control" in " ".join(tokenizer.decode(text.tolist()).split())
    assert math.log(perplexity(model)) < 3.5 < 0.6 * math.log(config.vocab_size)


TINY = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "vocab_size": 48}
TINY |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
TINY |= {"rope_theta": 1e6, "router_jitter_noise": 0.1, "use_cache": True}
ROPE = {"rope_theta": 5e5, "rope_type": "default"}


def write_config(folder, **changes):
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return folder


def without(*names):
    return {name: value for name, value in TINY.items() if name not in names}


def test_from_pretrained_reads_the_file(tmp_path):
    config = MixtralConfig.from_pretrained(write_config(tmp_path, torch_dtype="bfloat16"))
    assert {name: getattr(config, name) for name in SIZES} == {name: TINY[name] for name in SIZES}
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (4, 1e6, 1e-5)
    assert (config.sliding_window, config.tie_word_embeddings, config.dtype) == (None, False, "bfloat16")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    again = MixtralConfig.from_pretrained(str(tmp_path)), MixtralConfig.from_dict(TINY | {"dtype": config.dtype})
    assert again == (config, config)


NORMALIZED = {
    "sliding_window": [(0, None), (-1, None), (1, 1)],
    "head_dim": [(10, 10), (None, 4)],
    "rms_norm_eps": [(1, 1.0)],
    "tie_word_embeddings": [(True, True)],
    "eos_token_id": [([5], (5,)), (None, None)],
    "bos_token_id": [(None, None)],
    "pad_token_id": [(-1, None), (0, 0)],
    "dtype": [("torch.float16", "float16"), (None, None)],
}


@pytest.mark.parametrize("field", NORMALIZED)
def test_field_is_normalized(field):
    for value, normalized in NORMALIZED[field]:
        found = getattr(MixtralConfig.from_dict(TINY | {field: value}), field)
        assert found == normalized and type(found) is type(normalized)


def test_theta_is_read_from_either_place_and_needed():
    default = {"type": "default", "partial_rotary_factor": 1.0}
    for parameters in ({}, {"rope_parameters": ROPE}, {"rope_parameters": default}):
        assert MixtralConfig.from_dict(TINY | {"rope_theta": 500000} | parameters).rope_theta == 5e5
    for scaling in (None, {"type": "default"}):
        assert MixtralConfig.from_dict(TINY | {"rope_theta": 5e5, "rope_scaling": scaling}).rope_theta == 5e5
    assert MixtralConfig.from_dict(TINY | {"rope_theta": None, "rope_parameters": ROPE}).rope_theta == 5e5
    for values in (without("rope_theta"), without("rope_theta") | {"rope_parameters": {}}):
        with pytest.raises(ValueError, match=r"rope_theta is \{\}, needs one number, there or in rope_p"):
            MixtralConfig.from_dict(values)


@pytest.mark.parametrize("name", [*SIZES, "model_type"])
def test_missing_field_or_wrong_size_raises_value_error(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(without(name)))
    with pytest.raises(ValueError, match=rf"config\.json: .*{name}.* is missing"):
        MixtralConfig.from_pretrained(tmp_path)
    for value in (0, -1, 2**31, True, "4", 4.0, None, [4]) if name in SIZES else ():
        with pytest.raises(ValueError, match=rf"^config: {name} is .*, needs an integer from 1"):
            MixtralConfig.from_dict(TINY | {name: value})
        with pytest.raises(ValueError, match=rf"^{name} is"):
            MixtralConfig(**{"rope_theta": 1e6, name: value})


NAN, INF = float("nan"), float("inf")
WRONG = {  # values that are wrong by themselves
    "head_dim": (0, "8"),
    "rms_norm_eps": (0, NAN, "1e-5", True),
    "rope_theta": (-1.0, INF, "1e6"),
    "sliding_window": (-2, "full", False),
    "tie_word_embeddings": (1, None),
    "bos_token_id": ("<s>",),
    "pad_token_id": (True,),
    "dtype": ("int8",),
    "partial_rotary_factor": (0.5,),
    "rope_scaling": ("yarn",),
}
REJECTED = [
    ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4, .* num_local_experts = 3"),
    ({"num_key_value_heads": 3}, "num_key_value_heads is 3, .* num_attention_heads = 4"),
    ({"hidden_size": 18}, "hidden_size is 18, .* multiple of num_attention_heads = 4"),
    ({"hidden_size": 12}, "head_dim is 3, .* even"),
    ({"head_dim": 5}, "head_dim is 5, .* even"),
    ({"rope_theta": 10**400}, "rope_theta is 1000"),
    ({"eos_token_id": []}, r"eos_token_id is \(\)"),
    ({"eos_token_id": [2, -1]}, r"eos_token_id is \(2, -1\)"),
    ({"torch_dtype": 16}, "dtype is 16"),
    ({"model_type": "mistral"}, "model_type is 'mistral', needs one of mixtral, qwen3_moe, olmoe: in transformers"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', needs 'silu'"),
    ({"attention_bias": True}, "attention_bias is True, needs False"),
    ({"is_causal": False}, "is_causal is False, needs True"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type is 'linear'"),
    ({"rope_scaling": {"factor": 2.0}}, r"a key of rope_scaling is \['factor'\], needs one of"),
    ({"rope_parameters": ROPE | {"rope_type": "yarn"}}, r"rope_parameters\.rope_type is 'yarn'"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor is 0\.5"),
    ({"rope_parameters": ROPE}, r"rope_theta is \{'rope_theta': 1000000\.0, 'rope_p.* needs one number"),
    ({"rope_parameters": ROPE | {"rope_theta": 0}}, r"rope_parameters\.rope_theta is 0"),
    *(({name: value}, re.escape(f"{name} is {value!r}")) for name, values in WRONG.items() for value in values),
]


@pytest.mark.parametrize(("changes", "message"), REJECTED)
def test_wrong_field_raises_value_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        MixtralConfig.from_pretrained(write_config(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value)


# What is in the place of config.json, or given in the place of its folder.
NO_CONFIG: list[tuple[Any, type[Exception], str]] = [
    *((content, ValueError, r"config\.json: not readable as JSON") for content in (b"", b"{", b"[" * 100_000)),
    (b"[1]", ValueError, r"config\.json: the value is \[1\], needs a JSON object"),
    ("nowhere", FileNotFoundError, "nowhere: no such folder"),
    ("", FileNotFoundError, r"config\.json"),
    ("config.json", FileNotFoundError, r"config\.json: no such folder"),
    *((wrong, ValueError, f"folder is a {type(wrong).__name__}, needs the path") for wrong in (None, 3)),
]


@pytest.mark.parametrize(("given", "error", "message"), NO_CONFIG)
def test_what_is_no_config_is_refused(tmp_path: Path, given: Any, error: Any, message: str) -> None:
    if isinstance(given, bytes) or given == "config.json":
        (tmp_path / "config.json").write_bytes(given if isinstance(given, bytes) else b"{}")
    folder = tmp_path if isinstance(given, bytes) else tmp_path / given if isinstance(given, str) else given
    with pytest.raises(error, match=message):
        MixtralConfig.from_pretrained(folder)


def test_a_batch_encoding_is_generated_from() -> None:
    """Padding on either side: the texts are those of the prompts alone, behind the padded ids."""
    model = Mixtral.from_pretrained(SMALL, "cpu", "float32")
    texts = ["The return statement", "A list", "Of"]
    alone = [model.generate([ids], 5)[0][len(ids) :].tolist() for ids in model.tokenizer(texts).input_ids]
    for side in ("left", "right"):
        encoding = model.tokenizer(texts, return_tensors="pt", padding=True, padding_side=side)
        found = model.generate(**encoding, max_new_tokens=5)
        assert found[:, : encoding.input_ids.shape[1]].equal(encoding.input_ids)
        assert found[:, encoding.input_ids.shape[1] :].tolist() == alone
        steps = [step.tolist() for step in model.stream(**encoding, max_new_tokens=5)]
        assert [*map(list, zip(*steps, strict=True))] == alone
    lists = model.generate(**model.tokenizer(texts, padding=True), max_new_tokens=5)
    assert [text[-5:].tolist() for text in lists] == alone and len(lists[2]) == len(model.tokenizer("Of").input_ids) + 5
    ids = encoding.input_ids
    for mask in (torch.zeros_like(ids), ids[:, 1:], ids[0], 3, torch.tensor([[1, 0, 1, 1]] * 3)[:, : ids.shape[1]]):
        with pytest.raises(ValueError, match=r"generate: attention_mask is .*, needs 1 for the tokens"):
            model.generate(ids, 5, attention_mask=mask)


def test_arguments_of_transformers_name_ours() -> None:
    model, ids = random_model(), torch.tensor([[1, 2]])
    for name, need in GENERATE_HINTS.items():
        for call in (model.generate, model.stream):
            with pytest.raises(ValueError, match=re.escape(f"generate: there is no argument {name!r}, needs {need}")):
                call(ids, **{name: 1})
    for name, need in LOAD_HINTS.items():
        message = re.escape(f"Mixtral.from_pretrained: there is no argument {name!r}, needs {need}")
        with pytest.raises(ValueError, match=message):
            Mixtral.from_pretrained(SMALL, **{name: 1})
    with pytest.raises(ValueError, match=r"dtype is 'bf', needs one of torch.*, auto$"):
        Mixtral.from_pretrained(SMALL, "cpu", "bf")
    with pytest.raises(ValueError, match="no argument 'tempreature', needs one of those that help"):
        model.generate(ids, tempreature=1)
    with pytest.raises(ValueError, match="read from no folder"):
        model.tokenizer  # noqa: B018
