"""MixtralConfig: a checkpoint's config.json, read, checked and frozen."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "max_position_embeddings"),
)
LARGEST_SIZE = 2**31 - 1  # kernels index rows with int32
MOST_POSITIONS = 1 << 22  # the rotary tables hold a row for each: 2 GiB of them at head size 128
DTYPES = ("float32", "bfloat16", "float16")


def _is_int(value: Any, least: int = 1, most: int = LARGEST_SIZE) -> bool:
    return type(value) is int and least <= value <= most


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e308


def _is_id(value: Any) -> bool:
    return all(_is_int(one, 0) for one in value) and value != () if isinstance(value, tuple) else _is_int(value, 0)


def _normalize(name: str, value: Any) -> Any:
    """Return a float for numbers, None for integers that mean none, a tuple for a list, a dtype without "torch."."""
    if name in ("rms_norm_eps", "rope_theta") and _is_positive(value):
        return float(value)
    if type(value) is int and (value == -1 or (value == 0 and name == "sliding_window")):
        return None if name in NULLABLE else value
    if name == "dtype" and isinstance(value, str):
        return value.removeprefix("torch.")
    return tuple(value) if isinstance(value, list) else value


_NUMBER = (_is_positive, "a finite number above 0")
_ID = (_is_id, "a token id (an integer, 0 or above) or null")
# The check of each field's normalized value, and what the error says is needed.
FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(SIZES, (_is_int, f"an integer from 1 to {LARGEST_SIZE}")),
    "max_position_embeddings": (lambda n: _is_int(n, 1, MOST_POSITIONS), f"an integer from 1 to {MOST_POSITIONS}"),
    "head_dim": (lambda n: _is_int(n) and n % 2 == 0, "an even integer above 0: rotary embedding pairs its halves"),
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "sliding_window": (_is_int, "an integer above 0; null, 0, -1: no window"),
    "tie_word_embeddings": (lambda value: type(value) is bool, "true or false"),
    "bos_token_id": _ID,
    "pad_token_id": _ID,
    "eos_token_id": (_is_id, "a token id, a list of at least one, or null"),
    "dtype": (DTYPES.__contains__, f"one of {', '.join(DTYPES)}, or null"),
}
NULLABLE = {"sliding_window", "bos_token_id", "pad_token_id", "eos_token_id", "dtype"}
# The only values that a config.json may have for what Mixtral has no code for, and the reason.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("mixtral",), "other families have other layers"),
    "hidden_act": (("silu",), "Mixtral's experts are SwiGLU"),
    "attention_dropout": ((0, None), "dropout belongs to training, this runtime is for inference"),
    "attention_bias": ((False, None), "Mixtral's projections have no bias"),
    "mlp_bias": ((False, None), "Mixtral's experts have no bias"),
    "partial_rotary_factor": ((1, None), "Mixtral rotates full heads"),
}
ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """The sizes and constants of a Mixtral model, under the names that checkpoints use (transformers' MixtralConfig).

    Defaults are Mixtral 8x7B's; only `rope_theta` has none. The constructor, `from_dict` and `from_pretrained` run the
    same checks and raise ValueError naming the field.

    `head_dim` None becomes hidden_size // num_attention_heads. `sliding_window` None, 0 or -1 means no window and is
    kept as None; W means that query i sees keys i - W < j <= i. `eos_token_id` may be one id or several.
    `dtype` is what the file says ("bfloat16", ...); the stored tensors decide.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # __post_init__ sets an int
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    rms_norm_eps: float = 1e-5
    rope_theta: float
    max_position_embeddings: int = 32768
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        heads = self.num_attention_heads
        for name, (check, need) in FIELDS.items():
            value = getattr(self, name)
            if name == "head_dim" and value is None:
                multiple = f"a multiple of num_attention_heads = {heads} where head_dim is not given"
                _check("hidden_size", self.hidden_size, multiple, self.hidden_size % heads == 0)
                value = self.hidden_size // heads
            value = _normalize(name, value)
            _check(name, value, need, (name in NULLABLE and value is None) or check(value))
            object.__setattr__(self, name, value)  # the only assignment that a frozen dataclass allows
        experts, kv_heads = self.num_experts_per_tok, self.num_key_value_heads
        need = f"at most num_local_experts = {self.num_local_experts}"
        _check("num_experts_per_tok", experts, need, experts <= self.num_local_experts)
        _check("num_key_value_heads", kv_heads, f"a divisor of num_attention_heads = {heads}", heads % kv_heads == 0)

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> MixtralConfig:
        """Read `folder`/config.json, as Hugging Face checkpoints have it.

        Raises FileNotFoundError for a missing folder or file, ValueError for anything else; the message names the file,
        the field, what it got and what is needed.
        """
        path = checkpoint_folder(folder) / "config.json"
        refuse_gguf(path.parent)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; a checkpoint folder needs its config.json")
        return cls.from_dict(parse_json_object(path.read_bytes(), str(path)), source=str(path))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> MixtralConfig:
        """Return the config in `values`, a config.json's content; `source` names it in errors.

        All sizes and theta are required, since a default would silently be another model. Fields that do not change
        inference (router_jitter_noise, use_cache, ...) are ignored; those that would need other code are refused.
        """
        try:
            if not isinstance(values, Mapping):
                raise ValueError(f"is {type(values).__name__}, a JSON object is needed")
            if missing := [name for name in ("model_type", *SIZES) if name not in values]:
                raise ValueError(f"{', '.join(missing)} is missing and has no safe default")
            for name in FIXED:
                _check_fixed(name, name, values)
            fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            fields.setdefault("dtype", values.get("torch_dtype"))  # transformers < 5 wrote it under this name
            return cls(**fields | {"rope_theta": _read_theta(values)})
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def _check(name: str, value: object, need: str, right: bool) -> None:
    if not right:
        raise ValueError(f"{name} is {value!r:.80}; it must be {need}")  # cut: a broken file may hold anything


def _check_fixed(name: str, key: str, values: Mapping[str, Any]) -> None:
    allowed, reason = FIXED[key]
    _check(name, values.get(key), f"{allowed[0]!r}: {reason}", key not in values or values[key] in allowed)


def _read_theta(values: Mapping[str, Any]) -> float:
    """Return theta, from `rope_theta` in old configs and `rope_parameters` in new ones; refuse other ropes."""
    found = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        _check(name, rope, "an object or null", isinstance(rope, Mapping))
        for key in ("rope_type", "type"):
            kind = rope.get(key, "default")
            _check(f"{name}.{key}", kind, "'default': scaled rotary embeddings are not supported", kind == "default")
        _check_fixed(f"{name}.partial_rotary_factor", "partial_rotary_factor", rope)
        if unknown := sorted(str(key) for key in rope if key not in ROPE_KEYS and rope[key] is not None):
            raise ValueError(f"{name} has {', '.join(unknown)}; only {', '.join(sorted(ROPE_KEYS))} are supported")
        found[f"{name}.rope_theta"] = rope.get("rope_theta")
    thetas = {name: _normalize("rope_theta", theta) for name, theta in found.items() if theta is not None}
    for name, theta in thetas.items():
        _check(name, theta, _NUMBER[1], _is_positive(theta))
    if not thetas:
        raise ValueError("rope_theta is missing, in rope_parameters too, and has no safe default")
    if len(set(thetas.values())) > 1:
        raise ValueError(" and ".join(f"{name} = {theta}" for name, theta in thetas.items()) + " disagree")
    return next(iter(thetas.values()))


def checkpoint_folder(folder: str | os.PathLike[str]) -> Path:
    """Return `folder` as a Path; FileNotFoundError if there is none, NotADirectoryError if it is a file."""
    try:
        path = Path(folder)
    except TypeError:
        raise ValueError(f"folder is {folder!r}; the path of a checkpoint folder is needed") from None
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path}: is a file; the folder that holds config.json is needed")
    raise FileNotFoundError(f"{path}: no such folder; a local checkpoint folder is needed (`hf download` fetches one)")


def refuse_gguf(folder: Path) -> None:
    """Raise ValueError for a folder that holds only llama.cpp's files."""
    if not any(folder.glob("*.safetensors")) and (files := sorted(file.name for file in folder.glob("*.gguf"))):
        raise ValueError(f"{folder}: {files[0]!r:.80} is GGUF, which is not read; safetensors are needed")


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """Return the JSON object in `data` (UTF-8); ValueError naming `source` for anything else and for repeated keys."""
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_distinct)
    except RecursionError:
        raise ValueError(f"{source}: not readable as JSON: nested too deeply") from None
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{source}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{source}: holds a JSON {type(value).__name__}; an object is needed")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        (key, count), *_ = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {key!r} occurs {count} times")
    return values
