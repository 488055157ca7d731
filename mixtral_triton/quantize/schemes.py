"""Read how a checkpoint folder is quantized: a Scheme, or a ValueError that names what is not supported."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..config import parse_json_object
from .layouts import Columns, EightBits, Layout, Packed

Folder = str | os.PathLike[str]
MODELOPT_FILE = "hf_quant_config.json"
ALTERNATIVE = 'quantize the original in bf16 while it is read: weights="int4"'
REFUSED = {
    "bitsandbytes": "its nf4 and int8 have tables and outliers that no kernel here reads",
    "hqq": "its scales and zeros are quantized themselves",
    "mxfp4": "its scales are powers of two for 32 columns, its codes fp4",
    "gguf": "its blocks are llama.cpp's",
}


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    name     the format, for messages
    layout   the layout of each quantized linear; the tensors show which ones are
    ignored  whether the config excludes a linear, by its name on disk
    """

    name: str
    layout: Layout
    ignored: Callable[[str], bool]


def read_scheme(folder: Path) -> Scheme | None:
    """Return None where nothing is quantized; ValueError names the file, an unsupported format and an alternative."""
    path = folder / "config.json"
    values = parse_json_object(path.read_bytes(), str(path)) if path.is_file() else {}
    config = values.get("quantization_config", values.get("compression_config"))
    if config is None and (folder / MODELOPT_FILE).is_file():
        path = folder / MODELOPT_FILE
        config = parse_json_object(path.read_bytes(), str(path)).get("quantization", {})
        config = {"quant_method": "modelopt", **config} if isinstance(config, Mapping) else config
    if config is None:
        return None
    try:
        return scheme(config)
    except ValueError as error:
        raise ValueError(f"{path}: quantization_config: {error}") from None


def scheme(config: Any) -> Scheme:
    """Return the scheme of a `quantization_config`; ValueError for what is not supported."""
    if not isinstance(config, Mapping):
        raise ValueError(f"is a {type(config).__name__}, a JSON object is needed")
    method = config.get("quant_method")
    if not isinstance(method, str) or method not in READERS:
        why = REFUSED.get(str(method), f"read are {', '.join(READERS)}")
        raise ValueError(f"quant_method {method!r} is not read: {why}; {ALTERNATIVE}")
    return READERS[method](config)


def _refuse(name: str, value: Any, needs: str) -> ValueError:
    return ValueError(f"{name} {value!r:.80} is not read: needs {needs}; or {ALTERNATIVE}")


def _group(config: Mapping[str, Any], name: str = "group_size") -> int | None:
    """Return the columns of a group; None: one scale per row."""
    size = config.get(name)
    if size is None or (type(size) is int and size == -1):
        return None
    if type(size) is not int or size < 1:
        raise _refuse(name, size, "an integer, or -1 for one scale per row")
    return size


def _names(config: Mapping[str, Any], *keys: str) -> list[str]:
    """Return the list under the first of these keys that has one."""
    value: Any = next((config[key] for key in keys if config.get(key) is not None), [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{keys[0]} is {value!r:.80}, a list of names is needed")
    return value


def _flag(config: Mapping[str, Any], name: str) -> bool:
    value = config.get(name, True)
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.80}, needs true or false")
    return value


def _named_or_matched(patterns: list[str]) -> Callable[[str], bool]:
    """Return compressed-tensors' test of a name: equal to a pattern, or matching a regular expression after "re:"."""

    def ignored(name: str) -> bool:
        return any(re.match(one[3:], name) if one.startswith("re:") else one == name for one in patterns)

    try:
        ignored("")
    except re.error as error:
        raise ValueError(f"ignore has a pattern that is no regular expression: {error}") from None
    return ignored


def _compressed_tensors(config: Mapping[str, Any]) -> Scheme:
    for name, key in (("transform_config", "config_groups"), ("sparsity_config", "format")):
        other = config.get(name)
        if isinstance(other, Mapping) and other.get(key) not in (None, {}, "dense"):
            raise _refuse(name, other, f"no {name}")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(one, Mapping) for one in groups.values()):
        raise ValueError(f"config_groups is {groups!r:.80}, an object of groups is needed")
    first = next(iter(groups.values()))
    if any(one.get("weights") != first.get("weights") for one in groups.values()):
        raise _refuse("config_groups", list(groups), "one kind of weights")
    weights = first.get("weights")
    if not isinstance(weights, Mapping):
        raise ValueError(f"the weights of config_groups are {weights!r:.80}, an object is needed")
    format = first.get("format") or config.get("format")
    layout = _compressed_layout(format, weights)
    return Scheme(f"compressed-tensors, {format}", layout, _named_or_matched(_names(config, "ignore")))


