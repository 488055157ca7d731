"""Read how a checkpoint folder is quantized: a Scheme, or a ValueError that names what is not supported."""

from __future__ import annotations

import itertools
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..config import Field, is_size, read_json_object
from .layouts import FLOATS, I32, HubLayout, Plane

Config = Mapping[str, Any]
# Files that describe the quantization where config.json does not: the method, and the key that holds its config.
METHOD_FILES = {"hf_quant_config.json": ("modelopt", "quantization"), "quantize_config.json": ("gptq", None)}
ALTERNATIVE = 'or load the original bf16 checkpoint with weights="int4"'

FLAG = (None, True, False)
GROUP = Field(lambda size: size == -1 or is_size(size), "a positive integer, or -1 for a scale per row")
BLOCK = Field(lambda x: isinstance(x, list) and len(x) == 2 and all(map(is_size, x)), "[rows, columns]")
NAMES = Field(lambda x: isinstance(x, list) and all(isinstance(name, str) for name in x), "a list of names")
# The check of a value that is not null, or the values that a key may have. None: the key may be missing.
Rules = dict[str, Field | tuple[Any, ...]]
COMMON: Rules = {"dynamic": (None, False), "group_size": GROUP, "block_structure": BLOCK}
EIGHT_BITS: Rules = {"num_bits": (8,), "type": (None, "int", "float"), "symmetric": (None, True), **COMMON}
EIGHT_BITS |= {"strategy": ("channel", "tensor", "block")}
PACKED: Rules = {"num_bits": (4, 8), "type": (None, "int"), "symmetric": FLAG, **COMMON}
PACKED |= {"strategy": ("group", "channel")}
FORMATS = {"pack-quantized": PACKED}
FORMATS |= dict.fromkeys(("float-quantized", "int-quantized", "naive-quantized"), EIGHT_BITS)
FP8: Rules = {"weight_block_size": BLOCK, "ignored_layers": NAMES, "modules_to_not_convert": NAMES}
MODELOPT: Rules = {"quant_algo": ("FP8",), "exclude_modules": NAMES, "ignore": NAMES}
GPTQ: Rules = {"is_marlin_format": (None, False), "checkpoint_format": ("gptq", "gptq_v2"), "bits": (4, 8)}
GPTQ |= {"sym": FLAG, "group_size": GROUP}
AWQ: Rules = {"version": (None, "gemm", "GEMM"), "bits": (4,), "zero_point": (None, True), "group_size": GROUP}
AWQ |= {"modules_to_not_convert": NAMES}
COLUMN_SCALES = Plane("scales", FLOATS, transposed=True)


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantized.

    name     of the format, for messages
    groups   layouts of the quantized linears, by patterns of their names; the first is also that of all others. The
             tensors show which linears are quantized
    dense    patterns of the linears that the config declares dense, and `matches(name, pattern)` for them
    """

    name: str
    groups: Sequence[tuple[Sequence[str], HubLayout]]
    dense: Sequence[str] = ()
    matches: Callable[[str, str], bool] = operator.eq

    def layout(self, name: str) -> HubLayout:
        """Return the layout of the linear of this name on disk."""
        found = (layout for patterns, layout in self.groups if any(self.matches(name, each) for each in patterns))
        return next(found, self.groups[0][1])


def read_scheme(folder: Path) -> Scheme | None:
    """Return the folder's scheme, None for a dense checkpoint; ValueError names the file, the key and the value."""
    path = folder / "config.json"
    values = read_json_object(path) if path.is_file() else {}
    config = values.get("quantization_config", values.get("compression_config"))
    for file, (method, key) in METHOD_FILES.items():
        if config is None and (folder / file).is_file():
            path = folder / file
            config = read_json_object(path)
            config = config if key is None else config.get(key, {})
            config = {"quant_method": method, **config} if isinstance(config, Mapping) else config
    if config is None:
        return None
    try:
        if not isinstance(config, Mapping):
            raise _error("the value", config, "a JSON object")
        method = str(config.get("quant_method"))
        if method not in READERS:
            raise _error("quant_method", method, f"one of {', '.join(READERS)}")
        return READERS[method](config)
    except ValueError as error:
        raise ValueError(f"{path}: quantization_config: {error}; {ALTERNATIVE}") from None


def _error(name: str, value: Any, need: str) -> ValueError:
    return ValueError(f"{name} is {value!r:.80}, needs {need}")


def _check(config: Config, rules: Rules) -> None:
    for key, rule in rules.items():
        value = config.get(key)
        if isinstance(rule, Field):
            if value is not None and not rule.check(value):
                raise _error(key, value, rule.need)
        elif not any(type(value) is type(allowed) and value == allowed for allowed in rule):
            raise _error(key, value, " or ".join(str(allowed) for allowed in rule if allowed is not None))


