"""A checkpoint's folder, local or on the hub, and MixtralConfig: its config.json, read, checked and frozen."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from .families import FAMILIES, FIXED, SIZES, Family, Fixed

SMALL = Path(__file__).parents[1] / "small"  # the checkpoint of the package, also by the name "small"
# What the command `fit` takes in place of a folder.
FIT_NAMES = "mixtral-8x7b", "mixtral-8x22b", "qwen3-30b-a3b", "olmoe-1b-7b"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# `mistralai/Mixtral-8x7B-v0.1`, and perhaps a branch, tag or commit after an @.
NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?")
GENERATION_FILE = "generation_config.json"
CONFIG_FILES = ["config.json", GENERATION_FILE, "hf_quant_config.json"]
TEXT_FILES = ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"]
TEXT_FILES += ["chat_template.jinja", INDEX_FILE]
LARGEST_SIZE = 2**31 - 1  # kernels index rows with int32
MOST_POSITIONS = 1 << 22  # the rotary tables hold a row for each: 2 GiB of them at head size 128
PREFILL_CHUNK = 2048  # tokens: bounds the activations of a long prompt
DTYPES = ("float32", "bfloat16", "float16")


def is_size(value: Any, least: int = 1, most: int = LARGEST_SIZE, multiple_of: int = 1) -> bool:
    return type(value) is int and least <= value <= most and value % multiple_of == 0


def _is_positive(value: Any, *or_equal: float) -> bool:
    return type(value) in (int, float) and (0 < value < 1e308 or value in or_equal)


class Field(NamedTuple):
    """The check of a value, what the error says is needed, and the values that mean null; none: it is required."""

    check: Callable[[Any], bool]
    need: str
    null: tuple[int | None, ...] = ()


_SIZE = Field(is_size, f"an integer from 1 to {LARGEST_SIZE}")
_NUMBER = Field(_is_positive, "a finite number above 0")
_is_id = partial(is_size, least=0)
_ID = Field(_is_id, "a token id (an integer, 0 or above) or null", (None, -1))
_FLAG = Field(lambda value: type(value) is bool, "true or false")
_SERVED = "in transformers, mixtral_triton.register() serves other families"
FIELDS = dict.fromkeys(SIZES, _SIZE) | {
    "model_type": Field(FAMILIES.__contains__, f"one of {', '.join(FAMILIES)}: {_SERVED}"),
    "max_position_embeddings": Field(partial(is_size, most=MOST_POSITIONS), f"an integer from 1 to {MOST_POSITIONS}"),
    "head_dim": Field(partial(is_size, multiple_of=2), "an even integer above 0: rotary embedding pairs its halves"),
    "rms_norm_eps": _NUMBER,
    "rope_theta": _NUMBER,
    "sliding_window": Field(is_size, "an integer above 0; null, 0, -1: no window", (None, 0, -1)),
    "tie_word_embeddings": _FLAG,
    "renormalize": _FLAG,
    "bos_token_id": _ID,
    "pad_token_id": _ID,
    "eos_token_id": Field(
        lambda value: value != () and all(map(_is_id, value)) if isinstance(value, tuple) else _is_id(value),
        "a token id, a list of at least one, or null",
        (None, -1),
    ),
    "dtype": Field(DTYPES.__contains__, f"one of {', '.join(DTYPES)}, or null", (None,)),
}
FIXED_ROPE: Fixed = dict.fromkeys(("rope_type", "type"), (("default",), "scaled rotary embeddings are not supported"))
FIXED_ROPE |= {"partial_rotary_factor": FIXED["partial_rotary_factor"]}
ROPE_KEYS = {"rope_theta", *FIXED_ROPE}


@dataclass(frozen=True, kw_only=True)
class MixtralConfig:
    """The sizes and constants of a model of FAMILIES, under the names of transformers' MixtralConfig.

    Defaults are Mixtral 8x7B's; only `rope_theta` has none. A wrong field raises a ValueError that names it as the
    family's config.json does.
    `head_dim` None becomes hidden_size // num_attention_heads. `sliding_window` None, 0 or -1 means no window and is
    kept as None; W means that query i sees keys i - W < j <= i. `eos_token_id` may be one id or several.
    `dtype` is the file's ("bfloat16", ...); the stored tensors decide. `intermediate_size` is an expert's.
    `renormalize`: the routing weights of a token's experts sum to 1.
    """

    model_type: str = "mixtral"
    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = None  # type: ignore[assignment]  # __post_init__ sets an int
    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    renormalize: bool = True
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
        heads, experts = self.num_attention_heads, self.num_local_experts
        check_value("model_type", self.model_type, FIELDS["model_type"].need, self.model_type in FAMILIES)
        name_of = self.family.name_of
        for name, field in FIELDS.items():
            value = getattr(self, name)
            if name == "head_dim" and value is None:
                need = f"a multiple of num_attention_heads = {heads} where head_dim is missing"
                check_value("hidden_size", self.hidden_size, need, self.hidden_size % heads == 0)
                value = self.hidden_size // heads
            value = value.removeprefix("torch.") if isinstance(value, str) else value
            value = _check_field(name_of(name), value, field)
            # The only assignment that a frozen dataclass allows.
            object.__setattr__(self, name, float(value) if field is _NUMBER else value)
        need = f"at most {name_of('num_local_experts')} = {experts}"
        check_value("num_experts_per_tok", self.num_experts_per_tok, need, self.num_experts_per_tok <= experts)
        need = f"a divisor of num_attention_heads = {heads}"
        check_value("num_key_value_heads", self.num_key_value_heads, need, heads % self.num_key_value_heads == 0)

    @property
    def family(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def window(self) -> int | None:
        """`sliding_window`, or None where no position can leave it."""
        window = self.sliding_window
        return window if window is not None and window < self.max_position_embeddings else None

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> MixtralConfig:
        """Read `folder`/config.json, as Hugging Face checkpoints have it; generation_config.json adds to eos_token_id.

        Raises FileNotFoundError for a missing folder or file, ValueError for anything else; the message names the file,
        the field, what it got and what is needed.
        """
        path = checkpoint_folder(folder, tensors=False) / "config.json"
        config = cls.from_dict(read_json_object(path), source=str(path))
        file = path.parent / GENERATION_FILE
        stored = read_json_object(file).get("eos_token_id") if file.is_file() else None
        name = f"{file}: eos_token_id"
        values = _check_field(name, stored, FIELDS["eos_token_id"]), config.eos_token_id
        added, ids = ([] if value is None else value if isinstance(value, tuple) else [value] for value in values)
        need = f"ids below vocab_size = {config.vocab_size}"
        check_value(name, values[0], need, max(added, default=0) < config.vocab_size)
        new = [token for token in dict.fromkeys(added) if token not in ids]
        return replace(config, eos_token_id=(*ids, *new)) if new else config

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> MixtralConfig:
        """Return the config in `values`, a config.json's content; `source` names it in errors.

        All sizes and theta are required, since a default would silently be another model. Fields that do not change
        inference (router_jitter_noise, use_cache, ...) are ignored; those that would need other code are refused.
        """
        with error_prefix(source):
            model_type = values.get("model_type", "")  # first: another family has other sizes
            known = isinstance(model_type, str) and model_type in FAMILIES
            check_value("model_type", model_type, FIELDS["model_type"].need, known or "model_type" not in values)
            family = FAMILIES[model_type or "mixtral"]
            _check_fixed("", values, FIXED | family.fixed)
            names = {name: family.name_of(name, values) for name in cls.__dataclass_fields__}
            if missing := [names[name] for name in ("model_type", *family.required) if names[name] not in values]:
                raise ValueError(f"{', '.join(missing)} is missing and has no safe default")
            off = {name for name, switch in family.switches.items() if not values.get(switch)}
            stored = {name: values[key] for name, key in names.items() if key in values and name not in off}
            stored.setdefault("dtype", values.get("torch_dtype"))  # transformers < 5 wrote it under this name
            return cls(**{**family.defaults, **stored, "rope_theta": _read_theta(values)})


@contextmanager
def error_prefix(prefix: str) -> Iterator[None]:
    """Put what an error is about before its text."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{prefix}: {error}") from None


