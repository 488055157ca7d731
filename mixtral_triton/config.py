"""MixtralConfig: a checkpoint's config.json, read, checked and frozen."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "num_local_experts",
    "num_experts_per_tok",
    "max_position_embeddings",
)
# Kernels index rows with int32; a larger size is a broken file, not a model.
LARGEST_SIZE = 2**31 - 1
MOST_POSITIONS = 1 << 22  # the rotary tables hold a row for each: 2 GiB of them at head size 128
DTYPES = ("float32", "bfloat16", "float16")

# What a config.json may say about things that Mixtral has no code for: the only values that are fine, and why.
FIXED: dict[str, tuple[tuple[Any, ...], str]] = {
    "model_type": (("mixtral",), "other families have other layers"),
    "hidden_act": (("silu",), "Mixtral's experts are SwiGLU"),
    "attention_dropout": ((0, None), "dropout belongs to training, this runtime is for inference"),
    "attention_bias": ((False, None), "Mixtral's projections have no bias"),
    "mlp_bias": ((False, None), "Mixtral's experts have no bias"),
    "partial_rotary_factor": ((1, None), "Mixtral turns whole heads"),
}
ROPE_KEYS = {"rope_theta", "rope_type", "type", "partial_rotary_factor"}


@dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """The sizes and constants of a Mixtral model, under the names that checkpoints use (transformers' MixtralConfig).

    Defaults are Mixtral 8x7B's, except `rope_theta`, which always has to be given. Every way to make one (constructor,
    `from_dict`, `from_pretrained`) runs the same checks and raises ValueError naming the field.

    `head_dim` None becomes hidden_size // num_attention_heads. `sliding_window` None, 0 or -1 means no window and is
    kept as None; W means that query i sees keys i - W < j <= i. `eos_token_id` may be one id or several.
    `dtype` is what the file says ("bfloat16", ...): metadata, the stored tensors decide.
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # filled in below: an int once the config exists
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
        for name in SIZES:
            _check_size(name, getattr(self, name))
        if self.max_position_embeddings > MOST_POSITIONS:
            raise _error("max_position_embeddings", self.max_position_embeddings, f"at most {MOST_POSITIONS}")
        self._check_heads()
        self._set("rms_norm_eps", _positive_float("rms_norm_eps", self.rms_norm_eps))
        self._set("rope_theta", _positive_float("rope_theta", self.rope_theta))
        if self.sliding_window is not None:
            window = _integer("sliding_window", self.sliding_window, -1, "an integer above 0; null, 0, -1: no window")
            self._set("sliding_window", window if window > 0 else None)
        if not isinstance(self.tie_word_embeddings, bool):
            raise _error("tie_word_embeddings", self.tie_word_embeddings, "true or false")
        for name in ("bos_token_id", "pad_token_id"):
            self._set(name, _token_id(name, getattr(self, name)))
        self._set("eos_token_id", _token_ids("eos_token_id", self.eos_token_id))
        self._set("dtype", _dtype_name(self.dtype))

    def _check_heads(self) -> None:
        if self.num_experts_per_tok > self.num_local_experts:
            need = f"at most num_local_experts = {self.num_local_experts}"
            raise _error("num_experts_per_tok", self.num_experts_per_tok, need)
        heads = self.num_attention_heads
        if heads % self.num_key_value_heads:
            raise _error("num_key_value_heads", self.num_key_value_heads, f"a divisor of num_attention_heads = {heads}")
        if self.head_dim is None:
            if self.hidden_size % heads:
                need = f"a multiple of num_attention_heads = {heads} where head_dim is not given"
                raise _error("hidden_size", self.hidden_size, need)
            self._set("head_dim", self.hidden_size // heads)
        _check_size("head_dim", self.head_dim)
        if self.head_dim % 2:
            raise _error("head_dim", self.head_dim, "an even number: rotary embedding turns its halves as pairs")

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the one way to normalize a field of a frozen dataclass

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
        """The config in `values`, a config.json's content; `source` names it in errors.

        All sizes and theta have to be there: a default in silence would be another model. Fields that do not change
        inference (router_jitter_noise, use_cache, ...) are ignored; those that would need other code are refused.
        """
        try:
            if not isinstance(values, Mapping):
                raise ValueError(f"is {type(values).__name__}, a JSON object is needed")
            _check_foreign(values)
            fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
            fields["rope_theta"] = _read_theta(values)
            fields.setdefault("dtype", values.get("torch_dtype"))  # transformers < 5 wrote it under this name
            missing = [name for name in SIZES if name not in fields]
            if missing:
                raise ValueError(f"{', '.join(missing)} is missing and has no safe default")
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None


def checkpoint_folder(folder: str | os.PathLike[str]) -> Path:
    """`folder` as a Path; FileNotFoundError if there is none, NotADirectoryError if it is a file."""
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
    """ValueError for a folder of llama.cpp's files and nothing else."""
    if not any(folder.glob("*.safetensors")) and (files := sorted(file.name for file in folder.glob("*.gguf"))):
        raise ValueError(f"{folder}: {files[0]!r:.80} is GGUF, which is not read; safetensors are needed")


def parse_json_object(data: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `data` (UTF-8); ValueError naming `source` for anything else, repeated keys included."""
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
        raise ValueError(f"the key {key!r} stands there {count} times")
    return values


def _error(name: str, got: object, need: str) -> ValueError:
    return ValueError(f"{name} is {got!r:.80}; it has to be {need}")  # cut: a broken file may hold anything


def _integer(name: str, value: object, least: int, need: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST_SIZE:
        raise _error(name, value, need)
    return value


def _check_size(name: str, value: object) -> None:
    _integer(name, value, 1, f"an integer from 1 to {LARGEST_SIZE}")


def _positive_float(name: str, value: object) -> float:
    if not isinstance(value, bool) and isinstance(value, (int, float)):
        try:
            number = float(value)
        except OverflowError:  # an integer beyond any float
            number = math.inf
        if 0 < number < math.inf:
            return number
    raise _error(name, value, "a finite number above 0")


def _token_id(name: str, value: object) -> int | None:
    if value is None or (type(value) is int and value == -1):  # older configs write -1 for "none"
        return None
    return _integer(name, value, 0, "a token id (an integer, 0 or above) or null")


def _token_ids(name: str, value: object) -> int | tuple[int, ...] | None:
    if not isinstance(value, (list, tuple)):
        return _token_id(name, value)
    if not value:
        raise _error(name, value, "a token id, a list of at least one, or null")
    return tuple(_integer(name, item, 0, "token ids (integers, 0 or above)") for item in value)


def _dtype_name(value: object) -> str | None:
    if value is None:
        return None
    name = value.removeprefix("torch.") if isinstance(value, str) else value
    if name not in DTYPES:
        raise _error("dtype", value, f"one of {', '.join(DTYPES)}, or null")
    return str(name)


def _check_foreign(values: Mapping[str, Any]) -> None:
    """Refuse, by name, what would need code that Mixtral does not have."""
    if "model_type" not in values:
        raise ValueError("model_type is missing; it has to be 'mixtral'")
    for name, (allowed, why) in FIXED.items():
        if name in values and values[name] not in allowed:
            raise _error(name, values[name], f"{allowed[0]!r}: {why}")


def _read_theta(values: Mapping[str, Any]) -> float:
    """theta, which old configs keep as `rope_theta` and new ones inside `rope_parameters`; other ropes are refused."""
    found = {"rope_theta": values["rope_theta"]} if values.get("rope_theta") is not None else {}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise _error(name, rope, "an object or null")
        for key in ("rope_type", "type"):
            if rope.get(key, "default") != "default":
                raise _error(f"{name}.{key}", rope[key], "'default': scaled rotary embeddings are not supported")
        allowed, why = FIXED["partial_rotary_factor"]
        if rope.get("partial_rotary_factor") not in allowed:
            raise _error(f"{name}.partial_rotary_factor", rope["partial_rotary_factor"], f"1: {why}")
        unknown = sorted(str(key) for key in rope if key not in ROPE_KEYS and rope[key] is not None)
        if unknown:
            raise ValueError(f"{name} has {', '.join(unknown)}; only {', '.join(sorted(ROPE_KEYS))} are supported")
        if rope.get("rope_theta") is not None:
            found[f"{name}.rope_theta"] = rope["rope_theta"]
    if not found:
        raise ValueError("rope_theta is missing, in rope_parameters too, and has no safe default")
    thetas = {name: _positive_float(name, theta) for name, theta in found.items()}
    if len(set(thetas.values())) > 1:
        raise ValueError(" and ".join(f"{name} = {theta}" for name, theta in thetas.items()) + " disagree")
    return next(iter(thetas.values()))