def _compressed_tensors(config: Config) -> Scheme:
    for name, key in (("transform_config", "config_groups"), ("sparsity_config", "format")):
        other = config.get(name)
        if isinstance(other, Mapping) and other.get(key) not in (None, {}, "dense"):
            raise _error(name, other, "to be absent")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(each, Mapping) for each in groups.values()):
        raise _error("config_groups", groups, "an object of groups")
    found, formats = [], dict[str, None]()
    for each in groups.values():
        weights, format = each.get("weights"), str(each.get("format") or config.get("format"))
        if not isinstance(weights, Mapping):
            raise _error("config_groups", groups, "groups with weights")
        _check({**config, **each, "format": format}, {"format": tuple(FORMATS), "ignore": NAMES, "targets": NAMES})
        _check(weights, FORMATS[format])
        found.append((each.get("targets") or (), _group_layout(format, weights)))
        formats[format] = None
    # A class of modules is the last choice, for linears that no name matches.
    found.sort(key=lambda item: "Linear" not in item[0])
    dense = config.get("ignore") or ()
    for pattern in itertools.chain(dense, *(targets for targets, _ in found)):
        _matches_regex("", pattern)  # raises ValueError
        # The time that a match takes grows with the power of the repeats, and without bound where a group repeats.
        operators = re.sub(r"\\.|\(\?", "(", pattern) if pattern.startswith("re:") else ""
        if len(re.findall("[*+?{|]", operators)) > 8 or re.search(r"\)[*+{]|([*+{].*){5}", operators):
            raise _error("a pattern of ignore or targets", pattern, "at most 4 repeats, none of a group")
    return Scheme(f"compressed-tensors, {' and '.join(formats)}", found, dense, _matches_regex)


def _group_layout(format: str, weights: Config) -> HubLayout:
    """Return the layout of a group of compressed-tensors with these arguments of its weights."""
    bits, symmetric, strategy = weights["num_bits"], weights.get("symmetric"), weights["strategy"]
    group, block = weights.get("group_size"), weights.get("block_structure")
    if format == "pack-quantized":
        if bits == 8 and symmetric is False:
            raise _error("symmetric", symmetric, "true for 8 bits")
        codes, scales = Plane("weight_packed", I32, columns=32 // bits), Plane("weight_scale", FLOATS)
        zeros = Plane("weight_zero_point", I32, rows=8) if symmetric is False else None
        reordered = weights.get("actorder") in ("group", "dynamic", True)
        form = "int4" if bits == 4 else "int8", codes, scales, zeros, group if strategy == "group" else None
        return HubLayout(*form, zeros is None, reordered=reordered, extras=("weight_shape", "weight_g_idx"))
    if strategy == "block" and block is None:
        raise _error("block_structure", block, BLOCK.need)
    block = block if strategy == "block" else None
    return _eight_bits("fp8" if weights.get("type") == "float" else "int8", block=block)


def _eight_bits(format: str, scale: str = "weight_scale", block: Sequence[int] | None = None) -> HubLayout:
    """Return the layout of fp8 (e4m3) or int8 codes [N,K] with a scale per tensor, row or block [rows, columns]."""
    codes = Plane("weight", ("F8_E4M3",) if format == "fp8" else ("I8",))
    if block is None:
        return HubLayout(format, codes, Plane(scale, FLOATS, any_shape=True))
    return HubLayout(format, codes, Plane(scale, FLOATS, rows=block[0]), group=block[1])


def _matches_regex(name: str, pattern: str) -> bool:
    """Match as compressed-tensors does: a full name, or a regular expression after "re:"."""
    try:
        return bool(re.match(pattern[3:], name)) if pattern.startswith("re:") else name == pattern
    except re.error as error:
        got = f"ignore or targets has the pattern {pattern!r:.80}"
        raise ValueError(f"{got}, needs a regular expression: {error}") from None


def _fp8(config: Config) -> Scheme:
    """AutoFP8 has a scale per tensor; DeepSeek's and transformers' checkpoints have one per block."""
    _check(config, FP8)
    dense, block = config.get("ignored_layers") or config.get("modules_to_not_convert"), config.get("weight_block_size")
    name, scale = ("fp8", "weight_scale") if block is None else ("fp8 in blocks", "weight_scale_inv")
    return Scheme(name, [((), _eight_bits("fp8", scale, block))], dense or ())


def _modelopt(config: Config) -> Scheme:
    _check(config, MODELOPT)
    dense = config.get("exclude_modules") or config.get("ignore") or ()
    return Scheme("modelopt FP8", [((), _eight_bits("fp8"))], dense, fnmatchcase)


def _gptq(config: Config) -> Scheme:
    config = {"checkpoint_format": config.get("format", "gptq"), **config}
    _check(config, GPTQ)
    group, version, bits = config.get("group_size"), config["checkpoint_format"], config["bits"]
    codes = Plane("qweight", I32, columns=32 // bits, transposed=True)
    zeros = Plane("qzeros", I32, rows=32 // bits, transposed=True)
    symmetric, reordered = config.get("sym") is not False, config.get("desc_act") is True and group not in (None, -1)
    form = "int4" if bits == 4 else "uint8", codes, COLUMN_SCALES, zeros, group, symmetric, int(version == "gptq")
    return Scheme(f"{version}, {bits} bits", [((), HubLayout(*form, reordered, ("g_idx", "bias"), bits))])


def _awq(config: Config) -> Scheme:
    config = {"bits": config.get("w_bit"), "group_size": config.get("q_group_size"), **config}
    _check(config, AWQ)
    codes, zeros = (Plane(name, I32, rows=8, transposed=True, ordered=True) for name in ("qweight", "qzeros"))
    layout = HubLayout("int4", codes, COLUMN_SCALES, zeros, config["group_size"], symmetric=False, extras=("bias",))
    return Scheme("awq", [((), layout)], config.get("modules_to_not_convert") or (), operator.contains)


READERS = {"compressed-tensors": _compressed_tensors, "fp8": _fp8, "modelopt": _modelopt, "gptq": _gptq, "awq": _awq}