def check_value(name: str, value: object, need: str, right: bool) -> None:
    """Raise ValueError, which names the value, unless it is right."""
    if not right:
        raise ValueError(f"{name} is {value!r:.80}, needs {need}")  # cut: a broken file may hold anything


def _check_field(name: str, value: Any, field: Field) -> Any:
    """Return the value, a list as a tuple, None for one that means null; ValueError for one that is not allowed."""
    value = tuple(value) if isinstance(value, list) else value
    if any(type(value) is type(null) and value == null for null in field.null):
        return None
    check_value(name, value, field.need, field.check(value))
    return value


def _check_fixed(prefix: str, values: Mapping[str, Any], table: Fixed) -> None:
    for key, (allowed, reason) in table.items():
        right = key not in values or values[key] in allowed
        check_value(f"{prefix}{key}", values.get(key), f"{allowed[0]!r}: {reason}", right)


def _read_theta(values: Mapping[str, Any]) -> float:
    """Return theta, from `rope_theta` in old configs and `rope_parameters` in new ones; reject other ropes."""
    thetas: dict[str, Any] = {"rope_theta": values.get("rope_theta")}
    for name in ("rope_parameters", "rope_scaling"):
        rope = values.get(name) or {}
        check_value(name, rope, "an object or null", isinstance(rope, Mapping))
        _check_fixed(f"{name}.", rope, FIXED_ROPE)
        unknown = [key for key in rope if key not in ROPE_KEYS and rope[key] is not None]
        check_value(f"a key of {name}", unknown[:1], f"one of {', '.join(sorted(ROPE_KEYS))}", not unknown)
        thetas[f"{name}.rope_theta"] = rope.get("rope_theta")
    thetas = {name: theta for name, theta in thetas.items() if theta is not None}
    for name, theta in thetas.items():
        check_value(name, theta, _NUMBER.need, _is_positive(theta))
    # In no place, or in two that differ; it has no safe default.
    check_value("rope_theta", thetas, "one number, there or in rope_parameters", len({*thetas.values()}) == 1)
    return next(iter(thetas.values()))