def _compressed_layout(format: Any, weights: Mapping[str, Any]) -> Layout:
    bits, kind, strategy = weights.get("num_bits"), weights.get("type", "int"), weights.get("strategy")
    symmetric = _flag(weights, "symmetric")
    if weights.get("dynamic"):
        raise _refuse("dynamic", weights["dynamic"], "weights whose scales are stored")
    if format == "pack-quantized":
        if kind != "int" or bits not in (4, 8) or (bits == 8 and not symmetric):
            raise _refuse("num_bits", bits, "int of 4 bits, or of 8 if symmetric")
        if strategy not in ("group", "channel"):
            raise _refuse("strategy", strategy, "group or channel")
        reordered = weights.get("actorder") in ("group", "dynamic", True)
        return Packed(bits, _group(weights) if strategy == "group" else None, symmetric, reordered)
    if format not in ("float-quantized", "int-quantized", "naive-quantized"):
        raise _refuse("format", format, "pack-quantized, float-quantized or int-quantized")
    if bits != 8 or kind not in ("int", "float") or not symmetric:
        raise _refuse("num_bits", bits, "symmetric weights of 8 bits")
    if strategy not in ("channel", "tensor", "block"):
        raise _refuse("strategy", strategy, "channel, tensor or block")
    block = _block(weights, "block_structure") if strategy == "block" else None
    return EightBits("fp8" if kind == "float" else "int8", block=block)


def _block(config: Mapping[str, Any], name: str) -> tuple[int, int]:
    block = config.get(name)
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise ValueError(f"{name} is {block!r:.80}, needs [rows, columns]")
    if 128 % block[0]:
        raise _refuse(name, block, "rows that divide 128")
    return block[0], block[1]


def _fp8(config: Mapping[str, Any]) -> Scheme:
    """Read AutoFP8, with a scale per tensor, and the blocks of DeepSeek's checkpoints and transformers."""
    names = _names(config, "ignored_layers", "modules_to_not_convert")
    if config.get("weight_block_size") is None:
        return Scheme("fp8", EightBits("fp8"), names.__contains__)
    block = _block(config, "weight_block_size")
    return Scheme("fp8 in blocks", EightBits("fp8", "weight_scale_inv", block), names.__contains__)


def _modelopt(config: Mapping[str, Any]) -> Scheme:
    algorithm = config.get("quant_algo")
    if algorithm != "FP8":
        raise _refuse("quant_algo", algorithm, "FP8")
    names = _names(config, "exclude_modules", "ignore")
    return Scheme("modelopt FP8", EightBits("fp8"), lambda name: any(fnmatchcase(name, one) for one in names))


def _gptq(config: Mapping[str, Any]) -> Scheme:
    version = config.get("checkpoint_format", config.get("format", "gptq"))
    if config.get("is_marlin_format"):
        version = "marlin"
    if version not in ("gptq", "gptq_v2"):
        raise _refuse("checkpoint_format", version, "gptq or gptq_v2")
    if config.get("bits") != 4:
        raise _refuse("bits", config.get("bits"), "4")
    group, reordered = _group(config), config.get("desc_act") is True
    layout = Columns("gptq", group, int(version == "gptq"), _flag(config, "sym"), reordered and group is not None)
    return Scheme(version, layout, lambda name: False)


def _awq(config: Mapping[str, Any]) -> Scheme:
    version = config.get("version", "gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise _refuse("version", version, "gemm")
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4 or config.get("zero_point") is False:
        raise _refuse("bits, zero_point", [bits, config.get("zero_point")], "4 and true")
    group = _group(config, "group_size" if "group_size" in config else "q_group_size")
    names = _names(config, "modules_to_not_convert")
    return Scheme("awq", Columns("awq", group), lambda name: any(one in name for one in names))


READERS = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "modelopt": _modelopt, "gptq": _gptq, "awq": _awq}
