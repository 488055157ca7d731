"""MixtralConfig: reading config.json, normalization, and errors that name the field."""

import dataclasses
import json
import re

import pytest

from mixtral_triton.config import SIZES, MixtralConfig

pytestmark = pytest.mark.compiled
TINY = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_act": "silu", "vocab_size": 48}
TINY |= {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "max_position_embeddings": 64}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 3, "num_experts_per_tok": 2}
TINY |= {"rope_theta": 1e6, "router_jitter_noise": 0.1, "use_cache": True}
ROPE = {"rope_theta": 5e5, "rope_type": "default"}


def write(folder, **changes):
    (folder / "config.json").write_text(json.dumps(TINY | changes))
    return folder


def without(*names):
    return {name: value for name, value in TINY.items() if name not in names}


def test_from_pretrained_reads_the_file(tmp_path):
    config = MixtralConfig.from_pretrained(write(tmp_path, torch_dtype="bfloat16"))
    assert {name: getattr(config, name) for name in SIZES} == {name: TINY[name] for name in SIZES}
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (4, 1e6, 1e-5)
    assert (config.sliding_window, config.tie_word_embeddings, config.dtype) == (None, False, "bfloat16")
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    again = MixtralConfig.from_pretrained(str(tmp_path)), MixtralConfig.from_dict(TINY | {"dtype": config.dtype})
    assert again == (config, config)


def test_config_is_frozen_and_hashable():
    config = MixtralConfig(rope_theta=1e6)
    assert (config.hidden_size, config.head_dim, hash(config)) == (4096, 128, hash(MixtralConfig(rope_theta=1000000)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 1
    assert dataclasses.replace(config, sliding_window=7).sliding_window == 7


@pytest.mark.parametrize("window", [None, 9])
def test_reads_what_transformers_writes(tmp_path, window):
    fields = without("model_type", "architectures", "rope_theta") | {"rope_parameters": ROPE, "eos_token_id": [2, 7]}
    hf = pytest.importorskip("transformers").MixtralConfig(**fields, sliding_window=window)
    hf.save_pretrained(tmp_path)
    for config in (MixtralConfig.from_pretrained(tmp_path), MixtralConfig.from_dict(hf.to_dict())):
        assert (config.rope_theta, config.sliding_window, config.eos_token_id) == (5e5, window, (2, 7))


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


def test_theta_is_read_from_either_place():
    default = {"type": "default", "partial_rotary_factor": 1.0}
    for parameters in ({}, {"rope_parameters": ROPE}, {"rope_parameters": default}):
        assert MixtralConfig.from_dict(TINY | {"rope_theta": 500000} | parameters).rope_theta == 5e5
    for scaling in (None, {"type": "default"}):
        assert MixtralConfig.from_dict(TINY | {"rope_theta": 5e5, "rope_scaling": scaling}).rope_theta == 5e5
    assert MixtralConfig.from_dict(TINY | {"rope_theta": None, "rope_parameters": ROPE}).rope_theta == 5e5


def test_missing_theta_raises_error():
    for values in (without("rope_theta"), without("rope_theta") | {"rope_parameters": {}}):
        with pytest.raises(ValueError, match=r"rope_theta is missing"):
            MixtralConfig.from_dict(values)
    with pytest.raises(TypeError, match="rope_theta"):
        MixtralConfig()


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
    "attention_bias": (True,),
    "mlp_bias": (True,),
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
    ({"model_type": "mistral"}, "model_type is 'mistral', needs 'mixtral'"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu', needs 'silu'"),
    ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1, .* training"),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type is 'linear'"),
    ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has factor"),
    ({"rope_parameters": ROPE | {"rope_type": "yarn"}}, r"rope_parameters\.rope_type is 'yarn'"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor is 0\.5"),
    ({"rope_parameters": ROPE}, r"rope_theta = 1000000\.0 and rope_parameters\.rope_theta = 500000\.0 disagree"),
    ({"rope_parameters": ROPE | {"rope_theta": 0}}, r"rope_parameters\.rope_theta is 0"),
    *(({name: value}, re.escape(f"{name} is {value!r}")) for name, values in WRONG.items() for value in values),
]


@pytest.mark.parametrize(("changes", "message"), REJECTED)
def test_wrong_field_raises_value_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        MixtralConfig.from_pretrained(write(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value)


BROKEN = {
    "not readable as JSON": (b"", b"{", b"\xff\xfe{}"),
    "not readable as JSON: nested too deeply": (b"[" * 100_000,),
    "holds a JSON list, needs an object": (b"[1]",),
    "not readable as JSON: the key 'vocab_size' occurs 2 times": (b'{"vocab_size": 1, "vocab_size": 2}',),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_json_raises_value_error(tmp_path, message):
    for content in BROKEN[message]:
        (tmp_path / "config.json").write_bytes(content)
        with pytest.raises(ValueError, match=rf"config\.json: {message}"):
            MixtralConfig.from_pretrained(tmp_path)


def test_source_that_is_no_config_is_rejected(tmp_path):
    for values in (None, [], "mixtral"):
        with pytest.raises(ValueError, match=r"here: .*, needs a JSON object"):
            MixtralConfig.from_dict(values, source="here")
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MixtralConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        MixtralConfig.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"config\.json: is a file"):
        MixtralConfig.from_pretrained(write(tmp_path) / "config.json")
    with pytest.raises(ValueError, match="folder is None"):
        MixtralConfig.from_pretrained(None)