def checkpoint_folder(folder: str | os.PathLike[str], tensors: bool = True) -> Path:
    """Return a local folder as a Path, or that of the cached snapshot of a name on the hub.

    Only files that are read are downloaded; tensors False: without those of weights and text.
    Raises FileNotFoundError if there is none.
    """
    if not isinstance(folder, (str, os.PathLike)):
        raise ValueError(f"folder is a {type(folder).__name__}, needs the path of a folder, or a name on the hub")
    path = SMALL if folder == SMALL.name and not os.path.lexists(folder) else Path(folder)
    _reject_other_files(path)
    if not path.is_dir():
        if not isinstance(folder, str) or NAME.fullmatch(folder) is None or path.is_file():
            needs = "a local checkpoint, or a name on the hub like mistralai/Mixtral-8x7B-v0.1"
            note = " (only the command fit takes this name)" if str(folder).lower() in FIT_NAMES else ""
            raise FileNotFoundError(f"{path}: no such folder{note}, needs {needs}")
        return _snapshot(folder, tensors)
    return path


def _reject_other_files(path: Path) -> None:
    """Raise ValueError for GGUF files, and for a folder with an adapter and no model."""
    files = {file.name for file in path.iterdir()} if path.is_dir() else {path.name} if path.is_file() else set()
    ends = {os.path.splitext(name)[1] for name in files}
    if ".gguf" in ends and ".safetensors" not in ends:
        raise ValueError(f"{path} is of GGUF, which llama.cpp runs, needs the .safetensors files that it was made from")
    if "adapter_config.json" in files and "config.json" not in files:
        need = "a whole model: PEFT's merge_and_unload and then save_pretrained, with the tokenizer, write one"
        raise ValueError(f"{path} is an adapter of PEFT, needs {need}")


def _snapshot(name: str, tensors: bool) -> Path:
    """Return the folder in huggingface_hub's cache, after it downloaded what is missing, with its own progress."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    patterns, needed = CONFIG_FILES + (TEXT_FILES if tensors else []), list[str]()
    while True:
        try:
            path = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
        except Exception as error:  # its network library's errors are neither OSErrors nor ValueErrors
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise FileNotFoundError(f"{name}: is no folder here, and the hub says {text}") from error
        if not tensors or needed:
            break
        MixtralConfig.from_pretrained(path)  # another architecture is refused before its weights come
        index = Path(path) / INDEX_FILE
        patterns = needed = sorted(read_index(index)) if index.is_file() else [SINGLE_FILE]
        revision = index.parent.name  # the same commit, whatever is pushed meanwhile
        if all((Path(path) / file).is_file() for file in needed):
            break  # huggingface_hub 1.33 looks a commit up even offline
    return Path(path)


def check_one_source(folder: Path) -> None:
    """Raise ValueError where a folder has a single file and an index of shards, either of which may be older."""
    both = all(os.path.lexists(folder / name) for name in (SINGLE_FILE, INDEX_FILE))
    check_value(f"{folder}: files", [SINGLE_FILE, INDEX_FILE] if both else [], "one of the two, the newer", not both)


def read_index(index: Path) -> dict[str, list[str]]:
    """Return the names of the tensors in each file of `weight_map` (tensor name -> plain name of a file here)."""
    weight_map: Any = read_json_object(index).get("weight_map")
    check_value(f"{index}: weight_map", weight_map, "an object of file names", isinstance(weight_map, dict))
    names: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        # Checks the name, not a link's target: the hub's cache links to ../../blobs.
        plain = isinstance(file, str) and Path(file).name == file and not {*"*?["} & {*file}  # no pattern
        need = "the plain name of a .safetensors file"
        check_value(f"{index}: the file of {name!r:.80}", file, need, plain and file.endswith(".safetensors"))
        names.setdefault(file, []).append(name)
    return names


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file in UTF-8; ValueError that names it for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise ValueError(f"{path}: not readable as JSON: {error}") from None
    check_value(f"{path}: the value", value, "a JSON object", isinstance(value, dict))
    return value  # type: ignore[no-any-return]


def escape(value: object, most: int = 80) -> str:
    """Return what a file says, for a message: no character that a terminal would act on, and at most so many."""
    return ascii(str(value))[1:-1][:most]
