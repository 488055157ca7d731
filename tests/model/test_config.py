"""MixtralConfig: reading config.json, normalization, and errors that name the field."""

import dataclasses
import json

import pytest

from mixtral_triton.config import SIZES, MixtralConfig

TINY = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "hidden_act": "silu",
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "rope_theta": 1e6,
    "router_jitter_noise": 0.1,
    "use_cache": True,
}
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
    hf = pytest.importorskip("transformers").MixtralConfig(
        **without("model_type", "architectures", "rope_theta"),
        rope_parameters=ROPE,
        sliding_window=window,
        eos_token_id=[2, 7],
    )
    hf.save_pretrained(tmp_path)
    for config in (MixtralConfig.from_pretrained(tmp_path), MixtralConfig.from_dict(hf.to_dict())):
        assert (config.rope_theta, config.sliding_window, config.eos_token_id) == (5e5, window, (2, 7))


@pytest.mark.parametrize(
    ("field", "value", "normalized"),
    [
        ("sliding_window", 0, None),
        ("sliding_window", -1, None),
        ("sliding_window", 1, 1),
        ("head_dim", 10, 10),
        ("head_dim", None, 4),
        ("rms_norm_eps", 1, 1.0),
        ("tie_word_embeddings", True, True),
        ("eos_token_id", [5], (5,)),
        ("eos_token_id", None, None),
        ("bos_token_id", None, None),
        ("pad_token_id", -1, None),
        ("pad_token_id", 0, 0),
        ("dtype", "torch.float16", "float16"),
        ("dtype", None, None),
    ],
)
def test_field_is_normalized(field, value, normalized):
    found = getattr(MixtralConfig.from_dict(TINY | {field: value}), field)
    assert found == normalized and type(found) is type(normalized)


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": 5e5},
        {"rope_theta": None, "rope_parameters": ROPE},
        {"rope_theta": 5e5, "rope_parameters": ROPE},
        {"rope_theta": 500000, "rope_parameters": {"type": "default", "partial_rotary_factor": 1.0}},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_theta": 5e5, "rope_scaling": {"type": "default"}},
    ],
)
def test_theta_is_read_from_either_place(changes):
    assert MixtralConfig.from_dict(TINY | changes).rope_theta == 5e5


@pytest.mark.parametrize("values", [without("rope_theta"), without("rope_theta") | {"rope_parameters": {}}])
def test_missing_theta_raises_value_error(values):
    with pytest.raises(ValueError, match=r"rope_theta is missing"):
        MixtralConfig.from_dict(values)
    with pytest.raises(TypeError, match="rope_theta"):
        MixtralConfig()


@pytest.mark.parametrize("name", [*SIZES, "model_type"])
def test_missing_field_raises_value_error(tmp_path, name):
    (tmp_path / "config.json").write_text(json.dumps(without(name)))
    with pytest.raises(ValueError, match=rf"config\.json: .*{name}.* is missing"):
        MixtralConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("value", [0, -1, 2**31, True, "4", 4.0, None, [4]])
def test_wrong_size_raises_value_error(name, value):
    with pytest.raises(ValueError, match=rf"^config: {name} is .*, needs an integer from 1"):
        MixtralConfig.from_dict(TINY | {name: value})
    with pytest.raises(ValueError, match=rf"^{name} is"):
        MixtralConfig(**{"rope_theta": 1e6, name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 4}, "num_experts_per_tok is 4, .* num_local_experts = 3"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, .* num_attention_heads = 4"),
        ({"hidden_size": 18}, "hidden_size is 18, .* multiple of num_attention_heads = 4"),
        ({"hidden_size": 12}, "head_dim is 3, .* even"),
        ({"head_dim": 5}, "head_dim is 5, .* even"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": "8"}, "head_dim is '8'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0,"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True"),
        ({"rope_theta": -1.0}, r"rope_theta is -1\.0"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": 10**400}, "rope_theta is 1000"),
        ({"rope_theta": "1e6"}, "rope_theta is '1e6'"),
        ({"sliding_window": -2}, "sliding_window is -2"),
        ({"sliding_window": "full"}, "sliding_window is 'full'"),
        ({"sliding_window": False}, "sliding_window is False"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings is None"),
        ({"eos_token_id": []}, r"eos_token_id is \(\)"),
        ({"eos_token_id": [2, -1]}, r"eos_token_id is \(2, -1\)"),
        ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
        ({"pad_token_id": True}, "pad_token_id is True"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"torch_dtype": 16}, "dtype is 16"),
        ({"model_type": "mistral"}, "model_type is 'mistral', needs 'mixtral'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', needs 'silu'"),
        ({"attention_dropout": 0.1}, r"attention_dropout is 0\.1, .* training"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, r"rope_scaling\.type is 'linear'"),
        ({"rope_scaling": {"factor": 2.0}}, "rope_scaling has factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'"),
        ({"rope_parameters": ROPE | {"rope_type": "yarn"}}, r"rope_parameters\.rope_type is 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"rope_parameters\.partial_rotary_factor is 0\.5"),
        ({"rope_parameters": ROPE}, r"rope_theta = 1000000\.0 and rope_parameters\.rope_theta = 500000\.0 disagree"),
        ({"rope_parameters": ROPE | {"rope_theta": 0}}, r"rope_parameters\.rope_theta is 0"),
    ],
)
def test_wrong_field_raises_value_error(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        MixtralConfig.from_pretrained(write(tmp_path, **changes))
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("values", [None, [], "mixtral"])
def test_from_dict_of_no_mapping_raises_value_error(values):
    with pytest.raises(ValueError, match=r"here: .*, needs a JSON object"):
        MixtralConfig.from_dict(values, source="here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable as JSON"),
        (b"{", "not readable as JSON"),
        (b"\xff\xfe{}", "not readable as JSON"),
        (b"[" * 100_000, "not readable as JSON: nested too deeply"),
        (b"[1]", "holds a JSON list, needs an object"),
        (b'{"vocab_size": 1, "vocab_size": 2}', "not readable as JSON: the key 'vocab_size' occurs 2 times"),
    ],
    ids=["empty", "cut", "not utf-8", "deep", "list", "twice"],
)
def test_broken_json_raises_value_error(tmp_path, content, message):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"config\.json: {message}"):
        MixtralConfig.from_pretrained(tmp_path)


def test_missing_folder_or_file_raises_os_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        MixtralConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"config\.json: no such file"):
        MixtralConfig.from_pretrained(tmp_path)
    with pytest.raises(NotADirectoryError, match=r"config\.json: is a file"):
        MixtralConfig.from_pretrained(write(tmp_path) / "config.json")
    with pytest.raises(ValueError, match="folder is None"):
        MixtralConfig.from_pretrained(None)
